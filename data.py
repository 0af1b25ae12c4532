"""From a data file to batches of token ids: rows -> messages -> learned pieces -> examples -> micro-batches.

Three decisions. Each avoids a mistake that raises no error and trains the wrong thing:

* Labels come from pieces. A template turns messages into pieces of text. A piece is either learned (the assistant's words
  and the end-of-text token) or not (the prompt). Each piece is tokenised by itself, and its tokens are learned if the
  piece is. No marker such as "### Response:" is searched for in the ids: its tokens can differ from context to context.
* Inputs and targets are shifted once, here: position i reads ids[i] and must predict ids[i + 1]. An example of n + 1
  tokens has n positions. Padding is what lies beyond an example's length. It is never recognised by an id, so the
  end-of-text token is a label like any other.
* First the examples of an optimizer step are chosen, then they are split into micro-batches. So --batch-size 8 and
  --batch-size 2 --grad-accum 4 take the same steps, and --pack takes the same examples without padding between them.
"""
import csv
import datetime
import functools
import io
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

from errors import UserError
from files import json_files
from files.json_files import check_file, is_there, without_twins
from files.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, read_text, reason  # noqa: F401
from techniques.loss import IGNORE

# ---------------------------------------------------------------------------------------------- templates

# The Alpaca prompt (Taori et al., 2023), written as a chat template. So there is one mechanism for all prompts, and any tool
# that reads chat_template.jinja can use the adapter. A user message may have an `input` besides its content.
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
    """The jinja source of a template. spec: "auto" (the checkpoint's own, else Alpaca), "chat" (the checkpoint's own),
    "alpaca", or a .jinja file. Raises UserError."""
    if spec in ("auto", "chat") and tokenizer.chat_template:
        return tokenizer.chat_template
    if spec == "chat":
        raise UserError(f"--template chat: {tokenizer.folder} has no chat template; use alpaca, or a .jinja file")
    if spec in ("auto", "alpaca"):
        return ("{{ bos_token }}" if tokenizer.adds_bos else "") + ALPACA
    try:
        check_file(Path(spec))
    except UserError:
        raise UserError(f"--template {spec}: neither auto, chat, alpaca nor a readable file") from None
    return read_text(Path(spec))


SECONDS, MOST = 10, 10**6  # of CPU time for one conversation; characters that a template may add to it


class Sandbox(ImmutableSandboxedEnvironment):
    """A template is a program by a stranger. jinja2's sandbox keeps it away from Python's own functions. This class also
    ends one that takes too long: the time is checked at each call, product, power and piece of output."""
    intercepted_binops = frozenset({"*", "**"})
    end = math.inf

    def check(self, n_characters: int = 0, limit: int = 0):
        if time.thread_time() > self.end:
            raise UserError(f"the chat template takes longer than {SECONDS} s")
        if n_characters > limit:
            raise UserError(f"the chat template writes more than {limit:,} characters")

    def call(self, *args, **kwargs):
        self.check()
        return super().call(*args, **kwargs)

    def call_binop(self, context, operator, left, right):
        lengths = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
        self.check(lengths[0] * lengths[1] if lengths != [left, right] else 0, MOST)
        if operator == "**" and abs(right) > 64:
            raise UserError(f"the chat template takes a power above 64: {reason(right)}")
        return super().call_binop(context, operator, left, right)


@functools.lru_cache(maxsize=8)  # compiling takes longer than tokenising
def compiled(template: str) -> jinja2.Template:
    def raise_exception(message):
        raise jinja2.TemplateError(message)
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals.update(raise_exception=raise_exception, strftime_now=lambda f: datetime.datetime.now().strftime(f))
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return env.from_string(template)


