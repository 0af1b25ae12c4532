"""Where the bytes are: count a model's parameters, measure the peak of a training step.

(The peak is predicted in ledger/predict.py. `python train.py --model M --fit 8GB` finds options that fit: ledger/fit.py.)

"Memory" has three meanings, and numbers of different meanings cannot be compared. So each has its own name here:

    live tensor bytes   the sum of the storages that tensors hold at one moment. The Ledger below measures the peak of this
                        sum over a training step, and splits it by category. It is exact, and repeats from run to run.
    allocated           on a GPU: what PyTorch's caching allocator has handed out (`max_memory_allocated`). These are the
                        live tensors, rounded up, and workspaces (ledger/allocator.py). `reserved` is all that the allocator
                        has taken from the GPU.
    RSS                 the resident set size: the host memory that the process occupies. It contains the live tensors on
                        the CPU, PyTorch's own code (some 300 MB), and memory that the C library keeps for reuse. RSS is
                        what must fit into the host's memory.
"""
import os
import sys
import weakref
from collections import deque

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What each category costs, in closed form. t: tokens of a micro-batch, L: layers, C: width, F: the MLP's width.
# Example: LLaMA-7B, r = 16 on q and v, --amp, 1 x 512 tokens, on a GPU. Its peak is in the loss of the step's first
# micro-batch, where all activations and a chunk of logits exist. On the right, the bytes at this peak; together 15.4 GB.
CATEGORIES = (
    "weights",      # 2 bytes a weight in 16 bit, 4 in 32; layers in 8 bit 1, in 4 bit 0.516 (quant.py)           13.48 GB
    "adapters",     # 4 r (in + out) for each adapted matrix: 4 * 16 * 8192 * 64                                  33.6 MB
    "gradients",    # 4 bytes a trained parameter, from the step's first backward to its end: 33.6 MB, but here    0 MB
    "optimizer",    # 8 bytes a trained parameter, in 8 bit 2.03 (optim.py): 8 * 8,388,608                        67.1 MB
    "activations",  # t L a, and each model file gives its a. llama.py: 512 * 32 * 101,376                         1.66 GB
                    # (and 16-bit copies of the adapters: 17 MB). --ckpt-every 1: t (2C L + a) = 0.19 GB;
                    # --ckpt-every 2: t ((2C + a) L / 2 + a) = 0.95 GB (recompute.py)
    "loss",         # at most 2^24 logits (on a CPU 2^22), here 512 * 32,000: 65.5 MB in float32 + 32.8 MB for their 16-bit
                    # copy or gradient; 8C t for the hidden vectors, a copy, two of their gradient: 98.3 + 16.8   115 MB
    "temporaries",  # what one operator hands to the next; on a GPU also two workspaces of cuBLAS (predict.py)    17.0 MB
                    # (later, in a layer's backward: some three tensors of the MLP's width too, 6F t = 33.8 MB)
)


def count(model: torch.nn.Module) -> dict:
    """{"total", "trainable", "percent", "bytes"}: numbers of parameters, a tied matrix counted once; bytes as stored.

    The total includes the adapters, as in PEFT's print_trainable_parameters. A model on the "meta" device, which has shapes
    and no storage, can be counted too: LLaMA-7B takes a second on any laptop.
    """
    params = list(model.parameters())  # a shared (tied) parameter appears once
    total, trainable = sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)
    total += sum(m.n_weights - m.weight.numel() for m in model.modules() if hasattr(m, "n_weights"))  # 4 bit: two in a byte
    return {"total": total, "trainable": trainable, "percent": 100 * trainable / total,
            "bytes": sum(t.nbytes for t in (*params, *model.buffers()))}


# ---------------------------------------------------------------------------------------------- live tensor bytes

REGION_BEGINS = torch.ops.profiler._record_function_enter_new.default
REGION_ENDS = torch.ops.profiler._record_function_exit._RecordFunction


