"""Several LoRA adapters on one model, each with a name. A batch may mix them: each row goes through its own.

    y[i] = W x[i] + s_a B_a A_a x[i]          a: the adapter of row i. Without one, y[i] = W x[i]: the base model

The product with W is done once for the whole batch. It is almost all of the work: an adapter of rank 8 beside a matrix of
4096 x 4096 has 0.4 % of its products. (Chen et al., "Punica", arXiv:2310.18547, give a GPU a kernel for the small ones.)
In a small model the number of calls counts too: SmolLM2-135M, 8 rows on a CPU core, r = 8, makes 0.82 of the base's tokens
a second with four adapters on q and v (0.92 with one), and 0.73 with four on every layer (0.89).

    with several.adapter(model, "a"): ...             every row goes through "a"; with None, all through the base alone
    several.route(model, ["a", None, ("b", "shared")])    row by row, until the next call; a row may have several

Cost: an adapter more is 4 r (in + out) bytes for each matrix. LLaMA-7B, r = 16 on q and v: 33.6 MB beside 13.5 GB.

Training: `python train.py --task-column task` sends each example to the adapter of its task (run/tasks.py). Rows that do not
go through an adapter give it no gradient, so AdamW leaves it as it is.
"""
import contextlib
import re

import torch
from torch import nn
from torch.nn import functional as F

import lora
from errors import UserError


class Routing:
    """Which rows go through which adapter: {name: their numbers, or None for all rows}. dim: 0, or 1 in a packed row."""

    def __init__(self):
        self.rows: dict[str, torch.Tensor | None] = {}
        self.dim = 0


class SeveralLinear(lora.AdaptedLinear):
    """A frozen linear layer and adapters beside it: `adapters` are LoRALinears of the same base layer."""

    def __init__(self, base: nn.Module, routing: Routing):
        super().__init__()
        self.base_layer, self.routing, self.adapters = base, routing, nn.ModuleDict()

    def forward(self, x):
        h, dim, found, added = self.base_layer(x), self.routing.dim, [], []
        for m, rows in self.active():
            if rows is None:
                return m.adapt(h, x)
            z = m.down(x.index_select(dim, rows)) * m.scale
            found.append(rows)
            added.append(F.linear(z, m.B().to(z.dtype)))
        # In place, and once for all adapters: a copy of h for each would cost more than their products.
        return h.index_add_(dim, torch.cat(found), torch.cat(added, dim)) if found else h

    def active(self) -> list[tuple[lora.LoRALinear, torch.Tensor | None]]:
        """The adapters of this layer that rows go through, and these rows."""
        return [(self.adapters[key(n)], rows) for n, rows in self.routing.rows.items() if key(n) in self.adapters]

    def widen(self, x):
        """As LoRALinear's, for a head (loss.py). It sees labelled tokens, not rows, so all must have the same adapter."""
        if any(rows is not None for rows in self.routing.rows.values()):
            raise UserError("an adapter on the head cannot have a loss over a batch that mixes adapters")
        return next((m.widen(x) for m, _ in self.active()), (x, self.weight))


def key(name: str) -> str:
    """An adapter's name as that of a module. (Some names, such as "type", are taken in nn.ModuleDict.)"""
    return f"for_{name}"


def check_name(name: str):
    if not re.fullmatch(r"[\w-]{1,64}", name, re.ASCII):
        raise UserError(f"an adapter cannot be named {name!r:.80}: only letters, digits, - and _, at most 64, because its "
                        f"folder has this name")


def names(model: nn.Module) -> list[str]:
    """The model's adapters, in the order in which they came."""
    return list(getattr(model, "adapter_names", ()))


def check_known(model: nn.Module, name: str):
    if name not in names(model):
        raise UserError(f"no adapter is named {name!r:.80}; there are {', '.join(names(model)) or 'none'}")


def of(model: nn.Module, name: str) -> dict[str, lora.LoRALinear]:
    """The layers of one adapter: {layer: LoRALinear}. Raises UserError if there is none of this name."""
    check_known(model, name)
    return {n: m.adapters[key(name)] for n, m in layers(model).items() if key(name) in m.adapters}


