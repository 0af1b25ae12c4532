"""The engine: one thread owns the model. With each forward it gives every running reply a token, and reads more of a prompt.

    step 1    a  b  c            three replies, a token each: one forward of (1, 3) ids
    step 2    a  b  c  d d d d   the first piece of d's prompt joins them (the weights are read once for all)
    step 3    a  b  c  d d       the rest of it
    step 4    a  b  .  d         c has ended; d has its first token

This is continuous batching (Yu et al., "Orca", OSDI 2022) with prompts read in pieces (Agrawal et al., "Sarathi",
arXiv:2308.16369). A token alone costs a forward the time to read all weights, and a piece of a prompt the time of its
products. Together they cost little more than the piece alone. So others go on while a long prompt is read, and that prompt
is not late either.

Each reply has a slot of the KV cache, an adapter and a random generator of its own: it is the same alone and beside others,
up to rounding (generate.py says how much). A slot takes 2 * n_layer * n_kv_head * head_dim numbers for each position.
SmolLM2-135M, float32, 8 slots of 2,048 positions: 755 MB.

Other threads hand in jobs and functions, and take events. Nothing else is shared with them.
"""
import itertools
import math
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from errors import UserError
from files import peft_files
from generate import Reply, step
from methods import several
from techniques.kv_cache import KVCache

PIECE, ECHO_PIECE = 512, 128  # tokens of prompts in one forward; and if the logits of each are wanted, V numbers


class Busy(Exception):
    """The queue is full."""


class Stopped(Exception):
    """The engine takes no more jobs, or it ended before this one began."""


class Late(Exception):
    """The job's deadline came before its turn."""


@dataclass(frozen=True)
class Token:
    """A token of a prompt or a reply, as the model saw it: before penalties, temperature and the others.

    logprob: None for the first of a prompt. top: (id, logprob) of the most likely tokens in its place.
    """
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """What is new of a reply: text that no later token changes, and its tokens if the job asked for their logprobs."""
    text: str = ""
    tokens: tuple[Token, ...] = ()
    n_new: int = 0
    finish_reason: str | None = None  # "stop" or "length": the last event
    error: Exception | None = None  # the last event too


@dataclass(eq=False)
class Adapter:
    """A LoRA adapter that is loaded. key: its name in methods/several.py. A reloaded one gets a new key, so the replies that
    run go on with the weights with which they began."""
    name: str
    folder: str
    key: str
    n_jobs: int = 0
    unloaded: bool = False


@dataclass(eq=False)
class Job:
    """A reply that somebody waits for. emit is called with each Event, in the engine's thread, and must return at once.

    top: None, or how many logprobs are wanted for each token of the reply; with `echo` for the prompt's too. deadline: in
    seconds of time.monotonic(); a reply that runs then ends as if its tokens were used up.
    """
    reply: Reply
    emit: Callable[[Event], None]
    adapter: Adapter | None = None
    top: int | None = None
    echo: bool = False
    deadline: float = math.inf
    arrived: float = field(default_factory=time.monotonic)
    n_read: int = 0  # tokens of the prompt that are in the cache
    n_shown: int = 0  # characters of reply.ready that were emitted
    cancelled: bool = False  # set by anybody: nobody waits any more

    def say(self, tokens=(), **more):
        text = self.reply.ready[self.n_shown:]
        self.n_shown += len(text)
        self.emit(Event(text, tuple(tokens), len(self.reply.new), **more))


def logprobs(logits: torch.Tensor, ids: list[int], top: int) -> list[Token]:
    """logits (n, V), and the tokens that came there -> n Tokens, each with its `top` most likely ones."""
    logs = torch.log_softmax(logits.float(), -1)
    found = logs.topk(top) if top else None
    return [Token(i, logs[n, i].item(), tuple(zip(found.indices[n].tolist(), found.values[n].tolist())) if top else ())
            for n, i in enumerate(ids)]


