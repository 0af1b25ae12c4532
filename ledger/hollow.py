"""Tensors that have a size and no memory. The training step runs on them and computes nothing, and the Ledger follows it.

    with Hollow():
        w = hollow((4096, 4096), torch.bfloat16)      # a storage of 33.6 MB, and no memory
        y = x @ w.t()                                 # y is hollow too: a shape, a type, strides; 10 microseconds

This is how a peak is predicted. The *same code* runs: model, loss, recomputation, autograd, optimizer. So whatever holds a
tensor in the real step holds it here, and the same Ledger counts it. No formula is fitted.

* An operator with a hollow input returns hollow outputs. PyTorch knows their shape and strides: its "meta" device computes
  them.
* A view of a hollow tensor is a real view. Nothing is written into a hollow tensor.
* An operator on real tensors only (token ids, masks, positions) does what it always does. But a factory's tensor of more
  than 1 MB is hollow.
* A number that the program asks for (`loss.item()`) is 1, and a yes-or-no question is answered with yes (all gradients
  are finite).

Outside the mode, PyTorch raises an error ("unallocated storage") where it checks that a tensor has memory. Where it does not
check, the process crashes. So no hollow tensor may be used after the mode. The meta device imports PyTorch's compiler
(72 MB, 2 seconds), so the prediction runs in a process of its own.
"""
import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from files import weights
from memory import tensors_in
from techniques import half, quant
from techniques.device import device_of


class Hollow(TorchDispatchMode):
    """While it is active, an operator on hollow tensors returns hollow tensors and computes nothing."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __init__(self):
        super().__init__()
        self.known = {}  # (operator, inputs) -> meta outputs: every layer after the first runs the same operators

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
        key = (func, signature(args), signature(tuple(kwargs.items())))
        if key not in self.known:
            self.known[key] = func(*each(on_meta, args), **{k: each(on_meta, v) for k, v in kwargs.items()})
        out = self.known[key]
        if not from_nothing and out.nbytes <= 2**20:
            return func(*args, **kwargs).zero_()  # an `empty` tensor could hold NaN
        device = kwargs.get("device") or (given[0].device if given else "cpu")
        return each(lambda t: hollow(t.shape, t.dtype, t.stride(), device) if isinstance(t, torch.Tensor) else t, out)


FACTORIES = {torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default}
HOLLOW: dict[int, weakref.ref] = {}  # addresses of the storages without memory


class Wrapper(torch.Tensor):
    """PyTorch's way to make a tensor with a size and no memory. hollow() returns only an alias of it, a plain tensor."""

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
    """f(x). If x is a list or a tuple: the same list, with f applied to what is in it."""
    return type(x)(each(f, y) for y in x) if type(x) in (list, tuple) else f(x)


def signature(x):
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    return tuple([signature(y) for y in x]) if isinstance(x, (list, tuple)) else (type(x), x)  # (1 and 1.0 are equal keys)


def on_meta(x):
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.device("meta") if isinstance(x, torch.device) else x


def is_hollow(t: torch.Tensor) -> bool:
    return t.device.type == "meta" or t.untyped_storage()._cdata in HOLLOW


def written(schema, args, kwargs):
    """What an operator that writes into its inputs returns: those inputs."""
    by_name = {a.name: args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema.arguments)}
    results = [next(by_name[a.name] for a in schema.arguments
                    if a.alias_info and a.alias_info.before_set == r.alias_info.before_set) for r in schema.returns]
    return results[0] if len(results) == 1 else tuple(results) or None


def hollow_model(raw_config: dict, bits: int, compute_dtype: torch.dtype) -> nn.Module:
    """The model that weights.load makes, but from its config.json alone and without memory. For use inside Hollow."""
    config, model_class = weights.config_from(raw_config)
    dtype, converts = device_of("cpu").half, bits < 32 and compute_dtype == torch.float32
    model = weights.without_storage(model_class, config, converts)
    low_bit, made = weights.low_bit_weights(model) if bits < 16 or converts else (), {}
    for n, p in list(model.named_parameters()):
        if n in low_bit:
            owner, _, leaf = n.removesuffix(".weight").rpartition(".")
            linear = model.get_submodule(owner).get_submodule(leaf)
            if bits == 16:
                layer = half.from_weight(linear, hollow(p.shape, dtype), dtype)
            else:
                if p.shape not in made:
                    made[p.shape] = quant.quantize(linear, hollow(p.shape, torch.float32), bits)
                twin = made[p.shape]
                layer = type(twin)(linear, twin.weight.clone(), *(scale.clone() for scale in twin.buffers()))
            setattr(model.get_submodule(owner), leaf, layer)
        else:
            float32 = bits == 32 or converts and p.dim() < 2
            weights.set_parameter(model, n, hollow(p.shape, torch.float32 if float32 else dtype))
    model.tie()
    model.bits = bits
    return model
