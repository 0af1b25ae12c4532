"""DoRA: train the length and the direction of each row of a weight by themselves.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), eq. 5:

    W' = m V / |V|        V = W + s B A,   |V| the length of each row (out),   m (out) trained, starts at |W|

So training starts at W. The paper's section 4.3: |V| is treated as a constant in backward. Then V needs no gradient of its
own, and with the factor g = m / |V| the layer is

    y = W' x + b = h + (g - 1) (h - b)        h = W x + s B A x + b,  what LoRA computes

Cost: 16 bytes a row for m, 4 for |W|^2, and backward keeps h - b for m's gradient, 2 bytes a row and token in 16 bit. GPT-2
124M, q and v, 2048 tokens: 12 * (1536 * 16 + 2304 * 4) = 0.41 MB and 12 * 2304 * 2 * 2048 = 113 MB (k's rows are kept too).

V is never made. The squares of its rows' lengths follow from products with the r rows of A:

    |V|^2 = |W|^2 + 2 s rows(W A^T * B) + s^2 rows(B (A A^T) * B)         rows: the sum of each row

W A^T costs what r more tokens would. It is computed in float32: over 8- and 4-bit weights the layer is dequantised a second
time in each forward, into a room of 4 bytes a weight (LLaMA-7B's q: 67 MB). Over 16 bit the room is 4.2 MB (half.py).
"""
import torch
from torch import nn
from torch.nn import functional as F

import lora
from techniques import half
from techniques.quant import FrozenLinear


class DoRALinear(lora.LoRALinear):
    """A LoRALinear with a magnitude for each row. magnitude: one vector for each part, as lora_B has one matrix."""

    method, fits_head = "dora", False

    def __init__(self, base: nn.Module, *args, **kwargs):
        super().__init__(base, *args, **kwargs)
        W = rows_of(base)
        self.register_buffer("squares", (W.float().square().sum(1) if W.device.type != "meta" else
                                         torch.zeros(len(W))).to(self.lora_A.device))  # |W|^2
        self.magnitude = nn.ParameterList(self.squares[rows].sqrt() for rows in self.rows())

    def adapt(self, h, x):
        h = super().adapt(h, x)
        g = self.factors(self.lengths())
        v = h if self.bias is None else h - self.bias.to(h.dtype)  # (--amp over 32 bits: h has 16)
        return torch.addcmul(h, v, (g - 1).to(h.dtype))

    @torch.no_grad()
    def lengths(self) -> torch.Tensor:
        """|V| (out,), in float32. A row of zeros is given a length, since one divides by it."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            A, B, s = self.lora_A, self.B(), self.scale
            cross = (product(self.base_layer, A).t() * B).sum(1)
            return (self.squares + 2 * s * cross + s * s * (B @ (A @ A.t()) * B).sum(1)).clamp(min=1e-30).sqrt()

    def factors(self, lengths) -> torch.Tensor:
        """g = m / |V| (out,), and 1 for the rows of parts without an adapter."""
        if not self.parts:
            return self.magnitude[0] / lengths
        own = {p: m / lengths[rows] for p, m, rows in zip(self.parts, self.magnitude, self.rows())}
        return torch.cat([own[p] if p in own else lengths.new_ones(n) for p, n in self.base_layer.parts.items()])

    def whole_magnitude(self) -> torch.Tensor:
        """m (out,) as PEFT stores it. Rows of parts without an adapter have |W|: they keep their length."""
        whole = self.squares.sqrt()
        for rows, m in zip(self.rows(), self.magnitude):
            whole[rows] = m.detach()
        return whole

    def set_magnitude(self, whole: torch.Tensor):
        for rows, m in zip(self.rows(), self.magnitude):
            m.copy_(whole[rows])

    def merged(self, W: torch.Tensor) -> torch.Tensor:
        V = super().merged(W)
        transposed = getattr(self.base_layer, "fan_in_fan_out", False)
        g = self.factors(V.norm(dim=0 if transposed else 1))
        return V * (g if transposed else g[:, None])


def rows_of(base: nn.Module) -> torch.Tensor:
    """W (out, in) of any kind of layer."""
    if isinstance(base, FrozenLinear):
        return base.dequantize()
    W = base.weight.detach()
    return W.t() if getattr(base, "fan_in_fan_out", False) else W


def product(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x (R, in) float32 -> x W^T (R, out), in float32."""
    if isinstance(base, FrozenLinear):
        return base.times_transposed(x)
    W = rows_of(base)
    return F.linear(x, W) if W.dtype == x.dtype else half.times_transposed(x, W)


def inject(model: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, targets=None,
           rslora: bool = False) -> nn.Module:
    """lora.inject with magnitudes. Raises UserError as it does, and for the head: its product is part of the loss."""
    return lora.inject(model, r, alpha, dropout, targets, rslora, layer=DoRALinear)
