"""From a data file to batches of token ids: rows -> messages -> learned pieces -> examples -> micro-batches.

Three decisions, each against a bug that trains quietly and wrongly elsewhere:

* Labels come from pieces. A template turns messages into pieces of text, each either learned (the assistant's words
  and the end-of-text token) or not (the prompt). Each piece is tokenised by itself, and its flag becomes its tokens' flag.
  Nothing is searched for afterwards: a marker such as "### Response:" can tokenise differently in context.
* Inputs and targets are shifted once, here: position i reads ids[i] and must predict ids[i + 1]. An example of n + 1
  tokens is n positions. Padding is known by its length, never by an id: the end-of-text token is a label like any other.
* The examples of an optimizer step are chosen first, the split into micro-batches second. So --batch-size 8 and
  --batch-size 2 --grad-accum 4 take the same steps, and --pack lays out the same examples without padding.
"""
import csv
import datetime
import functools
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

from errors import UserError
from files.tokenizer import Tokenizer, has_tokenizer, load_tokenizer  # noqa: F401  (data.load_tokenizer is the name to use)
from techniques.loss import IGNORE

# ---------------------------------------------------------------------------------------------- templates

# The Alpaca prompt (Taori et al., 2023), written as a chat template so that there is one mechanism, and so that any tool
# that reads chat_template.jinja can talk to the adapter. A user message may carry an `input` beside its content.
ALPACA = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content + '\n\n' }}
{%- elif m.role == 'user' %}
{%- if loop.first or messages[loop.index0 - 1].role == 'system' %}{{ 'Below is an instruction that describes a task' +
(', paired with an input that provides further context' if m.input else '') +
'. Write a response that appropriately completes the request.\n\n' }}{% endif %}
{{- '### Instruction:\n' + m.content + '\n\n' + ('### Input:\n' + m.input + '\n\n' if m.input else '') }}
{%- elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + ('' if loop.last else '\n\n') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""


def load_template(spec: str, tokenizer: Tokenizer) -> str:
    """The jinja source of a template: "auto" (the checkpoint's own, else Alpaca), "chat", "alpaca", or a .jinja file."""
    if spec in ("auto", "chat") and tokenizer.chat_template:
        return tokenizer.chat_template
    if spec == "chat":
        raise UserError(f"--template chat: {tokenizer.folder} has no chat template; use alpaca, or a .jinja file")
    if spec in ("auto", "alpaca"):
        return ("{{ bos_token }}" if tokenizer.adds_bos else "") + ALPACA
    try:
        return Path(spec).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--template {spec}: neither auto, chat, alpaca nor a readable file ({e})") from None


@functools.lru_cache(maxsize=8)  # compiling takes longer than tokenising
def compiled(template: str) -> jinja2.Template:
    def raise_exception(message):
        raise jinja2.TemplateError(message)
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals.update(raise_exception=raise_exception, strftime_now=lambda f: datetime.datetime.now().strftime(f))
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return env.from_string(template)


def render(template: str, messages: list[dict], tokenizer: Tokenizer, prompt: bool = False) -> str:
    """messages -> text. prompt=True ends with whatever makes the model answer."""
    if ".input" not in template:  # a template that knows no `input`: make it part of the content
        messages = [{"role": m["role"], "content": m["content"] + "\n\n" + m["input"]} if m.get("input") else m
                    for m in messages]
    try:
        return compiled(template).render(messages=messages, bos_token=tokenizer.bos or "", eos_token=tokenizer.eos,
                                         add_generation_prompt=prompt, tools=None, documents=None)
    except jinja2.TemplateError as e:
        raise UserError(f"the chat template refused the messages: {e}") from None


def learned_pieces(messages: list[dict], template: str, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Text pieces of a conversation and whether each is learned: the assistant's turns are.

    An assistant turn is what the template adds between "messages so far, now answer" and "messages so far + the answer".
    """
    pieces, done = [], ""
    for i, m in enumerate(messages):
        if m["role"] != "assistant":
            continue
        asked = render(template, messages[:i], tokenizer, prompt=True)
        answered = render(template, messages[:i + 1], tokenizer)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise UserError("the chat template rewrites earlier turns, so its assistant turns cannot be told apart; "
                            "choose another with --template")
        reply = answered[len(asked):]
        end = reply.rfind(tokenizer.eos)
        if end < 0:
            reply, end = reply + tokenizer.eos, len(reply)
        end += len(tokenizer.eos)  # what follows the end token (often a newline) opens the next turn: not the model's
        pieces += [(asked[len(done):], False), (reply[:end], True)]
        done = asked + reply[:end] if answered.startswith(asked + reply[:end]) else answered
    return pieces


# ---------------------------------------------------------------------------------------------- rows

KNOWN = "instruction+output, instruction+response, prompt+completion, messages, conversations, document+summary, or text"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "model": "assistant", "bing": "assistant", "system": "system"}


def read_rows(path) -> list[tuple[str, dict]]:
    """A JSON, JSONL, CSV or TXT file -> [(where, row)]; `where` is "file:line" (or row), for error messages."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at line {e.object[:e.start].count(10) + 1} (byte {e.start}); "
                        f"convert it, e.g. iconv -f latin1 -t utf-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    kind = path.suffix.lower()
    rows = []
    try:
        if kind == ".json":
            value = json.loads(text)
            if not isinstance(value, list):
                raise UserError(f"{path}: expected a JSON array of objects (one object a line is .jsonl)")
            rows = [(f"{path}: row {i}", r) for i, r in enumerate(value, 1)]
        elif kind == ".jsonl":
            for n, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((f"{path}:{n}", json.loads(line)))
        elif kind == ".csv":
            csv.field_size_limit(2 ** 31 - 1)  # documents are longer than the module's 131,072 characters
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            rows = [(f"{path}:{reader.line_num}", r) for r in reader]
        elif kind == ".txt":
            rows = [(f"{path}", {"text": text})]
        else:
            raise UserError(f"{path}: unknown kind of file (only .json, .jsonl, .csv, .txt)")
    except json.JSONDecodeError as e:
        line = e.lineno if kind == ".json" else n
        raise UserError(f"{path}:{line}: broken JSON ({e.msg}, column {e.colno})") from None
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num + 1}: broken CSV ({e})") from None  # it counts the rows that were whole
    if not rows:
        raise UserError(f"{path}: no rows in it")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with named fields, found {type(row).__name__}")
    return rows


def whole(text: str) -> str:
    """Half a character (a text cut in UTF-16 can end in one) -> U+FFFD: it can be neither tokenised nor written."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def to_messages(where: str, row: dict):
    """A row -> its messages, or (text, learned) pieces where no template applies (prompt/completion, text)."""
    def field(name, default=None):
        value = row.get(name, default)
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise UserError(f"{where}: field {name!r} must be text, found {kind}")
        return whole(value)

    for column, role_key, text_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if column in row:
            turns = row[column]
            if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
                raise UserError(f"{where}: field {column!r} must be a list of objects")
            if turns and role_key not in turns[0]:
                role_key, text_key = "role", "content"  # FineTome's cousins mix the two spellings
            messages = []
            for t in turns:
                role, content = t.get(role_key), t.get(text_key)
                if not isinstance(role, str) or role not in ROLES:
                    raise UserError(f"{where}: {column}: role {role!r} is not one of {', '.join(ROLES)}")
                if not isinstance(content, str):
                    raise UserError(f"{where}: {column}: {text_key!r} must be text, found {type(content).__name__}")
                messages.append({"role": ROLES[role], "content": whole(content)})
            return messages
    if "instruction" in row and ("output" in row or "response" in row):
        user = {"role": "user", "content": field("instruction"), "input": field("input", "")}
        return [user, {"role": "assistant", "content": field("output" if "output" in row else "response")}]
    if "document" in row and "summary" in row:
        user = {"role": "user", "content": "Summarize the following document.", "input": field("document")}
        return [user, {"role": "assistant", "content": field("summary")}]
    if "prompt" in row and "completion" in row:
        return [(field("prompt"), False), (field("completion"), True)]
    if "text" in row:
        return [(field("text"), True)]
    raise UserError(f"{where}: no known columns among {', '.join(map(str, row)) or 'none'}; expected {KNOWN}")


def prompt_of(row) -> tuple[list, str] | None:
    """(the prompt, the reply) of a row as to_messages gives it, for samples; None where there is nothing to reply to."""
    if isinstance(row[0], tuple):
        return ([row[0]], row[1][0]) if len(row) == 2 else None
    last = max((i for i, m in enumerate(row) if m["role"] == "assistant"), default=0)
    return (row[:last], row[last]["content"]) if last else None


def prompts(data: "Dataset", n: int) -> list[tuple[list, str]]:
    """Some n (prompt, reply) pairs, spread over the rows; fewer where there are fewer."""
    found = [p for p in map(prompt_of, data.rows) if p]
    return found[::max(1, len(found) // max(1, n))][:n]


# ---------------------------------------------------------------------------------------------- examples

@dataclass
class Example:
    ids: list[int]  # what each position reads
    targets: list[int]  # what it must predict: the next token, or -100
    n_bytes: int = 0  # UTF-8 bytes of the labelled text, for bits per byte

    @property
    def n_labels(self):
        return sum(t != IGNORE for t in self.targets)


@dataclass
class Dataset:
    examples: list[Example]
    rows: list  # as to_messages gives them, for samples
    n_dropped: int = 0  # rows without a labelled token
    n_truncated: int = 0

    def __len__(self):
        return len(self.examples)

    @property
    def n_labels(self):
        return sum(e.n_labels for e in self.examples)


def prompt_ids(row, template: str, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the model is to answer: the same pieces, tokenised the same way, as in training."""
    if isinstance(row[0], tuple):
        return tokenize([row[0]], tokenizer, bos=True)[0]
    pieces = learned_pieces([*row, {"role": "assistant", "content": "x"}], template, tokenizer)
    return tokenize(pieces[:-1], tokenizer, bos=False)[0]


def tokenize(pieces, tokenizer: Tokenizer, bos: bool) -> tuple[list[int], list[bool]]:
    """Pieces of text -> ids, and for each whether it is learned. bos: these are raw texts, no template wrote a BOS."""
    ids = [tokenizer.specials[tokenizer.bos]] if bos and tokenizer.adds_bos else []
    learned = [False] * len(ids)
    for i, (text, learn) in enumerate(pieces):
        if i and not bos and tokenizer.eos in tokenizer.specials and pieces[i - 1][0].endswith(tokenizer.eos):
            # Some tokenizers put a space after a special token, some take one away: let it see the token.
            piece = tokenizer.encode(tokenizer.eos + text, specials=True)[1:]
        else:
            piece = tokenizer.encode(text, specials=not bos, continued=i > 0)
        ids += piece
        learned += [learn] * len(piece)
    return ids, learned


def build(rows, tokenizer: Tokenizer, template: str, max_length: int) -> Dataset:
    """Rows as read_rows gives them -> Dataset. Raises UserError when not one row has a label left.

    Rows longer than max_length positions are cut, except plain text: that becomes consecutive windows, nothing is lost.
    """
    data = Dataset([], [])
    for where, row in tqdm(rows, desc="tokenising", leave=False, disable=len(rows) < 2000):
        row = to_messages(where, row)
        raw = bool(row) and isinstance(row[0], tuple)
        try:
            pieces = row if raw else learned_pieces(row, template, tokenizer)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        if not pieces or not any(text for text, learn in row if learn) if raw else not any(
                m["role"] == "assistant" and m["content"] for m in row):
            data.n_dropped += 1  # only the end-of-text token would be learned
            continue
        ids, learned = tokenize(pieces, tokenizer, bos=raw)
        if raw:
            ids.append(tokenizer.eos_id)
            learned.append(True)
        windows = range(0, len(ids) - 1, max_length) if raw and len(row) == 1 else range(1)
        data.n_truncated += len(windows) == 1 and len(ids) > max_length + 1
        kept = False
        for start in windows:
            x, y = ids[start:start + max_length], ids[start + 1:start + max_length + 1]
            targets = [t if learn else IGNORE for t, learn in zip(y, learned[start + 1:])]
            labelled = [t for t in targets if t != IGNORE]
            if labelled:
                text = tokenizer.decode([t for t in labelled if t != tokenizer.eos_id])
                data.examples.append(Example(x[:len(targets)], targets, len(text.encode())))
                kept = True
        if kept:
            data.rows.append(row)
        else:
            data.n_dropped += 1
    if not data.examples:
        raise UserError(f"{rows[0][0].partition(':')[0]}: all {len(rows)} rows were dropped, none has a token to learn "
                        f"(empty replies, or --max-length {max_length} cuts them off)")
    return data


def split(rows: list, fraction: float, seed: int):
    """(training rows, held-out rows), chosen at random."""
    n = round(len(rows) * fraction)
    if not 0 < n < len(rows):
        raise UserError(f"--val-frac {fraction} of {len(rows)} rows leaves {n} to validate on and {len(rows) - n} to train "
                        f"on; both need at least one (or give --val-data)")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in sorted(order[n:])], [rows[i] for i in sorted(order[:n])]


