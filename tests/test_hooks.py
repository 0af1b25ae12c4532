"""train.main with a loss, a batch or a metric of the caller's own; docs/own-loss.md and docs/dpo.py."""
import importlib.util
import json
import math
import os
import re

import pytest
import torch
from conftest import NANO, ROOT, make_data, make_folder
from runs import evaluations, lines, no_picture, options, steps, timeless

import data
import lora
import train
from errors import UserError
from files import weights
from files.rows import read_rows
from files.template import ALPACA
from run.plan import Plan
from techniques.loss import token_loss

spec = importlib.util.spec_from_file_location("dpo", ROOT / "docs" / "dpo.py")
dpo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dpo)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    no_picture(monkeypatch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    make_folder(folder / "llama", "llama")
    make_data(folder / "data.jsonl", 12)
    make_data(folder / "val.jsonl", 4)
    pairs = [{"prompt": f"Say {word}", "chosen": f"{word} it is", "rejected": f"No, I will not say {word} to you"}
             for word in ("red", "green", "blue", "white", "black", "stop")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


@pytest.fixture
def cfg(shared, tmp_path):
    return lambda name="run", **more: options(tmp_path / name, shared / "llama", shared / "data.jsonl", **{
        "val_data": str(shared / "val.jsonl"), "steps": 4, "eval_every": 2, "save_every": 2, "lr": 1e-2, **more})


def double(model, batch, hidden):
    return 2 * token_loss(model, batch, hidden)


def test_a_loss_of_ones_own_trains_and_is_evaluated(cfg, tmp_path, capsys):
    train.main(cfg("plain"))
    train.main(cfg("same"), loss=lambda *args: token_loss(*args))
    capsys.readouterr()
    train.main(cfg("double", clip=0), loss=double)
    assert "the peak is not predicted: double is not train.py's own loss" in capsys.readouterr().out
    plain, same, twice = (lines(tmp_path / name) for name in ("plain", "same", "double"))
    without_bits = [{k: v for k, v in x.items() if k != "val_bits_per_byte"} for x in plain]
    assert timeless(same) == timeless(without_bits) and len(without_bits[0]) < len(plain[0])
    assert twice[0]["val_loss"] == pytest.approx(2 * plain[0]["val_loss"])
    for key in ("loss", "grad_norm"):
        assert twice[1][key] == pytest.approx(2 * plain[1][key], rel=1e-5)
    assert json.loads((tmp_path / "double" / "summary.json").read_text())["loss"]["perplexity"] is None


def test_another_loss_is_not_predicted_and_does_not_resume(cfg, shared, tmp_path):
    for more, option in (({"dry_run": True}, "--dry-run"), ({"fit": "8GB"}, "--fit")):
        with pytest.raises(UserError, match=f"{option} predicts train.py's own loss, not double"):
            train.main(cfg(**more), loss=double)
    train.main(cfg(), loss=double)
    os.remove(tmp_path / "run" / "summary.json")
    again = train.TrainConfig(out=str(tmp_path / "run"), resume=True)
    with pytest.raises(UserError, match=r"began with another loss \(double, now that of train.py\)"):
        train.main(again)
    train.main(again, loss=double)


def test_metrics_of_ones_own(cfg, tmp_path):
    seen = []
    train.main(cfg(), on_step=lambda run, line: line.update(twice=2 * line["loss"]),
               on_eval=lambda run, line: seen.append((run.step, line["val_loss"])) or line.update(n=run.step))
    assert all(x["twice"] == 2 * x["loss"] for x in steps(tmp_path / "run"))
    assert seen == [(x["step"], x["val_loss"]) for x in evaluations(tmp_path / "run")]
    assert [x["n"] for x in evaluations(tmp_path / "run")] == [0, 2, 4]


def test_the_documented_example_runs(shared, tmp_path, monkeypatch):
    """Its loss of a step is the mean of the examples' mean losses, computed here from the logits."""
    monkeypatch.chdir(tmp_path)
    code, = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "own-loss.md").read_text(), re.M | re.S)
    assert code.count("epochs=1") == 1 and len(code.splitlines()) <= 21
    exec(code.replace("epochs=1", "model=MODEL, data=DATA, val_frac=0.25, steps=2, samples=0, max_length=128, out='run', "
                      "device='cpu'"), {"MODEL": str(shared / "llama"), "DATA": str(shared / "data.jsonl")})
    got = lines(tmp_path / "run")
    assert all(x["largest_A"] > 0 for x in got if "loss" in x) and got[0]["val_improved"] == 0 != got[-1]["val_improved"]
    run = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    _, _, train_set, val_sets = train.prepare.read_data(train.TrainConfig(**{**run, "out": None}))
    model = weights.load(str(shared / "llama"))
    assert got[0]["val_loss"] == pytest.approx(mean_of_means(model, val_sets["held-out"]), rel=1e-5)
    first = [e for m in Plan(train_set, 8, 1, 0).micro_batches(0) for e in m]
    assert steps(tmp_path / "run")[0]["loss"] == pytest.approx(mean_of_means(model, first), rel=1e-5)


