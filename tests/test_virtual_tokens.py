"""methods/prompt.py and methods/prefix.py: PEFT's logits, every form of a batch, generation with a KV cache, bad files."""
import json

import pytest
import torch
from conftest import REAL_PREDICTOR, make_data, make_folder
from runs import evaluations, lines, no_picture, options, run, steps, timeless
from safetensors.torch import load_file, save_file

import data
import generate
import memory
import train
from errors import UserError
from files import peft_files, weights
from ledger import ask
from methods import prefix, prompt
from run import prepare
from techniques import attention
from techniques.device import device_of
from techniques.kv_cache import KVCache

N = 5
METHODS = pytest.mark.parametrize("method", ["prompt", "prefix"])
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
IDS = torch.randint(0, 4096, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny model folder for each family, shared: no test may write into it."""
    root = tmp_path_factory.mktemp("models")
    return {family: make_folder(root / family, family) for family in ("gpt2", "llama", "phi")}


def trained(model) -> list:
    return [p for p in model.parameters() if p.requires_grad]


def virtual(folder, method, n=N, bits=32):
    """A model with n random virtual tokens, as large as real ones: at the start of 0.02 a prefix would change little."""
    model = {"prompt": prompt, "prefix": prefix}[method].inject(weights.load(folder, bits=bits), n)
    (p,), rng = trained(model), torch.Generator().manual_seed(2)
    p.data.copy_(torch.randn(p.shape, generator=rng) * (0.2 if method == "prompt" else 1))
    return model


def transformers_model(folder):
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------- PEFT

@torch.no_grad()
def peft_logits(model):
    out = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return out[:, -IDS.shape[1]:]  # prompt tuning gives those of the virtual tokens too


@METHODS
@FAMILIES
def test_peft_reads_what_is_written_here(family, method, folders, tmp_path):
    peft = pytest.importorskip("peft")
    model = virtual(folders[family], method)
    peft_files.save(model, tmp_path)
    theirs = peft_logits(peft.PeftModel.from_pretrained(transformers_model(folders[family]), tmp_path))
    with torch.no_grad():
        assert torch.allclose(model(IDS), theirs, atol=1e-4)
    again = peft_files.load(weights.load(folders[family]), tmp_path)
    assert torch.equal(again(IDS), model(IDS))


@pytest.mark.parametrize("method, more", [("prompt", {}), ("prefix", {}), ("prefix", {"prefix_projection": True})])
@FAMILIES
def test_what_peft_writes_is_read_here(family, method, more, folders, tmp_path):
    """PEFT saves a projected prefix (prefix_projection) as the extra network computes it."""
    peft = pytest.importorskip("peft")
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[method]
    theirs = peft.get_peft_model(transformers_model(folders[family]),
                                 config(task_type="CAUSAL_LM", num_virtual_tokens=N, **more))
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(
            torch.randn(theirs.prompt_encoder.default.embedding.weight.shape, generator=torch.Generator().manual_seed(3)))
    theirs.save_pretrained(tmp_path)
    model = peft_files.load(weights.load(folders[family]), tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(IDS), peft_logits(theirs), atol=1e-4)
        assert not torch.allclose(model(IDS), weights.load(folders[family])(IDS), atol=0.1)
    assert peft_files.options(tmp_path, str(folders[family])) == {"method": method, "virtual_tokens": N}
