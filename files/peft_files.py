"""PEFT's adapter format, in both directions: what is written here loads in PEFT, and the reverse, with equal logits.

    adapter_model.safetensors    A (R, in) and B (out, R) of each adapted layer
    adapter_config.json          r, lora_alpha, the layers' names, ...
    start.safetensors            only after --lora-init loftq: where A and B started

What is written and read depends on how the adapter started (techniques/lora_init.py). s is alpha / r, Q rounds to few bits:

    init       adapter_model.safetensors      base when it is loaded        merging adds to W
    default    B, A                           Q(W)                          s B A
    loftq      B, A                           Q(W), in the same bits        s (B A - B0 A0)    B0, A0: start.safetensors
    pissa      [B, -B0], [A; A0]: rank 2R     Q(W - s B0 A0)                s (B A - B0 A0)    B0, A0: the second halves

So a pissa file holds what training added to the *original* weights, and any program that knows LoRA can load it. A loftq
adapter works only on its quantised base.
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import lora
from errors import UserError
from files import weights
from techniques import lora_init


@dataclass(frozen=True)
class Start:
    """What one line of the table above means for the files."""

    joined: bool = False  # the start is in the same file, as a second half of the rank
    start_file: bool = False  # the start is in a file of its own
    same_bits: bool = False  # the adapter corrects the rounding of one kind of base, and works only on this base


STARTS = {"default": Start(), "loftq": Start(start_file=True, same_bits=True), "pissa": Start(joined=True)}


def save(model: nn.Module, folder):
    """Write the model's adapters to `folder` as PEFT does. Only the adapters: MBs, not GBs. Raises UserError."""
    adapters, rule = lora.adapters(model), STARTS[getattr(model, "lora_init", "default")]
    if not adapters:
        raise UserError(f"{folder}: nothing to save, the model has no adapters")
    tensors, starts, ranks, alphas = {}, {}, {}, {}
    for name, m in adapters.items():
        key = f"base_model.model.{weights.checkpoint_name(model, name)}.lora_"
        A, B = m.lora_A, m.B()
        if rule.joined:
            A, B = torch.cat([A, m.start_A]), torch.cat([B, -m.start_B], 1)
        elif m.start_A is not None:
            starts |= {f"{key}A.weight": m.start_A, f"{key}B.weight": m.start_B}
        tensors |= {f"{key}A.weight": A, f"{key}B.weight": B}
        ranks[name] = rank = len(A)  # r times the number of parts, times 2 if joined; alpha grows with it: s is the same
        alphas[name] = m.scale * (math.sqrt(rank) if m.rslora else rank)
    first, one = next(iter(adapters.items()))
    r, alpha = ranks[first], alphas[first]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": getattr(model, "source", None),
        "r": r, "lora_alpha": alpha, "lora_dropout": one.dropout,
        # Layers that differ from the first one: c_attn with q and v has rank 2r, a whole matrix has rank r.
        "rank_pattern": {n: rank for n, rank in ranks.items() if rank != r},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
        "use_rslora": one.rslora, "target_modules": sorted(adapters), "bias": "none", "modules_to_save": None,
        "fan_in_fan_out": getattr(one.base_layer, "fan_in_fan_out", False), "inference_mode": True,
        "init_lora_weights": True,
    }
    # PEFT ignores a file's metadata. `read` needs it: the parts of a fused matrix, how the adapter started, the base's bits.
    metadata = {"parts": json.dumps({n: m.parts for n, m in adapters.items() if m.parts}), "init": model.lora_init}
    if hasattr(model, "bits"):
        metadata["bits"] = str(model.bits)
    if starts:
        weights.write_tensors(Path(folder) / "start.safetensors", starts)
    weights.write_tensors(Path(folder) / "adapter_model.safetensors", tensors, metadata)
    weights.write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


# adapter_config.json options that change the arithmetic and are not implemented: refused unless switched off.
UNSUPPORTED = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "layer_replication",
               "use_qalora", "alora_invocation_tokens", "target_parameters")


def rank_and_alpha(config: dict, name: str) -> tuple[int, float]:
    """The (rank, alpha) of layer `name`: adapter_config.json's r and lora_alpha, unless its patterns name the layer."""
    def lookup(key, patterns):
        matching = [v for p, v in (config.get(patterns) or {}).items() if re.match(rf"(.*\.)?({p})$", name)]
        return matching[0] if matching else config.get(key, 8)  # PEFT's default for both is 8
    return lookup("r", "rank_pattern"), lookup("lora_alpha", "alpha_pattern")


