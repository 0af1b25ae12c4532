"""Damaged and hostile JSON, in one file and in the files of models and adapters: one line, or the right result."""
import dataclasses
import json
import random
import signal

import pytest
import torch
from conftest import make_folder
from test_lora import IDS, adapted
from test_weights import shard

from errors import UserError
from files import json_files, peft_files, weights

READ = {  # the bytes of a file -> what the one line must hold
    "empty": (b"", "not valid JSON"), "cut": (b'{"a": 1', "not valid JSON"), "zeros": (bytes(9), "not valid JSON"),
    "latin-1": ('{"é": 1}'.encode("latin-1"), "not valid JSON .*utf-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON .*utf-8"),
    "a list": (b"[1]", "expected a JSON object"), "null": (b"null", "expected a JSON object"),
    "5,000 digits": (b'{"a": %s}' % (b"9" * 5000), "not valid JSON .*digits"),
    "the same key": (b'{"b": {"a": 1, "a": 1}}', "key 'a' is there twice"),
    "lists in lists": (b'{"a": %s}' % (b"[" * 60 + b"]" * 60), "nested too deeply"),
    "objects in objects": (b'{"a":' * 900 + b"1" + b"}" * 900, "nested too deeply"),
    "a million of lists": (b'{"a": %s' % (b"[" * 10**6), "nested too deeply"),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_no_object_is_one_line(case, tmp_path):
    text, says = READ[case]
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=f"a.json: .*{says}") as e:
        json_files.read_json(tmp_path / "a.json")
    assert "\n" not in str(e.value)


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert json_files.read_json(tmp_path / "a.json") == {"a": 1}
    monkeypatch.setattr(json_files, "LARGEST", 7)
    with pytest.raises(UserError, match="a.json: 8 bytes are too many"):
        json_files.read_json(tmp_path / "a.json")


def test_what_is_right_passes(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": %s, "b": "\xc3\xa9"}' % (b"[" * 49 + b"]" * 49))  # a mark of UTF-8
    assert json_files.read_json(tmp_path / "a.json")["b"] == "é"


@dataclasses.dataclass
class Options:
    steps: int = dataclasses.field(metadata={"least": 1, "most": 100})
    lr: float = None
    name: str = dataclasses.field(default="a", metadata={"choices": ("a", "b")})
    full: bool = False
    ids: list | int | None = None
    seen: dict = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize("values", [
    {"steps": 1}, {"steps": 100, "lr": 1}, {"steps": 2, "lr": None, "name": "b", "full": True}, {"steps": 2, "ids": [1]},
    {"steps": 2, "ids": 1}, {"steps": 2, "ids": None, "seen": {}}], ids=str)
def test_values_that_fit_a_dataclass(values):
    assert json_files.checked(Options, values, "x") == Options(**values)


@pytest.mark.parametrize(("values", "says"), [
    ({}, "steps is missing"), ({"steps": 1, "stepz": 1}, "'stepz' is not known"), ({"steps": None}, "steps must be an int"),
    *(({"steps": v}, "steps must be an integer from 1 to 100, found") for v in (0, 101, 1.0, "1", True, [1], float("nan"))),
    *(({"steps": 1, "lr": v}, "lr must be a number, found") for v in ("1", True, float("nan"), float("inf"), 10**400)),
    *(({"steps": 1, "name": v}, "name must be one of a, b, found") for v in ("c", 1, ["a"], {})),
    ({"steps": 1, "name": None}, "name must be one of a, b"), ({"steps": 1, "full": 1}, "full must be true or false"),
    ({"steps": 1, "full": None}, "full must be true or false"), ({"steps": 1, "ids": True}, "ids must be"),
    ({"steps": 1, "ids": "1"}, "ids must be a list"), ({"steps": 1, "seen": []}, "seen must be an object"),
    ({"steps": 1, "seen": None}, "seen must be an object"), ({"steps": "x" * 10**6}, "found .{,70}$"),
], ids=lambda v: str(v)[:50])
def test_values_that_do_not(values, says):
    with pytest.raises(UserError, match=f"^x: .*{says}"):
        json_files.checked(Options, values, "x")


# ---------------------------------------------------------------------------------------------- damage at random

ODD = ("12", "", -1, 0, 1, 3, 1.5, 10**12, 10**400, True, False, None, [], {}, [1], {"a": 1}, float("nan"), float("inf"),
       1e300, "x" * 5000, "../x", "\ud800", "\0", "a\nb", "(a+)+$", 4, 8, 32, 2**63, [None], {"(a|aa)+$": 3}, {"q_proj": -1},
       {"rope_type": "linear", "factor": -1})


def damage(text: bytes, rng: random.Random) -> bytes:
    """`text`, a JSON object, with one thing wrong in it."""
    value, at = json.loads(text), rng.randrange(len(text))
    key, odd = rng.choice(list(value)), rng.choice(ODD)
    inner = [k for k in value if isinstance(value[k], dict) and value[k]]
    if inner and rng.random() < 0.3:
        part = value[rng.choice(inner)]
        part[rng.choice(list(part))] = odd
        return json.dumps(value).encode()
    return rng.choice([
        lambda: text[:at], lambda: text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1:],
        lambda: text[:at] + rng.choice([b"\0", b"\xff", b"-", b"9", b"[", b'"', b"e9"]) + text[at:],
        lambda: text.decode().encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"])),
        lambda: json.dumps({k: v for k, v in value.items() if k != key}).encode(),
        lambda: text.rstrip()[:-1] + b', "%s": %s}' % (key.encode(), json.dumps(odd).encode()),
        lambda: json.dumps({**value, key: "@"}).encode().replace(b'"@"', rng.choice([b"9" * 5000, b"[" * 9999, b"1e999"])),
        *[lambda: json.dumps({**value, key: odd}).encode()] * 6])()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """[(a JSON file of a model or an adapter, a function that loads it and returns logits)]"""
    root, found = tmp_path_factory.mktemp("damaged"), []

    def of_model(folder):
        with torch.no_grad():
            return weights.load(folder)(IDS)

    def of_adapter(folder, adapter):
        with torch.no_grad():
            return peft_files.load(weights.load(folder), adapter).eval()(IDS)

    for family in ("gpt2", "llama", "phi"):
        folder = make_folder(root / family, family)
        adapter = root / f"{family}-adapter"
        peft_files.save(adapted(folder, targets=["c_attn.q", "c_fc"] if family == "gpt2" else "all"), adapter)
        found.append((folder / "config.json", of_model, (folder,)))
        found.append((adapter / "adapter_config.json", of_adapter, (folder, adapter)))
    shard(folder)
    return [*found, (folder / "model.safetensors.index.json", of_model, (folder,))]


@pytest.mark.parametrize("seed", range(3))
def test_damage_at_random_is_one_line_or_a_finite_result(seed, places):
    rng, refused = random.Random(seed), 0
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{path} hangs: {damaged[:500]}"))
    for _ in range(150):
        path, act, args = rng.choice(places)
        whole = path.read_bytes()
        damaged = damage(whole, rng)
        path.write_bytes(damaged)
        signal.alarm(10)
        try:
            assert act(*args).isfinite().all(), (path, damaged)
        except UserError as e:
            refused += 1
            assert "\n" not in str(e) and str(path.parent) in str(e), (path, damaged)
        finally:
            signal.alarm(0)
            path.write_bytes(whole)
    signal.signal(signal.SIGALRM, before)  # another test's process may be ended by an alarm
    assert 80 < refused < 150
