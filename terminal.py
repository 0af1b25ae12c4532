"""How the commands start and end. Only `if __name__ == "__main__":` uses this file, so a program that imports train.py keeps
its own signals and its own standard output.

* start() comes before `import torch`, which takes seconds: Ctrl-C ends the program there too, without a traceback.
* A terminal that cannot show a character gets an escape for it (LC_ALL=C and "\\xe9"), not a UnicodeEncodeError.
* If nobody reads any more (`| head -1`, a closed terminal), a command either ends quietly, or continues without output.
"""
import io
import os
import signal
import sys
from collections.abc import Callable

from errors import UserError


class Output(io.TextIOWrapper):
    """A standard output that loses its text, instead of raising an error, once nobody reads it any more."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return self.lose(text)

    def flush(self):
        try:
            super().flush()
        except OSError:
            self.lose()

    def lose(self, text: str = "") -> int:
        to_nowhere(self)
        return len(text)


def to_nowhere(stream):
    """What is written to `stream` from now on, and what waits in its buffer, goes to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def start():
    """Before the slow imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # (`nohup ... &` may have it ignored: it stays so)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(main: Callable[[], object], needs_a_reader: bool = False):
    """Call main() and exit: 0, 1 after a UserError, 2 for wrong options, 128 + the number of the signal that ended it.

    needs_a_reader: end quietly when nobody reads the output. Else main() continues, for the sake of the files it writes.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name) or open(os.devnull, mode)  # noqa: SIM115 (None where the caller has closed it: `>&-`)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")
            if mode == "w" and not needs_a_reader:
                stream = Output(stream.detach(), stream.encoding, stream.errors, line_buffering=stream.line_buffering)
        setattr(sys, name, stream)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        to_nowhere(sys.stdout)
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt as e:
        sys.exit(128 + getattr(e, "signum", signal.SIGINT))
