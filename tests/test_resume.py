"""--resume: a run that was killed, or that is finished; data or a model that changed; two runs in one folder; signals."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_data, make_folder
from runs import lines, no_picture, options, timeless
from safetensors.torch import load_file, save_file

import train
from errors import UserError
from files import fingerprint, weights, writing
from files.template import ALPACA
from run import record, state
from train import TrainConfig


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    make_folder(folder / "llama", "llama")
    make_data(folder / "data.jsonl", 12)
    make_data(folder / "val.jsonl", 4)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    no_picture(monkeypatch)


@pytest.fixture
def start(shared, tmp_path):
    """start(**options): a run of 4 steps in tmp_path/run, saved after each one."""
    def run(name="run", **more):
        model, rows = more.pop("model", shared / "llama"), more.pop("data", shared / "data.jsonl")
        return train.main(options(tmp_path / name, model, rows, **{
            "val_data": str(shared / "val.jsonl"), "steps": 4, "save_every": 1, "eval_every": 2, "samples": 1, **more}))
    return run


def resume(out, **more):
    return train.main(TrainConfig(out=str(out), resume=True, **more))


def files(out) -> dict:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


class Killed(BaseException):
    pass


def killed_at(monkeypatch, n: int, start):
    """Run `start` and end it at its n-th rename. False if it has fewer."""
    real, calls = os.replace, []

    def replace(*names):
        calls.append(names)
        if len(calls) == n:
            raise Killed
        real(*names)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        try:
            start()
        except Killed:
            return True
    return False


def same(out, wanted, peak=True):
    """Whether two runs have left the same: tensors, losses, samples, and every key of the summary. peak: also the measured
    peak. (The ledger does not follow the first step after --resume, so a peak in that step is not measured.)"""
    states = sorted(f"state/{p.name}" for p in (out / "state").iterdir())
    assert states == sorted(f"state/{p.name}" for p in (wanted / "state").iterdir())
    for file in ("adapter/adapter_model.safetensors", "best/adapter_model.safetensors", *states):
        a, b = load_file(out / file), load_file(wanted / file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    assert timeless(lines(out)) == timeless(lines(wanted))
    assert (out / "samples.md").read_text() == (wanted / "samples.md").read_text()
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (out, wanted))
    for summary in (a, b):
        del summary["tokens_per_s"], summary["examples_per_s"], summary["wall_s"], summary["memory"]["rss_peak"]
        del summary["eval_s"], summary["next"]  # (a time; and the folder's name)
        if not peak:
            del summary["memory"]
    assert a == b


def test_killed_at_every_rename(start, tmp_path, monkeypatch):
    """Whatever is half done is done again: the resumed run leaves what an uninterrupted one leaves."""
    def go(name):
        return start(name, keep=2, sample_every=2)

    go("whole")
    assert "**After step 2:**" in (tmp_path / "whole" / "samples.md").read_text()
    resumed = n = 0
    while killed_at(monkeypatch, n := n + 1, lambda: go(f"run{n}")):
        out = tmp_path / f"run{n}"
        if not state.state_file(out).is_file():
            with pytest.raises(UserError, match="no config.json|before its first save; remove .* and start it again"):
                resume(out)
            assert not (out / "metrics.jsonl").exists() or lines(out)[-1]["step"] <= 1  # from then on, there is a state
            continue
        resume(out)
        same(out, tmp_path / "whole")
        resumed += 1
    assert resumed > 20 and resumed > n / 2
    same(tmp_path / f"run{n}", tmp_path / "whole")


def step_of(path) -> int:
    with weights.opened(path) as f:
        return json.loads(weights.read_metadata(f, path)["numbers"])["step"]


def names_and_steps(out) -> dict:
    return {p.name: step_of(p) for p in (out / "state").iterdir()}


def no_links(*names):
    raise OSError("no links")


@pytest.mark.parametrize("linked", [True, False])
def test_the_last_states_are_kept(linked, start, tmp_path, monkeypatch):
    if not linked:
        monkeypatch.setattr(os, "link", no_links)
    start("whole", steps=5, keep=3)
    out = tmp_path / "whole"
    wanted = {"state-000003.safetensors": 3, "state-000004.safetensors": 4, "state.safetensors": 5}
    assert names_and_steps(out) == wanted
    newest = out / "state" / "state.safetensors"
    for damage in (lambda: newest.write_bytes(newest.read_bytes()[:-9]), newest.unlink,
                   lambda: writing.write_tensors(newest, load_file(newest), {"numbers": "{}"})):
        os.remove(out / "summary.json")
        damage()
        with pytest.raises(UserError, match="or copy .*state-000004.safetensors to .*state.safetensors, and --resume"):
            resume(out)
        shutil.copy(out / "state" / "state-000004.safetensors", out / "state" / "state-000009.safetensors")
        shutil.copy(out / "state" / "state-000003.safetensors", newest)  # farther back than it says
        resume(out)
        assert names_and_steps(out) == wanted  # and none of a later step, from before the way back
    start("again", steps=5, keep=3)
    same(out, tmp_path / "again", peak=False)


def scripted(run, line):
    """Held-out losses by the step: the lowest is that of step 3; that of step 2 is no end yet."""
    line["val_loss"] = [5.0, 4.0, 4.5, 3.0, 3.5, 3.2, 2.0, 1.0][run.step]


@pytest.mark.parametrize("killed", [None, 3, 5, "samples"])
def test_patience(killed, shared, start, tmp_path, monkeypatch, capsys):
    """It counts evaluations in a row, and the count survives a kill: stopped after step 5, with all the files of an end."""
    def go(name):
        files = {"model": shared / "llama", "data": shared / "data.jsonl", "val_data": str(shared / "val.jsonl")}
        return train.main(options(tmp_path / name, **files, steps=7, eval_every=1, save_every=1, patience=2, samples=1),
                          on_eval=scripted)

    wanted, out = go("whole"), tmp_path / "run"
    assert (wanted["steps"], wanted["loss"]["val_best"], wanted["loss"]["val_after"]) == (5, 3.0, 3.2)
    assert "stopped after step 5 of 7: 2 evaluations without a lower held-out loss than 3.0000" in capsys.readouterr().out
    if killed:
        with monkeypatch.context() as m, pytest.raises(Killed):
            if killed == "samples":
                m.setattr(record, "write_samples", stop)
            else:
                step, calls = train.train_step, []
                m.setattr(train, "train_step", lambda *args: calls.append(1) or (
                    stop() if len(calls) == killed else step(*args)))
            go("run")
        train.main(TrainConfig(out=str(out), resume=True), on_eval=scripted)
        same(out, tmp_path / "whole", peak=False)
    capsys.readouterr()
    assert resume(tmp_path / "whole") == json.loads(json.dumps(wanted))
    assert "is finished: 5 of 7 steps are taken (--patience), and every file" in capsys.readouterr().out
    for more in ({"lr": 1e-4}, {"steps": 20}):
        with pytest.raises(UserError, match="--patience has ended the run .* after 5 steps; a new run with --adapter"):
            resume(tmp_path / "whole", **more)


def test_a_run_of_an_older_version_resumes(start, tmp_path):
    """Its config.json lacks the options that are new, and its state their numbers."""
    start("whole")
    out = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    os.remove(out / "summary.json")
    config = json.loads((out / "config.json").read_text())
    config["options"] = {k: v for k, v in config["options"].items() if k not in state.NEW}
    del config["inputs"]["loss"]
    (out / "config.json").write_text(json.dumps(config))
    path = state.state_file(out)
    with weights.opened(path) as f:
        numbers = json.loads(weights.read_metadata(f, path)["numbers"])
    for name in ("without_better", "eval_s"):
        del numbers["seen"][name]
    writing.write_tensors(path, load_file(path), {"numbers": json.dumps(numbers)})
    assert resume(out)["steps"] == 4
    del config["options"]["lr"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="option lr is missing"):
        resume(out)


def test_a_finished_run_says_so_and_is_left_alone(start, tmp_path, capsys, monkeypatch):
    wanted, out = start(), tmp_path / "run"
    before = files(out)
    capsys.readouterr()
    assert resume(out) == json.loads(json.dumps(wanted))
    assert capsys.readouterr().out == f"{out} is finished: 4 of 4 steps are taken, and every file is written\n"
    assert files(out) == before


@pytest.mark.parametrize("missing", ["adapter", "samples.md", "loss.png", "summary.json"])
def test_a_finished_run_writes_what_is_missing(missing, start, tmp_path):
    start("whole")
    out = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    (shutil.rmtree if missing == "adapter" else os.remove)(out / missing)
    resume(out)
    same(out, tmp_path / "whole")
    assert (out / missing).exists()


def test_the_summary_of_a_resumed_run_is_of_all_its_steps(start, tmp_path, monkeypatch):
    """Peak and speed include the steps before the interruption, also if none is taken after it."""
    whole = start("whole")
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(record, "write_samples", stop)
        start()
    summary = resume(tmp_path / "run")
    assert summary["memory"]["measured_peak"] == whole["memory"]["measured_peak"] > 0
    assert summary["memory"]["by_category"] == whole["memory"]["by_category"] and summary["tokens_per_s"] > 0


def stop(*args):
    raise Killed


@pytest.mark.parametrize("what, wanted", [
    ("rows", "--data is not what the run .* began with"), ("fewer", "--data is not"), ("val", "--val-data is not"),
    ("embedding", "the base model is not"), ("config", "the base model is not"), ("tokenizer", "the tokenizer is not")])
def test_changed_data_or_model(what, wanted, shared, start, tmp_path):
    moved = shutil.copytree(shared, tmp_path / "shared")
    here = {"model": str(moved / "llama"), "data": str(moved / "data.jsonl"), "val_data": str(moved / "val.jsonl")}
    start(**here, steps=4)
    os.remove(tmp_path / "run" / "summary.json")
    if what in ("rows", "fewer", "val"):
        make_data(moved / "data.jsonl" if what != "val" else moved / "val.jsonl", 3)
        if what == "rows":
            text = (shared / "data.jsonl").read_text()
            (moved / "data.jsonl").write_text(text.replace("It is", "It was"))
    elif what == "embedding":
        tensors = load_file(moved / "llama" / "model.safetensors")
        tensors["model.embed_tokens.weight"].zero_()
        save_file(tensors, moved / "llama" / "model.safetensors", {"format": "pt"})
    elif what == "config":
        text = (moved / "llama" / "config.json").read_text()
        (moved / "llama" / "config.json").write_text(text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    else:
        (moved / "llama" / "generation_config.json").write_text('{"eos_token_id": 7}')
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match=wanted):
        resume(tmp_path / "run")
    assert files(tmp_path / "run") == before


def test_data_and_model_may_move(shared, start, tmp_path, monkeypatch):
    """Other paths with the same content are welcome."""
    start("whole")
    moved = shutil.copytree(shared, tmp_path / "shared")
    assert killed_at(monkeypatch, 30, lambda: start(model=str(moved / "llama"), data=str(moved / "data.jsonl")))
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="data.jsonl"):
        resume(tmp_path / "run", model=str(shared / "llama"))
    resume(tmp_path / "run", model=str(shared / "llama"), data=str(tmp_path / "elsewhere" / "data.jsonl"))
    same(tmp_path / "run", tmp_path / "whole")


def test_everything_moves_at_once(shared, start, tmp_path, monkeypatch):
    """The run's folder, the model, both data files and the template: bit for bit. config.json holds the new paths."""
    old = shutil.copytree(shared, tmp_path / "old")
    (old / "mine.jinja").write_text("{{ bos_token }}" + ALPACA)
    paths = {"model": "llama", "data": "data.jsonl", "val_data": "val.jsonl", "template": "mine.jinja"}
    start("whole", **{k: str(old / v) for k, v in paths.items()})
    assert killed_at(monkeypatch, 40, lambda: start("run", **{k: str(old / v) for k, v in paths.items()}))
    before = json.loads((tmp_path / "run" / "config.json").read_text())
    out = (tmp_path / "run").rename(tmp_path / "moved")
    old.rename(tmp_path / "new")
    with pytest.raises(UserError, match="mine.jinja"):
        resume(out, **{k: str(tmp_path / "new" / v) for k, v in paths.items() if k != "template"})
    assert resume(out, **{k: str(tmp_path / "new" / v) for k, v in paths.items()})["steps"] == 4
    samples = tmp_path / "whole" / "samples.md"  # its title names the model's folder
    samples.write_text(samples.read_text().replace(str(old), str(tmp_path / "new")))
    same(out, tmp_path / "whole")
    after = json.loads((out / "config.json").read_text())
    assert after["options"].items() >= {k: str(tmp_path / "new" / v) for k, v in paths.items()}.items()
    assert {**after, "options": {**after["options"], **{k: str(old / v) for k, v in paths.items()}}} == before
    os.remove(out / "summary.json")
    assert resume(out)["steps"] == 4  # nothing need be said again


