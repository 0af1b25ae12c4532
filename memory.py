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
    """Writes down the birth and the death of every tensor storage while it is active; finds the peak and its split.

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

    So a category is known when a storage's life is over, not when it begins; the split is read from the book afterwards.
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
        self.book: list[int] = []  # births (number) and deaths (-1 - number), in their order
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
            self.book.append(number)
            self.total += self.sizes[number]
            self.peak = max(self.peak, self.total)
        number, _ = self.numbers[key]
        self.categories[number] = category or self.categories[number] or self.in_loss()

    def in_loss(self) -> str | None:
        return "loss" if any(name == "loss" for name, _ in self.regions) else None

    def forget(self, key):
        number, _ = self.numbers.pop(key)
        self.book.append(-1 - number)
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
        for n in self.book:
            number, sign = (n, 1) if n >= 0 else (-1 - n, -1)
            now[self.categories[number] or "temporaries"] += sign * self.sizes[number]
            yield now

    @property
    def live(self) -> dict:
        """{category: bytes} at this moment."""
        return {**dict.fromkeys(CATEGORIES, 0), **dict(deque(self.splits(), maxlen=1)[0] if self.book else {})}

    @property
    def at_peak(self) -> dict:
        """{category: bytes} at the first moment of the peak."""
        return next((dict(now) for now in self.splits() if sum(now.values()) == self.peak), self.live)


# ---------------------------------------------------------------------------------------------- before the run

class Hollow(TorchDispatchMode):
    """Tensors without numbers: the training step runs, is followed by the Ledger, and computes nothing.

        with Hollow():
            w = hollow((4096, 4096), torch.bfloat16)      # a storage of 33.6 MB, and no memory
            y = x @ w.t()                                 # so is y: shape, type, strides; 10 microseconds

    This is how a peak is predicted: the *same code* runs, model, loss, checkpointing, autograd, optimizer, so what holds a
    tensor in the real step holds it here, and what is counted is counted by the same Ledger. There is no formula to be
    fitted. An operator with a hollow tensor among its inputs gives hollow outputs; which shape and strides these have,
    PyTorch knows by itself: that is what its "meta" device computes. A view of a hollow tensor is a real view. What is
    written into a tensor is not. An operator on real tensors only (token ids, masks, positions) does what it always does,
    but does not make anything large: a factory's tensor of more than 1 MB is hollow. A number that the program wants to see
    (`loss.item()`) is 1, and every question is answered with yes (all gradients are finite).

    A hollow tensor outside the mode is an error where PyTorch asks ("unallocated storage") and the end of the process where
    it does not; so nothing made in here may be kept in a cache that outlives it. The meta device imports PyTorch's compiler
    (72 MB, 2 seconds): a process of its own is a good place.
    """

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __init__(self):
        super().__init__()
        self.known = {}  # results by operator and inputs: every layer after the first asks the same questions

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_in((args, *kwargs.values()))
        from_nothing = any(is_hollow(t) for t in given)
        if not from_nothing and func not in FACTORIES or func.is_view or func is torch.ops.aten._unsafe_view.default:
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(), bool(), int()
            return torch.ones((), dtype=args[0].dtype).item()
        if func._schema.is_mutable:
            return written(func._schema, args, kwargs)
        key = (func, described(args), described(tuple(kwargs.items())))
        if key not in self.known:
            self.known[key] = func(*each(on_meta, args), **{k: each(on_meta, v) for k, v in kwargs.items()})
        out = self.known[key]
        if not from_nothing and out.nbytes <= 2**20:
            return func(*args, **kwargs).zero_()  # rather than what an `empty` one finds, which may be no number
        device = kwargs.get("device") or (given[0].device if given else "cpu")
        return each(lambda t: hollow(t.shape, t.dtype, t.stride(), device) if isinstance(t, torch.Tensor) else t, out)


FACTORIES = {torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default}
HOLLOW: dict[int, weakref.ref] = {}  # addresses of the storages without memory


class Wrapper(torch.Tensor):
    """PyTorch's way to a tensor with a size and no memory. Only an alias of it, a plain tensor, gets out of hollow()."""

    @staticmethod
    def __torch_dispatch__(func, types, args=(), kwargs=None):
        raise AssertionError(func)


def hollow(shape, dtype, stride=None, device="cpu") -> torch.Tensor:
    """A tensor whose storage has its full size and no memory, for use inside Hollow. device: "cpu" or "meta"."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta") if stride is None else \
            torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    stride = torch.empty(shape, device="meta").stride() if stride is None else stride
    size = 0 if 0 in shape else (1 + sum((n - 1) * s for n, s in zip(shape, stride))) * dtype.itemsize
    t = torch.Tensor._make_wrapper_subclass(Wrapper, shape, strides=stride, dtype=dtype, device=device, storage_size=size)
    with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
        t = torch.ops.aten.alias.default(t)
    storage = t.untyped_storage()
    key = storage._cdata
    HOLLOW[key] = weakref.ref(storage, lambda _: HOLLOW.pop(key))
    return t


def each(f, x):
    """f of x, or of what the lists in it hold."""
    return type(x)(each(f, y) for y in x) if type(x) in (list, tuple) else f(x)


def described(x):
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    return tuple([described(y) for y in x]) if isinstance(x, (list, tuple)) else (type(x), x)  # (1 and 1.0 are equal keys)


def on_meta(x):
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def is_hollow(t: torch.Tensor) -> bool:
    return t.device.type == "meta" or t.untyped_storage()._cdata in HOLLOW


def written(schema, args, kwargs):
    """What an operator that writes into its inputs returns: those inputs."""
    by_name = {a.name: args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema.arguments)}
    found = [next(by_name[a.name] for a in schema.arguments
                  if a.alias_info and a.alias_info.before_set == r.alias_info.before_set) for r in schema.returns]
    return found[0] if len(found) == 1 else tuple(found) or None


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


if __name__ == "__main__":
    from ledger import fit  # which imports this file, under its own name
    try:
        fit.main()
    except fit.UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
