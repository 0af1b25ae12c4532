"""From a folder to a loaded model, and back: config.json -> the model's class -> safetensors, tensor by tensor.

Which folder a name stands for, and what is in it, is told in hub.py.

Loading is strict both ways: a tensor that is missing, unexpected or of another shape stops the run. (`strict=False` is
how a LoRA run silently starts from random weights.) And it is small: the model is built on the "meta" device, without
storage, then each tensor is read, cast and dropped in its place. LLaMA-7B in 16 bit peaks at its 13.5 GB + one tensor,
where building it in float32 and calling load_state_dict would take 27 + 13.5 GB.
"""
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

import gpt2
import llama
import phi
from errors import UserError
from files import hub
from files.hub import find, read_json, weight_files
from techniques import quant
from techniques.device import device_of

# Adding a model family
#
# 1. One file at the root, from ids to logits, with `Config` and a model class; llama.py is the one to copy. They offer:
#
#      Config             a dataclass with the field names of the other families
#      Config.from_json   config.json's dict -> Config; raises ValueError for any option that the file does not implement
#      attribute names    the checkpoint's own, so that loading needs no table; `prefix` is what some files put in front
#      head_name, head    the name of the output projection, and the module
#      blocks             the list of layers
#      default_targets    the linear layers that carry an adapter unless --lora-targets says otherwise
#      tie()              shares the embedding with the head where config.tied_head says so
#      hidden(ids, positions, segments, cache)   (B, T) -> (B, T, C), up to the final norm. Layer i is recomputed when
#                         (i + 1) % ckpt_every == 0; ckpt_offload says where its input waits
#      forward            head(hidden(...)): the logits (B, T, V). No loss, no optimizer, no sampling
#      parts, fan_in_fan_out   on a linear layer that holds several matrices, or its weight transposed (gpt2.py)
#
#    A model file imports techniques only, and no other model file.
# 2. A line in FAMILIES; the names of the matrices that write into the residual stream in WRITES; its short names and
#    what counts of their config.json in hub.py.
# 3. Tests: a tiny config.json in tests/conftest.py, and the family's name in the lists of tests/test_models.py (logits,
#    cache, packing against transformers), test_lora.py, test_quant.py, test_predict.py.
FAMILIES = {"gpt2": (gpt2.Config, gpt2.GPT2), "llama": (llama.Config, llama.Llama),  # by config.json's model_type
            "phi": (phi.Config, phi.Phi)}
# Checkpoint entries that are not weights: masks and frequencies that old files carry along.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
# The matrices that write into the residual stream.
WRITES = ("c_proj.weight", "o_proj.weight", "down_proj.weight", "dense.weight", "fc2.weight")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")


# ---------------------------------------------------------------------------------------------- folder -> model

def config_from(raw: dict):
    """config.json's dict -> (Config, model class). Raises ValueError, KeyError or TypeError."""
    config_class, model_class = FAMILIES[raw["model_type"]]
    return config_class.from_json({k: v for k, v in raw.items() if k != "quantization_config"}), model_class


def read_config(folder: Path):
    """config.json -> (Config, model class, the raw dict)."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if (kind := raw.get("model_type")) not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not supported (only {', '.join(FAMILIES)})")
    try:
        return *config_from(raw), raw
    except KeyError as e:
        raise UserError(f"{path}: key {e} is missing") from None
    except (ValueError, TypeError, ZeroDivisionError) as e:  # the last two: values that make no sense
        raise UserError(f"{path}: {e}") from None


def config_of(name: str):
    """(Config, model class, the raw dict) of a model whose weights need not be on this machine. No network is used.

    What is on disk comes before what hub.py knows of the short names. Raises UserError where there is neither.
    """
    if path := hub.config_file(str(name)):
        return read_config(path.parent)
    if not (raw := hub.known_config(str(name))):
        raise UserError(f"{name} is not on this machine. Its config.json alone would do, without the weights: give a folder "
                        f"that has it, or one of the short names ({', '.join(['gpt2-nano', *hub.SHORT_NAMES])})")
    return *config_from(raw), raw


class NoInit(TorchFunctionMode):
    """Layers are made without their random start, which nobody would see. On the "meta" device it would be worse than
    idle: `normal_` of a tensor without storage imports PyTorch's compiler, 72 MB and 2 seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) != "torch.nn.init":
            return func(*args, **(kwargs or {}))


def without_storage(model_class, config) -> nn.Module:
    """The model with its shapes on the "meta" device: no storage, no random start."""
    with torch.device("meta"), NoInit():
        return model_class(config)


def stored_bits(folder: Path) -> int | None:
    """8 or 4 for a checkpoint that transformers wrote with bitsandbytes, None for a plain one. Others raise UserError."""
    path = Path(folder) / "config.json"
    if not (q := read_json(path).get("quantization_config")):
        return None
    kind = str(q.get("quant_method", "bitsandbytes"))  # older files do not say
    if kind == "bitsandbytes" and q.get("load_in_8bit"):
        return 8
    if kind == "bitsandbytes":
        kind = q.get("bnb_4bit_quant_type", "fp4")
        if kind == "nf4" and q.get("bnb_4bit_quant_storage", "uint8") == "uint8":
            return 4
        kind += f" stored as {q.get('bnb_4bit_quant_storage', 'uint8')}"
    raise UserError(f"{path}: the weights are quantised ({kind}); of such checkpoints only bitsandbytes' nf4 and int8 are "
                    f"supported. Take the 16-bit one and quantise it with --bits 4")


