"""Commands whose terminal is poor, gone or impatient. Each is a real process, so that its streams and signals are real."""
import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios

import pytest
from conftest import NANO, ROOT, make_folder

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python itself would take UTF-8 for LC_ALL=C
PROGRAMS = [[ROOT / "train.py"], [ROOT / "generate.py"], [ROOT / "export.py"], ["-m", "bench"]]


def start(words, env=None, **more):
    """The process of `python WORDS`. Its output is captured, unless `more` says where it goes."""
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, *words], env={**os.environ, **(env or {})}, **{**streams, **more})


@pytest.fixture
def place(tmp_path):
    make_folder(tmp_path / "modèle", "gpt2")
    row = '{"instruction": "Où est le café ?", "output": "Là-bas, près de la forêt."}\n'
    (tmp_path / "données.jsonl").write_text(12 * row, encoding="utf-8")
    return tmp_path


def test_a_run_continues_when_nobody_reads_it(place):
    """Its standard output is a pipe that nobody reads. Its error output is a terminal, which closes in the middle. The
    script's folder is not on sys.path, paths are not ASCII, and the locale is."""
    screen, terminal = os.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns: without any, there is no bar
    read, write = os.pipe()
    os.close(read)
    words = [ROOT / "train.py", "--model", "modèle", "--data", "données.jsonl", "--out", "$été_$", "--steps", "3",
             "--save-every", "1", "--samples", "1", "--max-length", "64"]
    p = start(words, {**ASCII, "PYTHONSAFEPATH": "1"}, cwd=place, stdout=write, stderr=terminal)
    os.close(write)
    os.close(terminal)
    shown = b""
    while b"training" not in shown:  # the progress bar
        shown += os.read(screen, 1000)
    os.close(screen)
    assert p.wait(120) == 0
    assert {f.name for f in (place / "$été_$").iterdir()} >= {"adapter", "best", "state", "summary.json", "samples.md"}


def test_text_that_the_locale_cannot_write_is_escaped(place):
    words = ["-P", ROOT / "generate.py", "--model", "modèle", "--raw", "--max-new-tokens", "1"]
    p = start([*words, "--prompt", "Où est le café"], ASCII, cwd=place)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0 and err == b"", err
    assert out.startswith(rb"O\xf9 est le caf\xe9"), out
    p = start([ROOT / "train.py", "--model", "modèle", "--data", "être.jsonl"], ASCII, cwd=place)
    out, err = p.communicate(timeout=120)
    assert (p.returncode, out) == (1, b"") and err.startswith(b"error: ") and err.count(b"\n") == 1, err


def test_generate_ends_when_nobody_reads_it(place):
    """It has more lines to reply to, one of them with a byte that is no UTF-8."""
    p = start([ROOT / "generate.py", "--model", place / "modèle", "--max-new-tokens", "1"], stdin=subprocess.PIPE)
    p.stdin.write(b"caf\xe9\n")
    p.stdin.flush()
    assert p.stdout.readline()
    p.stdout.close()
    p.stdin.write(200 * b"hello\n")
    p.stdin.flush()  # and the input stays open: only the closed output can end the program
    assert p.wait(60) == 0 and p.stderr.read() == b""


@pytest.mark.parametrize("words", PROGRAMS, ids=str)
def test_ctrl_c_during_the_imports_is_quiet(words, tmp_path):
    """Another `torch` stands in for the seconds that the real one takes to import. Where Ctrl-C is ignored, it stays so."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\n"
                                       "os._exit(7)")
    for ignored, status in ((False, (130, -signal.SIGINT)), (True, (7,))):
        p = start(words, {"PYTHONPATH": str(tmp_path)}, cwd=ROOT,
                  preexec_fn=lambda ignored=ignored: signal.signal(signal.SIGINT, signal.SIG_IGN) if ignored else None)
        assert p.communicate(timeout=60) == (b"", b"") and p.returncode in status


def test_streams_that_the_caller_has_closed(tmp_path):
    """`python generate.py <&- >&- 2>&-`: no input, so nothing to reply to."""
    def close():
        for fd in range(3):
            os.close(fd)
    p = start([ROOT / "generate.py", "--model", NANO], preexec_fn=close, stdin=None, stdout=None, stderr=None)
    assert p.wait(60) == 0


def test_as_a_library_it_leaves_streams_and_signals_and_names_a_wrong_data_module(tmp_path):
    (tmp_path / "data.py").write_text("rows = [1, 2, 3]")
    (tmp_path / "mine.py").write_text(f"""
import signal, sys
streams, handlers = (sys.stdout, sys.stderr), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
sys.path.append({str(ROOT)!r})
for module in ("train", "generate"):
    try:
        __import__(module)
    except ImportError as e:
        print(e)
del sys.modules["data"]
sys.path.insert(0, {str(ROOT)!r})
import train
assert streams == (sys.stdout, sys.stderr) and "terminal" not in sys.modules
assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
""")
    p = start([tmp_path / "mine.py"])
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, err
    lines = out.decode().splitlines()
    assert len(lines) == 2 and all(str(tmp_path / "data.py") in x and "sys.path.insert(0," in x for x in lines), lines
