"""Damaged files for faults.py, and what can be said about each: is it broken, or does it legitimately mean something else?

`mutate` damages a file in one of some thirty ways. `has_a_meaning` judges the result without this project's readers:

    model and adapter configs, index     strict JSON (UTF-8, no key twice, no NaN); each value that differs has the old type
                                         and the old sign; a token is in the vocabulary, an id is one of its ids
    weights, adapters, a run's state     the header names the same tensors with the same types and shapes, the metadata is
                                         the same, and no number is NaN or infinite. A flipped bit in a weight is another
                                         weight: the format has no checksum, so nobody can tell
    data                                 rows with the old columns, as the format's own strict reader reads them
    vocab.json, merges.txt               the ids are 0, 1, 2, ...; every byte is a token; merges are in the ids' order
    tokenizer.json, chat_template.jinja  whatever their libraries load: there is no second reader to ask
    metrics.jsonl                        a line that is no JSON may only be the last one, which a kill has cut
"""
import base64
import csv
import io
import json
import math
import random
import struct

import numpy as np

NESTED = "[" * 100_000 + "]" * 100_000
# Written into the JSON as they are: Python's json module would not write them, but its reader meets them.
RAW = ("9" * 5000, "-" + "9" * 30, "NaN", "-Infinity", "1e999", NESTED, '"' + "a" * 10**6 + '"', "01", "'a'", '"\\ud800"')
VALUES = (None, True, False, -1, 0, 1, 1.5, 10**12, 1e308, 1e-300, "", "12", "x", [], [1], {}, {"a": 1}, [[]], "\x00",
          "é\u2028")
TEMPLATES = (
    "{{ 1 / 0 }}", "{{ messages[99].content.x }}", "{{ 'a' * 10**10 }}", "{{ 'a' + 1 }}", "{{", "{% include 'x' %}",
    "{% for i in range(10**9) %}x{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 10**10**8 }}", "{{ nothing.x }}",
    "{{ messages.__class__.__mro__ }}", "{{ [1, 2] | tojson | nope }}")


# ---------------------------------------------------------------------------------------------- damage

def of_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    way = rng.choice(("flip", "flip", "flip", "cut", "cut off the start", "remove", "repeat", "insert", "zeros", "empty",
                      "UTF-16", "Latin-1", "BOM", "NUL"))
    if way == "flip":
        i = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
        return way, data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1:]
    text = data.decode("utf-8", "replace")
    return way, {"cut": data[:i], "cut off the start": data[i:], "remove": data[:i] + data[j:],
                 "repeat": data[:i] + data[i:j] * 2 + data[j:], "insert": data[:i] + rng.randbytes(5) + data[i:],
                 "zeros": data[:i] + bytes(j - i) + data[j:], "empty": b"", "UTF-16": text.encode("utf-16"),
                 "Latin-1": data[:i] + "é".encode("latin-1") + data[i:], "BOM": b"\xef\xbb\xbf" + data,
                 "NUL": data[:i] + b"\0" + data[i:]}[way]


