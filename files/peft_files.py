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
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path

import torch
from torch import nn

import lora
from errors import UserError
from files import method_files, weights, writing
from files.json_files import check, checked, parse_json, read_json, show
from methods import dora, several
from techniques import lora_init


@dataclass(frozen=True)
class Start:
    """What one line of the table above means for the files."""

    joined: bool = False  # the start is in the same file, as a second half of the rank
    start_file: bool = False  # the start is in a file of its own
    same_bits: bool = False  # the adapter corrects the rounding of one kind of base, and works only on this base


STARTS = {"default": Start(), "loftq": Start(start_file=True, same_bits=True), "pissa": Start(joined=True)}


def save(model: nn.Module, folder, name: str | None = None):
    """Write the model's adapters to `folder` as PEFT does. Only the adapters: MBs, not GBs. Raises UserError.

    name: which one, of a model with several adapters (methods/several.py).
    """
    if name is None and several.names(model):
        raise UserError(f"{folder}: the model has several adapters ({', '.join(several.names(model))}); say which one "
                        f"is saved")
    if getattr(model, "method", None) in method_files.TYPES:
        return method_files.save(model, folder)
    adapters = lora.adapters(model) if name is None else several.of(model, name)
    rule = STARTS[getattr(model, "lora_init", "default")]
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
        if isinstance(m, dora.DoRALinear):
            tensors[f"{key}magnitude_vector"] = m.whole_magnitude()
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
        "use_rslora": one.rslora, "use_dora": one.method == "dora", "target_modules": sorted(adapters), "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": getattr(one.base_layer, "fan_in_fan_out", False), "inference_mode": True,
        "init_lora_weights": True,
    }
    # PEFT ignores a file's metadata. `read` needs it: the parts of a fused matrix, how the adapter started, the base's bits.
    metadata = {"parts": json.dumps({n: m.parts for n, m in adapters.items() if m.parts}), "init": model.lora_init}
    if hasattr(model, "bits"):
        metadata["bits"] = str(model.bits)
    if starts:
        writing.write_tensors(Path(folder) / "start.safetensors", starts)
    writing.write_tensors(Path(folder) / "adapter_model.safetensors", tensors, metadata)
    writing.write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


RANK, SCALE = {"least": 1, "most": weights.LARGEST}, {"least": 1e-12, "most": 1e9}


@dataclass
class AdapterConfig:
    """What the program reads in adapter_config.json. PEFT writes every key; the defaults are its own."""

    peft_type: str
    r: int = field(metadata=RANK)
    lora_alpha: float = field(metadata=SCALE)
    lora_dropout: float = field(default=0.0, metadata={"least": 0, "most": 0.999})
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    rank_pattern: dict = field(default_factory=dict)
    alpha_pattern: dict = field(default_factory=dict)
    target_modules: list | str | None = None  # text: a regular expression, or "all-linear"
    layers_to_transform: list | int | None = None
    init_lora_weights: bool | str = True


# PEFT's ways to start an adapter that leave the base as it is. The others change it, and their adapter fits no other base.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# adapter_config.json options that change the arithmetic and are not implemented: refused unless switched off.
UNSUPPORTED = ("modules_to_save", "trainable_token_indices", "lora_bias", "layer_replication",
               "use_qalora", "alora_invocation_tokens", "target_parameters")


def read_adapter_config(path: Path) -> AdapterConfig:
    raw = {k: v for k, v in read_json(path).items() if v is not None}
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {show(raw.get('peft_type'))} is not LORA")
    for key in UNSUPPORTED:
        if raw.get(key):
            raise UserError(f"{path}: option {key}: {show(raw[key])} is not implemented")
    config = checked(AdapterConfig, {f.name: raw[f.name] for f in fields(AdapterConfig) if f.name in raw}, path)
    if config.bias != "none":
        raise UserError(f"{path}: bias {show(config.bias)} is not implemented (only none)")
    if config.init_lora_weights not in HARMLESS_STARTS:
        raise UserError(f"{path}: init_lora_weights {show(config.init_lora_weights)} changes the base weights, which is not "
                        f"implemented; save the adapter with PEFT's path_initial_model_for_weight_conversion")
    for name in config.target_modules if isinstance(config.target_modules, list) else ():
        check(path, "a name in target_modules", name, str)
    return config


