"""--task-column: an adapter for each task in one run. Each learns what it would learn in a run of its own."""
import copy
import json

import pytest
import torch
from conftest import make_folder
from runs import evaluations, no_picture, options, run, steps, timeless
from test_predict import InProcess

import data
import export
import lora
import train
from errors import UserError
from files import peft_files, weights
from ledger import ask
from methods import several
from run import prepare, tasks
from run.evaluate import evaluate
from techniques.optim import AdamW

TASKS = ("add", "spell", "type")  # "type" is a name that nn.ModuleDict does not take


def make_rows(path, n=36, names=TASKS):
    rows = [{"instruction": f"Number {i} " + "please " * (i % 5), "output": "It is " + "so " * (i % 7) + f"{i}.",
             "task": names[i % len(names)]} for i in range(n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for family in ("gpt2", "llama"):
        make_folder(folder / family, family)
    make_rows(folder / "data.jsonl")
    make_rows(folder / "val.jsonl", 9)
    return folder


@pytest.fixture
def go(shared, tmp_path, monkeypatch):
    no_picture(monkeypatch)

    def train_it(name="run", family="llama", **more):
        more = {"data": shared / "data.jsonl", "val_data": str(shared / "val.jsonl"), "task_column": "task", "batch_size": 4,
                "steps": 4, "eval_every": 4, "lr": 1e-2, **more}
        run(tmp_path / name, shared / family, **more)
        return tmp_path / name
    return train_it


def parameters(model, name) -> dict:
    return {f"{layer}.{n}": p for layer, m in several.of(model, name).items() for n, p in m.named_parameters()
            if p.requires_grad}


def read(shared, **more):
    cfg = options("", shared / "llama", shared / "data.jsonl", **{"task_column": "task", "no_cache": True, **more})
    _, _, train_set, val_sets = prepare.read_data(cfg)
    cfg.tasks = prepare.tasks_of(cfg, train_set, val_sets)
    return cfg, train_set, next(iter(val_sets.values()))


@pytest.mark.parametrize("how", [{}, {"ckpt_every": 1}, {"pack": True}, {"batch_size": 3, "grad_accum": 4}], ids=str)
def test_a_step_is_that_of_runs_alone(shared, how):
    """One AdamW step over mixed batches = for each task, a step of a model with its adapter alone on its rows alone."""
    how = {"batch_size": 12, "grad_accum": 1, **how}
    cfg, train_set, _ = read(shared, **how)
    cfg.clip, cfg.amp = 0.0, False
    examples = [train_set[i] for i in range(0, len(train_set), 2)][:12]
    assert {e.task for e in examples} > {"add"}
    batches = [data.collate(examples[i:i + cfg.batch_size], cfg.pack) for i in range(0, 12, cfg.batch_size)]
    model = weights.load(str(shared / "llama"))
    model.ckpt_every = how.get("ckpt_every", 0)
    several.inject(model, list(TASKS), r=4)
    untouched = TASKS[2]
    examples_of = {t: [e for e in examples if e.task == t] for t in TASKS}
    if examples_of[untouched]:
        batches = [data.collate([e for e in examples if e.task != untouched], cfg.pack)]
    before = {t: {n: p.detach().clone() for n, p in parameters(model, t).items()} for t in TASKS}
    step(model, batches, cfg)
    for task in TASKS[:2]:
        alone = weights.load(str(shared / "llama"))
        lora.inject(alone, r=4)
        own = {n: p for n, p in alone.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(before[task][n])
        step(alone, [plain(data.collate(examples_of[task]))], cfg)
        for n, p in parameters(model, task).items():
            assert (p - before[task][n]).abs().max() > 1e-4 or "lora_A" in n  # (B = 0, so A has no gradient yet)
            torch.testing.assert_close(p, own[n], atol=2e-5, rtol=1e-3)
    assert all(torch.equal(p, before[untouched][n]) for n, p in parameters(model, untouched).items())


def plain(batch):
    batch.tasks = None
    return batch


def step(model, batches, cfg):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW([{"params": trained, "weight_decay": 0.0}], 1e-3, eps=1e-2)  # (with eps, a gradient's size matters)
    train.train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), copy.deepcopy(batches), cfg)


def test_gradients_are_weighted_by_the_tasks_own_labels(shared):
    """With a shared adapter: it has the mean over all labels, a task's adapter that over the task's."""
    cfg, train_set, _ = read(shared, shared_adapter=True)
    assert cfg.tasks == (*TASKS, "shared")
    examples = [train_set[i] for i in range(0, len(train_set), 4)][:8]
    model = weights.load(str(shared / "llama"))
    several.inject(model, cfg.tasks, r=2)
    found = {}
    for chosen in (examples, [e for e in examples if e.task == "add"]):
        batch = data.collate(chosen)
        tasks.route(model, batch.tasks)
        loss = train.token_loss(model, batch, model.hidden(batch.ids)) / batch.n_labels
        model.zero_grad()
        loss.backward()
        tasks.weigh(model, [batch], lambda p: p)
        found[len(chosen)] = {t: {n: p.grad for n, p in parameters(model, t).items()} for t in ("add", "shared", "spell")}
    mixed, alone = found[8], found[len(chosen)]
    assert len(chosen) < 8
    for n, grad in alone["add"].items():
        torch.testing.assert_close(mixed["add"][n], grad, atol=1e-6, rtol=1e-4)
    assert any(not torch.allclose(mixed["shared"][n], g, atol=1e-5) for n, g in alone["shared"].items() if g.any())
    assert all(g is None for g in alone["spell"].values())


@pytest.mark.parametrize("how", [{}, {"pack": True, "amp": True, "ckpt_every": 1, "shared_adapter": True}], ids=str)
def test_a_run_leaves_an_adapter_for_each_task(go, shared, how):
    out = go(**how)
    names = sorted(p.name for p in (out / "adapter").iterdir())
    assert names == [*TASKS[:1], *["shared"] * ("shared_adapter" in how), *TASKS[1:]]
    model = weights.load(str(shared / "llama"), bits=16 if "amp" in how else 32)
    for name in names:
        peft_files.add(model, name, out / "adapter" / name)
    cfg, _, val_set = read(shared, val_data=str(shared / "val.jsonl"), **how)
    cfg.device = "cpu"
    tokenizer = data.load_tokenizer(str(shared / "llama"))
    wanted = evaluations(out)[-1]["val_loss"]
    found = evaluate(model, val_set, cfg, tokenizer)
    assert found["val_loss"] == pytest.approx(wanted, abs=1e-6 if not how else 2e-3)
    labels = {t: sum(e.n_labels for e in val_set if e.task == t) for t in TASKS}
    mean = sum(found[f"val_loss/{t}"] * n for t, n in labels.items()) / sum(labels.values())
    assert mean == pytest.approx(found["val_loss"])
    with several.adapter(model, "spell"):  # one task alone, through its own adapter
        one = [e for e in val_set if e.task == "spell"]
        batch = plain(data.collate(one))
        several.route(model, [("spell", "shared")[:1 + ("shared" in names)]] * len(one))
        alone = train.token_loss(model, batch, model.hidden(batch.ids)).item() / batch.n_labels
    assert found["val_loss/spell"] == pytest.approx(alone, abs=1e-5 if not how else 2e-2)
    several.route(model, [None])
    card = (out / "adapter" / "spell" / "README.md").read_text()
    assert "the one of task spell" in card
    for name in TASKS:  # a program that knows one adapter takes each of them
        single = peft_files.load(weights.load(str(shared / "llama")), out / "adapter" / name)
        assert sum(m.B().abs().sum() for m in lora.adapters(single).values()) > 0


def test_a_killed_run_continues_as_if_nothing_had_happened(go, tmp_path, monkeypatch):
    whole = go("whole", steps=6, save_every=3)
    real = train.train_step
    calls = []

    def killed(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(train, "train_step", killed)
        go("again", steps=6, save_every=3)
    train.main(train.TrainConfig(out=str(tmp_path / "again"), resume=True))
    assert timeless(steps(tmp_path / "again")) == timeless(steps(whole))
    for name in TASKS:
        file = f"adapter/{name}/adapter_model.safetensors"
        assert (whole / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert train.main(train.TrainConfig(out=str(tmp_path / "again"), resume=True))["steps"] == 6  # finished


def test_the_command_for_what_comes_next_names_an_adapter(go, shared, capsys):
    go()
    assert "--adapter add=" in capsys.readouterr().out
    out = go("two", shared_adapter=True)  # with a shared adapter: the sum of both, which is what was trained
    assert f"--adapter {out}/best/add --adapter {out}/best/shared" in (said := capsys.readouterr().out)
    words = next(line for line in said.splitlines() if "export.py combine" in line).split()
    export.main(words[words.index("combine"):])
    ids = torch.arange(20)[None]
    one = peft_files.load(weights.load(str(shared / "llama")), out / "add")
    both = weights.load(str(shared / "llama"))
    for name in ("add", "shared"):
        peft_files.add(both, name, out / "best" / name)
    several.route(both, [("add", "shared")])
    torch.testing.assert_close(one(ids), both(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", [{}, {"amp": True, "bits": 4, "ckpt_every": 1, "shared_adapter": True, "grad_accum": 2}],
                         ids=str)
def test_the_peak_is_predicted(go, on_device, monkeypatch, how):
    on_device()
    monkeypatch.setattr(ask, "Predictor", InProcess)
    memory = json.loads((go(**how) / "summary.json").read_text())["memory"]
    assert memory["predicted_peak"] == pytest.approx(memory["measured_peak"], rel=1e-3 if how else 0)


@pytest.mark.parametrize(("more", "words"), [
    ({"task_column": "tusk"}, r"data.jsonl:1: --task-column tusk"), ({"adapter": "x"}, "leave --adapter out"),
    ({"method": "dora"}, "leave --method out"), ({"full": True}, "leave --full out"), ({"lora_init": "pissa"}, "lora-init"),
    ({"skip_bad_rows": True}, "skip-bad-rows"), ({"task_column": None, "shared_adapter": True}, "--shared-adapter has no"),
    ({"lora_targets": "q_proj,lm_head"}, "lm_head cannot have several")], ids=str)
def test_bad_options(go, more, words):
    with pytest.raises(UserError, match=words):
        go(**more)


@pytest.mark.parametrize(("names", "more", "words"), [
    (("a", "b/c"), {}, "b/c"), (("a", ".."), {}, "cannot be named"), (("a",), {}, "every row is of task a"),
    (("a", "shared"), {"shared_adapter": True}, "a task is named shared"), (("a", "b"), {}, "task add has held-out rows")],
    ids=str)
def test_bad_tasks(go, tmp_path, names, more, words):
    make_rows(tmp_path / "rows.jsonl", 12, names)
    with pytest.raises(UserError, match=words):
        go(data=tmp_path / "rows.jsonl", **more)


def test_a_task_without_a_reply(go, tmp_path):
    rows = make_rows(tmp_path / "rows.jsonl")
    with open(rows, "a") as f:
        f.write(json.dumps({"instruction": "Say it.", "output": "", "task": "silent"}) + "\n")
    with pytest.raises(UserError, match="none of task silent's rows has a token to learn"):
        go(data=rows)


def test_a_text_has_no_tasks(go, tmp_path):
    (tmp_path / "a.txt").write_text("It was a fine day. " * 200)
    with pytest.raises(UserError, match="plain text, which has no columns"):
        go(data=tmp_path / "a.txt", val_data=None)