def places(value) -> list[tuple]:
    """(container, key) of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, v in items for place in [(value, key), *places(v)]]


def of_json(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    value = json.loads(data)
    if not (found := places(value)):
        return of_bytes(data, rng)
    container, key = rng.choice(found)
    way = rng.choice(("value", "value", "value", "raw", "raw", "number", "remove", "rename", "swap", "twice", "wrap"))
    if way == "number" and isinstance(container[key], (int, float)):
        container[key] *= rng.choice((-1, 2, 0.5, 1000, 10**9))
    elif way in ("value", "number"):
        container[key] = rng.choice(VALUES)
    elif way == "remove":
        del container[key]
    elif way == "rename" and isinstance(container, dict):
        container[key + "x"] = container.pop(key)
    elif way == "swap":
        other, k = rng.choice(found)
        container[key], other[k] = other[k], container[key]
    elif way == "wrap":
        value = [value]
    elif way == "twice" and isinstance(value, dict):
        key = rng.choice(list(value))
        pair = f"{json.dumps(key)}: {json.dumps(rng.choice((*VALUES, *value.values())))}"
        text = json.dumps(value)
        return way, (f"{{{pair}, {text[1:]}" if rng.random() < 0.5 else f"{text[:-1]}, {pair}}}").encode()
    else:
        container[key] = "@@"
        raw = rng.choice(RAW)
        return f"raw {raw[:12]}", json.dumps(value).replace('"@@"', raw).encode()
    try:
        return way, json.dumps(value).encode()
    except ValueError:  # a swap has put a list into itself
        return of_bytes(data, rng)


def of_lines(data: bytes, rng: random.Random, line_way) -> tuple[str, bytes]:
    """Damage the order of lines, or one line by line_way."""
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    way = rng.choice(("one", "one", "one", "swap lines", "remove line", "repeat line"))
    if way == "swap lines":
        lines[i], lines[j] = lines[j], lines[i]
    elif way == "remove line":
        del lines[i]
    elif way == "repeat line":
        lines.insert(j, lines[i])
    else:
        while not lines[i]:
            i = rng.randrange(len(lines))
        way, lines[i] = line_way(lines[i], rng)
    return way, b"\n".join(lines)


def header_of(data: bytes) -> tuple[dict, bytes]:
    n, = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + n]), data[8 + n:]


def of_tensors(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage the header of a safetensors file, its metadata, or its numbers."""
    header, body = header_of(data)
    metadata = header.get("__metadata__", {})
    way = rng.choice(("length", "header", "header", "metadata", "metadata", "number", "number", "body"))
    if way == "length":
        return way, struct.pack("<Q", rng.choice((0, 1, len(data), 2**40, 2**64 - 1))) + data[8:]
    if way == "body":
        return way, data + bytes(64) if rng.random() < 0.5 else data[:-1]
    if way == "number":
        name = rng.choice([n for n in header if n != "__metadata__"])
        (start, end), size = header[name]["data_offsets"], {"F": 4, "B": 2, "U": 1, "I": 8}[header[name]["dtype"][0]]
        if end > start:
            at = rng.randrange(start, end, size)
            new = rng.choice((b"\xff" * size, bytes(size), b"\x00\x00\x80\x7f"[-size:], rng.randbytes(size)))
            body = body[:at] + new.ljust(size, b"\0") + body[at + size:]
        return way, data[:len(data) - len(body)] + body
    if way == "metadata" and metadata:
        key = rng.choice(list(metadata))
        damage = of_json if metadata[key][:1] in "{[" else of_bytes
        inner, new = damage(metadata[key].encode(), rng)
        way, metadata[key] = f"metadata {inner}", new.decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        way, text = of_json(json.dumps(header).encode(), rng)
        way = f"header {way}"
    return way, struct.pack("<Q", len(text)) + text + body


def mutate(name: str, data: bytes, rng: random.Random) -> tuple[str, bytes | None]:
    """Damage the file `name` -> (in which way, its new bytes). None: something that is no file must take its place."""
    kind = name.rpartition(".")[2]
    if rng.random() < 0.03:
        return rng.choice(("folder", "pipe", "device", "link to nothing")), None
    ways = {"json": of_json, "safetensors": of_tensors, "jsonl": lambda d, r: of_lines(d, r, of_json),
            "jinja": lambda d, r: ("template", r.choice((b"", d)) + r.choice(TEMPLATES).encode())}
    by_lines = name.endswith((".txt", ".csv", ".model"))
    special = (lambda d, r: of_lines(d, r, of_bytes)) if by_lines else ways.get(kind, of_bytes)
    return (of_bytes if rng.random() < 0.35 else special)(data, rng)


# ---------------------------------------------------------------------------------------------- judgement

def no_key_twice(pairs: list) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def not_finite(text: str):
    raise ValueError(text)


def strict_json(data: bytes):
    return json.loads(data.decode("utf-8"), object_pairs_hook=no_key_twice, parse_constant=not_finite)


