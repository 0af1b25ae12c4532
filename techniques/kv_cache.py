"""The k and v of all earlier tokens, kept for the next one. Generation needs it; training does not.

A new token attends to the k and v of every earlier token, and these never change. With a cache that keeps them, a new token
costs the work of one token instead of T tokens. The cache takes, in bytes a token (GPT-2 in float32, the others in 16 bit):

    2 * n_layer * n_kv_head * head_dim * bytes a number      GPT-2 124M      2 * 12 * 768 * 4      =  74 kB
                                                             LLaMA-7B        2 * 32 * 4096 * 2     = 524 kB
                                                             Llama 3.2 1B    2 * 16 * 8 * 64 * 2   =  33 kB

The cache has slots, one for each conversation, and each slot has its own length. A forward reads all weights once, for one
token or for eight. So texts that share a forward share its cost. They may join and leave between any two forwards
(continuous batching: Yu et al., "Orca", OSDI 2022):

    slot 0    t t t t t t . .    6 tokens      one forward of 5 tokens in one row, (1, 5), can give slot 0 one token, and
    slot 1    . . . . . . . .    free          slot 2 the first four of a prompt: cache.rows([0, 2], [1, 4]). Only
    slot 2    . . . . . . . .    free          attention goes text by text, so there is no padding to compute.

All slots have room for max_length tokens, used or not: slots * max_length * the bytes above. SmolLM2-135M in float32
(46 kB a token), 8 slots of 512 tokens: 189 MB.
"""
import copy

import torch
from torch import Tensor

from errors import UserError


def seen(starts: list[int], n: int, S: int, like: Tensor) -> Tensor | None:
    """The mask (rows, 1, n, S) of rows that add n tokens each to `starts` earlier ones. None: causal attention it is.

    Token t of row b sees the places s <= starts[b] + t: 0 is added to their scores, and -inf to the others, in like's type.
    (The kernel would make this of true and false too, but in each layer anew.)
    """
    if max(starts) == 0 or n == 1 and min(starts) == max(starts):
        return None
    at = torch.tensor(starts, device=like.device)[:, None] + torch.arange(n, device=like.device)
    unseen = torch.arange(S, device=like.device) > at[:, None, :, None]
    return torch.zeros(unseen.shape, dtype=like.dtype, device=like.device).masked_fill_(unseen, -torch.inf)


