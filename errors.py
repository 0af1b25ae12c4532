"""The one kind of error that is meant for the user."""


class UserError(Exception):
    """An error that the user can fix; printed as one line, without a traceback."""

    def __str__(self):  # a damaged file may put anything into a name: line ends, codes that clear the screen
        return "".join(c if c.isprintable() else " " for c in super().__str__())
