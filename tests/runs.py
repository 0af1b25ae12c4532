"""Runs of train.main on tiny models, and what their files say. For test_train.py and test_invariance.py."""
import json
from pathlib import Path

import train


def options(out, model, data, **more) -> train.TrainConfig:
    return train.TrainConfig(**{"model": str(model), "data": str(data), "out": str(out), "device": "cpu", "samples": 0,
                                "max_length": 128, **more})


def run(out, model, data, **more) -> list[dict]:
    """Train; the optimizer steps of metrics.jsonl."""
    train.main(options(out, model, data, **more))
    return steps(out)


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def steps(out) -> list[dict]:
    return [x for x in lines(out) if "loss" in x]


def evaluations(out) -> list[dict]:
    return [x for x in lines(out) if "val_loss" in x]


def timeless(xs: list[dict]) -> list[dict]:
    """Without what no two runs share."""
    return [{k: v for k, v in x.items() if k not in ("step_s", "tokens_per_s")} for x in xs]


def no_picture(monkeypatch):
    """loss.png takes matplotlib longer than these runs take to train."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **kw: Path(path).touch())