# ---------------------------------------------------------------------------------------------- batches

WINDOW_STEPS = 16


def plan(lengths: list[int], batch_size: int, grad_accum: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """One epoch: optimizer steps, each a list of micro-batches, each a list of example numbers. Every example once.

    Shuffle; sort by length inside windows of 16 steps, so that neighbours need little padding and the order stays
    random at large; cut into steps; shuffle the steps. The last step may be smaller: the loss divides by its labels.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=rng).tolist()
    per_step = batch_size * grad_accum
    window = per_step * WINDOW_STEPS
    steps = []
    for w in range(0, len(order), window):
        near = sorted(order[w:w + window], key=lambda i: -lengths[i])
        steps += [near[s:s + per_step] for s in range(0, len(near), per_step)]
    shuffled = [steps[i] for i in torch.randperm(len(steps), generator=rng).tolist()]
    return [[step[m:m + batch_size] for m in range(0, len(step), batch_size)] for step in shuffled]


class Plan:
    """Which examples each optimizer step of a run takes: plan() epoch by epoch."""

    def __init__(self, data: Dataset, batch_size: int, grad_accum: int, seed: int, pack: bool = False):
        self.examples, self.pack, self.how = data.examples, pack, (batch_size, grad_accum, seed)
        self.lengths, self.labels = [len(e.ids) for e in data.examples], [e.n_labels for e in data.examples]
        self.steps_per_epoch = math.ceil(len(data) / (batch_size * grad_accum))
        self.epoch = self.steps = None

    def numbers(self, step: int) -> list[list[int]]:
        """The step's micro-batches, as lists of example numbers."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.steps = epoch, plan(self.lengths, *self.how, epoch)
        return self.steps[i]

    def micro_batches(self, step: int) -> list[list[Example]]:
        return [[self.examples[i] for i in m] for m in self.numbers(step)]

    def size(self, step: int) -> tuple[int, int]:
        """What the step's memory grows with: the positions of its largest micro-batch, the labels of the one with most."""
        batches = self.numbers(step)
        lengths = [[self.lengths[i] for i in m] for m in batches]
        return (max(sum(n) if self.pack else len(n) * max(n) for n in lengths),
                max(sum(self.labels[i] for i in m) for m in batches))

    def largest(self, steps: range) -> list[int]:
        """Of `steps` the one with most positions, and the one with most labels, if that is another."""
        sizes = {step: self.size(step) for step in steps}
        most = [max(sizes, key=sizes.get), max(sizes, key=lambda step: sizes[step][::-1])]
        return most[:1] if sizes[most[0]][1] == sizes[most[1]][1] else most


@dataclass
class Batch:
    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), -100 where nothing is learned
    positions: torch.Tensor | None = None  # (B, T) of a packed row
    segments: list[int] | None = None  # the lengths of its examples
    n_examples: int = 0
    n_tokens: int = 0  # without padding
    n_labels: int = 0

    def to(self, device):
        for f in ("ids", "targets", "positions"):
            if getattr(self, f) is not None:
                setattr(self, f, getattr(self, f).to(device, non_blocking=True))
        return self


