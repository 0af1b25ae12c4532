"""The files of the methods in methods/ that are no kind of LoRA, in PEFT's formats in both directions.

    method       peft_type         tensors
    ia3          IA3               base_model.model.<layer>.ia3_l     (out, 1) behind a layer, (1, in) before one
    prompt       PROMPT_TUNING     prompt_embeddings                  (n, C)
    prefix       PREFIX_TUNING     prompt_embeddings                  (n, n_layer * 2 * K * D)
    bottleneck   BOTTLENECK        <layer>.down, .down_bias, .up, .up_bias       (Bytewise's own: PEFT has no such method)

files/peft_files.py calls this file for a model with one of these methods, and for a folder with one of these peft_types.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import lora
from errors import UserError
from files import weights, writing
from files.json_files import check, checked, read_json, show
from methods import bottleneck, ia3, prefix, prompt

TYPES = {"ia3": "IA3", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING", "bottleneck": "BOTTLENECK"}
FACTORS = ("down", "down_bias", "up", "up_bias")


# ---------------------------------------------------------------------------------------------- writing

def save(model: nn.Module, folder):
    """Write what was trained to `folder`."""
    tensors, config = {"ia3": ia3_files, "prompt": prompt_files, "prefix": prefix_files,
                       "bottleneck": bottleneck_files}[model.method](model)
    config = {"peft_type": TYPES[model.method], "task_type": "CAUSAL_LM", "inference_mode": True,
              "base_model_name_or_path": getattr(model, "source", None), **config}
    metadata = {"bits": str(model.bits)} if hasattr(model, "bits") else {}
    writing.write_tensors(Path(folder) / "adapter_model.safetensors", tensors, metadata)
    writing.write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def key(model: nn.Module, layer: str) -> str:
    return f"base_model.model.{weights.checkpoint_name(model, layer)}"


def ia3_files(model: nn.Module):
    layers = lora.layers(model)
    tensors = {f"{key(model, n)}.ia3_l": m.factors()[None] if m.on_input else m.factors()[:, None]
               for n, m in layers.items()}
    return tensors, {"target_modules": sorted(layers),
                     "feedforward_modules": sorted(n for n, m in layers.items() if m.on_input),
                     "fan_in_fan_out": any(getattr(m.base_layer, "fan_in_fan_out", False) for m in layers.values()),
                     "modules_to_save": None, "init_ia3_weights": True}


def prompt_files(model: nn.Module):
    P = next(m for m in model.modules() if isinstance(m, prompt.PromptedEmbedding)).prompt
    return {"prompt_embeddings": P}, {**virtual_tokens(model, P.shape[1], model.config.n_head),
                                      "prompt_tuning_init": "RANDOM"}


def prefix_files(model: nn.Module):
    p, c = model.prefix_tokens.keys_values, model.config  # (n_layer, 2, K, n, D)
    return ({"prompt_embeddings": p.permute(3, 0, 1, 2, 4).reshape(p.shape[3], -1)},
            {**virtual_tokens(model, c.n_kv_head * c.head_dim, c.n_kv_head), "encoder_hidden_size": c.n_embd,
             "prefix_projection": False})


def virtual_tokens(model: nn.Module, width: int, heads: int) -> dict:
    return {"num_virtual_tokens": model.config.n_virtual, "token_dim": width, "num_transformer_submodules": 1,
            "num_attention_heads": heads, "num_layers": model.config.n_layer}


def bottleneck_files(model: nn.Module):
    layers = lora.layers(model)
    return ({f"{key(model, n)}.{f}": getattr(m, f) for n, m in layers.items() for f in FACTORS},
            {"bottleneck": len(next(iter(layers.values())).down_bias), "target_modules": sorted(layers)})


# ---------------------------------------------------------------------------------------------- reading

@dataclass
class MethodConfig:
    """What the program reads in adapter_config.json."""

    peft_type: str
    num_virtual_tokens: int | None = field(default=None, metadata={"least": 1, "most": weights.LARGEST})
    num_transformer_submodules: int | None = None
    num_layers: int | None = None
    token_dim: int | None = None
    num_attention_heads: int | None = None
    bottleneck: int | None = field(default=None, metadata={"least": 1, "most": weights.LARGEST})
    modules_to_save: list | None = None


def method_of(folder) -> str:
    """"lora" (also for DoRA), or the method whose files are in `folder`. Raises UserError."""
    path = Path(folder) / "adapter_config.json"
    kind = read_json(path).get("peft_type")
    known = {name: method for method, name in TYPES.items()} | {"LORA": "lora"}
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"{path}: peft_type {show(kind)} is not implemented (only {', '.join(known)})")
    return known[kind]


def read(folder) -> tuple[MethodConfig, dict[str, torch.Tensor], Path]:
    """adapter_config.json, the tensors in float32, and their file. Raises UserError."""
    config_path, path = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    raw = {k: v for k, v in read_json(config_path).items() if v is not None and k in MethodConfig.__dataclass_fields__}
    config = checked(MethodConfig, raw, config_path)
    if config.modules_to_save:
        raise UserError(f"{config_path}: option modules_to_save: {show(config.modules_to_save)} is not implemented")
    if config.num_transformer_submodules not in (None, 1):
        raise UserError(f"{config_path}: num_transformer_submodules {config.num_transformer_submodules}: a decoder has 1")
    if not path.is_file() and path.with_suffix(".bin").is_file():
        raise UserError(f"{path.with_suffix('.bin')}: pickle weights are not loaded; save the adapter as safetensors")
    with weights.opened(path) as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (no dict)
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise UserError(f"{path}: tensor {name} holds {t.dtype}; an adapter's numbers are not integers")
        weights.check_finite(t, path, name)
    return config, {name: t.float() for name, t in tensors.items()}, path


def options(folder, name: str) -> dict:
    """The options of train.py that made the files in `folder`. name: its model. Raises UserError."""
    method = method_of(folder)
    config, tensors, path = read(folder)
    found = {"method": method}
    if method in ("prompt", "prefix"):
        found["virtual_tokens"] = len(only(config, tensors, path))
    elif method == "bottleneck":
        check(path.with_name("adapter_config.json"), "bottleneck", config.bottleneck, int)
        found["bottleneck"] = config.bottleneck
    return found


def load(model: nn.Module, folder) -> nn.Module:
    """Put what `folder` holds on the model. Strict: each tensor has its place, each place its tensor. Raises UserError."""
    lora.refuse_adapters(model)
    method = method_of(folder)
    config, tensors, path = read(folder)
    if method == "ia3":
        return ia3.put(model, read_ia3(model, folder))
    if method == "bottleneck":
        load_bottleneck(model, config, tensors, path)
        return model
    P, c = only(config, tensors, path), model.config
    width = c.n_embd if method == "prompt" else c.n_layer * 2 * c.n_kv_head * c.head_dim
    if P.shape[1] != width:
        raise UserError(f"{path}: prompt_embeddings is {list(P.shape)}, this model takes [{len(P)}, {width}]")
    heads = {"num_layers": c.n_layer, "token_dim": c.n_kv_head * c.head_dim, "num_attention_heads": c.n_kv_head}
    for name, value in heads.items() if method == "prefix" else ():  # (the width alone is a product of them)
        if (its := getattr(config, name)) not in (None, value):
            raise UserError(f"{path.with_name('adapter_config.json')}: {name} {its}: this model has {value}")
    prompt.check(c, len(P), str(path))
    {"prompt": prompt, "prefix": prefix}[method].inject(model, len(P))
    with torch.no_grad():
        if method == "prompt":
            next(m for m in model.modules() if isinstance(m, prompt.PromptedEmbedding)).prompt.copy_(P)
        else:
            to = model.prefix_tokens.keys_values
            to.copy_(P.view(len(P), c.n_layer, 2, c.n_kv_head, c.head_dim).permute(1, 2, 3, 0, 4))
    return model


def only(config: MethodConfig, tensors: dict, path: Path) -> torch.Tensor:
    """prompt_embeddings (n, width). With prefix_projection, PEFT saves what its extra network computes: the same."""
    if tensors.keys() != {"prompt_embeddings"}:
        other = next((k for k in tensors if k != "prompt_embeddings"), None)
        raise UserError(f"{path}: " + (f"tensor {other} has no place in this model" if other else
                                       "no prompt_embeddings in it"))
    P, n = tensors["prompt_embeddings"], config.num_virtual_tokens
    if P.dim() != 2 or not len(P) or n not in (None, len(P)):
        raise UserError(f"{path}: prompt_embeddings is {list(P.shape)}; it must have a row for each virtual token, and "
                        f"adapter_config.json says num_virtual_tokens {n}")
    return P


def load_bottleneck(model: nn.Module, config: MethodConfig, tensors: dict, path: Path):
    sizes = {t.numel() for name, t in tensors.items() if name.endswith(".down_bias")}
    if sizes != {config.bottleneck}:  # before anything of this size is made
        raise UserError(f"{path}: its adapters have inner widths {sorted(sizes)}, adapter_config.json says "
                        f"{config.bottleneck}")
    bottleneck.inject(model, config.bottleneck)
    places = {f"{key(model, n)}.{f}": getattr(m, f) for n, m in lora.layers(model).items() for f in FACTORS}
    check_names(tensors, places, path)
    with torch.no_grad():
        for name, p in places.items():
            if tensors[name].shape != p.shape:
                raise UserError(f"{path}: tensor {name} is {list(tensors[name].shape)}, this model takes {list(p.shape)}")
            p.copy_(tensors[name])


def check_names(tensors: dict, places: dict, path: Path):
    for name in sorted(tensors.keys() ^ places.keys()):
        raise UserError(f"{path}: tensor {name} " + ("has no place in this model" if name in tensors else "is missing"))


def read_ia3(model: nn.Module, folder, device=None) -> dict[str, ia3.IA3Linear]:
    """The factors in `folder`, checked against the model's layers but not put on them. The model may be without storage.

    PEFT may scale other layers than `ia3.places`: a layer with factors (1, in) is scaled before, one with (out, 1) behind.
    """
    _, tensors, path = read(folder)
    linears = lora.linears(model)
    places = {f"{key(model, n)}.ia3_l": n for n in linears}
    modules, parts_of = {}, ia3.places(model)
    for name, l in tensors.items():
        if name not in places or places[name] == model.head_name:
            raise UserError(f"{path}: tensor {name} has no place in this model (only linear layers of the blocks can be "
                            f"scaled)")
        layer = places[name]
        base = linears[layer]
        on_input = tuple(l.shape) == (1, base.in_features)
        if not on_input and tuple(l.shape) != (base.out_features, 1):
            raise UserError(f"{path}: layer {layer} is ({base.out_features}, {base.in_features}), its factors "
                            f"{list(l.shape)}")
        l, parts = l.flatten(), None if on_input else parts_of.get(layer, (False, None))[1]
        if parts:  # a fused matrix: the rest must not be scaled, or all of it is
            pieces = dict(zip(base.parts, l.split(list(base.parts.values()))))
            parts = parts if all((x == 1).all() for p, x in pieces.items() if p not in parts) else None
            l = torch.cat([pieces[p] for p in parts]) if parts else l
        m = modules[layer] = ia3.IA3Linear(base, on_input, parts, device)
        with torch.no_grad():
            m.factor.copy_(l)
    if not modules:
        raise UserError(f"{path}: the adapter is empty")
    return modules
