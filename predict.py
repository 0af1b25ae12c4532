"""What a run will peak at, before it runs: its own training step, on tensors without memory (memory.Hollow).

`train.py --dry-run` asks this file, and so does every training run, whose summary shows the answer beside the measurement.
Nothing is read but the model's configuration, and the lengths of the examples in the largest step. It is run as the second
step of its run, as AdamW's state is there from then on, under the ledger that watches the real one.

It happens in a process of its own (some 350 MB, 3 seconds, beside the loading of the weights): PyTorch's shape functions
import its compiler, which a training run has no other use for.

    python train.py --model llama-13b --bits 4 --amp --ckpt-every 1 --dry-run --device cuda       on any laptop

A card is predicted on the CPU, whatever this machine has; patched() lists what is done otherwise there. The tensors are
those of the card alone: what lies in the machine's memory (paged or offloaded states, offloaded activations) is on the
"meta" device here, and not counted. Three things take a card's memory that are no tensor of the step:

    rounding                what PyTorch's allocator adds, see allocator.py
    cuBLAS's workspace      8.5 MB (33.6 on an H100) for each of the two threads that multiply, forward and backward
    attention's backward    sums dq in float32 (FlashAttention-2, arXiv:2307.08691, section 3.1.2), and with grouped queries
                            dk and dv head by head: (4 + 4/D) bytes a number of q, or with groups 8 + 4/D, for one layer
                            at a time. LLaMA-7B, 512 tokens: 8.5 MB

CUDA itself takes 300 to 600 MB beside all that. (All of it is after PyTorch's and FlashAttention's sources; it has not been
compared with a card.)
"""
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from unittest import mock

import torch

import allocator
import attention
import checkpoint
import data
import lora
import memory
import optim
import options
import quant
import weights

MICRO_BATCHES = 2  # of a step: the first is its largest; beside the second there are gradients


def sizes(plan: data.Plan, step: int) -> list:
    """What start() wants to know of a step."""
    return [[(len(e.ids), e.n_labels) for e in m] for m in plan.micro_batches(step)[:MICRO_BATCHES]]


