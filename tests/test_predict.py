"""The predicted peak is the measured peak; --dry-run, a GPU's allocator, and --fit.

Most predictions here are made in this process, because a child process takes seconds to start. A test that reads gradients
or optimizer states makes none: reading a tensor without memory outside hollow.Hollow ends the process.
"""
import dataclasses
import gc
import json
import random
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REAL_PREDICTOR, ROOT, NoPredictor, make_data, make_folder
from runs import no_picture, options, run, steps, timeless

import memory
import train
from errors import UserError
from files import weights
from ledger import allocator, ask, fit, hollow, predict
from ledger.allocator import CachingAllocator, MiB
from run import options as options_
from run import prepare
from techniques import optim
from techniques.device import Device, device_of, pretend
from train import TrainConfig

MB = 1e6


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    for family in ("gpt2", "llama", "phi"):
        make_folder(folder / family, family, n_layer=4) if family == "gpt2" else \
            make_folder(folder / family, family, num_hidden_layers=4)
    make_data(folder / "data.jsonl", 24)
    make_data(folder / "val.jsonl", 2)
    return folder


def predicted(cfg, steps) -> dict:
    return predict.predict(cfg, weights.config_of(cfg.model)[2], steps, ask.machine(cfg.device), cfg.tasks)


class InProcess(NoPredictor):
    """A Predictor that answers in this process."""

    def ask(self, cfg, steps):
        self.found = predicted(cfg, steps)
        return self

    def answer(self):
        return self.found


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(ask, "Predictor", InProcess)


@pytest.fixture
def in_child(monkeypatch):
    monkeypatch.setattr(ask, "Predictor", REAL_PREDICTOR)


@pytest.fixture
def go(shared, tmp_path, monkeypatch, on_device):
    """Train for a few steps, and return "memory" of summary.json."""
    no_picture(monkeypatch)

    def train_it(family="gpt2", name="run", **more):
        on_device()  # as in a new process: a Device's rooms only grow
        more = {"data": shared / "data.jsonl", "val_data": str(shared / "val.jsonl"), "batch_size": 4, "steps": 3, **more}
        run(tmp_path / name, shared / family, **more)
        return json.loads((tmp_path / name / "summary.json").read_text())["memory"]
    return train_it


# ---------------------------------------------------------------------------------------------- predicted is measured

AMP = {"amp": True}
ALL = {"lora_targets": "all"}
FULL = {"full": True}
TOGGLES = [
    {}, AMP, {**AMP, "bits": 32}, {**AMP, "bits": 8}, {**AMP, "bits": 4}, {**AMP, "ckpt_every": 1}, {**AMP, "ckpt_every": 2},
    {**AMP, "bits": 4, "ckpt_every": 1, "ckpt_offload": True}, {**AMP, "pack": True}, {"pack": True, "ckpt_every": 1},
    {**AMP, "batch_size": 1, "grad_accum": 4}, {**FULL, "batch_size": 2, "grad_accum": 2},
    {"batch_size": 8, "max_length": 80}, FULL, {**FULL, **AMP}, {**FULL, "optimizer": "adamw8bit"},
    {**FULL, **AMP, "optimizer": "paged_adamw8bit", "ckpt_every": 1},
    {**FULL, **AMP, "optimizer": "offload_adamw"}, {**FULL, "optimizer": "offload_adamw", "ckpt_every": 2},
    {**AMP, **ALL, "lora_r": 16, "lora_dropout": 0.1},
    {**AMP, **ALL, "bits": 4, "optimizer": "paged_adamw8bit", "lora_dropout": 0.05, "lora_r": 32},
    {**AMP, **ALL, "bits": 8, "optimizer": "adamw8bit", "ckpt_every": 2, "lora_r": 32},
    {**AMP, "bits": 4, "lora_init": "loftq"}, {**AMP, "lora_init": "pissa"},
    {**AMP, "bits": 8, "lora_init": "pissa", "ckpt_every": 1}, {"lora_targets": "lm_head"},
    {**AMP, "optimizer": "offload_adamw"}, {**FULL, **AMP, "from_scratch": True}, {**FULL, "weight_decay": 0.1, "clip": 0.0},
    {**ALL, "rslora": True, "ckpt_every": 3}]
CASES = [(("gpt2", "llama", "phi")[n % 3], toggles) for n, toggles in enumerate(TOGGLES)] + [
    ("gpt2", {**AMP, "bits": 4}), ("phi", AMP), ("llama", {**FULL, **AMP})]


def label(case) -> str:
    return " ".join([case[0], *(k if v is True else f"{k}={v}" for k, v in case[1].items())])


@pytest.mark.parametrize("case", CASES, ids=map(label, CASES))
def test_what_is_predicted_is_measured(case, go, in_process):
    """Equal in every category, with one exception: a CPU's 16-bit layer_norm keeps two numbers a token in 16 bit, where
    PyTorch's shape function says 32. (In a model this small they matter: 8 of some 700 bytes a token and layer.)"""
    family, toggles = case
    found = go(family, **toggles)
    known = known_difference(toggles)
    if toggles.get("amp") and family != "llama" and device_of("cpu").products != torch.float32:
        known = 0.02 * found["measured_peak"]
    assert_predicted(found, known)


def known_difference(toggles) -> int:
    # ids, targets and labelled positions of the micro-batches that are not run
    return 24 * 72 * max(0, toggles.get("grad_accum", 1) - 2)


