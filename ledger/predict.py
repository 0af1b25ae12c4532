"""The peak of a run before it runs: its own training step, on tensors without memory (hollow.py).

    python train.py --model llama-13b --bits 4 --amp --ckpt-every 1 --dry-run --device cuda       on any laptop

`python -m ledger.predict` is a process of its own. ask.py starts it and asks. A question has the run's options, the model's
config.json, and the lengths of the examples in the run's largest steps. These steps run like the second and third step of a
run, because AdamW's state exists from the second step on. The same Ledger follows them that follows the real steps.

A GPU is predicted on the CPU. Tensors on "cpu" stand for the GPU's, and a Device says what a GPU does differently
(techniques/device.py). What waits in host memory (paged or offloaded states, offloaded activations) is on the "meta" device
here, and is not counted. Three things need GPU memory and are not tensors of the step:

    rounding                what PyTorch's allocator adds (allocator.py)
    cuBLAS's workspace      8.5 MB (33.6 MB on an H100 and on newer GPUs) for each of the two threads that multiply:
                            forward's and backward's
    attention's backward    It sums dq in float32 (FlashAttention-2, arXiv:2307.08691, section 3.1.2), and with grouped
                            queries it has dk and dv for every query head. Bytes for each number of q in 16 bit, one layer
                            at a time: 4 + 4/D, or 8 + 4/D with groups. LLaMA-7B, 512 tokens: 512 * 4096 * 4.03 = 8.5 MB.

Dropout keeps a mask on a GPU, 1 byte a number; on a CPU it keeps the factors 0 and 1 / (1 - p), 2 or 4 bytes.
CUDA itself needs 300 to 600 MB more. (These numbers follow the sources of PyTorch and FlashAttention. They have not been
compared with a GPU.)
"""
import contextlib
import dataclasses
import json
import os
import sys
from unittest import mock

import torch
from torch.nn import functional as F

import data
import lora
import memory
import train
from errors import UserError
from files import method_files, peft_files, weights
from ledger import allocator
from ledger.hollow import Hollow, hollow, hollow_model
from methods import dora
from run import prepare
from run.options import TrainConfig
from techniques import half, optim, quant
from techniques.device import Device, compute_dtype, device_of, hollow_nf4, pretend

FEW = 3  # equal pieces of work that are run instead of thousands: one in use, one that arrives, one that leaves


def predict(cfg: TrainConfig, raw_config: dict, steps: list, machine: dict, tasks=()) -> dict:
    """The answer to a question; ask.py describes both."""
    gpu = cfg.device if torch.device(cfg.device).type == "cuda" else None  # (Apple's GPU has no memory of its own)
    cfg = dataclasses.replace(cfg, device="cpu", resume=False)
    steps = [[[data.Example([0] * n, [0] * k + [data.IGNORE] * (n - k), *task) for n, k, *task in m] for m in step]
             for step in steps]
    like = None
    if cfg.adapter and cfg.method in ("lora", "dora", "ia3"):
        model = weights.without_storage(*reversed(weights.config_from(raw_config)))
        read = method_files.read_ia3 if cfg.method == "ia3" else peft_files.read
        like = read(model, cfg.adapter, device="cpu")
    elif not cfg.full:  # the shapes follow from the options
        cfg = dataclasses.replace(cfg, adapter=None, virtual_init=cfg.virtual_init and "random")
    cfg.tasks = tuple(tasks)
    with (one_thread(), torch.random.fork_rng([]), Hollow(), pretend("cpu", predicted_device(gpu, machine)) as device,
          mock.patch.object(F, "dropout", masking_dropout if gpu else F.dropout)):
        model = hollow_model(raw_config, 32 if cfg.full else cfg.bits, compute_dtype("cpu", cfg.amp))
        prepare.set_trainable(model, cfg, like=like)
        for m in lora.adapters(model).values():
            if cfg.lora_init == "pissa" or cfg.lora_init == "loftq" and isinstance(m.base_layer, quant.LowBitLinear):
                m.keep_start(m.lora_A, m.B())
        params = memory.count(model)
        optimizer, scaler = prepare.make_optimizer(model, cfg), prepare.make_scaler(cfg)
        do_as_a_first_step(model, optimizer, compute_dtype("cpu", cfg.amp))
        ledger_class, workspaces = memory.Ledger, list(device.rooms.values())
        if gpu:
            workspaces += [hollow((device.workspace,), torch.uint8) for _ in range(2)]
            ledger_class = GPULedger
        with ledger_class(model, optimizer, workspaces, "cpu" if gpu else None) as ledger:
            for t in workspaces:
                ledger.follow(t)
            for step in steps:
                batches = [data.collate(m, cfg.pack, cfg.max_length) for m in step]
                train.train_step(model, optimizer, scaler, batches, cfg)
    cache = allocator.replay(ledger.events, ledger.sizes) if gpu else None
    return {"peak": cache.allocated_peak if gpu else ledger.peak, "reserved": cache.reserved if gpu else None,
            "by_category": ledger.at_peak, "params": params}


