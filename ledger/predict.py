"""What a run will peak at, before it runs: its own training step, on tensors without memory (memory.Hollow).

`train.py --dry-run` asks this file, and so does every training run, whose summary shows the answer beside the measurement.
Nothing is read but the model's configuration, and the lengths of the examples in the largest steps. These are run as the
second and third of their run, as AdamW's state is there from then on, under the ledger that watches the real ones.

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

import torch

from ledger import allocator
from techniques import attention
from techniques import recompute
import data
import lora
import memory
from techniques import optim
from run import options
from techniques import quant
from files import weights


def sizes(plan: data.Plan, steps: list[int]) -> list:
    """What start() wants to know of steps: for each, for its micro-batches, [length, labelled tokens] of the examples.

    Of many micro-batches three are enough: the first, which is the largest; the second, beside which there are gradients;
    the one with most labels."""
    found = []
    for step in steps:
        batches = [[(plan.lengths[i], plan.labels[i]) for i in m] for m in plan.numbers(step)]
        most = max(range(len(batches)), key=lambda i: sum(k for _, k in batches[i]))
        found.append([batches[i] for i in sorted({0, min(1, len(batches) - 1), most})])
    return found


def start(cfg: options.TrainConfig, steps: list) -> subprocess.Popen | str:
    """Ask for the peak of steps, whose `sizes` these are. A string says why that was not possible."""
    try:
        child = subprocess.Popen([sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    except OSError as e:  # no memory left for another process, for one
        return str(e)
    with contextlib.suppress(BrokenPipeError):  # it has died: answer() says why
        child.stdin.write(json.dumps([dataclasses.asdict(cfg), steps]))
        child.stdin.close()
    child.stdin = None
    return child


def answer(child: subprocess.Popen | str) -> dict:
    """{"peak", "reserved": bytes, "by_category": {...}, "params": memory.count's}; or {"error": one line}.

    On a card "peak" is what max_memory_allocated will say and "reserved" max_memory_reserved; on a CPU the first is the
    peak of live tensor bytes, the second None."""
    if isinstance(child, str):
        return {"error": child}
    out, err = child.communicate()
    try:
        return json.loads(out)
    except ValueError:
        return {"error": (err.strip().splitlines() or [f"the process ended with status {child.returncode}"])[-1]}


def predict(cfg: options.TrainConfig, steps: list) -> dict:
    """The same in this process."""
    import train  # which imports this file, and where it is __main__ has been imported under that name only

    device, card = cfg.device, torch.device(cfg.device).type == "cuda"  # (Apple's chips have one memory, as a CPU has)
    config, model_class, _ = weights.config_of(cfg.model)
    cfg = dataclasses.replace(cfg, device="cpu", resume=False, steps=10, warmup_steps=0)
    steps = [[[data.Example([0] * n, [0] * k + [data.IGNORE] * (n - k)) for n, k in m] for m in step] for step in steps]
    with one_thread(), torch.random.fork_rng([]), memory.Hollow(), patched(card):
        model = weights.hollow(config, model_class, 32 if cfg.full else cfg.bits)
        train.prepare(model, dataclasses.replace(cfg, lora_init="default"))
        for m in lora.adapters(model).values():
            if cfg.lora_init == "pissa" or cfg.lora_init == "loftq" and isinstance(m.base_layer, quant.LowBitLinear):
                m.keep_start(m.lora_A, m.B())
        params = memory.count(model)
        run = train.Run(cfg, None, model, None, None, None, None, None)
        run.micro_batches = lambda step: [data.collate(m, cfg.pack, cfg.max_length) for m in steps[step]]
        as_after_a_step(run, card)
        workspaces, ledger_class = quant.kept(), memory.Ledger
        if card:
            workspaces += [memory.hollow((cublas_workspace(device),), torch.uint8) for _ in range(2)]
            ledger_class = CardLedger
        ledger = ledger_class(model, run.optimizer, workspaces, "cpu" if card else None)
        with ledger:
            for t in workspaces:
                ledger.follow(t)
            for _ in steps:
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


def dequantize_nf4(packed, absmax, out):
    """Thousands of chunks, which write into the workspace and `out` and leave nothing: shown to the ledger once."""
    for t in quant.workspace(packed.device, quant.CHUNK):
        t.view(-1)
    return out


@contextlib.contextmanager
def patched(card: bool):
    """Inside, what the prediction does otherwise than the run. All of it is about time, or about the card."""
    with contextlib.ExitStack() as stack:
        def put(owner, name, value):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        put(quant, "ROOM", {})
        put(quant, "WORKSPACE", {})
        put(quant, "dequantize_nf4", dequantize_nf4)
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
    options_, steps_ = json.load(sys.stdin)
    try:
        print(json.dumps(predict(options.TrainConfig(**options_), steps_)))
    except weights.UserError as e:
        sys.exit(str(e))