def mean_of_means(model, examples) -> float:
    with torch.no_grad():
        return sum(torch.nn.functional.cross_entropy(model(torch.tensor([e.ids]))[0], torch.tensor(e.targets)).item()
                   for e in examples) / len(examples)


# ---------------------------------------------------------------------------------------------- DPO

def test_the_disabled_adapter_is_the_model_itself():
    model, ids = weights.load(str(NANO)), torch.tensor([[5, 6, 7, 8]])
    base = model(ids)
    lora.inject(model, targets="all")
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.lora_B[0])
    adapted = model(ids)
    with pytest.raises(ZeroDivisionError), lora.disabled(model):
        torch.testing.assert_close(model(ids), base)
        raise ZeroDivisionError  # the adapter comes back after an error, too
    assert torch.equal(model(ids), adapted) and not torch.allclose(adapted, base)
    m.keep_start(m.lora_A, m.B())
    with pytest.raises(UserError, match="loftq and pissa"), lora.disabled(model):
        pass


def test_dpo_is_its_equation(shared):
    """Loss and gradient of one batch against log-softmax by hand, with an adapter that is not 0."""
    tokenizer = data.load_tokenizer(str(NANO))
    pairs = dpo.read_pairs(read_rows(shared / "pairs.jsonl"), tokenizer, ALPACA, 128)
    reference, model = weights.load(str(NANO)), lora.inject(weights.load(str(NANO)), targets="all")
    torch.manual_seed(1)
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.lora_B[0], std=0.05)
    trained = [p for p in model.parameters() if p.requires_grad]

    def by_hand(m, example):
        logp = m(torch.tensor([example.ids]))[0].log_softmax(-1)
        return sum(logp[i, t] for i, t in enumerate(example.targets) if t != data.IGNORE)

    margins = []
    for pair in pairs:
        with torch.no_grad():
            w, l = by_hand(reference, pair.chosen), by_hand(reference, pair.rejected)
        margins.append(0.3 * ((by_hand(model, pair.chosen) - w) - (by_hand(model, pair.rejected) - l)))
    wanted = -sum(torch.log(1 / (1 + torch.exp(-m))) for m in margins)
    gradients = torch.autograd.grad(wanted, trained)
    batch, d = dpo.collate(pairs, False, 128), dpo.DPO(beta=0.3)
    assert batch.n_labels == batch.n_examples == len(pairs) and len(batch.ids) == 2 * len(pairs)
    got = d.loss(model, batch, model.hidden(batch.ids))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d.margins[0], torch.stack(margins).detach(), rtol=1e-3, atol=1e-4)
    assert d.margins[0].abs().max() > 0.05  # else the margin proves nothing
    for a, b in zip(torch.autograd.grad(got, trained), gradients, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


def test_dpo_raises_the_margin(shared, tmp_path):
    pairs = str(shared / "pairs.jsonl")
    cfg = train.TrainConfig(data=pairs, val_data=pairs, out=str(tmp_path / "run"), device="cpu", steps=12,
                            batch_size=2, grad_accum=2, eval_every=6, samples=1, max_length=128)
    summary = dpo.main(cfg)
    evals = evaluations(tmp_path / "run")
    assert evals[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert evals[0]["val_margin"] == pytest.approx(0, abs=1e-4)
    assert evals[-1]["val_margin"] > 0.5 and summary["loss"]["val_after"] < 0.5
    got = steps(tmp_path / "run")
    assert got[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and got[-1]["margin"] > got[0]["margin"]
    assert sorted(x["examples"] for x in got[:2]) == [2, 4]  # pairs; the step divides by their number
    assert (tmp_path / "run" / "best" / "adapter_config.json").is_file()


@pytest.mark.parametrize("more, says", [({"full": True}, "--full"), ({"pack": True}, "--pack"),
                                        ({"data": "data.jsonl"}, "data.jsonl:1: prompt must be text")])
def test_dpo_refuses(more, says, shared, tmp_path):
    rows = str(shared / more.pop("data", "pairs.jsonl"))
    with pytest.raises(UserError, match=says):
        dpo.main(options(tmp_path / "run", shared / "llama", rows, steps=2, **more))
    assert not (tmp_path / "run").exists()
