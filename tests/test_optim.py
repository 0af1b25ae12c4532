"""optim.py compared with torch.optim.AdamW and bitsandbytes' AdamW8bit; every optimizer in whole runs.

A name such as unsloth-zoo#962 is a GitHub issue: the bug that the test looks for, in another project.
"""
import json
import math
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, make_data, make_folder
from runs import lines, no_picture, run, steps, timeless
from safetensors.torch import load_file

import memory
import train
from errors import UserError
from files import weights
from run import options
from techniques import optim


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs(weight_decay):
    """50 steps with a changing learning rate. In a third of them the first tensor has no gradient."""
    start = [torch.randn(13, 9), torch.randn(5, 3, 2), torch.randn(7)]
    ours, fused, plain = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(3))

    def groups(params):
        return [{"params": params[:2], "weight_decay": weight_decay}, {"params": params[2:], "weight_decay": 0.0}]

    optimizers = [optim.AdamW(groups(ours), lr=1e-2), torch.optim.AdamW(groups(fused), lr=1e-2, fused=True),
                  torch.optim.AdamW(groups(plain), lr=1e-2, foreach=False)]
    for step in range(50):
        for i, same in enumerate(zip(ours, fused, plain, strict=True)):
            grad = torch.randn(start[i].shape) * 10 ** -i if step % 3 or i else None
            for p in same:
                p.grad = grad
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            o.step()
    for p, q, r in zip(ours, fused, plain, strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-7)
        state = optimizers[0].state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == optimizers[1].state[q]["step"]
        assert sum(t.nbytes for t in state.values()) == 8 * p.numel() + 4
    optimizers[0].zero_grad()
    assert all(p.grad is None for p in ours)


# ---------------------------------------------------------------------------------------------- 8 bit

def bitsandbytes():
    """bitsandbytes' AdamW8bit with its own exact quantiser.

    Its compiled CPU quantiser (0.50.2) rounds to one of 65,536 equal steps from -1 to 1 before it looks up the code. So
    1e-6 becomes 2.1e-5, and so does zero: the bug of unsloth-zoo#962. Its CUDA kernel and its reference kernel for other
    devices search the code itself. The reference kernel is used here; the optimizer around it is the same.
    """
    bnb = pytest.importorskip("bitsandbytes")
    from bitsandbytes.backends.cpu import ops

    def exact(x, code, absmax, q, blocksize):
        kernel = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk
        for to, value in zip((q, absmax), kernel(torch._C.DispatchKey.CompositeExplicitAutograd, x, code, blocksize)):
            to.copy_(value)
    return bnb, ops, exact


SIZES = [(64, 128), (4095,), (16, 300), (96, 256), (5, 7)]  # 16 * 300 = 18.75 blocks; 4,095 and 35: 32-bit states


def parameters(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(0.1 * torch.randn(s, generator=rng)) for s in SIZES]


def gradients(n, scale=1e-2):
    """n steps of gradients whose size and mean differ from element to element."""
    rng = torch.Generator().manual_seed(1)
    sizes = [scale * torch.randn(s, generator=rng).exp() for s in SIZES]
    for _ in range(n):
        yield [(torch.randn(s.shape, generator=rng) + 0.5) * s for s in sizes]