def render(template: str, messages: list[dict], tokenizer: Tokenizer, prompt: bool = False) -> str:
    """messages -> text. With prompt=True the text ends with the words after which the model answers.

    Raises UserError for a template that refuses the messages, fails, takes too long or writes too much.
    """
    if ".input" not in template:  # the template does not use `input`: make it part of the content
        messages = [{"role": m["role"], "content": m["content"] + "\n\n" + m["input"]} if m.get("input") else m
                    for m in messages]
    limit = MOST + 10 * sum(len(m["content"]) + len(m.get("input", "")) for m in messages)
    try:
        jinja, text, n = compiled(template), [], 0
        jinja.environment.end = time.thread_time() + SECONDS
        for piece in jinja.generate(messages=messages, bos_token=tokenizer.bos or "", eos_token=tokenizer.eos,
                                    add_generation_prompt=prompt, tools=None, documents=None):
            text.append(piece)
            jinja.environment.check(n := n + len(piece), limit)
    except jinja2.TemplateError as e:
        raise UserError(f"the chat template refused the messages: {reason(e)}") from None
    except UserError:
        raise
    except Exception as e:  # it can raise whatever a program can: a division by zero, an endless recursion
        raise UserError(f"the chat template fails: {type(e).__name__}: {reason(e)}") from None
    return whole("".join(text))


def learned_pieces(messages: list[dict], template: str, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """A conversation -> pieces of text, and for each whether it is learned. The assistant's turns are learned.

    The template is rendered twice for each assistant turn: `asked` ends where the model must answer, and `answered` contains
    the answer too. The turn is what `answered` has beyond `asked`. Raises UserError if `answered` does not start with it.
    """
    pieces, done = [], ""  # done: the text that the pieces contain so far
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
        end += len(tokenizer.eos)  # what follows the end token (often a newline) belongs to the next piece
        pieces += [(asked[len(done):], False), (reply[:end], True)]
        done = asked + reply[:end] if answered.startswith(asked + reply[:end]) else answered
    return pieces


# ---------------------------------------------------------------------------------------------- rows

KNOWN = "instruction+output, instruction+response, prompt+completion, messages, conversations, document+summary, or text"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "model": "assistant", "bing": "assistant", "system": "system"}


def read_rows(path) -> list[tuple[str, dict]]:
    """A JSON, JSONL, CSV or TXT file -> [(where, row)]. `where` is for error messages: "file:line", or "file: row 3".

    Raises UserError, naming the line, for a file that cannot be read or has no rows.
    """
    path = Path(path)
    try:
        is_there(path)  # refuses a folder, a pipe and a device; a missing file is an OSError below
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at line {e.object[:e.start].count(10) + 1} (byte {e.start}); "
                        f"convert it, e.g. iconv -f latin1 -t utf-8") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    kind = path.suffix.lower()
    rows, n = [], 1
    try:
        if kind == ".json":
            value = json.loads(text, object_pairs_hook=without_twins)
            if not isinstance(value, list):
                raise UserError(f"{path}: expected a JSON array of objects (one object a line is .jsonl)")
            rows = [(f"{path}: row {i}", r) for i, r in enumerate(value, 1)]
        elif kind == ".jsonl":
            for n, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append((f"{path}:{n}", json.loads(line, object_pairs_hook=without_twins)))
        elif kind == ".csv":
            csv.field_size_limit(2 ** 31 - 1)  # documents can be longer than the default, 131,072 characters
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            rows = [(f"{path}:{reader.line_num}", r) for r in reader]
            if twice := [c for c in reader.fieldnames or () if c and reader.fieldnames.count(c) > 1]:
                raise UserError(f"{path}: two columns have the name {json_files.show(twice[0])}")
            if more := [where for where, r in rows if any(r.get(None, ()))]:
                raise UserError(f"{more[0]}: more fields than the header has names; put a field with commas in quotes")
        elif kind == ".txt":
            rows = [(f"{path}", {"text": text})]
        else:
            raise UserError(f"{path}: unknown kind of file (only .json, .jsonl, .csv, .txt)")
    except json.JSONDecodeError as e:
        line = e.lineno if kind == ".json" else n
        raise UserError(f"{path}:{line}: broken JSON ({e.msg}, column {e.colno})") from None
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits; 10,000 brackets inside each other
        where = path if kind == ".json" else f"{path}:{n}"
        raise UserError(f"{where}: JSON that cannot be read ({reason(e)})") from None
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num + 1}: broken CSV ({e})") from None  # line_num: of the last good row
    if not rows:
        raise UserError(f"{path}: no rows in it")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with named fields, found {type(row).__name__}")
    return rows


