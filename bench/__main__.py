"""The tables and pictures of the README: real training steps, each configuration in a process of its own.

    python -m bench ladder --model gpt2                        writes docs/bench/ladder-gpt2.md, .json and .png
    python -m bench ladder --model gpt2 -- --max-length 256    the options after -- go to train.py in every row
    python -m bench predict --model gpt2,smollm2-135m --resume continues an interrupted bench

    ladder      one more technique in each row, from full fine-tuning to LoRA over 4-bit weights with paged 8-bit AdamW
    grid        8 examples a step, as 1 x 8, 2 x 4, 4 x 2 and 8 x 1 (examples in a micro-batch x micro-batches)
    techniques  --full, with recomputation, accumulation, 8-bit AdamW or an optimizer on the CPU, alone and together
    predict     predicted and measured peak, over many combinations of options and several models
    peers       the same job here and in transformers + PEFT (+ bitsandbytes), see transformers_peft.py
    scaling     peak and time of a step against sequence length, batch and layers, with fitted laws
    speed       the machine's matrix limit in the run's own shapes and types (matrix_limit.py), then the share of it that
                training reaches, here and in transformers + PEFT. Compare machines by this share, not by tokens/s
    gpu         all that is claimed about a GPU, tried on one in under 8 minutes, see gpu.py; its options are its own
    methods     LoRA and the other ways to adapt, several seeds each, with intervals, see methods.py; its options are its own
    serving     serve.py beside transformers' generate, see serving.py; its options are its own
    faults      no table of speeds: killed runs and damaged files, see faults.py; its options are its own

A row is one command, `python train.py --model M OPTIONS --steps N --samples 0`. It is run --repeat times.

* The rows take turns: each runs once, then each runs again. A shared machine can be 40 % faster in one minute than in the
  next, and with turns a slow minute does not fall on all runs of one row.
* A speed is the median over the repetitions. A ratio of speeds is the median of the ratios within each repetition.
* The peak of live tensor bytes is exact. So it must be the same in every repetition; if it is not, the table says so.

tables.py and plots.py make the tables and the pictures from the numbers.
"""
import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import terminal

if __name__ == "__main__":
    terminal.start()

import torch
from tqdm import tqdm

from bench import plots, tables
from errors import UserError
from files import weights, writing
from files.hub import ASSETS
from files.json_files import read_json
from run import prepare, record
from run.options import parse, resolve
from techniques.device import usable_device

ROOT = Path(__file__).resolve().parent.parent
PEER_VERSIONS = ("transformers", "peft", "bitsandbytes")

# ------------------------------------------------------------------------------------------------------ the rows

ACCUMULATED = "--amp --ckpt-every 1 --batch-size 1 --grad-accum 8"  # train.py's default is --batch-size 8 --grad-accum 1
LADDER = {
    "full fine-tuning": "--full",
    "LoRA": "",
    "+ AMP": "--amp",
    "+ every 2nd layer recomputed": "--amp --ckpt-every 2",
    "+ every layer recomputed": "--amp --ckpt-every 1",
    "+ accumulation": ACCUMULATED,
    "+ 8-bit weights": f"{ACCUMULATED} --bits 8",
    "+ 4-bit weights": f"{ACCUMULATED} --bits 4",
    "+ paged 8-bit AdamW": f"{ACCUMULATED} --bits 4 --optimizer paged_adamw8bit",
}
GRID = {f"{n} x {8 // n}": f"--lora-r 8 --lora-alpha 16 --lora-dropout 0.1 --batch-size {n} --grad-accum {8 // n}"
        for n in (1, 2, 4, 8)}
