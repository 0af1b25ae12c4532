"""What a comparison measures: the losses of each example, the replies, time and memory, of one model in several states.

A state is the base model, or the base with one adapter. `routes` names them: {"gpt2-nano": None, "support": "support"} is
the base, and the adapter that methods/several.py has under this name. All states share the base's weights, so an adapter
more costs its own bytes. They take turns batch by batch: if the machine becomes slower meanwhile, it does so for all.

Each state sees the same batches, with the same padding. So an adapter that does nothing (B = 0) has exactly the base's
losses.
"""
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

import torch
from torch import nn
from tqdm import tqdm

import data
import generate
import memory
from errors import UserError
from files import rows
from files.json_files import check
from methods import several
from run import intervals
from techniques.loss import sum_loss

Routes = dict[str, str | None]


@dataclass
class Measured:
    """Of one state. sums, labels (n,): each example's loss in nats, and its labelled tokens. peak: bytes of live tensors
    (memory.py) in the forward of the largest batch. replies, right: to each question, and whether it has the answer."""
    sums: torch.Tensor
    labels: torch.Tensor
    peak: int = 0
    tokens: int = 0
    seconds: float = 0.0
    replies: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    reply_tokens: int = 0
    reply_seconds: float = 0.0

    @property
    def losses(self) -> torch.Tensor:
        """(n,): nats for each labelled token of an example. A short example counts as much as a long one."""
        return self.sums / self.labels

    @property
    def loss(self) -> float:
        """Nats for each labelled token of all examples. A long example counts for more: it is train.py's held-out loss."""
        return float(self.sums.sum() / self.labels.sum())


def sums_of(model: nn.Module, batch: data.Batch) -> torch.Tensor:
    """The loss of each row of a batch without packing, (B,), in nats, summed over the row's labelled tokens."""
    hidden = model.hidden(batch.ids, batch.positions, batch.segments)
    one_by_one = [sum_loss(hidden[i:i + 1], model.head, batch.targets[i:i + 1]) for i in range(len(hidden))]
    return torch.stack(one_by_one).double().cpu()


@torch.no_grad()
def measure(model: nn.Module, routes: Routes, examples: data.Dataset, numbers: torch.Tensor, batch_size: int
            ) -> dict[str, Measured]:
    """Each state's losses on examples[numbers], in the order of `numbers`. Raises UserError where one is not finite."""
    model.eval().requires_grad_(False)  # even without a graph, loss.py makes the gradient of a head that can be trained
    device = next(model.parameters()).device
    found = {label: Measured(torch.zeros(len(numbers), dtype=torch.float64), examples.labels[numbers]) for label in routes}
    longest_first = examples.lengths[numbers].sort(descending=True, stable=True).indices.split(batch_size)
    for i, some in enumerate(tqdm(longest_first, "losses", leave=False, disable=not sys.stderr.isatty())):
        batch = data.collate([examples[n] for n in numbers[some].tolist()], limit=examples.parts[0].file.max_length)
        batch.to(device)
        for label, name in routes.items():
            mine = found[label]
            with several.adapter(model, name):
                if i == 0:  # the largest batch; it also warms up, so it is not timed
                    with memory.Ledger(model, device=None if device.type == "cpu" else device.type) as ledger:
                        sums_of(model, batch)
                    mine.peak = ledger.peak
                start = time.perf_counter()
                mine.sums[some] = sums_of(model, batch)
                mine.seconds += time.perf_counter() - start
            mine.tokens += batch.n_tokens
            if not torch.isfinite(mine.sums[some]).all():
                raise UserError(f"{label}: a loss is not finite (NaN or infinity): the model or its adapter is damaged, or "
                                f"its numbers are too large; try --bits 32")
    return found


# ---------------------------------------------------------------------------------------------- short answers

@dataclass
class Question:
    ids: list[int]  # of the prompt
    answer: str  # what `extract` finds in the reference


def exact(text: str) -> str:
    return text.strip()


def extractor(pattern: str) -> Callable[[str], str | None]:
    """--match: text -> the first group of the pattern's first match, or the whole match if it has no group; None without
    a match. White space around the text is left out first. Raises UserError for a pattern that is none."""
    try:
        compiled = re.compile(pattern)
    except re.error as e:
        raise UserError(f"--match {pattern}: not a regular expression ({e})") from None

    def extract(text: str) -> str | None:
        found = compiled.search(text.strip())
        return found and found[1 if compiled.groups else 0]
    return extract


def questions(examples: data.Dataset, numbers: torch.Tensor, tokenizer, extract, n_positions: int) -> list[Question]:
    """The examples whose reference has an answer, and whose prompt leaves room for a reply. Raises UserError if none has."""
    pairs = [data.prompt_of(examples, i, tokenizer) for i in numbers.tolist()]
    found = [Question(ids, answer) for ids, reference, _ in filter(None, pairs)
             if (answer := extract(reference)) is not None and len(ids) < n_positions]
    if not found:
        raise UserError("none of the examples has a prompt, and a reference in which an answer is found; look at --match, "
                        "and at the rows")
    return found