def tensors_in(x) -> list[torch.Tensor]:
    """The tensors in an operator's inputs or outputs, also those in lists: cat takes a list, split returns one."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in tensors_in(y)] if isinstance(x, (list, tuple)) else []


class Ledger(TorchDispatchMode):
    """Records the birth and the death of every tensor storage while it is active. Then it knows the peak and its split.

        with Ledger(model, optimizer) as ledger:
            train_step()
        ledger.peak, ledger.at_peak      # bytes; {"weights": ..., "activations": ..., ...}

    The outputs of every operator pass through __torch_dispatch__, in backward too. A view shares the storage of its base,
    so each storage is counted once. A weak reference to the storage tells when its last tensor is gone. The ledger does not
    see what an operator allocates and frees inside itself (scratch space of a matrix product, for example).

        weights, adapters   parameters and buffers of the model. What LoRA trains is `adapters`, everything else `weights`
        gradients           of parameters, from their birth on
        optimizer           what the optimizer holds besides the model: 8-bit or 32-bit states, float32 masters (optim.py)
        activations         tensors that forward made and that still exist when backward begins: they are kept for it. Also
                            what the second run of a recomputed layer (recompute.py) has made and kept when it ends
        loss                tensors of loss.py: its input (the hidden vectors), a copy of them, a chunk of logits, gradients
        temporaries         everything else: tensors that live from one operator to the next. Also the tensors in
                            `workspace`, which outlive the step and would otherwise be counted as activations

    A tensor's category is known only after it has been freed, so the ledger records all births and deaths and computes the
    split at the end.
    Storages on all devices are counted; with `device` ("cuda") only those on this type of device.
    """

    @classmethod
    def _should_skip_dynamo(cls):  # True would import PyTorch's compiler, 72 MB, only to hide the mode from it
        return False

    def __init__(self, model, optimizer=None, workspace=(), device=None):
        super().__init__()
        self.model, self.optimizer, self.device = model, optimizer, device
        self.workspace = {t.untyped_storage()._cdata for t in workspace}
        self.sizes, self.categories = [], []  # of storage 0, 1, ... in the order of birth; category None: not known yet
        self.numbers: dict[int, tuple] = {}  # of the storages that live: address -> (number, weak reference)
        self.events: list[int] = []  # births (number) and deaths (-1 - number), in their order
        self.total = self.peak = 0
        self.regions, self.in_backward, self.hooks = [], False, []

    def __enter__(self):
        owner = getattr(self.optimizer, "master", lambda p: p)  # offload_adamw has moved p.grad there when the hook runs
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

    def follow(self, tensor: torch.Tensor, category: str | None = None):
        """Start to follow a tensor's storage, and set its category if one is given (a gradient gets its category late)."""
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
        """The storages from number `first` on that are alive, and have no category yet, are kept for backward."""
        for number, _ in self.numbers.values():
            if number >= first and self.categories[number] is None:
                self.categories[number] = "activations"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.in_backward != (torch._C._current_graph_task_id() >= 0):
            self.in_backward = not self.in_backward
            if self.in_backward:
                self.keep()
        if func is REGION_BEGINS:  # `with record_function("loss")`: PyTorch's way to give a part of a program a name
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
        """Yield {category: live bytes} after each birth and each death. It is the same dict each time."""
        now = dict.fromkeys(CATEGORIES, 0)
        for n in self.events:
            number, sign = (n, 1) if n >= 0 else (-1 - n, -1)
            now[self.categories[number] or "temporaries"] += sign * self.sizes[number]
            yield now

    @property
    def live(self) -> dict:
        """{category: live bytes} now."""
        return {**dict.fromkeys(CATEGORIES, 0), **dict(deque(self.splits(), maxlen=1)[0] if self.events else {})}

    @property
    def at_peak(self) -> dict:
        """{category: live bytes} when the peak was first reached."""
        return next((dict(now) for now in self.splits() if sum(now.values()) == self.peak), self.live)


# ---------------------------------------------------------------------------------------------- RSS and allocated

def rss() -> int:
    """This process's RSS now, in bytes. Where the operating system has no /proc, its peak."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return rss_peak() or 0


def rss_peak() -> int | None:
    """The peak of this process's RSS so far, in bytes. None where the operating system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def cuda_peak(device) -> tuple[int, int] | None:
    """(allocated, reserved): their peaks on a CUDA GPU since reset_peak_memory_stats. None on other devices."""
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def human(n: int | None) -> str:
    """Bytes in decimal units: 1660944384 -> "1.66 GB"; None -> "not measured"."""
    if n is None:
        return "not measured"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n} B"
