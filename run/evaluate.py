"""The held-out loss of a model and of a run, and the cause of a loss that is not a number."""
import math
import sys
import time

import torch
from torch import nn
from tqdm import tqdm

import data
from errors import UserError
from run.hooks import Hooks
from run.options import TrainConfig
from techniques.device import autocast, compute_dtype, type_name


@torch.no_grad()
def evaluate(model: nn.Module, examples: list[data.Example], cfg: TrainConfig, hooks: Hooks | None = None) -> dict:
    """{"val_loss": nats for each labelled token, "val_bits_per_byte": bits for each byte of labelled text}.

    The second number does not depend on the tokenizer, so it compares models that have different ones. It is left out if
    `hooks` have another loss.
    """
    hooks = hooks or Hooks()
    model.eval()
    total = labels = 0
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for i in tqdm(range(0, len(order), cfg.batch_size), "evaluating", leave=False, disable=not sys.stderr.isatty()):
        batch = hooks.collate([examples[j] for j in order[i:i + cfg.batch_size]], cfg.pack, cfg.max_length).to(cfg.device)
        with autocast(cfg.device, cfg.amp):
            total += hooks.loss(model, batch, model.hidden(batch.ids, batch.positions, batch.segments)).item()
        labels += batch.n_labels
    model.train()
    if hooks.own_loss:
        return {"val_loss": total / labels}
    return {"val_loss": total / labels, "val_bits_per_byte": total / math.log(2) / max(1, sum(e.n_bytes for e in examples))}


def why_not_finite(model: nn.Module, cfg: TrainConfig, step: int) -> str:
    """The likely cause: damaged weights, diverged training, or the precision. step: the optimizer steps done before."""
    for n, p in model.named_parameters():
        if not torch.isfinite(p).all():
            if step == 0 or not p.requires_grad:
                return f"the checkpoint is damaged: {n} is not finite"
            return f"training diverged: {n} is not finite; lower --lr (now {cfg.lr:g}) or --clip (now {cfg.clip:g})"
    if (dtype := compute_dtype(cfg.device, cfg.amp)) != torch.float32:
        return (f"the weights are finite, so the {type_name(dtype)} arithmetic overflowed; "
                f"try without --amp, or a lower --lr")
    return f"the weights are finite, so the activations overflowed; lower --lr (now {cfg.lr:g})"


def is_due(step: int, cfg: TrainConfig) -> bool:
    """Whether an evaluation follows `step`: every eval_every steps, and at the last step.

    The last one takes the place of one that is at most half of eval_every away. Of 25 steps with an evaluation every 12, it
    comes after 12 and 25, not after 24.
    """
    return step == cfg.steps or step % cfg.eval_every == 0 and 2 * (cfg.steps - step) > cfg.eval_every


def spread(examples: list, n: int | None) -> list:
    """n of the examples, the same ones each time, at equal distances. None: all."""
    return [examples[i * len(examples) // n] for i in range(n)] if n and n < len(examples) else examples


def evaluate_run(run, val_sets: dict[str, data.Dataset], key: str):
    """Log the held-out losses, the first one also as run.seen[key], "val_before" or "val_after".

    If this one is the lowest so far, export best/; if not, count an evaluation more for --patience. Raises UserError where a
    loss is not finite.
    """
    start, seen, line = time.perf_counter(), run.seen, {"step": run.step}
    for i, (name, val_set) in enumerate(val_sets.items()):
        result = evaluate(run.model, spread(val_set.examples, run.cfg.eval_examples), run.cfg, run.hooks)
        line |= {f"{k}/{name}": v for k, v in result.items()} if i else result
    run.hooks.on_eval(run, line)
    run.log(line)
    for name, loss in line.items():
        if name.startswith("val_loss") and not math.isfinite(loss):
            raise UserError(f"step {run.step}: held-out loss {loss}: {why_not_finite(run.model, run.cfg, run.step)}")
    seen[key] = loss = line["val_loss"]
    if key == "val_after":
        if seen["val_best"] is None or loss < seen["val_best"]:
            seen["val_best"], seen["without_better"] = loss, 0
            run.export("best")
        else:
            seen["without_better"] += 1
    seen["eval_s"] += time.perf_counter() - start