def test_more_steps(start, tmp_path, capsys):
    """A finished run of 4 steps and 4 more are a run of 8, where the rate does not depend on their number."""
    how = {"schedule": "constant", "warmup_steps": 2}
    start("whole", steps=8, **how)
    start(**how)
    out, old = tmp_path / "run", json.loads((tmp_path / "run" / "config.json").read_text())
    capsys.readouterr()
    assert resume(out, steps=8)["steps"] == 8
    assert "--steps 4 -> 8\n" in capsys.readouterr().out
    same(out, tmp_path / "whole")
    assert json.loads((out / "config.json").read_text()) == {**old, "options": {**old["options"], "steps": 8}}
    before = files(out)
    assert resume(out)["steps"] == 8 and files(out) == before


def test_another_rate_and_schedule(start, tmp_path, capsys, monkeypatch):
    """The rest of the run follows the new curve; a finished run takes them only with more steps."""
    def stopped(*args):
        raise Killed
    with monkeypatch.context() as m:
        m.setattr(record, "write_samples", stopped)
        with pytest.raises(Killed):
            start()
    out, before = tmp_path / "run", files(tmp_path / "run")
    for more, says in (({"lr": 0.5}, "has taken 4 steps, and is to have 4; .* leave --lr out"),
                       ({"steps": 3}, "has taken 4 steps, and is to have 3; .* leave --steps out")):
        with pytest.raises(UserError, match=says):
            resume(out, **more)
    assert files(out) == before
    resume(out, steps=6, lr=0.5, schedule="linear")
    out_text = capsys.readouterr().out
    assert all(line in out_text for line in ("--steps 4 -> 6\n", "-> 0.5\n", "--schedule cosine -> linear\n"))
    rates = [line["lr"] for line in lines(out) if "lr" in line]
    assert len(rates) == 6 and rates[4:] == pytest.approx([0.5 * 2 / 6, 0.5 / 6])
    options = json.loads((out / "config.json").read_text())["options"]
    assert (options["steps"], options["lr"], options["schedule"]) == (6, 0.5, "linear")


