"""LoRA: train a model by training small adapters beside its frozen matrices.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq. 3:

    h = W x + (alpha / r) B A x        W (out, in) frozen,  A (r, in) random,  B (out, r) zero:  training starts at W

Why it saves memory. A trained parameter costs 16 bytes: 4 for itself, 4 for its gradient, 8 for AdamW's two moments. A
frozen weight in 16 bit costs 2. GPT-2 124M, r = 8 on q and v: A and B have 8 * (768 + 768) parameters for each of 24
matrices, 294,912 together.

                       GPT-2 124M, r = 8                                     LLaMA-7B, r = 16
    full fine-tuning   124,439,808 * 16                   = 1991 MB          107.8 GB
    LoRA               124,439,808 * 2 + 294,912 * 16     =  254 MB           13.6 GB

GPT-2 has q, k and v in one matrix `c_attn`. Its adapters on q and v are stored as one: A is the two A's stacked (2r, in),
and B is block diagonal, with zeros in k's rows:

    B = | B_q  0  |      It is saved like this. PEFT adapts only whole matrices. It loads this one as a
        |  0   0  |      c_attn adapter of rank R = 2r, with alpha doubled: alpha / r stays the same.
        |  0  B_v |

files/peft_files.py reads and writes adapters in PEFT's format. `python export.py merge` merges an adapter into the model's
files. Below, r is the rank of one part, and R is the rank of the whole layer's adapter.
"""
import contextlib
import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from errors import UserError
from techniques import lora_init, quant
from techniques.device import type_name


class AdaptedLinear(nn.Module):
    """What a method puts in a linear layer's place (methods/ has others than LoRA). The layer itself is its `base_layer`."""

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias


