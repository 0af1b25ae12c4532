"""From a model's name to its folder: where the program looks for a model, and which files a complete model has.

A name is a short name (`gpt2`), a hub repository (`org/name`) or a folder. The program looks in four places, in this order:

    1. the bundled assets/               gpt2-nano
    2. a local folder of that name
    3. the hub's cache on this machine   a complete model in it is used as it is, without any network
    4. the hub                           only the safetensors, JSON, tokenizer and template files are downloaded

In each place the model is a folder in the Hugging Face layout:

    config.json                                                            the architecture (`model_type`, see weights.py)
    model.safetensors, or *.safetensors + model.safetensors.index.json     the weights, in one file or in shards
    tokenizer.json, tokenizer.model, or vocab.json + merges.txt            the tokenizer (tokenizer.py)

The config.json of a published model does not change. So this file holds the important part of it for each short name. This
part alone tells how many parameters and bytes LLaMA-7B has, without a network and without a download of 13.5 GB.
"""
import contextlib
import shlex
from pathlib import Path

from errors import UserError
from files.json_files import read_json, show

ASSETS = Path(__file__).resolve().parent.parent / "assets"


# ---------------------------------------------------------------------------------------------- short names

def gpt2(width: int, layers: int, heads: int) -> dict:
    return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_layer": layers,
            "n_head": heads, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


def llama(width: int, layers: int, heads: int, kv_heads: int, inner: int, **other) -> dict:
    return {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "intermediate_size": inner, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": False, **other}


def phi(width: int, layers: int, rotary_factor: float) -> dict:
    return {"model_type": "phi", "vocab_size": 51200, "max_position_embeddings": 2048, "hidden_size": width,
            "num_hidden_layers": layers, "num_attention_heads": 32, "intermediate_size": 4 * width, "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": rotary_factor,
            "tie_word_embeddings": False}


def llama31(factor: float) -> dict:  # pretrained on 8,192 positions, then extended to 131,072
    return {**LLAMA3, "max_position_embeddings": 131072, "rope_scaling": {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}}


LLAMA3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
LLAMA32 = {**llama31(32.0), "tie_word_embeddings": True}
SMOLLM2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}
SHORT_NAMES = {  # name -> (hub repository, the part of its config.json that the model depends on)
    "gpt2": ("openai-community/gpt2", gpt2(768, 12, 12)),
    "gpt2-medium": ("openai-community/gpt2-medium", gpt2(1024, 24, 16)),
    "gpt2-large": ("openai-community/gpt2-large", gpt2(1280, 36, 20)),
    "gpt2-xl": ("openai-community/gpt2-xl", gpt2(1600, 48, 25)),
    "llama-7b": ("huggyllama/llama-7b", llama(4096, 32, 32, 32, 11008, rms_norm_eps=1e-6)),
    "llama-13b": ("huggyllama/llama-13b", llama(5120, 40, 40, 40, 13824, rms_norm_eps=1e-6)),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", llama(4096, 32, 32, 32, 11008, max_position_embeddings=4096)),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", llama(5120, 40, 40, 40, 13824, max_position_embeddings=4096)),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", llama(4096, 32, 32, 8, 14336, **LLAMA3)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", llama(4096, 32, 32, 8, 14336, **llama31(8.0))),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", llama(2048, 16, 32, 8, 8192, **LLAMA32)),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", llama(3072, 28, 24, 8, 8192, **LLAMA32)),
    "llama-3.2-1b-instruct": ("meta-llama/Llama-3.2-1B-Instruct", llama(2048, 16, 32, 8, 8192, **LLAMA32)),
    "llama-3.2-3b-instruct": ("meta-llama/Llama-3.2-3B-Instruct", llama(3072, 28, 24, 8, 8192, **LLAMA32)),
    "tinyllama": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", llama(2048, 22, 32, 4, 5632)),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", llama(576, 30, 9, 3, 1536, **SMOLLM2)),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", llama(960, 32, 15, 5, 2560, **SMOLLM2)),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct",
                     llama(2048, 24, 32, 32, 8192, **{**SMOLLM2, "rope_theta": 130000.0})),
    "phi-1": ("microsoft/phi-1", phi(2048, 24, 0.5)),
    "phi-1.5": ("microsoft/phi-1_5", phi(2048, 24, 0.5)),
    "phi-2": ("microsoft/phi-2", phi(2560, 32, 0.4)),
}


# ---------------------------------------------------------------------------------------------- name -> folder

def find(name: str) -> Path:
    """The folder that holds model `name`: a short name, a local folder or a hub repository. May download it."""
    return local_folder(name) or from_hub(name, repository(name))


