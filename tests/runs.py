"""Runs of train.main on tiny models, and readers for the files that they leave."""
import json
from pathlib import Path

import train


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
