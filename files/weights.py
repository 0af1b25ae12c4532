"""From a folder to a loaded model, and back: config.json -> the model's class -> safetensors, tensor by tensor.

hub.py finds the folder that belongs to a name.

* Loading is strict. A tensor that is missing, unexpected or of another shape stops the run. (With `strict=False` a LoRA
  run can start from random weights, and nobody notices.)
* Loading needs little memory. The model is built on the "meta" device, without storage. Then each tensor is read, cast
  and put in its place. LLaMA-7B in 16 bit peaks at its 13.5 GB + one tensor. A model built in float32 that then calls
  load_state_dict would need 27 + 13.5 GB.
"""
import contextlib
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

import gpt2
import llama
import phi
from errors import UserError
from files import hub
from files.hub import find, weight_files
from files.json_files import check, check_file, is_there, parse_json, read_json, show
from files.writing import atomic, write_tensors, write_text
from techniques import half, quant
from techniques.device import device_of, type_name

# Adding a model family
#
# 1. Write one file at the root, from token ids to logits. Start with a copy of llama.py. The file imports from techniques/
#    only, and no other model file. It has two classes and a table:
#
#    KEYS, the keys of config.json that the model depends on, and their types
#    Config, a dataclass. The rest of the program reads its n_layer, n_embd, n_positions and tied_head.
#      from_json(dict)     config.json -> Config. Raises ValueError for any option that the file does not implement
#    The model, an nn.Module that is made from a Config.
#      config, ckpt_every, ckpt_offload   set by __init__: the Config, 0 and False
#      parameter names     those of the checkpoint, so that loading needs no table of names
#      prefix              what some checkpoints write before every name but the head's: "transformer." in GPT-2; else ""
#      head_name, head     the name of the output projection (a linear layer), and the layer itself
#      blocks              the nn.ModuleList of the layers
#      default_targets     names of the linear layers that get an adapter, unless --lora-targets names others
#      keys_and_values     the linear layers that make k and v (methods/ia3.py)
#      outputs             those whose results are added to the residual stream: of attention, of the MLP
#      tie()               if config.tied_head, make the head's weight the embedding's. __init__ and `load` below call it
#      hidden(ids, positions=None, segments=None, cache=None)   ids (B, T) -> (B, T, C), the output of the final norm.
#                          Layer i runs through `recompute` while gradients are on and (i + 1) % ckpt_every is 0 (never if
#                          ckpt_every is 0); ckpt_offload says whether its input waits in host memory. With a cache
#                          (techniques/kv_cache.py), the positions are cache.positions(ids), and each attention
#                          calls cache.extend(layer, k, v), which says what `attend` needs
#      forward(the same)   head(hidden(...)), the logits (B, T, V). No loss, no optimizer, no sampling
#    A linear layer is a module with in_features, out_features, weight and bias (or None). It may also have
#      parts               the rows of the matrices that it joins: {"q": C, "k": C, "v": C} in GPT-2's c_attn
#      fan_in_fan_out      True if the checkpoint stores its weight as (in, out) (GPT-2's Conv1D)
# 2. Below: a line in FAMILIES. If they are new, the names in WRITES and NOT_WEIGHTS.
#    hub.py: the short names (if there are any), each with the part of its config.json that the model depends on.
#    bench/__main__.py and bench/transformers_peft.py: the names of Q and V, if they are not q_proj and v_proj.
# 3. Tests: a tiny config.json in tests/conftest.py; the file in MODELS of test_imports.py; logits against transformers in
#    test_models.py (`build`, `reference` and the cases); each short name in KNOWN of test_hub.py; the message in
#    test_weights.py that lists the families. `grep '"phi"' tests/*.py` finds the lists of families in the other tests.
FAMILIES = {"gpt2": (gpt2.Config, gpt2.GPT2, gpt2.KEYS), "llama": (llama.Config, llama.Llama, llama.KEYS),
            "phi": (phi.Config, phi.Phi, phi.KEYS)}  # by config.json's model_type
# Every family's config.json may have them. transformers 5 writes dtype, earlier versions torch_dtype.
COMMON = {"dtype": str, "torch_dtype": str, "quantization_config": {
    "quant_method": str, "load_in_8bit": bool, "bnb_4bit_quant_type": str, "bnb_4bit_quant_storage": str}}
