"""Arithmetic by what the machine is good at: the choice, weights in few bits multiplied in float32, what a run says."""
import json
from pathlib import Path

import pytest
import torch
from conftest import make_data, make_folder
from runs import lines, no_picture, run, timeless
from test_loss import Largest

import generate
import lora
import memory
import train
from files import weights
from techniques import device, half, loss, quant
from techniques.device import Device, compute_dtype, device_of

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FAMILIES = ["gpt2", "llama", "phi"]
IDS = torch.tensor([[5, 17, 301, 4000, 8, 9, 10, 11], [3, 2, 1, 900, 901, 902, 77, 78]])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    for family in FAMILIES:
        make_folder(folder / family, family)
    make_data(folder / "data.jsonl", 24)
    make_data(folder / "val.jsonl", 4)
    return folder


# ---------------------------------------------------------------------------------------------- the choice

@pytest.mark.parametrize("half_speed,wanted", [(200.0, BF16), (84.0, BF16), (83.0, F32), (5.0, F32)])
def test_the_faster_type_is_chosen(half_speed, wanted, monkeypatch):
    monkeypatch.setattr(device, "measure", lambda device, dtypes: dict(zip(dtypes, (half_speed, 100.0))))
    products, why = device.faster_type(torch.device("cpu"), BF16)
    assert products == wanted
    assert why == f"one core of this CPU multiplies bfloat16 at {half_speed:.0f} GFLOP/s and float32 at 100 GFLOP/s"


def test_a_measurement_that_fails_falls_back_and_says_so(monkeypatch):
    def fails(device, dtypes):
        raise RuntimeError("no such kernel\nand more")
    monkeypatch.setattr(device, "measure", fails)
    monkeypatch.setattr(device, "DEVICES", {})
    found = device_of("cpu")
    assert found.products == F32 and found.why == "products in bfloat16 could not be measured on cpu (no such kernel)"


def test_this_machine_is_measured_once(monkeypatch):
    calls, measure = [], device.measure
    monkeypatch.setattr(device, "measure", lambda *args: calls.append(1) or measure(*args))
    monkeypatch.setattr(device, "DEVICES", {})
    threads = torch.get_num_threads()
    for _ in range(3):
        found = device_of("cpu")
    speeds = [float(x.replace(",", "")) for x in found.why.split() if x.replace(",", "").isdigit()]
    assert len(calls) == 1 and torch.get_num_threads() == threads and found.half == BF16 and speeds[1] > 0
    assert found.products in (BF16, F32) and found.type == "cpu"


def test_a_gpu_that_is_not_here_has_the_usual_answers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "DEVICES", {})
    usual = Device("cuda", nf4_kernel=device.hollow_nf4)
    assert device_of("cuda") == device_of("cuda:0") == usual and usual.products == BF16


@pytest.mark.parametrize("answers", [{"half": F32}, {"half": BF16, "products": F16}, {"products": torch.float64}])
def test_a_device_told_nonsense(answers):
    with pytest.raises(ValueError, match="must be bfloat16 or float16, and products"):
        Device("cpu", **answers)


def test_amp_without_16_bit_products_is_no_autocast(on_device):
    on_device(products=F32)
    with device.autocast("cpu", True):
        assert not torch.is_autocast_enabled("cpu") and compute_dtype("cpu", True) == F32
    on_device(products=BF16)
    with device.autocast("cpu", True):
        assert torch.get_autocast_dtype("cpu") == BF16 and torch.is_autocast_enabled("cpu")
    assert compute_dtype("cpu", False) == F32


# ---------------------------------------------------------------------------------------------- held in few bits

def rounded_twin(held, folder):
    """The model in float32, each weight as `held` has it after rounding."""
    twin = weights.load(str(folder), bits=32)
    modules = dict(held.named_modules())
    with torch.no_grad():
        for n, p in twin.named_parameters():
            layer = modules[n.rpartition(".")[0]]
            if isinstance(layer, quant.FrozenLinear) and n.endswith("weight"):
                W = layer.dequantize()
                p.copy_(W.t() if layer.fan_in_fan_out else W)
            else:
                p.copy_(held.get_parameter(n).float())
    return twin


