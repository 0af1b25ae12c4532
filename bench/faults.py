"""The fault campaign: thousands of killed runs and of damaged files. `python -m bench faults`

    python -m bench faults                                 1,000 kills and 5,000 damaged files; writes docs/bench/faults.*
    python -m bench faults --kills 0 --files 300 --seed 7 --keep DIR      and keeps the damaged files that were not refused

Kills. A run of four steps that saves after each is ended, and then continued with --resume, over several sets of options:

    rename     SIGKILL just before or just after the n-th os.replace, for every n: every file of a run appears by a rename
    moment     death at a random moment after the n-th rename, and in half of the cases once more while the run is continued
    signal     SIGINT, SIGTERM or SIGHUP at such a moment: the run saves itself, and its exit status is 128 + the number

After each of them every JSON file must parse and every safetensors file open. The continued run must end with the files of a
run that was never stopped: equal adapters, best adapters, states, losses and samples, bit for bit (times and memory are not
compared). If nothing had been saved, one line must say so.

Damaged files. Each kind of file that the program reads is damaged (mutations.py), and the program runs on it. What is right:

    one line           UserError: one line of text
    same result        the result of the file before the damage
    another meaning    another result, where a strict reader of the format (mutations.py) says that the file is well-formed
    wrong              any other result; and then a traceback, a death (a crash, an abort), more than 20 s, more than 2 GB

The result of a model, tokenizer or adapter file is what generate.py prints; that of a data file is what --show-batch prints;
that of a run's file is all that the continued run leaves.

Every case is a fork of a process that has imported everything: 0.1 to 1 s instead of the 3 s that a new process takes.
"""
import argparse
import collections
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import matplotlib.figure
import torch
from safetensors import safe_open
from tqdm import tqdm

import generate
import terminal
import train
from bench import mutations
from bench.fault_base import RUNS, config_of, make_base
from errors import UserError
from files import writing
from ledger import ask
from train import TrainConfig

SECONDS, BYTES = 20, 2 * 10**9
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

# ------------------------------------------------------------------------------------------------------ one case, in a fork

def fork(job) -> dict:
    """Run job() in a child -> {"end": how it ended, "text": a result (JSON) or a line}.

    end: "result", "error" (a UserError), "exit" (SystemExit), "traceback", "died" (text: the signal's number) or "hang".
    """
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        answer = in_child(job)
        with os.fdopen(write, "w") as f:
            json.dump(answer, f)
        os._exit(0)
    os.close(write)
    answer, end = b"", time.monotonic() + SECONDS
    while hangs := not select.select([read], [], [], max(0, end - time.monotonic()))[0] or (part := os.read(read, 2**16)):
        if hangs is True:
            os.kill(pid, signal.SIGKILL)
            break
        answer += part
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if hangs:
        return {"end": "hang", "text": f"more than {SECONDS} s"}
    return json.loads(answer) if answer else {"end": "died", "text": str(os.WTERMSIG(status))}


def in_child(job) -> dict:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for signum in SIGNALS:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))
    try:
        return {"end": "result", "text": json.dumps(job(), sort_keys=True)}
    except UserError as e:
        return {"end": "error", "text": str(e)}
    except SystemExit as e:
        return {"end": "exit", "text": str(e.code)}
    except BaseException as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        return {"end": "traceback", "text": f"{type(e).__name__}: {str(e)[:200]} ({Path(at.filename).name}:{at.lineno})"}


# ------------------------------------------------------------------------------------------------------ what a run leaves

NOT_COMPARED = {"out", "next", "wall_s", "eval_s", "step_s", "tokens_per_s", "examples_per_s", "timed",
                "memory", "rss_peak", "peak", "reserved", "by_category", "sha256"}  # (the hash of numbers with times)


