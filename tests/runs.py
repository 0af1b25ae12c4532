"""Runs of train.main on tiny models, and readers for the files that they leave."""
import json
from array import array
from collections import Counter
from pathlib import Path

import data
import train
from files import token_cache
from run.plan import Plan
from techniques.loss import IGNORE


def options(out, model, data, **more) -> train.TrainConfig:
    return train.TrainConfig(**{"model": str(model), "data": str(data), "out": str(out), "device": "cpu", "samples": 0,
                                "max_length": 128, **more})


def run(out, model, data, **more) -> list[dict]:
    """Train, and return the optimizer steps of metrics.jsonl."""
    train.main(options(out, model, data, **more))
    return steps(out)


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def steps(out) -> list[dict]:
    return [x for x in lines(out) if "loss" in x]


def evaluations(out) -> list[dict]:
    return [x for x in lines(out) if "val_loss" in x]


def timeless(xs: list[dict]) -> list[dict]:
    """The same lines without the times, which differ from run to run."""
    return [{k: v for k, v in x.items() if k not in ("step_s", "tokens_per_s")} for x in xs]


def no_picture(monkeypatch):
    """Leave out loss.png: it takes matplotlib longer to draw it than these runs take to train."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **kw: Path(path).touch())


def dataset_of(examples: list[data.Example]) -> data.Dataset:
    """A Dataset of given examples."""
    rows = []
    for e in examples:
        learned = [False, *(t != IGNORE for t in e.targets)]
        rows.append([i if learn else ~i for i, learn in zip([*e.ids, max(e.targets[-1], 0)], learned, strict=True)])
    piece = token_cache.Piece(array("i", [i for r in rows for i in r]).tobytes(), [len(r) for r in rows],
                              [e.n_labels for e in examples], [False] * len(rows), Counter(), 0, [])
    return data.Dataset([data.Examples(token_cache.in_memory([piece]), 10**6).part()])


def steps_of(lengths: list[int], batch_size: int, grad_accum: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """The steps of one epoch, as lists of micro-batches of example numbers."""
    plan = Plan(dataset_of([data.Example([0] * n, [0] * n) for n in lengths]), batch_size, grad_accum, seed)
    return [plan.numbers(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
