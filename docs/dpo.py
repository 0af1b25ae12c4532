"""DPO: learn from pairs of replies, a chosen and a rejected one. It is train.py's loop with another loss.

    python docs/dpo.py --data pairs.jsonl --lr 5e-4 --epochs 1          and every other option of train.py

A row of pairs.jsonl is {"prompt": "...", "chosen": "...", "rejected": "..."}, all text.

Rafailov et al., "Direct Preference Optimization" (arXiv:2305.18290), eq. 7. w is the chosen reply, l the rejected one:

    loss = -log sigmoid(margin)      margin = beta (log p(w) - log p_ref(w)) - beta (log p(l) - log p_ref(l))

p is the model with its adapter, p_ref the same model with the adapter switched off. So the reference needs no second copy of
the weights: for LLaMA-7B in 16 bit that is 13.5 GB less. It needs a second forward pass, without gradients.

log p(reply) is a sum over the reply's tokens: minus the loss of this one row. So the logits are never built here either.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import terminal  # noqa: E402

if __name__ == "__main__":
    terminal.start()

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import data  # noqa: E402
import lora  # noqa: E402
import train  # noqa: E402
from errors import UserError  # noqa: E402
from files.rows import read_rows  # noqa: E402
from techniques.loss import sum_loss  # noqa: E402

BETA = 0.1  # how far the model may move away from the reference: the smaller, the farther


class Pair(data.Example):
    """Two examples. As one example, it has the tokens of both: so the plan of the steps knows its length."""

    def __init__(self, chosen: data.Example, rejected: data.Example):
        super().__init__([*chosen.ids, *rejected.ids], [*chosen.targets, *rejected.targets])
        self.chosen, self.rejected = chosen, rejected


class Pairs(data.Dataset):
    """pairs[i] -> Pair. What a run says of its data is said of the chosen replies."""

    def __init__(self, chosen: data.Dataset, rejected: data.Dataset):
        vars(self).update(vars(chosen))
        self.chosen, self.rejected = chosen, rejected
        self.lengths, self.labels = chosen.lengths + rejected.lengths, chosen.labels + rejected.labels

    def __getitem__(self, i: int) -> Pair:
        return Pair(self.chosen[i], self.rejected[i])


def read_pairs(rows: list, *how) -> Pairs:
    for where, row in rows:
        if missing := [key for key in ("prompt", "chosen", "rejected") if not isinstance(row.get(key), str)]:
            raise UserError(f"{where}: {missing[0]} must be text; a row has prompt, chosen and rejected")
    sides = [data.build([(where, {"instruction": row["prompt"], "output": row[key]}) for where, row in rows], *how)
             for key in ("chosen", "rejected")]
    if dropped := sum(side.n_dropped for side in sides):
        raise UserError(f"{rows[0][0]} and the rows after it: {dropped} replies are empty, or --max-length cuts them off")
    return Pairs(*sides)


def read_data(cfg):
    if cfg.full:
        raise UserError("--full: DPO's reference is the model without its adapter, so there must be one")
    if cfg.pack:
        raise UserError("--pack: DPO needs a row for each reply")
    tokenizer = data.load_tokenizer(cfg.model)
    how = tokenizer, data.load_template(cfg.template, tokenizer), cfg.max_length
    rows = read_rows(cfg.data)
    if cfg.val_data:
        held_out = read_rows(cfg.val_data)
    else:
        mask = data.held_out_rows(len(rows), max(1, round(cfg.val_frac * len(rows))), cfg.seed).tolist()
        rows, held_out = ([row for row, out in zip(rows, mask) if out == wanted] for wanted in (False, True))
    return tokenizer, how[1], read_pairs(rows, *how), {"held-out": read_pairs(held_out, *how)}


def collate(pairs: list[Pair], pack: bool, limit: int) -> data.Batch:
    """A batch of 2 B rows: first the chosen replies, then the rejected ones in the same order."""
    batch = data.collate([p.chosen for p in pairs] + [p.rejected for p in pairs], pack, limit)
    batch.n_examples = batch.n_labels = len(pairs)  # the step divides its loss by n_labels
    return batch


def log_probabilities(model, batch: data.Batch, hidden: torch.Tensor) -> torch.Tensor:
    """log p(reply | prompt) of each row: (2 B,)."""
    return torch.stack([-sum_loss(h[None], model.head, t[None]) for h, t in zip(hidden, batch.targets)])


class DPO:
    def __init__(self, beta: float = BETA):
        self.beta, self.margins = beta, []

    def loss(self, model, batch: data.Batch, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), lora.disabled(model):
            reference = log_probabilities(model, batch, model.hidden(batch.ids))
        chosen, rejected = (log_probabilities(model, batch, hidden) - reference).chunk(2)
        margin = self.beta * (chosen - rejected)  # (B,)
        self.margins.append(margin.detach())
        return -F.logsigmoid(margin).sum()

    def note(self, run, line: dict):
        """Add the mean margin of a step, or of an evaluation, to its line of metrics.jsonl."""
        line["val_margin" if "val_loss" in line else "margin"] = torch.cat(self.margins).mean().item()
        self.margins.clear()


def main(cfg: train.TrainConfig, beta: float = BETA) -> dict:
    dpo = DPO(beta)
    return train.main(cfg, read_data=read_data, collate=collate, loss=dpo.loss, on_step=dpo.note, on_eval=dpo.note)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    terminal.run(lambda: main(train.parse()))