TECHNIQUES = {
    "baseline": "--full",
    "1 recomputation": "--full --ckpt-every 1",
    "2 accumulation": "--full --batch-size 1 --grad-accum 8",
    "3 8-bit AdamW": "--full --optimizer adamw8bit",
    "4 AMP, optimizer on the CPU": "--full --amp --optimizer offload_adamw",
    "1 + 2 + 3": "--full --ckpt-every 1 --batch-size 1 --grad-accum 8 --optimizer adamw8bit",
    "1 + 2 + 4": "--full --ckpt-every 1 --batch-size 1 --grad-accum 8 --amp --optimizer offload_adamw",
}
PREDICT = (
    "", "--batch-size 1", "--batch-size 4 --grad-accum 2", "--max-length 96", "--max-length 64 --batch-size 16", "--pack",
    "--lora-targets all", "--lora-targets all --lora-r 32 --rslora", "--lora-dropout 0.1",
    "--ckpt-every 1", "--ckpt-every 2",
    "--amp", "--amp --pack", "--amp --ckpt-every 2", "--amp --ckpt-every 1 --ckpt-offload", ACCUMULATED,
    "--amp --lora-targets all --lora-dropout 0.1", "--amp --lora-init pissa",
    "--amp --optimizer adamw8bit", "--amp --optimizer paged_adamw8bit", "--amp --optimizer offload_adamw",
    "--amp --bits 32", "--amp --bits 32 --ckpt-every 2", "--amp --bits 8", "--amp --bits 8 --ckpt-every 1",
    "--amp --bits 4", "--amp --bits 4 --lora-init loftq --lora-targets all",
    f"{ACCUMULATED} --bits 4 --optimizer paged_adamw8bit",
    "--full", "--full --ckpt-every 1", "--full --batch-size 1 --grad-accum 8", "--full --amp",
    "--full --optimizer adamw8bit", "--full --optimizer paged_adamw8bit", "--full --amp --optimizer offload_adamw",
    "--full --amp --optimizer offload_adamw --ckpt-every 1 --batch-size 1 --grad-accum 8",
)


def named(table: dict) -> Callable:
    """The rows of a table of {name: options}, for any model."""
    return lambda model, args: [{"name": name, "model": model, "options": options} for name, options in table.items()]


def predict_rows(model: str, args) -> list[dict]:
    return [{"name": f"`{options}`" if options else "(defaults)", "model": model, "options": options} for options in PREDICT]


def peers_job(model: str, args) -> tuple[str, str]:
    """Options of one job, (here, in the peer). PEFT can only adapt GPT-2's whole c_attn, so both programs do it."""
    _, _, raw = weights.read_config(weights.find(model))
    targets = "c_attn" if raw["model_type"] == "gpt2" else "q_proj,v_proj"
    ours = (f"--lora-r 8 --lora-targets {targets} --batch-size 4 --max-length 256 --template alpaca --lr 1e-3 "
            f"--schedule constant --warmup-steps 0" + (" --val-frac 0.01" if args.data else ""))
    return ours, "--batch-size 4 --max-length 256 --lr 1e-3"


def peers_rows(model: str, args) -> list[dict]:
    """Pairs of rows: this program, then the peer."""
    (ours, theirs), rows = peers_job(model, args), []
    for job, options in {"16 bit": "--amp", "8 bit": "--amp --bits 8", "4 bit": "--amp --bits 4"}.items():
        rows += [{"name": f"{job}, here", "model": model, "options": f"{options} {ours}"},
                 {"name": f"{job}, peer", "model": model, "options": f"{options} {theirs}", "program": tables.PEER}]
    return rows


def speed_rows(model: str, args) -> list[dict]:
    """The limit, with as many rows as a mean micro-batch has tokens. Then peers' job in float32, with --amp, recomputed."""
    ours, theirs = peers_job(model, args)
    cfg = resolve(parse(["--model", model, *ours.split(), *(["--data", args.data] if args.data else [])]))
    _, _, train_set, _ = prepare.read_data(cfg)
    n = round(cfg.batch_size * train_set.n_tokens / len(train_set))
    rows = [("limit", f"--positions {n}", tables.LIMIT), ("float32, here", ours, "train.py"),
            ("float32, peer", theirs, tables.PEER), ("AMP, here", f"--amp {ours}", "train.py"),
            ("AMP, peer", f"--amp {theirs}", tables.PEER), ("recomputed, here", f"--ckpt-every 1 {ours}", "train.py")]
    return [{"name": name, "model": model, "options": options, "program": program} for name, options, program in rows]


