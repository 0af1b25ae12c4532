"""Weights in 16 bit on a device that multiplies float32 faster: 2 bytes a weight, and no 16-bit arithmetic.

Most CPUs have no 16-bit units (every AMD before Zen 4, every Intel desktop and laptop chip without AVX-512). They emulate
bfloat16: 7 times slower than float32 in forward and up to 140 times in backward (device.py measures it). There, and
without --amp, each product converts its weight to float32, some rows at a time, into a room that all layers share:

    y[:, i:j] = x W[i:j]^T          forward, x (N, in), W (out, in)
    dx       += dy[:, i:j] W[i:j]   backward

A bfloat16 number is a float32 number without its last 16 bits, so the conversion is exact. Its cost: a chunk of 2^20 weights
is 4.2 MB in float32, which stays in the cache for the product that follows. So the product takes little more time than
with float32 weights (LOG.md has the figures). Nothing is kept for backward. LLaMA-7B: 13.5 GB of weights instead of 27,
and 4.2 MB.

Norms and biases, 0.01 % of the weights, are rounded to 16 bit as everywhere, and held in float32. Activations are float32,
twice the bytes of 16 bit.
"""
import torch
from torch import nn

from techniques.device import device_of
from techniques.quant import FrozenLinear

CHUNK = 2**20  # weights that are converted at a time


def room(device, dtype: torch.dtype, width: int) -> torch.Tensor:
    """Where a chunk is converted: 2^20 elements, or one row of W if that is longer."""
    return device_of(device).room(("half", dtype), max(CHUNK, width), lambda n: torch.empty(n, dtype=dtype, device=device))


def chunks(W: torch.Tensor, dtype: torch.dtype):
    """W (out, in) -> (i, j, W[i:j] as dtype), chunk by chunk. Each chunk is overwritten by the next one."""
    n, width = W.shape
    rows, space = max(1, CHUNK // width), room(W.device, dtype, width)
    for i in range(0, n, rows)[:device_of(W.device).pieces]:
        j = min(n, i + rows)
        yield i, j, space[:(j - i) * width].view(j - i, width).copy_(W[i:j])


def times_transposed(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """x (..., in), W (out, in) in another type -> x W^T (..., out), in the type of x."""
    y = x.new_empty(*x.shape[:-1], len(W))
    for i, j, w in chunks(W, x.dtype):
        torch.mm(x.flatten(0, -2), w.t(), out=y.view(-1, len(W))[:, i:j])
    return y


def times(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """x (..., out), W (out, in) in another type -> x W (..., in), in the type of x."""
    y = x.new_zeros(*x.shape[:-1], W.shape[1])
    for i, j, w in chunks(W, x.dtype):
        y.view(-1, W.shape[1]).addmm_(x.flatten(0, -2)[:, i:j], w)
    return y


class HalfLinear(FrozenLinear):
    """A frozen linear layer, W (out, in) in 16 bit."""

    def __init__(self, linear: nn.Module, weight: torch.Tensor):
        super().__init__(linear)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def with_weight(self, weight):
        return from_weight(self, weight, self.weight.dtype)

    def dequantize_into(self, out):
        return out.copy_(self.weight)

    def times_transposed(self, x):
        return times_transposed(x, self.weight)

    def times(self, grad):
        return times(grad, self.weight)


def from_weight(linear: nn.Module, weight: torch.Tensor, half: torch.dtype) -> HalfLinear:
    """The layer `linear` (nn.Linear or GPT-2's Conv1D) in the type `half`, from its weight as the checkpoint stores it."""
    w = weight.t() if getattr(linear, "fan_in_fan_out", False) else weight
    return HalfLinear(linear, w.to(half).contiguous())


class HalfEmbedding(nn.Embedding):
    """A frozen embedding in 16 bit: only the rows that are read become float32, 4C bytes a token."""

    def forward(self, ids):
        return super().forward(ids).float()


def hold_embedding_and_head(model: nn.Module):
    """Replace the embeddings and the head of a model, whose weights need no storage yet. They stay tied, if they are."""
    for name, m in list(model.named_modules()):
        if isinstance(m, nn.Embedding):
            new = HalfEmbedding(m.num_embeddings, m.embedding_dim)
        elif name == model.head_name:
            new = HalfLinear(m, m.weight)
        else:
            continue
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
    model.tie()