def take(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    optimizer.step()


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_code_is_bitsandbytes(signed):
    F = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(optim.dynamic_code(signed), F.create_dynamic_map(signed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_finds_the_nearest_code(signed):
    """The same code as a search, at every bound between two codes, beside each bound, and for a million other numbers."""
    code = optim.dynamic_code(signed)
    bounds = (code[1:] + code[:-1]) / 2
    near = [torch.nextafter(bounds, torch.tensor(x)) for x in (-2.0, 2.0)]
    x = torch.cat([bounds, *near, code, torch.tensor([0.0, -0.0]), torch.randn(10**6).clamp(-1, 1) ** 7])
    x = x if signed else x.abs()
    x = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    x = torch.cat([torch.ones(len(x), 1), x], 1)  # the largest magnitude of each block is 1
    q, absmax = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    optim.quantize(x.clone(), q, absmax, signed)
    assert (absmax == 1).all() and torch.equal(q.int(), torch.bucketize(x, bounds, out_int32=True))
    assert torch.equal(optim.dequantize(q, absmax, signed), code[q.long()])
    assert (q.unique().numel() == 256) or signed and q.unique().numel() == 255 and q.min() == 0


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1.0, 1e30])
def test_blocks_of_any_size(scale):
    """A block of zeros stays zeros. A block below the smallest normal number loses precision, but gives no nan."""
    x = scale * torch.randn(8, 256)
    q, absmax = torch.empty(8, 256, dtype=torch.uint8), torch.empty(8, 1)
    optim.quantize(x.clone(), q, absmax, True)
    back = optim.dequantize(q, absmax, True)
    assert (back - x).abs().max() <= 0.02 * x.abs().max() + 1e-39 and (x != 0).any() == (scale > 0)


def test_adamw8bit_follows_bitsandbytes(monkeypatch):
    """100 steps with a changing learning rate and weight decay; the last block of some tensors is not full."""
    bnb, ops, exact = bitsandbytes()
    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", exact)
    ours, theirs = parameters(), parameters()
    a, b = optim.AdamW8bit([{"params": ours, "weight_decay": 0.01}], lr=1e-3), bnb.optim.AdamW8bit(theirs, weight_decay=0.01)
    for step, grads in enumerate(gradients(100)):
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] = 1e-3 / (1 + step / 50)
        for optimizer, params in ((a, ours), (b, theirs)):
            take(optimizer, params, grads)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
        if p.numel() >= optim.MIN_8BIT:
            for name, key in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
                same = a.state[p][name].view(-1)[:p.numel()].view(p.shape) == b.state[q][key]
                assert same.float().mean() > 0.9999
        else:
            assert a.state[p]["exp_avg"].dtype == torch.float32 == b.state[q]["state1"].dtype


def test_adamw8bit_stays_near_32_bit():
    """The paper's error is a few per cent of each update. All gradients are of similar size, as in a row of a matrix."""
    ours, wanted = parameters(), parameters()
    optimizers = [(cls([{"params": p, "weight_decay": 0.0}], lr=1e-3), p)
                  for cls, p in ((optim.AdamW8bit, ours), (optim.AdamW, wanted))]
    rng = torch.Generator().manual_seed(2)
    for _ in range(100):
        grads = [1e-2 * (torch.randn(s, generator=rng) + 0.5) for s in SIZES]
        for o, params in optimizers:
            take(o, params, grads)
    for p, q, start in zip(ours, wanted, parameters(), strict=True):
        error, moved = (p - q).norm() / (q - start).norm(), (q - start).abs().mean()
        assert moved > 0.02 and error < 0.03 and (error > 1e-4 or p.numel() < optim.MIN_8BIT), (error, moved)