def scaling_rows(model: str, args) -> list[dict]:
    """One configuration (4 examples of a quarter of the positions, at most 256), of which one size at a time is varied."""
    if args.data:
        raise UserError("scaling takes no --data: every example must fill its length, so the bench writes a text of its own")
    config, _, raw = weights.read_config(weights.find(model))
    targets = "c_attn.q,c_attn.v" if raw["model_type"] == "gpt2" else "q_proj,v_proj"  # (gpt2-nano's default is "all")
    longest = min(1024, config.n_positions)
    base = {"length": longest // 4, "batch": 4, "layers": config.n_layer}
    grid = {"length": (longest // 8, longest // 4, longest // 2, longest), "batch": (1, 2, 4, 8),
            "layers": sorted({max(1, config.n_layer * i // 4) for i in (1, 2, 3, 4)})}
    rows = []
    for size, values in grid.items():
        for value in values:
            at = {**base, size: value}
            row = {"name": ", ".join(f"{k} {v}" for k, v in at.items()), "model": model, "sizes": at,
                   "options": f"--lora-targets {targets} --max-length {at['length']} --batch-size {at['batch']}"}
            if row not in rows:
                rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------------ one run

class RunFailed(Exception):
    """A configuration did not run. The message is the last line of its process."""


def run_one(row: dict, settings: dict) -> dict:
    """Run one row's process -> its summary.json (others: the JSON of its last line), with the commit. Raises RunFailed.

    For train.py, "step_s" (the median), "examples" (in the training set) and "labelled_share" (of its tokens) are added.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as tmp:
        program, model = row.get("program", "train.py"), row["model"]
        data = ["--data", absolute(settings["data"])] if settings["data"] else []
        if "sizes" in row:
            model, data = other_depth(model, row["sizes"]["layers"], Path(tmp)), long_text(row["sizes"], settings, Path(tmp))
        job = [] if program == tables.LIMIT else [*data, "--steps", str(settings["steps"])]
        options = ["--model", absolute(model), *row["options"].split(), *job,
                   *["--device", settings["device"]] * bool(settings["device"])]
        if program != "train.py":
            start, where = ["-m", f"bench.{program}"], ROOT
        else:
            start, where = [str(ROOT / program)], None
            options += ["--samples", "0", *settings["extra"], "--out", f"{tmp}/run"]
        done = subprocess.run([sys.executable, *start, *options], cwd=where, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            killed = f"killed by signal {-done.returncode} (9: out of memory?) " if done.returncode < 0 else ""
            raise RunFailed(killed + (lines[-1] if lines else f"exit status {done.returncode}"))
        if program != "train.py":
            return {**json.loads(done.stdout.splitlines()[-1]), "commit": commit()}
        summary = read_json(Path(tmp) / "run" / "summary.json")
        # Without the first two steps: the first one warms up, and the ledger always follows the second one.
        steps = [x["step_s"] for x in record.read_log(Path(tmp) / "run") if "step_s" in x][2:]
        line = re.search(r"training: ([\d,]+) examples, ([\d,]+) labelled tokens of ([\d,]+)", done.stdout)
        examples, labelled, tokens = (int(n.replace(",", "")) for n in line.groups())
        return {**summary, "step_s": statistics.median(steps) if steps else None, "examples": examples,
                "labelled_share": labelled / tokens, "commit": commit()}


def absolute(path: str) -> str:
    """The absolute path of a file or folder, because a row's process may run in another folder. Model names stay."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def without_paths(words: list[str]) -> list[str]:
    """A command as the tables show it: of a path only the last part, because the rest says something about one machine."""
    def is_path(part):  # org/name is a model of the hub
        return os.sep in part and (Path(part).exists() or Path(part).is_absolute())
    return [",".join(Path(part).name if is_path(part) else part for part in word.split(",")) for word in words]


def other_depth(model: str, layers: int, tmp: Path) -> str:
    """The same model with another number of layers and random weights, in tmp. For its own number: the model itself."""
    folder = weights.find(model)
    config, _, raw = weights.read_config(folder)
    if layers == config.n_layer:
        return model
    key = "n_layer" if "n_layer" in raw else "num_hidden_layers"
    for name in weights.TOKENIZER_FILES:
        if (folder / name).is_file():
            (tmp / name).write_bytes((folder / name).read_bytes())
    writing.write_text(tmp / "config.json", json.dumps({**raw, key: layers}))
    weights.save(weights.from_scratch(str(tmp)), tmp)
    return str(tmp)


def long_text(sizes: dict, settings: dict, tmp: Path) -> list[str]:
    """Options for a text that is long enough for the whole run, at 8 bytes a token: no tokenizer here has longer tokens on
    average."""
    text = (ASSETS / "support.jsonl").read_text(encoding="utf-8")
    pieces = settings["steps"] * sizes["batch"] * sizes["length"] * 8 // len(text) + 1
    writing.write_text(tmp / "train.txt", text * pieces)
    writing.write_text(tmp / "held-out.txt", text[:16 * sizes["length"]])
    return ["--data", f"{tmp}/train.txt", "--val-data", f"{tmp}/held-out.txt"]


# ------------------------------------------------------------------------------------------------------ one bench

@dataclass
class Bench:
    title: str
    rows: Callable  # (model, args) -> rows
    table: Callable  # (rows, those that ran) -> columns, notes
    picture: Callable  # (title, rows that ran, command, path) -> writes the PNG
    steps: int
    repeat: int


BENCHES = {
    "ladder": Bench("One technique more in each row", named(LADDER), tables.ladder, plots.categories, 20, 3),
    "grid": Bench("Batch size x accumulation, 8 examples a step", named(GRID), tables.grid, plots.grid, 20, 3),
    "techniques": Bench("Full fine-tuning, techniques alone and together", named(TECHNIQUES), tables.techniques,
                        plots.categories, 20, 3),
    "predict": Bench("Predicted against measured peak", predict_rows, tables.predict, plots.predict, 3, 1),
    "peers": Bench("Here against transformers + PEFT", peers_rows, tables.peers, plots.peers, 20, 5),
    "scaling": Bench("Peak and time against length, batch, layers", scaling_rows, tables.scaling, plots.scaling, 6, 3),
    "speed": Bench("Share of the machine's matrix limit", speed_rows, tables.speed, plots.speed, 20, 5),
}


def commit() -> str | None:
    """The commit of this checkout, with "+ changes" if a .py file differs from it. None outside git."""
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    if not (ROOT / ".git").exists() or (head := git("rev-parse", "--short=10", "HEAD")).returncode:
        return None
    return head.stdout.strip() + (" + changes" if git("diff", "--quiet", "HEAD", "--", "*.py").returncode else "")


def machine_and_versions(name: str, device: str | None) -> dict:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file() and (model := re.search(r"model name\s*: (.*)", info.read_text())):
        cpu = model[1]
    machine = f"{cpu}, {os.cpu_count()} cores, PyTorch on {torch.get_num_threads()}"
    if (where := torch.device(usable_device(device))).type == "cuda":
        machine = f"{torch.cuda.get_device_name(where)}; {machine}"
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    for package in PEER_VERSIONS[:1] if name == "serving" else PEER_VERSIONS if name in ("peers", "speed") else ():
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"machine": machine, "versions": versions, "commit": commit(), "date": datetime.date.today().isoformat()}


def n_runs(rows: list[dict]) -> int:
    return sum(len(r["runs"]) for r in rows)


def earlier(path: Path, settings: dict, resume: bool) -> list[dict]:
    """The rows of the earlier bench in `path`, if their runs can be used again. Raises UserError if runs would be lost."""
    if not path.is_file():
        return []
    old = read_json(path)
    if not resume:
        if not old["finished"]:
            raise UserError(f"{path} holds {n_runs(old['rows'])} runs of an unfinished bench: --resume, or delete it")
        return []
    if changed := [k for k in settings if settings[k] != old["settings"][k]]:
        line = (f"--resume: {path} was made with " + ", ".join(f"{k} {old['settings'][k]}" for k in changed)
                + ", now " + ", ".join(f"{k} {settings[k]}" for k in changed))
        if not old["finished"]:
            raise UserError(f"{line}; choose another --out, or delete it")
        print(f"{line}; none of its runs is used")
        return []
    return old["rows"]


def run_bench(name: str, models: list[str], args, extra: list[str], command: str) -> bool:
    """Make one table over `models`. Writes its .json after every run, and its .md and .png at the end. True if all rows ran.
    """
    bench = BENCHES[name]
    settings = {"models": models, "data": args.data, "steps": args.steps or bench.steps,
                "repeat": args.repeat or bench.repeat, "device": args.device, "extra": extra}
    base = Path(args.out) / f"{name}-{'+'.join(Path(m).name for m in models)}"
    path = base.with_name(base.name + ".json")
    rows = [{"program": "train.py", **r, "runs": []} for m in models for r in bench.rows(m, args)]
    kept = {json.dumps({k: v for k, v in r.items() if k not in ("runs", "median", "failed")}): r["runs"]
            for r in earlier(path, settings, args.resume)}
    for r in rows:
        r["runs"] = kept.get(json.dumps({k: v for k, v in r.items() if k != "runs"}), [])
    doc = {"bench": name, "command": command, "settings": settings, "about": machine_and_versions(name, args.device),
           "finished": False, "rows": rows}
    bar = tqdm(total=len(rows) * settings["repeat"], initial=n_runs(rows), unit="run", desc=name,
               disable=not sys.stderr.isatty())
    try:
        for turn in range(settings["repeat"]):
            for r in rows:
                if len(r["runs"]) > turn or "failed" in r:
                    continue
                try:
                    r["runs"].append(run_one(r, settings))
                    result = f"peak RSS {tables.mb(r['runs'][-1]['memory']['rss_peak'])} MB"
                except RunFailed as e:
                    r["runs"], r["failed"] = [], str(e)
                    result = f"failed: {e}"
                writing.write_text(path, json.dumps(doc, indent=1) + "\n")
                bar.write(f"{turn + 1}/{settings['repeat']} {Path(r['model']).name} {r['name']}: {result}", file=sys.stdout)
                bar.update()
    except KeyboardInterrupt:
        bar.close()
        print(f"interrupted; finished runs kept in {path}: {n_runs(rows)}; the same command with --resume continues")
        raise
    bar.close()
    for r in rows:
        if r["runs"]:
            r["median"] = tables.median(r["runs"])
    good, title = [r for r in rows if "median" in r], f"{bench.title}: {', '.join(Path(m).name for m in models)}"
    picture = Path(f"{base}.png") if any(tables.peak(r) for r in good) else None
    if picture:
        bench.picture(title, good, command, picture)
    text = tables.markdown(title, bench.table, doc, picture and picture.name)
    writing.write_text(f"{base}.md", text)
    writing.write_text(path, json.dumps({**doc, "finished": True}, indent=1) + "\n")
    print("\n" + text)
    return len(good) == len(rows)


def main(argv: list[str] | None = None) -> bool:
    """Run one bench. True if all its rows ran. Raises UserError, and KeyboardInterrupt after the finished runs are saved."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["faults"]:
        from bench import faults
        return faults.main(argv[1:], machine_and_versions("faults", "cpu"))
    if argv[:1] == ["methods"]:
        from bench import methods
        return methods.main(argv[1:], machine_and_versions("methods", None),
                            shlex.join(["python", "-m", "bench", *without_paths(argv)]))
    if argv[:1] == ["serving"]:
        from bench import serving
        return serving.main(argv[1:], machine_and_versions("serving", "cpu"),
                            shlex.join(["python", "-m", "bench", *without_paths(argv)]))
    if argv[:1] == ["gpu"]:
        from bench import gpu
        return gpu.main(argv[1:], machine_and_versions("gpu", "cpu"), PREDICT)
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, extra = argv[:cut], argv[cut + 1:]
    p = argparse.ArgumentParser(
        prog="python -m bench", usage="python -m bench NAME [options] [-- OPTIONS OF TRAIN.PY]",
        description="The README's tables and pictures. Four more have options of their own: python -m bench faults --help, "
                    "python -m bench gpu --help, python -m bench methods --help, python -m bench serving --help.",
        epilog="Finished runs are kept in DIR/NAME-MODEL.json. With --resume, they are used again if the row, model, data, "
               "steps, repetitions, device and train.py options are the same (the commit may be another); failed rows are "
               "tried again. Without --resume, a finished file is replaced, and an unfinished file is an error.")
    p.add_argument("name", metavar="NAME", choices=BENCHES, help=", ".join(BENCHES))
    p.add_argument("--model", action="append", metavar="M", help="as in train.py. For several models, repeat the option or "
                   "separate them by commas: predict makes one table of them all, the others one for each (default: "
                   "gpt2-nano)")
    p.add_argument("--data", metavar="FILE", help="as in train.py (default: the bundled examples)")
    p.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each run (default: "
                   + ", ".join(f"{name} {b.steps}" for name, b in BENCHES.items()) + ")")
    p.add_argument("--repeat", type=int, metavar="N", help="runs of each row (default: "
                   + ", ".join(f"{name} {b.repeat}" for name, b in BENCHES.items()) + ")")
    p.add_argument("--device", metavar="X", help="as in train.py")
    p.add_argument("--out", default=str(ROOT / "docs" / "bench"), metavar="DIR",
                   help="folder of the tables (default: the repository's docs/bench)")
    p.add_argument("--resume", action="store_true", help="continue an interrupted bench")
    args = p.parse_args(argv)
    for option in ("steps", "repeat"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UserError(f"--{option} {value}: must be at least 1")
    own = {"--model", "--data", "--steps", "--device", "--out", "--samples", "--resume"}
    if taken := own & {x.split("=")[0] for x in extra}:
        raise UserError(f"{min(taken)} belongs before the --, or the bench sets it itself")
    if extra and args.name in ("peers", "speed"):
        raise UserError(f"{args.name} takes no options of train.py: the job must be the same on both sides")
    models = [m for given in args.model or ["gpt2-nano"] for m in given.split(",") if m]
    for m in models:
        weights.find(m)  # so a wrong name is one error here, not one in every row
    typed = [x for x in argv if x != "--resume"] + (["--", *extra] if extra else [])
    command = shlex.join(["python", "-m", "bench", *without_paths(typed)])
    groups = [models] if args.name == "predict" else [[m] for m in models]
    ran = [run_bench(args.name, group, args, extra, command) for group in groups]
    return all(ran)


if __name__ == "__main__":
    terminal.run(lambda: main() or sys.exit("error: some rows failed, see the notes below the table"))
