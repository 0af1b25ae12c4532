"""How much GPU memory the tensors need: a model of PyTorch's caching allocator, which replays the ledger's events.

A GPU needs more than the bytes of its tensors. `max_memory_allocated` counts the blocks that hold them, which is more.
`max_memory_reserved` counts all that PyTorch has taken from the GPU, which is more again, and which must fit.
CUDA's own malloc is slow. So PyTorch takes large slabs from it (PyTorch's name for a slab is "segment") and cuts them into
blocks. The rules, from c10/cuda/CUDACachingAllocator.cpp:

    request     Its size is rounded up to a multiple of 512 bytes. Up to 1 MiB it is "small". Small and large blocks never
                share a slab.
    free block  The smallest free block that is large enough serves the request.
    new slab    If there is none, PyTorch takes a slab: 2 MiB for a small request, 20 MiB for a large one below 10 MiB, else
                the request rounded up to a multiple of 2 MiB.
    rest        The rest of the block becomes a free block: in a small one if it has 512 bytes, in a large one if it has
                more than 1 MiB. A smaller rest stays in the block and counts as allocated: up to 1 MiB too much a tensor.
    release     A released block joins its free neighbours in the slab. Slabs are not given back.

Worked example: three tensors of 7 MiB. The first takes a slab of 20 MiB and leaves 13 MiB. The second leaves 6 MiB, so the
third needs a slab of its own. Allocated: 21 MiB. Reserved: 40 MiB. The difference is fragmentation.
"""
from bisect import bisect_left, insort

MiB = 2**20


class Block:
    """A piece of a slab. `before` and `after`: its neighbours in the slab, or None at an end."""

    def __init__(self, size: int, before=None, after=None):
        self.size, self.before, self.after, self.free = size, before, after, True


class CachingAllocator:
    """`allocated` and `reserved`: bytes now. `allocated_peak`: the largest so far; `reserved` is its own peak."""

    def __init__(self):
        self.pools: dict[bool, list] = {True: [], False: []}  # the free blocks, small or not: (size, age, block), sorted
        self.allocated = self.allocated_peak = self.reserved = self.age = 0

    def allocate(self, size: int) -> tuple[Block, bool]:
        """Serve a request of `size` bytes -> (its block, whether the block is small); `release` takes both."""
        size = max(512, -(-size // 512) * 512)
        small = size <= MiB
        pool = self.pools[small]
        if (i := bisect_left(pool, (size,))) < len(pool):
            *_, block = pool.pop(i)
        else:
            block = Block(2 * MiB if small else 20 * MiB if size < 10 * MiB else -(-size // (2 * MiB)) * 2 * MiB)
            self.reserved += block.size
        rest = block.size - size
        if rest >= (512 if small else MiB + 1):
            after = Block(rest, block, block.after)
            if block.after:
                block.after.before = after
            block.size, block.after = size, after
            self.put(after, small)
        block.free = False
        self.allocated += block.size
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        return block, small

    def release(self, block: Block, small: bool):
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other and other.free:
                self.pools[small] = [entry for entry in self.pools[small] if entry[2] is not other]
                block = self.join(*((other, block) if other is block.before else (block, other)))
        self.put(block, small)

    def join(self, first: Block, second: Block) -> Block:
        first.size, first.after = first.size + second.size, second.after
        if second.after:
            second.after.before = first
        return first

    def put(self, block: Block, small: bool):
        """Put a free block into its pool. Of blocks of one size the oldest is used first."""
        self.age += 1
        insort(self.pools[small], (block.size, self.age, block))


def replay(events: list[int], sizes: list[int]) -> CachingAllocator:
    """The allocator after a Ledger's `events` (births and deaths) of tensors with these `sizes` in bytes."""
    cache, blocks = CachingAllocator(), {}
    for n in events:
        if n >= 0 and sizes[n]:  # an empty tensor takes nothing
            blocks[n] = cache.allocate(sizes[n])
        elif -1 - n in blocks:
            cache.release(*blocks.pop(-1 - n))
    return cache