# Limits that stop a damaged config.json before a model is built from it. Llama 4 has 10,485,760 positions, Llama 3.1 405B
# has 126 layers; a layer without storage is built in a millisecond.
LARGEST, MOST_LAYERS = 2**24, 1024
LIMITS = {int: (1, LARGEST), float: (1e-12, 1e9)}
# Checkpoint entries that are not weights: masks and rotary frequencies that older files store.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
# The matrices that write into the residual stream: `from_scratch` makes them smaller.
WRITES = ("c_proj.weight", "o_proj.weight", "down_proj.weight", "dense.weight", "fc2.weight")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "generation_config.json")
OF_A_RUN = ("chat_template.jinja", "generation_config.json")  # of these files, a run writes its own


# ---------------------------------------------------------------------------------------------- folder -> model

def config_from(raw: dict, path="config.json"):
    """config.json's dict -> (Config, model class). Raises UserError, which names `path`."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{path}: model_type {show(kind)} is not supported (only {', '.join(FAMILIES)})")
    config_class, model_class, keys = FAMILIES[kind]
    c = usable(raw, {**COMMON, **keys}, path)
    c.pop("quantization_config", None)
    try:
        config = config_class.from_json(c)
    except KeyError as e:
        raise UserError(f"{path}: key {e} is missing") from None
    except ValueError as e:
        raise UserError(f"{path}: {e}") from None
    if config.norm_eps > 0.1:
        raise UserError(f"{path}: the epsilon of the norms is {config.norm_eps}, and must be at most 0.1")
    if config.n_layer > MOST_LAYERS or config.n_head * config.head_dim > LARGEST:
        raise UserError(f"{path}: {config.n_layer:,} layers with {config.n_head:,} heads of {config.head_dim:,} numbers; "
                        f"at most {MOST_LAYERS:,} layers, and {LARGEST:,} numbers in all heads of one")
    return config, model_class


def usable(raw: dict, keys: dict, path) -> dict:
    """`raw` without its nulls, which stand for a default.

    keys: {key: type}, or for an object the keys in it. Raises UserError for a value of another type or outside LIMITS.
    """
    raw = {k: v for k, v in raw.items() if v is not None}
    for key in keys.keys() & raw.keys():
        if isinstance(kind := keys[key], dict):
            check(path, key, raw[key], dict)
            raw[key] = usable(raw[key], kind, f"{path}: {key}")
        else:
            check(path, key, raw[key], kind, *LIMITS.get(kind, ()))
    return raw


def read_config(folder: Path):
    """config.json -> (Config, model class, the raw dict). Raises UserError."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    return *config_from(raw, path), raw


def config_of(name: str):
    """(Config, model class, the raw dict) of a model whose weights need not be on this machine. Uses no network.

    A config.json on this machine comes first, then hub.SHORT_NAMES. Raises UserError if neither has the model.
    """
    if path := hub.config_file(str(name)):
        return read_config(path.parent)
    if not (raw := hub.known_config(str(name))):
        raise UserError(f"{name} is not on this machine. Its config.json is enough, without the weights: give a folder "
                        f"that has it, or one of the short names ({', '.join(['gpt2-nano', *hub.SHORT_NAMES])})")
    return *config_from(raw), raw


