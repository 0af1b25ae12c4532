"""The methods of methods/ on one job, with error bars: several seeds each, the same held-out rows for all.

    python -m bench methods --model smollm2-135m --data FILE         writes docs/bench/methods.md, .jsonl and .png
    python -m bench methods --model smollm2-135m --data FILE --rates tries three learning rates for each method, and prints

A run is train.main with the method's usual size. The seed decides the random start and the order of the data, so with equal
seeds all methods see equal batches. A run that is finished is a line of methods.jsonl, and is not made again: the same
command continues what was interrupted.

    held-out loss   after the last step, on (at most) 64 rows of a held-out tenth. Which ones is decided once, for all seeds
    forgetting      the loss on a text that has nothing to do with the data, minus the untouched model's on it

The interval of n runs is mean +- t s / sqrt(n), with their standard deviation s (n - 1 in its denominator) and Student's t
for 95 % and n - 1 degrees of freedom: 2.776 for 5 runs. The difference to lora is taken seed by seed, and its interval is
that of these differences: what a seed does to all methods alike cancels.
"""
import argparse
import contextlib
import gc
import io
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from matplotlib import pyplot as plt
from tqdm import tqdm

import train
from bench import plots, tables
from errors import UserError
from files import rows, weights, writing
from files.hub import ASSETS
from files.json_files import parse_json, show
from run.options import TrainConfig, default_lr