class LoRALinear(AdaptedLinear):
    """A frozen linear layer and its adapter.

    parts: which parts of W have an adapter each, such as ("q", "v") of c_attn; None: one adapter for all of W.
    """

    method = "lora"  # --method; model.method names the one that a model has
    fits_head = True  # methods/dora.py does not

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
                 parts: tuple[str, ...] | None = None, device=None):
        super().__init__()
        self.base_layer = base
        self.r, self.alpha, self.dropout, self.rslora, self.parts = r, alpha, dropout, rslora, parts
        # rsLoRA (arXiv:2312.03732): with alpha / sqrt(r) the adapter's output has the same size at every rank.
        self.scale = alpha / math.sqrt(r) if rslora else alpha / r
        rows = [base.parts[p] for p in parts] if parts else [base.out_features]
        device = device or base.weight.device
        # Always float32. In bfloat16 a weight of 0.05 does not change when 1e-4 is added: training would have no effect.
        self.lora_A = nn.Parameter(torch.empty(r * len(rows), base.in_features, device=device))
        self.lora_B = nn.ParameterList(torch.zeros(n, r, device=device) for n in rows)
        for a in self.lora_A.split(r):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as PEFT and the authors' code do
        # Copies of A and B as training starts, (R, in) and (out, R), if B does not start at 0 (techniques/lora_init.py).
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def keep_start(self, A: torch.Tensor, B: torch.Tensor):
        self.start_A, self.start_B = (t.detach().to(self.lora_A.device, copy=True) for t in (A, B))

    def rows(self) -> list[slice]:
        """The rows of W that each of lora_B's matrices adds to."""
        if not self.parts:
            return [slice(None)]
        ends = dict(zip(self.base_layer.parts, accumulate(self.base_layer.parts.values())))
        return [slice(ends[p] - self.base_layer.parts[p], ends[p]) for p in self.parts]

    def B(self) -> torch.Tensor:
        """The whole (out, R) matrix: block diagonal over the parts, with zero rows for parts without an adapter."""
        if not self.parts:
            return self.lora_B[0]
        own = dict(zip(self.parts, self.lora_B))
        return torch.block_diag(*[own[p] if p in own else self.lora_A.new_zeros(rows, 0)  # (rows, 0): adds no column
                                  for p, rows in self.base_layer.parts.items()])

    def forward(self, x):
        return self.adapt(self.base_layer(x), x)

    def adapt(self, h, x):
        """The base's output h (..., out) for the input x (..., in) -> h + (alpha / r) B A x."""
        z = self.down(x)
        B = self.B().t().to(z.dtype)
        return torch.addmm(h.flatten(0, -2), z.flatten(0, -2), B, alpha=self.scale).view_as(h)  # h + scale z B^T

    def down(self, x):
        """x (..., in) -> A x (..., R)."""
        return F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))

    def delta(self) -> torch.Tensor:
        """(alpha / r) B A, in the layout of the checkpoint's weight (Conv1D: transposed)."""
        return self.product(self.B(), self.lora_A)

    def start_delta(self) -> torch.Tensor:
        """(alpha / r) B0 A0: what the adapter contained before training. 0 for an adapter that started at B = 0."""
        return torch.zeros(()) if self.start_A is None else self.product(self.start_B, self.start_A)

    def product(self, B, A):
        d = self.scale * (B @ A)  # (out, in)
        return d.t() if getattr(self.base_layer, "fan_in_fan_out", False) else d

    def merged(self, W: torch.Tensor) -> torch.Tensor:
        """The weight W of the base layer, float32, with this adapter in it."""
        return W + self.delta()

    def merged_bias(self, b: torch.Tensor) -> torch.Tensor:
        return b

    def widen(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (..., in) -> [x, (alpha / r) A x] (..., in + R) and [W, B] (out, in + R). For a head (loss.py).

        The product of the two is this layer's output without its bias. The sum W + (alpha / r) B A would not do: in 16 bit
        it rounds a small B A to nothing.
        """
        z = self.down(x) * self.scale
        return torch.cat([x, z], -1), torch.cat([self.weight, self.B().to(self.weight.dtype)], 1)


def is_linear(module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def inject(model: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, targets: str | list[str] | None = None,
           rslora: bool = False, init: str = "default", stored: Callable[[str], torch.Tensor] | None = None,
           layer: type[LoRALinear] = LoRALinear) -> nn.Module:
    """Put adapters on the linear layers that `targets` names, and freeze every other weight. Returns the model.

    targets: names such as ["q_proj", "v_proj"] or ["c_attn"]: a layer matches if its name ends with one of them.
    ["c_attn.q"] is one part of a fused matrix, "all" every linear layer of the blocks, None the layers of q and v.
    init: "default", "loftq" or "pissa" (techniques/lora_init.py). The last two need the weights as the checkpoint stores
    them: stored(name) -> float32, for example files.weights.StoredWeights(model.source).read.
    layer: a subclass of LoRALinear that adapts otherwise (methods/dora.py).
    Raises UserError for r < 1, alpha <= 0, dropout outside [0, 1), a model that already has adapters, a target that matches
    nothing, or an init that is not possible.
    """
    check(r, alpha, dropout)
    refuse_adapters(model)
    if init != "default":
        lora_init.check(init, model.bits, None, alpha)
        if stored is None:
            raise ValueError(f"init={init!r} needs the weights as stored, such as StoredWeights(model.source).read")
    there, chosen = linears(model), choose(model, targets)
    refuse_head(model, chosen, layer)
    model.requires_grad_(False)
    for name, parts in chosen.items():
        replace(model, name, layer(there[name], r, alpha, dropout, rslora, parts))
    model.lora_init, model.method = init, layer.method
    if init != "default":
        lora_init.set_start(adapters(model), init, stored)
    return model


def check(r: int, alpha: float, dropout: float):
    if r < 1:
        raise UserError(f"--lora-r {r}: the rank must be at least 1 (or train every weight with --full)")
    if not 0 < alpha < math.inf:  # with 0, the adapter would add nothing and learn nothing
        raise UserError(f"--lora-alpha {alpha}: must be above 0")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora-dropout {dropout}: must be at least 0 and below 1")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The model's linear layers by their own names, whether something stands in their place or not."""
    return {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if is_linear(m)}


def choose(model: nn.Module, targets: str | list[str] | None) -> dict[str, tuple[str, ...] | None]:
    """The layers that `targets` name: {name: the parts of it, or None for the whole layer}. Raises UserError."""
    there = linears(model)
    chosen: dict[str, set] = {}
    for target in [targets] if isinstance(targets, str) else targets or model.default_targets:
        matching = matches(model, there, target)
        if not matching:
            last_names = {n.rsplit(".", 1)[-1]: m for n, m in there.items()}
            names = [*last_names, *(f"{n}.{p}" for n, m in last_names.items() for p in getattr(m, "parts", ())), "all"]
            raise UserError(f"--lora-targets {target}: no such layer; this model has {', '.join(sorted(names))}")
        for name, part in matching:
            chosen.setdefault(name, set()).add(part)
    return {name: None if None in parts else tuple(p for p in there[name].parts if p in parts)  # in the matrix's order
            for name, parts in chosen.items()}


def refuse_adapters(model: nn.Module):
    if getattr(model, "method", None):
        raise UserError("this model already has adapters; merge them first")


def refuse_head(model: nn.Module, names, layer: type[LoRALinear]):
    if model.head_name in names and not layer.fits_head:
        raise UserError(f"--method {layer.method} cannot adapt {model.head_name}, by whose weight the loss multiplies; "
                        f"--method lora can")


def matches(model: nn.Module, linears: dict, target: str) -> list[tuple[str, str | None]]:
    """The (layer, part) pairs that a target names. The part None is the whole layer."""
    if target == "all":
        return [(n, None) for n in linears if n != model.head_name]
    whole = [(n, None) for n in linears if f".{n}".endswith(f".{target}")]
    layer, _, part = target.rpartition(".")
    return whole or [(n, part) for n, m in linears.items()
                     if f".{n}".endswith(f".{layer}") and part in getattr(m, "parts", ())]


def replace(model: nn.Module, name: str, module: nn.Module):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """What a method has put in the place of linear layers."""
    first = {}  # (of several adapters, each has the base layer too: methods/several.py)
    return {n: m for n, m in model.named_modules()
            if isinstance(m, AdaptedLinear) and first.setdefault(m.base_layer, n) == n}


@contextlib.contextmanager
def disabled(model: nn.Module):
    """`with disabled(model):` without adapters, so the model answers as before training: DPO's reference (docs/dpo.py).

    Raises UserError for virtual tokens, which are no layer's, and for an adapter that did not start at B = 0: its base
    layer alone was never the model.
    """
    changed = layers(model)
    if getattr(model, "method", None) and not changed:
        raise UserError(f"--method {model.method}: its virtual tokens cannot be switched off, and the model without them is "
                        f"needed; use another method")
    if any(m.start_A is not None for m in adapters(model).values()):
        raise UserError("--lora-init loftq and pissa change the frozen weights; the model without adapters is another model")
    try:
        for name, m in changed.items():
            replace(model, name, m.base_layer)
        yield
    finally:
        for name, m in changed.items():
            replace(model, name, m)


# ---------------------------------------------------------------------------------------------- merging

def merge(model: nn.Module) -> nn.Module:
    """W <- W + (alpha / r) B A, or what another method makes of W and of its bias.

    Then the model has no adapters and is as fast as before. Returns the model.
    Only this call merges (train() and eval() do not), and a second call changes nothing. W must be float32: a 16-bit W
    would round the small B A to nothing, and the result would not be the model that was trained.
    Raises UserError, before anything is changed, if W is held in fewer bits, or for a method that cannot be merged.
    """
    changed = layers(model)
    can_merge = changed and all(hasattr(m, "merged") for m in changed.values())
    if getattr(model, "method", None) and not can_merge:
        raise UserError(f"--method {model.method} cannot be merged into the model's weights; use it beside its model")
    for name, m in changed.items():
        if isinstance(m.base_layer, quant.LowBitLinear):
            raise UserError(f"{name} is held in {model.bits} bit, which would round the adapter away; "
                            f"`python export.py merge` uses the weights as the checkpoint stores them")
        if m.base_layer.weight.dtype != torch.float32:
            raise UserError(f"{name} is held in {type_name(m.base_layer.weight.dtype)}: merging into it "
                            f"would not be exact; load the model with bits=32 and its adapter, then merge")
    for name, m in changed.items():
        # A new tensor, not +=: a tied head shares its weight with the embedding, and the embedding must not change.
        m.base_layer.weight = nn.Parameter(m.merged(m.base_layer.weight).detach(), requires_grad=False)
        if m.bias is not None:
            m.base_layer.bias = nn.Parameter(m.merged_bias(m.base_layer.bias).detach(), requires_grad=False)
        replace(model, name, m.base_layer)
        if name == model.head_name:
            model.config.tied_head = False
    model.method = None
    return model
