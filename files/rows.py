"""What a data file holds: rows, each a dict of named fields. Files are read a piece at a time, never whole.

    .json      an array of objects              .txt       one text, the whole file
    .jsonl     an object a line                 .parquet   needs the package pyarrow
    .csv       a header, then rows              .json.gz, .jsonl.gz, .csv.gz, .txt.gz

`where` says for messages where a row stands: "rows.jsonl:7", a line, or "rows.json: row 7".
"""
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from files.json_files import is_there, show, without_twins
from files.tokenizer import in_one_line, reason

KINDS = (".json", ".jsonl", ".csv", ".txt", ".parquet")
FIRST = 2**20  # characters of a .json file that are read at once; more if one row is longer


@dataclass
class Source:
    """A data file, and how often an epoch has each of its rows."""
    path: Path
    weight: float = 1.0


def kind_of(path: Path) -> str:
    """".jsonl" for rows.jsonl and for rows.jsonl.gz."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def sources(spec: str) -> list[Source]:
    """The files that `--data a.jsonl:2,folder` names: commas between files, a weight behind a colon, all the data files of a
    folder. Raises UserError."""
    found = []
    for part in [spec] if Path(spec).exists() else spec.split(","):
        if not part.strip():
            raise UserError(f"{spec!r}: an empty name of a file, or a comma without a file beside it")
        name, colon, number = part.rpartition(":")
        weight = 1.0
        if colon and not Path(part).exists():
            try:
                weight = float(number)
            except ValueError:
                name = part
            if not 0 < weight <= 1000:
                raise UserError(f"{part}: the weight of a file must be a number above 0, and at most 1000")
        else:
            name = part
        path = Path(name)
        if not path.is_dir():
            found.append(Source(path, weight))
            continue
        files = sorted(f for f in path.iterdir() if kind_of(f) in KINDS and not f.name.startswith("."))
        if not files:
            raise UserError(f"{path}: no data file in this folder (only {', '.join(KINDS)}, and .gz of them)")
        if others := sorted(f.name for f in path.iterdir() if f not in files and not f.name.startswith(".")):
            print(f"{path}: {len(files)} data files; not read: {show(others)}")
        found += [Source(f, weight) for f in files]
    return found


class Rows:
    """Iterate over it for (where, row). A row is a dict, or the bytes of a JSON line, which `parse` turns into one: so other
    processes can do this work.

    size, position(): of the file in bytes, and how much of it is read (Parquet: in rows). is_packed: whether it is a .gz.
    Iterating raises UserError, naming the line, for a file that cannot be read or has no rows.
    """

    def __init__(self, path):
        self.path, self.kind, self._parquet, self._read = Path(path), kind_of(Path(path)), None, 0
        try:
            is_there(self.path)  # refuses a folder, a pipe and a device; a missing file is an OSError below
            self._raw = open(self.path, "rb")  # noqa: SIM115 (closed with this object)
            self.size = self.path.stat().st_size
        except (OSError, ValueError) as e:  # ValueError: a name that no file can have
            raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
        self.is_packed = self.path.suffix.lower() == ".gz"
        if self.kind not in KINDS or self.kind == ".parquet" and self.is_packed:
            raise UserError(f"{path}: unknown kind of file (only {', '.join(KINDS)}, and .gz of the first four)")
        if self.kind == ".parquet":
            self._parquet = open_parquet(self.path, self._raw)
            self.size = self._parquet.metadata.num_rows

    def position(self) -> int:
        return self._read if self._parquet else self._raw.tell()

    def __iter__(self) -> Iterator[tuple[str, dict | bytes]]:
        some = False
        try:
            for row in self._rows():
                some = True
                yield row
        except UnicodeDecodeError:
            raise UserError(not_utf8(self.path)) from None
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{self.path}: cannot be read to its end ({reason(e)})") from None
        if not some:
            raise UserError(f"{self.path}: no rows in it")

    def _rows(self) -> Iterator:
        if self._parquet:
            with in_one_line(f"{self.path}: cannot be read as Parquet"):
                for batch in self._parquet.iter_batches(1000):
                    for row in batch.to_pylist():
                        self._read += 1
                        yield f"{self.path}: row {self._read}", row
            return
        stream = gzip.GzipFile(fileobj=self._raw) if self.is_packed else self._raw
        if self.kind == ".jsonl":
            for n, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{self.path}:{n}", line
            return
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="" if self.kind == ".csv" else None)
        if self.kind == ".json":
            yield from self._array(text)
        elif self.kind == ".csv":
            yield from self._csv(text)
        elif (whole := text.read()).strip():
            yield str(self.path), {"text": whole}

    def _csv(self, text) -> Iterator:
        csv.field_size_limit(2 ** 31 - 1)  # documents can be longer than the default, 131,072 characters
        reader = csv.DictReader(text, strict=True)
        try:
            if twice := [c for c in reader.fieldnames or () if c and reader.fieldnames.count(c) > 1]:
                raise UserError(f"{self.path}: two columns have the name {show(twice[0])}")
            for row in reader:
                yield f"{self.path}:{reader.line_num}", row
        except csv.Error as e:  # line_num: of the last good row
            raise UserError(f"{self.path}:{reader.line_num + 1}: broken CSV ({e})") from None

    def _array(self, stream) -> Iterator:
        """The elements of a JSON array. Only the one that is being read is in memory, and what is read ahead."""
        decode = json.JSONDecoder(object_pairs_hook=without_twins).raw_decode
        text, line, size, n = stream.read(FIRST), 1, FIRST, 0
        while (at := next_mark(text, 0)) == len(text):
            line += text.count("\n")
            if not (text := stream.read(FIRST)):
                return
        if text[at] != "[":
            raise UserError(f"{self.path}: expected a JSON array of objects (one object a line is .jsonl)")
        begin = at = at + 1
        while True:
            try:
                begin = next_mark(text, at)
                if text[begin:begin + 1] == "]" and n == 0:
                    break
                value, at = decode(text, begin)
                end = next_mark(text, at)
                if text[end:end + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
            except (json.JSONDecodeError, RecursionError) as e:
                if more := stream.read(size):  # the element may go on there
                    line += text.count("\n", 0, begin)
                    text, at, size = text[begin:] + more, 0, 2 * size
                    continue
                if isinstance(e, RecursionError):
                    raise UserError(f"{self.path}: JSON that cannot be read ({reason(e)})") from None
                raise UserError(f"{self.path}:{line + e.lineno - 1}: broken JSON ({e.msg}, column {e.colno})") from None
            except ValueError as e:  # a number of 5,000 digits; a key that is there twice
                raise UserError(f"{self.path}: row {n + 1}: JSON that cannot be read ({reason(e)})") from None
            n, at, size = n + 1, end + 1, FIRST
            yield f"{self.path}: row {n}", value
            if text[end] == "]":
                break
        if rest := (text[next_mark(text, at if n else begin + 1):] + stream.read()).strip():
            raise UserError(f"{self.path}: broken JSON (Extra data after the array: {show(rest)})")


WHITE = re.compile(r"[ \t\n\r]*")


def next_mark(text: str, at: int) -> int:
    """The place of the next character that is no white space."""
    return WHITE.match(text, at).end()


def open_parquet(path: Path, stream):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet files need one more package: pip install pyarrow") from None
    with in_one_line(f"{path}: cannot be read as Parquet"):
        return pyarrow.parquet.ParquetFile(stream)


def not_utf8(path: Path) -> str:
    """The message that names the first byte of a file which is not UTF-8."""
    done = 0
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                line.decode()
            except UnicodeDecodeError as e:
                return f"{path}: not UTF-8 at line {n} (byte {done + e.start}); convert it, e.g. iconv -f latin1 -t utf-8"
            done += len(line)
    return f"{path}: not UTF-8"


def parse(where: str, row: dict | bytes) -> dict:
    """A row as Rows yields it -> the dict. Raises UserError if it is none."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode("utf-8-sig"), object_pairs_hook=without_twins)
        except UnicodeDecodeError as e:
            raise UserError(f"{where}: not UTF-8 (byte {e.start} of the line); convert it, e.g. "
                            f"iconv -f latin1 -t utf-8") from None
        except json.JSONDecodeError as e:
            raise UserError(f"{where}: broken JSON ({e.msg}, column {e.colno})") from None
        except (ValueError, RecursionError) as e:  # a number of 5,000 digits; 10,000 brackets inside each other
            raise UserError(f"{where}: JSON that cannot be read ({reason(e)})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with named fields, found {type(row).__name__}")
    if any(row.get(None, ())):
        raise UserError(f"{where}: more fields than the header has names; put a field with commas in quotes")
    return row


def read_rows(path) -> list[tuple[str, dict]]:
    """All rows of a small file: [(where, row)]. Raises UserError."""
    return [(where, parse(where, row)) for where, row in Rows(path)]