# Options of each method, and its learning rate as a multiple of train.py's default. --rates tries a third and three times
# as much, with a seed that is not among those of the table.
METHODS = {
    "lora": ({}, 1.0),
    "lora-plus": ({"lora_plus": 16.0}, 0.3),
    "dora": ({"method": "dora"}, 1.0),
    "ia3": ({"method": "ia3"}, 1.0),
    "bottleneck": ({"method": "bottleneck", "bottleneck": 64}, 1.0),
    "prompt": ({"method": "prompt", "virtual_tokens": 20}, 1.0),
    "prefix": ({"method": "prefix", "virtual_tokens": 20}, 1.0),
    "full": ({"full": True}, 1.0),
}
JOB = {"amp": True, "batch_size": 4, "max_length": 128, "samples": 0, "no_cache": True}
STEPS, SEEDS, RATES_SEED, HELD_OUT = 40, 5, 1000, 64
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 95 %: 1, 2, ... degrees of freedom
# PEFT's method_comparison/MetaMathQA/results (lora--, lora-...-dora--, full-finetuning--llama-3.2-3B-*.json), one seed: the
# share of GSM8K's 1,319 test questions that is answered rightly. As run in July 2026, and with PEFT 0.15.2.dev0 (2025).
PUBLISHED, QUESTIONS = {"LoRA": (47.8, 48.2), "DoRA": (46.9, 48.2), "full": (47.2, 50.0)}, 1319


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half the width of its 95 % t-interval). For two to ten values."""
    n = len(values)
    return statistics.mean(values), T[n - 2] * statistics.stdev(values) / n**0.5


def files_of(args, folder: Path) -> dict:
    """--data split once into two files in `folder`, as options of train.py; the text is a second held-out file."""
    texts = [(r, json.dumps(r, ensure_ascii=False)) for _, r in rows.read_rows(args.data)]
    random.Random(0).shuffle(texts)
    n = len(texts) // 10
    if n < 1:
        raise UserError(f"{args.data}: {len(texts)} rows; a tenth of them is held out, so it needs at least 10")
    for name, some in (("held-out", texts[:n]), ("train", texts[n:])):
        writing.write_text(folder / f"{name}.jsonl", "".join(line + "\n" for _, line in some))
    text = Path(args.text).resolve()
    if not text.is_file() or rows.kind_of(text) != ".txt":
        raise UserError(f"--text {args.text}: must be a .txt file")
    return {"eval_examples": min(HELD_OUT, n), "data": str(folder / "train.jsonl"),
            "val_data": f"{folder / 'held-out.jsonl'},{text}"}


def rate(name: str, width: int, times: float = 1.0) -> float:
    options, multiple = METHODS[name]
    return float(f"{default_lr(width, bool(options.get('full')), options.get('method', 'lora')) * multiple * times:.2g}")


def one_run(name: str, seed: int, lr: float, args, files: dict, folder: Path) -> dict:
    """Train -> a line of methods.jsonl. Raises UserError."""
    options = METHODS[name][0]
    cfg = TrainConfig(**JOB, **options, **files, model=args.model, device=args.device, lr=lr, seed=seed, steps=args.steps,
                      eval_every=args.steps, out=str(folder))
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            summary = train.main(cfg)
        except UserError as e:
            raise UserError(f"{name}, seed {seed}, --lr {lr:g}: {e}") from None
    gc.collect()  # the ledger of the next run counts live tensors
    text = next(iter(summary["loss"]["others"].values()))
    return {"method": name, "seed": seed, "lr": lr, "options": options, "loss": summary["loss"]["val_after"],
            "text_before": text["before"], "text": text["after"], "trainable": summary["params"]["trainable"],
            "predicted_peak": summary["memory"]["predicted_peak"], "measured_peak": summary["memory"]["measured_peak"],
            "tokens_per_s": summary["tokens_per_s"], "wall_s": summary["wall_s"],
            "bytes": sum(f.stat().st_size for f in (folder / "best").glob("*.safetensors"))}


def finished(path: Path, settings: dict) -> list[dict]:
    """The runs in methods.jsonl: its first line has the settings, each other line is a run. Raises UserError."""
    if not path.is_file():
        return []
    first, *lines = [parse_json(line, f"{path}:{i}") for i, line in enumerate(path.read_text("utf-8").splitlines(), 1)]
    for key, value in settings.items():
        if first.get(key) != value:
            raise UserError(f"{path} was made with {key} {show(first.get(key))}, now {show(value)}; choose another --out, "
                            f"or delete it")
    return lines


def run_all(args, about: dict) -> list[dict]:
    """Make the runs that methods.jsonl does not have, and add each to it. Returns all."""
    width = weights.config_of(args.model)[0].n_embd
    settings = {"model": Path(args.model).name, "data": Path(args.data).name, "text": Path(args.text).name,
                "steps": args.steps, **JOB}
    path = Path(args.out) / "methods.jsonl"
    wanted = [(name, seed, rate(name, width)) for seed in range(args.seeds) for name in METHODS]  # the methods take turns
    known = {(r["method"], r["seed"], r["lr"], str(r["options"])): r for r in finished(path, settings)}
    runs = [known.get((name, seed, lr, str(METHODS[name][0]))) for name, seed, lr in wanted]
    failed = []
    bar = tqdm(total=len(wanted), initial=sum(map(bool, runs)), unit="run", desc="methods", disable=not sys.stderr.isatty())
    with tempfile.TemporaryDirectory(prefix="methods-") as tmp:
        files = files_of(args, Path(tmp))
        for i, (name, seed, lr) in enumerate(wanted):
            if runs[i]:
                continue
            with tempfile.TemporaryDirectory(dir=tmp) as folder:
                try:
                    runs[i] = {**one_run(name, seed, lr, args, files, Path(folder) / "run"), "commit": about["commit"]}
                except UserError as e:
                    bar.write(f"failed: {e}", file=sys.stdout)
                    failed.append(str(e))
                    continue
            writing.write_text(path, "".join(json.dumps(x) + "\n" for x in [settings, *filter(None, runs)]))
            bar.write(f"{name}, seed {seed}: loss {runs[i]['loss']:.4f} ({runs[i]['wall_s']:.0f} s)", file=sys.stdout)
            bar.update()
    bar.close()
    if failed:
        raise UserError(f"{len(failed)} of {len(wanted)} runs failed, the others are in {path}; the same command tries "
                        f"them again. The first: {failed[0]}")
    return runs


def summarise(runs: list[dict]) -> list[dict]:
    """A row for each method: intervals over its seeds, and medians."""
    by_method = {name: [r for r in runs if r["method"] == name] for name in METHODS}
    base = by_method["lora"]  # its first evaluation is of the untouched model: B is 0. (Virtual tokens change the model.)
    found = []
    for name, mine in by_method.items():
        middle = tables.median([{k: v for k, v in r.items() if k != "options"} for r in mine])
        found.append({**middle, "method": name, "loss": interval([r["loss"] for r in mine]),
                      "minus_lora": None if mine == base else interval([r["loss"] - b["loss"] for r, b in zip(mine, base)]),
                      "forgetting": interval([r["text"] - b["text_before"] for r, b in zip(mine, base)])})
    return found


def number(x: tuple[float, float] | None, form: str = "+.4f") -> str:
    return "" if x is None else f"{x[0]:{form}} ± {x[1]:.4f}"


COLUMNS = [("method", lambda r: r["method"]), ("learning rate", lambda r: f"{r['lr']:g}"),
           ("held-out loss", lambda r: number(r["loss"], ".4f")), ("minus lora's", lambda r: number(r["minus_lora"])),
           ("forgetting", lambda r: number(r["forgetting"])), ("trainable parameters", lambda r: f"{r['trainable']:,}"),
           ("predicted peak, MB", lambda r: tables.mb(r["predicted_peak"], "not predicted")),
           ("measured peak, MB", lambda r: tables.mb(r["measured_peak"])),
           ("tokens/s", lambda r: tables.number(r["tokens_per_s"], ",.0f")), ("file, bytes", lambda r: f"{r['bytes']:,}")]


SHOWN = """\
A ± is half of a 95 % t-interval over the {n} seeds (t = {t:g}). *Minus lora's* is the held-out loss minus lora's with the
same seed, so with the same batches: below 0 is better than lora. Where its interval contains 0, these runs do not tell the
two methods apart. *Forgetting* is the loss on `{text}`, which has nothing to do with the data, minus the untouched model's
on it. Losses are in nats for each labelled token. Peaks, tokens/s and bytes are medians.

