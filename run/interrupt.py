"""A request to end during training: the step finishes, the run is saved, and then the program ends.

    SIGINT     Ctrl-C
    SIGTERM    Slurm at the end of the time limit, `docker stop`, `kill`
    SIGHUP     the terminal is closed, or the ssh connection is lost (with `nohup` it is ignored, and stays ignored)

A program that a signal has ended exits with the status 128 + the signal's number: 130, 143 or 129. Only a second Ctrl-C
stops at once. A second SIGTERM or SIGHUP does not: both may come together (systemd), or one of them twice (`timeout`).
"""
import contextlib
import signal

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # (not in Windows)


class Interrupted(KeyboardInterrupt):
    """The run is saved. signum: the signal that asked for the end."""

    def __init__(self, signum: int):
        self.signum = signum


class Interrupt:
    """`with Interrupt() as interrupt:` a signal inside only sets `interrupt.seen`; Ctrl-C after it stops at once."""

    def __enter__(self):
        self.seen, self.before = None, {}
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not the main thread (a notebook's kernel, a test): leave it as it is
                    self.before[signum] = signal.signal(signum, self.note)
        return self

    def note(self, signum, frame):
        if self.seen and signum == signal.SIGINT:
            raise Interrupted(signum)
        self.seen = self.seen or signum

    def __exit__(self, *error):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
