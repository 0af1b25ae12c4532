"""Models from the hub: the real client, in separate processes, downloads from a small hub on this machine."""
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import LLAMA, ROOT, make_folder
from hub_server import COMMIT, Hub
from safetensors.torch import load_file, save, save_file

import llama
import memory
from files import weights
from files.hub import SHORT_NAMES, is_complete

WAYS_ON = r"a local folder .* gpt2-nano, which is bundled"


def start(args, home, url, cwd=ROOT):
    """Start python `args` with a fresh HF_HOME, online, without a token or proxy."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env.update(HF_HOME=str(home), HF_ENDPOINT=url, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen([sys.executable, *map(str, args)], env=env, cwd=cwd, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(args, home, url, cwd=ROOT):
    p = start(args, home, url, cwd)
    out, err = p.communicate(timeout=120)
    return subprocess.CompletedProcess(args, p.returncode, out, err)


LOAD = """
import hashlib
import json
import sys
from files import weights
from safetensors.torch import save
results = {}
for name in sys.argv[1:]:
    try:
        model = weights.load(name)
        tensors = {n: p.detach().contiguous() for n, p in model.named_parameters()}
        results[name] = hashlib.sha256(save(tensors)).hexdigest()
    except weights.UserError as e:
        results[name] = f"UserError: {e}"
