"""The measured peak of a run: which of its steps the ledger follows, and the largest peak among them.

The ledger (memory.py) makes a step slower, so it does not follow every step. It leaves out the first step, before which
AdamW has no state. Memory grows with a micro-batch's positions and with its labels. So a step is followed unless, for each
of its micro-batches, a followed one had at least as many positions and at least as many labels (Front in plan.py). One of
the followed steps has the peak of the run. The bundled run has 336 steps and follows 11 of them. (Plan.largest finds the
largest ones beforehand, for the prediction.)
"""
import contextlib

import torch

import memory
from run.options import TrainConfig
from run.plan import Front, Plan
from techniques.device import device_of


def candidates(done: int, steps: int) -> range:
    """The steps among which the peak is looked for. done: the steps that a resumed run had taken before."""
    return range(min(done + 1, steps - 1), steps)


class PeakWatch:
    """`with watch.step(n): train_step(...)` for each step. The largest peak so far, in bytes, is in `seen`: "peak",
    "by_category" and "reserved". `seen` is the run's and is saved with it, so the peak is that of all its steps."""

    def __init__(self, model, optimizer, plan: Plan, cfg: TrainConfig, done: int, seen: dict):
        self.model, self.optimizer, self.plan, self.device, self.seen = model, optimizer, plan, cfg.device, seen
        self.candidates = range(0) if cfg.compile else candidates(done, cfg.steps)  # a compiled step cannot be followed
        self.first_timed = candidates(done, cfg.steps).start
        self.front = Front()  # the sizes of the micro-batches followed so far
        self.cuda = torch.device(cfg.device).type == "cuda"

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
        if self.cuda:  # what an evaluation has cached is no part of the step
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        kept = device_of(self.device).rooms.values()
        with memory.Ledger(self.model, self.optimizer, kept, "cuda" if self.cuda else None) as ledger:
            yield False
        if ledger.peak > sum(self.seen["by_category"].values()):
            self.seen["peak"], self.seen["by_category"] = ledger.peak, ledger.at_peak
        if cuda := memory.cuda_peak(self.device):  # the GPU's allocator knows more
            for key, n in zip(("peak", "reserved"), cuda):
                self.seen[key] = max(self.seen[key] or 0, n)
