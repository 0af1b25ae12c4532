"""The k and v of all earlier tokens, kept for the next one. Generation needs it; training does not.

A new token attends to the k and v of every earlier token, and these never change. With a cache that keeps them, a new token
costs the work of one token instead of T tokens. The cache takes, in bytes a token (GPT-2 in float32, the others in 16 bit):

    2 * n_layer * n_kv_head * head_dim * bytes a number      GPT-2 124M      2 * 12 * 768 * 4      =  74 kB
                                                             LLaMA-7B        2 * 32 * 4096 * 2     = 524 kB
                                                             Llama 3.2 1B    2 * 16 * 8 * 64 * 2   =  33 kB

The cache has slots, one for each conversation, and each slot has its own length. A forward reads all weights once, for one
row or for eight. So rows that share a forward share its cost. Rows may join and leave between any two forwards
(continuous batching: Yu et al., "Orca", OSDI 2022):

    slot 0    t t t t t t . .    6 tokens      one forward can give slot 0 one token, and slot 2 the first four of a
    slot 1    . . . . . . . .    free          prompt: cache.rows([0, 2], [1, 4]). Row 0 has three tokens of padding on its
    slot 2    . . . . . . . .    free          right, which no token ever sees.

All slots have room for max_length tokens, used or not: slots * max_length * the bytes above. SmolLM2-135M in float32
(46 kB a token), 8 slots of 512 tokens: 189 MB.
"""
import copy

import torch
from torch import Tensor

from errors import UserError


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
    def length(self) -> int:
        """The tokens in the longest slot."""
        return max(self.lengths, default=0)

    def rows(self, slots: list[int], counts: list[int]) -> "KVCache":
        """The same memory, for one forward: its row b adds counts[b] tokens to slot slots[b], and the rest is padding.

        Neighbouring slots in order, such as [2, 3, 4], are read where they are. Others are copied for each layer.
        """
        if len(set(slots)) < len(slots) or len(slots) != len(counts) or min(counts) < 1:
            raise ValueError(f"slots {slots} must be different, and each needs a count of at least 1, not {counts}")
        view = copy.copy(self)  # lengths, k and v are the same lists
        view.slots, view.counts = slots, counts
        return view

    def starts(self, B: int) -> list[int]:
        """The length of each row's slot before the forward."""
        if not self.lengths:
            self.lengths += [0] * B
        slots = self.slots or range(len(self.lengths))
        if len(slots) != B:
            raise ValueError(f"a forward of {B} rows for {len(slots)} slots of the KV cache")
        return [self.lengths[s] for s in slots]

    def positions(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) -> the position of each, (B, T). That of padding exists in the model too, and has no meaning."""
        B, T = ids.shape
        start = torch.tensor(self.starts(B), device=ids.device)[:, None]
        return (start + torch.arange(T, device=ids.device)).clamp(max=self.max_length - 1)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append k, v (B, K, T, D). Returns k and v of each row's tokens so far, (B, K, S, D), and the mask for `attend`.

        S: the length of the longest row. Raises ValueError for more than max_length tokens.
        """
        if layer == 0:
            self.plan(*k.shape[::2], k.device)
        self.allocate(layer, k)
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.source is None:
                kept[self.index, :, self.longest - new.shape[2]:self.longest] = new
            else:
                row, t = self.source
                kept[self.target[0], :, self.target[1]] = new[row, :, t]
        if layer == self.n_layer - 1:  # the tokens count when every layer has added them
            for slot, end in self.ends.items():
                self.lengths[slot] = end
        return self.k[layer][self.index, :, :self.longest], self.v[layer][self.index, :, :self.longest], self.mask

    def allocate(self, layer: int, like: Tensor):
        """Make room for a layer's k and v, if it has none, for heads as in `like` (..., K, T, D)."""
        if self.k[layer] is None:
            K, D = like.shape[-3], like.shape[-1]
            shape = (len(self.lengths), K, self.max_length, D)
            try:  # zeros: places beyond a row's length have the weight 0, but 0 * nan = nan
                self.k[layer], self.v[layer] = like.new_zeros(shape), like.new_zeros(shape)
            except RuntimeError:
                raise UserError(f"the KV cache ({shape[0]} slots of {shape[2]} tokens) does not fit into memory; use a "
                                f"smaller --batch-size or --max-new-tokens") from None

    def fill(self, layer: int, slots: list[int], k: Tensor, v: Tensor):
        """Put k and v (K, n, D) at the first n places of a layer's slots. (The slots' lengths count them already.)"""
        self.allocate(layer, k)
        for slot in slots:
            self.k[layer][slot, :, :k.shape[1]], self.v[layer][slot, :, :k.shape[1]] = k, v

    def plan(self, B: int, T: int, device):
        """What all layers of a forward share: where its tokens go, and what each of them sees."""
        start, slots, counts = self.starts(B), self.slots or list(range(len(self.lengths))), self.counts or [T] * B
        self.ends = {slot: a + n for slot, a, n in zip(slots, start, counts)}
        self.longest = max(self.ends.values())
        if max(counts) != T:
            raise ValueError(f"rows of {T} tokens, padding included, but the longest of {counts} is another")
        if self.longest > self.max_length:
            raise ValueError(f"the KV cache has room for {self.max_length} tokens, not for {self.longest}")
        neighbours = slots == list(range(slots[0], slots[0] + B))
        self.index = slice(slots[0], slots[0] + B) if neighbours else torch.tensor(slots, device=device)
        self.source = self.mask = None
        if min(start) < max(start):  # else all rows write to the same places of their slots (padding is overwritten later)
            self.source = torch.tensor([(b, t) for b in range(B) for t in range(counts[b])], device=device).T
            self.target = torch.tensor([(s, a + t) for s, a, n in zip(slots, start, counts) for t in range(n)],
                                       device=device).T
        if max(start) > 0 and (T > 1 or min(start) < max(start)):  # position t of row b sees s <= start[b] + t
            at = torch.tensor(start, device=device)[:, None] + torch.arange(T, device=device)
            self.mask = torch.arange(self.longest, device=device) <= at[:, None, :, None]  # (B, 1, T, S)

    def release(self, slot: int):
        """Forget a slot's tokens: another conversation can have it. A nan that it holds must not reach that one."""
        for x in (*self.k, *self.v):
            if x is not None:
                x[slot] = 0  # all of it: padding may lie beyond its length
        self.lengths[slot] = 0

    def move(self, slot: int, to: int):
        """Put the tokens of `slot` into the free slot `to`. So slots in use can stay neighbours."""
        for x in (*self.k, *self.v):
            if x is not None:
                x[to, :, :self.lengths[slot]] = x[slot, :, :self.lengths[slot]]
        self.lengths[to] = self.lengths[slot]
        self.release(slot)
