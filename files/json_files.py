"""JSON from files. A file may come from anywhere, and may be damaged: every failure is one line that names the file.

`read_json` reads an object, and `check` looks at one value of it: its type, and its range. A wrong value stops the program
here, where its name is known, and not later in the arithmetic. Python alone would accept `"12"`, `true` and 1.5 for a
number of layers, NaN, and a key that is there twice.
"""
import dataclasses
import json
import reprlib
import stat
import sys
import typing
from pathlib import Path

from errors import UserError

LARGEST = 2**25  # bytes. The largest JSON files of published models, indices and vocabularies, have a third of it
DEEPEST = 50  # objects and lists inside each other. The files of published models have five
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "an object", list: "a list"}
SHORT = reprlib.Repr()  # a value in a message: it may be very long
SHORT.maxstring = SHORT.maxother = 60
show = SHORT.repr


def check_file(path: Path) -> int:
    """The size of a regular file, or of one that a link leads to (in the hub's cache, every file is a link).

    Raises UserError for anything else: a pipe or a device would keep the program waiting, or never end.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a regular file")
    return status.st_size


def is_there(path: Path) -> bool:
    """Whether a file that may be absent is there. Raises UserError if something else has its name: it is not passed over."""
    return (path.exists() or path.is_symlink()) and check_file(path) >= 0  # (a link that leads nowhere does not exist)


def read_json(path) -> dict:
    """The object that a JSON file holds. Raises UserError."""
    path = Path(path)
    if (size := check_file(path)) > LARGEST:
        raise UserError(f"{path}: {size:,} bytes are too many for a JSON file (at most {LARGEST:,})")
    try:
        text = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    if not isinstance(value := parse_json(text, path), dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def parse_json(text: bytes | str, where):
    """JSON text -> the value, in which NaN and infinity are allowed (`check` refuses them). where: what a message names.

    Raises UserError.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=without_twins)
        if depth(value) <= DEEPEST:
            return value
    except ValueError as e:  # also: not UTF-8, an integer of 5,000 digits
        raise UserError(f"{where}: not valid JSON ({e})") from None
    except RecursionError:
        pass
    raise UserError(f"{where}: nested too deeply (at most {DEEPEST} objects and lists inside each other)")


def without_twins(pairs: list) -> dict:
    if len(value := dict(pairs)) < len(pairs):
        seen = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"key {show(twin)} is there twice")
    return value


def depth(value) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def check(where, name: str, value, kind: type, least: float = -sys.float_info.max, most: float = sys.float_info.max):
    """Raise UserError unless `value` has the type `kind`, and a number lies between `least` and `most`.

    An integer passes as a float. A bool passes only as a bool. NaN and infinity never pass.
    """
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or isinstance(value, bool) and kind is not bool or \
            kind in (int, float) and not least <= value <= most:
        limits = f" from {least:,}" if least > -sys.float_info.max else ""
        limits += f" to {most:,}" if limits and most < sys.float_info.max else ""
        raise UserError(f"{where}: {name} must be {WORDS[kind]}{limits}, found {show(value)}")


def checked(cls, values: dict, where):
    """cls(**values), for a dataclass. Raises UserError for a name or a value that no field has.

    A field's type is one of WORDS, or several: `int | None`. None is also allowed where it is the default. A field's
    metadata may hold the range ("least", "most") and "choices".
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"{where}: {show(name)} is not known")
        f = fields[name]
        kinds = [k for k in typing.get_args(f.type) or [f.type] if k is not type(None)]
        if value is None and (f.default is None or len(kinds) < len(typing.get_args(f.type))):
            continue
        if (choices := f.metadata.get("choices")) and value not in choices:
            raise UserError(f"{where}: {name} must be one of {', '.join(map(str, choices))}, found {show(value)}")
        kind = next((k for k in kinds if isinstance(value, k)), kinds[0])
        check(where, name, value, kind, **{k: f.metadata[k] for k in ("least", "most") if k in f.metadata})
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {name} is missing")
    return cls(**values)