def test_more_epochs(start, tmp_path):
    start(steps=None, epochs=1, batch_size=4)  # 12 rows: 3 steps
    out = tmp_path / "run"
    assert resume(out)["steps"] == 3
    with pytest.raises(UserError, match="--steps and --epochs"):
        resume(out, epochs=2, steps=9)
    assert resume(out, epochs=2)["steps"] == 6 and len([x for x in lines(out) if "loss" in x]) == 6
    assert train.main(train.parse(["--out", str(out), "--resume", "--epochs", "3"]))["steps"] == 9  # 3 is the default


def test_a_longer_run_killed_at_every_rename(start, tmp_path, monkeypatch):
    """Whenever it is killed, it is a finished run of 4 steps or continues to 6; never an old summary of new steps."""
    how = {"schedule": "constant", "save_every": 2}
    start("short", **how)
    start("whole", steps=6, **how)
    n = 0
    while killed_at(monkeypatch, n := n + 1, lambda: resume(shutil.copytree(tmp_path / "short", tmp_path / f"r{n}"),
                                                            steps=6)):
        out = tmp_path / f"r{n}"
        resume(out, steps=6)
        same(out, tmp_path / "whole")
    assert n > 10


@pytest.mark.parametrize("how", [{}, {"lora_init": "pissa", "amp": True, "bits": 4}], ids=["default", "pissa"])
def test_a_second_stage_resumes(how, start, tmp_path, monkeypatch):
    """Bit for bit, also with the adapter at another place; not with another adapter."""
    start("first", **how, steps=2)
    adapter, amp = tmp_path / "first" / "adapter", {"amp": "amp" in how}
    start("whole", adapter=str(adapter), **amp, lora_dropout=0.25)
    assert killed_at(monkeypatch, 35, lambda: start("run", adapter=str(adapter), **amp, lora_dropout=0.25))
    moved = shutil.move(adapter, tmp_path / "elsewhere")
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match="first/adapter/adapter_config.json: cannot be read .No such file"):
        resume(tmp_path / "run")
    path = moved / "adapter_model.safetensors"
    tensors, whole = load_file(path), path.read_bytes()
    with weights.opened(path) as f:
        writing.write_tensors(path, {k: t * 1.01 for k, t in tensors.items()}, weights.read_metadata(f, path))
    with pytest.raises(UserError, match="--adapter is not what the run .* began with"):
        resume(tmp_path / "run", adapter=str(moved))
    assert files(tmp_path / "run") == before
    path.write_bytes(whole)
    resume(tmp_path / "run", adapter=str(moved))
    same(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.25


def test_an_option_given_at_its_default_is_compared(start, tmp_path):
    start(batch_size=2, steps=2)
    os.remove(tmp_path / "run" / "summary.json")
    for words in (["--batch-size", "8"], ["--warmup-steps", "1"], ["--seed", "1"], ["--amp"]):
        with pytest.raises(UserError, match=f"changed option: {words[0]}"):
            train.main(train.parse(["--out", str(tmp_path / "run"), "--resume", *words]))
    train.main(train.parse(["--out", str(tmp_path / "run"), "--resume", "--batch-size", "2", "--seed", "0", "--no-cache"]))
    assert "no_cache" not in json.loads((tmp_path / "run" / "config.json").read_text())["options"]


def test_one_folder_belongs_to_one_run(start, tmp_path):
    cfg = TrainConfig(out=str(tmp_path / "run"), model="m")
    with record.claimed(cfg):
        with pytest.raises(UserError, match="another run is writing to this folder"):
            start()
        with pytest.raises(UserError, match="another run is writing to this folder"), record.claimed(
                TrainConfig(out=cfg.out, resume=True)):
            pass
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # a killed run leaves the file, but no lock on it
    start()
    assert not (tmp_path / "run" / ".lock").exists()
    with pytest.raises(UserError, match="holds another run"):
        start()


def test_the_default_folder_is_the_next_one_that_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with record.claimed(TrainConfig(model="m")) as first, record.claimed(TrainConfig(model="m")) as second:
        assert (str(first), str(second)) == ("runs/m-1", "runs/m-2")
        (second / "config.json").write_text("{}")
    with record.claimed(TrainConfig(model="m")) as again:  # the first left nothing behind
        assert str(again) == "runs/m-1"


def test_a_folder_that_cannot_be_claimed(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match=f"--out .*{name}"), record.claimed(TrainConfig(out=str(tmp_path / name))):
            pass


@pytest.mark.parametrize("change, says", [
    ({"step": 5}, "step 5 of 4"), ({"step": "2"}, "step 2"), ({"step": None}, "step None"), ({"seen": 3}, "int"),
    ({"seen": {"val_best": "low"}}, "val_best is of another kind"), ({"seen": {"timed": {"tokens": 1}}}, "timed is of"),
    ({"scaler": 3}, "scaler is of")])
def test_a_state_that_cannot_be(change, says, start, tmp_path):
    start()
    path = state.state_file(tmp_path / "run")
    with weights.opened(path) as f:
        numbers = json.loads(weights.read_metadata(f, path)["numbers"])
    text = json.dumps({**numbers, **change})
    writing.write_tensors(path, load_file(path), {"numbers": text, "sha256": fingerprint.of_text(text)})
    with pytest.raises(UserError, match=f"not the state of this run .*({says})"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("name, value", [("arithmetic", None), ("arithmetic", {"products": 1}), ("versions", []),
                                         ("seed", "0"), ("inputs", 3), ("options", []), ("commit", False)])
def test_a_config_of_a_run_that_cannot_be(name, value, start, tmp_path):
    start()
    os.remove(tmp_path / "run" / "summary.json")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError, match=r"config\.json: .* must be"):
        resume(tmp_path / "run")


def test_the_options_of_a_run_are_complete_and_possible(start, tmp_path):
    start()
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for name, value, says in (("lora_r", "8", "lora_r must be an integer"), ("steps", None, "steps is null"),
                              ("lr", 10**400, "lr"), ("seed", ..., "seed is missing"), ("new", 1, "'new' is not known"),
                              ("amp", 0, "amp must be"), ("epochs", -1, r"config\.json: --epochs -1")):
        options = {**config["options"], name: value}
        if value is ...:
            del options[name]
        path.write_text(json.dumps({**config, "options": options}))
        with pytest.raises(UserError, match=says):
            resume(tmp_path / "run")


@pytest.mark.parametrize("line", [b"{", b'"loss"', b'{"step": "1"}', b'{"step": 1, "loss": null}', b'{"step": 1, "\xe9": 2}',
                                  b'{"step": 0, "val_loss": 2.5, "val_bits_per_byte": NaN}', ..., None])
def test_a_damaged_line_of_the_log(line, start, tmp_path):
    start()
    os.remove(tmp_path / "run" / "summary.json")
    path = tmp_path / "run" / "metrics.jsonl"
    if line in (..., None):
        os.remove(path)
        path.mkdir() if line is ... else path.symlink_to("nowhere")
    else:
        path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"metrics\.jsonl:(1| not a regular file| No such file)"):
        resume(tmp_path / "run")


