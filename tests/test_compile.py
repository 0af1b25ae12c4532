"""--compile: what is said where it cannot work, and where compiled code waits for the next run."""
import os
import platform
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import train
from errors import UserError
from techniques import compilation

REAL_ANSWERS = compilation.answers


def works_here() -> bool:
    try:
        compilation.check_compiler("cpu")
    except UserError:
        return False
    return True


WORKS_HERE = works_here()


@pytest.fixture(autouse=True)
def a_machine(monkeypatch):
    """Linux with gcc, Triton and Python's header, whatever this machine has. A test takes away what it needs to."""
    monkeypatch.setattr(compilation, "answers", lambda compiler: compiler in ("g++", "gcc"))
    monkeypatch.setattr(compilation, "python_header", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name == "triton" or find_spec(name, *rest))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


def nothing(*args):
    return None


@pytest.mark.parametrize("device, name, value, says", [
    ("cpu", "answers", nothing, r"--compile on cpu needs a C\+\+ compiler \(g\+\+ does not run\): install g\+\+, or set"),
    ("cpu", "python_header", nothing, r"--compile on cpu needs Python\.h, .* install python3-dev"),
    ("cuda:0", "answers", nothing, r"--compile on cuda:0 needs a C compiler \(gcc or clang does not run\): install gcc"),
    ("cuda", "importlib.util.find_spec", nothing, "--compile on cuda needs Triton: pip install triton"),
    ("cuda", "python_header", nothing, r"--compile on cuda needs Python\.h"),
], ids=["g++", "Python.h", "gcc", "Triton", "Python.h on a GPU"])
def test_what_compiling_lacks(monkeypatch, device, name, value, says):
    compilation.check_compiler(device)
    monkeypatch.setattr(name if "." in name else f"techniques.compilation.{name}", value)
    with pytest.raises(UserError, match=says + ".*; or leave --compile out$") as e:
        compilation.check_compiler(device)
    assert "\n" not in str(e.value)
    compilation.check_compiler("mps")


def test_the_users_compiler(monkeypatch):
    """CXX and CC replace the usual names, as in PyTorch and Triton."""
    monkeypatch.setattr(compilation, "answers", lambda compiler: compiler == "mine")
    for device, variable in (("cpu", "CXX"), ("cuda", "CC")):
        monkeypatch.setenv(variable, "mine")
        compilation.check_compiler(device)
        monkeypatch.setenv(variable, "theirs")
        with pytest.raises(UserError, match="theirs does not run"):
            compilation.check_compiler(device)


@pytest.mark.skipif(os.name == "nt", reason="the stand-ins for a compiler are shell scripts")
def test_a_compiler_answers(monkeypatch, tmp_path):
    for name, status in (("good", 0), ("stub", 1)):
        (tmp_path / name).write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit {status}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [REAL_ANSWERS(name) for name in ("good", "stub", "absent", "good -O2")] == [True, False, False, False]


@pytest.mark.skipif(os.name == "nt", reason="PATH is looked up otherwise")
def test_without_a_compiler_the_command_ends_in_one_line(tmp_path):
    """Before anything is loaded: the model named here exists nowhere."""
    env = {**{k: v for k, v in os.environ.items() if k != "CXX"}, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / "train.py", "--compile", "--device", "cpu", "--model", tmp_path / "absent",
                           "--out", tmp_path / "run"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "run").exists()
    assert re.fullmatch(r"error: --compile on cpu needs a C\+\+ compiler .*; or leave --compile out\n", done.stderr)


def test_only_compile_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(compilation, "answers", nothing)
    train.resolve(train.TrainConfig(device="cpu"))
    with pytest.raises(UserError, match="--compile on cpu"):
        train.resolve(train.TrainConfig(device="cpu", compile=True))


def compiled() -> tuple[list, str | None]:
    """(what each block's compile() was given, the folder that PyTorch is told)."""
    calls = []
    block = SimpleNamespace(compile=lambda **options: calls.append(options))
    compilation.compile_blocks(SimpleNamespace(blocks=[block, block]))
    return calls, os.environ.get("TORCHINDUCTOR_CACHE_DIR")


@pytest.fixture
def caches(monkeypatch, tmp_path):
    """An empty $XDG_CACHE_HOME. (setenv and then delenv: afterwards the variable is as it was, whatever a test sets.)"""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


def test_compiled_code_waits_in_the_users_cache(caches, monkeypatch, tmp_path):
    calls, folder = compiled()
    assert calls == [{"dynamic": True}] * 2 and Path(folder).is_dir()
    assert Path(folder).parent == caches / "bytewise" and re.fullmatch("inductor-[0-9a-f]{8}", Path(folder).name)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert compilation.cache_folder().parent == tmp_path / "home" / ".cache" / "bytewise"


def test_the_users_own_cache_is_respected(caches, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    calls, folder = compiled()
    assert folder == "/somewhere" and len(calls) == 2 and not caches.exists()


def test_a_cache_that_cannot_be_written(caches, monkeypatch):
    caches.write_text("a file where the folder should be")
    assert compiled() == ([{"dynamic": True}] * 2, None)
    caches.unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # (root may write everywhere)
    assert compiled()[1] is None


def test_each_kind_of_cpu_has_its_folder(monkeypatch):
    """A home folder may be shared by machines, and -march=native means another CPU on each."""
    def folder(cpuinfo: str | None, machine="x86_64") -> Path:
        def read_text(self, **kw):
            if cpuinfo is None:
                raise FileNotFoundError
            return cpuinfo

        with monkeypatch.context() as m:
            m.setattr(Path, "read_text", read_text)
            m.setattr(platform, "machine", lambda: machine)
            return compilation.cache_folder()

    assert compilation.cache_folder() == compilation.cache_folder()
    x86, arm = "flags\t\t: sse2 avx2\n", "Features\t: fp asimd\n"
    different = [folder(x86), folder(x86.replace("avx2", "avx512f")), folder(arm), folder(arm.replace("fp", "fp sve")),
                 folder("model name\t: A\n" + x86), folder(None), folder(None, "arm64")]
    assert len(set(different)) == len(different)
    assert folder(f"{x86}cpu MHz\t\t: 2000\n") == folder(f"{x86}cpu MHz\t\t: 3000\n{x86}") == folder(x86)


MLPS = """
from types import SimpleNamespace
import torch
import gpt2
from techniques.compilation import compile_blocks
torch.manual_seed(0)
blocks = [gpt2.MLP(gpt2.Config(n_embd=8, n_inner=32)) for _ in range(2)]
for p in (p for block in blocks for p in block.parameters()):
    torch.nn.init.normal_(p)
compile_blocks(SimpleNamespace(blocks=blocks))
with torch.no_grad():  # (backward would be a second program to compile)
    y = [blocks[1](blocks[0](torch.randn(2, n, 8))).tolist() for n in (5, 7, 6)]
from torch._dynamo.utils import counters
print(y, counters["stats"]["unique_graphs"], counters["inductor"]["fxgraph_cache_miss"], sep="\\n")
"""


@pytest.mark.skipif(not WORKS_HERE, reason="no C++ compiler, or no Python.h")
def test_the_next_process_finds_the_compiled_code(caches):
    def run() -> list[str]:
        done = subprocess.run([sys.executable, "-c", MLPS], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first, second = run(), run()
    assert first[0] == second[0] and first[1] == second[1] == "1"  # equal bits; one program for two blocks, three lengths
    assert int(first[2]) > 0 == int(second[2])  # what the compiler did not find
    assert list(caches.glob("bytewise/inductor-*/**/*.so"))
