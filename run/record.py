"""What a run leaves in --out, and what it says at its end. Everything but metrics.jsonl appears whole or not at all.

    config.json      every option as resolved, versions, seed, commit
    metrics.jsonl    a line an optimizer step, a line an evaluation
    summary.json     parameters, memory, loss, speed
    samples.md       the same prompts before and after training
    loss.png         the curves
    adapter/ best/   the last adapter and the one of the lowest held-out loss (--full: model/ and best/, whole models)
    state/           what --resume needs
"""
import dataclasses
import json
import platform
import subprocess
from pathlib import Path

import torch

import memory
from ledger import predict
from files import weights
from errors import UserError


def prepare_out(cfg) -> Path:
    """The folder of the run: a new one, or with --resume the one to continue."""
    if cfg.resume:
        return Path(cfg.out)
    if cfg.out is None:
        base, n = f"runs/{Path(cfg.model).name}", 1
        while Path(f"{base}-{n}").exists():
            n += 1
        cfg.out = f"{base}-{n}"
    out = Path(cfg.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and holds another run; choose another folder, or continue it with --resume")
    return out


def parameters(name: str, params: dict) -> str:
    return (f"{name}: {params['total']:,} parameters in {memory.human(params['bytes'])}, "
            f"{params['trainable']:,} trainable ({params['percent']:.4f} %)")


def steps_done(cfg) -> int:
    """0, or the step that --resume continues after."""
    if not cfg.resume:
        return 0
    with weights.opened(Path(cfg.out) / "state" / "state.safetensors") as f:
        return json.loads(f.metadata()["numbers"])["step"]


def write_config(out: Path, cfg):
    here, git = Path(__file__).parent, None
    if (here / ".git").exists():
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    about = {"options": {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("resume", "show_batch", "dry_run")},
             "versions": {"python": platform.python_version(), "torch": torch.__version__}, "seed": cfg.seed,
             "commit": git.stdout.strip() if git and git.returncode == 0 else None}
    weights.write_text(out / "config.json", json.dumps(about, indent=2) + "\n")


def options_of_run(cfg):
    """--resume: the saved run's options; one given again (one that is not at its default) must be the same."""
    if not cfg.out:
        raise UserError("--resume needs --out, the folder of the run to continue")
    path, state = Path(cfg.out) / "config.json", Path(cfg.out) / "state" / "state.safetensors"
    if not path.is_file():
        raise UserError(f"--resume: {cfg.out} holds no run (no config.json in it)")
    if not state.is_file():
        raise UserError(f"--resume: {state} is missing, the run was stopped before its first save; start it anew")
    saved = weights.read_json(path)["options"]
    default = type(cfg)()
    for name in saved:
        given = getattr(cfg, name)
        if name != "out" and given != getattr(default, name) and given != saved[name]:
            raise UserError(f"--resume with a changed option: --{name.replace('_', '-')} {given}, the run in {cfg.out} has "
                            f"{saved[name]}; leave it out, or start a new run")
    resumed = type(cfg)(**{**saved, "out": cfg.out, "resume": True, "dry_run": cfg.dry_run, "show_batch": cfg.show_batch})
    resumed.epochs = default.epochs  # the number of steps was resolved from it
    return resumed


def log(out: Path, line: dict):
    try:
        with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as e:
        raise UserError(f"{out / 'metrics.jsonl'}: could not be written ({e.strerror})") from None


def read_log(out: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that a killed run left unfinished is skipped."""
    lines, path = [], out / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def rewind_log(out: Path, step: int):
    """Forget what came after the last save."""
    weights.write_text(out / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in read_log(out) if x["step"] <= step))


def per_second(lines: list[dict], key: str) -> float | None:
    """Over the steps after the first, which warms up, and the one under the ledger; None when there is no other."""
    seconds = sum(line["step_s"] for line in lines)
    return sum(line[key] for line in lines) / seconds if seconds else None


def write_samples(path: Path, cfg, prompts, before, after):
    blocks = [f"# Replies of {cfg.model} before and after training\n\nGreedy decoding, at most 64 tokens.\n"]
    for (prompt, wanted), b, a in zip(prompts, before, after):
        text = prompt[-1][0] if isinstance(prompt[-1], tuple) else \
            prompt[-1]["content"] + (f"\n\n{prompt[-1]['input']}" if prompt[-1].get("input") else "")
        parts = {"## Prompt": text[-1000:], "**Before:**": b, "**After:**": a, "**Held-out reply:**": wanted[:1000]}
        for title, t in parts.items():
            blocks.append(f"{title}\n\n> " + (t.strip() or "(nothing)").replace("\n", "\n> ") + "\n")
    weights.write_text(path, "\n".join(blocks))


def plot_losses(out: Path):
    """loss.png: every step's loss (thin), its running mean (thick), and the held-out loss (dots)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_log(out)
    train = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    val = [(x["step"], x["val_loss"]) for x in lines if "val_loss" in x]
    mean, smooth = None, []
    for _, y in train:
        mean = y if mean is None else 0.9 * mean + 0.1 * y
        smooth.append(mean)
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(*zip(*train), color="0.75", linewidth=0.8, label="training, each step")
    ax.plot([s for s, _ in train], smooth, color="0.2", linewidth=1.6, label="training, running mean")
    ax.plot(*zip(*val), "o--", color="tab:red", markersize=5, label="held-out")
    ax.set(xlabel="optimizer step", ylabel="loss per labelled token (nats)", title=out.name)
    ax.legend()
    ax.grid(alpha=0.3)
    with weights.atomic(out / "loss.png") as tmp:
        fig.savefig(tmp, format="png", dpi=120)
    plt.close(fig)


def predicted(child) -> dict:
    """The answer of predict.py, printed as it is used."""
    found = predict.answer(child) if child else {"error": "--compile changes what is kept"}
    if "error" in found:
        print(f"the peak is not predicted: {found['error']}")
        return {"peak": None, "by_category": None}
    print(f"predicted peak {peaks(found)}")
    return found


def peaks(found: dict) -> str:
    return (f"{memory.human(found['peak'])} allocated, {memory.human(found['reserved'])} reserved" if found["reserved"] else
            f"{memory.human(found['peak'])} in tensors")


def table(measured: dict | None, predicted: dict | None) -> str:
    """Bytes by category, one line each; a category that is empty in both has none."""
    lines = []
    for c in memory.CATEGORIES:
        values = [d[c] for d in (measured, predicted) if d]
        if any(values):
            lines.append(f"{c:12}" + " ".join(f"{memory.human(v):>12}" for v in values))
    header = [f"{'':12}    measured    predicted"] if measured and predicted else []
    return "\n".join(header + lines)


def report_dry_run(cfg, found: dict, of: str):
    print(f"{parameters(cfg.model, found['params'])}\n{of}\n")
    print(f"predicted peak on {cfg.device}: {peaks(found)}\n{table(None, found['by_category'])}")


def report(summary: dict, out: Path):
    m, loss = summary["memory"], summary["loss"]
    change = 100 * (loss["val_after"] / loss["val_before"] - 1)
    print(f"\nheld-out loss {loss['val_before']:.4f} -> {loss['val_after']:.4f} ({change:+.1f} %), "
          f"best {loss['val_best']:.4f}")
    if summary["tokens_per_s"]:
        print(f"speed         {summary['tokens_per_s']:,.0f} tokens/s, {summary['examples_per_s']:.2f} examples/s, "
              f"{summary['wall_s']:.0f} s in all")
    error = f" ({100 * (m['predicted_peak'] / m['measured_peak'] - 1):+.1f} %)" if m["predicted_peak"] else ""
    predicted = [f"{memory.human(m['predicted_peak'])} predicted{error}"] * bool(m["predicted_peak"])
    parts = [f"{memory.human(m['measured_peak'])} in tensors", *predicted, f"{memory.human(m['rss_peak'])} resident",
             *[f"{memory.human(m['reserved'])} reserved"] * bool(m["reserved"])]
    print(f"peak memory   {', '.join(parts)}")
    if m["by_category"]:
        print("at the peak   " + table(m["by_category"], m["predicted_by_category"]).replace("\n", "\n              "))
    print(f"written       {', '.join(sorted(p.name for p in out.iterdir()))} in {out}")
