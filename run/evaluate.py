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
def evaluate(model: nn.Module, val_set: data.Dataset, cfg: TrainConfig, tokenizer) -> dict:
    """{"val_loss": nats for each labelled token, "val_bits_per_byte": bits for each byte of labelled text}.

    The second number does not depend on the tokenizer, so it compares models that have different ones.
    """
    model.eval()
    total = labels = n_bytes = 0
    for some in val_set.lengths.sort(descending=True, stable=True).indices.split(cfg.batch_size):
        examples = [val_set[i] for i in some.tolist()]
        batch = data.collate(examples, cfg.pack, cfg.max_length).to(cfg.device)
        with autocast(cfg.device, cfg.amp):
            total += sum_loss(model.hidden(batch.ids, batch.positions, batch.segments), model.head, batch.targets).item()
        labels += batch.n_labels
        n_bytes += sum(data.text_bytes(e, tokenizer) for e in examples)
    model.train()
    return {"val_loss": total / labels, "val_bits_per_byte": total / math.log(2) / max(1, n_bytes)}


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
    result = evaluate(run.model, val_set, run.cfg, run.tokenizer)
    loss, best = result["val_loss"], run.seen["val_best"]
    run.seen[key] = loss
    record.log(run.out, {"step": run.step, **result})
    if not math.isfinite(loss):
        raise UserError(f"step {run.step}: held-out loss {loss}: {why_not_finite(run.model, run.cfg, run.step)}")
    if key == "val_after" and (best is None or loss < best):
        run.seen["val_best"] = loss
        run.export("best")
