"""What a card needs for tensors: PyTorch's caching allocator, in its outlines, fed with the ledger's births and deaths.

`max_memory_allocated` is more than the sum of the tensors, and what the card must have, `max_memory_reserved`, is more.
CUDA's own malloc is slow, so PyTorch takes large slabs from it (it calls them segments) and cuts them into blocks
(c10/cuda/CUDACachingAllocator.cpp):

    a request     is rounded up to 512 bytes; up to 1 MiB it is "small", and small and large blocks never share a slab
    a free block  serves it if it is large enough: the smallest such one
    otherwise     a new slab: 2 MiB for small ones, 20 MiB below 10 MiB, else the request rounded up to 2 MiB
    the rest      of the block stays free, if it is worth it: 512 bytes of a small one, more than 1 MiB of a large one
                  (else the whole block counts as allocated: up to 1 MiB a tensor that nobody asked for)
    a dead block  joins its free neighbours in the slab; slabs are not given back

Worked example: 3 tensors of 7 MiB. The first takes a slab of 20 MiB and leaves 13, the second leaves 6; the third needs a
slab of its own. Allocated 21 MiB, reserved 40. What is reserved and not allocated is fragmentation.
"""
from bisect import bisect_left, insort

MiB = 2**20


class Block:
    def __init__(self, size: int, before=None, after=None):
        self.size, self.before, self.after, self.free = size, before, after, True


class CachingAllocator:
    """`allocated` and `reserved` bytes now, `allocated_peak` and `reserved_peak` (equal to `reserved`) so far."""

    def __init__(self):
        self.pools: dict[bool, list] = {True: [], False: []}  # small or not: (size, age, free block), sorted
        self.allocated = self.allocated_peak = self.reserved = self.age = 0

    def allocate(self, size: int) -> tuple[Block, bool]:
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
        self.age += 1
        insort(self.pools[small], (block.size, self.age, block))


def replay(events: list[int], sizes: list[int]) -> CachingAllocator:
    """A Ledger's events and sizes, through the allocator."""
    cache, blocks = CachingAllocator(), {}
    for n in events:
        if n >= 0 and sizes[n]:  # an empty tensor takes nothing
            blocks[n] = cache.allocate(sizes[n])
        elif -1 - n in blocks:
            cache.release(*blocks.pop(-1 - n))
    return cache
