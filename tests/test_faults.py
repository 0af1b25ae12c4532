"""A sample of the fault campaign (bench/faults.py), and that the campaign would notice what it looks for."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from bench import faults, mutations
from errors import UserError
from files.hub import ASSETS


def test_a_sample_of_the_campaign(tmp_path):
    """A process of its own: its forks must not inherit the threads of this one."""
    words = ["-m", "bench", "faults", "--kills", "30", "--files", "116", "--out", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    doc = json.loads((tmp_path / "faults.json").read_text())
    assert doc["lost"] == doc["wrong"] == [] and done.returncode == 0, (doc["lost"], doc["wrong"], done.stderr)
    rows = (tmp_path / "faults.md").read_text().splitlines()
    for row, cases in zip([r for r in rows if r.startswith("| **all**")], (30, 116), strict=True):
        first, *others = map(int, row.strip("| ").split(" | ")[1:])
        assert first == cases == sum(others) and others[0] > 0  # (equal to the whole run; one line)


def test_a_fork_reports_how_it_ended(monkeypatch):
    def fill():
        return len(bytes(3 * 10**9))

    def refused():
        raise UserError("a line")
    assert faults.fork(lambda: {"a": 1}) == {"end": "result", "text": '{"a": 1}'}
    assert faults.fork(refused) == {"end": "error", "text": "a line"}
    assert faults.fork(fill)["text"].startswith("MemoryError") and faults.fork(lambda: 1 / 0)["end"] == "traceback"
    assert faults.fork(lambda: sys.exit(3)) == {"end": "exit", "text": "3"}
    assert faults.fork(lambda: faults.kill(signal.SIGKILL)) == {"end": "died", "text": "9"}
    assert faults.fork(lambda: [faults.kill(signal.SIGKILL, 0.01), time.sleep(9)]) == {"end": "died", "text": "14"}
    assert faults.fork(lambda: [faults.kill(signal.SIGTERM, 0.01), time.sleep(9)]) == {"end": "died", "text": "15"}
    monkeypatch.setattr(faults, "SECONDS", 0.1)
    assert faults.fork(lambda: time.sleep(9))["end"] == "hang"


def test_renames_are_counted(tmp_path):
    def job(n, before):
        faults.at_rename(n, lambda: os._exit(0), before)
        for i in range(3):
            (tmp_path / "new").write_text(str(i))
            os.replace(tmp_path / "new", tmp_path / "old")
    for n, before, last in ((3, True, "1"), (2, True, "0"), (2, False, "1"), (9, True, "2"), (1, False, "0")):
        faults.fork(lambda n=n, before=before: job(n, before))
        assert (tmp_path / "old").read_text() == last


def test_what_a_run_leaves_shows_every_difference(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "step_s": 1}\n{"step": 2, "lo')
    (tmp_path / "summary.json").write_text('{"wall_s": 5, "loss": {"first": 1.0}}')
    before = faults.left_by(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "step_s": 7}\n')
    assert faults.left_by(tmp_path) == before  # another time, and a line that was cut
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.25, "step_s": 7}\n')
    (tmp_path / ".a.tmp7").touch()
    assert faults.differing(before, faults.left_by(tmp_path)) == ".a.tmp7, metrics.jsonl"
    (tmp_path / "summary.json").write_text('{"wall_s": 5, "lo')
    with pytest.raises(ValueError):
        faults.left_by(tmp_path)


CONFIG = {"n_layer": 2, "eps": 1e-5, "rope": {"factor": 8.0}, "tie": False, "name": "gpt2", "eos_token_id": 3}
TOKENS = {"a": 0, "b": 1, "c": 2, "d": 3}


@pytest.mark.parametrize("change,right", [
    ({"n_layer": 3}, True), ({"eps": 1e-4}, True), ({"name": "phi"}, True), ({"rope": {"factor": 2}}, True),
    ({"new": 1}, True), ({"eos_token_id": 0}, True), ({"n_layer": None}, True), ({"eos_token": "b"}, True),
    ({"n_layer": "2"}, False), ({"n_layer": True}, False), ({"n_layer": 2.0}, False), ({"n_layer": -2}, False),
    ({"n_layer": 0}, False), ({"n_layer": 10**12}, False), ({"eps": float("nan")}, False), ({"tie": 0}, False),
    ({"rope": {"factor": -8.0}}, False), ({"rope": []}, False), ({"eos_token_id": 4}, False), ({"eos_token": "e"}, False)])
def test_another_meaning_of_a_config(change, right):
    old, new = json.dumps(CONFIG).encode(), json.dumps({**CONFIG, **change}).encode()
    assert mutations.has_a_meaning("config.json", old, new, {}, TOKENS) == right
    assert not mutations.has_a_meaning("config.json", old, new[:-1], {}, TOKENS)
    assert not mutations.has_a_meaning("config.json", old, new[:-1] + b', "n_layer": 2}', {}, TOKENS)  # twice
    assert not mutations.has_a_meaning("model.safetensors.index.json", old, new, {}, TOKENS)


def test_another_meaning_of_the_other_files():
    def right(name, old, new, **beside):
        return mutations.has_a_meaning(name, old, new, beside, TOKENS)
    vocab = json.loads((ASSETS / "gpt2-nano" / "vocab.json").read_bytes())
    merges = (ASSETS / "gpt2-nano" / "merges.txt").read_bytes()
    swapped = json.dumps({**vocab, "!": vocab['"'], '"': vocab["!"]}).encode()
    assert right("vocab.json", b"", swapped, **{"merges.txt": merges})
    assert not right("vocab.json", b"", swapped.replace(b'"!": 1,', b""), **{"merges.txt": merges})
    assert not right("merges.txt", merges, b"#version: 0.2\n", **{"vocab.json": swapped})
    assert right("rows.csv", b"", b"instruction,output\na,b\n")
    assert not right("rows.csv", b"", b"instruction,output\na,b,c\n")
    assert right("rows.jsonl", b"", b'{"instruction": "a", "output": "b"}')
    assert not right("rows.jsonl", b"", b'{"instruction": "a", "output": 1}')
    assert right("rows.jsonl", b"", b'{"instruction": "a", "input": null, "output": "b"}')  # as Parquet has it
    assert not right("rows.jsonl", b"", b'{"instruction": "a", "input": 1, "output": "b"}')
    good, cut = b'{"step": 1}\n{"step": 2}\n', b'{"step": 1}\n{"st'
    assert right("metrics.jsonl", good, cut) and not right("metrics.jsonl", good, b'{"st\n{"step": 2}\n')


def test_another_meaning_of_tensors(tmp_path):
    def written(a, metadata="x"):
        save_file({"a": a, "b": torch.ones(2, 3)}, tmp_path / "t", {"m": metadata})
        return (tmp_path / "t").read_bytes()
    old = written(torch.zeros(2))
    for new, right in ((written(torch.tensor([0.0, 7.0])), True), (written(torch.tensor([0.0, math.nan])), False),
                       (written(torch.zeros(2), "y"), False), (written(torch.zeros(1, 2)), False), (old[:-1], False),
                       (written(torch.zeros(2, dtype=torch.float64)), False), (old + bytes(8), False)):
        assert mutations.has_a_meaning("model.safetensors", old, new, {}, TOKENS) == right
    old = written(torch.zeros(2, 3))
    for a, b, right in (([24, 48], [0, 24], True), ([0, 24], [0, 24], False)):  # they exchange places; both are in one place
        header, body = mutations.header_of(old)
        header["a"]["data_offsets"], header["b"]["data_offsets"] = a, b
        new = json.dumps(header, separators=(",", ":")).encode().ljust(len(old) - 8 - len(body))
        assert mutations.has_a_meaning("model.safetensors", old, old[:8] + new + body, {}, TOKENS) == right


def test_mutations_are_seeded_and_damage():
    """Each seed gives one damage, and nearly every damage changes the file."""
    old = json.dumps(CONFIG).encode()
    for name in ("config.json", "rows.jsonl", "merges.txt", "chat_template.jinja"):
        got = [mutations.mutate(name, old, random.Random(i)) for i in range(200)]
        assert got == [mutations.mutate(name, old, random.Random(i)) for i in range(200)]
        assert sum(new != old for _, new in got) > 150 and len({way for way, _ in got}) > 12
