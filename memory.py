"""Where the bytes are: count parameters, measure a run, predict one.

    python memory.py --model llama-2-7b --fit 8GB --max-length 1024        the cheapest options that fit a card: fit.py

"Memory" has three meanings, and a table that mixes them says nothing. Each has its own name here:

    live tensor bytes   the sum of the storages that tensors hold at one moment; its peak over a training step. Exact,
                        the same on every machine, split by category. Measured by the Ledger below.
    allocated           on CUDA: what PyTorch's caching allocator has handed out (`max_memory_allocated`): the live
                        tensors rounded up, and workspaces (allocator.py). `reserved` is what it took from the card.
    RSS                 what the operating system gives the process: live tensors + PyTorch's own code (some 300 MB)
                        + what the C library keeps for reuse. It is what must fit into the machine.
"""
import sys
import weakref
from collections import deque

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What each category comes to, in closed form. t: tokens of a micro-batch, L: layers, C: width, F: the MLP's width.
# The example is LLaMA-7B with r = 16 on q and v, --amp, 1 x 512 tokens on a card: 15.3 GB.
CATEGORIES = (
    "weights",      # 4 bytes a number, in 16 bit 2; of a layer's in 8 bit 1, in 4 bit 0.516 (quant.py)             13.48 GB
    "adapters",     # 4 r (in + out) for each matrix that has one: 4 * 16 * 8192 * 64                               33.6 MB
    "gradients",    # 4 bytes a trained number, from the first backward of a step on           (then) 33.6 MB
    "optimizer",    # 8 bytes a trained number, in 8 bit 2.03 (optim.py)                                            67.1 MB
    "activations",  # t L a, where a is in each model file: 2C + ... = 102 kB: 512 * 32 * 102 kB                     1.68 GB
                    # --ckpt-every 1: t (2C L + a), of every other layer: half of each (checkpoint.py)      (then) 0.18 GB
    "loss",         # 2^22 logits of 6 bytes, 6C t for the hidden vectors and their gradient                         37.8 MB
    "temporaries",  # what one operator hands to the next, in backward some three tensors of the MLP's width: 6F t
                    # when the logits are gone; on a card cuBLAS's room besides (predict.py)              34 MB;   17.0 MB
)


def count(model) -> dict:
    """{"total", "trainable", "percent", "bytes"}: logical parameters, each tied matrix once; bytes as stored.

    Adapters count in the total, as in PEFT's print_trainable_parameters. Works on a model on the "meta" device, which
    has shapes and no storage: LLaMA-7B is counted in a second, on any laptop.
    """
    params = list(model.parameters())  # a shared (tied) parameter appears once
    total, trainable = sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)
    total += sum(m.n_weights - m.weight.numel() for m in model.modules() if hasattr(m, "n_weights"))  # 4-bit: two a byte
    return {"total": total, "trainable": trainable, "percent": 100 * trainable / total,
            "bytes": sum(t.nbytes for t in (*params, *model.buffers()))}


# ---------------------------------------------------------------------------------------------- during the run

REGION_BEGINS = torch.ops.profiler._record_function_enter_new.default
REGION_ENDS = torch.ops.profiler._record_function_exit._RecordFunction