def test_zero_gradients_move_nothing():
    """unsloth-zoo#962: zero is a code. 500 steps with zero gradients, then 500 with zeros in half of each block."""
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = optim.AdamW8bit([{"params": params, "weight_decay": 0.0}], lr=1.0)
    for step in range(500):
        take(optimizer, params, [torch.zeros(s) for s in SIZES])
        assert step % 100 or all(torch.equal(p, s) for p, s in zip(params, start))
    half = [torch.arange(p.numel()).view(p.shape) % 2 == 0 for p in params]
    for _ in range(500):
        take(optimizer, params, [torch.randn(s) * h for s, h in zip(SIZES, half)])
    for p, s, h in zip(params, start, half, strict=True):
        assert torch.equal(p[~h], s[~h]) and not (p[h] == s[h]).any()


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.PagedAdamW8bit])
def test_bytes_of_8_bit_states(cls):
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((768, 768), (8, 576), (768,))]
    optimizer = cls([{"params": params, "weight_decay": 0.0}], lr=1e-3)
    take(optimizer, params, [torch.randn(p.shape) for p in params])
    for p, each in zip(params, (2 + 8 / 256, 2 + 8 / 256, 8), strict=True):
        assert sum(t.nbytes for t in optimizer.state[p].values()) == each * p.numel() + 4  # and the step count
    model = torch.nn.ParameterList(params)
    optimizer.zero_grad()
    with memory.Ledger(model, optimizer) as ledger:
        pass
    assert ledger.live["optimizer"] == (2 + 8 / 256) * (768 * 768 + 8 * 576) + 8 * 768 + 12


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.PagedAdamW8bit])
@pytest.mark.parametrize("chunk", [2**9, 2**13, 2**20])
def test_chunks_do_not_matter(cls, chunk, on_device):
    """The same bits with one matrix in many chunks, many in one chunk, and a tensor that sometimes has no gradient."""
    runs = {}
    for name, kind, size in (("wanted", optim.AdamW8bit, 2**16), ("got", cls, chunk)):
        on_device(optimizer_chunk=size)
        params = parameters()
        optimizer = kind([{"params": params, "weight_decay": 0.1}], lr=1e-3)
        for step, grads in enumerate(gradients(20)):
            take(optimizer, params, [None if i == 2 and step % 3 else g for i, g in enumerate(grads)])
        runs[name] = [p.detach() for p in params] + [t for p in params for t in optimizer.state[p].values()]
    assert all(torch.equal(a, b) for a, b in zip(*runs.values(), strict=True))


@pytest.mark.parametrize("cls,numbers", [(optim.AdamW8bit, 24), (optim.PagedAdamW8bit, 30)])
def test_temporaries_are_bounded_by_the_chunk(cls, numbers, on_device):
    """The peak of a step above what stays: about 24 bytes for each number of a chunk, however large the matrix. Paged: two
    chunks of states on the device are added."""
    on_device(optimizer_chunk=2**14)
    model = torch.nn.ParameterList([torch.randn(512, 1024)])
    optimizer = cls([{"params": list(model), "weight_decay": 0.0}], lr=1e-3)
    take(optimizer, list(model), [torch.randn(512, 1024)])
    with memory.Ledger(model, optimizer) as ledger:
        stays = sum(ledger.live.values())
        optimizer.step()
    assert 8 * 2**14 < ledger.peak - stays <= numbers * 2**14 < 2 * 512 * 1024


# ---------------------------------------------------------------------------------------------- offloaded

def offloaded(dtype, lr=1e-3):
    model = torch.nn.Linear(64, 16)
    return model, optim.OffloadAdamW([{"params": list(model.parameters()), "weight_decay": 0.1}], lr, "cpu", dtype)


