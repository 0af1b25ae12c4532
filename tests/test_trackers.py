"""--report: what TensorBoard and wandb are told; a resumed run continues its curves; a package that is not installed."""
import pytest
from conftest import make_data, make_folder
from runs import lines, no_picture, options

import train
from errors import UserError

FAKE_WANDB = """
calls = []


class Run:
    def log(self, data, step):
        calls.append((step, data))

    def finish(self, exit_code):
        calls.append(("finish", exit_code))


def init(**how):
    if how["name"] == "refused":
        raise RuntimeError("api_key not configured\\nmore")
    calls.append(("init", how))
    return Run()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    no_picture(monkeypatch)
    make_folder(tmp_path / "gpt2", "gpt2")
    make_data(tmp_path / "data.jsonl", 12)
    return lambda name="run", **more: train.main(options(tmp_path / name, tmp_path / "gpt2", tmp_path / "data.jsonl", **{
        "val_frac": 0.25, "steps": 4, "save_every": 2, "eval_every": 2, **more}))


def stop_in_step_4(monkeypatch, start):
    step, calls = train.train_step, []

    def train_step(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, "train_step", train_step)
        start()


def test_wandb(start, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "theirs")
    import wandb
    stop_in_step_4(monkeypatch, lambda: start(report="wandb"))
    train.main(train.TrainConfig(out=str(tmp_path / "run"), resume=True))
    (_, first), (_, second) = (c for c in wandb.calls if c[0] == "init")
    assert first["id"] == second["id"] and len(first["id"]) == 8 and second["resume"] == "allow"
    assert first["config"]["steps"] == 4 and first["config"]["report"] == "wandb"
    assert [c for c in wandb.calls if c[0] == "finish"] == [("finish", 1), ("finish", 0)]
    sent = [(c[0], c[1]) for c in wandb.calls if isinstance(c[0], int)]
    assert [s for s, _ in sent] == [0, 1, 2, 2, 3, 3, 4, 4]  # step 3 is taken again, and is the same
    logged = [(x["step"], {k: v for k, v in x.items() if k != "step"}) for x in lines(tmp_path / "run")]
    assert sent[:4] + sent[5:] == logged
    with pytest.raises(UserError, match="^--report wandb: api_key not configured$"):
        start("refused", report="wandb")


def test_tensorboard(start, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard (58 MB)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    stop_in_step_4(monkeypatch, lambda: start(report="tensorboard"))
    train.main(train.TrainConfig(out=str(tmp_path / "run"), resume=True))
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    curves.Reload()
    logged = lines(tmp_path / "run")
    assert {name for x in logged for name in x} - {"step"} == set(curves.Tags()["scalars"])
    for name in ("loss", "val_loss", "lr"):
        got = [(e.step, e.value) for e in curves.Scalars(name)]
        wanted = [(x["step"], x[name]) for x in logged if name in x]
        assert [s for s, _ in got] == [s for s, _ in wanted]  # no step twice
        assert [v for _, v in got] == pytest.approx([v for _, v in wanted])


@pytest.mark.parametrize("report, says", [("mlflow", "mlflow is no tracker; there are tensorboard and wandb"),
                                          ("", "nothing is no tracker"),
                                          ("wandb", "the package is not installed; pip install wandb")])
def test_refused_before_anything_is_loaded(report, says, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--report {report}: {says}"):
        train.main(train.TrainConfig(model="not-a-model", report=report, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