def load(name: str, bits: int = 32, device="cpu") -> nn.Module:
    """A model with its pretrained weights. name: short name, org/name or folder.

    bits: 32 (float32), 16, or 8 or 4 for the linear layers' weights, the rest in 16. Each tensor is quantised, as the file
    has it, when it arrives: nothing ever holds the model in 16 bit, nor does a GPU ever see a 16-bit layer.
    Raises UserError, naming the file and the tensor, for anything that is not exactly this model's set of weights.
    """
    if bits not in (32, 16, 8, 4):
        raise UserError(f"--bits {bits}: only 32, 16, 8 and 4")
    folder = find(str(name))
    config, model_class, _ = read_config(folder)
    stored = stored_bits(folder)
    if stored not in (None, bits):
        raise UserError(f"--bits {bits}: the weights in {folder} are stored in {stored} bit, load them with --bits {stored}")
    model = without_storage(model_class, config)
    dtype = torch.float32 if bits == 32 else device_of(device).half
    low_bit = low_bit_weights(model)
    files = {key: path for path in weight_files(folder) for key in tensor_names(path)}
    head, head_weight, used = None, f"{model.head_name}.weight", set()
    for n, (path, key, shape) in places(model, folder, files, stored).items():
        tensor = read_tensor(path, key)
        coded = stored and n in low_bit and not tensor.is_floating_point()
        if not coded:
            check_tensor(tensor, path, key, shape)
        if n == head_weight and config.tied_head:  # some files store the tied matrix twice; it must be the same one
            head = tensor.to(device, dtype)
        elif coded or bits < 16 and not stored and n in low_bit:
            owner, _, leaf = n.removesuffix(".weight").rpartition(".")
            like = model.get_submodule(owner).get_submodule(leaf)
            try:
                if coded:
                    parts = {k: read_tensor(f, k) for k, f in files.items() if quant.belongs_to(k) == key}
                    used |= parts.keys()
                    layer = quant.from_checkpoint(like, tensor, {k.rpartition(".")[2]: t for k, t in parts.items()})
                else:
                    layer = quant.quantize(like, tensor, bits)
            except ValueError as e:
                raise UserError(f"{path}: tensor {key}: {e}") from None
            bias, layer.bias = layer.bias, None  # which a later shard may hold: then it is on "meta" still
            setattr(model.get_submodule(owner), leaf, layer.to(device))
            layer.bias = bias
        else:
            set_parameter(model, n, tensor.to(device, dtype))
        del tensor  # before the next one is read
    if extra := [k for k in files if stored and quant.belongs_to(k) in files and k not in used]:
        raise UserError(f"{files[extra[0]]}: unexpected tensor {extra[0]}: its weight is not quantised")
    model.tie()
    if head is not None and not torch.equal(head, model.head.weight):
        raise UserError(f"{folder}: {head_weight} differs from the embedding, but config.json ties them; "
                        f"set \"tie_word_embeddings\": false in it")
    model.source, model.bits = str(name), bits  # an adapter's files record them
    return model


def low_bit_weights(model: nn.Module) -> set[str]:
    """What 8 and 4 bits are for: the weights of all linear layers but the head."""
    return {f"{n}.weight" for n, m in model.named_modules() if hasattr(m, "in_features") and n != model.head_name}


def places(model: nn.Module, folder: Path, files: dict, stored: int | None) -> dict[str, tuple[Path, str, torch.Size]]:
    """Where each weight of `model` is: its name -> (file, its name there, shape). files: tensor name there -> file.

    A tied head is listed as the embedding, and as the head too if the file has it. Raises UserError: missing, unexpected.
    """
    expected = {n: p.shape for n, p in model.named_parameters()}  # a tied head is listed once, as the embedding
    where = {}
    for key, path in files.items():
        if key.endswith(NOT_WEIGHTS) or stored and quant.belongs_to(key) in files:
            continue
        n = key.removeprefix(model.prefix)
        tied_head = n == f"{model.head_name}.weight" and model.config.tied_head
        if n not in expected and not tied_head:
            raise UserError(f"{path}: unexpected tensor {key}, which {folder / 'config.json'} has no place for")
        where[n] = path, key, model.head.weight.shape if tied_head else expected[n]
    if missing := [n for n in expected if n not in where]:
        raise UserError(f"{folder}: tensor {missing[0]} of shape {list(expected[missing[0]])} is missing"
                        + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""))
    return where