def test_offload_in_float32_is_adamw():
    torch.manual_seed(0)
    model, optimizer = offloaded(torch.float32)
    twin = torch.nn.Linear(64, 16)
    twin.load_state_dict(model.state_dict())
    wanted = optim.AdamW([{"params": list(twin.parameters()), "weight_decay": 0.1}], lr=1e-3)
    for _ in range(10):
        for x in (torch.randn(4, 64), torch.randn(4, 64)):  # two micro-batches
            for m in (model, twin):
                m(x).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())  # moved to the host as soon as it was complete
        for p, q in zip(model.parameters(), twin.parameters()):
            assert torch.equal(optimizer.master(p).grad, q.grad)
        for o in (optimizer, wanted):
            o.step()
            o.zero_grad()
        assert optimizer.master(model.weight).grad is None
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q) and torch.equal(optimizer.master(p), q) and p is not optimizer.master(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_through_two_buffers(dtype, monkeypatch):
    """As on CUDA. A gradient is awaited only after the copy of the next one has begun, the last one when backward ends."""
    class Copied:
        def __init__(self):
            log.append("copy")

        def synchronize(self):
            log.append("wait")

    log, stream = [], types.SimpleNamespace(record_event=Copied)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    grads = []
    for staged in (False, True):
        torch.manual_seed(0)
        model, optimizer = offloaded(dtype)
        if staged:
            optimizer.staging = [torch.empty(64 * 16, dtype=dtype) for _ in range(2)]
        for x in (torch.randn(4, 64, dtype=dtype), torch.randn(4, 64, dtype=dtype)):  # two micro-batches
            model(x).square().mean().backward()
            assert optimizer.arriving is None and all(p.grad is None for p in model.parameters())
        grads.append([optimizer.master(p).grad for p in model.parameters()])
    assert log == 2 * ["copy", "copy", "wait", "wait"]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_arrive(dtype):
    """VersatIL#5: each step is far below half a unit in the last place of a 16-bit weight, but the master adds them up."""
    model, optimizer = offloaded(dtype, lr=1e-6)
    with torch.no_grad():
        for p in model.parameters():
            optimizer.master(p).fill_(0.5)
            p.fill_(0.5)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for step in range(2000 if dtype == torch.bfloat16 else 300):
        (model(torch.ones(2, 64, dtype=dtype))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 50:
            assert (model.weight == 0.5).all() and (optimizer.master(model.weight) < 0.5 - 4e-5).all()
    assert (model.weight < 0.5).all()
    for p in model.parameters():
        assert p.dtype == dtype and torch.equal(p, optimizer.master(p).to(dtype))


def test_gradients_of_micro_batches_add_up_in_float32():
    """In bfloat16, 1 + 2^-9 would be 1."""
    model, optimizer = offloaded(torch.bfloat16)
    for size in (1.0, 2.0**-9):
        (model(torch.full((1, 64), size, dtype=torch.bfloat16))).sum().backward()
    assert (optimizer.master(model.weight).grad == 1 + 2.0**-9).all()


def test_the_ledger_sees_masters():
    model, optimizer = offloaded(torch.bfloat16)
    n = 64 * 16 + 16
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    for _ in range(2):
        with memory.Ledger(model, optimizer) as ledger:
            model(x).sum().backward()
            assert ledger.live["weights"] == 2 * n and ledger.live["gradients"] == 4 * n
            optimizer.step()
            optimizer.zero_grad()
            assert ledger.live["gradients"] == 0
    assert ledger.live["optimizer"] == 12 * n + 8


# ---------------------------------------------------------------------------------------------- in a run

NAMES = list(optim.OPTIMIZERS)
MODES = {"lora": {"lora_targets": "all", "lora_r": 32, "lr": 1e-2}, "full": {"full": True, "lr": 1e-3}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    make_folder(folder / "gpt2", "gpt2")
    make_data(folder / "data.jsonl", 18)
    make_data(folder / "val.jsonl", 4)
    return folder


@pytest.fixture
def go(shared, tmp_path, monkeypatch, on_device):
    no_picture(monkeypatch)
    on_device(optimizer_chunk=2**13)

    def train_it(name, **more):
        return run(tmp_path / name, shared / "gpt2", shared / "data.jsonl", val_data=str(shared / "val.jsonl"), **more)
    return train_it


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_twenty_steps_are_ten_and_resume_and_ten(name, mode, half, go, tmp_path, monkeypatch, on_device):
    """nanoGPT#467: equal bit for bit, with AMP, accumulation, clipping and decay. In float16 the scaler skips steps."""
    on_device(half=half)
    if half == torch.float16:
        real = torch.amp.GradScaler.__init__
        monkeypatch.setattr(torch.amp.GradScaler, "__init__", lambda self, device, enabled:
                            real(self, device, init_scale=2.0**24, enabled=enabled))
    common = dict(MODES[mode], optimizer=name, amp=True, steps=20, batch_size=2, grad_accum=2, clip=0.5, weight_decay=0.1,
                  save_every=10, eval_every=10)
    whole, cls, calls = go("whole", **common), optim.OPTIMIZERS[name], []
    skipped = [not math.isfinite(x["grad_norm"]) for x in whole]
    assert any(skipped) == (half == torch.float16) and not any(skipped[10:])
    assert whole[-1]["loss"] < whole[0]["loss"]
    real_step = cls.step

    def step(self):
        calls.append(1)
        if len(calls) == 13 - sum(skipped):
            raise KeyboardInterrupt
        real_step(self)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(cls, "step", step)
        go("died", **common)
    assert steps(tmp_path / "died")[-1]["step"] == 12
    train.main(train.TrainConfig(out=str(tmp_path / "died"), resume=True))
    assert repr(timeless(lines(tmp_path / "died"))) == repr(timeless(lines(tmp_path / "whole")))  # repr: nan is not nan
    for file in ("state/state.safetensors", "model/model.safetensors" if mode == "full" else
                 "adapter/adapter_model.safetensors"):
        got, wanted = (load_file(tmp_path / run_ / file) for run_ in ("died", "whole"))
        assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted)


def test_a_run_holds_16_bit_weights_and_saves_their_masters(go, shared, tmp_path):
    """--full --amp --optimizer offload_adamw: 2 bytes a weight; model/ and state/ hold the float32 masters."""
    go("run", full=True, amp=True, optimizer="offload_adamw", lr=1e-5, steps=3)
    out = tmp_path / "run"
    summary = json.loads((out / "summary.json").read_text())
    n, split = summary["params"]["total"], summary["memory"]["by_category"]
    assert split["weights"] == 2 * n and split["optimizer"] == pytest.approx(12 * n, rel=1e-3)
    assert json.loads((out / "config.json").read_text())["options"]["bits"] == 16
    state = load_file(out / "state" / "state.safetensors")
    start = dict(weights.load(str(shared / "gpt2")).named_parameters())
    for name, p in weights.load(str(out / "model")).named_parameters():
        assert torch.equal(p, state[f"param/{name}"]) and p.dtype == torch.float32
        assert 0 < (p - start[name]).abs().max() < 4e-5  # steps that rounding to 16 bits would hide
    with pytest.raises(UserError, match="offload_adamw"):
        train.resolve(train.TrainConfig(full=True, amp=True, bits=16))
    for more, bits in (({"amp": True}, 16), ({"amp": True, "bits": 16}, 16), ({"amp": True, "bits": 32}, 32), ({}, 32)):
        cfg = train.resolve(train.TrainConfig(full=True, optimizer="offload_adamw", **more))
        assert options.resolve_bits(cfg, None) == bits


def test_training_does_not_import_pytorchs_compiler(shared, tmp_path):
    """It takes 72 MB and 2 seconds. Each of these would import it: torch.optim, a random start on "meta", a dispatch mode,
    torch.utils.checkpoint, autograd.grad, and a prediction in the same process. (Only the first run predicts.)"""
    code = ("import sys, train\nfrom ledger import ask\nfrom techniques.optim import OPTIMIZERS\nfor name in OPTIMIZERS:\n"
            "    done = train.main(train.parse([*sys.argv[1:], '--optimizer', name, '--out', sys.argv[2] + name]))\n"
            "    assert (done['memory']['predicted_peak'] is not None) == (name == 'adamw')\n"
            "    ask.start = lambda *_: None\n"
            "sys.exit(str([m for m in ('torch._dynamo', 'sympy') if m in sys.modules] or '') or None)")
    args = ["--out", tmp_path / "run-", "--steps", "3", "--amp", "--samples", "1", "--model", shared / "gpt2",
            "--data", shared / "data.jsonl", "--max-length", "128", "--bits", "8", "--ckpt-every", "2", "--ckpt-offload"]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