def whole(text: str) -> str:
    """Half a character -> U+FFFD. Text that was cut in UTF-16 can end so; it can be neither tokenised nor written."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def to_messages(where: str, row: dict) -> list:
    """A row -> its messages, or its (text, learned) pieces if it needs no template (prompt+completion, text).

    Raises UserError for a row without known columns, or with a wrong type in one of them.
    """
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
                role_key, text_key = "role", "content"  # some datasets use these keys in "conversations" too
            messages = []
            for t in turns:
                role, content = t.get(role_key), t.get(text_key)
                if not isinstance(role, str) or role not in ROLES:
                    raise UserError(f"{where}: {column}: role {json_files.show(role)} is not one of {', '.join(ROLES)}")
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
    columns = reason(", ".join(map(str, row)) or "none")
    raise UserError(f"{where}: no known columns among {columns}; expected {KNOWN}")


def prompt_of(row: list) -> tuple[list, str] | None:
    """A row as to_messages returns it -> (the prompt, the last reply), for samples. None if it has no prompt or no reply."""
    if isinstance(row[0], tuple):
        return ([row[0]], row[1][0]) if len(row) == 2 else None
    last = max((i for i, m in enumerate(row) if m["role"] == "assistant"), default=0)
    return (row[:last], row[last]["content"]) if last else None


def prompts(data: "Dataset", n: int) -> list[tuple[list, str]]:
    """At most n (prompt, reply) pairs, spread evenly over the rows."""
    pairs = [p for p in map(prompt_of, data.rows) if p]
    return pairs[::max(1, len(pairs) // max(1, n))][:n]


# ---------------------------------------------------------------------------------------------- examples

@dataclass
class Example:
    ids: list[int]  # what each position reads
    targets: list[int]  # what it must predict: the next token, or -100 (no label)
    n_bytes: int = 0  # UTF-8 bytes of the labelled text, for bits per byte

    @property
    def n_labels(self) -> int:
        return sum(t != IGNORE for t in self.targets)


@dataclass
class Dataset:
    examples: list[Example]
    rows: list  # as to_messages returns them, for samples
    n_dropped: int = 0  # rows without a labelled token
    n_truncated: int = 0  # rows that were cut to max_length

    def __len__(self):
        return len(self.examples)

    @property
    def n_labels(self) -> int:
        return sum(e.n_labels for e in self.examples)


def prompt_ids(row: list, template: str, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the model must answer: the same pieces as in training, tokenised in the same way."""
    if isinstance(row[0], tuple):
        return tokenize([row[0]], tokenizer, bos=True)[0]
    pieces = learned_pieces([*row, {"role": "assistant", "content": "x"}], template, tokenizer)
    return tokenize(pieces[:-1], tokenizer, bos=False)[0]


def tokenize(pieces: list[tuple[str, bool]], tokenizer: Tokenizer, bos: bool) -> tuple[list[int], list[bool]]:
    """Pieces of text -> ids, and for each id whether it is learned.

    bos: True for raw text, which no template has written. It gets a BOS token if the tokenizer adds one, and a special
    token's name in it is plain text.
    """
    ids = [tokenizer.specials[tokenizer.bos]] if bos and tokenizer.adds_bos else []
    learned = [False] * len(ids)
    for i, (text, learn) in enumerate(pieces):
        if i and not bos and tokenizer.eos in tokenizer.specials and pieces[i - 1][0].endswith(tokenizer.eos):
            # Some tokenizers add a space after a special token, some remove one. So the tokenizer must see this token.
            piece = tokenizer.encode(tokenizer.eos + text, specials=True)[1:]
        else:
            piece = tokenizer.encode(text, specials=not bos, continued=i > 0)
        ids += piece
        learned += [learn] * len(piece)
    return ids, learned