def trained_with(folder) -> tuple[str, int | None]:
    """(how an adapter started: "default", "loftq" or "pissa"; the bits of its base, or None if the file does not say)."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():  # load() says what is missing
        return "default", None
    with weights.opened(path) as f:
        metadata = f.metadata() or {}
    return metadata.get("init", "default"), int(metadata["bits"]) if "bits" in metadata else None


def load(model: nn.Module, folder):
    """Put the adapters in `folder` (PEFT's format, written here or by PEFT) on the model's layers. Returns the model.

    Loading is strict: every tensor must have its layer, and every layer both of its tensors. Raises UserError.
    """
    lora.refuse_adapters(model)
    adapters = read(model, folder)
    init, bits = trained_with(folder)
    if STARTS[init].same_bits and bits != model.bits:
        raise UserError(f"{folder} corrects the rounding of {bits}-bit weights (--lora-init {init}), and these have "
                        f"{model.bits}: load the model with --bits {bits}, or merge (python export.py merge)")
    if STARTS[init].joined:
        lora_init.check(init, model.bits, weights.stored_bits(weights.find(model.source)))
    model.requires_grad_(False)
    for name, m in adapters.items():
        lora.replace(model, name, m)
    restore_base(model, init)
    return model


def restore_base(model: nn.Module, init: str):
    """Set the base weights with which the model's adapters were trained. The adapters come from a file. Raises UserError."""
    model.lora_init = init
    if STARTS[init].joined:
        lora_init.restore(lora.adapters(model), init, weights.StoredWeights(model.source).read)


def read(model: nn.Module, folder, device=None) -> dict[str, lora.LoRALinear]:
    """The adapters in `folder`, checked against the model's layers but not put on them: layer name -> LoRALinear.

    The model may be without storage. device: where the adapters go (default: to their layers). Raises UserError.
    """
    folder = Path(folder)
    config, path = weights.read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: peft_type {config.get('peft_type')!r} is not LORA")
    for key in UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{folder / 'adapter_config.json'}: option {key}: {config[key]!r} is not implemented")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder / 'adapter_config.json'}: bias {config['bias']!r} is not implemented (only none)")
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder / 'adapter_model.bin'}: pickle weights are not loaded; save the adapter as safetensors")
    linears = {n: m for n, m in model.named_modules() if lora.is_linear(m)}
    factors, metadata = read_factors(model, path, linears)
    all_parts, init = json.loads(metadata.get("parts", "{}")), metadata.get("init", "default")
    if init not in STARTS:
        raise UserError(f"{path}: its adapters started in a way that is not known here ({init!r})")
    rule = STARTS[init]
    starts = read_factors(model, folder / "start.safetensors", linears)[0] if rule.start_file else {}
    targets = config.get("target_modules")
    for name in linears if isinstance(targets, list) and not config.get("layers_to_transform") else ():
        if name not in factors and any(name == t or name.endswith("." + t) for t in targets):
            raise UserError(f"{path}: layer {name} has no adapter, though adapter_config.json's target_modules names it")
    modules = {}
    for name, (a, b) in factors.items():
        base, parts = linears[name], tuple(all_parts.get(name, ())) or None
        rank, alpha = rank_and_alpha(config, weights.checkpoint_name(model, name))
        n = (len(parts) if parts else 1) * (2 if rule.joined else 1)
        if len(a) != rank or rank % n:
            raise UserError(f"{path}: layer {name} has rank {len(a)}, adapter_config.json says {rank}"
                            + (f"; it must be a multiple of {n}" if n > 1 else ""))
        rslora = config.get("use_rslora", False)
        alpha /= math.sqrt(n) if rslora else n  # the saved alpha is for the whole rank
        m = lora.LoRALinear(base, rank // n, alpha, config.get("lora_dropout", 0.0), rslora, parts, device)
        if rule.joined:
            (a, a0), (b, b0) = a.chunk(2), b.chunk(2, 1)
            m.keep_start(a0, -b0)
        elif name in starts:
            m.keep_start(*starts[name])
        with torch.no_grad():
            m.lora_A.copy_(a)
            for rows, own, columns in zip(m.rows(), m.lora_B, b.split(m.r, 1)):
                own.copy_(columns[rows])
        if not torch.equal(m.B().cpu(), b):
            raise UserError(f"{path}: layer {name}: B is not block diagonal over {', '.join(parts)}")
        modules[name] = m
    return modules


def read_factors(model: nn.Module, path: Path, linears: dict) -> tuple[dict, dict]:
    """A file of adapters -> {layer name: (A (R, in), B (out, R))} in float32, and the file's metadata."""
    with weights.opened(path) as f:
        tensors, metadata = {k: f.get_tensor(k).float() for k in f.keys()}, f.metadata() or {}  # noqa: SIM118 (no dict)
    places = {f"base_model.model.{weights.checkpoint_name(model, n)}": n for n in linears}
    factors: dict[str, dict] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B") or layer not in places:
            raise UserError(f"{path}: tensor {key} has no place in this model")
        factors.setdefault(places[layer], {})[kind] = tensor
    if not factors:
        raise UserError(f"{path}: the adapter is empty")
    for name, ab in factors.items():
        base = linears[name]
        if len(ab) != 2:
            raise UserError(f"{path}: layer {name} has {' and '.join(ab)} only")
        a, b = ab["lora_A"], ab["lora_B"]
        if a.dim() != 2 or b.shape != (base.out_features, len(a)) or a.shape[1] != base.in_features:
            raise UserError(f"{path}: layer {name} is ({base.out_features}, {base.in_features}), "
                            f"its adapter B {list(b.shape)}, A {list(a.shape)}")
        factors[name] = a, b
    return factors, metadata
