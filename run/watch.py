"""The measured peak of a run: which of its steps the ledger follows, and the largest peak among them.

The ledger (memory.py) makes a step slower, so it does not follow every step. It leaves out the first step, before which
AdamW has no state. Memory grows with a micro-batch's positions and with its labels. So a step is followed unless, for each
of its micro-batches, a followed one had at least as many positions and at least as many labels (data.Front). One of the
followed steps has the peak of the run. The bundled run has 336 steps and follows 11 of them.
"""
import contextlib

import torch

import data
import memory
from run.options import TrainConfig
from techniques.device import device_of


def candidates(done: int, steps: int) -> range:
    """The steps among which the peak is looked for. done: the steps that a resumed run had taken before."""
    return range(min(done + 1, steps - 1), steps)


class PeakWatch:
    """`with watch.step(n): train_step(...)` for each step; then `peak` in bytes, and `by_category`."""

    def __init__(self, model, optimizer, plan: data.Plan, cfg: TrainConfig, done: int):
        self.model, self.optimizer, self.plan, self.device = model, optimizer, plan, cfg.device
        self.candidates = range(0) if cfg.compile else candidates(done, cfg.steps)  # a compiled step cannot be followed
        self.first_timed = candidates(done, cfg.steps).start
        self.front = data.Front()  # the sizes of the micro-batches followed so far
        self.ledger: memory.Ledger | None = None  # of the step with the largest peak
        self.cuda = torch.device(cfg.device).type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(cfg.device)

    def is_larger(self, step: int) -> bool:
        """Whether `step` can set a new peak, compared with the steps that were followed."""
        if step not in self.candidates:
            return False
        larger = [self.front.add(size) for size in self.plan.sizes(step)]  # a list: each size is added
        return any(larger)

    @contextlib.contextmanager
    def step(self, step: int):
        """Yields whether the step's time counts for the speed: it is neither followed nor the first, which warms up."""
        if not self.is_larger(step):
            yield step >= self.first_timed
            return
        kept = device_of(self.device).rooms.values()
        with memory.Ledger(self.model, self.optimizer, kept, "cuda" if self.cuda else None) as ledger:
            yield False
        self.ledger = max(self.ledger or ledger, ledger, key=lambda ledger: ledger.peak)

    @property
    def peak(self) -> int | None:
        """Bytes: on a GPU what its allocator says, else the ledger's live tensors. None if nothing was followed."""
        cuda = memory.cuda_peak(self.device)
        return cuda[0] if cuda else self.ledger.peak if self.ledger else None

    @property
    def reserved(self) -> int | None:
        cuda = memory.cuda_peak(self.device)
        return cuda and cuda[1]

    @property
    def by_category(self) -> dict | None:
        return self.ledger.at_peak if self.ledger else None
