"""Where the bytes are: count parameters, measure a run.

"Memory" has three meanings, and a table that mixes them says nothing. Each has its own name here:

    live tensor bytes   the sum of the storages that tensors hold at one moment; its peak over a training step. Exact,
                        the same on every machine, split by category. Measured by the Ledger below.
    allocated           on CUDA: what PyTorch's caching allocator has handed out (`max_memory_allocated`): the live
                        tensors rounded up to 512 bytes, and workspaces. `reserved` is what it took from the card.
    RSS                 what the operating system gives the process: live tensors + PyTorch's own code (some 300 MB)
                        + what the C library keeps for reuse. It is what must fit into the machine.
"""
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CATEGORIES = ("weights", "adapters", "gradients", "optimizer", "activations")


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


class Ledger(TorchDispatchMode):
    """Follows the birth and death of every tensor storage while it is active; keeps the split at the peak.

        with Ledger(model, optimizer) as ledger:
            train_step()
        ledger.peak, ledger.at_peak      # bytes; {"weights": ..., "activations": ..., ...}

    Every operator's outputs pass through __torch_dispatch__, in backward too. Views share their base's storage, so each
    storage is counted once, and a weak reference tells when the last tensor on it is gone. What an operator allocates
    and frees inside itself (a matrix product's scratch space) is not seen.

    "optimizer" is all that the optimizer holds beside the model: states of 8 or 32 bits, and float32 masters (optim.py);
    a master's gradient is a gradient. Nothing is left out for lying on another device: in a run on the CPU, where this is
    used, the machine's memory is the memory. (On CUDA the allocator measures, and it counts the card alone.)
    """

    @classmethod
    def _should_skip_dynamo(cls):  # PyTorch's switch: as it stands, a mode imports the compiler, 72 MB, to hide from it
        return False

    def __init__(self, model, optimizer=None):
        super().__init__()
        self.live = dict.fromkeys(CATEGORIES, 0)
        self.peak, self.at_peak = 0, dict(self.live)
        self.storages: dict[int, list] = {}  # id -> [weak reference, bytes, category]
        self.hooks = []
        self.model, self.optimizer = model, optimizer

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

    def follow(self, tensor, category="activations"):
        """Start to follow a tensor's storage, or move it to another category (a gradient is born an activation)."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # the address of the C++ storage, unique while it lives
        if key in self.storages:
            entry = self.storages[key]
            if category == "activations" or entry[2] == category:
                return
            self.live[entry[2]] -= entry[1]
            entry[2] = category
            self.live[category] += entry[1]
        else:
            n = storage.nbytes()
            self.storages[key] = [weakref.ref(storage, lambda _: self.forget(key)), n, category]
            self.live[category] += n
        total = sum(self.live.values())
        if total >= self.peak:  # at an equal total the later split is better known: gradients have been told apart
            self.peak, self.at_peak = total, dict(self.live)

    def forget(self, key):
        _, n, category = self.storages.pop(key)
        self.live[category] -= n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.follow(t)
        return out


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
