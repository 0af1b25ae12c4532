"""The held-out loss of a model and of a run, and the cause of a loss that is not a number."""
import math
import sys
import time
from collections import Counter

import torch
from torch import nn
from tqdm import tqdm

import data
from errors import UserError
from run import tasks
from run.hooks import Hooks
from run.options import TrainConfig
from techniques.device import autocast, compute_dtype, type_name


@torch.no_grad()
def evaluate(model: nn.Module, val_set: data.Dataset, cfg: TrainConfig, tokenizer, hooks: Hooks | None = None,
             numbers: torch.Tensor | None = None) -> dict:
    """{"val_loss": nats for each labelled token, "val_bits_per_byte": bits for each byte of labelled text}, and with
    --task-column {"val_loss/TASK": ...} of each task.

    The second number does not depend on the tokenizer, so it compares models that have different ones. It is left out if
    `hooks` have another loss. numbers: of the examples that take part; None: all.
    """
    hooks = hooks or Hooks()
    model.eval()
    numbers = torch.arange(len(val_set)) if numbers is None else numbers
    order = numbers[val_set.lengths[numbers].sort(descending=True, stable=True).indices]
    task_of = [val_set.task_of(i) for i in order.tolist()] if val_set.tasks else [None] * len(order)
    totals, labels, n_bytes = Counter(), Counter(), 0
    batches = [some for task in sorted(set(task_of), key=str)  # a batch has examples of one task
               for some in order[[t == task for t in task_of]].split(cfg.batch_size)]
    for some in tqdm(batches, "evaluating", leave=False, disable=not sys.stderr.isatty()):
        examples = [val_set[i] for i in some.tolist()]
        batch = hooks.collate(examples, cfg.pack, cfg.max_length).to(cfg.device)
        tasks.route(model, batch.tasks, batch.segments)
        with autocast(cfg.device, cfg.amp):
            loss = hooks.loss(model, batch, model.hidden(batch.ids, batch.positions, batch.segments)).item()
        totals[examples[0].task] += loss
        labels[examples[0].task] += batch.n_labels
        n_bytes += 0 if hooks.own_loss else sum(data.text_bytes(e, tokenizer) for e in examples)
    model.train()
    total, of_tasks = totals.total(), {f"val_loss/{t}": totals[t] / labels[t] for t in totals if t}
    per_byte = {} if hooks.own_loss else {"val_bits_per_byte": total / math.log(2) / max(1, n_bytes)}
    return {"val_loss": total / labels.total(), **per_byte, **of_tasks}


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


def spread(n_examples: int, n: int | None) -> torch.Tensor:
    """The numbers of n of the examples, the same ones each time, at equal distances. None: all."""
    n = min(n or n_examples, n_examples)
    return torch.arange(n) * n_examples // n


def evaluate_run(run, val_sets: dict[str, data.Dataset], key: str):
    """Log the held-out losses, the first one also as run.seen[key], "val_before" or "val_after".

    If this one is the lowest so far, export best/; if not, count an evaluation more for --patience. Raises UserError where a
    loss is not finite.
    """
    start, seen, line = time.perf_counter(), run.seen, {"step": run.step}
    for i, (name, val_set) in enumerate(val_sets.items()):
        numbers = spread(len(val_set), run.cfg.eval_examples)
        result = evaluate(run.model, val_set, run.cfg, run.tokenizer, run.hooks, numbers)
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