class NoInit(TorchFunctionMode):
    """Skips the random initialisation of layers, which the loaded weights would replace. On the "meta" device it also costs
    memory: `normal_` of a tensor without storage imports PyTorch's compiler, 72 MB and 2 seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) != "torch.nn.init":
            return func(*args, **(kwargs or {}))


def without_storage(model_class, config, converts: bool = False) -> nn.Module:
    """A model of shapes only, on the "meta" device. converts: its 16-bit weights are converted for products (half.py)."""
    with torch.device("meta"), NoInit():
        model = model_class(config)
        if converts:
            half.hold_embedding_and_head(model)
    return model


def stored_bits(folder: Path) -> int | None:
    """8 or 4 for a checkpoint that transformers wrote with bitsandbytes, None for a plain one. Else raises UserError."""
    path = Path(folder) / "config.json"
    if not (q := usable(read_json(path), COMMON, path).get("quantization_config")):
        return None
    kind = q.get("quant_method", "bitsandbytes")  # older files do not have this key
    if kind == "bitsandbytes" and q.get("load_in_8bit"):
        return 8
    if kind == "bitsandbytes":
        kind = q.get("bnb_4bit_quant_type", "fp4")
        if kind == "nf4" and q.get("bnb_4bit_quant_storage", "uint8") == "uint8":
            return 4
        kind += f" stored as {q.get('bnb_4bit_quant_storage', 'uint8')}"
    raise UserError(f"{path}: the weights are quantised ({kind}); of such checkpoints only bitsandbytes' nf4 and int8 are "
                    f"supported. Take the 16-bit checkpoint and quantise it with --bits 4")


def load(name: str, bits: int = 32, device="cpu", compute_dtype: torch.dtype | None = None) -> nn.Module:
    """A model with its pretrained weights. name: short name, org/name or folder.

    bits: 32 (float32) or 16. Or 8 or 4: the linear layers but the head have weights in 8 or 4 bits, all else is in 16 bit.
    Such a weight is quantised on the CPU as soon as it is read, directly from its type in the file. So the whole model never
    exists in 16 bit, and this weight never reaches the GPU in 16 bit.
    compute_dtype: the type of products and activations, float32 or (below 32 bits) the device's 16-bit type. Default: for 32
    bits float32, below it the type that the device multiplies faster. How weights are held does not depend on it.
    Raises UserError, with the file and the tensor, unless the files hold exactly the weights of this model.
    """
    if bits not in (32, 16, 8, 4):
        raise UserError(f"--bits {bits}: only 32, 16, 8 and 4")
    folder = find(str(name))
    config, model_class, _ = read_config(folder)
    stored = stored_bits(folder)
    if stored not in (None, bits):
        raise UserError(f"--bits {bits}: the weights in {folder} are stored in {stored} bit, load them with --bits {stored}")
    dtype = torch.float32 if bits == 32 else device_of(device).half
    converts = bits < 32 and (compute_dtype or device_of(device).products) == torch.float32
    model = without_storage(model_class, config, converts)
    low_bit = low_bit_weights(model)
    files = files_of_tensors(folder)
    head, head_weight, used = None, f"{model.head_name}.weight", set()
    for n, (path, key, shape) in places(model, folder, files, stored).items():
        tensor = read_tensor(path, key)
        is_codes = stored and n in low_bit and not tensor.is_floating_point()
        if not is_codes:
            check_tensor(tensor, path, key, shape, dtype)
        if n == head_weight and config.tied_head:  # some files store the tied matrix twice; both must be equal
            head = tensor.to(device, dtype)
        elif is_codes or n in low_bit and (converts or bits < 16 and not stored):
            owner, _, leaf = n.removesuffix(".weight").rpartition(".")
            linear = model.get_submodule(owner).get_submodule(leaf)
            try:
                if is_codes:
                    parts = {k: read_tensor(f, k) for k, f in files.items() if quant.belongs_to(k) == key}
                    used |= parts.keys()
                    layer = quant.from_checkpoint(linear, tensor, {k.rpartition(".")[2]: t for k, t in parts.items()})
                else:
                    layer = (half.from_weight(linear, tensor, dtype) if bits == 16 or stored else
                             quant.quantize(linear, tensor, bits))
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}: tensor {key}: {e}") from None
            bias, layer.bias = layer.bias, None  # if it is read later, it is still on "meta", where .to(device) would fail
            setattr(model.get_submodule(owner), leaf, layer.to(device))
            layer.bias = bias
        else:
            rounded = tensor.to(device, dtype)  # even if it becomes float32 again: --bits alone decides the values
            set_parameter(model, n, rounded.float() if converts and tensor.dim() < 2 else rounded)
        del tensor  # before the next one is read
    if extra := [k for k in files if stored and quant.belongs_to(k) in files and k not in used]:
        raise UserError(f"{files[extra[0]]}: unexpected tensor {extra[0]}: its weight is not quantised")
    model.tie()
    if head is not None and not torch.equal(head, model.head.weight):
        raise UserError(f"{folder}: {head_weight} differs from the embedding, but config.json ties them; "
                        f"set \"tie_word_embeddings\": false in it")
    model.source, model.bits = str(name), bits  # the files of an adapter record both
    return model


def low_bit_weights(model: nn.Module) -> set[str]:
    """Names of the weights that --bits 8 and 4 quantise: those of all linear layers but the head."""
    return {f"{n}.weight" for n, m in model.named_modules() if hasattr(m, "in_features") and n != model.head_name}


def places(model: nn.Module, folder: Path, files: dict, stored: int | None) -> dict[str, tuple[Path, str, torch.Size]]:
    """Where to read each weight of `model`: its name in the model -> (file, its name in the file, shape).

    files: name in the file -> file. A tied head is listed as the embedding, and also as the head if the file has both.
    Raises UserError for a weight that is missing and for a tensor that is unexpected.
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