def build(rows: list[tuple[str, dict]], tokenizer: Tokenizer, template: str, max_length: int) -> Dataset:
    """Rows as read_rows returns them -> Dataset. Raises UserError if no row has a labelled token.

    A row longer than max_length positions is cut. Only plain text is not: it becomes consecutive windows of max_length.
    """
    data = Dataset([], [])
    for where, row in tqdm(rows, desc="tokenising", leave=False, disable=len(rows) < 2000):
        row = to_messages(where, row)
        raw = bool(row) and isinstance(row[0], tuple)
        try:
            pieces = row if raw else learned_pieces(row, template, tokenizer)
            if not pieces or not any(text for text, learn in row if learn) if raw else not any(
                    m["role"] == "assistant" and m["content"] for m in row):
                data.n_dropped += 1  # only the end-of-text token would be learned
                continue
            ids, learned = tokenize(pieces, tokenizer, bos=raw)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
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


def split(rows: list, fraction: float, seed: int) -> tuple[list, list]:
    """(training rows, held-out rows), chosen at random; `fraction` of the rows is held out. Raises UserError."""
    n = round(len(rows) * fraction)
    if not 0 < n < len(rows):
        raise UserError(f"--val-frac {fraction} of {len(rows)} rows leaves {n} to validate on and {len(rows) - n} to train "
                        f"on; both need at least one (or give --val-data)")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in sorted(order[n:])], [rows[i] for i in sorted(order[:n])]


# ---------------------------------------------------------------------------------------------- batches

WINDOW_STEPS = 16
PLANNED = 50_000  # steps: about a second