print(json.dumps(results))
"""


def digest(folder):
    """What LOAD prints for the model in `folder`."""
    return hashlib.sha256(save({n: p.detach().contiguous() for n, p in weights.load(folder).named_parameters()})).hexdigest()


def results_of(p):
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout.splitlines()[-1])


def shard(folder, n=2):
    """Split model.safetensors into n files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(n):
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        save_file({k: tensors[k] for k in names[i::n]}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names[i::n], file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    folders = {"org/sharded": shard(make_folder(base / "sharded", "llama", seed=1)),
               "openai-community/gpt2": make_folder(base / "gpt2", "gpt2", seed=2),
               "org/gated": make_folder(base / "gated", "gpt2", seed=3),
               "org/pickle": make_folder(base / "pickle", "gpt2", seed=4)}
    # Repositories also hold the weights of other frameworks, which must not be downloaded.
    pickled = {k: v.clone() for k, v in load_file(folders["org/pickle"] / "model.safetensors").items()}
    (folders["org/pickle"] / "model.safetensors").unlink()
    torch.save(pickled, folders["org/pickle"] / "pytorch_model.bin")
    torch.save(pickled, folders["org/sharded"] / "pytorch_model.bin")
    return folders


@pytest.fixture
def hub(models):
    with Hub(**models) as hub:
        yield hub


@pytest.fixture(scope="module")
def cut_off(models, tmp_path_factory):
    """A download that breaks off. The client retries for some seconds, so it runs beside the other tests."""
    home = tmp_path_factory.mktemp("cut-off")
    with Hub(**models) as hub:
        hub.cut.add("model-00002-of-00002.safetensors")
        yield hub, home, start([ROOT / "generate.py", "--model", "org/sharded", "--prompt", "hi"], home, hub.url)


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def the_error(p):
    """generate.py's one line of error, the last on stderr, after the client's progress bars and warnings."""
    assert p.returncode == 1
    assert "Traceback" not in p.stderr and p.stdout == ""
    own = [line for line in re.split(r"[\r\n]+", p.stderr) if line.startswith("error:")]
    assert len(own) == 1 and p.stderr.rstrip().endswith(own[0]), p.stderr
    return own[0]


def test_unreachable_hub_is_one_line_and_quick(cut_off, tmp_path):  # cut_off starts here; a later test reads it
    started = time.monotonic()
    p = run([ROOT / "generate.py", "--model", "org/sharded", "--prompt", "hi"], tmp_path, closed_port())
    assert time.monotonic() - started < 30
    error = the_error(p)
    assert p.stderr.strip() == error, "the client's own warnings around the line"
    assert re.search(rf"org/sharded is not on this machine and could not be downloaded \(.*\); .*{WAYS_ON}", error)


def test_what_cannot_be_downloaded_is_named(hub, models, tmp_path):
    # Before 2024 GPT-2's repository was named "gpt2". A cache of that time holds it under this name, with no list of files.
    old = tmp_path / "hub" / "models--gpt2"
    (old / "refs").mkdir(parents=True)
    (old / "refs" / "main").write_text(COMMIT)
    make_folder(old / "snapshots" / COMMIT, "gpt2", seed=9)
    hub.gated.add("org/gated")
    got = results_of(run(["-c", LOAD, "gpt2", "org/missing", "org/gated", "org/pickle", "no such/model--name", "gpt3"],
                         tmp_path, hub.url, cwd=tmp_path))
    assert got.pop("gpt2") == digest(old / "snapshots" / COMMIT)
    assert not any("openai-community" in r for r in hub.requests)
    assert all(e.startswith("UserError: ") and "\n" not in e for e in got.values()), got
    assert re.search(rf"org/missing: the hub has no such repository.*HF_TOKEN.*{WAYS_ON}", got["org/missing"])
    assert re.search(rf"org/gated needs its licence accepted on the hub.*HF_TOKEN.*{WAYS_ON}", got["org/gated"])
    assert re.search(r"models--org--pickle.*no model.safetensors.*pickle weights are not loaded.*Convert:.*save_pretrained",
                     got["org/pickle"])
    assert not any(r.endswith(".bin") for r in hub.requests), "a pickle was downloaded"
    assert re.search(r"no such/model--name.*no such folder", got["no such/model--name"])
    assert re.search(r"gpt3: no such folder, and no short name \(gpt2-nano, gpt2, .*org/name", got["gpt3"])


def test_local_folder_and_bundled_model_come_first(monkeypatch, tmp_path):
    monkeypatch.setattr("files.hub.from_hub", lambda *a: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    for name in ("org/tiny", "gpt2", "gpt2-nano"):
        make_folder(tmp_path / name)
    assert weights.find("org/tiny").resolve() == tmp_path / "org" / "tiny"
    assert weights.find("gpt2").resolve() == tmp_path / "gpt2"
    assert weights.find("gpt2-nano") == ROOT / "assets" / "gpt2-nano", "the bundled model comes before a folder of its name"
    assert weights.find("./gpt2-nano").resolve() == tmp_path / "gpt2-nano"


def test_download_that_breaks_off_then_a_whole_one_then_none(cut_off, models):
    """Three processes share one cache: the server first breaks off inside a shard, then works, then is gone."""
    hub, home, process = cut_off
    out, err = process.communicate(timeout=120)
    error = the_error(subprocess.CompletedProcess([], process.returncode, out, err))
    assert re.search(rf"org/sharded is not on this machine and could not be downloaded \(.*\); .*{WAYS_ON}", error)
    assert any(r.endswith("/model-00002-of-00002.safetensors") for r in hub.requests), "this proves nothing"
    snapshots = list((home / "hub" / "models--org--sharded" / "snapshots").iterdir())
    assert snapshots, "this proves nothing"
    assert not any(is_complete(s) for s in snapshots)

    hub.cut.clear()
    got = results_of(run(["-c", LOAD, "org/sharded", "gpt2"], home, hub.url))
    assert got["org/sharded"] == digest(models["org/sharded"])
    assert got["gpt2"] == digest(models["openai-community/gpt2"]), "the short name gpt2 is openai-community/gpt2"
    assert not any(r.endswith(".bin") for r in hub.requests), "weights of another kind were asked for"

    asked, hub.dead = len(hub.requests), True
    again = run([ROOT / "generate.py", "--model", "org/sharded", "--prompt", "hi", "--max-new-tokens", 2], home, hub.url)
    assert again.returncode == 0, again.stderr
    assert len(hub.requests) == asked, f"a cached model asked the network: {hub.requests[asked:]}"


# ---------------------------------------------------------------------------------------------- config.json alone

KNOWN = {  # name -> parameters as published, positions, size of a head, theta of the rotary positions, epsilon of the norms
    "gpt2": (124_439_808, 1024, 64, None, 1e-5),
    "gpt2-medium": (354_823_168, 1024, 64, None, 1e-5),
    "gpt2-large": (774_030_080, 1024, 64, None, 1e-5),
    "gpt2-xl": (1_557_611_200, 1024, 64, None, 1e-5),
    "llama-7b": (6_738_415_616, 2048, 128, 10_000, 1e-6),
    "llama-13b": (13_015_864_320, 2048, 128, 10_000, 1e-6),
    "llama-2-7b": (6_738_415_616, 4096, 128, 10_000, 1e-5),
    "llama-2-13b": (13_015_864_320, 4096, 128, 10_000, 1e-5),
    "llama-3-8b": (8_030_261_248, 8192, 128, 500_000, 1e-5),
    "llama-3.1-8b": (8_030_261_248, 131_072, 128, 500_000, 1e-5),
    "llama-3.2-1b": (1_235_814_400, 131_072, 64, 500_000, 1e-5),
    "llama-3.2-3b": (3_212_749_824, 131_072, 128, 500_000, 1e-5),
    "llama-3.2-1b-instruct": (1_235_814_400, 131_072, 64, 500_000, 1e-5),
    "llama-3.2-3b-instruct": (3_212_749_824, 131_072, 128, 500_000, 1e-5),
    "tinyllama": (1_100_048_384, 2048, 64, 10_000, 1e-5),
    "smollm2-135m": (134_515_008, 8192, 64, 100_000, 1e-5),
    "smollm2-360m": (361_821_120, 8192, 64, 100_000, 1e-5),
    "smollm2-1.7b": (1_711_376_384, 8192, 64, 130_000, 1e-5),
    "phi-1": (1_418_270_720, 2048, 64, 10_000, 1e-5),
    "phi-1.5": (1_418_270_720, 2048, 64, 10_000, 1e-5),
    "phi-2": (2_779_683_840, 2048, 80, 10_000, 1e-5),
}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_what_is_known_of_the_short_names(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config, model_class, raw = weights.config_of(name)
    with torch.device("meta"), weights.NoInit():
        total = memory.count(model_class(config))["total"]
    assert KNOWN[name] == (total, config.n_positions, config.head_dim, getattr(config, "rope_theta", None), config.norm_eps)
    assert weights.config_of(SHORT_NAMES[name][0]) == (config, model_class, raw), "the repository of a short name"
    if name.startswith(("llama-3.1", "llama-3.2")):
        assert config.rope_scaling == {"rope_type": "llama3", "factor": 8.0 if "3.1" in name else 32.0,
                                       "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                       "original_max_position_embeddings": 8192}
    elif model_class is llama.Llama:
        assert config.rope_scaling is None
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert weights.read_config(tmp_path) == (config, model_class, raw), "as a file it reads the same"


CONFIG_OF = """
import json
import sys
from files import weights
results = {}
for name in sys.argv[1:]:
    try:
        results[name] = weights.config_of(name)[0].n_layer
    except weights.UserError as e:
        results[name] = f"UserError: {e}"
print(json.dumps(results))
"""


def test_a_config_alone_is_found_and_nothing_is_asked_of_the_network(hub, tmp_path):
    """The number of layers shows where each config came from: bundled, folder, cache without weights, or known names."""
    def config_in(folder, n_layer):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": n_layer}))

    cached = {"org/sharded": 7, "openai-community/gpt2": 8, "gpt2-medium": 9, "microsoft/phi-2": 10}  # (gpt2-medium: old)
    for repo, n_layer in cached.items():
        place = tmp_path / "hub" / ("models--" + repo.replace("/", "--"))
        config_in(place / "snapshots" / COMMIT, n_layer)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(COMMIT)
    config_in(tmp_path / "llama-7b", 5)
    config_in(tmp_path / "org" / "local", 6)
    (tmp_path / "empty").mkdir()
    p = run(["-c", CONFIG_OF, "gpt2-nano", "llama-7b", "org/local", "org/sharded", "gpt2", "gpt2-medium", "microsoft/phi-2",
             "llama-13b", "microsoft/phi-1", "org/missing", "gpt3", "empty"], tmp_path, hub.url, cwd=tmp_path)
    got = results_of(p)
    assert hub.requests == []
    errors = {name: got.pop(name) for name in ("org/missing", "gpt3", "empty")}
    nano = json.loads((ROOT / "assets" / "gpt2-nano" / "config.json").read_text())["n_layer"]
    assert got == {"gpt2-nano": nano, "llama-7b": 5, "org/local": 6, "org/sharded": 7, "gpt2": 8, "gpt2-medium": 9,
                   "microsoft/phi-2": 10, "llama-13b": 40, "microsoft/phi-1": 24}
    assert not any("\n" in e for e in errors.values())
    assert re.search(r"^UserError: org/missing is not on this machine. Its config.json .* a folder .* short names "
                     r"\(gpt2-nano, gpt2, ", errors["org/missing"])
    assert re.search(r"^UserError: --model gpt3: no such folder, and no short name", errors["gpt3"])
    assert re.search(r"^UserError: empty/config.json: No such file", errors["empty"])