def logits_and_gradients(model, targets, ckpt_every=0):
    torch.manual_seed(0)
    lora.inject(model, r=2, targets=targets)
    with torch.no_grad():
        for m in lora.adapters(model).values():
            for B in m.lora_B:
                B.normal_(0, 0.05)
    model.ckpt_every = ckpt_every
    value = loss.sum_loss(model.hidden(IDS), model.head, IDS)
    value.backward()
    with torch.no_grad():
        return [value.detach(), model(IDS), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_held_in_few_bits_it_is_the_float32_model_of_the_rounded_weights(family, bits, shared, monkeypatch):
    """Values and gradients, to the rounding of float32: nothing is multiplied in 16 bit. In chunks of 3 rows of W.

    A sum of 4,096 products in another order is off by some sqrt(4096) 2^-24 = 2^-18 of its size, and a gradient passes eight
    such sums from the head to the first layer: 2^-15. One rounding to bfloat16 would be 2^-9.
    """
    monkeypatch.setattr(half, "CHUNK", 100)
    held = weights.load(str(shared / family), bits, compute_dtype=F32)
    wanted = logits_and_gradients(rounded_twin(held, shared / family), "all")
    for ckpt_every in (0, 1):
        held = weights.load(str(shared / family), bits, compute_dtype=F32)
        got = logits_and_gradients(held, "all", ckpt_every)
        assert held.hidden(IDS).dtype == F32
        for a, b in zip(got, wanted, strict=True):
            assert (a - b).abs().max() < 2**-15 * b.abs().max()


def test_what_is_held_and_how(shared):
    """2 bytes a weight; norms and biases 4; a tied head stays tied."""
    for family in FAMILIES:
        model = weights.load(str(shared / family), 16, compute_dtype=F32)
        for n, p in model.named_parameters():
            assert p.dtype == (F32 if p.dim() < 2 else BF16), n
        assert model.config.tied_head == any(m.weight is model.head.weight for m in model.modules()
                                             if isinstance(m, torch.nn.Embedding))
        plain = memory.count(weights.load(str(shared / family), 32))
        assert memory.count(model)["total"] == plain["total"] and memory.count(model)["bytes"] < 0.53 * plain["bytes"]


def test_the_head_is_converted_in_chunks(shared, monkeypatch):
    """4,096 x 32 weights of the head, 256 rows at a time: neither the loss nor a reply makes a second copy of it."""
    monkeypatch.setattr(half, "CHUNK", 256 * 32)
    model = weights.load(str(shared / "llama"), 16, compute_dtype=F32).requires_grad_(False)
    hidden = model.hidden(IDS).requires_grad_()
    with Largest() as largest:
        loss.sum_loss(hidden, model.head, IDS, chunk=16).backward()
    assert largest.numel == 16 * 4096  # a chunk of logits, half of the head
    with Largest() as largest:
        model.head(hidden[:1, -1])
    assert largest.numel <= 256 * 32
    with Largest() as largest:
        half.times(torch.ones(1, 4096), model.head.weight.float())  # this test would notice a copy
    assert largest.numel == 4096 * 32


def test_a_cache_and_a_reply_in_float32(shared, on_device):
    """generate.py takes the faster type by itself."""
    for products in (F32, BF16):
        on_device(products=products)
        model = weights.load(str(shared / "llama"), 16)
        cache = generate.KVCache(model.config, 16)
        with torch.no_grad():
            assert model.hidden(IDS[:1], cache=cache).dtype == products == cache.k[0].dtype
        assert len(generate.generate(model, [5, 6, 7], max_new_tokens=4)) == 7


# ---------------------------------------------------------------------------------------------- whole runs

@pytest.fixture
def go(shared, tmp_path, monkeypatch):
    no_picture(monkeypatch)

    def train_it(name, family="gpt2", **more):
        more = {"val_data": str(shared / "val.jsonl"), "steps": 4, "batch_size": 4, "lora_dropout": 0.1, **more}
        run(tmp_path / name, shared / family, shared / "data.jsonl", **more)
        return timeless(lines(tmp_path / name))
    return train_it


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_bits_and_amp_are_independent(family, bits, go, on_device):
    """--bits B alone multiplies in float32 everywhere; --amp does so where 16 bit is slow: the same run bit for bit."""
    fast = go("bits", family, bits=bits)
    on_device(products=F32)
    assert go("slow amp", family, bits=bits, amp=True) == fast == go("slow bits", family, bits=bits)
    full = go("float32", family)
    assert [x["loss"] for x in fast[1:5]] == pytest.approx([x["loss"] for x in full[1:5]], rel=0.05)


def test_the_run_says_what_it_chose(go, on_device, tmp_path, capsys):
    on_device(products=F32, why="this CPU is slow")
    go("run", amp=True)
    assert "this CPU is slow: weights are held in bfloat16, products run in float32" in capsys.readouterr().out
    for file in ("config.json", "summary.json"):
        assert json.loads((tmp_path / "run" / file).read_text())["arithmetic"] == {
            "weights": "bfloat16", "products": "float32", "why": "this CPU is slow"}
    go("plain")
    assert "held in" not in capsys.readouterr().out
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["arithmetic"]["products"] == "float32"


def test_a_run_that_continues_on_another_machine_says_so(go, on_device, tmp_path, capsys, monkeypatch):
    step, calls = train.train_step, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    def half(products):
        return F16 if products == F16 else BF16

    for n, (before, now) in enumerate([(BF16, F32), (BF16, BF16), (BF16, F16), (F16, BF16)]):  # only float16 has a scaler
        calls.clear()
        on_device(products=before, half=half(before))
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(train, "train_step", stop)
            go(f"run{n}", amp=True, save_every=2)
        on_device(products=now, half=half(now), why="another CPU")
        train.main(train.TrainConfig(out=str(Path(tmp_path) / f"run{n}"), resume=True))
        said = capsys.readouterr().out
        change = f"ran in {device.type_name(before)} until here, now run in {device.type_name(now)} (another CPU)"
        assert (f"its products {change}" in said) == (before != now)
        assert (tmp_path / f"run{n}" / "summary.json").is_file()


def test_full_with_an_offloaded_optimizer_holds_float32(go, on_device, tmp_path):
    on_device(products=F32)
    go("full", full=True, amp=True, optimizer="offload_adamw", lora_dropout=0.0)
    assert json.loads((tmp_path / "full" / "config.json").read_text())["options"]["bits"] == 32
    with pytest.raises(train.UserError, match="--bits 16 with --full: products run in float32 here"):
        go("refused", full=True, amp=True, bits=16, optimizer="offload_adamw", lora_dropout=0.0)
