"""What the code does on a GPU, checked without one. No number here was computed by a GPU.

Three stand-ins: FakeTensors on "cuda" (shapes and types, nothing is computed), a torch.cuda that tells of two GPUs, and a
CPU that is treated as a GPU (device.pretend).
"""
import collections
import contextlib
import copy
import dataclasses
import functools
import sys
import types

import pytest
import torch
from conftest import make_folder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import llama
import lora
import train
from files import weights
from ledger import ask, predict
from run import prepare, watch
from run.options import TrainConfig
from run.state import SEEN
from techniques import attention, device, lora_init, loss, optim, quant, recompute
from techniques.device import CPU, Device, device_of, pretend

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
T4, H100 = (7, 5), (9, 0)


@pytest.fixture
def two_gpus(monkeypatch):
    """torch.cuda tells of a T4 (cuda:0, the current GPU) and an H100. Yields a list of what was done."""
    current, done = [0], []

    @contextlib.contextmanager
    def inside(name):
        before, current[0] = current[0], torch.device(name).index
        yield
        current[0] = before

    def set_device(name):
        current[0] = torch.device(name).index

    for name, stands_in in {
            "is_available": lambda: True, "current_device": lambda: current[0], "device": inside, "set_device": set_device,
            "get_device_capability": lambda name=None: [T4, H100][current[0] if name is None else torch.device(name).index],
            }.items():
        monkeypatch.setattr(torch.cuda, name, stands_in)
    monkeypatch.setattr(device, "measure", lambda where, dtypes: done.append(("measure", where, current[0]))
                        or dict.fromkeys(dtypes, 100.0))
    monkeypatch.setattr(device, "triton_kernel", lambda where: done.append(("triton", where, current[0])))
    monkeypatch.setattr(device, "DEVICES", {})
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield done
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


# ---------------------------------------------------------------------------------------------- the device's answers

def test_each_gpu_is_asked_itself(two_gpus):
    """Triton starts its kernels on the current GPU, and torch.cuda's questions without a device are about it too."""
    new, old = device_of("cuda:1"), device_of("cuda")
    assert (old.half, old.flash, old.workspace) == (F16, False, 8_519_680) == (F16, False, Device("cuda").workspace)
    assert (new.half, new.flash, new.workspace) == (BF16, True, 2**25)
    assert two_gpus == [(what, torch.device("cuda", n), n) for n in (1, 0) for what in ("triton", "measure")]
    assert torch.cuda.current_device() == 0


def test_cudnns_attention_is_off(two_gpus):
    device_of("cuda:1")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_gpu_that_is_named_is_the_current_one(two_gpus, monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    for name, current in (("cuda:1", 1), ("cuda", 1), ("cpu", 1), ("cuda:0", 0)):
        assert device.usable_device(name) == name and torch.cuda.current_device() == current


def test_the_prediction_is_told_every_answer(two_gpus):
    """What changes the bytes in memory is part of the question, and the answers arrive as they were."""
    for name in ("cuda:0", "cuda:1", "cpu"):
        with pretend("cpu", Device("cpu", **CPU)):
            here, there = device_of(name), predict.predicted_device(name if name != "cpu" else None, ask.machine(name))
        for answer in ("type", "half", "products", "float32_backward", "flash", "workspace", *CPU):
            assert getattr(here, answer) == getattr(there, answer), (name, answer)
        assert there.nf4_kernel is here.nf4_kernel is None  # no Triton: quant.py's rooms are predicted
    usual = predict.predicted_device("cuda", {**ask.machine("cuda:1"), "nf4_kernel": True})
    assert usual.nf4_kernel is device.hollow_nf4 and usual.host == "meta"


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler.\nand more"), ImportError(), OSError("Python.h")])
def test_triton_that_does_not_compile_is_told_once(error, monkeypatch, capsys):
    def fails(*args):
        raise error
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "techniques.nf4_triton", types.SimpleNamespace(dequantize=fails))
    monkeypatch.setattr("techniques.nf4_triton", sys.modules["techniques.nf4_triton"], raising=False)
    assert device.triton_kernel(torch.device("cpu")) is None
    said = capsys.readouterr().err
    assert said.startswith("Triton does not run here (") and said.count("\n") == 1 and "gcc and Python.h" in said
    works = types.SimpleNamespace(dequantize=lambda packed, absmax, levels, out: out)
    monkeypatch.setitem(sys.modules, "techniques.nf4_triton", works)
    monkeypatch.setattr("techniques.nf4_triton", works, raising=False)
    assert device.triton_kernel(torch.device("cpu")) is works.dequantize and not capsys.readouterr().err
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert device.triton_kernel(torch.device("cpu")) is None and not capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- attention