def timeless(value):
    """A JSON value without times and memory. Text that is itself JSON is looked into."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in NOT_COMPARED}
    if isinstance(value, list):
        return [timeless(v) for v in value]
    return timeless(json.loads(value)) if isinstance(value, str) and value[:1] == "{" else value


def content(path: Path):
    """What a file says, so that equal content is equal JSON. Raises an exception for a file that is not whole."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as f:
            parts = {k: hashlib.sha256(f.get_tensor(k).numpy().tobytes()).hexdigest() for k in sorted(f.keys())}
            return [parts, timeless(f.metadata())]
    if path.suffix == ".json":
        return timeless(json.loads(path.read_bytes()))
    if path.name == "metrics.jsonl":
        lines = path.read_text(encoding="utf-8").split("\n")
        return [timeless(json.loads(line)) for line in lines[:-1]]  # (a kill may cut the last one: it has no line end)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_by(out: Path) -> dict:
    """{file: its content} of a run's folder. Temporary files are listed without content: none may be left at the end."""
    files = sorted(f for f in out.rglob("*") if f.is_file() and f.name not in (".lock", "loss.png"))
    return {str(f.relative_to(out)): None if ".tmp" in f.name else content(f) for f in files}


def differing(a: dict, b: dict) -> str:
    return ", ".join(sorted(k for k in a.keys() | b.keys() if a.get(k, 0) != b.get(k, 0)))


# ------------------------------------------------------------------------------------------------------ kills

def at_rename(n: int, act, before: bool = False):
    """From now on this process calls act() just before or after its n-th os.replace. n = 0: now."""
    replace, calls = os.replace, []

    def counting(a, b):
        calls.append(1)
        if len(calls) == n and before:
            act()
        replace(a, b)
        if len(calls) == n and not before:
            act()
    os.replace = counting
    if n == 0:
        act()


def kill(signum: int, delay: float = 0.0):
    """End this process by a signal, at once or in `delay` seconds. An alarm without a handler ends it as SIGKILL does."""
    if not delay:
        os.kill(os.getpid(), signum)
    if signum != signal.SIGKILL:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signum))
    signal.setitimer(signal.ITIMER_REAL, delay)


def renames(base: Path, out: Path, options: dict) -> dict:
    """A run that is not stopped: its files, how often it renames, and the seconds from one rename to the next."""
    replace, times = os.replace, [time.monotonic()]

    def counting(a, b):
        times.append(time.monotonic())
        replace(a, b)
    os.replace = counting
    train.main(config_of(base, out, options))
    return {"files": left_by(out), "renames": len(times) - 1, "longest": max(b - a for a, b in zip(times, times[1:]))}


def kill_case(base: Path, case: dict, whole: dict) -> dict:
    """End a run as `case` says and continue it -> {"end": ...}: "equal", "nothing saved", "not killed", or what is wrong.

    whole: what `renames` says about the run that is not stopped.
    """
    rng = random.Random(case["seed"])
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        out = Path(place) / "run"
        cfg, state = config_of(base, out, RUNS[case["run"]]), out / "state" / "state.safetensors"

        def end_it():
            kill(case["signal"], 0 if case["how"] == "rename" else rng.uniform(0, whole["longest"]) ** 2 + 1e-4)

        def go():
            at_rename(case["n"], end_it, case["before"])
            terminal.run(lambda: train.main(cfg))
            signal.setitimer(signal.ITIMER_REAL, 0)  # the run has ended before the signal: it must not meet this program

        def resume(n=None):
            if n is not None:
                at_rename(n, end_it)
            train.main(TrainConfig(out=str(out), resume=True))
        got = fork(go)
        log = out / "metrics.jsonl"
        past = not state.is_file() or '"step": 4, "loss"' in log.read_text()  # (the loop, in which a signal is waited for)
        killed = got["end"] == "died" and int(got["text"]) in (signal.SIGKILL, signal.SIGALRM, *[case["signal"]] * past)
        if not (got["end"] == "result" or killed or got == {"end": "exit", "text": str(128 + case["signal"])}):
            return {"end": f"signal {case['signal']}: {got['end']} {got['text']}"}
        if case["how"] == "moment" and killed and rng.random() < 0.5:
            fork(lambda: resume(rng.randrange(10)))
        try:
            left_by(out)
        except Exception as e:  # whichever reader it comes from
            return {"end": f"a file is not whole: {type(e).__name__}: {e}"}
        saved = state.is_file()
        resumed = got if got["end"] == "result" else fork(resume)
        if resumed["end"] == "error" and not saved and "\n" not in resumed["text"] and any(
                says in resumed["text"] for says in ("holds no run", "stopped before its first save")):
            return {"end": "nothing saved"}
        if resumed["end"] != "result":
            return {"end": f"--resume: {resumed['end']} {resumed['text']}"}
        if wrong := differing(json.loads(json.dumps(left_by(out))), whole["files"]):
            return {"end": f"--resume: another content of {wrong}"}
        return {"end": "not killed" if resumed is got else "equal"}


