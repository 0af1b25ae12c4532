"""Arithmetic of LoRA adapters: one adapter that adds the weighted sum of what several add. No weights are read.

    D = w1 s1 B1 A1 + w2 s2 B2 A2 + ...           s: each adapter's own alpha / r (rsLoRA: alpha / sqrt(r))

    how       A of the result                     B                                 rank       its B A is
    cat       w1 s1 A1 above w2 s2 A2             B1 beside B2                      R1 + R2    D
    svd       V^T of D's R largest values         U S of them                       R          the nearest to D of rank R
    linear    sqrt(w1 s1) A1 + sqrt(w2 s2) A2     sqrt(w1 s1) B1 + sqrt(w2 s2) B2   R1 = R2    D + terms with B1 A2, B2 A1

The default is cat: it is exact, also for different ranks, and a rank costs 4 (in + out) bytes a layer (LLaMA-7B, q and v:
2.1 MB). svd is for an adapter that must stay small. linear is good only where the A's or the B's are nearly equal. (Where
w s is negative, the root of |w s| is taken, and A gets the sign.) `combine` returns how far the result is from D.

These are cat, svd and linear of PEFT's add_weighted_adapter, with two differences. The result has alpha = rank, so its s is
1; PEFT keeps the first adapter's rsLoRA, and its s is then sqrt(rank). And svd never builds D (out, in): with the thin
[B1, B2] = Q R and [A1; A2]^T = P T, D is Q (R T^T) P^T, and R T^T is only as large as the ranks. 4096 x 4096,
rank 32: 0.3 s, where the SVD of D takes two minutes.

A layer that only some adapters have gets the sum of those, as in PEFT. Parts of a fused matrix stay parts if all its
adapters have the same ones (not with svd). A pissa adapter is s (B A - B0 A0), a sum of rank 2R.
"""
import math

import torch
from torch import nn

import lora
from errors import UserError
from files import method_files, peft_files, weights
from methods import dora

HOW = ("cat", "svd", "linear")


def read(model: nn.Module, folder) -> dict[str, lora.LoRALinear]:
    """The adapters in `folder`, for a model without storage. Raises UserError if they are no plain sum of B A."""
    if (method := method_files.method_of(folder)) != "lora":
        raise UserError(f"{folder} holds an adapter of --method {method}; only LoRA's B A can be added up")
    adapters = peft_files.read(model, folder, device="cpu")
    if any(isinstance(m, dora.DoRALinear) for m in adapters.values()):
        raise UserError(f"{folder} holds a DoRA adapter, which also scales W; only LoRA's B A can be added up")
    init, bits = peft_files.trained_with(folder)
    if init == "loftq" or init == "pissa" and bits in (8, 4):
        raise UserError(f"{folder} was trained with --lora-init {init} over weights in {bits} bit and fits only these, not "
                        f"with others added; merge it (python export.py merge)")
    return adapters


def factors(m: lora.LoRALinear) -> tuple[torch.Tensor, torch.Tensor]:
    """(A (R, in), B (out, R)) of all that training added to W, without s."""
    if m.start_A is None:
        return m.lora_A, m.B()
    return torch.cat([m.lora_A, m.start_A]), torch.cat([m.B(), -m.start_B], 1)


def stacked(pairs, scales) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([c * A for (A, _), c in zip(pairs, scales)]), torch.cat([B for _, B in pairs], 1)


def core(A: torch.Tensor, B: torch.Tensor):
    """B A = Q C P^T with orthonormal Q (out, R') and P (in, R') -> Q, C, P in float64. |B A| is |C|."""
    (Q, R), (P, T) = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().t())
    return Q, R @ T.t(), P


@torch.no_grad()
def combine_layer(name: str, terms: list[tuple[lora.LoRALinear, float]], how: str, rank: int):
    """The adapters of one layer and their weights -> its LoRALinear, |B A - D|^2 and |D|^2. rank: of svd."""
    pairs, scales = [factors(m) for m, _ in terms], [w * m.scale for m, w in terms]
    D = stacked(pairs, scales)
    first, parts, blocks = terms[0][0], terms[0][0].parts, [pairs]  # blocks: for each part, (A, B) of each adapter
    if how == "svd" or any(m.parts != parts or m.start_A is not None for m, _ in terms):
        parts = None
    if parts:
        blocks = list(zip(*(zip(m.lora_A.split(m.r), m.lora_B) for m, _ in terms)))
    if how == "svd":
        Q, C, P = core(*D)
        U, S, Vt = torch.linalg.svd(C)
        made = [((Vt[:rank] @ P.t()).float(), (Q @ U[:, :rank] * S[:rank]).float())]  # (fewer rows, if D has no more)
    elif how == "cat":
        made = [stacked(block, scales) for block in blocks]
    else:
        for A, _ in pairs:
            if len(A) != len(pairs[0][0]):
                raise UserError(f"--how linear: layer {name} has the ranks {len(pairs[0][0])} and {len(A)}, which must be "
                                f"equal; cat and svd take any")
        roots = [math.sqrt(abs(c)) for c in scales]
        made = [(sum(math.copysign(x, c) * A for (A, _), x, c in zip(block, roots, scales)),
                 sum(x * B for (_, B), x in zip(block, roots))) for block in blocks]
    r = len(made[0][0])
    layer = lora.LoRALinear(first.base_layer, r, r, first.dropout, parts=parts, device="cpu")
    layer.lora_A.copy_(torch.cat([A for A, _ in made]))
    for own, (_, B) in zip(layer.lora_B, made):
        own.copy_(B)
    A, B = layer.lora_A, layer.B()
    if not A.isfinite().all() & B.isfinite().all():
        raise UserError(f"layer {name}: the sum is too large for float32; choose smaller weights")
    off, size = (core(*ab)[1].square().sum().item() for ab in ((torch.cat([A, D[0]]), torch.cat([B, -D[1]], 1)), D))
    return layer, off, size


def combine(name: str, adapters: list[tuple[str, float]], how: str = "cat", rank: int | None = None):
    """The model `name` without storage, with the sum of `adapters` (folder, weight) on it; and |B A - D| / |D|."""
    config, model_class, _ = weights.config_of(name)
    model = weights.without_storage(model_class, config)
    all_terms = [(read(model, folder), w) for folder, w in adapters]
    off, size, most = 0.0, 0.0, 0
    largest = max(len(factors(m)[0]) for found, _ in all_terms for m in found.values())
    for layer in [n for n, m in model.named_modules() if any(n in found for found, _ in all_terms)]:
        terms = [(found[layer], w) for found, w in all_terms if layer in found]
        most = max(most, sum(len(factors(m)[0]) for m, _ in terms))
        m, more_off, more = combine_layer(layer, terms, how, rank or largest)
        off, size = off + more_off, size + more
        lora.replace(model, layer, m)
    if rank and rank > most:
        raise UserError(f"--rank {rank}: the sum of these adapters has at most rank {most}; --how cat keeps all of it")
    model.source, model.lora_init, model.method = name, "default", "lora"
    kinds = {peft_files.trained_with(folder)[1] for folder, _ in adapters}
    if len(kinds) == 1 and None not in kinds:  # else the file does not say
        model.bits = kinds.pop()
    return model, math.sqrt(off / size) if size else 0.0
