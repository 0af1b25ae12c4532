"""The cache of token ids: the same tokens with it and without, whole or not there, never of an older file."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_data
from runs import lines, run, timeless

import data
from errors import UserError
from files import token_cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, which even small files use, with pieces of few rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "SMALL", 0)
    monkeypatch.setattr(token_cache, "PIECE", 7)
    return tmp_path / "cache" / "bytewise" / "tokens"


@pytest.fixture(scope="module")
def nano():
    return data.load_tokenizer("gpt2-nano")


def read(path, tokenizer, **more):
    return data.read_tokens(path, tokenizer, data.load_template("alpaca", tokenizer), **more)


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("tokens", "starts", "labels", "windows")) and (
        a.unused, a.bad, a.reasons) == (b.unused, b.bad, b.reasons)


def no_encoding(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the file is tokenised again")
    monkeypatch.setattr(token_cache, "encoded", fail)


def rows_with_all_kinds(path):
    make_data(path, 40)
    more = [{"text": "a book " * 50}, {"prompt": "a", "completion": " b", "id": 3}, {"instruction": "a", "output": ""}]
    with open(path, "a") as f:
        f.writelines(json.dumps(r) + "\n" for r in more)
    return path


def test_processes_and_cache_give_the_same_tokens(cache, tmp_path, nano, monkeypatch, capsys):
    path = rows_with_all_kinds(tmp_path / "d.jsonl")
    monkeypatch.setattr(token_cache, "SMALL", 2**22)
    alone = read(path, nano, use_cache=False)
    monkeypatch.setattr(token_cache, "SMALL", 0)
    n_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    pieces = list(token_cache.encoded(token_cache.Rows(path), data.make_encoder, nano.folder, {
        "template": data.load_template("alpaca", nano)}))
    assert len(pieces) == 7  # none of them keeps anything open, as a tensor of another process would
    assert not n_open or len(os.listdir("/proc/self/fd")) <= n_open + 1
    assert same(read(path, nano, use_cache=False), alone) and not cache.exists()  # in processes
    assert same(read(path, nano), alone) and len(alone) == 43 and alone.unused == {"column 'id'": 1}
    assert "tokenised 43 rows" in capsys.readouterr().out
    assert sorted(f.suffix for f in cache.iterdir()) == [".safetensors", ".tokens"]
    no_encoding(monkeypatch)
    assert same(read(path, nano), alone) and capsys.readouterr().out == ""


def test_what_an_entry_depends_on(cache, tmp_path, nano, monkeypatch):
    path = rows_with_all_kinds(tmp_path / "d.jsonl")
    first = read(path, nano)
    template = data.load_template("alpaca", nano)
    for change in (lambda: data.read_tokens(path, nano, template + " "), lambda: read(path, nano, skip_bad=True),
                   lambda: read(path, nano, columns={"text": "book"})):
        with pytest.raises(AssertionError, match="tokenised again"), monkeypatch.context() as m:
            no_encoding(m)
            change()
    moved = path.rename(tmp_path / "e.jsonl")  # the content counts, not the name
    with monkeypatch.context() as m:
        no_encoding(m)
        assert same(read(moved, nano), first)
    text = moved.read_text().replace("a book", "a tale")
    moved.write_text(text)
    assert not torch.equal(read(moved, nano).tokens, first.tokens)
    moved.write_text(text.replace("a tale", "a book"))
    assert same(read(moved, nano), first)


@pytest.mark.parametrize("damage", ["cut", "no index", "no tokens", "index"])
def test_a_damaged_entry_is_made_again(damage, cache, tmp_path, nano, capsys):
    path = make_data(tmp_path / "d.jsonl", 20)
    first = read(path, nano)
    wanted = first.tokens.clone()
    del first
    tokens, index = next(cache.glob("*.tokens")), next(cache.glob("*.safetensors"))
    if damage == "cut":
        os.truncate(tokens, tokens.stat().st_size - 4)
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:-4])
    else:
        (index if damage == "no index" else tokens).unlink()
    again = read(path, nano)
    assert torch.equal(again.tokens, wanted)
    assert ("the cache of token ids is damaged" in capsys.readouterr().out) == (damage in ("cut", "index"))


def test_a_bad_row_in_a_process(cache, tmp_path, nano):
    path = make_data(tmp_path / "d.jsonl", 30)
    with open(path, "a") as f:
        f.write('{"instruction": 3, "output": "x"}\n')
    with pytest.raises(UserError, match=r"d\.jsonl:31: field 'instruction' must be text"):
        read(path, nano)
    assert list(cache.iterdir()) == []  # nothing half written
    tokens = read(path, nano, skip_bad=True)
    assert (len(tokens), tokens.bad) == (30, 1) and read(path, nano, skip_bad=True).reasons == tokens.reasons != []


def test_a_file_that_changes_while_it_is_read(cache, tmp_path, nano, monkeypatch):
    path = make_data(tmp_path / "d.jsonl", 30)
    encoded = token_cache.encoded

    def touching(*args):
        yield from encoded(*args)
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr(token_cache, "encoded", touching)
    with pytest.raises(UserError, match="was changed while it was read"):
        read(path, nano)
    assert not list(cache.glob("*.safetensors"))


def test_old_entries_are_removed(cache, tmp_path, nano):
    read(make_data(tmp_path / "a.jsonl", 20), nano)
    old = list(cache.iterdir())
    (cache / ".x.tokens.tmp123").write_bytes(b"1")
    (cache / ".y.tokens.tmp124").write_bytes(b"1")
    for f in (*old, cache / ".x.tokens.tmp123"):
        os.utime(f, (time.time() - 31 * 86_400,) * 2)
    read(make_data(tmp_path / "b.jsonl", 21), nano)
    left = list(cache.iterdir())
    assert not set(old) & set(left) and len(left) == 3 and cache / ".y.tokens.tmp124" in left  # (it may be in use)


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
import data
from files import token_cache
from pathlib import Path
if __name__ == "__main__":
    token_cache.SMALL, token_cache.PIECE = 0, 2
    tokenizer = data.load_tokenizer("gpt2-nano")
    data.read_tokens(Path({path!r}), tokenizer, data.load_template("alpaca", tokenizer))
"""


def test_killed_in_the_middle(cache, tmp_path, nano):
    """Nothing half written is ever used, and no process stays."""
    path = make_data(tmp_path / "d.jsonl", 4000)
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(root=str(ROOT), path=str(path)))
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    while not (half := [f for f in cache.glob(".*.tokens.tmp*") if f.stat().st_size]) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert half and not list(cache.glob("*.safetensors"))
    end = time.monotonic() + 20
    while (alive := subprocess.run(["pgrep", "-f", str(script)], capture_output=True, text=True).stdout) and \
            time.monotonic() < end:
        time.sleep(0.1)
    assert not alive
    token_cache.SMALL = 0
    wanted = read(path, nano, use_cache=False)
    assert same(read(path, nano), wanted)


def test_a_run_through_the_cache_takes_the_same_steps(cache, tmp_path, gpt2_folder, monkeypatch):
    rows = make_data(tmp_path / "d.jsonl", 24)
    more = dict(val_frac=0.25, steps=6, eval_every=3, batch_size=2, epochs=3)
    cached = [timeless(run(tmp_path / name, gpt2_folder, rows, **more)) for name in ("first", "second")]
    wanted = timeless(run(tmp_path / "without", gpt2_folder, rows, no_cache=True, **more))
    assert cached == [wanted, wanted] and len(wanted) == 6
    assert timeless(lines(tmp_path / "second")) == timeless(lines(tmp_path / "without"))
