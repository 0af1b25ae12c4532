"""(IA)^3: train one factor for each number of k, of v, and of the MLP's inside.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (arXiv:2205.05638),
section 3.3:

    k = l_k * (W_k x + b_k)      v = l_v * (W_v x + b_v)      mlp = W_down (l * inside) + b_down        all l start at 1

where `inside` is what the MLP's last matrix reads: gelu(W x), or silu(gate) * up. So k and v are scaled behind their
matrix, and the MLP before its last one.

Cost: 16 (2 K D + F) bytes a layer, GPT-2 124M 12 * 16 * (2 * 768 + 3072) = 0.88 MB. For the gradient of l backward keeps
k, v and the MLP's inside: 2 (2 K D + F) bytes a token and layer in 16 bit; of GPT-2's fused matrix q too, 2 (3 C + F).

It merges: l goes into the rows of W_k and W_v and into their biases, or into the columns of W_down, whose bias stays.
"""
import torch
from torch import nn

import lora


class IA3Linear(lora.AdaptedLinear):
    """A frozen linear layer with factors for its inputs (on_input), or for its outputs: of some `parts`, or of all."""

    def __init__(self, base: nn.Module, on_input: bool, parts: tuple[str, ...] | None = None, device=None):
        super().__init__()
        self.base_layer, self.on_input, self.parts = base, on_input, parts
        n = base.in_features if on_input else sum(base.parts[p] for p in parts) if parts else base.out_features
        self.factor = nn.Parameter(torch.ones(n, device=device or base.weight.device))

    def factors(self) -> torch.Tensor:
        """One for each input or output, 1 for those of the other parts."""
        if not self.parts:
            return self.factor
        own = dict(zip(self.parts, self.factor.split([self.base_layer.parts[p] for p in self.parts])))
        return torch.cat([own[p] if p in own else self.factor.new_ones(n) for p, n in self.base_layer.parts.items()])

    def forward(self, x):
        if self.on_input:
            return self.base_layer(x * self.factors().to(x.dtype))
        y = self.base_layer(x)
        return y * self.factors().to(y.dtype)

    def merged(self, W: torch.Tensor) -> torch.Tensor:
        """W of the base layer, in the checkpoint's layout, with the factors in it."""
        transposed = getattr(self.base_layer, "fan_in_fan_out", False)
        return W * (self.factors() if self.on_input != transposed else self.factors()[:, None])

    def merged_bias(self, b: torch.Tensor) -> torch.Tensor:
        return b if self.on_input else b * self.factors()

    def start_delta(self):
        return 0.0


def places(model: nn.Module) -> dict[str, tuple[bool, tuple[str, ...] | None]]:
    """The layers that get factors: {name: (on_input, parts)}."""
    outputs = lora.choose(model, list(model.keys_and_values))
    return {**{n: (False, parts) for n, parts in outputs.items()},
            **dict.fromkeys(lora.choose(model, [model.outputs[1]]), (True, None))}


def inject(model: nn.Module) -> nn.Module:
    """Put factors on k, v and the MLP, and freeze every weight. Returns the model."""
    lora.refuse_adapters(model)
    return put(model, {n: IA3Linear(model.get_submodule(n), *how) for n, how in places(model).items()})


def put(model: nn.Module, modules: dict[str, IA3Linear]) -> nn.Module:
    model.requires_grad_(False)
    for name, m in modules.items():
        lora.replace(model, name, m.requires_grad_(False))
        m.factor.requires_grad_(True)
    model.method = "ia3"
    return model