def predicted_device(gpu: str | None, machine: dict) -> Device:
    """The device that is predicted. It has rooms of its own, so no hollow tensor stays in the rooms of this machine.

    machine: {"half": "bfloat16", "products": "float32", ...}, the device's answers as ask.py found them.
    """
    types = {name: getattr(torch, machine[name]) for name in ("half", "products")}
    kernel = hollow_nf4 if machine["nf4_kernel"] else None
    return Device("cuda" if gpu else "cpu", **{**machine, **types, "nf4_kernel": kernel}, pieces=FEW,
                  host="meta" if gpu else "cpu")


@contextlib.contextmanager
def one_thread():
    """Inside, PyTorch uses one thread: there is almost nothing to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class GPULedger(memory.Ledger):
    """A Ledger that also counts the buffers of attention's backward on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        buffers = None
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            buffers = hollow((attention_buffers(args[1], args[2]),), torch.uint8)
            self.follow(buffers)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        del buffers
        return out


def attention_buffers(q, k) -> int:
    """Bytes: dq in float32, and one more float32 number for each row of q. The kernels round T and D up to their tiles.

    Where FlashAttention does not run, PyTorch's memory-efficient kernel does. It has the same buffers in other tiles.
    """
    (B, H, T, D), flash = q.shape, device_of("cpu").reads_groups(q.dtype)
    rows, width = (-(-T // 128) * 128, -(-D // 32) * 32) if flash else (-(-T // 64) * 64, -(-D // 64) * 64)
    return 4 * B * H * rows * (width + 1) + (2 * q.nbytes if k.shape[1] < H else 0)


def masking_dropout(x, p=0.5, training=True):
    """F.dropout as a GPU computes it."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def do_as_a_first_step(model, optimizer, dtype: torch.dtype):
    """Make what the first step of a run leaves in memory: the optimizer's states, its tables, the rooms for dequantised
    weights."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.init_state(p)
    for signed in (True, False):
        optim.tables(signed, torch.device("cpu"))
    device = device_of("cpu")
    for m in model.modules():
        if isinstance(m, half.HalfLinear):
            half.room("cpu", dtype, m.weight.shape[1])
        elif isinstance(m, quant.LowBitLinear):
            m.in_room(dtype)
            if isinstance(m, quant.NF4Linear) and not device.nf4_kernel:
                quant.nf4_rooms(device, m.weight.device)
        elif isinstance(m, dora.DoRALinear):
            m.lengths()  # from float32 weights, which have a room of their own


def main():
    """Read questions from standard input, one in each line, and write one line for each answer."""
    for line in sys.stdin:
        question = json.loads(line)
        try:
            cfg = TrainConfig(**question["options"])
            answer = predict(cfg, question["config"], question["steps"], question["machine"], question["tasks"])
        except UserError as e:
            answer = {"error": str(e)}
        except Exception as e:  # one line for the run that asked: it continues without the prediction
            answer = {"error": f"{type(e).__name__}: {e}".splitlines()[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # at once: taking all modules apart takes 0.5 s, for which the run would wait