# ------------------------------------------------------------------------------------------------------ damaged files

def reply(model: Path, adapter: Path | None = None):
    words = ["--model", str(model), "--prompt", "Say    the number 3", "--temperature", "0", "--max-new-tokens", "8"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        generate.main(words + (["--adapter", str(adapter)] if adapter else []))
    return out.getvalue()


def shown(base: Path, data: Path):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        held_out = {"val_data": str(base / "rows.jsonl")} if data.suffix == ".txt" else {"val_frac": 0.25}  # one row
        train.main(TrainConfig(model=str(base / "gpt2"), data=str(data), device="cpu", batch_size=64, max_length=128,
                               show_batch=True, **held_out))
    return out.getvalue()


def resumed(out: Path):
    train.main(TrainConfig(out=str(out), resume=True))
    return left_by(out)


FILES = {
    "config.json of a model": ("gpt2/config.json", "llama/config.json", "phi/config.json"),
    "tokenizer_config.json": ("gpt2/tokenizer_config.json", "llama/tokenizer_config.json", "phi/tokenizer_config.json"),
    "special_tokens_map.json": ("gpt2/special_tokens_map.json",),
    "vocab.json": ("gpt2/vocab.json",),
    "merges.txt": ("gpt2/merges.txt",),
    "added_tokens.json": ("gpt2/added_tokens.json",),
    "tokenizer.json": ("llama/tokenizer.json",),
    "tokenizer.model (tiktoken)": ("phi/tokenizer.model",),
    "generation_config.json": ("llama/generation_config.json",),
    "chat_template.jinja": ("llama/chat_template.jinja",),
    "model.safetensors": ("gpt2/model.safetensors",),
    "model.safetensors.index.json": ("llama/model.safetensors.index.json",),
    "adapter_config.json": ("run-adapter/adapter_config.json", "loftq-adapter/adapter_config.json"),
    "adapter_model.safetensors": ("run-adapter/adapter_model.safetensors", "loftq-adapter/adapter_model.safetensors"),
    "start.safetensors": ("loftq-adapter/start.safetensors",),
    "data .json": ("rows.json",), "data .jsonl": ("rows.jsonl",), "data .csv": ("rows.csv",), "data .txt": ("rows.txt",),
    "config.json of a run": ("run/config.json",),
    "state.safetensors": ("run/state/state.safetensors", "loftq/state/state.safetensors"),
    "metrics.jsonl": ("run/metrics.jsonl",)}


def job_of(base: Path, place: Path, path: str):
    """What reads the file: the program's own entry, on the copy in `place`."""
    first = Path(path).parts[0]
    if first in ("gpt2", "llama", "phi"):
        return lambda: reply(place / first)
    if first.endswith("-adapter"):
        return lambda: reply(base / "gpt2", place / first)
    return lambda: resumed(place / first) if first in ("run", "loftq") else shown(base, place / first)


def copy(base: Path, place: Path, path: str) -> Path:
    first = Path(path).parts[0]
    shutil.copytree(base / first, place / first) if (base / first).is_dir() else shutil.copy(base / first, place / first)
    return place / path


def put(path: Path, way: str, new: bytes | None):
    if new is not None:
        path.write_bytes(new)
        return
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if way == "device" else "nowhere")


