"""Which file may import which, read from the source; and that the commands work from any folder."""
import ast
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, make_data, make_folder

MODELS = {"gpt2", "llama", "phi"}
COMMANDS = {"train", "generate", "compare", "serve", "export"}
# Floors, the lowest first. A file imports from its own floor and from those below.
FLOORS = [{"errors", "terminal"}, {"techniques"}, {*MODELS, "lora", "memory"}, {"methods"}, {"files"}, {"data"}, {"run"},
          {"ledger"}, {"serving"}, COMMANDS, {"bench"}]
# Few files import from a command: train.py, the comparison and the server take generate.py's sampling, and a run can end
# with a comparison; the prediction and the bench of a GPU run the training step, the fault campaign whole commands.
FROM_COMMANDS = {("train", "generate"), ("train", "compare"), ("compare", "generate"), ("run.comparison", "generate"),
                 ("serve", "generate"), ("serving.engine", "generate"), ("serving.server", "generate"),
                 ("ledger.predict", "train"), ("bench.gpu_claims", "train"),
                 ("bench.fault_base", "train"), ("bench.faults", "train"), ("bench.faults", "generate"),
                 ("bench.methods", "train"), ("bench.serving", "generate")}
FOLDERS = {"techniques", "methods", "files", "run", "ledger", "serving", "bench"}
CORE = ("train", "gpt2", "lora", "techniques.loss", "techniques.recompute", "techniques.attention")

SOURCES = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
           for f in [*ROOT.glob("*.py"), *(f for folder in FOLDERS for f in (ROOT / folder).glob("*.py"))]}


def imports(name: str) -> set[str]:
    """This project's modules that `name` imports, at the top of the file or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide where a file stands"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in SOURCES else node.module)
    return found & SOURCES.keys() - {name}


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name.partition(".")[0] in names)


GRAPH = {name: imports(name) for name in SOURCES}


def test_every_file_has_a_floor_and_is_read():
    assert {name.partition(".")[0] for name in SOURCES} == set().union(*FLOORS)
    assert {f for f in ROOT.glob("*/*.py") if f.parent.name not in ("tests", "docs")} <= set(SOURCES.values())
    assert sum(map(len, GRAPH.values())) > 100 and "techniques.nf4_triton" in GRAPH["techniques.device"]  # in a function


def test_no_circle():
    done = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in GRAPH:
        visit(name, [])


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_run_down(name):
    for other in GRAPH[name]:
        if (name, other) in FROM_COMMANDS:
            continue
        assert other not in COMMANDS, f"{name} imports the command {other}"
        assert floor(other) <= floor(name), f"{name} imports {other}, which stands above it"
        if name in MODELS:
            assert other.startswith("techniques."), f"{name} imports {other}; a model file stands by itself"
        if floor(name) == 1:
            assert other.startswith("techniques.") or other == "errors"


def test_the_core_is_an_afternoon():
    lines = sum(len(SOURCES[name].read_text(encoding="utf-8").splitlines()) for name in CORE)
    assert lines < 1250 and len(list(ROOT.glob("*.py"))) <= 13  # (the 13th is serve.py)


def test_no_name_is_taken():
    """No module has a name of Python's or of an installed package: the root is on sys.path while a command runs."""
    names = {name.partition(".")[0] for name in SOURCES}
    assert not names & set(sys.stdlib_module_names)
    assert not names & set(importlib.metadata.packages_distributions())


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A working directory, with a PYTHONPATH whose modules have this project's names and fail when they are imported."""
    place = tmp_path_factory.mktemp("elsewhere")
    make_folder(place / "tiny", "gpt2")
    make_data(place / "rows.jsonl", 12)
    for name in {n.partition(".")[0] for n in SOURCES}:
        (place / "theirs" / name).mkdir(parents=True)
        (place / "theirs" / name / "__init__.py").write_text(f"raise RuntimeError('another {name}')")
    return place


def python(place, *words):
    env = {**os.environ, "PYTHONPATH": str(place / "theirs")}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_run_from_anywhere(elsewhere):
    """They find the bundled files, the prediction's process, the commit and a model's relative path."""
    python(elsewhere, ROOT / "train.py", "--model", "tiny", "--data", "rows.jsonl", "--steps", 3, "--samples", 0,
           "--max-length", 128, "--out", "run")
    memory = json.loads((elsewhere / "run" / "summary.json").read_text())["memory"]
    assert memory["predicted_peak"] == memory["measured_peak"] > 0
    commit = json.loads((elsewhere / "run" / "config.json").read_text())["commit"]
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        assert commit == head.stdout.strip()
    assert "predicted peak on cpu" in python(elsewhere, ROOT / "train.py", "--dry-run", "--steps", 2)  # the bundled files
    assert python(elsewhere, ROOT / "generate.py", "--model", "tiny", "--adapter", "run/adapter", "--prompt", "hello",
                  "--max-new-tokens", 2)
    python(elsewhere, ROOT / "export.py", "merge", "--model", "tiny", "--adapter", "run/adapter", "--out", "merged")
    assert (elsewhere / "merged" / "model.safetensors").is_file()
    python(elsewhere, ROOT / "compare.py", "--model", "tiny", "--adapter", "run/adapter", "--data", "rows.jsonl",
           "--max-examples", 2, "--out", "page")  # with the bundled general text
    assert (elsewhere / "page" / "compare.md").is_file()


def test_the_bench_runs_from_anywhere(elsewhere):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "python -m bench NAME" in done.stdout