def check_tensor(tensor: torch.Tensor, path: Path, key: str, shape: torch.Size, dtype: torch.dtype = torch.float32):
    """Raise UserError unless a weight has this shape, and `dtype` can hold its numbers."""
    if tensor.shape != shape:
        raise UserError(f"{path}: tensor {key} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
    if not tensor.is_floating_point():
        raise UserError(f"{path}: tensor {key} holds {tensor.dtype}, and config.json does not say how it is quantised")
    check_finite(tensor, path, key, dtype)


def check_finite(tensor: torch.Tensor, path: Path, key: str, dtype: torch.dtype = torch.float32):
    """Raise UserError for NaN, infinity, and a number too large for `dtype`. SmolLM2's 134,515,008 weights: 0.02 s."""
    if not tensor.numel():
        return
    low, high = (float(x) for x in (tensor.float() if tensor.itemsize == 1 else tensor).aminmax())  # (of 8 bit: no aminmax)
    most = torch.finfo(dtype).max
    if not (-most <= low and high <= most):  # NaN: no comparison is true
        if math.isfinite(low + high):
            raise UserError(f"{path}: tensor {key}: {max(-low, high):g} is too large for {type_name(dtype)}; use float32 "
                            f"(--bits 32, --dtype float32)")
        raise UserError(f"{path}: tensor {key}: a weight is not finite (NaN or infinity); the file is damaged")


class StoredWeights:
    """A model's weights as the checkpoint stores them, before --bits rounds them. `read` reads one and does not keep it.

    `model` has their shapes and no storage. Raises UserError for a quantised checkpoint: it has only rounded weights.
    """

    def __init__(self, name: str):
        self.folder = find(str(name))
        config, model_class, self.raw_config = read_config(self.folder)
        if stored := stored_bits(self.folder):
            raise UserError(f"{self.folder} holds its weights in {stored} bit only, and this needs them in full precision; "
                            f"give the model that it was made from")
        self.model = without_storage(model_class, config)
        files = files_of_tensors(self.folder)
        self.places = places(self.model, self.folder, files, None)
        head = self.model.head.weight
        self.head = next(n for n, p in self.model.named_parameters() if p is head)  # the embedding, if they are tied

    def read(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model, in float32. The layout is the file's (Conv1D: (in, out))."""
        path, key, shape = self.places[self.head if name == f"{self.model.head_name}.weight" else name]
        tensor = read_tensor(path, key)
        check_tensor(tensor, path, key, shape)
        return tensor.float()


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """The tensors of a model: name in the file -> file. Raises UserError if two files have one name."""
    files = {}
    for path in weight_files(folder):
        with opened(path) as f:
            for key in f.keys():  # noqa: SIM118 (no dict)
                if key in files:
                    raise UserError(f"{path}: tensor {key} is in {files[key].name} too")
                files[key] = path
    return files


def read_tensor(path: Path, key: str) -> torch.Tensor:
    """One tensor. The file is opened for each tensor: the pages of a memory map count in the RSS until it is closed."""
    with opened(path) as f:
        return f.get_tensor(key).clone()


@contextlib.contextmanager
def opened(path: Path):
    if not path.exists():
        raise UserError(f"{path}: the file is missing")
    check_file(path)
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e!s:.200}); download or copy it again") from None


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def from_scratch(name: str, device="cpu", seed: int = 0) -> nn.Module:
    """A model with random float32 weights (GPT-2 paper, section 2.3). Only config.json of `name` is read.

    Matrices are drawn from N(0, 0.02). Those that write into the residual stream are divided by sqrt(2 n_layer), so that
    the sum of 2 n_layer such writes has the size of one. Norm weights are 1, biases 0.
    """
    config, model_class, _ = read_config(find(str(name)))
    model = without_storage(model_class, config)
    rng = torch.Generator().manual_seed(seed)
    for n, p in list(model.named_parameters()):
        try:
            t = torch.zeros(p.shape)
        except RuntimeError:
            raise UserError(f"{name}: the weights do not fit into memory ({n} has the shape {list(p.shape)})") from None
        if p.dim() == 2:
            is_write = n.endswith(WRITES)
            t.normal_(0.0, 0.02 / ((2 * config.n_layer) ** 0.5 if is_write else 1), generator=rng)
        elif n.endswith("weight"):
            t.fill_(1.0)
        set_parameter(model, n, t.to(device))
    model.tie()
    model.source, model.bits = str(name), 32
    return model