def check_tensor(tensor: torch.Tensor, path: Path, key: str, shape: torch.Size):
    if tensor.shape != shape:
        raise UserError(f"{path}: tensor {key} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
    if not tensor.is_floating_point():
        raise UserError(f"{path}: tensor {key} holds {tensor.dtype}; quantised how? config.json does not say")


class StoredWeights:
    """A model's weights as they were before any rounding to fewer bits, read one at a time and not kept.

    `model` has their shapes and no storage. Raises UserError for a checkpoint that is quantised: they are not in it.
    """

    def __init__(self, name: str):
        self.folder = find(str(name))
        config, model_class, self.raw_config = read_config(self.folder)
        if stored := stored_bits(self.folder):
            raise UserError(f"{self.folder} holds its weights in {stored} bit only, and this needs them in full precision; "
                            f"give the model that it was made from")
        self.model = without_storage(model_class, config)
        files = {key: path for path in weight_files(self.folder) for key in tensor_names(path)}
        self.places = places(self.model, self.folder, files, None)
        head = self.model.head.weight
        self.head = next(n for n, p in self.model.named_parameters() if p is head)  # the embedding, if they are tied

    def read(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model, float32, laid out as in the file (Conv1D's transposed)."""
        path, key, shape = self.places[self.head if name == f"{self.model.head_name}.weight" else name]
        tensor = read_tensor(path, key)
        check_tensor(tensor, path, key, shape)
        return tensor.float()


def tensor_names(path: Path) -> list[str]:
    with opened(path) as f:
        return list(f.keys())


def read_tensor(path: Path, key: str) -> torch.Tensor:
    """One tensor. The file is opened anew each time: pages of an open memory map count as this process's memory."""
    with opened(path) as f:
        return f.get_tensor(key).clone()


@contextlib.contextmanager
def opened(path: Path):
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e}); download or copy it again") from None


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def from_scratch(name: str, device="cpu", seed: int = 0) -> nn.Module:
    """A model with random float32 weights (GPT-2 paper, section 2.3): only config.json of `name` is read.

    Matrices N(0, 0.02), those that write into the residual stream divided by sqrt(2 n_layer), so that the sum of
    2 n_layer such writes keeps its size; norm weights 1, biases 0.
    """
    config, model_class, _ = read_config(find(str(name)))
    model = without_storage(model_class, config)
    rng = torch.Generator().manual_seed(seed)
    for n, p in list(model.named_parameters()):
        t = torch.zeros(p.shape)
        if p.dim() == 2:
            writes = n.endswith(WRITES)
            t.normal_(0.0, 0.02 / ((2 * config.n_layer) ** 0.5 if writes else 1), generator=rng)
        elif n.endswith("weight"):
            t.fill_(1.0)
        set_parameter(model, n, t.to(device))
    model.tie()
    model.source, model.bits = str(name), 32
    return model


# ---------------------------------------------------------------------------------------------- model -> folder

@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; rename it to `path` when all went well, so that a reader (or a run that is
    killed, or a full disk) never meets half a file."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        os.replace(tmp, path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: could not be written ({e}); what was there before is untouched") from None
    finally:
        with contextlib.suppress(OSError):  # where the folder itself could not be made, there is nothing to remove
            tmp.unlink()


def write_text(path, text: str):
    with atomic(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_tensors(path, tensors: dict, metadata: dict | None = None):
    with atomic(path) as tmp:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, tmp, {"format": "pt", **(metadata or {})})


def checkpoint_name(model: nn.Module, name: str) -> str:
    """A module's name as Hugging Face files and PEFT adapters spell it: GPT-2's carry `transformer.` in front."""
    return name if name.startswith(model.head_name) else model.prefix + name


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(model: nn.Module, folder, dtype: str = "float32", params: dict | None = None):
    """Write a model as a Hugging Face folder: model.safetensors, config.json, and its source's tokenizer files.

    params: {name: tensor} to write instead of the model's own parameters (the float32 masters of 16-bit weights)."""
    folder, params = Path(folder), params or dict(model.named_parameters())
    tensors = {checkpoint_name(model, n): p.detach().to("cpu", DTYPES[dtype]) for n, p in params.items()}
    write_tensors(folder / "model.safetensors", tensors)
    save_about(folder, find(model.source), dtype, model.config.tied_head)


def save_about(folder: Path, source: Path, dtype: str, tied_head: bool):
    """What a model folder has beside its weights: config.json and `source`'s tokenizer files, unless it has its own."""
    raw = read_json(source / "config.json")
    raw.pop("torch_dtype", None)
    raw.update(dtype=dtype, tie_word_embeddings=tied_head)
    write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")
    for f in TOKENIZER_FILES:
        if (source / f).is_file() and not (folder / f).exists():
            with atomic(folder / f) as tmp:
                shutil.copyfile(source / f, tmp)


@contextlib.contextmanager
def new_folder(path):
    """A temporary folder that becomes `path` in one rename, or vanishes. `path` must not exist yet."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty; choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp", dir=path.parent))
        tmp.chmod(0o755)
    except OSError as e:
        raise UserError(f"{path}: cannot be created ({e.strerror})") from None
    try:
        yield tmp
        if path.is_dir():
            path.rmdir()
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"{path}: could not be written ({e})") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
