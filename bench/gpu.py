"""What this project claims about a GPU, tried on one in under 8 minutes. `python -m bench gpu`

    python -m bench gpu                                   every stage; writes docs/bench/gpu.jsonl and gpu.md
    python -m bench gpu --stages memory,speed --out DIR   some of them
    python -m bench gpu --device cpu                      tiny shapes: shows that the command works, measures nothing

    card         the GPU, the versions, and what techniques/device.py found out
    attention    which of PyTorch's kernels runs, by type, heads and layout; whether the T x T matrix is stored
    nf4          the 4-bit kernel (nf4_triton.py): its bits, and its bytes/s against those of a copy
    optimizers   paged and offloaded states against the plain ones: equal bit for bit
    memory       predicted against allocated and reserved bytes, over the combinations of `python -m bench predict`
    parity       the losses of 6 steps on the GPU against those on the CPU, for 8 sets of options
    speed        a Llama-3.2-1B shape, 16 and 4 bit: tokens/s, MFU, wall time against busy time, where the host waits
    t4           float16 without FlashAttention, as on a T4: does the loss fall, is the peak as predicted
    compile      --compile: the same losses, the time of a step

What the stages measure is in gpu_claims.py. This file runs them:

* A case's result is a line of gpu.jsonl as soon as it is known. A killed bench keeps what it had.
* A case that raises leaves one line with its error, and the next one runs. "ok" tells whether a claim holds; a case without
  "ok" only measures.
* Each stage is a fork: an error that breaks CUDA for a whole process, or a hang, ends one stage only. At the end of its
  time budget the stage is killed. A stage whose budget exceeds the time that is left is skipped, and says so.
  The parent never touches CUDA, because CUDA does not survive a fork.
"""
import argparse
import contextlib
import json
import multiprocessing
import shlex
import signal
import tempfile
import time
from pathlib import Path

from bench.gpu_claims import STAGES, Bench, NeedsGPU
from errors import UserError
from files import writing
from techniques.device import device_of, usable_device

ROOT = Path(__file__).resolve().parent.parent


def one_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]:.300}"


def run_stage(b: Bench, name: str):
    """Run the cases of a stage one by one, and record each result. For use in a fork."""
    try:
        b.device = usable_device(b.device)
        device_of(b.device)  # it switches cuDNN's attention off, as in every run
        for about, measure in STAGES[name][0](b):
            start = time.perf_counter()
            try:
                result = measure()
            except NeedsGPU:
                result = {"skipped": "needs a GPU"}
            except Exception as e:
                result = {"error": one_line(e)}
            b.record(name, {**about, **result, "seconds": time.perf_counter() - start})
            b.clear()
    except Exception as e:  # between two cases: what the stage needs could not be made
        b.record(name, {"error": one_line(e)})


def in_fork(b: Bench, name: str, budget: float):
    """run_stage in a process of its own, which is killed after `budget` seconds. What happens to it is recorded."""
    child = multiprocessing.get_context("fork").Process(target=begin_fork, args=(b, name))
    child.start()
    try:
        child.join(budget)
        if child.is_alive():
            b.record(name, {"error": f"killed after {budget} s, its time budget: the cases not listed did not run"})
        elif child.exitcode:
            b.record(name, {"error": f"its process ended with exit code {child.exitcode} (-N: killed by signal N)"})
    finally:
        child.kill()
        child.join()


def begin_fork(b: Bench, name: str):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: only the parent says what was kept
    with contextlib.suppress(OSError):  # a full disk: the parent will meet it too
        run_stage(b, name)


def main(argv: list[str], about: dict, combinations: tuple) -> bool:
    """True. Raises UserError if a claim does not hold or a case failed. about: machine and versions."""
    p = argparse.ArgumentParser(prog="python -m bench gpu", description="Try on a GPU what is claimed about one.")
    p.add_argument("--device", default="cuda", metavar="X", help="cuda, cuda:1, or cpu for tiny shapes (default: cuda)")
    p.add_argument("--stages", default=",".join(STAGES), metavar="A,B", help="(default: %(default)s)")
    p.add_argument("--seconds", type=float, default=480, metavar="N", help="for all stages (default: %(default)s)")
    p.add_argument("--out", default=str(ROOT / "docs" / "bench"), metavar="DIR")
    a = p.parse_args(argv)
    names, path = a.stages.split(","), Path(a.out) / "gpu.jsonl"
    if unknown := [name for name in names if name not in STAGES]:
        raise UserError(f"--stages {unknown[0]!r}: only {', '.join(STAGES)}")
    if not a.seconds > 0:  # (nan is not)
        raise UserError(f"--seconds {a.seconds}: must be above 0")
    if path.exists():
        raise UserError(f"{path} holds the results of an earlier bench: move it away, or choose another --out")
    check_device(a.device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
            run_stages(Bench(a.device, Path(folder), path, combinations), names, a.seconds)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        command = shlex.join(["python", "-m", "bench", "gpu", *argv])
        writing.write_text(path.with_suffix(".md"), markdown(lines, command, about))
    except OSError as e:
        raise UserError(f"--out {a.out} could not be written ({e.strerror})") from None
    except KeyboardInterrupt:
        print(f"interrupted; the results until now are in {path}")
        raise
    print(f"{len(lines)} results in {path}, as a table in {path.with_suffix('.md')}", flush=True)
    if failed := [x for x in lines if "error" in x or x.get("ok") is False]:
        raise UserError(f"{len(failed)} of {len(lines)} results are errors, or claims that do not hold (\"ok\": false)")
    return True


def check_device(name: str):
    """Raises UserError if a process cannot use the device. This process must not try it."""
    with multiprocessing.get_context("fork").Pool(1, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            pool.apply_async(usable_device, [name]).get(60)
        except multiprocessing.TimeoutError:
            raise UserError(f"--device {name}: it did not answer within 60 seconds") from None


def run_stages(b: Bench, names: list[str], all_seconds: float):
    start = time.perf_counter()
    for name in names:
        budget, left = STAGES[name][1], all_seconds - (time.perf_counter() - start)
        if budget > left:
            b.record(name, {"skipped": f"its budget is {budget} s, and {max(0, left):.0f} of {all_seconds:.0f} s are left"})
        else:
            in_fork(b, name, budget)


# ------------------------------------------------------------------------------------------------------ the table

def markdown(lines: list[dict], command: str, about: dict) -> str:
    """One table for each stage, with a column for everything that one of its cases tells."""
    where = ", ".join([about["date"], about["machine"], *(f"{k} {v}" for k, v in about["versions"].items()),
                       f"commit {about['commit']}"])
    text = ["# On a GPU", "", "```", command, "```", "", f"{where}. The stages are explained in "
            f"[bench/gpu.py](../../bench/gpu.py). Memory is in bytes.", ""]
    for stage in dict.fromkeys(x["stage"] for x in lines):
        rows = [x for x in lines if x["stage"] == stage]
        columns = [key for key in dict.fromkeys(key for x in rows for key in x) if key != "stage"]
        text += [f"## {stage}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        text += ["| " + " | ".join(cell(x.get(key, "")) for key in columns) + " |" for x in rows] + [""]
    return "\n".join(text)


def cell(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {cell(x)}" for key, x in value.items())
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    text = f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e5 else f"{value:,.0f}" if isinstance(
        value, (int, float)) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