MULTIPLE = 8


def collate(examples: list[Example], pack: bool = False, limit: int | None = None) -> Batch:
    """Examples -> one rectangle: padded on the right to the longest, or (pack) laid end to end in a single row.

    A packed row, and T where there is a limit, are rounded up to a multiple of 8 (T not beyond the limit): for each new
    shape the CPU's matrix library compiles kernels and keeps them. SmolLM2-135M, 20 steps: 879 MB resident; every length
    as it comes: 1,005.
    """
    lengths = [len(e.ids) for e in examples]
    if pack:
        rest = -sum(lengths) % MULTIPLE  # padding, as one more segment that nothing else attends to
        segments = lengths + [rest] * (rest > 0)
        batch = Batch(torch.tensor([[i for e in examples for i in e.ids] + [0] * rest]),
                      torch.tensor([[t for e in examples for t in e.targets] + [IGNORE] * rest]))
        batch.positions, batch.segments = torch.cat([torch.arange(n) for n in segments])[None], segments
    else:
        longest = max(lengths)
        T = longest if limit is None else min(longest + -longest % MULTIPLE, limit)
        # The id of padding is never looked at: 0 exists in every vocabulary.
        batch = Batch(torch.tensor([e.ids + [0] * (T - len(e.ids)) for e in examples]),
                      torch.tensor([e.targets + [IGNORE] * (T - len(e.ids)) for e in examples]))
    batch.n_examples, batch.n_tokens = len(examples), sum(lengths)
    batch.n_labels = int((batch.targets != IGNORE).sum())
    return batch


def show(examples: list[Example], tokenizer: Tokenizer, colour: bool) -> str:
    """Decoded examples with what is learned marked: green on a terminal, [[...]] elsewhere; the rest is only read."""
    lines = []
    for n, e in enumerate(examples, 1):
        ids = e.ids + [t for t in e.targets[-1:] if t != IGNORE]
        learned = [False] + [t != IGNORE for t in e.targets]
        out, shown, start = "", 0, 0
        for end in range(1, len(ids) + 1):
            if end < len(ids) and learned[end] == learned[start]:
                continue
            text = tokenizer.decode(ids[:end])[shown:]  # by itself, a run could lose its first space
            if end < len(ids):
                text = text.rstrip("\ufffd")  # half a character: the next run has the rest
            shown += len(text)
            out += (f"\x1b[32m{text}\x1b[0m" if colour else f"[[{text}]]") if learned[start] else text
            start = end
        lines.append(f"--- example {n}: {len(e.ids)} positions, {sum(t != IGNORE for t in e.targets)} learned\n{out}")
    return "\n".join(lines)
