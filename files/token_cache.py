"""The token ids of a data file, in arrays that are mapped into memory from a cache, or made when they are needed.

    tokens    int32, all rows one after another; ~id (so a negative number) where the token is not learned
    starts    int64, where each row begins in `tokens`, and one more: the end. A row without anything to learn is empty
    labels    int32, the learned tokens of each row, its first token not counted: nothing predicts it
    windows   bool, whether the row is plain text, which is cut into windows instead of cut off

In bytes a row of 80 tokens: 4 * 80 + 13 = 333. As Python lists of integers the same row took 5 kB. A million such rows are a
file of 333 MB of which a run reads what it uses: the 13 MB that say where rows are, and the tokens of its steps.

Rows are tokenised in several processes, and the cache keeps the result: bytewise/tokens in $XDG_CACHE_HOME, or in ~/.cache.
An entry's name is a hash of all that its content depends on: the data file, the tokenizer, the template, the columns, and
the program itself. So a changed file has another entry, and none is ever wrong. An entry is two files, NAME.tokens and then
NAME.safetensors; each is written under a temporary name and renamed, and an entry exists if both do. Entries that were not
used for 30 days are removed when another is made. The folder may be deleted at any time.
"""
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from errors import UserError
from files import fingerprint, weights, writing
from files.json_files import check, parse_json
from files.rows import Rows
from techniques.compilation import user_cache

SMALL = 2**22  # bytes of a file that is tokenised by this process, each time anew: that takes 2 s or less
SMALL_PARQUET = 10_000  # rows
PACKED = 8  # how much larger a .gz file may be when it is unpacked
PIECE = 500  # rows that are handed to a process at once
DAYS = 30


@dataclass
class Tokens:
    """What the docstring above says. unused: {a column or key: the rows that have it}. bad: the rows that were skipped;
    reasons: the messages of the first three."""
    tokens: torch.Tensor
    starts: torch.Tensor
    labels: torch.Tensor
    windows: torch.Tensor
    unused: Counter = field(default_factory=Counter)
    bad: int = 0
    reasons: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Piece:
    """Some rows' part of Tokens. ids: the tokens of all of them, as the bytes of int32 numbers. (A tensor that comes from
    another process stays in memory that both share, and keeps a file open: 10 million rows had 20,000 of them.)"""
    ids: bytes
    lengths: list[int]
    labels: list[int]
    windows: list[bool]
    unused: Counter
    bad: int
    reasons: list[str]


def folder() -> Path:
    return user_cache() / "tokens"


def name_of(path: Path, tokenizer: Path, options: dict) -> str:
    """The name of an entry: a hash of all that the tokens depend on. tokenizer: its folder. options: the encoder's."""
    sources = [(Path(__file__).parent / f"{f}.py").read_text(encoding="utf-8")
               for f in ("../data", "rows", "conversations", "template", "token_cache", "tokenizer")]
    packages = [importlib.metadata.version(p) for p in ("jinja2", "tokenizers", "tiktoken", "sentencepiece")]
    date = time.strftime("%Y-%m-%d") if "strftime_now" in options["template"] else None  # it writes the date into a prompt
    files = [fingerprint.of_file(path), fingerprint.of_tokenizer(tokenizer), fingerprint.of_file(tokenizer / "config.json")]
    return fingerprint.of_text(json.dumps([files, path.suffixes, options, sources, packages, date]))


def read_tokens(path: Path, encode: Callable, make_encoder: Callable, tokenizer: Path, options: dict, use_cache: bool,
                limit: int | None) -> Tokens:
    """The tokens of a data file.

    encode([(where, row), ...]) -> Piece. make_encoder(tokenizer, options) makes `encode` in another process. tokenizer: its
    folder. limit: only the first rows are read, and not kept. Raises UserError.
    """
    rows = Rows(path)
    small = rows.size < SMALL_PARQUET if rows.kind == ".parquet" else rows.size * (PACKED if rows.is_packed else 1) < SMALL
    if limit or small:
        return in_memory([encode(islice(rows, limit))])
    if not use_cache:
        return in_memory(list(encoded(rows, make_encoder, tokenizer, options)))
    name = name_of(path, tokenizer, options)
    if made := load(name):
        return made
    changed = path.stat().st_mtime_ns
    where, start = folder(), time.monotonic()
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{where}: token ids cannot be kept there ({e.strerror}); --no-cache does without") from None
    clean(where)
    parts = []
    with writing.atomic(where / f"{name}.tokens") as tmp, open(tmp, "wb") as f:
        for part in encoded(rows, make_encoder, tokenizer, options):
            f.write(part.ids)
            part.ids = b""
            parts.append(part)
    if path.stat().st_mtime_ns != changed:
        raise UserError(f"{path}: the file was changed while it was read; start again")
    made = joined(parts)
    numbers = {"unused": made.unused, "bad": made.bad, "reasons": made.reasons}
    writing.write_tensors(where / f"{name}.safetensors", {k: getattr(made, k) for k in ("starts", "labels", "windows")},
                          {"numbers": json.dumps(numbers)})
    print(f"tokenised {len(made):,} rows of {path} in {time.monotonic() - start:.0f} s; kept in {where} for the next run")
    return load(name)


