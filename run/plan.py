"""Which examples each optimizer step of a run takes, and which micro-batches can be the largest.

The plan depends on the lengths of the examples and on the seed alone: so a continued run takes the same steps. All that is
kept of an epoch are two tensors, the order of the examples and the order of the steps: 8 bytes an example.
"""
import math

import torch

from data import Dataset, Example

WINDOW_STEPS = 16
PLANNED = 50_000  # steps


def shuffled(lengths: torch.Tensor, batch_size: int, grad_accum: int, seed: int, epoch: int):
    """One epoch: (order, steps). Step n of the epoch has the examples that stand at place steps[n] * per_step of `order` and
    after it, per_step = batch_size * grad_accum of them. The last ones in `order` may be fewer.

    1. Shuffle all examples, and cut them into windows of 16 steps.
    2. Sort each window by length, so that the examples of a micro-batch need little padding.
    3. Cut the windows into steps, and shuffle the steps. So long and short examples come in random order.

    Every example occurs once. One step may be smaller. This is harmless, because the loss is divided by the step's labels.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=rng)
    per_step = batch_size * grad_accum
    window = per_step * WINDOW_STEPS
    whole = len(order) // window * window
    for part in (order[:whole].view(-1, window), order[whole:].view(1, -1)):
        part.copy_(part.gather(1, lengths[part].sort(dim=1, descending=True, stable=True).indices))
    return order, torch.randperm(math.ceil(len(order) / per_step), generator=rng)


class Plan:
    """The examples of each optimizer step of a run. shuffled() is called once for each epoch."""

    def __init__(self, data: Dataset, batch_size: int, grad_accum: int, seed: int, pack: bool = False, n_virtual: int = 0):
        self.data, self.pack, self.how = data, pack, (batch_size, grad_accum, seed)
        self.n_virtual = n_virtual  # positions before each example (methods/prompt.py)
        self.steps_per_epoch = math.ceil(len(data) / (batch_size * grad_accum))
        self.epoch = self.order = self.steps = None

    def go_to(self, epoch: int):
        if epoch != self.epoch:
            self.epoch, (self.order, self.steps) = epoch, shuffled(self.data.lengths, *self.how, epoch)

    def numbers(self, step: int) -> list[list[int]]:
        """The step's micro-batches, as lists of example numbers."""
        epoch, i = divmod(step, self.steps_per_epoch)
        self.go_to(epoch)
        batch_size, grad_accum, _ = self.how
        first = int(self.steps[i]) * batch_size * grad_accum
        return [m.tolist() for m in self.order[first:first + batch_size * grad_accum].split(batch_size)]

    def micro_batches(self, step: int) -> list[list[Example]]:
        return [[self.data[i] for i in m] for m in self.numbers(step)]

    def sizes(self, step: int) -> list[tuple[int, int, bool]]:
        """(positions, labels, whether gradients exist already) of each micro-batch. Its memory grows with all three."""
        sizes = []
        for i, m in enumerate(self.numbers(step)):
            lengths = self.data.lengths[m] + self.n_virtual
            positions = lengths.sum() if self.pack else len(m) * lengths.max()
            sizes.append((int(positions), int(self.data.labels[m].sum()), i > 0))
        return sizes

    def largest(self, steps: range) -> dict[int, list[int]]:
        """{step: its micro-batches that can make the peak of `steps`}: those that no other one exceeds in every respect.

        Of more than 3 epochs and PLANNED steps, only so many are looked at. Later epochs have the same examples in another
        order, so a later micro-batch can still be a little larger.
        """
        front, places = Front(), {}
        steps = steps[:max(PLANNED, 3 * self.steps_per_epoch)]
        for epoch in range(steps.start // self.steps_per_epoch, math.ceil(steps.stop / self.steps_per_epoch)):
            for size, step, i in self.large_ones(epoch, steps):
                if front.add(size):
                    places[size] = (step, i)
        chosen = {}
        for step, i in sorted(places[size] for size in front.sizes):
            chosen.setdefault(step, []).append(i)
        return chosen

    def large_ones(self, epoch: int, steps: range) -> list[tuple]:
        """(size, step, micro-batch) for a part of an epoch's micro-batches in which each that is exceeded by none is."""
        self.go_to(epoch)
        batch_size, grad_accum, _ = self.how
        missing = -len(self.order) % batch_size  # examples of length 0 fill the last micro-batch
        lengths, labels = (torch.nn.functional.pad(x[self.order], (0, missing)).view(-1, batch_size)
                           for x in (self.data.lengths, self.data.labels))
        lengths += self.n_virtual * (lengths > 0)
        positions = lengths.sum(1) if self.pack else (lengths > 0).sum(1) * lengths.max(1).values
        labels, number = labels.sum(1), torch.arange(len(lengths))
        step_of = torch.empty_like(self.steps)  # the place of each step in the epoch's order of steps
        step_of[self.steps] = torch.arange(len(self.steps))
        step, i = epoch * self.steps_per_epoch + step_of[number // grad_accum], number % grad_accum
        found = []
        for group in (i == 0, i > 0):
            group &= (step >= steps.start) & (step < steps.stop)
            mine = group.nonzero()[:, 0]
            if len(mine):  # most are smaller than the longest one and the one with the most labels: these need no sorting
                p, n = positions[mine], labels[mine]
                mine = mine[(n >= n[p == p.max()].max()) & (p >= p[n == n.max()].max())]
            mine = mine[step[mine].argsort()]  # of equal ones, the first is taken
            mine = mine[(positions[mine] * (int(labels.max()) + 1) + labels[mine]).argsort(descending=True, stable=True)]
            best = torch.cat([torch.tensor([-1]), labels[mine].cummax(0).values[:-1]]) if len(mine) else mine
            mine = mine[labels[mine] > best]
            found += [((int(positions[m]), int(labels[m]), int(i[m]) > 0), int(step[m]), int(i[m])) for m in mine]
        return sorted(found, key=lambda x: x[1:])


class Front:
    """The sizes that may be the largest of all that were added, if memory grows with each of their numbers (a Pareto front).

    Example: of (704, 60), (640, 90) and (600, 80), either of the first two may need the most memory, the third cannot.
    """

    def __init__(self):
        self.sizes: list[tuple] = []

    def add(self, size: tuple) -> bool:
        """Whether `size` exceeds each earlier size in some respect. Then it is kept, and those that it covers are not."""
        if any(covers(other, size) for other in self.sizes):
            return False
        self.sizes = [other for other in self.sizes if not covers(size, other)] + [size]
        return True


def covers(a: tuple, b: tuple) -> bool:
    return all(x >= y for x, y in zip(a, b))