def assert_predicted(found: dict, known: float):
    measured, predicted = found["by_category"], found["predicted_by_category"]
    assert sum(predicted.values()) == found["predicted_peak"] and sum(measured.values()) == found["measured_peak"] > 0
    assert found["predicted_peak"] == pytest.approx(found["measured_peak"], rel=0.02)
    for c in memory.CATEGORIES:
        assert abs(predicted[c] - measured[c]) <= (known if c in ("activations", "temporaries") else 0), (c, found)


@pytest.mark.parametrize("family, first, more", [
    ("gpt2", {"lora_r": 5}, {}), ("llama", {**ALL, **AMP, "bits": 4, "lora_r": 16, "rslora": True}, AMP),
    ("phi", {**AMP, "lora_init": "pissa"}, {**AMP, "bits": 8})])
def test_a_second_stage_is_predicted(family, first, more, go, in_process, tmp_path, monkeypatch):
    """Its rank, its layers and its start are those of the adapter: also asked by a child, and with --dry-run."""
    go(family, "first", **first, steps=1)
    adapter = tmp_path / "first" / "adapter"
    found = go(family, "second", **more, adapter=str(adapter))
    known = 0.02 * found["measured_peak"] if more.get("amp") and family != "llama" else 0
    assert_predicted(found, known)
    if family == "gpt2":
        monkeypatch.setattr(ask, "Predictor", REAL_PREDICTOR)
        monkeypatch.chdir(adapter.parent)  # a relative path: the child runs in another folder
        said = json.loads((tmp_path / "second" / "config.json").read_text())["options"]
        cfg = options("unused", said["model"], said["data"], val_data=said["val_data"], steps=3, batch_size=4,
                      adapter="adapter", dry_run=True)
        assert train.main(cfg)["by_category"] == found["predicted_by_category"]


HELD = [(family, {"bits": bits}) for bits in (16, 8, 4) for family in ("gpt2", "llama", "phi")] + [
    case for case in CASES if case[1].get("amp")]


@pytest.mark.parametrize("case", HELD, ids=map(label, HELD))
def test_on_a_cpu_without_16_bit_units_too(case, go, in_process, on_device):
    """Weights in few bits, products in float32: equal to the byte."""
    on_device(products=torch.float32)
    family, toggles = case
    assert_predicted(go(family, **toggles), known_difference(toggles))


def test_the_other_machine_is_predicted(shared, on_device, in_child):
    """--dry-run of a CPU that this one is not: the machine's types are part of the question."""
    cfg = train.resolve(options("unused", shared / "llama", shared / "data.jsonl", amp=True, batch_size=4, dry_run=True,
                                val_data=str(shared / "val.jsonl")))
    found = {}
    for products in (torch.bfloat16, torch.float32):
        on_device(products=products)
        steps, _, resolved = ask.largest_steps(cfg)
        with ask.Predictor() as child:
            found[products] = child.ask(resolved, steps).answer()
        assert found[products] == predicted(resolved, steps)
    assert found[torch.bfloat16]["by_category"]["activations"] < 0.6 * found[torch.float32]["by_category"]["activations"]


