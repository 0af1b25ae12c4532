"""Frozen weights in 8 and in 4 bits: LoRA can then train a model that would not even fit into memory in 16 bit.

A frozen weight is only read. So it may be stored with few bits, if every product multiplies with 16-bit values again:

int8    One scale for each row, its largest magnitude s (LLM.int8(), arXiv:2208.07339, section 2.1):

            code = round(127 w / s), from -127 to 127            w ~ s code / 127

        1 byte a weight and 4 bytes a row. LLaMA-7B has 6.48e9 weights in its layers: 6.48 GB, in 16 bit 12.95 GB.

NF4     Each block of 64 weights is divided by its largest magnitude, the "absmax". Then each weight is replaced by the
        nearest of 16 levels (QLoRA, arXiv:2305.14314, section 3). The levels are quantiles of a normal distribution.
        Weights are nearly normally distributed, so all levels are used about equally often. One byte holds two codes.

            with a float32 absmax       0.5 + 4 / 64                                            = 0.5625 bytes a weight
            "double quantisation"       0.5 + 1 / 64 + 4 / (64 * 256) = 0.5 + 0.0156 + 0.0002   = 0.516 bytes (4.127 bits)

        Double quantisation subtracts their mean from the absmax values and stores each of them in an 8-bit code, with one
        float32 scale for 256 values. LLaMA-7B: 3.34 GB. The mean error on randn(1024, 1024) is 0.0728.

Embeddings, norms, biases and the head stay in 16 bit. Codes and scales are equal to bitsandbytes', bit for bit. So
a checkpoint that transformers wrote with bitsandbytes (the hub's *-bnb-4bit) loads as it is.

No dequantised weight is kept. Backward needs W once more, for dx = dy W, and dequantises it again. So a step holds one
layer in 16 bit at a time (LLaMA-7B: at most 90 MB). Autograd would keep every layer: 13 GB, more than was saved.
"""
import json
import math
import re

import torch
from torch import nn
from torch.nn import functional as F

from techniques.device import Device, device_of
from techniques.optim import dynamic_code, tables

BLOCK = 64  # weights that share an absmax
NESTED = 256  # absmax values that share a scale
CHUNK = 2**20  # weights that are quantised at a time: the temporaries take some 10 MB, however large the layer is

DYNAMIC = dynamic_code(signed=True)  # the 8-bit code of optim.py's states, used here for the absmax values
# arXiv:2305.14314, appendix E
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def midpoints(code: torch.Tensor) -> torch.Tensor:
    """The borders between neighbours of a sorted code: a number between two borders is nearest to the code between them."""
    return (code[1:] + code[:-1]) / 2


# ---------------------------------------------------------------------------------------------- tensors

