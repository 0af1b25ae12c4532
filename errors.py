"""The one kind of error that is meant for the user."""


class UserError(Exception):
    """An error that the user can fix; printed as one line, without a traceback."""