def answer(model: nn.Module, routes: Routes, asked: list[Question], extract, tokenizer, batch_size: int,
           max_new_tokens: int, found: dict[str, Measured]):
    """Add each state's greedy replies, in the order of `asked`, to `found`, and the time of reading and replying."""
    for label, name in routes.items():
        replies = [generate.Reply(model.config, q.ids, tokenizer, max_new_tokens=max_new_tokens, temperature=0, adapter=name)
                   for q in asked]
        start, mine = time.perf_counter(), found[label]
        bar = tqdm(total=len(asked), desc=f"replies of {label}", leave=False, disable=not sys.stderr.isatty())
        with bar:
            for r in generate.run(model, replies, batch_size):
                bar.update(r.finish_reason is not None)
        mine.reply_seconds = time.perf_counter() - start
        mine.replies, mine.reply_tokens = [r.text for r in replies], sum(len(r.new) for r in replies)
        mine.right = [extract(text) == q.answer for text, q in zip(mine.replies, asked)]


# ---------------------------------------------------------------------------------------------- votes

def read_votes(path) -> list[dict]:
    """--votes: for each pair of names a dict {"a", "b", "wins_a", "wins_b", "ties", "share_a", "interval"}, by name.

    share_a: of the votes that are no ties. Raises UserError, which names file and line, for a malformed row.
    """
    pairs: dict[tuple[str, str], list[int]] = {}
    for where, row in rows.read_rows(path):
        for name, kind in {"time": str, "prompt": str, "a": str, "b": str, "replies": dict, "vote": str}.items():
            check(where, name, row.get(name), kind)
        for side in "ab":
            check(where, f"the reply {side}", row["replies"].get(side), str)
        try:
            datetime.fromisoformat(row["time"].replace("Z", "+00:00"))
        except ValueError:
            raise UserError(f"{where}: time must be as in 2026-07-01T12:00:00, found {row['time']!r:.80}") from None
        if row["vote"] not in ("a", "b", "tie"):
            raise UserError(f"{where}: vote must be a, b or tie, found {row['vote']!r:.80}")
        if row["a"] == row["b"]:
            raise UserError(f"{where}: a and b are both {row['a']!r:.80}: there is nothing to choose")
        pair = tuple(sorted((row["a"], row["b"])))
        pairs.setdefault(pair, [0, 0, 0])[2 if row["vote"] == "tie" else pair.index(row[row["vote"]])] += 1
    return [{"a": a, "b": b, "wins_a": x, "wins_b": y, "ties": ties, "share_a": x / (x + y) if x + y else None,
             "interval": intervals.binomial_interval(x, x + y)} for (a, b), (x, y, ties) in sorted(pairs.items())]


# ---------------------------------------------------------------------------------------------- numbers

def perplexity(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None  # (math.exp of more overflows)


def about(mine: Measured, general: Measured) -> dict:
    """The numbers of one state."""
    n = {"loss": mine.loss, "perplexity": perplexity(mine.loss), "mean_loss": float(mine.losses.mean()),
         "general_loss": general.loss, "tokens_per_s": mine.tokens / mine.seconds, "peak": mine.peak}
    if mine.right:
        n |= {"right": sum(mine.right), "reply_tokens_per_s": mine.reply_tokens / mine.reply_seconds}
    return n


def against(base: Measured, mine: Measured) -> dict:
    """What one state changes: "difference" is its mean, low and high in nats; "worst" the numbers of the five examples that
    lost most; "only_base" and "only_this" count the questions that one of the two alone answers rightly."""
    difference = mine.losses - base.losses
    n = {"difference": intervals.paired_bootstrap(base.losses.numpy(), mine.losses.numpy()),
         "improved": int((difference < 0).sum()), "worst": difference.argsort(descending=True, stable=True)[:5].tolist()}
    if mine.right:
        n["only_base"] = sum(b and not m for b, m in zip(base.right, mine.right))
        n["only_this"] = sum(m and not b for b, m in zip(base.right, mine.right))
        n["p"] = intervals.mcnemar(n["only_base"], n["only_this"])
    return n


def starts_of(examples: data.Dataset, numbers: torch.Tensor, tokenizer, length: int = 100) -> list[str]:
    """The start of each example's text, without a template's first words: what a tenth of the examples begin with."""
    ids = [examples[i].ids for i in numbers.tolist()]
    begins, groups, j = [0] * len(ids), [list(range(len(ids)))], 0
    while groups:  # those whose first j tokens are the same
        by_token: dict[tuple, list[int]] = {}
        for g, members in enumerate(groups):
            for i in members:
                if j + 1 < len(ids[i]):  # a token of each text is left
                    by_token.setdefault((g, ids[i][j]), []).append(i)
        groups, j = [members for members in by_token.values() if len(members) >= max(2, len(ids) / 10)], j + 1
        for i in (i for members in groups for i in members):
            begins[i] = j
    return [" ".join(tokenizer.decode(x[b:b + length]).split())[:length] for x, b in zip(ids, begins)]