def test_the_largest_step_is_watched_and_predicted(go, in_process, tmp_path):
    """There is one long row, and training reaches it in the middle of its eight steps. The ledger watches that step."""
    rows = [{"prompt": "Count", "completion": " 1" * 5} for _ in range(7)] + [{"prompt": "Count", "completion": " 1" * 100}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    more = {"data": tmp_path / "long.jsonl", "batch_size": 1, "amp": False, "seed": 1}
    short, long = go("llama", "short", steps=4, **more), go("llama", "long", steps=8, **more)
    lengths = [x["tokens"] for x in steps(tmp_path / "long")]
    assert 3 < lengths.index(max(lengths)) < 7 and max(lengths) > 100, lengths  # or choose another seed
    assert long["measured_peak"] == long["predicted_peak"] > 1.3 * short["measured_peak"] == 1.3 * short["predicted_peak"]


def test_the_peak_is_a_step_with_neither_most_positions_nor_most_labels(go, in_process, tmp_path):
    """A middle step outweighs one with more positions and few labels, and one with more labels and few positions."""
    rows = [{"prompt": p * "1 ", "completion": c * " 1"} for p, c in ((100, 4), (50, 44), (0, 48), (60, 4))]
    (tmp_path / "four.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    more = {"data": tmp_path / "four.jsonl", "batch_size": 1, "amp": False}
    peaks = {}
    for name in ("first", "last"):  # the middle row is predicted, wherever it stands
        got = go("llama", name, steps=8, seed=0 if name == "first" else 3, **more)
        assert got["measured_peak"] == got["predicted_peak"]
        peaks[name] = got["measured_peak"]
    assert peaks["first"] == peaks["last"]
    alone = {}
    for i, row in enumerate(rows):
        (tmp_path / "one.jsonl").write_text((json.dumps(row) + "\n") * 2)
        alone[i] = go("llama", f"one{i}", steps=2, **{**more, "data": tmp_path / "one.jsonl"})["measured_peak"]
    assert max(alone, key=alone.get) == 1 and alone[1] == peaks["first"]


# ---------------------------------------------------------------------------------------------- the formulas

def asked(model, B=1, T=512, labels=None, n=1, machine=None, **more) -> dict:
    """Prediction for n micro-batches of B examples of T tokens, of which `labels` are labelled. machine: other answers."""
    cfg = train.resolve(TrainConfig(**{"model": model, "dry_run": True, "device": "cuda", "amp": True, "batch_size": B,
                                       "grad_accum": n, "max_length": T, **more}))
    options_.resolve_for(cfg, weights.config_of(cfg.model)[0], None)
    return predict.predict(cfg, weights.config_of(model)[2], [[[(T, labels or T)] * B] * n],
                           {**ask.machine(cfg.device), **(machine or {})})


def activations(*args, **more) -> int:
    """With chunks of 2^22 logits on a GPU too: with larger ones the loss makes the peak where layers are recomputed."""
    return asked(*args, machine={"logits_chunk": 2**22}, **more)["by_category"]["activations"]


def test_gpt2s_activations():
    """gpt2.py: 22C bytes a token and layer, 415 MB for 4 x 512 tokens; a CPU does not keep attention's output, 2C.
    recompute.py: 38 MB of inputs and 35 MB of one layer. The formula leaves out the last norm's input."""
    token, tokens = 768 * 12, 4 * 512
    assert 22 * token * tokens == pytest.approx(415e6, rel=0.01)
    card = activations("gpt2", 4)
    assert card == pytest.approx(22 * token * tokens, rel=0.02)
    # With one example the logits make the peak, so all activations are there. (With 4 examples, 4 % are gone by then.)
    assert activations("gpt2", 1, device="cpu") == pytest.approx(20 * token * tokens / 4, rel=0.02)
    assert activations("gpt2", 2) == pytest.approx(card / 2, rel=0.01)
    assert activations("gpt2", 4, ckpt_every=1) == pytest.approx(38e6 + 35e6, rel=0.06)
    half = (22 + 2) / 2 * token * tokens  # every other layer keeps its input only; one of them is recomputed at the peak
    assert activations("gpt2", 4, ckpt_every=2) == pytest.approx(half + 35e6, rel=0.06)
    small = {"logits_chunk": 2**20}  # else the loss makes the peak
    offloaded = asked("gpt2", 4, ckpt_every=1, ckpt_offload=True, machine=small)["by_category"]["activations"]
    assert offloaded == pytest.approx(35e6, rel=0.12)


def test_llamas_activations():
    """llama.py: 101 kB a layer and token, 1.66 GB for 512; recompute.py: 134 + 52 MB, and 52 with the inputs offloaded."""
    per_layer = 14 * 4096 + 4 * 11008  # 4C + 2C + 6C + 2C + 4F
    assert per_layer == 101_376
    assert activations("llama-7b") == pytest.approx(per_layer * 32 * 512, rel=0.02)
    assert per_layer * 32 * 512 == pytest.approx(1.66e9, rel=0.001)
    assert activations("llama-7b", ckpt_every=1) == pytest.approx(134e6 + 52e6, rel=0.03)
    assert activations("llama-7b", ckpt_every=1, ckpt_offload=True) == pytest.approx(52e6, rel=0.1)


def test_phis_activations():
    """phi.py: 51 kB a layer and token, 839 MB for 512; on a CPU 46 kB."""
    assert activations("phi-2") == pytest.approx(839e6, rel=0.01)
    # On a CPU, with so few tokens that the logits make the peak: all layers, and the last norm's input and output.
    per_layer = 18 * 2560
    assert per_layer == pytest.approx(46e3, rel=0.01)
    assert activations("phi-2", T=128, device="cpu") == pytest.approx((32 * per_layer + 4 * 2560) * 128, rel=0.01)


@pytest.mark.parametrize("model,r,wanted", [("gpt2", 8, 254e6), ("llama-7b", 16, 13.6e9)])
def test_sixteen_bytes_a_trained_parameter_two_a_frozen_one(model, r, wanted):
    """The table in lora.py, with its 1,991 MB and 107.8 GB for all the weights."""
    found = asked(model, T=8, lora_r=r)
    trained, split = found["params"]["trainable"], found["by_category"]
    assert split["weights"] == 2 * (found["params"]["total"] - trained)
    assert split["adapters"] == 4 * trained and split["optimizer"] == pytest.approx(8 * trained, rel=1e-4)
    assert split["weights"] + 16 * trained == pytest.approx(wanted, rel=0.005)
    full = 16 * (found["params"]["total"] - trained)
    assert full == pytest.approx({"gpt2": 1991e6, "llama-7b": 107.8e9}[model], rel=0.001)
    # With --full the peak is at the end of backward, when all gradients exist.
    split = asked(model, T=8, full=True)["by_category"]
    assert sum(split[c] for c in ("weights", "gradients", "optimizer")) == pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("optimizer,wanted", [("adamw8bit", 67.6e9), ("paged_adamw8bit", 53.9e9), ("offload_adamw", 13.5e9)])
def test_where_the_optimizers_keep_their_states(optimizer, wanted):
    """The table in optim.py: LLaMA-7B on a GPU."""
    found = asked("llama-7b", T=8, full=True, optimizer=optimizer)["by_category"]
    assert sum(found[c] for c in ("weights", "gradients", "optimizer")) == pytest.approx(wanted, rel=0.005)


def test_states_in_the_machines_memory():
    split = asked("gpt2", T=8, full=True, optimizer="offload_adamw", device="cpu")["by_category"]
    assert split["weights"] == 2 * 124_439_808 and split["optimizer"] == pytest.approx(12 * 124_439_808, rel=0.001)
    split = asked("gpt2", T=8, full=True, optimizer="paged_adamw8bit", device="cpu")["by_category"]
    assert split["optimizer"] == pytest.approx((2 + 8 / 256) * 124_439_808, rel=0.01)  # norms and biases have 8 bytes


def test_the_loss_holds_one_chunk():
    """loss.py: on a GPU 2^24 logits (here 320 rows of 50,257) of 4 bytes, with 2 bytes more for a 16-bit copy, and C numbers
    for each label, two or three times (h and its gradient). The textbook takes 10 bytes for each of all logits: 515 MB."""
    few, many = (asked("gpt2", T=1024, labels=n)["by_category"]["loss"] for n in (512, 1024))
    assert few == pytest.approx(320 * 50257 * 6 + 512 * 768 * 6, rel=0.02)
    assert many - few == pytest.approx(512 * 768 * 4, rel=0.1)
    cpu = asked("gpt2", T=256, labels=128, device="cpu")["by_category"]["loss"]  # 2^22: 80 rows
    assert cpu == pytest.approx(80 * 50257 * 6 + 128 * 768 * 6, rel=0.02)


def test_the_categories_in_closed_form():
    """The list beside CATEGORIES in memory.py: LLaMA-7B on a GPU."""
    found = asked("llama-7b", lora_r=16)
    split = found["by_category"]
    assert found["peak"] == pytest.approx(15.4e9, rel=0.002)
    assert split["weights"] == 2 * 6_738_415_616 and split["adapters"] == 4 * 16 * 8192 * 64
    assert split["optimizer"] == pytest.approx(67.1e6, rel=0.001) and split["gradients"] == 0
    # Beside the formula: the adapters' 16-bit copies, which backward needs.
    assert split["activations"] == pytest.approx(512 * 32 * 101_376 + split["adapters"] / 2, rel=0.01)
    assert split["loss"] == pytest.approx(6 * 512 * 32000 + 8 * 4096 * 512, rel=0.01)
    assert split["temporaries"] == pytest.approx(2 * 8.5e6, rel=0.01)
    assert asked("llama-7b", lora_r=16, n=2)["by_category"]["gradients"] == 4 * 16 * 8192 * 64
    small = {"logits_chunk": 2**22}  # then the peak is in backward where layers are recomputed
    split = asked("llama-7b", lora_r=16, ckpt_every=1, machine=small)["by_category"]
    assert split["activations"] == pytest.approx(512 * (2 * 4096 * 32 + 101_376), rel=0.02)
    assert split["temporaries"] == pytest.approx(6 * 11008 * 512 + 2 * 8.5e6, rel=0.1)


def test_what_a_card_adds():
    """A GPU adds two cuBLAS workspaces of 8.5 MB, and rounding. It reserves at least what it allocates."""
    found = asked("gpt2", T=64)
    assert sum(found["by_category"].values()) <= found["peak"] <= found["reserved"] and found["peak"] % 512 == 0
    assert found["reserved"] % (2 * MiB) == 0
    assert found["by_category"]["temporaries"] == pytest.approx(2 * 8.5e6, rel=0.02)
    assert asked("gpt2", T=64, device="cpu")["reserved"] is None
    room = asked("llama-2-7b", T=8, bits=8, ckpt_every=1)["by_category"]  # the largest layer in 16 bit, one at a time
    tiles = 4 * 32 * 128 * (128 + 1)  # attention's backward works on 128 rows, even if T is 8
    assert room["temporaries"] == pytest.approx(2 * 8.5e6 + 2 * 4096 * 11008 + tiles, rel=0.01)


def test_an_older_gpu_is_predicted():
    """A T4: float16, and k and v are kept for every query head, as attention.py expands them. SmolLM2 has 9 and 3 heads."""
    t4 = {"half": "float16", "products": "float16", "flash": False}
    new, old = (asked("smollm2-135m", 8, machine=machine)["by_category"]["activations"] for machine in ({}, t4))
    assert old - new == pytest.approx(30 * 8 * 512 * 2 * (9 - 3) * 64 * 2, rel=0.01)
    new, old = (asked("smollm2-135m", 1, 4096, machine={"logits_chunk": 2**20, **machine}, ckpt_every=1)["by_category"]
                for machine in ({}, t4))
    assert old["activations"] - new["activations"] == pytest.approx(4096 * 2 * (9 - 3) * 64 * 2, rel=0.01)


def test_dropout_keeps_one_byte_a_number_on_a_gpu():
    """For q's and v's adapter a mask, one byte a number, and x twice instead of once. (On a CPU a factor takes 2 bytes.)"""
    for at, mask in (("cuda", 1), ("cpu", 2)):
        kept = [activations("smollm2-135m", 1, 256, device=at, lora_dropout=p) for p in (0.1, 0.0)]
        assert kept[0] - kept[1] == pytest.approx(30 * 256 * 576 * (2 * mask + 2), rel=0.03), at


def test_attentions_buffers():
    """FlashAttention's backward works on 128 rows of 32 numbers at a time, the memory-efficient kernel on 64 of 64."""
    q, k = (torch.empty(2, heads, 130, 40, dtype=torch.bfloat16) for heads in (6, 3))
    rows = 4 * 2 * 6
    for flash, pair, wanted in ((True, (q, q), rows * 256 * 65), (True, (q, k), rows * 256 * 65 + 2 * q.nbytes),
                                (False, (q, q), rows * 192 * 65), (True, (q.float(), q.float()), rows * 192 * 65)):
        with pretend("cpu", Device("cuda", flash=flash)):
            assert predict.attention_buffers(*pair) == wanted


# ---------------------------------------------------------------------------------------------- --dry-run

@pytest.fixture
def offline(monkeypatch):
    """Making a socket and opening a file of weights are errors."""
    def refuse(*args, **kwargs):
        raise AssertionError("the network, or weights")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(weights, "opened", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)


def dry(*args) -> dict:
    return train.main(train.parse(["--dry-run", *map(str, args)]))


def everything(folder: Path) -> dict:
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*")}


def test_dry_run_of_a_folder_without_weights(tmp_path, shared, offline, monkeypatch, capsys, go, in_process):
    """It predicts the largest step of the data, and the run then predicts and measures the same. Nothing is written."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for f in ("config.json", "vocab.json", "merges.txt"):
        (bare / f).write_bytes((shared / "llama" / f).read_bytes())
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    common = {"--data": shared / "data.jsonl", "--val-data": shared / "val.jsonl", "--batch-size": 4, "--max-length": 128}
    found = dry("--model", bare, *(x for pair in common.items() for x in pair))
    assert everything(tmp_path) == before
    said = capsys.readouterr().out
    assert "the largest step of" in said and f"predicted peak on cpu: {memory.human(found['peak'])} in tensors" in said
    assert all(f"{c:12}" in said for c, n in found["by_category"].items() if n)
    short = dry("--model", bare, *(x for pair in common.items() for x in pair), "--max-length", 72)
    assert short["peak"] < found["peak"]  # the longest rows are cut
    monkeypatch.undo()
    monkeypatch.setattr(ask, "Predictor", InProcess)
    ran = go("llama", steps=None)
    assert (ran["predicted_peak"], ran["predicted_by_category"]) == (found["peak"], found["by_category"])
    assert ran["measured_peak"] == found["peak"]
    again = train.main(TrainConfig(out=str(tmp_path / "run"), resume=True, dry_run=True))
    assert again["peak"] == found["peak"]


def test_dry_run_of_a_name_that_is_not_here_on_a_card_that_is_not_here(tmp_path, offline, monkeypatch, capsys, in_process):
    monkeypatch.chdir(tmp_path)
    found = dry("--model", "smollm2-135m", "--device", "cuda", "--amp", "--batch-size", 2, "--max-length", 100)
    said = capsys.readouterr().out
    assert "steps of 2 x 1 examples of 100 tokens, all learned (smollm2-135m's tokenizer is not on this machine" in said
    peak, reserved = memory.human(found["peak"]), memory.human(found["reserved"])
    assert f"predicted peak on cuda: {peak} allocated, {reserved} reserved" in said
    assert f"smollm2-135m: {134_515_008 + found['params']['trainable']:,} parameters" in said
    assert found["by_category"]["weights"] == 2 * 134_515_008 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("words,wanted", [
    ("--model gpt5", "--model gpt5: no such folder, and no short name"), ("--model org/missing", "org/missing is not on"),
    ("--device tpu", "--device tpu: only"), ("--device cuda:x", "--device cuda:x: only"),
    ("--compile", "--dry-run cannot predict --compile"),
    ("--data none.jsonl", "none.jsonl"), ("--model llama-13b --data none.jsonl", "none.jsonl"),
    ("--model llama-7b --max-length 4096", "--max-length 4096: llama-7b has 2048 positions"),
    ("--model gpt2 --ckpt-every 13", "--ckpt-every 13")])
def test_dry_run_says_in_a_line_what_is_wrong(words, wanted, offline):
    with pytest.raises(UserError, match=wanted) as e:
        dry(*words.split())
    assert "\n" not in str(e.value)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak")
def test_llama_13b_on_any_laptop(tmp_path):
    """It takes less than 1 GB and 15 seconds of CPU time, the prediction's process included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    code = ("import runpy, sys\nsys.argv = ['train.py', *sys.argv[1:]]\nrunpy.run_path('train.py', run_name='__main__')\n"
            "import resource\n"
            "print(*[x for x in open('/proc/self/status') if x.startswith('VmHWM')])  # (ru_maxrss: the parent's too)\n"
            "print('child:', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    args = "--model llama-13b --bits 4 --amp --ckpt-every 1 --batch-size 1 --dry-run --device cuda".split()
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    here, child = (int(done.stdout.split(name)[1].split()[0]) * 1024 for name in ("VmHWM:", "child:"))
    assert here + child < 1e9 and seconds < 15, (seconds, done.stdout)
    assert "llama-13b: 13,022,417,920 parameters in 7.23 GB" in done.stdout and "predicted peak on cuda: 7." in done.stdout


# ---------------------------------------------------------------------------------------------- the child

def test_a_child_says_the_same(shared, in_child, go):
    """A child process predicts the same as this process, and answers again after an error."""
    child = ask.Predictor().ask(TrainConfig(model="gpt2-nano", device="cpu"), [[[("x", 1)]]])
    found = go("phi", "child", amp=True, lora_dropout=0.1)
    assert found["predicted_peak"] == pytest.approx(found["measured_peak"], rel=0.02)
    cfg = train.resolve(options("unused", shared / "phi", shared / "data.jsonl", amp=True, batch_size=4, steps=3,
                                lora_dropout=0.1, val_data=str(shared / "val.jsonl")))
    sizes, _, cfg = ask.largest_steps(cfg)
    here = predicted(cfg, sizes)
    assert (here["peak"], here["by_category"]) == (found["predicted_peak"], found["predicted_by_category"])
    error = child.answer()
    assert error.keys() == {"error"} and "TypeError" in error["error"] and "\n" not in error["error"]
    for _ in range(2):  # the same answer, whatever it was asked before
        assert child.ask(cfg, sizes).answer() == here
        nf4 = dataclasses.replace(cfg, bits=4, optimizer="paged_adamw8bit", lora_r=32)
        assert child.ask(nf4, sizes).answer() == predicted(nf4, sizes) != here
    child.close()
    assert child.process.returncode == 0


def test_training_goes_on_without_its_answer(in_child, go, monkeypatch, capsys, tmp_path):
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\nkill -9 $$\n")
    dead.chmod(0o755)
    with monkeypatch.context() as m:
        m.setattr(sys, "executable", str(dead))
        found = go("gpt2")
    said = capsys.readouterr().out
    assert "the peak is not predicted: the process ended with status -9" in said and "not measured predicted" not in said
    assert found["predicted_peak"] is None is found["predicted_by_category"] and found["measured_peak"] > 0


def test_with_compile_nothing_is_predicted(shared, tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise AssertionError("asked")

    monkeypatch.setattr(ask, "Predictor", refuse)
    monkeypatch.setattr("run.options.check_compiler", lambda device: None)  # nothing is compiled
    monkeypatch.setattr(train, "train", lambda *args: {"predictor": args[-1]})
    cfg = options(tmp_path / "run", shared / "gpt2", shared / "data.jsonl", compile=True, steps=2)
    assert train.main(cfg) == {"predictor": None}
    assert ask.collect(None)["peak"] is None and "--compile" in capsys.readouterr().out


def test_a_prediction_leaves_the_process_as_it_was(shared, tmp_path, monkeypatch, on_device, go):
    cfg = options("unused", shared / "gpt2", shared / "data.jsonl", amp=True, bits=4, optimizer="adamw8bit", lora_r=32,
                  lora_dropout=0.1, ckpt_every=1, lora_targets="all", val_data=str(shared / "val.jsonl"))
    sizes, _, cfg = ask.largest_steps(train.resolve(cfg))
    device = on_device()
    device.room(("kept",), 1, torch.ones)
    optim.tables.cache_clear()
    rng, threads, hollow_before = torch.get_rng_state(), torch.get_num_threads(), set(hollow.HOLLOW)
    torch.set_num_threads(2)
    try:
        predicted(cfg, sizes)
        assert torch.get_num_threads() == 2
        with pytest.raises(TypeError):
            predicted(cfg, [[[("x", 1)]]])
        with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
            m.setattr(train, "train_step", lambda *args: 1 / 0)
            predicted(cfg, sizes)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), rng)
    gc.collect()
    rooms, hollow_now = list(device.rooms), set(hollow.HOLLOW)
    assert rooms == [("kept",)]  # names only: pytest could not print tensors without memory
    assert hollow_now <= hollow_before
    assert device_of("cpu") is device and device.host == "cpu" and device.pieces is device.nf4_kernel is None
    for signed in (True, False):  # these tables are cached for ever, so they must hold real numbers
        kept, fresh = (f(signed, torch.device("cpu")) for f in (optim.tables, optim.tables.__wrapped__))
        assert all(torch.equal(a, b) for a, b in zip(kept, fresh, strict=True))
    for how in ("with", "without"):
        if how == "with":
            monkeypatch.setattr(ask, "Predictor", InProcess)
        else:
            monkeypatch.setattr(ask, "Predictor", NoPredictor)
        go("gpt2", how, amp=True, lora_dropout=0.3, batch_size=8, steps=4)
    assert timeless(steps(tmp_path / "with")) == timeless(steps(tmp_path / "without"))


# ---------------------------------------------------------------------------------------------- tensors without memory

def test_hollow_tensors():
    real = torch.arange(6.0).view(2, 3)
    gc.collect()
    before = set(hollow.HOLLOW)
    with hollow.Hollow():
        t = hollow.hollow((1000, 1000, 1000), torch.bfloat16)  # 2 GB
        assert t.untyped_storage().nbytes() == 2e9 and hollow.is_hollow(t[1:3].transpose(0, 1))
        y = (t[0].float() @ t[1].float().t()).softmax(-1)
        assert y.shape == (1000, 1000) and y.dtype == torch.float32 and hollow.is_hollow(y)
        assert y.sum().item() == 1 and torch.isfinite(y).all()
        assert y.add_(1) is y and hollow.is_hollow(y)
        assert not hollow.is_hollow(real * 2) and (real * 2).tolist() == [[0, 2, 4], [6, 8, 10]]
        assert hollow.is_hollow(torch.zeros(2**20)) and torch.zeros(8).tolist() == [0] * 8
        w = hollow.hollow((3, 4), torch.float32).requires_grad_()
        (hollow.hollow((2, 3), torch.float32) @ w).sum().backward()
        assert w.grad.shape == (3, 4) and hollow.is_hollow(w.grad)
    for use in (t.tolist, t.untyped_storage().data_ptr, y.float().tolist):
        with pytest.raises(RuntimeError):  # "unallocated storage", instead of any bytes in memory
            use()
    del t, y, w, use
    gc.collect()
    assert set(hollow.HOLLOW) == before


# ---------------------------------------------------------------------------------------------- a GPU's allocator

def blocks_of(block) -> list:
    while block.before:
        block = block.before
    found = [block]
    while found[-1].after:
        found.append(found[-1].after)
    return found


def test_the_allocators_rules_by_hand():
    c = CachingAllocator()
    a, small = c.allocate(1)  # rounded up to 512 bytes, cut from a slab of 2 MiB
    assert small and (c.allocated, c.reserved) == (512, 2 * MiB) and [b.size for b in blocks_of(a)] == [512, 2 * MiB - 512]
    b, _ = c.allocate(513)
    assert (c.allocated, c.reserved) == (3 * 512, 2 * MiB)
    d, small = c.allocate(MiB)
    assert small and c.reserved == 2 * MiB
    large, small = c.allocate(MiB + 1)  # from a new slab of 20 MiB
    assert not small and large.size == MiB + 512 and c.reserved == 22 * MiB
    huge, _ = c.allocate(19 * MiB)  # the rest of the slab is too small: a new one, rounded up to 2 MiB
    assert c.reserved == 42 * MiB and huge.size == 20 * MiB  # the 1 MiB that is left over stays in the block
    other, _ = c.allocate(18 * MiB - 512)  # fits into the rest, 19 MiB - 512; the 1 MiB that is left stays in the block
    assert c.reserved == 42 * MiB and other.size == 19 * MiB - 512
    assert c.allocated == 3 * 512 + MiB + (MiB + 512) + 20 * MiB + 19 * MiB - 512
    peak = c.allocated
    for block in (huge, other, large):
        c.release(block, False)
    assert c.reserved == 42 * MiB and c.allocated_peak == peak and c.allocated == 3 * 512 + MiB
    again, _ = c.allocate(10 * MiB)  # from a free slab of 20 MiB; a new slab would be rounded up to 10 MiB
    assert c.reserved == 42 * MiB and again.size == 10 * MiB
    for n, wanted in ((10 * MiB - 512, 20 * MiB), (10 * MiB, 10 * MiB), (11 * MiB, 12 * MiB), (MiB, 2 * MiB)):
        fresh = CachingAllocator()
        fresh.allocate(n)
        assert fresh.reserved == wanted, n
    assert (a.size, b.size, d.size) == (512, 1024, MiB)


def test_the_smallest_free_block_serves_and_neighbours_join():
    c = CachingAllocator()
    blocks = [c.allocate(n * MiB)[0] for n in (4, 2, 3, 2, 8)]  # from one slab of 20 MiB; the last also has the rest, 1 MiB
    assert c.reserved == 20 * MiB and blocks[4].size == 9 * MiB
    c.release(blocks[0], False)
    c.release(blocks[2], False)
    assert c.allocate(3 * MiB)[0] is blocks[2]  # the smallest that fits, although the 4 MiB have been free for longer
    c.release(blocks[2], False)
    c.release(blocks[1], False)  # joins the free blocks on both sides
    assert [b.size // MiB for b in blocks_of(blocks[4])] == [9, 2, 9] and len(c.pools[False]) == 1
    whole, _ = c.allocate(9 * MiB)
    assert c.reserved == 20 * MiB and whole.size == 9 * MiB
    for b in (whole, blocks[3], blocks[4]):
        c.release(b, False)
    assert [(n // MiB) for n, *_ in c.pools[False]] == [20] and c.allocated == 0 and c.reserved == 20 * MiB


def test_the_docstrings_example():
    c = CachingAllocator()
    for _ in range(3):
        c.allocate(7 * MiB)
    assert (c.allocated, c.reserved) == (21 * MiB, 40 * MiB)
    replayed = allocator.replay([0, 1, 2, 3, -2, -1, -3, -4], [7 * MiB, 7 * MiB, 7 * MiB, 0])  # 0 bytes take no block
    assert (replayed.allocated, replayed.allocated_peak, replayed.reserved) == (0, 21 * MiB, 40 * MiB)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_never_overlap(seed):
    """The blocks of a slab fill it without gaps. The free ones are those in the pools, and no two of them are neighbours."""
    rng, c, live = random.Random(seed), CachingAllocator(), []
    segments = set()
    for n in range(600):
        if live and rng.random() < 0.45:
            c.release(*live.pop(rng.randrange(len(live)))[:2])
        else:
            size = int(2 ** rng.uniform(0, 25))
            block, small = c.allocate(size)
            assert size <= block.size and not block.free and small == (size <= MiB)
            assert block.size - size < (1024 if small else MiB + 513)
            live.append((block, small))
        if n % 20 == 0:
            segments = {id(first): first for first in [blocks_of(b)[0] for b, _ in live] +
                        [blocks_of(entry[2])[0] for pool in c.pools.values() for entry in pool]}.values()
            blocks = [b for first in segments for b in blocks_of(first)]
            assert len({id(b) for b in blocks}) == len(blocks)
            assert sum(b.size for b in blocks) == c.reserved >= c.allocated == sum(b.size for b, _ in live)
            assert {id(b) for b in blocks if not b.free} == {id(b) for b, _ in live}
            assert {id(b) for b in blocks if b.free} == {id(e[2]) for pool in c.pools.values() for e in pool}
            assert all(e[0] == e[2].size for pool in c.pools.values() for e in pool)
            assert not any(b.free and b.after and b.after.free for b in blocks)
            assert all(b.after is None or b.after.before is b for b in blocks)
    assert len(segments) > 5 and c.allocated_peak <= c.reserved


# ---------------------------------------------------------------------------------------------- what fits

@pytest.mark.parametrize("text,wanted", [("8GB", 8e9), ("8 gb", 8e9), ("7.5GiB", 7.5 * 2**30), ("24000MB", 24e9),
                                         ("512", 512), ("1TB", 1e12), (" 16 MiB ", 2**24)])
def test_sizes(text, wanted):
    assert fit.parse_size(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "8 apples", "0GB", "1.2.3GB", "-8GB", ".", "8GBs", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="write a size such as 8GB"):
        fit.parse_size(text)


def rungs(**given) -> list[str]:
    return [fit.flags(toggles) for toggles in fit.savings(TrainConfig(model="gpt2", **given))]


def test_the_rungs():
    """Options in the order of what they cost. Options from the command line are not changed."""
    assert rungs(batch_size=8) == ["--amp", "--batch-size 4 --grad-accum 2", "--batch-size 2 --grad-accum 4",
                                   "--batch-size 1 --grad-accum 8", "--ckpt-every 2", "--ckpt-every 1", "--ckpt-offload",
                                   "--bits 8", "--bits 4", "--optimizer adamw8bit", "--optimizer paged_adamw8bit"]
    assert rungs(batch_size=1, amp=True, bits=4, optimizer="adamw8bit", ckpt_every=3) == []
    assert rungs(batch_size=1, amp=True, bits=8, ckpt_every=1) == ["--ckpt-offload", "--optimizer adamw8bit",
                                                                   "--optimizer paged_adamw8bit"]
    assert rungs(batch_size=2, grad_accum=3, full=True, amp=True, ckpt_every=2) == [
        "--ckpt-every 1", "--ckpt-offload", "--optimizer adamw8bit", "--optimizer paged_adamw8bit",
        "--optimizer offload_adamw"]
    assert "--batch-size 3 --grad-accum 2" in rungs(batch_size=6)


def cost(cfg) -> int:
    """An invented peak: a model of 40 and activations of 10 for each example."""
    held = {32: 40, 16: 20, 8: 10, 4: 5}[cfg.bits or (16 if cfg.amp else 32)]
    return held + cfg.batch_size * {0: 10, 2: 6, 1: 2}[cfg.ckpt_every] // (2 if cfg.ckpt_offload else 1)


def found(card, **given):
    tried, best = fit.search(TrainConfig(model="gpt2", batch_size=4, **given), lambda cfg: card - cost(cfg))
    return [text for text, *_ in tried], best and (best.amp, best.batch_size, best.grad_accum, best.ckpt_every,
                                                   best.ckpt_offload, best.bits)


def test_the_search():
    assert found(80) == (["as it is"], (False, 4, 1, 0, False, None))
    assert found(60) == (["as it is", "+ --amp"], (True, 4, 1, 0, False, None))
    down = ["as it is", "+ --amp", "+ --batch-size 2 --grad-accum 2", "+ --batch-size 1 --grad-accum 4", "+ --ckpt-every 2"]
    # 26 fits; two examples at once would be 32.
    assert found(27) == ([*down, "back: nothing recomputed", "back: --batch-size 2 --grad-accum 2"],
                         (True, 1, 4, 2, False, None))
    # 8 bits save more than is needed: it still fits without offload, then with every other layer recomputed, then with none.
    words, best = found(20)
    assert words[:8] == [*down, "+ --ckpt-every 1", "+ --ckpt-offload", "+ --bits 8"] and best == (True, 1, 4, 0, False, 8)
    assert words[8:] == ["back: --ckpt-every 1", "back: --ckpt-every 2", "back: nothing recomputed",
                         "back: --batch-size 2 --grad-accum 2"]
    words, best = found(3)
    assert best is None and words[-1] == "+ --optimizer paged_adamw8bit" and not any(w.startswith("back") for w in words)
    # Options from the command line are not removed.
    assert found(20, ckpt_every=1, amp=True)[1][3] == 1 and found(20, ckpt_every=2, amp=True)[1][3] == 2


def test_the_command_is_the_configuration_that_was_predicted(shared, monkeypatch, capsys, on_device):
    """The printed command gives the predicted configuration. If nothing fits, the error is one line."""
    seen = {}

    def fake(cfg, raw_config, sizes, machine, tasks):
        need = int(1e6 * cost(cfg))
        seen[need] = cfg
        return {"peak": need, "reserved": need, "by_category": {}, "params": {}}

    monkeypatch.setattr(predict, "predict", fake)
    monkeypatch.setattr(ask, "Predictor", InProcess)
    reads, read_data = [], prepare.read_data
    monkeypatch.setattr(prepare, "read_data", lambda cfg: reads.append(cfg) or read_data(cfg))
    argv = ["--model", str(shared / "llama"), "--batch-size", "4", "--lora-r", "4", "--data", str(shared / "data.jsonl"),
            "--val-data", str(shared / "val.jsonl")]
    train.main(train.parse(["--fit", "527MB", *argv]))  # 500 are CUDA's own
    said = capsys.readouterr().out
    assert len(reads) == 1 < len(seen)  # the data, however many configurations are tried
    assert "this command leaves 1.00 MB free, beside the 500.00 MB for CUDA:" in said
    words = said.strip().splitlines()[-1].split()
    assert words[:2] == ["python", "train.py"] and "526.00 MB  fits" in said
    cfg = ask.largest_steps(train.resolve(dataclasses.replace(train.parse(words[2:]), dry_run=True, device="cuda")))[2]
    assert cfg == seen[26_000_000] and (cfg.amp, cfg.batch_size, cfg.grad_accum, cfg.ckpt_every) == (True, 1, 4, 2)
    on_device(products=torch.float32)  # it multiplies faster in float32: --amp only where memory asks for it
    train.main(train.parse(["--fit", "80MB", "--device", "cpu", *argv]))
    said = capsys.readouterr().out
    assert "as it is" in said and "--amp" not in said and " free:" in said, said
    with pytest.raises(UserError, match="--device nonsense: only cpu"):
        train.main(train.parse(["--fit", "8GB", *argv, "--device", "nonsense"]))
    wanted = r"nothing fits into 501MB. The least is 506.00 MB, for python train.py .*--bits 4"
    with pytest.raises(UserError, match=wanted) as e:
        train.main(train.parse(["--fit", "501MB", *argv]))
    assert "\n" not in str(e.value)


def test_train_py_fit(capsys, in_child):
    words = "--model gpt2 --max-length 64 --batch-size 1 --lora-r 4"
    train.main(train.parse(f"--fit 3GB {words}".split()))
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "python train.py --model gpt2 --lora-r 4 --max-length 64 --amp --batch-size 1"
    assert "+ --amp" in said and "as it is" not in said and "fits" in said  # a GPU multiplies faster in 16 bit
    words += " --amp --ckpt-every 1 --ckpt-offload --optimizer paged_adamw8bit --bits 4"  # no option is left to add
    done = subprocess.run([sys.executable, "train.py", "--fit", "550MB", *words.split()], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 1 and "as it is" in done.stdout and "too large" in done.stdout, done
    assert done.stderr.startswith("error: nothing fits into 550MB") and done.stderr.count("\n") == 1
