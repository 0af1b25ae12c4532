"""The files that a run writes in --out, and what it prints. Only metrics.jsonl grows line by line; every other file is
written whole or not at all.

    config.json      every option as resolved, the versions, the seed, the commit
    metrics.jsonl    a line for each optimizer step, and one for each evaluation
    summary.json     parameters, memory, loss, speed
    samples.md       the replies to the same prompts before and after training (--sample-every: also in between)
    loss.png         the loss of each step and the held-out loss; the learning rate; the gradient norm
    compare/         best/ against the base model (--compare)
    adapter/ best/   the last adapter, and the one with the lowest held-out loss (--full: model/ and best/, whole models)
    state/           what --resume needs (state.py)
    tensorboard/ wandb/    the curves for --report (trackers.py)
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import memory
from errors import UserError
from files import weights, writing
from files.json_files import check, is_there, parse_json
from methods import WHY_NOT_MERGED
from techniques.device import compute_dtype, device_of, type_name

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def claimed(cfg):
    """`with claimed(cfg) as out:` the folder of the run, which no other run can write to meanwhile: a new one, or with
    --resume the one to continue. Sets cfg.out if it is None. Raises UserError if the folder is in use, or holds another run.

    The claim is a lock on `out`/.lock. The system takes it away when the process ends, however it ends.
    """
    out = Path(cfg.out) if cfg.out else None
    try:
        out = out or next_folder(Path("runs", Path(cfg.model).name))
        refuse_another_run(out, cfg.resume)
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock", mode=0o644)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"--out {out}: another run is writing to this folder at this moment") from None
    except OSError as e:
        raise UserError(f"--out {out} could not be written ({e.strerror})") from None
    try:
        if cfg.resume:
            writing.remove_leftovers(out)
        refuse_another_run(out, cfg.resume)  # once more: it may have begun and ended since
        cfg.out = str(out)
        yield out
    finally:
        with contextlib.suppress(OSError):
            (out / ".lock").unlink()
            out.rmdir()  # works only if nothing was written
        lock.release()


def next_folder(base: Path) -> Path:
    """Make the first of base-1, base-2, ... that does not exist."""
    for n in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            folder = base.with_name(f"{base.name}-{n}")
            folder.mkdir(parents=True)
            return folder


def refuse_another_run(out: Path, resume: bool):
    if not resume and out.exists() and (not out.is_dir() or any(p.name != ".lock" for p in out.iterdir())):
        raise UserError(f"--out {out} exists and holds another run; choose another folder, or continue it with --resume")


def announce(cfg, params: dict, train_set, val_sets: dict, out: Path):
    """Print what is going to be trained, on which data, and how."""
    print(parameters(cfg.model, params))
    names = ["held-out"] if len(val_sets) == 1 else [f"held-out {name}" for name in val_sets]
    for name, d in (("training", train_set), *zip(names, val_sets.values())):
        print(f"{name}: {len(d):,} examples, {d.n_labels:,} labelled tokens of {d.n_tokens:,}"
              + (f"; {d.n_dropped - d.n_cut_off:,} rows dropped (nothing to learn)" if d.n_dropped > d.n_cut_off else "")
              + (f"; {d.n_cut_off:,} rows dropped (--max-length cuts off all that is learned)" if d.n_cut_off else "")
              + (f"; {d.n_truncated:,} cut at {cfg.max_length}" if d.n_truncated else ""))
    if cfg.amp or cfg.bits < 32:
        print("{why}: weights are held in {weights}, products run in {products}".format(**arithmetic(cfg)))
    print(f"{cfg.steps} steps of {cfg.batch_size} x {cfg.grad_accum}, lr {cfg.lr:g}, {cfg.device} -> {out}")


def arithmetic(cfg) -> dict:
    """How frozen weights are held, in which type they are multiplied, and why. For config.json and summary.json."""
    device, products = device_of(cfg.device), compute_dtype(cfg.device, cfg.amp)
    return {"weights": {32: "float32", 16: type_name(device.half)}.get(cfg.bits, f"{cfg.bits} bit"),
            "products": type_name(products), "why": device.why if cfg.amp else "without --amp"}


def parameters(name: str, params: dict) -> str:
    return (f"{name}: {params['total']:,} parameters in {memory.human(params['bytes'])}, "
            f"{params['trainable']:,} trainable ({params['percent']:.4f} %)")


NOT_SAVED = ("resume", "show_batch", "dry_run", "fit", "no_cache")  # options of one call, not of the run


def write_config(out: Path, cfg, inputs: dict):
    git = None
    if (ROOT / ".git").exists():
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    config = {"options": {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_SAVED},
              "versions": {"python": platform.python_version(), "torch": torch.__version__}, "seed": cfg.seed,
              "commit": git.stdout.strip() if git and git.returncode == 0 else None, "arithmetic": arithmetic(cfg),
              "inputs": inputs}
    writing.write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def log(out: Path, line: dict):
    try:
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as e:
        raise UserError(f"{out / 'metrics.jsonl'}: could not be written ({e.strerror})") from None


def read_log(out: Path) -> list[dict]:
    """The lines of metrics.jsonl. A last line that a killed run did not finish is left out. Raises UserError for others."""
    lines, path = [], out / "metrics.jsonl"
    texts = path.read_bytes().split(b"\n") if is_there(path) else [b""]
    for n, text in enumerate(texts[:-1], 1):  # the last text is empty, or it is half a line
        where = f"{path}:{n}"
        check(where, "line", value := parse_json(text, where), dict)
        check(where, "step", value.get("step"), int)
        for name in value:
            if name in ("loss", "lr") or name.startswith(("val_loss", "val_bits_per_byte")):
                check(where, name, value[name], float)
        lines.append(value)
    return lines


def rewind_log(out: Path, step: int):
    """Remove the lines after `step`, the last one that was saved: a resumed run takes the later steps again."""
    writing.write_text(out / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in read_log(out) if x["step"] <= step))


class Progress:
    """Writes each step's line to metrics.jsonl. Shows a progress bar on a terminal, and about twenty lines elsewhere.

    seen["timed"] sums up the steps from which the speed is computed. The first step (which warms up) and the steps that the
    ledger follows (which it makes slower) are not among them.
    """

    def __init__(self, run):
        self.run, self.steps, self.seen = run, run.cfg.steps, run.seen
        self.bar = tqdm(total=self.steps, initial=run.step, disable=not sys.stderr.isatty(), desc="training", unit="step")

    def __call__(self, line: dict, timed: bool):
        step, speed, peak = line["step"], f"{line['tokens_per_s']:,.0f}", self.seen["peak"]
        for key in self.seen["timed"] if timed else ():
            self.seen["timed"][key] += line[key]
        self.run.log(line)
        self.bar.set_postfix_str(f"loss {line['loss']:.3f}, lr {line['lr']:.1e}, {speed} tok/s, peak {memory.human(peak)}")
        self.bar.update()
        if self.bar.disable and (step % max(1, self.steps // 20) == 0 or step == self.steps):
            print(f"step {step}/{self.steps}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  {speed} tokens/s  "
                  f"peak {memory.human(peak)}", flush=True)

    def close(self):
        self.bar.close()

    def say(self, text: str):
        self.bar.write(text, file=sys.stdout)


def write_samples(run, prompts: list, after: list[str] | None = None):
    """Write samples.md. prompts: as data.prompts gives them. after: the replies at the end. Those before it are in
    run.seen["samples"], one after the other."""
    n, earlier = max(1, len(prompts)), run.seen["samples"]
    replies = {"Before" if i == 0 else f"After step {i // n * run.cfg.sample_every}": earlier[i:i + n]
               for i in range(0, len(earlier), n)} | ({} if after is None else {"After": after})
    blocks = [f"# Replies of {run.cfg.model} before and after training\n\nGreedy decoding, at most 64 tokens.\n"]
    for i, (prompt, wanted, task) in enumerate(prompts):
        heading = "## Prompt" + (f" of task {task}" if task else "")
        parts = {heading: run.tokenizer.decode(prompt)[-1000:],
                 **{f"**{title}:**": texts[i] for title, texts in replies.items()}, "**Held-out reply:**": wanted[:1000]}
        for title, t in parts.items():
            blocks.append(f"{title}\n\n> " + (t.strip() or "(nothing)").replace("\n", "\n> ") + "\n")
    writing.write_text(run.out / "samples.md", "\n".join(blocks))


def running_mean(values: list[float], keep: float = 0.9) -> list[float]:
    """The exponential running mean, without the bias of its start: Adam's correction (arXiv:1412.6980, section 3).

    m_t = keep m_(t-1) + (1 - keep) x_t with m_0 = 0, divided by 1 - keep^t, the sum of the weights so far.
    """
    means = itertools.accumulate(values, lambda m, x: keep * m + (1 - keep) * x, initial=0.0)
    return [m / (1 - keep**t) for t, m in enumerate(means) if t]


def plot_losses(out: Path):
    """Write loss.png: every step's loss (thin), its running mean (thick) and the held-out loss (dots); below, the learning
    rate and the norm of the gradient before clipping."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_log(out)
    steps, losses = zip(*[(x["step"], x["loss"]) for x in lines if "loss" in x])
    fig, (ax, *below) = plt.subplots(3, figsize=(7, 7), height_ratios=(3, 1, 1), sharex=True, layout="constrained")
    ax.plot(steps, losses, color="0.75", linewidth=0.8, label="training, each step")
    ax.plot(steps, running_mean(losses), color="0.2", linewidth=1.6, label="training, running mean")
    names = list(dict.fromkeys(name for x in lines for name in x if name.startswith("val_loss")))
    for i, name in enumerate(names):
        label = "held-out" + printable(name).removeprefix("val_loss").replace("/", " ").replace("$", r"\$")
        ax.plot(*zip(*[(x["step"], x[name]) for x in lines if name in x]), "o--", color=f"C{(3 + i) % 10}", markersize=5,
                label=label)
    ax.set(ylabel="loss per labelled token (nats)")
    ax.set_title(printable(out.name), parse_math=False)
    ax.legend()
    for panel, name, label in zip(below, ("lr", "grad_norm"), ("learning rate", "gradient norm")):
        panel.plot(*zip(*[(x["step"], x[name]) for x in lines if name in x]), color="0.2", linewidth=0.8)
        panel.set(ylabel=label)
    below[-1].set(xlabel="optimizer step")
    for panel in (ax, *below):
        panel.grid(alpha=0.3)
    with writing.atomic(out / "loss.png") as tmp:
        fig.savefig(tmp, format="png", dpi=120)
    plt.close(fig)


def printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")  # any name that a file can have


def peaks(prediction: dict) -> str:
    if prediction["reserved"]:
        return f"{memory.human(prediction['peak'])} allocated, {memory.human(prediction['reserved'])} reserved"
    return f"{memory.human(prediction['peak'])} in tensors"


def categories(measured: dict | None, predicted: dict | None) -> str:
    """A table: one line for each category, with its measured and its predicted bytes. Empty categories are left out."""
    lines = []
    for c in memory.CATEGORIES:
        values = [d[c] for d in (measured, predicted) if d]
        if any(values):
            lines.append(f"{c:12}" + " ".join(f"{memory.human(v):>12}" for v in values))
    header = [f"{'':12}    measured    predicted"] if measured and predicted else []
    return "\n".join(header + lines)


def next_commands(cfg, out: Path) -> list[str]:
    """What to type after a run: talk to the best model, and merge the best adapter into its model."""
    def command(program, *words):
        program = program if Path.cwd() == ROOT else str(ROOT / program)
        return " ".join(["python", *map(shlex.quote, (program, *map(str, words)))])

    talk = ["--model", out / "best"] if cfg.full else ["--model", cfg.model, "--adapter", out / "best"]
    if cfg.tasks:
        talk = ["--model", cfg.model, *(x for t in cfg.tasks for x in ("--adapter", f"{t}={out / 'best' / t}"))]
    if cfg.shared_adapter:  # a task's adapter was trained with it, and is used with it: their sum is one adapter
        both = (x for t in (cfg.tasks[0], cfg.tasks[-1]) for x in ("--adapter", out / "best" / t))
        return [command("export.py", "combine", "--model", cfg.model, *both, "--out", out / cfg.tasks[0])]
    commands = [command("generate.py", *talk, "--prompt", "Hello")]
    can_merge = not cfg.full and not cfg.tasks and cfg.method not in WHY_NOT_MERGED
    if can_merge and not weights.stored_bits(weights.find(cfg.model)):
        commands.append(command("export.py", "merge", *talk, "--out", out / "merged"))
    return commands


