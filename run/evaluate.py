"""The held-out loss of a model and of a run, and the cause of a loss that is not a number."""
import math

import torch
from torch import nn

import data
from errors import UserError
from run import record
from run.options import TrainConfig
from techniques.device import autocast, compute_dtype, type_name
from techniques.loss import sum_loss


@torch.no_grad()
def evaluate(model: nn.Module, examples: list[data.Example], cfg: TrainConfig) -> dict:
    """{"val_loss": nats for each labelled token, "val_bits_per_byte": bits for each byte of labelled text}.

    The second number does not depend on the tokenizer, so it compares models that have different ones.
    """
    model.eval()
    total = labels = 0
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for i in range(0, len(order), cfg.batch_size):
        batch = data.collate([examples[j] for j in order[i:i + cfg.batch_size]], cfg.pack, cfg.max_length).to(cfg.device)
        with autocast(cfg.device, cfg.amp):
            hidden = model.hidden(batch.ids, batch.positions, batch.segments)
            total += sum_loss(hidden, model.head, batch.targets, labelled=batch.labelled).item()
        labels += batch.n_labels
    model.train()
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


def evaluate_run(run, val_set: data.Dataset, key: str):
    """Log the held-out loss as run.seen[key], "val_before" or "val_after"; export best/ if it is the lowest so far.

    Raises UserError where it is not finite.
    """
    result = evaluate(run.model, val_set.examples, run.cfg)
    loss, best = result["val_loss"], run.seen["val_best"]
    run.seen[key] = loss
    record.log(run.out, {"step": run.step, **result})
    if not math.isfinite(loss):
        raise UserError(f"step {run.step}: held-out loss {loss}: {why_not_finite(run.model, run.cfg, run.step)}")
    if key == "val_after" and (best is None or loss < best):
        run.seen["val_best"] = loss
        run.export("best")