def local_folder(name: str) -> Path | None:
    with contextlib.suppress(OSError):  # a name that is too long for a file
        if Path(name).name == name and (ASSETS / name / "config.json").is_file():  # (./gpt2-nano is the user's own folder)
            return ASSETS / name
        if Path(name).is_dir():
            refuse_adapter(Path(name))
            return Path(name)
    return None


def refuse_adapter(folder: Path):
    """Raise UserError if a folder holds an adapter and no model, and say what to type instead."""
    path = folder / "adapter_config.json"
    if path.is_file() and not (folder / "config.json").is_file():
        base = read_json(path).get("base_model_name_or_path")
        base = shlex.quote(base) if isinstance(base, str) and base and base.isprintable() else "BASE"
        raise UserError(f"--model {folder} is an adapter, not a model; type --model {base} "
                        f"--adapter {shlex.quote(str(folder))}")


def repository(name: str) -> str:
    """The hub repository that `name` stands for. Raises UserError if `name` cannot be a repository."""
    repo = SHORT_NAMES[name][0] if name in SHORT_NAMES else name
    if not is_hub_name(repo):
        raise UserError(f"--model {name}: no such folder, and no short name ({', '.join(['gpt2-nano', *SHORT_NAMES])}); "
                        f"a hub repository is written org/name")
    return repo


def is_hub_name(repo: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    try:
        validate_repo_id(repo)
    except HFValidationError:  # spaces, "--", a leading dot: probably a mistyped path
        return False
    return repo.count("/") == 1


def names_in_cache(name: str, repo: str) -> list[str]:
    return [repo, repo.split("/")[1]] if name in SHORT_NAMES else [repo]  # (GPT-2's repository was once named "gpt2")


def from_hub(name: str, repo: str) -> Path:
    """A complete snapshot from the hub's cache, without any network; if there is none, download it. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = dict(allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"], ignore_patterns=["*/*"])
    for cached in names_in_cache(name, repo):
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(cached, local_files_only=True, **wanted))
            if is_complete(folder):
                return folder
    way_out = f"--model accepts a local folder with {repo}'s files, or gpt2-nano, which is bundled"
    try:
        return Path(snapshot_download(repo, **wanted))
    except GatedRepoError:
        raise UserError(f"{repo} needs its licence accepted on the hub and your token in HF_TOKEN; {way_out}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{repo}: the hub has no such repository (or it is private: set HF_TOKEN); {way_out}") from None
    except Exception as e:  # the client raises many kinds of exception; each one means that no model arrived
        reason = (str(e).strip().splitlines() or [""])[0]
        raise UserError(f"{repo} is not on this machine and could not be downloaded "
                        f"({type(e).__name__}: {reason}); {way_out}") from None


# ---------------------------------------------------------------------------------------------- the files of a folder

def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model. Raises UserError if there are none.

    Pickle files (*.bin, *.pt) are not loaded: unpickling a file runs any code that the file contains.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(f, str) for f in shards.values()):
            raise UserError(f"{index}: no weight_map from tensor names to files in it")
        for f in (files := sorted(set(shards.values()))):
            if Path(f).name != f or not f.endswith(".safetensors") or not f.isprintable():
                raise UserError(f"{index}: {show(f)} is no name of a safetensors file in this folder")
        return [folder / f for f in files]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    no_pickle = ("pickle weights are not loaded, since a pickle can run any code. Convert: transformers' "
                 "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors")
    if pickles := [f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in sorted(folder.glob(pattern))]:
        raise UserError(f"{folder / pickles[0]}: {no_pickle}")
    # pytorch_model.bin is never downloaded, so a folder from the hub cannot show it. The user converts it the same way.
    raise UserError(f"{folder}: no model.safetensors (nor model.safetensors.index.json) in it; {no_pickle}")


def is_complete(folder: Path) -> bool:
    """Whether a cached snapshot has its config.json and every weight file (an interrupted download lacks some)."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return all(f.is_file() for f in weight_files(folder))
    except UserError:
        return False


# ---------------------------------------------------------------------------------------------- name -> config.json

def config_file(name: str) -> Path | None:
    """The model's config.json in the first three places, or None. The weights need not be there. Uses no network."""
    if folder := local_folder(name):
        return folder / "config.json"
    from huggingface_hub import try_to_load_from_cache
    cached = (try_to_load_from_cache(repo, "config.json") for repo in names_in_cache(name, repository(name)))
    return next((Path(path) for path in cached if isinstance(path, str)), None)


def known_config(name: str) -> dict | None:
    """The config.json from SHORT_NAMES, for a short name or for the hub repository of one; None for other names."""
    return next((config for short, (repo, config) in SHORT_NAMES.items() if name in (short, repo)), None)