# ---------------------------------------------------------------------------------------------- model -> folder

def read_metadata(f, path) -> dict[str, str]:
    """The metadata of a file that is `opened`. Files of earlier versions have a key for each entry. Raises UserError."""
    raw = f.metadata() or {}
    metadata = parse_json(raw.get("bytewise", "{}"), f"{path}: its metadata")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: its metadata is not an object of texts")
    return {**raw, **metadata}


def checkpoint_name(model: nn.Module, name: str) -> str:
    """The name of a module or parameter in Hugging Face's files and PEFT's adapters: GPT-2's begin with `transformer.`"""
    return name if name.startswith(model.head_name) else model.prefix + name


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(model: nn.Module, folder, dtype: str = "float32", params: dict | None = None):
    """Write a model as a Hugging Face folder: model.safetensors, config.json and the tokenizer files of its source.

    params: {name: tensor} to write instead of the model's own parameters (the float32 masters of 16-bit weights).
    """
    folder, params = Path(folder), params or dict(model.named_parameters())
    tensors = {checkpoint_name(model, n): p.detach().to("cpu", DTYPES[dtype]) for n, p in params.items()}
    write_tensors(folder / "model.safetensors", tensors)
    save_about(folder, find(model.source), dtype, model.config.tied_head)


def save_about(folder: Path, source: Path, dtype: str, tied_head: bool):
    """Write the other files of a model folder: config.json, and `source`'s tokenizer files that are not there yet."""
    raw = read_json(source / "config.json")
    raw.pop("torch_dtype", None)
    raw.update(dtype=dtype, tie_word_embeddings=tied_head)
    write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")
    for f in TOKENIZER_FILES:
        if (source / f).is_file() and not (folder / f).exists():
            with atomic(folder / f) as tmp:
                shutil.copyfile(source / f, tmp)


def save_tokenizer(source: Path, folder: Path, eos: str):
    """Copy `source`'s tokenizer files beside an adapter, so that transformers' AutoTokenizer reads them there. eos: the
    end-of-text token. A file of the same size is there already: a tokenizer.json has up to 17 MB, and every save comes here.

    Of vocab.json + merges.txt, a model's config.json tells transformers whose format they have. An adapter has no
    config.json, so its tokenizer_config.json says it.
    """
    for f in TOKENIZER_FILES:
        path, copy = source / f, folder / f
        if f not in OF_A_RUN and is_there(path) and not (copy.is_file() and copy.stat().st_size == path.stat().st_size):
            with atomic(copy) as tmp:
                shutil.copyfile(path, tmp)
    if is_there(source / "vocab.json") and not any((source / f).exists() for f in TOKENIZER_FILES[:2]):
        about = optional_json(source / "tokenizer_config.json")
        if "tokenizer_class" not in about:
            about = {**about, "tokenizer_class": "GPT2Tokenizer", "eos_token": eos}
            write_text(folder / "tokenizer_config.json", json.dumps(about) + "\n")


def optional_json(path: Path) -> dict:
    return read_json(path) if is_there(path) else {}
