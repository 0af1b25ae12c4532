"""From a data file to batches of token ids: rows -> messages -> segments -> examples -> micro-batches.

Three decisions, each against a bug that trains quietly and wrongly elsewhere:

* Labels come from segments. A template turns messages into text pieces, each either learned (the assistant's words and
  the end-of-text token) or not (the prompt). Each piece is tokenised by itself, and its flag becomes its tokens' flag.
  Nothing is searched for afterwards: a marker such as "### Response:" can tokenise differently in context.
* Inputs and targets are shifted once, here: position i reads ids[i] and must predict ids[i + 1]. An example of n + 1
  tokens is n positions. Padding is known by its length, never by an id: the end-of-text token is a label like any other.
* The examples of an optimizer step are chosen first, the split into micro-batches second. So --batch-size 8 and
  --batch-size 2 --grad-accum 4 take the same steps, and --pack lays out the same examples without padding.
"""
import base64
import csv
import datetime
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

import weights
from loss import IGNORE
from weights import UserError

# ---------------------------------------------------------------------------------------------- tokenizers

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`, `eos_id`, whichever library does the work.

    encode adds no token of its own and reads "<|endoftext|>" in a user's text as plain characters; only
    `encode(text, specials=True)`, used for what a template writes, turns such names into their ids. continued=True
    means that the text goes on where another piece ended (sentencepiece would put a space in front of it).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        meta = {}
        for f in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / f).is_file():
                meta.update({k: v for k, v in weights.read_json(folder / f).items() if v is not None})
        self.specials: dict[str, int] = {}
        if (folder / "tokenizer.json").is_file():
            self._from_tokenizers(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").is_file():
            data = (folder / "tokenizer.model").read_bytes()
            if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", data):  # Llama 3: lines of base64 and rank
                self._from_tiktoken(data)
            else:
                self._from_sentencepiece(folder / "tokenizer.model")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            self._from_gpt2(folder)
        else:
            raise UserError(f"{folder}: no tokenizer in it (tokenizer.json, tokenizer.model, or vocab.json + merges.txt)")
        self.bos, eos = (self._token_text(meta.get(k)) for k in ("bos_token", "eos_token"))
        self.eos_id = self.specials.get(eos) if eos else None
        self._ids_from_config(folder)
        if self.eos_id is None:
            raise UserError(f"{folder}: no end-of-text token is named in tokenizer_config.json or config.json")
        names = {i: s for s, i in self.specials.items()}
        self.eos = eos or names.get(self.eos_id) or self.decode([self.eos_id])
        self.adds_bos = bool(meta.get("add_bos_token", self.adds_bos)) and bool(self.bos)
        self.chat_template = self._read_template(folder, meta)
        # Does the tokenizer put a space before every text (LLaMA 1 and 2)? Then a piece that continues must drop it.
        self._marker = self._encode("\n", False) if self._encode("a", False) != self._encode("\na", False)[-1:] else None

    @staticmethod
    def _token_text(token):
        return token.get("content") if isinstance(token, dict) else token

    def _ids_from_config(self, folder: Path):
        """The ids that end a generation: the tokenizer's, and those that config.json and generation_config.json add."""
        self.stop_ids = set()
        for f in ("generation_config.json", "config.json"):
            if (folder / f).is_file():
                ids = weights.read_json(folder / f).get("eos_token_id")
                ids = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
                self.stop_ids.update(ids)
                if self.eos_id is None and ids:
                    self.eos_id = ids[0]
        if self.eos_id is not None:
            self.stop_ids.add(self.eos_id)

    @staticmethod
    def _read_template(folder: Path, meta: dict) -> str | None:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        template = meta.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        return template

    def _from_tokenizers(self, path: Path):
        import tokenizers
        try:
            tok = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer ({e})") from None
        self.specials = {t.content: i for i, t in tok.get_added_tokens_decoder().items() if t.special}

        def encode(text, specials):
            tok.encode_special_tokens = not specials  # the library's name for "specials as ordinary text"
            return tok.encode(text, add_special_tokens=False).ids
        self._encode, self.decode = encode, lambda ids: tok.decode(list(ids), skip_special_tokens=False)
        self.adds_bos = len(tok.encode("", add_special_tokens=True).ids) > 0
        self.vocab_size = tok.get_vocab_size()

    def _from_bpe(self, ranks: dict, split: str):
        import tiktoken
        bpe = tiktoken.Encoding(self.folder.name, pat_str=split, mergeable_ranks=ranks, special_tokens=self.specials)
        self._encode = lambda text, specials: bpe.encode(text, allowed_special="all" if specials else set(),
                                                         disallowed_special=())
        self.decode, self.vocab_size = lambda ids: bpe.decode(list(ids)), bpe.n_vocab

    def _from_tiktoken(self, data: bytes):
        ranks = {base64.b64decode(t): int(rank) for t, rank in (line.split() for line in data.splitlines())}
        names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                 "reserved_special_token_2", "reserved_special_token_3", "start_header_id", "end_header_id",
                 "reserved_special_token_4", "eot_id"] + [f"reserved_special_token_{i}" for i in range(5, 251)]
        self.specials = {f"<|{n}|>": len(ranks) + i for i, n in enumerate(names)}
        self._from_bpe(ranks, LLAMA3_SPLIT)
        self.adds_bos = True

    def _from_gpt2(self, folder: Path):
        vocab = weights.read_json(folder / "vocab.json")
        # vocab.json writes bytes as printable characters (GPT-2's bytes_to_unicode): undo it.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        ranks = {}
        for token, i in vocab.items():
            if all(ch in byte_of for ch in token) and not (token.startswith("<|") and token.endswith("|>")):
                ranks[bytes(byte_of[ch] for ch in token)] = i
            else:
                self.specials[token] = i
        # tiktoken merges by rank = id: right only if the ids follow the order of merges.txt, as GPT-2's do.
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merged = [vocab.get(m.replace(" ", "", 1)) for m in lines if m and not m.startswith("#version")]
        if None in merged or merged != sorted(merged):
            raise UserError(f"{folder / 'merges.txt'}: does not match vocab.json's order; bring a tokenizer.json instead")
        self._from_bpe(ranks, GPT2_SPLIT)
        self.adds_bos = False

    def _from_sentencepiece(self, path: Path):
        import sentencepiece
        try:
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise UserError(f"{path}: not a readable sentencepiece model ({e})") from None
        self.specials = {sp.id_to_piece(i): i for i in (sp.bos_id(), sp.eos_id()) if i >= 0}
        marks = re.compile("(" + "|".join(map(re.escape, self.specials)) + ")")

        def encode(text, specials):
            pieces = marks.split(text) if specials else [text]
            return [i for s in pieces if s for i in ([self.specials[s]] if specials and s in self.specials else sp.encode(s))]
        self._encode, self.decode = encode, lambda ids: sp.decode([int(i) for i in ids])
        self.eos_id, self.adds_bos, self.vocab_size = sp.eos_id(), True, sp.get_piece_size()

    def encode(self, text: str, specials: bool = False, continued: bool = False) -> list[int]:
        if continued and self._marker is not None and text:
            return self._encode("\n" + text, specials)[len(self._marker):]  # a newline never merges with what follows
        return self._encode(text, specials)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model: a short name, org/name or a folder."""
    return Tokenizer(weights.find(str(name)))


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


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """Compiled once: jinja takes some 10 ms, and every row is rendered twice; 50,000 rows would wait 15 minutes."""
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
                                         add_generation_prompt=prompt)
    except jinja2.TemplateError as e:
        raise UserError(f"the chat template refused the messages: {e}") from None


def segments(messages: list[dict], template: str, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
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
            reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
            rows = [(f"{path}:{reader.line_num}", r) for r in reader]
        elif kind == ".txt":
            rows = [(f"{path}", {"text": text})]
        else:
            raise UserError(f"{path}: unknown kind of file (only .json, .jsonl, .csv, .txt)")
    except json.JSONDecodeError as e:
        line = e.lineno if kind == ".json" else n
        raise UserError(f"{path}:{line}: broken JSON ({e.msg}, column {e.colno})") from None
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: broken CSV ({e})") from None
    if not rows:
        raise UserError(f"{path}: no rows in it")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with named fields, found {type(row).__name__}")
    return rows


def to_messages(where: str, row: dict):
    """A row -> list of messages, or a list of (text, learned) pieces where no template applies (prompt/completion, text)."""
    def field(name, default=None):
        value = row.get(name, default)
        if not isinstance(value, str):
            raise UserError(f"{where}: field {name!r} must be text, found {'null' if value is None else type(value).__name__}")
        return value

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
                if role not in ROLES:
                    raise UserError(f"{where}: {column}: role {role!r} is not one of {', '.join(ROLES)}")
                if not isinstance(content, str):
                    raise UserError(f"{where}: {column}: {text_key!r} must be text, found {type(content).__name__}")
                messages.append({"role": ROLES[role], "content": content})
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


# ---------------------------------------------------------------------------------------------- examples

@dataclass
class Example:
    ids: list[int]  # what each position reads
    targets: list[int]  # what it must predict: the next token, or -100
    n_bytes: int = 0  # UTF-8 bytes of the labelled text, for bits per byte


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
        return sum(t != IGNORE for e in self.examples for t in e.targets)


def prompt_ids(row, template: str, tokenizer: Tokenizer) -> list[int]:
    """The ids after which the model is to answer: the same pieces, tokenised the same way, as in training."""
    if isinstance(row[0], tuple):
        return tokenize([row[0]], tokenizer, bos=True)[0]
    pieces = segments([*row, {"role": "assistant", "content": "x"}], template, tokenizer)
    return tokenize(pieces[:-1], tokenizer, bos=False)[0]


def tokenize(pieces, tokenizer: Tokenizer, bos: bool) -> tuple[list[int], list[bool]]:
    """Pieces of text -> ids, and for each whether it is learned. bos: these are raw texts, no template wrote a BOS."""
    ids = [tokenizer.specials[tokenizer.bos]] if bos and tokenizer.adds_bos else []
    learned = [False] * len(ids)
    for i, (text, learn) in enumerate(pieces):
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
        pieces = row if raw else segments(row, template, tokenizer)
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


def collate(examples: list[Example], pack: bool = False) -> Batch:
    """Examples -> one rectangle: padded on the right to the longest, or (pack) laid end to end in a single row."""
    lengths = [len(e.ids) for e in examples]
    if pack:
        batch = Batch(torch.tensor([[i for e in examples for i in e.ids]]), torch.tensor([[t for e in examples for t in e.targets]]))
        batch.positions, batch.segments = torch.cat([torch.arange(n) for n in lengths])[None], lengths
    else:
        T = max(lengths)  # the id of padding is never looked at: 0 exists in every vocabulary
        batch = Batch(torch.tensor([e.ids + [0] * (T - len(e.ids)) for e in examples]),
                      torch.tensor([e.targets + [IGNORE] * (T - len(e.ids)) for e in examples]))
    batch.n_examples, batch.n_tokens = len(examples), sum(lengths)
    batch.n_labels = int((batch.targets != IGNORE).sum())
    return batch


def show(examples: list[Example], tokenizer: Tokenizer, colour: bool) -> str:
    """Decoded examples with what is learned marked: green on a terminal, [[...]] elsewhere; the rest is only read."""
    lines = []
    for n, e in enumerate(examples, 1):
        out, learned = tokenizer.decode(e.ids[:1]), False
        runs = []
        for i, t in zip([*e.ids[1:], None], e.targets):
            if (t != IGNORE) != learned or not runs:
                runs.append([])
                learned = t != IGNORE
                runs[-1].append(learned)
            runs[-1].append(t if learned else i)
        for is_learned, *ids in runs:
            text = tokenizer.decode([i for i in ids if i is not None])
            out += (f"\x1b[32m{text}\x1b[0m" if colour else f"[[{text}]]") if is_learned else text
        lines.append(f"--- example {n}: {len(e.ids)} positions, {sum(t != IGNORE for t in e.targets)} learned\n{out}")
    return "\n".join(lines)