def by_layer(patterns: dict, layers: list[str], path: Path, key: str, kind: type, limits: dict) -> dict:
    """rank_pattern or alpha_pattern -> {layer: value}. As in PEFT, the first pattern that matches a layer counts.

    A pattern is the end of a layer's name ("q_proj", "layers.0.q_proj"), or after "^" its whole name; "(q|v)_proj" stands
    for two names. PEFT takes any regular expression. Some of them run for years, so others are refused. Raises UserError.
    """
    if len(patterns) > len(layers):
        raise UserError(f"{path}: {key} has {len(patterns):,} patterns, and the model {len(layers):,} layers")
    ends: dict[str, set] = {}  # the end of a name, or ^ and the whole name -> the layers
    for layer in layers:
        parts = layer.split(".")
        for end in (f"^{layer}", *(".".join(parts[i:]) for i in range(len(parts)))):
            ends.setdefault(end, set()).add(layer)
    values = {}
    for pattern, value in patterns.items():
        check(path, f"{key} of {show(pattern)}", value, kind, **limits)
        pieces = re.split(r"\(([^()]*)\)", pattern.removesuffix("$").replace("\\.", "."))  # at odd places: q|v
        choices = [s.split("|") if i % 2 or len(pieces) == 1 else [s] for i, s in enumerate(pieces)]
        if math.prod(map(len, choices)) > 1000 or not all(re.fullmatch(r"[\w.-]*", s.removeprefix("^" * (i == 0)))
                                                          for i, names in enumerate(choices) for s in names):
            raise UserError(f"{path}: {key}: pattern {show(pattern)} is not implemented (only names, and (a|b) in a name)")
        named = {layer for name in product(*choices) for layer in ends.get("".join(name), ())}
        if not named:
            raise UserError(f"{path}: {key}: {show(pattern)} names no layer of this model")
        values = {**dict.fromkeys(named, value), **values}
    return values


def read_about(f, path: Path) -> tuple[dict, str, int | None]:
    """From an opened file's metadata: the parts of each fused matrix, how the adapter started, the bits of its base or None.

    Raises UserError.
    """
    metadata = weights.read_metadata(f, path)
    init, bits = metadata.get("init", "default"), metadata.get("bits")
    if init not in STARTS:
        raise UserError(f"{path}: its adapters started in a way that is not known here ({show(init)})")
    if bits not in (None, "32", "16", "8", "4"):
        raise UserError(f"{path}: its metadata says that the base has {show(bits)} bits; only 32, 16, 8 and 4 are possible")
    parts = parse_json(metadata.get("parts", "{}"), f"{path}: the parts in its metadata")
    if not isinstance(parts, dict) or not all(isinstance(p, list) for p in parts.values()):
        raise UserError(f"{path}: the parts in its metadata are not lists of names")
    return parts, init, bits and int(bits)