class KVCache:
    """k and v of every layer, for up to `max_length` tokens in each slot. The models call `positions` and `extend`.

    lengths: the number of tokens in each slot. slots: their number. Without it, each row of the first forward gets one.
    """

    def __init__(self, config, max_length: int, slots: int = 0):
        self.max_length = max_length + getattr(config, "n_virtual", 0)  # (methods/prompt.py and prefix.py)
        self.n_layer, self.lengths = config.n_layer, [0] * slots
        self.k, self.v = [None] * config.n_layer, [None] * config.n_layer  # each (slots, K, max_length, D)
        self.slots = self.counts = None  # all slots, and no padding

    @property
    def nbytes(self) -> int:
        """Bytes, once `allocate` has made it."""
        return sum(x.nbytes for x in (*self.k, *self.v) if x is not None)

    @property
    def length(self) -> int:
        """The tokens in the longest slot."""
        return max(self.lengths, default=0)

    def rows(self, slots: list[int], counts: list[int]) -> "KVCache":
        """The same memory, for one forward of (1, sum(counts)) ids: first counts[0] tokens for slot slots[0], and so on.

        Texts that get one token each share a call of attention where they stand side by side, in slots that are neighbours
        in order, such as [2, 3, 4].
        """
        if len(set(slots)) < len(slots) or len(slots) != len(counts) or min(counts) < 1:
            raise ValueError(f"slots {slots} must be different, and each needs a count of at least 1, not {counts}")
        view = copy.copy(self)  # lengths, k and v are the same lists
        view.slots, view.counts = slots, counts
        return view

    def starts(self, B: int) -> list[int]:
        """The length of each text's slot before the forward."""
        if not self.lengths:
            self.lengths += [0] * B
        if self.slots is None and len(self.lengths) != B:
            raise ValueError(f"a forward of {B} rows for {len(self.lengths)} slots of the KV cache")
        return [self.lengths[s] for s in self.slots or range(B)]

    def positions(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> the position of each, (B, T)."""
        B, T = ids.shape
        counts = self.counts or [T] * B
        places = [a + t for a, n in zip(self.starts(B), counts) for t in range(n)]
        if len(places) != ids.numel():
            raise ValueError(f"{ids.numel()} ids, but the slots of the KV cache get {counts}")
        return torch.tensor(places, device=ids.device).view(B, T)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list]:
        """Append k, v (B, K, T, D). Returns k and v of all slots, (slots, K, max_length, D), and the texts for `attend`.

        Raises ValueError for more than max_length tokens.
        """
        if layer == 0:
            self.plan(k)
        self.allocate(layer, k)
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.target is None:
                (_, _, slot, S, _), = self.texts
                kept[slot, :, S - new.shape[2]:S] = new
            else:
                kept.view(-1, kept.shape[-1]).index_copy_(0, self.target, new.transpose(1, 2).reshape(-1, kept.shape[-1]))
        if layer == self.n_layer - 1:  # the tokens count when every layer has added them
            for slot, end in self.ends.items():
                self.lengths[slot] = end
        return self.k[layer], self.v[layer], self.texts

    def allocate(self, layer: int, like: Tensor):
        """Make room for a layer's k and v, if it has none, for heads as in `like` (..., K, T, D)."""
        if self.k[layer] is None:
            K, D = like.shape[-3], like.shape[-1]
            shape = (len(self.lengths), K, self.max_length, D)
            try:  # zeros: places beyond a row's length have the weight 0, but 0 * nan = nan
                with torch.inference_mode(False):  # outside of this mode, `release` could not change its tensors
                    self.k[layer], self.v[layer] = like.new_zeros(shape), like.new_zeros(shape)
            except RuntimeError:
                raise UserError(f"the KV cache ({shape[0]} slots of {shape[2]} tokens) does not fit into memory; use a "
                                f"smaller --batch-size or --max-new-tokens") from None

    def fill(self, layer: int, slots: list[int], k: Tensor, v: Tensor):
        """Put k and v (K, n, D) at the first n places of a layer's slots. (The slots' lengths count them already.)"""
        self.allocate(layer, k)
        for slot in slots:
            self.k[layer][slot, :, :k.shape[1]], self.v[layer][slot, :, :k.shape[1]] = k, v

    def plan(self, k: Tensor):
        """What all layers of a forward of k (B, K, T, D) share: where its tokens go, which calls of attention it needs.

        texts: a list of (rows, tokens, slots, S, mask). The queries of `tokens`, as (rows, H, tokens / rows, D), see the
        first S places of `slots`, as far as the mask says.
        """
        (B, K, T, _), device = k.shape, k.device
        slots, counts, start = self.slots or list(range(B)), self.counts or [T] * B, self.starts(B)
        self.ends = {slot: a + n for slot, a, n in zip(slots, start, counts)}
        if max(self.ends.values()) > self.max_length:
            raise ValueError(f"the KV cache has room for {self.max_length} tokens, not for {max(self.ends.values())}")
        self.texts, at, b = [], 0, 0
        while b < len(slots):
            end = b + 1
            while counts[b] == 1 and end < len(slots) and counts[end] == 1 and slots[end] == slots[end - 1] + 1:
                end += 1
            n, S = (end - b) * counts[b], max(self.ends[slot] for slot in slots[b:end])
            self.texts.append((end - b, slice(at, at + n), slice(slots[b], slots[b] + end - b), S,
                               seen(start[b:end], counts[b], S, k)))
            at, b = at + n, end
        self.target = None  # a slice is faster to write than places one by one
        if len(slots) > 1:  # the places of the new rows of D numbers, token by token and head by head
            self.target = torch.tensor([(slot * K + head) * self.max_length + a + t for slot, a, n in
                                        zip(slots, start, counts) for t in range(n) for head in range(K)], device=device)

    def release(self, slot: int):
        """Forget a slot's tokens: another conversation can have it. A nan that it holds must not reach that one."""
        for x in (*self.k, *self.v):
            if x is not None:
                x[slot, :, :self.lengths[slot]] = 0
        self.lengths[slot] = 0

    def move(self, slot: int, to: int):
        """Put the tokens of `slot` into the free slot `to`. So slots in use can stay neighbours."""
        for x in (*self.k, *self.v):
            if x is not None:
                x[to, :, :self.lengths[slot]] = x[slot, :, :self.lengths[slot]]
        self.lengths[to] = self.lengths[slot]
        self.release(slot)
