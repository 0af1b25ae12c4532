"""Ctrl-C during training: the step finishes, the run is saved, and then the program ends."""
import signal


class Interrupt:
    """`with Interrupt() as interrupt:` the first Ctrl-C inside only sets `interrupt.seen`; a second one stops at once."""

    def __enter__(self):
        self.seen = False
        try:
            self.before = signal.signal(signal.SIGINT, self.note)
        except ValueError:  # not the main thread (a notebook's kernel, a test): leave Ctrl-C as it is
            self.before = None
        return self

    def note(self, signum, frame):
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *error):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