def summarise(run, params: dict, prediction: dict, train_set) -> dict:
    """Write loss.png and, last, summary.json, which makes the run finished. Returns what summary.json holds."""
    seen, timed = run.seen, run.seen["timed"]
    evaluations = [x for x in read_log(run.out) if "val_loss" in x]
    others = {name.removeprefix("val_loss/"): {"before": evaluations[0][name], "after": evaluations[-1][name]}
              for name in evaluations[-1] if name.startswith("val_loss/")}
    is_text = not run.hooks.own_loss and seen["val_after"] < 700  # (math.exp of more overflows)
    per_second = {key: timed[key] / timed["step_s"] if timed["step_s"] else None for key in ("tokens", "examples")}
    summary = {
        "params": {k: params[k] for k in ("total", "trainable", "percent")},
        "memory": {"predicted_peak": prediction["peak"], "measured_peak": seen["peak"], "reserved": seen["reserved"],
                   "rss_peak": max(seen["rss_peak"], memory.rss_peak()), "predicted_by_category": prediction["by_category"],
                   "by_category": seen["by_category"] if seen["peak"] else None},
        "loss": {"first": seen["loss_first"], "last": seen["loss_last"], "val_before": seen["val_before"],
                 "val_after": seen["val_after"], "val_best": seen["val_best"],
                 "perplexity": math.exp(seen["val_after"]) if is_text else None, "others": others},
        "tokens_per_s": per_second["tokens"], "examples_per_s": per_second["examples"],
        "wall_s": seen["wall_s"], "eval_s": seen["eval_s"], "steps": run.step, "arithmetic": arithmetic(run.cfg),
        "data": {"rows": train_set.n_rows, "examples": len(train_set), "labels": train_set.n_labels,
                 "rows_dropped": train_set.n_dropped, "rows_cut": train_set.n_truncated, "labels_cut": train_set.n_lost},
        "next": next_commands(run.cfg, run.out),
    }
    plot_losses(run.out)
    writing.write_text(run.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report(summary, run.out)
    return summary


def report(summary: dict, out: Path):
    m, loss = summary["memory"], summary["loss"]
    change = 100 * (loss["val_after"] / loss["val_before"] - 1)
    perplexity = f", perplexity {loss['perplexity']:,.2f}" if loss["perplexity"] else ""
    print(f"\nheld-out loss {loss['val_before']:.4f} -> {loss['val_after']:.4f} ({change:+.1f} %), "
          f"best {loss['val_best']:.4f}{perplexity}")
    for name, x in loss["others"].items():
        print(f"{name:13} {x['before']:.4f} -> {x['after']:.4f} ({100 * (x['after'] / x['before'] - 1):+.1f} %)")
    if summary["tokens_per_s"]:
        print(f"speed         {summary['tokens_per_s']:,.0f} tokens/s, {summary['examples_per_s']:.2f} examples/s, "
              f"{summary['wall_s']:.0f} s in all, {summary['eval_s']:.0f} s in evaluations")
    if lost := summary["data"]["labels_cut"]:
        share = 100 * lost / (lost + summary["data"]["labels"])
        print(f"truncation    {share:.2g} % of the learned tokens were cut off, in {summary['data']['rows_cut']:,} rows")
    both = m["predicted_peak"] and m["measured_peak"]
    error = f" ({100 * (m['predicted_peak'] / m['measured_peak'] - 1):+.1f} %)" if both else ""
    predicted = [f"{memory.human(m['predicted_peak'])} predicted{error}"] * bool(m["predicted_peak"])
    measured = f"{memory.human(m['measured_peak'])} in tensors" if m["measured_peak"] else "not measured"
    parts = [measured, *predicted, f"{memory.human(m['rss_peak'])} resident",
             *[f"{memory.human(m['reserved'])} reserved"] * bool(m["reserved"])]
    print(f"peak memory   {', '.join(parts)}")
    if m["by_category"]:
        print("at the peak   " + categories(m["by_category"], m["predicted_by_category"]).replace("\n", "\n              "))
    print(f"written       {', '.join(sorted(p.name for p in out.glob('[!.]*')))} in {out}")
    print("next          " + "\n              ".join(summary["next"]))