class Engine:
    """slots: replies that run at the same time; a text has at most model.config.n_positions tokens. waiting: how many more
    may wait for a slot."""

    def __init__(self, model, slots: int = 8, waiting: int = 128):
        self.model, self.n_slots, self.n_waiting = model.eval(), slots, waiting
        self.cache = KVCache(model.config, model.config.n_positions, slots)
        self.running: list[Job] = []  # running[slot]
        self.waiting: deque[Job] = deque()
        self.calls: deque[tuple[Callable, Future]] = deque()
        self.adapters: dict[str, Adapter] = {}
        self.counts = Counter()  # for /metrics
        self.changed, self.stopping = threading.Condition(), False
        self.thread = None  # the one that is in `work`

    # ------------------------------------------------------------------------------------------ from other threads

    def stop(self):
        """End every reply: those that run keep what they have ("length"). Later calls do nothing."""
        with self.changed:
            self.stopping = True
            self.changed.notify()

    def submit(self, jobs: list[Job]):
        """Let the jobs wait for a slot, all or none. Raises Busy, Stopped, and KeyError for an adapter that is unloaded."""
        with self.changed:
            if self.stopping:
                raise Stopped("the server is stopping")
            n = len(self.waiting) + len(jobs) - (self.n_slots - len(self.running))
            if n > self.n_waiting:
                raise Busy(f"{len(self.running)} requests run and {len(self.waiting)} wait; the queue has room for "
                           f"{self.n_waiting}: try again later")
            for job in jobs:
                if job.adapter and job.adapter.unloaded:  # since the request came; there may be newer weights
                    job.adapter = self.adapters[job.adapter.name]
                    job.reply.adapter = job.adapter.key
            for job in jobs:
                if job.adapter:
                    job.adapter.n_jobs += 1
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: list[Job]):
        """Nobody waits for them any more: their slots are free after the present forward."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
            self.changed.notify()

    def call(self, function: Callable) -> Future:
        """Run function() between two forwards. Its result and its errors are the Future's."""
        done = Future()
        with self.changed:
            if self.stopping:
                raise Stopped("the server is stopping")
            self.calls.append((function, done))
            self.changed.notify()
        return done

    # ------------------------------------------------------------------------------------------ adapters (use `call`)

    def warm_up(self):
        """A forward of one token. It makes the KV cache, so a machine with too little memory fails now, and not later."""
        step(self.model, self.cache, [0], [[0]])
        self.cache.release(0)

    def load(self, name: str, folder: str) -> Adapter:
        """Load an adapter, or the newer weights of one. Replies that run keep the older ones. Raises UserError."""
        several.check_name(name)
        taken = several.names(self.model)
        key = next(k for n in itertools.count() if (k := f"{name[:50]}-{n}" if n else name) not in taken)
        peft_files.add(self.model, key, folder)
        with self.changed:
            if name in self.adapters:
                self.unload(name)
            self.adapters[name] = Adapter(name, str(folder), key)
            return self.adapters[name]

    def unload(self, name: str):
        """Forget an adapter. Its weights go when no reply needs them. Raises KeyError."""
        with self.changed:
            adapter = self.adapters.pop(name)
            adapter.unloaded = True
            self.drop_unused(adapter)

    def drop_unused(self, adapter: Adapter):
        if adapter.unloaded and not adapter.n_jobs:
            several.remove(self.model, adapter.key)

    # ------------------------------------------------------------------------------------------ the thread

    @torch.no_grad()
    def work(self):
        try:
            self.serve()
        finally:  # also after an error that is a fault of this file: nobody waits for ever
            self.finish()

    def serve(self):
        while not self.stopping:
            with self.changed:
                while not (self.calls or self.waiting or self.running or self.stopping):
                    self.changed.wait()
                calls, self.calls = self.calls, deque()
            for function, done in calls:
                if not done.set_running_or_notify_cancel():  # nobody waits for it any more
                    continue
                try:
                    done.set_result(function())
                except BaseException as e:
                    done.set_exception(e)
            self.admit()
            if self.running and not self.stopping:
                self.advance()

    def finish(self):
        with self.changed:
            self.stopping = True
            for _, done in self.calls:
                if done.set_running_or_notify_cancel():
                    done.set_exception(Stopped("the server is stopping"))
        while self.waiting:
            self.end(self.waiting.popleft(), error=Stopped("the server is stopping"))
        while self.running:
            self.leave(len(self.running) - 1, finish_reason="length")

    def admit(self):
        """Let those go that nobody waits for, or that are late. Then fill the free slots from the queue."""
        now = time.monotonic()
        for slot in reversed(range(len(self.running))):
            job = self.running[slot]
            if job.cancelled or now > job.deadline:
                self.leave(slot, finish_reason="length")
        with self.changed:
            gone = [job for job in self.waiting if job.cancelled or now > job.deadline]
            for job in gone:
                self.waiting.remove(job)
            while self.waiting and len(self.running) < self.n_slots:
                self.running.append(self.waiting.popleft())
        for job in gone:
            self.end(job, error=Late(f"no slot was free for {now - job.arrived:.0f} s"))

    def advance(self):
        """One forward."""
        reading = sorted((j for j in self.running if j.n_read < len(j.reply.ids)), key=lambda j: j.arrived)
        room = ECHO_PIECE if any(j.echo for j in reading) else PIECE
        pieces = {}  # job -> the next tokens of its prompt
        for job in reading:
            pieces[job] = job.reply.ids[job.n_read:job.n_read + room]
            room -= len(pieces[job])
        slots = [slot for slot, job in enumerate(self.running) if pieces.get(job, True)]
        jobs = [self.running[slot] for slot in slots]
        ids = [pieces.get(job) or job.reply.new[-1:] for job in jobs]
        whole = {b for b, job in enumerate(jobs) if job.echo and job in pieces}
        try:
            logits = step(self.model, self.cache, slots, ids, [job.reply.adapter for job in jobs], whole)
        except Exception as e:  # memory, most likely. The cache may hold a part of this forward: none of them can go on
            traceback.print_exc(file=sys.stderr)
            for slot in reversed(slots):
                self.cache.lengths[slot] = self.cache.max_length  # nothing of it may stay
                self.leave(slot, error=RuntimeError(f"the model failed: {type(e).__name__}"))
            return
        self.counts["forwards"] += 1
        ended = {}
        for slot, job, its_ids, its_logits in zip(slots, jobs, ids, logits):
            try:
                self.take(job, its_ids if job in pieces else [], its_logits)
            except UserError as e:
                ended[slot] = {"error": e}
            else:
                if job.n_read == len(job.reply.ids) and job.reply.finish_reason:
                    ended[slot] = {"finish_reason": job.reply.finish_reason}
        for slot in sorted(ended, reverse=True):
            self.leave(slot, **ended[slot])

    def take(self, job: Job, read: list[int], logits: torch.Tensor):
        """Take a forward's logits (n, V) for a job. read: the tokens of its prompt that were read. Raises UserError."""
        reply, tokens = job.reply, []
        if job.echo and read:
            tokens = [] if job.n_read else [Token(reply.ids[0])]
            if not logits.isfinite().all():  # (with max_tokens 0 no token is chosen, so `add` does not see it)
                raise UserError("the logits are not finite (NaN or infinity): the model or its adapter is damaged")
            following = reply.ids[job.n_read + 1:job.n_read + len(read) + 1]
            tokens += logprobs(logits[:len(following)], following, job.top or 0)
        job.n_read += len(read)
        self.counts["prompt_tokens"] += len(read)
        if job.n_read == len(reply.ids) and not reply.finish_reason:
            reply.add(logits[-1])
            self.counts["generated_tokens"] += 1
            if len(reply.new) == 1:
                self.counts["first_tokens"] += 1
                self.counts["first_token_seconds"] += time.monotonic() - job.arrived
            if job.top is not None:
                tokens += logprobs(logits[-1:], reply.new[-1:], job.top)
            if not reply.finish_reason or tokens:
                return job.say(tokens)
        elif tokens:
            job.say(tokens)

    def leave(self, slot: int, **how):
        """The job in `slot` ends, and the last one takes its slot: slots in use stay neighbours, as attention likes them."""
        self.cache.release(slot)
        job, last = self.running[slot], len(self.running) - 1
        if slot < last:
            self.cache.move(last, slot)
            self.running[slot] = self.running[last]
        self.running.pop()
        self.end(job, **how)

    def end(self, job: Job, **how):
        if job.adapter:
            with self.changed:
                job.adapter.n_jobs -= 1
                self.drop_unused(job.adapter)
        kind = "cancelled" if job.cancelled else "error" if how.get("error") else how["finish_reason"]
        self.counts["ended", kind] += 1
        job.reply.ready = job.reply.text if how.get("finish_reason") else job.reply.ready
        job.say(**how)