def tensors_in(x) -> list[torch.Tensor]:
    """The tensors among an operator's inputs or outputs: lists of them are inputs of cat, outputs of split."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in tensors_in(y)] if isinstance(x, (list, tuple)) else []


class Ledger(TorchDispatchMode):
    """Records the birth and the death of every tensor storage while it is active; finds the peak and its categories.

        with Ledger(model, optimizer) as ledger:
            train_step()
        ledger.peak, ledger.at_peak      # bytes; {"weights": ..., "activations": ..., ...}

    Every operator's outputs pass through __torch_dispatch__, in backward too. Views share their base's storage, so each
    storage is counted once, and a weak reference tells when the last tensor on it is gone. What an operator allocates
    and frees inside itself (a matrix product's scratch space) is not seen.

        weights, adapters   the model's parameters and buffers: what is frozen (all, with --full), what LoRA trains
        gradients           of parameters, from their birth on
        optimizer           all that the optimizer holds beside the model: states of 8 or 32 bits, float32 masters (optim.py)
        activations         made in forward and alive when backward begins: what is kept for it. What a recomputed layer
                            (checkpoint.py) has made when it is done belongs here too
        loss                made by loss.py: a chunk of logits, their gradient's product with the head
        temporaries         everything else: what lives from one operator to the next, and the tensors in `workspace`
                            (which outlive the step, and would pass for activations)

    A tensor's category is known only after it has been freed, so the ledger records all births and deaths and computes the
    split at the end.
    Nothing is left out for lying on another device than the model: in a run on the CPU the machine's memory is the memory.
    `device` ("cuda") counts that device's alone.
    """

    @classmethod
    def _should_skip_dynamo(cls):  # PyTorch's switch: as it stands, a mode imports the compiler, 72 MB, to hide from it
        return False

    def __init__(self, model, optimizer=None, workspace=(), device=None):
        super().__init__()
        self.model, self.optimizer, self.device = model, optimizer, device
        self.workspace = {t.untyped_storage()._cdata for t in workspace}
        self.sizes, self.categories = [], []  # of every storage that was met, by its number; None: not known yet
        self.numbers: dict[int, tuple] = {}  # of those that live: address -> (number, weak reference)
        self.events: list[int] = []  # births (number) and deaths (-1 - number), in their order
        self.total = self.peak = 0
        self.regions, self.in_backward, self.hooks = [], False, []

    def __enter__(self):
        owner = getattr(self.optimizer, "master", lambda p: p)  # an offloaded gradient has left p when the hook runs
        lora = any(not p.requires_grad for p in self.model.parameters())
        for p in self.model.parameters():
            self.follow(p, "adapters" if lora and p.requires_grad else "weights")
            if p.requires_grad:
                if p.grad is not None:
                    self.follow(p.grad, "gradients")
                self.hooks.append(p.register_post_accumulate_grad_hook(lambda p: self.follow(owner(p).grad, "gradients")))
                if (master := owner(p)) is not p:
                    self.follow(master, "optimizer")
                    if master.grad is not None:
                        self.follow(master.grad, "gradients")
        for scale in self.model.buffers():
            self.follow(scale, "weights")
        for state in self.optimizer.state.values() if self.optimizer else ():
            for t in state.values():
                if isinstance(t, torch.Tensor):
                    self.follow(t, "optimizer")
        return super().__enter__()

    def __exit__(self, *error):
        for h in self.hooks:
            h.remove()
        return super().__exit__(*error)

    def follow(self, tensor, category=None):
        """Start to follow a tensor's storage, or say what it is (a gradient is born as any other tensor)."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # the address of the C++ storage, unique while it lives
        if key not in self.numbers:
            if self.device and storage.device.type != self.device:
                return
            number = len(self.sizes)
            self.numbers[key] = number, weakref.ref(storage, lambda _: self.forget(key))
            self.sizes.append(storage.nbytes())
            self.categories.append("temporaries" if key in self.workspace else None)
            self.events.append(number)
            self.total += self.sizes[number]
            self.peak = max(self.peak, self.total)
        number, _ = self.numbers[key]
        self.categories[number] = category or self.categories[number] or self.in_loss()

    def in_loss(self) -> str | None:
        return "loss" if any(name == "loss" for name, _ in self.regions) else None

    def forget(self, key):
        number, _ = self.numbers.pop(key)
        self.events.append(-1 - number)
        self.total -= self.sizes[number]

    def keep(self, first: int = 0):
        """What has been born from number `first` on and is alive is kept for backward."""
        for number, _ in self.numbers.values():
            if number >= first and self.categories[number] is None:
                self.categories[number] = "activations"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.in_backward != (torch._C._current_graph_task_id() >= 0):
            self.in_backward = not self.in_backward
            if self.in_backward:
                self.keep()
        if func is REGION_BEGINS:  # `with record_function("loss")`: PyTorch's way of naming a stretch of a program
            self.regions.append((args[0], len(self.sizes)))
        elif func is REGION_ENDS:
            name, first = self.regions.pop()
            if name == "recompute":
                self.keep(first)
        out = func(*args, **(kwargs or {}))
        for t in tensors_in(out):
            self.follow(t)
        return out

    def splits(self):
        """After each birth and death: {category: bytes that live}."""
        now = dict.fromkeys(CATEGORIES, 0)
        for n in self.events:
            number, sign = (n, 1) if n >= 0 else (-1 - n, -1)
            now[self.categories[number] or "temporaries"] += sign * self.sizes[number]
            yield now

    @property
    def live(self) -> dict:
        """{category: bytes} at this moment."""
        return {**dict.fromkeys(CATEGORIES, 0), **dict(deque(self.splits(), maxlen=1)[0] if self.events else {})}

    @property
    def at_peak(self) -> dict:
        """{category: bytes} at the first moment of the peak."""
        return next((dict(now) for now in self.splits() if sum(now.values()) == self.peak), self.live)


# ---------------------------------------------------------------------------------------------- other meanings

def rss_peak() -> int | None:
    """The process's peak resident set in bytes so far; None where the operating system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def cuda_peak(device) -> tuple[int, int] | None:
    """(allocated, reserved) at their peaks on a CUDA device since reset_peak_memory_stats; None elsewhere."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def human(n: int | None) -> str:
    """Bytes in decimal units, as the tables here use them; what was not measured says so."""
    if n is None:
        return "not measured"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n} B"