def alike(old, new) -> bool:
    """Whether `new` could be another good value in the place of `old`. A key may be absent, or null, or new."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(new[k] is None or alike(v, new[k]) or k.endswith("_id") and type(new[k]) is int and new[k] >= 0
                   for k, v in old.items() if k in new)
    if isinstance(old, list) and isinstance(new, list):
        return not old or all(alike(old[0], v) for v in new)
    if isinstance(old, bool) or isinstance(new, bool) or not isinstance(old, (int, float)):
        return type(old) is type(new)
    if isinstance(new, int) if isinstance(old, int) else isinstance(new, (int, float)):
        return abs(new) < 2**31 and math.isfinite(new) and ((new > 0) == (old > 0) or old == 0 <= new)
    return False


def same_tensors(old: bytes, new: bytes) -> bool:
    """Whether two safetensors files differ in finite numbers only. (Tensors may have exchanged their places, and so their
    numbers: a file says nothing of where a tensor belongs.)"""
    (before, _), (after, body) = header_of(old), header_of(new)
    strict_json(new[8:len(new) - len(body)])
    floats = [body[slice(*t["data_offsets"])] for n, t in after.items() if n != "__metadata__" and t["dtype"] == "F32"]

    def names_and_places(header: dict) -> tuple:
        tensors = {n: t for n, t in header.items() if n != "__metadata__"}
        return ({n: {**t, "data_offsets": None} for n, t in tensors.items()}, header.get("__metadata__"),
                sorted(t["data_offsets"] for t in tensors.values()))
    return (names_and_places(before) == names_and_places(after) and len(old) == len(new)
            and all(np.isfinite(np.frombuffer(x, "<f4")).all() for x in floats))


def good_vocabulary(vocab: dict, merges: str) -> bool:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(b) for b in printable} | {chr(256 + i) for i in range(256 - len(printable))}
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    ids = [vocab.get(line.replace(" ", "")) for line in lines]
    return (sorted(vocab.values()) == list(range(len(vocab))) and letters <= vocab.keys() and None not in ids
            and ids == sorted(set(ids)) and len(lines) > 0 and not any(isinstance(i, bool) for i in vocab.values())
            and all(len(line.split(" ")) == 2 and set(line.split(" ")) <= vocab.keys() for line in lines))


def good_ranks(data: bytes) -> bool:
    pairs = [line.split() for line in data.splitlines()]
    tokens = {base64.b64decode(t, validate=True) for t, _ in pairs}
    return [int(n) for _, n in pairs] == list(range(len(pairs))) and len(tokens) == len(pairs)


def tokens_exist(values: dict, tokens: dict[str, int]) -> bool:
    """Whether the special tokens that a config names are in the vocabulary."""
    ids = [values.get("eos_token_id"), values.get("bos_token_id")]
    ids = [i for v in ids for i in (v if isinstance(v, list) else [v])]
    names = [v.get("content") if isinstance(v, dict) else v for k, v in values.items() if k.endswith("_token")]
    return all(i is None or 0 <= i < len(tokens) for i in ids) and all(v in tokens for v in names if isinstance(v, str))


def rows_of(name: str, data: bytes) -> list:
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    if name.endswith(".json"):
        return strict_json(data)
    return [strict_json(line) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]


def good_rows(rows) -> bool:
    return all(isinstance(r, dict) and None not in r and {"instruction", "output"} <= r.keys()
               and all(isinstance(r[k], str) for k in ("instruction", "output"))
               and isinstance(r.get("input") or "", str) for r in rows)


def good_log(data: bytes) -> bool:
    lines = data.split(b"\n")
    return all(isinstance(x := strict_json(line), dict) and type(x["step"]) is int for line in lines[:-2] if line)


def is_optional(name: str) -> bool:
    """Whether a model folder may lack the file."""
    return name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
                    "chat_template.jinja")


def has_a_meaning(name: str, old: bytes, new: bytes | None, beside: dict[str, bytes], tokens: dict[str, int]) -> bool:
    """Whether the new content of file `name` is well-formed, so that another result than the old one can be right.

    beside: the files beside it. tokens: the vocabulary of the model to which it belongs.
    """
    if new is None:
        return False
    try:
        if name in ("vocab.json", "merges.txt"):
            files = {**beside, name: new}
            return good_vocabulary(strict_json(files["vocab.json"]), files["merges.txt"].decode("utf-8"))
        if name.startswith("rows.") and not name.endswith(".txt"):
            return good_rows(rows_of(name, new))
        if name.endswith(".safetensors"):
            return same_tensors(old, new)
        if name == "metrics.jsonl":
            return good_log(new)
        if name == "tokenizer.model":
            return good_ranks(new)
        if name == "tokenizer.json":
            import tokenizers
            return bool(tokenizers.Tokenizer.from_buffer(new))
        if name.endswith(".json"):
            before, after = strict_json(old), strict_json(new)
            is_index = name == "model.safetensors.index.json"  # it says where tensors are: another result cannot be right
            return not is_index and isinstance(after, dict) and alike(before, after) and tokens_exist(after, tokens)
        return new.decode("utf-8-sig") is not None
    except Exception:  # any error of a strict reader says the same
        return False