def tokens_of(base: Path, path: str) -> dict:
    if path.startswith("phi/"):
        return {**{str(i): i for i in range(256)}, "<|begin_of_text|>": 256, "<|end_of_text|>": 257}
    return {**json.loads((base / "gpt2" / "vocab.json").read_bytes()), "    ": 4096, "\t\t": 4097}


def file_case(base: Path, case: dict, wanted: dict, keep: Path | None) -> dict:
    """Damage a file and run the program on it -> {"end": ..., "way": how it was damaged, "text": the line}."""
    rng = random.Random(case["seed"])
    path = case["path"]
    name, old = Path(path).name, (base / path).read_bytes()
    way, new = mutations.mutate(name, old, rng)
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        damaged = copy(base, Path(place), path)
        put(damaged, way, new)
        got = fork(job_of(base, Path(place), path))
        end, text = got["end"], got["text"].replace(place, "")
    if end == "result" and got["text"] == wanted[path]:
        end, text = "same result", ""
    elif end == "result":
        beside = {f.name: f.read_bytes() for f in (base / path).parent.iterdir() if f.name in ("vocab.json", "merges.txt")}
        absent = way == "link to nothing" and mutations.is_optional(name)
        right = absent or mutations.has_a_meaning(name, old, new, beside, tokens_of(base, path))
        end, text = "another meaning" if right else "wrong", "" if right else f"another result: {text[:80]}"
    elif end == "error":
        end = "one line" if "\n" not in text else "wrong"
    if keep and end in BAD and new is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{case['seed'].replace('/', '-')}-{path.replace('/', '-')}").write_bytes(new)
    return {"end": end, "way": way, "text": text}


# ------------------------------------------------------------------------------------------------------ the campaign

GOOD_KILLS, GOOD_FILES = ("equal", "nothing saved", "not killed"), ("one line", "same result", "another meaning")
BAD = ("traceback", "died", "hang", "wrong")