@pytest.mark.parametrize("segments", [None, [5, 11]])
@pytest.mark.parametrize("dtype,flash,grouped", [(BF16, True, True), (F16, True, True), (F16, False, False),
                                                 (F32, True, False), (F32, False, False)])
def test_grouped_keys_reach_only_a_kernel_that_reads_them(dtype, flash, grouped, segments, monkeypatch):
    """Of PyTorch's kernels only FlashAttention takes fewer key heads, in 16 bit from Ampere on. For the others PyTorch would
    take the plain formula and store the T x T matrices: SmolLM2 in float16, 8 x 512 tokens, 4.69 GB instead of 2.16."""
    calls = []
    monkeypatch.setattr(attention, "scaled_dot_product_attention",
                        lambda q, k, v, mask=None, *, is_causal, enable_gqa:
                        calls.append((q.shape, k.shape, v.shape, enable_gqa)) or q)
    with FakeTensorMode(), torch.no_grad(), pretend("cuda", Device("cuda", flash=flash)):
        q, k, v = (torch.empty(1, heads, 16, 8, dtype=dtype, device="cuda") for heads in (6, 2, 2))
        attention.attend(q, k, v, segments)
        attention.attend(q, q, q, segments)
    wanted = [(1, heads, n, 8) for heads in (2 if grouped else 6, 6) for n in segments or [16]]
    assert [tuple(k) for _, k, _, _ in calls] == [tuple(v) for _, _, v, _ in calls] == wanted
    assert [gqa for *_, gqa in calls] == [grouped] * len(segments or [16]) + [False] * len(segments or [16])


@pytest.mark.parametrize("segments", [None, [5, 11]])
def test_expanded_heads_compute_the_same(segments, on_device):
    rng = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, heads, 16, 8, generator=rng, requires_grad=True) for heads in (6, 2, 2)]
    found = []
    for kind in ("cpu", "cuda"):
        on_device(type=kind, flash=False)
        y = attention.attend(*qkv, segments)
        found.append([y, *torch.autograd.grad((y * y.detach().cos()).sum(), qkv)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------- copies

def test_a_4_bit_product_copies_no_table(monkeypatch):
    """The 8-bit code of the absmax values stays on the GPU: a copy in each product would make the host wait, 640 times in a
    micro-batch of LLaMA-7B with recomputation."""
    linear = torch.nn.Linear(256, 64)
    layer = quant.quantize(linear, linear.weight.detach(), 4)
    monkeypatch.setattr(quant, "tables", functools.lru_cache(optim.tables.__wrapped__))
    for _ in range(3):
        layer.absmax32()
    assert quant.tables.cache_info()[:2] == (2, 1)  # hits, misses


class Event:
    def __init__(self, log, name):
        self.log, self.name = log, name


class Stream:
    """Writes down what it is asked to do."""

    def __init__(self, log, name):
        self.log, self.name, self.events = log, name, 0

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")

    def record_event(self):
        self.events += 1
        return Event(self.log, f"copy {self.events}")


def test_one_offloaded_tensor_waits_for_its_copy(monkeypatch):
    """x is released when the GPU has been told to wait for its copy: at the next copy, or when backward begins. Never more
    than one x waits, however far the host is ahead."""
    log = []
    now, copies = Stream(log, "now"), Stream(log, "copies")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: now)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(recompute, "copy_stream", lambda where: copies)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, device, pin_memory: empty_like(x, device=device))
    with FakeTensorMode(), torch.no_grad(), pretend("cuda", Device("cuda")) as gpu:
        first, second = (torch.empty(4, device="cuda") for _ in range(2))
        monkeypatch.setattr(type(first), "record_stream", lambda *args: log.append("record_stream"), raising=False)
        host = recompute.to_host(first)
        assert host.device.type == "cpu" and gpu.leaving[0] is first
        recompute.to_host(second)
        assert gpu.leaving[0] is second
        assert log == ["copies waits for now", "now waits for copy 1", "copies waits for now"]
        assert recompute.to_device(host, first.device).is_cuda and gpu.leaving is None
        assert log[3:] == ["now waits for copies"]
    with pretend("cpu", Device("cuda", host="meta")) as gpu:  # the same in a prediction
        x = torch.empty(4)
        assert recompute.to_host(x).is_meta and gpu.leaving is x