def layers(model: nn.Module) -> dict[str, SeveralLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SeveralLinear)}


def add(model: nn.Module, name: str, adapters: dict[str, lora.LoRALinear]) -> nn.Module:
    """Put one more adapter on the model. No row goes through it before `adapter` or `route` say so. Raises UserError.

    adapters: {layer: LoRALinear}, such as files.peft_files.read gives.
    """
    check_name(name)
    if getattr(model, "method", None) not in (None, "several"):
        raise UserError(f"the model has a single adapter already ({model.method}); merge it first")
    if name in names(model):
        raise UserError(f"two adapters are named {name}; give another name")
    if any(m.start_A is not None for m in adapters.values()):
        raise UserError(f"adapter {name}: --lora-init loftq and pissa change the frozen weights, which all adapters share; "
                        f"load it alone")
    if any(m.method != "lora" for m in adapters.values()):
        raise UserError(f"adapter {name}: only LoRA adapters can share a model, and this is DoRA; load it alone")
    if not hasattr(model, "routing"):
        model.requires_grad_(False)
        model.routing, model.adapter_names, model.method, model.lora_init = Routing(), [], "several", "default"
    there = layers(model)
    for n, m in adapters.items():
        if n not in there:
            there[n] = SeveralLinear(m.base_layer, model.routing)
            lora.replace(model, n, there[n])
        there[n].adapters[key(name)] = m
        there[n].train(model.training)  # a new module is in training: it would drop out
    model.adapter_names.append(name)
    return model


def remove(model: nn.Module, name: str):
    """Take an adapter off again. Raises UserError if there is none of this name."""
    check_known(model, name)
    for m in layers(model).values():
        if key(name) in m.adapters:
            del m.adapters[key(name)]
    model.adapter_names.remove(name)
    model.routing.rows = {n: rows for n, rows in model.routing.rows.items() if n != name}


def inject(model: nn.Module, adapter_names: list[str], r: int = 8, alpha: float = 16, dropout: float = 0.0,
           targets: str | list[str] | None = None, rslora: bool = False) -> nn.Module:
    """A new adapter for each name, all of the same shape, and freeze every weight. Arguments as lora.inject's."""
    lora.check(r, alpha, dropout)
    lora.refuse_adapters(model)
    there = lora.linears(model)
    chosen = lora.choose(model, targets)
    if model.head_name in chosen:
        raise UserError(f"--lora-targets: {model.head_name} cannot have several adapters, its product is part of the loss")
    for name in adapter_names:
        add(model, name, {n: lora.LoRALinear(there[n], r, alpha, dropout, rslora, parts) for n, parts in chosen.items()})
    return model


# ---------------------------------------------------------------------------------------------- which rows

@contextlib.contextmanager
def adapter(model: nn.Module, name: str | None):
    """`with adapter(model, "a"):` every row goes through "a"; with None, every row through the base alone."""
    if name is not None:
        check_known(model, name)
    routing = getattr(model, "routing", Routing())  # (a model without adapters)
    before = routing.rows, routing.dim
    routing.rows, routing.dim = {} if name is None else {name: None}, 0
    try:
        yield
    finally:
        routing.rows, routing.dim = before


def route(model: nn.Module, adapters: list, segments: list[int] | None = None, device=None):
    """Row i of the next batches goes through adapters[i]: a name, several names, or None for the base alone.

    segments: the lengths in a packed row, whose i-th example goes through adapters[i] (padding has none). It holds until the
    next call, because backward may compute a layer again (techniques/recompute.py).
    """
    if not hasattr(model, "routing") and not any(adapters):
        return
    found: dict[str, list[int]] = {}
    starts = [0]
    for n in segments or ():
        starts.append(starts[-1] + n)
    for i, which in enumerate(adapters):
        for name in (which,) if isinstance(which, str) else which or ():
            check_known(model, name)
            found.setdefault(name, []).extend(range(starts[i], starts[i + 1]) if segments else [i])
    device = device or next(model.parameters()).device
    model.routing.rows = {name: torch.tensor(rows, device=device) for name, rows in found.items()}
    model.routing.dim = 1 if segments else 0