def trained_with(folder) -> tuple[str, int | None]:
    """(how an adapter started: "default", "loftq" or "pissa"; the bits of its base, or None if the file does not say)."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():  # load() says what is missing
        return "default", None
    with weights.opened(path) as f:
        return read_about(f, path)[1:]


def options(folder, name: str) -> dict:
    """The options of train.py that made the adapter in `folder`, as far as its files say. name: its model.

    An adapter of PEFT may have several ranks and alphas: those of the first layer. No weights are read. Raises UserError.
    """
    if method_files.method_of(folder) != "lora":
        return method_files.options(folder, name)
    config, model_class, _ = weights.config_of(name)
    model = weights.without_storage(model_class, config)
    adapters = read(model, folder, device="cpu")
    layers = {(n, part) for n, m in adapters.items() for part in m.parts or (None,)}
    linears, names = lora.linears(model), set()
    for layer, part in layers:  # "q_proj" if every q_proj has an adapter, else "layers.0.self_attn.q_proj"
        short, whole = (".".join(filter(None, (n, part))) for n in (layer.rpartition(".")[2], layer))
        names.add(short if layers.issuperset(lora.matches(model, linears, short)) else whole)
    first = next(iter(adapters.values()))
    return {"method": first.method, "lora_r": first.r, "lora_alpha": float(first.alpha),
            "lora_dropout": float(first.dropout), "rslora": first.rslora, "lora_targets": ",".join(sorted(names)),
            "lora_init": trained_with(folder)[0]}


def load(model: nn.Module, folder):
    """Put the adapters in `folder` (PEFT's format, written here or by PEFT) on the model's layers. Returns the model.

    Loading is strict: every tensor must have its layer, and every layer both of its tensors. Raises UserError.
    """
    lora.refuse_adapters(model)
    if method_files.method_of(folder) != "lora":
        return method_files.load(model, folder)
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
        model.method = m.method
    restore_base(model, init)
    return model


def add(model: nn.Module, name: str, folder):
    """Put the LoRA adapter in `folder` on the model, beside others, as `name` (methods/several.py). Raises UserError."""
    if (method := method_files.method_of(folder)) != "lora":
        raise UserError(f"{folder} holds {method}, and only LoRA adapters can share a model")
    several.add(model, name, read(model, folder))


def can_share(folder) -> bool:
    """Whether `add` takes the adapter in `folder`: a LoRA that starts from zero, and no DoRA. Raises UserError."""
    return (method_files.method_of(folder) == "lora" and trained_with(folder)[0] == "default" and
            not read_adapter_config(Path(folder) / "adapter_config.json").use_dora)


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
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = read_adapter_config(config_path)
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder / 'adapter_model.bin'}: pickle weights are not loaded; save the adapter as safetensors")
    linears = lora.linears(model)
    kinds = (*KINDS, "lora_magnitude_vector") if config.use_dora else KINDS
    factors, (all_parts, init, _) = read_factors(model, path, linears, kinds)
    layer = dora.DoRALinear if config.use_dora else lora.LoRALinear
    lora.refuse_head(model, factors, layer)
    rule = STARTS[init]
    start_path = folder / "start.safetensors"
    starts = read_factors(model, start_path, linears)[0] if rule.start_file else {}
    for name, (a, b) in starts.items():
        if name not in factors or (a.shape, b.shape) != tuple(t.shape for t in factors[name][:2]):
            raise UserError(f"{start_path}: layer {name} does not fit the adapter in {path.name}")
    targets = config.target_modules if isinstance(config.target_modules, list) and not config.layers_to_transform else []
    for name in linears:
        if name not in factors and any(name == t or name.endswith("." + t) for t in targets):
            raise UserError(f"{path}: layer {name} has no adapter, though adapter_config.json's target_modules names it")
    names = {n: weights.checkpoint_name(model, n) for n in linears}
    ranks = by_layer(config.rank_pattern, list(names.values()), config_path, "rank_pattern", int, RANK)
    alphas = by_layer(config.alpha_pattern, list(names.values()), config_path, "alpha_pattern", float, SCALE)
    modules = {}
    for name, (a, b, *magnitude) in factors.items():
        base, parts = linears[name], tuple(all_parts.get(name, ())) or None
        if parts and parts != tuple(p for p in getattr(base, "parts", ()) if p in parts):
            raise UserError(f"{path}: layer {name} has no such parts: {show(parts)}")
        rank, alpha = ranks.get(names[name], config.r), alphas.get(names[name], config.lora_alpha)
        n = (len(parts) if parts else 1) * (2 if rule.joined else 1)
        if len(a) != rank or rank % n:
            raise UserError(f"{path}: layer {name} has rank {len(a)}, adapter_config.json says {rank}"
                            + (f"; it must be a multiple of {n}" if n > 1 else ""))
        alpha /= math.sqrt(n) if config.use_rslora else n  # the saved alpha is for the whole rank
        m = layer(base, rank // n, alpha, config.lora_dropout, config.use_rslora, parts, device)
        if rule.joined:
            (a, a0), (b, b0) = a.chunk(2), b.chunk(2, 1)
            m.keep_start(a0, -b0)
        elif name in starts:
            m.keep_start(*starts[name])
        with torch.no_grad():
            m.lora_A.copy_(a)
            for rows, own, columns in zip(m.rows(), m.lora_B, b.split(m.r, 1)):
                own.copy_(columns[rows])
            if config.use_dora:
                m.set_magnitude(*magnitude)
        if not torch.equal(m.B().cpu(), b):
            raise UserError(f"{path}: layer {name}: B is not block diagonal over {', '.join(parts)}")
        modules[name] = m
    return modules


KINDS = ("lora_A", "lora_B")


def read_factors(model: nn.Module, path: Path, linears: dict, kinds=KINDS) -> tuple[dict, tuple]:
    """A file of adapters -> {layer: (A (R, in), B (out, R))} in float32, and what `read_about` finds in the file.

    kinds: with "lora_magnitude_vector" as a third one, each layer has its magnitude (out,) too (DoRA).
    """
    with weights.opened(path) as f:
        tensors, about = {k: f.get_tensor(k) for k in f.keys()}, read_about(f, path)  # noqa: SIM118 (no dict)
    places = {f"base_model.model.{weights.checkpoint_name(model, n)}": n for n in linears}
    factors: dict[str, dict] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.removesuffix(".weight").rpartition(".")
        if kind not in kinds or layer not in places:
            raise UserError(f"{path}: tensor {key} has no place in this model")
        if not tensor.is_floating_point():
            raise UserError(f"{path}: tensor {key} holds {tensor.dtype}; an adapter's numbers are not integers")
        weights.check_finite(tensor, path, key)
        if kind in factors.setdefault(places[layer], {}):
            raise UserError(f"{path}: tensor {key} is there twice, with and without .weight")
        factors[places[layer]][kind] = tensor.float()
    if not factors:
        raise UserError(f"{path}: the adapter is empty")
    for name, ab in factors.items():
        base = linears[name]
        if len(ab) != len(kinds):
            raise UserError(f"{path}: layer {name} has {' and '.join(ab)} only")
        a, b, *magnitude = (ab[kind] for kind in kinds)
        if a.dim() != 2 or b.shape != (base.out_features, len(a)) or a.shape[1] != base.in_features:
            raise UserError(f"{path}: layer {name} is ({base.out_features}, {base.in_features}), "
                            f"its adapter B {list(b.shape)}, A {list(a.shape)}")
        if magnitude and magnitude[0].shape != (base.out_features,):
            raise UserError(f"{path}: layer {name} has {base.out_features} rows, its magnitude {list(magnitude[0].shape)}")
        factors[name] = a, b, *magnitude
    return factors, about
