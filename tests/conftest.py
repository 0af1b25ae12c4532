"""Shared by all tests: the path, no network, and tiny models in which every parameter is random.

Equal logits at the default initialisation prove little. There norms are ones and biases are zeros, so a tensor that is
swapped or dropped changes nothing.
"""
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the hub's client
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny tensors, a second thread only waits for the first
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import lora  # noqa: E402
from files import weights  # noqa: E402
from ledger import ask  # noqa: E402
from techniques.device import CPU, Device, device_of, pretend  # noqa: E402

NANO = ROOT / "assets" / "gpt2-nano"
GPT2 = {"model_type": "gpt2", "vocab_size": 4096, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "eos_token_id": 4095, "bos_token_id": 4095}
LLAMA = {"model_type": "llama", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "hidden_act": "silu",
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": 4095,
         "bos_token_id": 4095}
PHI = {"model_type": "phi", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
       "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "hidden_act": "gelu_new",
       "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "tie_word_embeddings": False,
       "eos_token_id": 4095, "bos_token_id": 4095}


def randomise(model, seed=0):
    """Make every parameter random, norms and biases too, so that pre-activations are of size 1 to 3."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=rng)
            p.copy_(1 + 0.3 * noise if p.dim() == 1 else noise / p.shape[-1] ** 0.5)
    return model


def make_folder(path, family="gpt2", seed=0, **overrides):
    """A model folder in the Hugging Face layout: tiny, random, with gpt2-nano's tokenizer (4,096 tokens)."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {**{"gpt2": GPT2, "llama": LLAMA, "phi": PHI}[family], **overrides}
    (path / "config.json").write_text(json.dumps(config))
    for f in ("vocab.json", "merges.txt"):
        shutil.copy(NANO / f, path / f)
    weights.save(randomise(weights.from_scratch(path), seed), path)
    return path


def adapted(folder, seed, bits=32, method=lora, **options):
    """A model with a random adapter. With B = 0 it would change nothing."""
    model, rng = method.inject(weights.load(folder, bits=bits), **options), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=1 / p.shape[-1] ** 0.5, generator=rng)
    return model


def make_data(path, n=40):
    """n instruction rows of unequal length."""
    rows = [{"instruction": f"Say the number {i} " + "please " * (i % 5), "input": "now" if i % 3 == 0 else "",
             "output": "It is " + " ".join(str(j) for j in range(i % 9 + 1)) + "."} for i in range(n)]
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Path(path)


@pytest.fixture
def gpt2_folder(tmp_path):
    return make_folder(tmp_path / "gpt2-tiny", "gpt2")


@pytest.fixture
def llama_folder(tmp_path):
    return make_folder(tmp_path / "llama-tiny", "llama")


@pytest.fixture
def data_file(tmp_path):
    return make_data(tmp_path / "data.jsonl")


class NoPredictor:
    """Stands in for ask.Predictor, which would start a process of 4 seconds for each of hundreds of tiny runs."""

    def ask(self, cfg, steps):
        return self

    def answer(self):
        return {"error": "left out in the tests"}

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


REAL_PREDICTOR = ask.Predictor


@pytest.fixture(scope="session", autouse=True)
def no_prediction():
    """No test predicts, except those of test_predict.py, which put the real Predictor back."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ask, "Predictor", NoPredictor)
        yield


def pytest_addoption(parser):
    parser.addoption("--products", default="bfloat16", choices=("bfloat16", "float32"),
                     help="the type in which --amp multiplies: float32 runs the tests as on a CPU without 16-bit units")


@pytest.fixture(scope="session", autouse=True)
def one_machine(request):
    """The tests take the same path on every machine, however fast its CPU multiplies in 16 bit. on_device changes it."""
    products = getattr(torch, request.config.getoption("--products"))
    with pretend("cpu", Device("cpu", products=products, why="a test", **CPU)):
        yield


def held_dtype(p) -> torch.dtype:
    """The type of a parameter that --bits 16 holds: norms and biases are float32 where products are (techniques/half.py)."""
    return torch.float32 if p.dim() < 2 and device_of("cpu").products == torch.float32 else torch.bfloat16


@pytest.fixture
def on_device():
    """on_device(half=torch.float16, ...): until the test ends, the CPU is a device with these answers."""
    def enter(**answers):
        now = device_of("cpu")
        if "half" in answers and now.products != torch.float32:
            answers.setdefault("products", answers["half"])
        return stack.enter_context(pretend("cpu", dataclasses.replace(now, rooms={}, **answers)))

    with contextlib.ExitStack() as stack:
        yield enter