def test_a_state_with_other_tensors(start, tmp_path):
    start()
    os.remove(tmp_path / "run" / "summary.json")
    path = state.state_file(tmp_path / "run")
    with weights.opened(path) as f:
        metadata = weights.read_metadata(f, path)
    tensors = load_file(path)
    name = next(n for n in tensors if n.startswith("param/"))
    writing.write_tensors(path, tensors, {"numbers": metadata["numbers"]})  # as an older version writes it
    assert resume(tmp_path / "run")["steps"] == 4
    os.remove(tmp_path / "run" / "summary.json")
    metadata["numbers"] = metadata["numbers"].replace('"step": 4', '"step": 3')
    writing.write_tensors(path, tensors, metadata)
    with pytest.raises(UserError, match="its numbers were changed"):
        resume(tmp_path / "run")
    metadata["numbers"] = metadata["numbers"].replace('"step": 3', '"step": 4')
    for other in ({**tensors, name: tensors[name] * torch.nan}, {**tensors, name: tensors[name][1:]},
                  {**tensors, name: tensors[name].half()},
                  {n: t for n, t in tensors.items() if n != name}, {**tensors, "rng/cpu": torch.zeros(3)},
                  {**tensors, "start/layers.0.Ax": torch.zeros(3)}):  # what may be absent, under a damaged name
        writing.write_tensors(path, other, metadata)
        with pytest.raises(UserError, match="not the state of this run"):
            resume(tmp_path / "run")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_signals_end_a_run_as_ctrl_c_does(shared, tmp_path):
    """Slurm and `docker stop` send SIGTERM, a lost connection SIGHUP: the state is saved, the status names the signal."""
    def as_in_a_terminal():  # (under nohup these tests' own SIGHUP is ignored, and a child inherits that)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    runs = []
    for signum in (signal.SIGTERM, signal.SIGHUP):
        out = tmp_path / signum.name
        words = ["--model", shared / "llama", "--data", shared / "data.jsonl", "--out", out, "--steps", "400",
                 "--samples", "0", "--save-every", "400", "--eval-every", "400", "--device", "cpu"]
        runs.append((signum, out, subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words)], text=True,
                                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                                   preexec_fn=as_in_a_terminal)))
    for signum, out, p in runs:
        end = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len(lines(out)) < 3:
            assert p.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        p.send_signal(signum)
        stdout, stderr = p.communicate(timeout=60)
        assert p.returncode == 128 + signum and stderr == "" and "--resume" in stdout.splitlines()[-1]
        with weights.opened(state.state_file(out)) as f:
            assert 2 <= json.loads(weights.read_metadata(f, out)["numbers"])["step"] < 400


def test_a_signal_that_is_ignored_stays_ignored():
    """nohup ignores SIGHUP; a shell's background jobs ignore SIGINT."""
    from run.interrupt import Interrupt
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.seen is None
            for _ in range(2):  # a second one is no reason to stop before the state is saved
                os.kill(os.getpid(), signal.SIGTERM)
                assert interrupt.seen == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