def quantize_int8(w: torch.Tensor):
    """w (out, in) -> codes (out, in) int8, scale (out,) float32: the largest magnitude of each row."""
    codes, scale = torch.empty(w.shape, dtype=torch.int8), torch.empty(len(w))
    rows = max(1, CHUNK // w.shape[1])
    for x, c, s in zip(w.split(rows), codes.split(rows), scale.split(rows)):
        s.copy_(x.abs().amax(1))
        c.copy_((x * (127.0 / s.clamp(min=1e-38))[:, None]).round_())  # a row of zeros stays zeros
    return codes, scale


def quantize_nf4(w: torch.Tensor):
    """w (any shape, n weights, n divisible by 64) -> packed (n / 2, 1) uint8, absmax (n / 64,) float32.

    The upper four bits of a byte are the code of the earlier weight.
    """
    flat, levels = w.reshape(-1), midpoints(NF4)
    packed, absmax = torch.empty(len(flat) // 2, dtype=torch.uint8), torch.empty(len(flat) // BLOCK)
    for i in range(0, len(flat), CHUNK):
        x = flat[i:i + CHUNK].to(torch.float32, copy=True).view(-1, BLOCK)
        m = absmax[i // BLOCK:i // BLOCK + len(x)].copy_(x.abs().amax(1))
        x *= (1 / m.clamp(min=1e-38))[:, None]
        codes = torch.bucketize(x.clamp_(-1, 1), levels, out_int32=True).byte().view(-1)
        packed[i // 2:(i + len(codes)) // 2] = codes[::2] << 4 | codes[1::2]
    return packed[:, None], absmax


def quantize_absmax(absmax: torch.Tensor):
    """Double quantisation. absmax (n,) float32 -> codes (n,) uint8, nested_absmax (n / 256 rounded up,), offset ().

    As in bitsandbytes on a CPU, each value is first rounded to one of 65,536 equal steps; then the nearest code is looked
    up. So 0.2 % of the codes are not the nearest ones. Their error is larger by 1e-5 of the scale.
    """
    offset = absmax.mean()
    x = F.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    nested = x.abs().amax(1)
    step = ((x * (1 / nested.clamp(min=1e-38))[:, None]).clamp_(-1, 1) + 1) * 0.5 * 65535 + 0.5
    codes = torch.bucketize(-1 + 2 * step.floor() / 65535, midpoints(DYNAMIC)).byte()
    codes[nested == 0] = 0
    return codes.view(-1)[:len(absmax)].clone(), nested, offset


def dequantize_nf4(packed: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The inverse of quantize_nf4. packed (n / 2, 1), absmax (n / 64,) float32 -> `out`, n elements of any type.

    The result is level * absmax in float32, rounded once to the type of `out`.
    """
    device = device_of(packed.device)
    if device.nf4_kernel:
        return device.nf4_kernel(packed, absmax, NF4, out)
    codes, flat = packed.view(-1), out.view(-1)
    table, index, pairs = nf4_rooms(device, packed.device)
    for i in range(0, len(codes), len(index))[:device.pieces]:
        n = min(len(index), len(codes) - i)
        index[:n] = codes[i:i + n]
        # One look-up copies 8 bytes: the levels of two weights. In 16 rows, because gather gives whole rows to a thread.
        torch.gather(table.expand(16, -1), 1, index[:n].view(16, -1), out=pairs[:n].view(16, -1))
        x = pairs[:n].view(torch.float32).view(-1, BLOCK)
        x *= absmax[2 * i // BLOCK:2 * (i + n) // BLOCK, None]
        flat[2 * i:2 * (i + n)] = x.view(-1)
    return out


def nf4_rooms(device: Device, where) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The memory that every call of dequantize_nf4 uses again, 8 bytes for each weight of a chunk (on a CPU 8.4 MB):

    a table (256,) from a byte to its two levels (4 + 4 bytes, handled as one int64); a chunk's indices; a chunk's levels.
    """
    def pairs_of_levels(n):
        byte = torch.arange(n)
        return torch.stack([NF4[byte >> 4], NF4[byte & 15]], 1).view(torch.int64).view(-1).to(where)

    def empty(n):
        return torch.empty(n, dtype=torch.int64, device=where)

    n = device.nf4_chunk // 2  # a byte holds two weights
    return (device.room(("nf4 table",), 256, pairs_of_levels), device.room(("nf4 index", n), n, empty),
            device.room(("nf4 pairs", n), n, empty))


# ---------------------------------------------------------------------------------------------- layers

def layer_room(shape, dtype, device) -> torch.Tensor:
    """The memory for one product's dequantised weight. The next call returns the same memory for another layer."""
    return device_of(device).room(("layer", dtype), math.prod(shape),
                                  lambda n: torch.empty(n, dtype=dtype, device=device)).view(shape)


class FrozenProduct(torch.autograd.Function):
    """x W^T for a W that is made for each product. Only the layer itself, which exists anyway, is kept for backward."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.times_transposed(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layer.times(grad), None


class FrozenLinear(nn.Module):
    """A frozen linear layer that holds W (out, in) in a form of its own. It has the attributes that lora.py expects.

    linear: the nn.Linear or Conv1D (GPT-2) whose sizes and bias it takes over. A subclass has `weight`, and says how W is
    made from it: `dequantize_into`.
    """

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.fan_in_fan_out = getattr(linear, "fan_in_fan_out", False)  # in the checkpoint; here W is always (out, in)
        if hasattr(linear, "parts"):
            self.parts = linear.parts

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype=torch.float32) -> torch.Tensor:
        """A new tensor W (out, in)."""
        return self.dequantize_into(torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device))

    def in_room(self, dtype) -> torch.Tensor:
        return layer_room((self.out_features, self.in_features), dtype, self.weight.device)

    def times_transposed(self, x):
        return x @ self.dequantize_into(self.in_room(x.dtype)).t()

    def times(self, grad):
        return grad @ self.dequantize_into(self.in_room(grad.dtype))

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class LowBitLinear(FrozenLinear):
    """W in 8 or 4 bits. `weight` is a parameter of integers, so PyTorch refuses to train it."""

    def __init__(self, linear: nn.Module):
        super().__init__(linear)
        self.n_weights = self.in_features * self.out_features

    def with_weight(self, weight: torch.Tensor) -> "LowBitLinear":
        """The same layer, in the same bits, with another weight in the checkpoint's layout."""
        return quantize(self, weight, next(bits for bits, layer in LAYERS.items() if isinstance(self, layer)))

    def _apply(self, fn, recurse=True):
        """.to(dtype) would cast every float buffer, but the scales must stay float32. (PyTorch does not cast the codes.)"""
        scales = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            if scale is not None:
                self._buffers[name] = scale.to(self._buffers[name].device)
        return self


class Int8Linear(LowBitLinear):
    def __init__(self, linear, weight, scale):
        super().__init__(linear)
        self.weight = nn.Parameter(weight, requires_grad=False)  # (out, in) int8
        self.register_buffer("scale", scale)  # (out,)

    @classmethod
    def quantize(cls, linear: nn.Module, w: torch.Tensor):
        return cls(linear, *quantize_int8(w))

    def dequantize_into(self, out):
        return out.copy_(self.weight * (self.scale / 127)[:, None])

    # A code is exact in 16 bit, and a whole row has one scale. So the product uses the codes, and its result is scaled
    # (in backward, the gradient before the product): half the work of dequantising, and one rounding less. Not in
    # float16, where products with codes up to 127 would overflow.
    def times_transposed(self, x):
        if x.dtype == torch.float16:
            return super().times_transposed(x)
        return (x @ self.in_room(x.dtype).copy_(self.weight).t()).mul_(self.scale / 127)

    def times(self, grad):
        if grad.dtype == torch.float16:
            return super().times(grad)
        return (grad * (self.scale / 127)).to(grad.dtype) @ self.in_room(grad.dtype).copy_(self.weight)


class NF4Linear(LowBitLinear):
    def __init__(self, linear, weight, absmax, nested_absmax=None, offset=None):
        super().__init__(linear)
        self.weight = nn.Parameter(weight, requires_grad=False)  # (out * in / 2, 1) uint8
        self.register_buffer("absmax", absmax)  # (out * in / 64,) uint8; float32 without double quantisation
        self.register_buffer("nested_absmax", nested_absmax)  # (out * in / 64 / 256,) float32, or None
        self.register_buffer("offset", offset)  # () float32, or None

    @classmethod
    def quantize(cls, linear: nn.Module, w: torch.Tensor):
        packed, absmax = quantize_nf4(w)
        return cls(linear, packed, *quantize_absmax(absmax))

    def absmax32(self) -> torch.Tensor:
        """The absmax of every block, (out * in / 64,) float32."""
        if self.nested_absmax is None:
            return self.absmax
        code, _ = tables(True, self.absmax.device)  # DYNAMIC, copied to the GPU once
        x = code.index_select(0, self.absmax.int())
        if rest := -len(x) % NESTED:
            x = F.pad(x, (0, rest))
        x.view(-1, NESTED).mul_(self.nested_absmax[:, None])
        return x[:len(self.absmax)].add_(self.offset)

    def dequantize_into(self, out):
        return dequantize_nf4(self.weight, self.absmax32(), out)


LAYERS = {8: Int8Linear, 4: NF4Linear}


def quantize(linear: nn.Module, weight: torch.Tensor, bits: int) -> LowBitLinear:
    """The layer `linear` (nn.Linear or GPT-2's Conv1D) in 8 or 4 bits, from its weight as the checkpoint stores it.

    Raises ValueError for a weight that is not finite and, with 4 bits, for a size that 64 does not divide.
    """
    w = weight.t() if getattr(linear, "fan_in_fan_out", False) else weight
    if bits == 4 and w.numel() % BLOCK:
        raise ValueError(f"{w.numel():,} weights are not a multiple of {BLOCK}, a block's size; use --bits 8 or 16")
    return checked(LAYERS[bits].quantize(linear, w.contiguous()))


def checked(layer: LowBitLinear) -> LowBitLinear:
    """The layer. A weight that is not finite makes its scale not finite: raises ValueError.

    Here the loader still knows the tensor's name. Later, only the loss would be NaN.
    """
    if not torch.isfinite(layer.scale if isinstance(layer, Int8Linear) else layer.absmax32()).all():
        raise ValueError("a weight is not finite (NaN or infinity); the checkpoint is damaged")
    return layer


# ---------------------------------------------------------------------------------------------- bitsandbytes' checkpoints

def belongs_to(key: str) -> str | None:
    """The weight that a tensor of such a checkpoint belongs to: q_proj.weight for q_proj.weight.absmax and q_proj.SCB."""
    m = re.fullmatch(r"(.*\.)(weight\.(nested_)?(absmax|quant_map)|weight\.quant_state\..*|SCB|weight_format)", key)
    return m and m[1] + "weight"


def from_checkpoint(linear: nn.Module, weight: torch.Tensor, parts: dict) -> LowBitLinear:
    """The layer that transformers + bitsandbytes saved in place of `linear`. weight: its codes.

    parts: the tensors that belong to the codes, by the last part of their names: absmax, nested_absmax, bitsandbytes__nf4
    (JSON text as bytes), or SCB. Raises ValueError for a layer that does not fit `linear`, or is stored in another way
    (RecursionError for a JSON text that is nested too deeply).
    """
    n = linear.in_features * linear.out_features
    if "SCB" in parts:
        shape, scale = (linear.out_features, linear.in_features), parts["SCB"]
        if weight.dtype != torch.int8 or weight.shape != shape or scale.shape != shape[:1] or not scale.is_floating_point():
            raise ValueError(f"codes {list(weight.shape)} of {weight.dtype} and scales {list(scale.shape)} of {scale.dtype} "
                             f"do not fit a {shape} layer in int8")
        if parts.get("weight_format", torch.zeros(())).any():
            raise ValueError("its int8 codes are in a GPU's tiled layout; save it again with a newer bitsandbytes")
        return checked(Int8Linear(linear, weight, scale.float()))
    if "bitsandbytes__nf4" not in parts:
        raise ValueError(f"it has neither a quant_state of nf4 nor SCB beside it, only {', '.join(sorted(parts))}")
    text = parts["bitsandbytes__nf4"]
    state = json.loads(bytes(text.tolist())) if text.dtype == torch.uint8 and text.dim() == 1 else None
    if not isinstance(state, dict):
        raise ValueError("its quant_state is no JSON object")
    wanted = {"quant_type": "nf4", "blocksize": BLOCK, "shape": [linear.out_features, linear.in_features]}
    if "nested_absmax" in parts:
        wanted["nested_blocksize"] = NESTED
    for name, value in wanted.items():
        if state.get(name) != value:
            raise ValueError(f"its quant_state has {name} {state.get(name)!s:.99}, this model needs {value}")
    codes = {"quant_map": NF4, "nested_quant_map": DYNAMIC}
    for name in codes.keys() & parts.keys():
        if not torch.equal(parts[name], codes[name]):
            raise ValueError(f"its {name} is another code than NF4's levels or the 8-bit dynamic code")
    double = "nested_absmax" in parts
    wanted = {"absmax": ((n // BLOCK,), torch.uint8 if double else torch.float32)}
    if double:
        wanted["nested_absmax"] = ((-(-n // BLOCK // NESTED),), torch.float32)
    if weight.dtype != torch.uint8 or weight.shape != (n // 2, 1) or n % BLOCK or any(
            k not in parts or (parts[k].shape, parts[k].dtype) != size for k, size in wanted.items()) or (
            double and not (type(state.get("nested_offset")) in (int, float) and abs(state["nested_offset"]) < 1e30)):
        raise ValueError(f"its codes ({weight.dtype}), absmax, nested_absmax or nested_offset do not fit {n:,} weights")
    if not double:
        return checked(NF4Linear(linear, weight, parts["absmax"]))
    offset = torch.tensor(float(state["nested_offset"]))
    return checked(NF4Linear(linear, weight, parts["absmax"], parts["nested_absmax"], offset))