def plan(lengths: list[int], batch_size: int, grad_accum: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """One epoch: a list of optimizer steps. A step is a list of micro-batches, a micro-batch a list of example numbers.

    1. Shuffle all examples, and cut them into windows of 16 steps.
    2. Sort each window by length, so that the examples of a micro-batch need little padding.
    3. Cut the windows into steps, and shuffle the steps. So long and short examples come in random order.

    Every example occurs once. One step may be smaller. This is harmless, because the loss is divided by the step's labels.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=rng).tolist()
    per_step = batch_size * grad_accum
    window = per_step * WINDOW_STEPS
    steps = []
    for w in range(0, len(order), window):
        by_length = sorted(order[w:w + window], key=lambda i: -lengths[i])
        steps += [by_length[s:s + per_step] for s in range(0, len(by_length), per_step)]
    shuffled = [steps[i] for i in torch.randperm(len(steps), generator=rng).tolist()]
    return [[step[m:m + batch_size] for m in range(0, len(step), batch_size)] for step in shuffled]


class Plan:
    """The examples of each optimizer step of a run. plan() is called once for each epoch."""

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

    def sizes(self, step: int) -> list[tuple[int, int, bool]]:
        """(positions, labels, whether gradients exist already) of each micro-batch. Its memory grows with all three."""
        lengths = [[self.lengths[i] for i in m] for m in self.numbers(step)]
        positions = [sum(n) if self.pack else len(n) * max(n) for n in lengths]
        labels = [sum(self.labels[i] for i in m) for m in self.numbers(step)]
        return [(p, n, i > 0) for i, (p, n) in enumerate(zip(positions, labels))]

    def largest(self, steps: range) -> dict[int, list[int]]:
        """{step: its micro-batches that can make the peak of `steps`}: those that no other one exceeds in every respect.

        Of more than 3 epochs and PLANNED steps, only so many are looked at. Later epochs have the same examples in another
        order, so a later micro-batch can still be a little larger.
        """
        front, places = Front(), {}
        for step in steps[:max(PLANNED, 3 * self.steps_per_epoch)]:
            for i, size in enumerate(self.sizes(step)):
                if front.add(size):
                    places[size] = (step, i)
        chosen = {}
        for step, i in sorted(places[size] for size in front.sizes):
            chosen.setdefault(step, []).append(i)
        return chosen


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


@dataclass
class Batch:
    ids: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), -100 where there is no label
    positions: torch.Tensor | None = None  # (1, T) for a packed row
    segments: list[int] | None = None  # the lengths of its examples, and of its padding
    n_examples: int = 0
    n_tokens: int = 0  # without padding
    n_labels: int = 0
    labelled: torch.Tensor | None = None  # (n_labels,): where targets.view(-1) has a label

    def to(self, device) -> "Batch":
        for f in ("ids", "targets", "positions", "labelled"):
            if (tensor := getattr(self, f)) is not None:
                if torch.device(device).type == "cuda":  # the GPU reads pinned memory by itself: the host does not wait
                    tensor = tensor.pin_memory()
                setattr(self, f, tensor.to(device, non_blocking=True))
        return self


MULTIPLE = 8


def collate(examples: list[Example], pack: bool = False, limit: int | None = None) -> Batch:
    """Examples -> a Batch: padded on the right to the longest one, or with `pack` one after another in a single row.

    The length of a packed row is rounded up to a multiple of 8. So is T if there is a `limit`, but not beyond it. Rounding
    gives fewer shapes, and for each shape the CPU's matrix library compiles kernels and keeps them. SmolLM2-135M, 20 steps:
    879 MB RSS, and 1,005 MB without rounding.
    """
    lengths = [len(e.ids) for e in examples]
    if pack:
        rest = -sum(lengths) % MULTIPLE  # padding is one more segment, to which no example attends
        segments = lengths + [rest] * (rest > 0)
        batch = Batch(torch.tensor([[i for e in examples for i in e.ids] + [0] * rest]),
                      torch.tensor([[t for e in examples for t in e.targets] + [IGNORE] * rest]))
        batch.positions, batch.segments = torch.cat([torch.arange(n) for n in segments])[None], segments
    else:
        longest = max(lengths)
        T = longest if limit is None else min(longest + -longest % MULTIPLE, limit)
        # No real token reads the padding, so its id does not matter. 0 exists in every vocabulary.
        batch = Batch(torch.tensor([e.ids + [0] * (T - len(e.ids)) for e in examples]),
                      torch.tensor([e.targets + [IGNORE] * (T - len(e.ids)) for e in examples]))
    batch.n_examples, batch.n_tokens = len(examples), sum(lengths)
    batch.labelled = (batch.targets.view(-1) != IGNORE).nonzero().squeeze(1)  # here: on a GPU the host would wait for it
    batch.n_labels = len(batch.labelled)
    return batch


def show(examples: list[Example], tokenizer: Tokenizer, colour: bool) -> str:
    """Decoded examples. The labelled tokens are marked: green if `colour`, else [[...]]."""
    lines = []
    for n, e in enumerate(examples, 1):
        ids = e.ids + [t for t in e.targets[-1:] if t != IGNORE]
        learned = [False] + [t != IGNORE for t in e.targets]
        out, shown, start = "", 0, 0
        for end in range(1, len(ids) + 1):
            if end < len(ids) and learned[end] == learned[start]:
                continue
            text = tokenizer.decode(ids[:end])[shown:]  # decoded alone, this part could lose its first space
            if end < len(ids):
                text = text.rstrip("\ufffd")  # part of a character: the next part has the rest
            shown += len(text)
            out += (f"\x1b[32m{text}\x1b[0m" if colour else f"[[{text}]]") if learned[start] else text
            start = end
        lines.append(f"--- example {n}: {len(e.ids)} positions, {sum(t != IGNORE for t in e.targets)} learned\n{out}")
    return "\n".join(lines)