def in_memory(parts: list[Piece]) -> Tokens:
    """The pieces of a file, in order -> its tokens."""
    made = joined(parts)
    ids = bytearray(b"".join(p.ids for p in parts))
    made.tokens = torch.frombuffer(ids, dtype=torch.int32) if ids else made.tokens
    return made


def joined(parts: list[Piece]) -> Tokens:
    """All but the tokens themselves."""
    lengths = torch.tensor([0, *(n for p in parts for n in p.lengths)])
    made = Tokens(torch.zeros(0, dtype=torch.int32), lengths.cumsum(0),
                  torch.tensor([n for p in parts for n in p.labels], dtype=torch.int32),
                  torch.tensor([w for p in parts for w in p.windows], dtype=torch.bool))
    for p in parts:
        made.unused.update(p.unused)
        made.bad += p.bad
        made.reasons = (made.reasons + p.reasons)[:3]
    return made


def load(name: str) -> Tokens | None:
    """An entry of the cache. None if there is none, or only a damaged one."""
    index, tokens = (folder() / f"{name}.{kind}" for kind in ("safetensors", "tokens"))
    if not index.is_file() or not tokens.is_file():
        return None
    try:
        with weights.opened(index) as f:
            starts, labels, windows = (f.get_tensor(k).clone() for k in ("starts", "labels", "windows"))
            numbers = parse_json(weights.read_metadata(f, index)["numbers"], index)
        check(index, "bad", numbers["bad"], int)
        n = int(starts[-1])
        if tokens.stat().st_size != 4 * n or not len(labels) == len(windows) == len(starts) - 1:
            raise UserError(f"{index}: of another size than {tokens.name}")
        mapped = torch.zeros(0, dtype=torch.int32)
        if n:
            mapped = torch.from_file(str(tokens), shared=False, size=n, dtype=torch.int32)
        os.utime(index)  # it was used now
        return Tokens(mapped, starts, labels, windows, Counter(numbers["unused"]), numbers["bad"], numbers["reasons"])
    except (UserError, LookupError, TypeError, OSError) as e:
        print(f"the cache of token ids is damaged, so the file is tokenised again ({e})")
        return None


def clean(where: Path):
    """Remove entries that were not used for DAYS, and what killed processes have left: nobody wrote to it for an hour."""
    for path in [*where.glob("*.safetensors"), *where.glob(".*")]:
        with contextlib.suppress(OSError):
            age = time.time() - path.stat().st_mtime
            if age > (3600 if path.name.startswith(".") else DAYS * 86_400):
                path.unlink()
                path.with_suffix(".tokens").unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- processes

def n_processes() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin(make_encoder: Callable, tokenizer: Path, options: dict):
    """In each process, before its first piece: make the encoder, and end when the main process does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one ends the others
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    global encode
    encode = make_encoder(tokenizer, options)


def work(rows: list) -> Piece:
    return encode(rows)


def encoded(rows: Rows, make_encoder: Callable, tokenizer: Path, options: dict) -> Iterator[Piece]:
    """The pieces of a file, in order, from as many processes as there are cores. A few pieces are under way at a time."""
    # macOS and Windows have no safe fork: there, each process imports the program again.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    n, waiting, stream = n_processes(), deque(), iter(rows)
    bar = tqdm(total=rows.size, desc=f"tokenising {rows.path.name}", unit="B", unit_scale=True, leave=False,
               disable=not sys.stderr.isatty())
    pool = ProcessPoolExecutor(n, context, begin, (make_encoder, tokenizer, options))
    try:
        more = True
        while more or waiting:
            while more and len(waiting) < 3 * n:
                piece = list(islice(stream, PIECE))
                if more := bool(piece):
                    waiting.append(pool.submit(work, piece))
            if waiting:
                yield waiting.popleft().result()
                bar.update(rows.position() - bar.n)
    except BrokenProcessPool:
        raise UserError(f"{rows.path}: a process that tokenises has died; was there too little memory?") from None
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
