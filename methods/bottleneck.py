"""Bottleneck adapters: a small MLP of its own behind attention and behind the MLP of every layer.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (arXiv:1902.00751), section 2.1 and figure 2:

    y' = y + W_up gelu(W_down y + b_down) + b_up        W_down (m, C), W_up (C, m) and b_up start at 0: training starts at y

y is what attention, or the MLP, is about to add to the residual stream. (The paper starts W_up near 0, at 1e-2, and trains
the norms too.)

Cost: 2 adapters a layer of 2 m C + m + C parameters. GPT-2 124M, m = 64: 24 * (2 * 64 * 768 + 64 + 768) = 2.4M, 38 MB.
Backward keeps y, W_down y and its gelu: 2C + 4m bytes a token and adapter in 16 bit.

It does not merge: gelu lies between the two matrices. PEFT has no such adapter, so the files are Bytewise's own.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

import lora
from errors import UserError


class BottleneckLinear(lora.AdaptedLinear):
    """A frozen linear layer, and a bottleneck adapter behind it."""

    def __init__(self, base: nn.Module, size: int):
        super().__init__()
        self.base_layer, device = base, base.weight.device
        self.down = nn.Parameter(torch.empty(size, base.out_features, device=device))
        self.down_bias = nn.Parameter(torch.zeros(size, device=device))
        self.up = nn.Parameter(torch.zeros(base.out_features, size, device=device))
        self.up_bias = nn.Parameter(torch.zeros(base.out_features, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x):
        y = self.base_layer(x)
        inside = F.gelu(F.linear(y, self.down.to(y.dtype), self.down_bias.to(y.dtype)))
        return y + F.linear(inside, self.up.to(y.dtype), self.up_bias.to(y.dtype))


def inject(model: nn.Module, size: int = 64) -> nn.Module:
    """Put an adapter of `size` inner numbers behind attention and MLP, and freeze every weight. Raises UserError."""
    lora.refuse_adapters(model)
    if size < 1:
        raise UserError(f"--bottleneck {size}: must be at least 1")
    model.requires_grad_(False)
    for name in lora.choose(model, list(model.outputs)):
        lora.replace(model, name, BottleneckLinear(model.get_submodule(name), size))
    model.method = "bottleneck"
    return model