def kill_cases(n: int, seed: int, whole: dict) -> list[dict]:
    """n cases: every rename, before and after it, but at most n / 2 of them; then three random moments to one signal."""
    rng = random.Random(seed)
    cases = [{"how": "rename", "run": run, "signal": signal.SIGKILL, "n": i, "before": before}
             for run in RUNS for i in range(1, whole[run]["renames"] + 1) for before in (True, False)]
    cases = rng.sample(cases, min(len(cases), n // 2))
    for i in range(n - len(cases)):
        how, signals = ("signal", SIGNALS) if i % 4 == 3 else ("moment", [signal.SIGKILL])
        run = rng.choice(list(RUNS))
        cases.append({"how": how, "run": run, "signal": rng.choice(signals), "n": rng.randrange(whole[run]["renames"]),
                      "before": False})
    return [{**case, "seed": f"{seed}/{i}"} for i, case in enumerate(cases)]


def file_cases(n: int, seed: int) -> list[dict]:
    files = [{"kind": kind, "path": path} for kind, paths in FILES.items() for path in paths]
    return [{**files[i % len(files)], "seed": f"{seed}/{i}"} for i in range(n)]


def table(title: str, results: list, columns) -> list[str]:
    """results: [(row's name, how its case ended)]."""
    lines = [f"| {title} | cases | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    counts = collections.defaultdict(collections.Counter)
    for name, end in results:
        counts[name][end] += 1
        counts["**all**"][end] += 1
    order = [*sorted(name for name in counts if name != "**all**"), "**all**"] if counts else []
    return lines + [f"| {name} | {counts[name].total()} | " + " | ".join(str(counts[name][c]) for c in columns) + " |"
                    for name in order]


def in_turn(work, cases: list[dict], name: str) -> list[dict]:
    """work(case) for each case, in as many processes as there are cores."""
    global WORK
    WORK = work
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        results = pool.imap(run_work, cases, chunksize=1)
        return list(tqdm(results, total=len(cases), desc=name, unit="case", disable=not sys.stderr.isatty()))


def run_work(case: dict) -> dict:
    return {**case, **WORK(case)}


def main(argv: list[str], about: dict) -> bool:
    """True. Raises UserError if anything was lost or wrong."""
    p = argparse.ArgumentParser(prog="python -m bench faults", description="Kill runs, and damage files.")
    p.add_argument("--kills", type=int, default=1000, metavar="N", help="(default: %(default)s)")
    p.add_argument("--files", type=int, default=5000, metavar="N", help="damaged files (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--keep", metavar="DIR", help="keep the damaged files that were neither refused nor read rightly")
    p.add_argument("--out", default=str(Path(__file__).resolve().parent.parent / "docs" / "bench"), metavar="DIR")
    a = p.parse_args(argv)
    torch.set_num_threads(1)  # a fork does not inherit threads
    ask.start = lambda *args: None  # no prediction, and no picture: each takes longer than these runs
    matplotlib.figure.Figure.savefig = lambda self, path, **how: Path(path).touch()
    with tempfile.TemporaryDirectory(prefix="faults-base-") as folder:
        base = Path(folder)
        if (made := fork(lambda: make_base(base)))["end"] != "result":
            raise UserError(f"the undamaged files: {made['text']}")
        kills, files = [], []
        if a.kills:
            whole = {run: json.loads(fork(lambda o=o, run=run: renames(base, base / f"whole-{run}", o))["text"])
                     for run, o in RUNS.items()}
            cases = kill_cases(a.kills, a.seed, whole)
            kills = in_turn(lambda case: kill_case(base, case, whole[case["run"]]), cases, "kills")
        if a.files:
            wanted = {}
            for path in {case["path"] for case in file_cases(999, a.seed)}:
                with tempfile.TemporaryDirectory(prefix="faults-") as place:
                    copy(base, Path(place), path)
                    wanted[path] = fork(job_of(base, Path(place), path))["text"]
            keep = Path(a.keep) if a.keep else None
            files = in_turn(lambda case: file_case(base, case, wanted, keep), file_cases(a.files, a.seed), "files")
    return report(kills, files, Path(a.out), shlex.join(["python", "-m", "bench", "faults", *argv]), about)


def report(kills: list[dict], files: list[dict], out: Path, command: str, about: dict) -> bool:
    lost = [r for r in kills if r["end"] not in GOOD_KILLS]
    wrong = [r for r in files if r["end"] not in GOOD_FILES]
    ended = [(f"{r['how']}, {r['run']}", r["end"] if r["end"] in GOOD_KILLS else "lost") for r in kills]
    where = ", ".join([about["date"], about["machine"], *(f"{k} {v}" for k, v in about["versions"].items()),
                       f"commit {about['commit']}"])
    text = "\n".join(["# Killed runs and damaged files", "", "```", command, "```", "", f"{where}.", "",
                      f"{len(kills):,} runs were killed, and {len(lost)} were lost. {len(files):,} files were damaged, and "
                      f"{len(wrong)} ended in anything but one line or a right result. The columns are explained in "
                      f"[bench/faults.py](../../bench/faults.py), what \"another meaning\" is in "
                      f"[bench/mutations.py](../../bench/mutations.py).", "",
                      *table("killed", ended, (*GOOD_KILLS, "lost")), "",
                      *table("damaged", [(r["kind"], r["end"]) for r in files], (*GOOD_FILES, *BAD))]) + "\n"
    doc = {"bench": "faults", "command": command, "about": about, "kills": len(kills), "files": len(files), "lost": lost,
           "wrong": wrong}
    writing.write_text(out / "faults.md", text)
    writing.write_text(out / "faults.json", json.dumps(doc, indent=1) + "\n")
    print(text)
    if lost or wrong:
        raise UserError(f"{len(lost)} runs were lost, {len(wrong)} files went wrong: each is in {out / 'faults.json'}")
    return True
