"""What a Python program may put in the place of the loop's own parts: train.main(cfg, loss=..., on_step=...).

docs/own-loss.md has an example, docs/dpo.py a whole other way to train. The command line has none of these.
"""
from collections.abc import Callable
from dataclasses import dataclass

import data
from errors import UserError
from run import prepare
from techniques.loss import token_loss


def nothing(run, line: dict):
    pass


@dataclass
class Hooks:
    """read_data  cfg -> (tokenizer, template, training set, {name: held-out set})
    collate    (examples, cfg.pack, cfg.max_length) -> data.Batch: a micro-batch
    loss       (model, batch, hidden) -> the sum of the batch's losses. hidden: model.hidden of the batch, (B, T, C). The
               step divides by the sum of its batch.n_labels, an evaluation by that of all its batches
    on_step    (run, line): called after each step, with its line of metrics.jsonl before it is written; may add to it
    on_eval    (run, line): the same after each evaluation
    """
    read_data: Callable = prepare.read_data
    collate: Callable = data.collate
    loss: Callable = token_loss
    on_step: Callable = nothing
    on_eval: Callable = nothing

    @property
    def own_loss(self) -> str | None:
        """The name of a loss (or of a way to make batches) that is not train.py's, for config.json."""
        own = [f for f, default in ((self.loss, token_loss), (self.collate, data.collate)) if f is not default]
        return ", ".join(getattr(f, "__qualname__", type(f).__qualname__) for f in own) or None

    def refuse(self, option: str):
        """option: and what it does with train.py's own loss, which it knows alone: "--fit predicts"."""
        if self.own_loss:
            raise UserError(f"{option} train.py's own loss, not {self.own_loss}; leave it out")