def start(cfg: options.TrainConfig, micro_batches: list) -> subprocess.Popen:
    """Ask for the peak of a step. micro_batches: for each, [length, labelled tokens] of its examples, the largest first."""
    child = subprocess.Popen([sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with contextlib.suppress(BrokenPipeError):  # it has died: answer() says why
        child.stdin.write(json.dumps([dataclasses.asdict(cfg), micro_batches[:MICRO_BATCHES]]))
        child.stdin.close()
    child.stdin = None
    return child


def answer(child: subprocess.Popen) -> dict:
    """{"peak", "reserved": bytes, "by_category": {...}, "params": memory.count's}; or {"error": one line}.

    On a card "peak" is what max_memory_allocated will say and "reserved" max_memory_reserved; on a CPU the first is the
    peak of live tensor bytes, the second None."""
    out, err = child.communicate()
    if child.returncode:
        return {"error": (err.strip().splitlines() or [f"it ended with status {child.returncode}"])[-1]}
    return json.loads(out)


def predict(cfg: options.TrainConfig, micro_batches: list) -> dict:
    """The same in this process."""
    import train  # which imports this file, and where it is __main__ has been imported under that name only

    device, card = cfg.device, torch.device(cfg.device).type == "cuda"  # (Apple's chips have one memory, as a CPU has)
    config, model_class, _ = weights.config_of(cfg.model)
    cfg = dataclasses.replace(cfg, device="cpu", resume=False, steps=10, warmup_steps=0)
    batches = [[data.Example([0] * n, [0] * k + [data.IGNORE] * (n - k)) for n, k in m] for m in micro_batches]
    with one_thread(), torch.random.fork_rng([]), memory.Hollow(), patched(card):
        model = weights.hollow(config, model_class, 32 if cfg.full else cfg.bits)
        train.prepare(model, dataclasses.replace(cfg, lora_init="default"))
        for m in lora.adapters(model).values():
            if cfg.lora_init == "pissa" or cfg.lora_init == "loftq" and isinstance(m.base_layer, quant.LowBitLinear):
                m.keep_start(m.lora_A, m.B())
        params = memory.count(model)
        run = train.Run(cfg, None, model, None, None, None, None, None)
        run.micro_batches = lambda step: [data.collate(m, cfg.pack, cfg.max_length) for m in batches]
        as_after_a_step(run, card)
        workspaces, ledger_class = quant.kept(), memory.Ledger
        if card:
            workspaces += [memory.hollow((cublas_workspace(device),), torch.uint8) for _ in range(2)]
            ledger_class = CardLedger
        ledger = ledger_class(model, run.optimizer, workspaces, "cpu" if card else None)
        with ledger:
            for t in workspaces:
                ledger.follow(t)
            run.train_step()
    cache = allocator.replay(ledger.book, ledger.sizes) if card else None
    return {"peak": cache.allocated_peak if card else ledger.peak, "reserved": cache.reserved if card else None,
            "by_category": ledger.at_peak, "params": params}


@contextlib.contextmanager
def one_thread():
    """There is next to nothing to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class CardLedger(memory.Ledger):
    """With what attention's backward takes for itself on a card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        own = None
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            q, k = args[1], args[2]
            B, H, T, D = q.shape
            size = 4 * B * H * T  # float32, a number a row
            if q.dtype != torch.float32:  # (in float32 another kernel runs, which sums where the result is to stand)
                size += 4 * q.numel() + (2 * q.nbytes if k.shape[1] < H else 0)
            own = memory.hollow((size,), torch.uint8)
            self.follow(own)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        del own
        return out


def cublas_workspace(device: str) -> int:
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9
    return 32 * 2**20 if hopper else 2 * 4096 * 1024 + 8 * 16 * 1024


def as_after_a_step(run, card: bool):
    """What the first step leaves: the optimizer's states, tables, rooms for what is dequantised."""
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            run.optimizer.init_state(p)
    for signed in (True, False):
        optim.tables(signed, torch.device("cpu"))
    for m in run.model.modules():
        if isinstance(m, quant.LowBitLinear):
            m.in_room(torch.bfloat16)
            if isinstance(m, quant.NF4Linear) and not card:
                quant.workspace(m.weight.device, quant.CHUNK)


@contextlib.contextmanager
def patched(card: bool):
    """Inside, what the prediction does otherwise than the run. All of it is about time, or about the card."""
    with contextlib.ExitStack() as stack:
        def put(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        put(quant, "ROOM", {})
        put(quant, "WORKSPACE", {})
        # Thousands of chunks, which write into the workspace and `out` and leave nothing.
        put(quant, "dequantize_nf4", lambda packed, absmax, out: (quant.workspace(packed.device, quant.CHUNK), out)[1])
        chunks = optim.AdamW8bit.chunks  # of thousands, the three largest: a page in use, one coming, one going
        put(optim.AdamW8bit, "chunks", lambda self, params: islice(sorted(
            chunks(self, params), key=lambda c: -sum(j - i for _, i, j in c)), 3))
        if card:
            put(optim, "HOST", "meta")
            put(optim, "CHUNK", {})
            put(quant, "dequantize_nf4", lambda packed, absmax, out: out)  # nf4_triton.py needs no workspace
            put(attention, "FLOAT32_BACKWARD", ())
            put(checkpoint, "to_host", lambda x: x.to("meta"))
            put(checkpoint, "to_device", lambda x, device: x.to(device))
        yield


if __name__ == "__main__":
    options_, micro_batches_ = json.load(sys.stdin)
    try:
        print(json.dumps(predict(options.TrainConfig(**options_), micro_batches_)))
    except weights.UserError as e:
        sys.exit(str(e))