What the table does not show. It is one data set (`{data}`), one model, one budget of steps and one size of each method.
Another of these may order the methods otherwise. The held-out rows and the text are the same for all seeds: the intervals
say how much training varies, and not how much other held-out rows would. Each method has one learning rate, a multiple of
train.py's default (bench/methods.py); a search for better ones would help some methods more than others. There are {others}
differences at 95 % each, so it is likelier than 5 % that chance alone moves one of them away from 0. And a held-out loss is
not the quality of an answer.

![Held-out loss and forgetting of each method](methods.png)

## Published beside it

PEFT's own comparison (method_comparison/MetaMathQA: Llama-3.2-3B trained on MetaMathQA) publishes one seed a method,
without error bars. It is another model, another data set and another measure: the accuracy on GSM8K's {questions:,} test
questions, where higher is better. The standard error is not PEFT's: it is what the number of questions alone gives, sqrt(p
(1 - p) / n). The last column is the same comparison, as an earlier version of PEFT's files has it.

| method | test accuracy, % | standard error, points | earlier, % |
|---|---|---|---|
{published}

The largest difference between the rows is {spread:.1f} points, less than one standard error of a row. From the earlier run
to the later one, the same row moved by up to {moved:.1f} points. One seed does not order these methods.
"""


def markdown(found: list[dict], runs: list[dict], args, about: dict, command: str) -> str:
    model = Path(args.model).name
    where = ", ".join([about["date"], about["machine"], *(f"{k} {v}" for k, v in about["versions"].items()),
                       f"commit {' and '.join(sorted({str(r['commit']) for r in runs}))}"])
    now = [p for p, _ in PUBLISHED.values()]
    published = [f"| {name} | {p:.1f} | {100 * (p / 100 * (1 - p / 100) / QUESTIONS) ** 0.5:.1f} | {earlier:.1f} |"
                 for name, (p, earlier) in PUBLISHED.items()]
    lines = [f"# Methods on one job: {model}", "", "```", command, "```", "",
             f"{where}. {args.steps} steps a run, of {JOB['batch_size']} examples of at most {JOB['max_length']} positions; "
             f"{args.seeds} seeds a method, {len(runs)} runs; MB are 10^6 bytes.", "",
             "| " + " | ".join(title for title, _ in COLUMNS) + " |", "|---" * len(COLUMNS) + "|",
             *("| " + " | ".join(make(r) for _, make in COLUMNS) + " |" for r in found), ""]
    return "\n".join(lines) + "\n" + SHOWN.format(
        n=args.seeds, t=T[args.seeds - 2], text=Path(args.text).name, data=Path(args.data).name, others=len(found) - 1,
        questions=QUESTIONS, published="\n".join(published), spread=max(now) - min(now),
        moved=max(abs(p - earlier) for p, earlier in PUBLISHED.values()))


def picture(found: list[dict], title: str, command: str, path: Path):
    """Left: the held-out loss of each method with its interval; right: forgetting."""
    fig, axs = plt.subplots(1, 2, figsize=(10, 1.6 + 0.36 * len(found)), layout="constrained", sharey=True)
    for ax, key, colour, label in ((axs[0], "loss", plots.COLOURS[0], "held-out loss, nats a token"),
                                   (axs[1], "forgetting", plots.COLOURS[2], "forgetting, nats a token")):
        for y, r in enumerate(found):
            mean, half = r[key]
            ax.errorbar(mean, y, xerr=half, fmt="o", color=colour, ecolor=plots.INK, capsize=4, markeredgecolor=plots.INK)
            ax.annotate(f"{mean:.3f}", (mean, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7.5)
        ax.set(yticks=range(len(found)), yticklabels=[r["method"] for r in found], xlabel=label,
               ylim=(len(found) - 0.5, -0.7))
        ax.grid(alpha=0.3)
        ax.margins(x=0.12)
    axs[0].axvline(found[0]["loss"][0], color="0.5", linewidth=0.9, linestyle="--")  # lora's
    axs[1].axvline(0, color="0.5", linewidth=0.9, linestyle="--")
    plots.save(fig, title, command, path)


def try_rates(args):
    """Print the held-out loss of each method at 1/3, 1 and 3 times its rate, with one seed."""
    width = weights.config_of(args.model)[0].n_embd
    with tempfile.TemporaryDirectory(prefix="methods-") as tmp:
        files = files_of(args, Path(tmp))
        for name in tqdm(METHODS, unit="method", disable=not sys.stderr.isatty()):
            losses = {}
            for times in (1 / 3, 1, 3):
                lr = rate(name, width, times)
                with tempfile.TemporaryDirectory(dir=tmp) as folder:
                    try:
                        r = one_run(name, RATES_SEED, lr, args, files, Path(folder) / "run")
                        losses[lr] = f"{r['loss']:.4f} ({r['wall_s']:.0f} s)"
                    except UserError as e:
                        losses[lr] = f"failed ({e})"
            print(f"{name:12}" + "   ".join(f"--lr {lr:g}: {text}" for lr, text in losses.items()), flush=True)


def main(argv: list[str], about: dict, command: str) -> bool:
    """True. Raises UserError, and KeyboardInterrupt; finished runs are kept."""
    p = argparse.ArgumentParser(prog="python -m bench methods", description="Each method with several seeds on one job.")
    p.add_argument("--model", default="gpt2-nano", metavar="M", help="as in train.py (default: %(default)s)")
    p.add_argument("--data", default=str(ASSETS / "support.jsonl"), metavar="FILE", help="a tenth of its rows is held out "
                   "(default: the bundled examples)")
    p.add_argument("--text", default=str(ASSETS / "plain.txt"), metavar="FILE", help="a .txt file that has nothing to do "
                   "with the data, for forgetting (default: assets/plain.txt)")
    p.add_argument("--steps", type=int, default=STEPS, metavar="N", help="of each run (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="2 to 10 (default: %(default)s)")
    p.add_argument("--device", metavar="X", help="as in train.py")
    p.add_argument("--rates", action="store_true", help="try learning rates instead, and print")
    p.add_argument("--out", default=str(Path(__file__).resolve().parent.parent / "docs" / "bench"), metavar="DIR")
    args = p.parse_args(argv)
    for name, least, most in (("steps", 1, 10**6), ("seeds", 2, len(T) + 1)):
        if not least <= (value := getattr(args, name)) <= most:
            raise UserError(f"--{name} {value}: must be from {least} to {most:,}")
    if args.rates:
        try_rates(args)
        return True
    runs = run_all(args, about)
    found, out = summarise(runs), Path(args.out)
    picture(found, f"Methods on one job: {Path(args.model).name}, {args.seeds} seeds, 95 % intervals", command,
            out / "methods.png")
    text = markdown(found, runs, args, about, command)
    writing.write_text(out / "methods.md", text)
    print("\n" + text)
    return True