def test_an_evaluations_memory_is_not_the_steps(monkeypatch, tmp_path):
    """Before a step is followed, what an evaluation has left in PyTorch's cache is given back, and the peaks are reset."""
    log = []
    for name in ("empty_cache", "reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *where, name=name: log.append(name) or 7)
    seen = copy.deepcopy(SEEN)
    plan = types.SimpleNamespace(sizes=lambda step: [(8 + step % 2, 8)])
    with pretend("cuda", Device("cuda")):
        watched = watch.PeakWatch(torch.nn.Linear(1, 1), None, plan, TrainConfig(device="cuda", steps=4), 0, seen)
        for step in range(4):
            with watched.step(step):
                log.append(step)
    follows = ["empty_cache", "reset_peak_memory_stats", 1, "max_memory_allocated", "max_memory_reserved"]
    assert log == [0, *follows, 2, 3] and (seen["peak"], seen["reserved"]) == (7, 7)


# ---------------------------------------------------------------------------------------------- where adapters start

def test_pissas_base_is_computed_on_the_cpu():
    """Every load computes W - s B0 A0 again, and another device would round B0 A0 to other codes."""
    linear, W, A, B = torch.nn.Linear(6, 4), torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    on_gpu = [types.SimpleNamespace(cpu=lambda t=t: t) for t in (A, B)]  # all that it can do is to move
    lora_init.rebase(types.SimpleNamespace(base_layer=linear, start_A=on_gpu[0], start_B=on_gpu[1],
                                           product=lambda B, A: 2 * (B @ A)), W)
    assert torch.equal(linear.weight, W - 2 * (B @ A))


@pytest.mark.parametrize("init", ["loftq", "pissa"])
@pytest.mark.parametrize("kind,computes", [("mps", "cpu"), ("cuda", "meta")])
def test_a_gpu_without_float64_gets_its_start_from_the_cpu(kind, computes, init, monkeypatch):
    """Apple's GPU has no float64. The "meta" device stands for the GPU."""
    class Computed(Exception):
        pass

    def best(R, r):
        raise Computed(R.device.type)

    linear = torch.nn.Linear(64, 8, bias=False)
    W = linear.weight.detach()
    m = lora.LoRALinear(quant.quantize(linear, W, 8), 2, 4).to("meta")
    monkeypatch.setattr(lora_init, "best", best)
    monkeypatch.setattr(torch, "isfinite", lambda t: torch.ones(()))
    monkeypatch.setattr(quant.LowBitLinear, "dequantize", lambda self: torch.ones(8, 64))
    with pretend("meta", Device(kind)), pytest.raises(Computed, match=computes):
        lora_init.set_start({"x": m}, init, lambda name: W)


# ---------------------------------------------------------------------------------------------- kernels and waiting

A = torch.ops.aten
NO_KERNEL = {A.detach.default, A._unsafe_view.default, A.alias.default, A.empty.memory_format, A.empty_like.default,
             A.new_empty.default, A.empty_strided.default, A.new_empty_strided.default, A.lift_fresh.default,
             torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}
WAITS = {A._local_scalar_dense.default, A.nonzero.default, A.masked_select.default, A.equal.default, A.is_nonzero.default,
         A.repeat_interleave.Tensor, A._unique2.default}  # on a GPU the host waits for their result


class Launches(TorchDispatchMode):
    """Counts the operators that start at least one kernel on a GPU, and those that make the host wait for it."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits = collections.Counter(), []

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [t for t in tree_leaves(args[1:]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
        if func in WAITS or func is A.index.Tensor and masks:
            self.waits.append(func)
        elif not func.is_view and func not in NO_KERNEL:
            self.kernels[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_a_gpu(on_device, monkeypatch):
    """The CPU answers as an H100 would. F.rms_norm, which on a CPU is many operators, is one here: another norm."""
    monkeypatch.setattr(llama.F, "rms_norm", lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps))
    on_device(type="cuda", float32_backward=False, rms_norm_kernel=True, products=BF16,
              nf4_kernel=lambda packed, absmax, levels, out: out.zero_())


def loaded(tmp_path, n_layer, bits=16, **options):
    model = weights.load(make_folder(tmp_path / f"{n_layer}", "llama", num_hidden_layers=n_layer, hidden_size=64,
                                     intermediate_size=128), bits)
    lora.inject(model, r=2, **options)
    return model.train()


IDS = torch.arange(16)[None]


@pytest.mark.parametrize("bits,targets,ckpt_every,forward,backward", [
    (16, None, 0, 30, 49), (16, None, 1, 30, 77), (4, None, 0, 72, 91), (16, "all", 0, 50, 104)])
def test_kernels_of_a_llama_layer(bits, targets, ckpt_every, forward, backward, tmp_path, as_a_gpu, monkeypatch):
    """A small micro-batch takes as long as the host needs to start its kernels, some 5 microseconds each: these numbers may
    only fall. What a layer adds: three layers minus two. The second micro-batch, whose gradients are added."""
    monkeypatch.setattr(recompute.torch.random, "fork_rng", lambda gpus, device_type: contextlib.nullcontext())
    found = []
    for n_layer in (2, 3):
        model = loaded(tmp_path, n_layer, bits, targets=targets)
        model.ckpt_every = ckpt_every
        for _ in range(2):
            with Launches() as ahead, torch.autocast("cpu", BF16):
                value = loss.sum_loss(model.hidden(IDS), model.head, IDS)
            with Launches() as back:
                value.backward()
        assert not back.waits
        found.append((ahead.kernels.total(), back.kernels.total()))
    found = found[1][0] - found[0][0], found[1][1] - found[0][1]
    assert found[0] <= forward and found[1] <= backward, found


@pytest.mark.parametrize("bits,options", [(16, {}), (4, {"ckpt_every": 1}), (8, {"pack": True})])
def test_the_host_waits_for_nothing_until_the_gradients_are_clipped(bits, options, tmp_path, as_a_gpu, monkeypatch):
    """Then it reads the losses and the norm."""
    cfg = TrainConfig(device="cpu", amp=True, bits=bits, **options)
    model = loaded(tmp_path, 2, bits)
    model.ckpt_every = cfg.ckpt_every
    examples = [data.Example(list(range(n)), [data.IGNORE] * 3 + list(range(n - 3))) for n in (9, 16)]
    batches, waits, clip = [data.collate(examples, cfg.pack, 32) for _ in range(3)], [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: waits.append(len(launches.waits)) or clip(*args))
    optimizer, scaler = prepare.make_optimizer(model, dataclasses.replace(cfg, lr=1e-3)), prepare.make_scaler(cfg)
    with Launches() as launches:
        train.train_step(model, optimizer, scaler, batches, cfg)
    assert waits == [0] and len(launches.waits) == len(batches) + 1  # (of the losses, only the first is a wait)
