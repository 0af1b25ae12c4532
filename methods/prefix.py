"""Prefix tuning: train the k and v of n words that every layer sees before the text.

Li and Liang, "Prefix-Tuning" (arXiv:2101.00190), and Liu et al., "P-Tuning v2" (arXiv:2110.07602), section 3: without the
extra network that the first paper trains through.

    layer l:  attention over  [K_l; k], [V_l; v]        K_l, V_l (n, K, D) trained, for each layer its own

It is a KV cache that is already filled with n words when the text begins, at position n. In generation it is put into an
empty slot, and costs nothing more. In training K_l and V_l are joined to the text's k and v, in a packed row to those of
each example, and attention lets every position see them (techniques/attention.py).

Cost: 16 * 2 n K D bytes a layer. GPT-2 124M, n = 20: 12 * 16 * 2 * 20 * 768 = 5.9 MB. Backward keeps n places more of
attention's q, k, v and output: 4 n (C + K D) bytes a row and layer more in 16 bit, 123 kB here. (On a CPU 4 n K D, 61 kB.)

They start at the k and v that the model itself has for some words, so training starts at "the model, after these words".
"""
import torch
from torch import Tensor, nn

import lora
from methods.prompt import before_the_text, check, empty_slots, repeated
from techniques.kv_cache import KVCache


class Prefix(nn.Module):
    """k and v of n virtual tokens: keys_values (n_layer, 2, K, n, D)."""

    def __init__(self, keys_values: Tensor):
        super().__init__()
        self.keys_values = nn.Parameter(keys_values.detach().float().contiguous())


class Before:
    """What a model takes for its KV cache: it puts the prefix before each text.

    cache: the real one, in generation; slots: those whose text begins with this forward.
    """

    def __init__(self, prefix: Prefix, segments: list[int] | None = None, cache: KVCache | None = None, slots=()):
        self.prefix, self.segments, self.cache, self.slots = prefix, segments, cache, slots

    def extend(self, layer: int, k: Tensor, v: Tensor):
        """k, v (B, K, T, D) -> (B, K, n + T, D), and no mask; in a packed row n more for each of its examples."""
        mine = self.prefix.keys_values[layer].to(k.dtype)
        if self.cache is None:
            return self.joined(mine[0], k), self.joined(mine[1], v), None
        self.cache.fill(layer, self.slots, *mine.detach())
        return self.cache.extend(layer, k, v)

    def joined(self, p: Tensor, x: Tensor) -> Tensor:
        p = p.expand(len(x), -1, -1, -1)
        return torch.cat([y for text in x.split(self.segments or x.shape[2], 2) for y in (p, text)], 2)


def inject(model: nn.Module, n: int = 20, ids: list[int] | None = None) -> nn.Module:
    """Put a trained prefix of n tokens before every text, and freeze every weight. Returns the model. Raises UserError.

    ids: the tokens whose k and v it starts from, repeated or cut to n of them; None: small random numbers.
    """
    lora.refuse_adapters(model)
    check(model.config, n)
    c, device = model.config, next(model.parameters()).device
    start = torch.randn(c.n_layer, 2, c.n_kv_head, n, c.head_dim, device=device) * 0.02
    if ids:
        cache = KVCache(c, n, 1)
        with torch.no_grad():
            model.hidden(torch.tensor([repeated(ids, n)], device=device), cache=cache)
        start = torch.stack([torch.cat([k, v]) for k, v in zip(cache.k, cache.v)])
    model.requires_grad_(False)
    model.prefix_tokens = Prefix(start)
    return before_the_text(model, "prefix", n, hidden)


def hidden(model, ids: Tensor, positions: Tensor | None = None, segments: list[int] | None = None, cache=None) -> Tensor:
    """The model's `hidden` with the prefix before each text. Arguments and result are those of the model's own."""
    n, before = model.config.n_virtual, Before(model.prefix_tokens, segments, cache)
    if cache is None:
        positions = n + (torch.arange(ids.shape[1], device=ids.device) if positions is None else positions)
    else:
        before.slots = empty_slots(cache, len(ids))
        for slot in before.slots:
            cache.lengths[slot] = n
        positions = cache.positions(ids)
    return type(model).hidden(model, ids, positions, segments, before)
