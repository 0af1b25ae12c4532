"""The model card, README.md of what a run exports: what the hub shows of it, in PEFT's form.

It says only what the run knows. It has no date and no path of this machine, so equal runs leave equal cards.
"""
import json
import os
from pathlib import Path

from files import hub, writing

LAST = "pipeline_tag: text-generation\n---\n"


def write(folder: Path, run, val_loss: float | None, task: str = ""):
    """The card of `run`'s adapter (--full: model) as it is now. val_loss: its held-out loss, or None. task: its task."""
    cfg, seen = run.cfg, run.seen
    base = base_name(cfg.model)
    targets = cfg.lora_targets or ",".join(() if cfg.full else run.model.default_targets)
    low_rank = f" of rank {cfg.lora_r} and alpha {cfg.lora_alpha:g} on {targets.replace(',', ', ')}"
    what = {"lora": f"A LoRA adapter{low_rank}", "dora": f"A DoRA adapter{low_rank}", "ia3": "(IA)^3 factors",
            "bottleneck": f"Bottleneck adapters of width {cfg.bottleneck} (a format of Bytewise's own)",
            "prompt": f"A soft prompt of {cfg.virtual_tokens} virtual tokens",
            "prefix": f"A prefix of {cfg.virtual_tokens} virtual tokens"}[cfg.method]
    kind = "Every weight was trained" if cfg.full else (
        f"{what}, over weights in {cfg.bits} bit" + ("; it continues another adapter" if cfg.adapter else ""))
    files = ", ".join(f"`{printable(Path(part).name)}`" for part in cfg.data.split(","))
    beside = f"It is the one of task {task}; {len(cfg.tasks)} adapters were trained side by side."
    lines = [f"{kind}.", *[beside] * bool(task), f"Data: {files}.", f"Step {run.step} of {cfg.steps}, each of "
             f"{cfg.batch_size * cfg.grad_accum} examples; highest learning rate {cfg.lr:g}."]
    if val_loss is not None:
        lines.append(f"Held-out loss, in nats for each labelled token: {seen['val_before']:.4f} before training, "
                     f"{val_loss:.4f} after this step.")
    body = f"\n# {base}, fine-tuned with Bytewise\n\n" + "".join(f"* {line}\n" for line in lines)
    writing.write_text(folder / "README.md", front_matter(base, "transformers" if cfg.full else "peft", cfg.method) + body)


def write_merged(folder: Path, model: str, dtype: str):
    """The card of a model into which an adapter was merged (export.py)."""
    base = base_name(model)
    writing.write_text(folder / "README.md", front_matter(base, "transformers") + f"\n# {base} with an adapter\n\n"
                       f"The adapter is merged into the weights, which are in {dtype}. Merged with Bytewise.\n")


def write_combined(folder: Path, model: str, terms: list[tuple[str, float]], how: str):
    """The card of an adapter that is a weighted sum of others, (folder, weight) each (export.py)."""
    base = base_name(model)
    names = "".join(f"* {w:g} times `{printable(Path(f).resolve().name)}`\n" for f, w in terms)
    writing.write_text(folder / "README.md", front_matter(base, "peft") + f"\n# A sum of LoRA adapters of {base}\n\n{names}"
                       f"\nCombined with Bytewise (`--how {how}`).\n")


def front_matter(base: str, library: str, method: str = "lora") -> str:
    tags = f"tags:\n- {method}\n" if library == "peft" else ""
    return f"---\nbase_model: {json.dumps(base, ensure_ascii=False)}\nlibrary_name: {library}\n{tags}{LAST}"


def base_name(model: str) -> str:
    """org/name of a model of the hub. Of a folder only its own name: the rest of its path belongs to one machine."""
    return printable(hub.local_folder(model).resolve().name) if hub.local_folder(model) else hub.repository(model)


def printable(name: str) -> str:
    """A file's name as text: it may hold bytes that are no UTF-8, a line break or a backtick."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(c if c.isprintable() and c != "`" else "?" for c in text)
