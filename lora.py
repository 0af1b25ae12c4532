"""LoRA: train a model by training small adapters beside its frozen matrices.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq. 3:

    h = W x + (alpha / r) B A x        W (out, in) frozen,  A (r, in) random,  B (out, r) zero:  training starts at W

Why it saves memory. A trained weight costs 16 bytes: 4 itself, 4 gradient, 8 for AdamW's two moments. A frozen one costs
2 (in 16 bit). GPT-2 124M, r = 8 on q and v: A and B are 8 * (768 + 768) numbers for each of 24 matrices, 294,912 in all:

    full fine-tuning   124,439,808 * 16                   = 1991 MB
    LoRA               124,439,808 * 2 + 294,912 * 16     =  254 MB      LLaMA-7B, r = 16: 107.8 GB against 13.6 GB

GPT-2 keeps q, k and v in one matrix `c_attn`. An adapter on its q and v thirds is one adapter whose A is the two A's
stacked (2r, in) and whose B is block diagonal, with nothing in k's rows:

    B = | B_q  0  |      which is how it is saved, so that PEFT, which knows only whole matrices,
        |  0   0  |      loads it as a c_attn adapter of rank 2r with alpha doubled (the same alpha / r).
        |  0  B_v |

Usage: python lora.py merge --model M --adapter DIR --out DIR [--dtype float32]       R below is the rank as saved.
"""
import json
import math
import re
import sys
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from techniques import lora_init
from techniques import quant
from files import weights
from errors import UserError


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapter. `parts`: the row ranges of W with an adapter each, or None for all of W."""

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False, parts=None,
                 device=None):
        super().__init__()
        self.base_layer = base
        self.r, self.alpha, self.dropout, self.rslora, self.parts = r, alpha, dropout, rslora, parts
        # rsLoRA (arXiv:2312.03732): alpha / sqrt(r) keeps the adapter's output the same size at every rank.
        self.scale = alpha / math.sqrt(r) if rslora else alpha / r
        rows = [base.parts[p] for p in parts] if parts else [base.out_features]
        device = device or base.weight.device
        # Always float32: an update of 1e-4 to a bfloat16 weight of 0.05 rounds to nothing, and training stands still.
        self.lora_A = nn.Parameter(torch.empty(r * len(rows), base.in_features, device=device))
        self.lora_B = nn.ParameterList(torch.zeros(n, r, device=device) for n in rows)
        for a in self.lora_A.split(r):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as PEFT and the authors' code do
        # Where training starts when that is not B = 0: (R, in) and (out, R), see lorainit.py.
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def keep_start(self, A, B):
        self.start_A, self.start_B = (t.detach().to(self.lora_A.device, copy=True) for t in (A, B))

    def rows(self) -> list[slice]:
        """The rows of W that each of lora_B's matrices adds to."""
        if not self.parts:
            return [slice(None)]
        ends = dict(zip(self.base_layer.parts, accumulate(self.base_layer.parts.values())))
        return [slice(ends[p] - self.base_layer.parts[p], ends[p]) for p in self.parts]

    def B(self):
        """The whole (out, R) matrix: block diagonal over the parts, zero rows for parts without an adapter."""
        if not self.parts:
            return self.lora_B[0]
        own = dict(zip(self.parts, self.lora_B))
        return torch.block_diag(*[own[p] if p in own else self.lora_A.new_zeros(rows, 0)  # (rows, 0): rows without a column
                                  for p, rows in self.base_layer.parts.items()])

    def forward(self, x):
        h = self.base_layer(x)  # (..., out)
        z = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (..., R)
        B = self.B().t().to(z.dtype)
        return torch.addmm(h.flatten(0, -2), z.flatten(0, -2), B, alpha=self.scale).view_as(h)  # h + scale z B^T

    def delta(self):
        """(alpha / r) B A, laid out like the checkpoint's weight."""
        return self.product(self.B(), self.lora_A)

    def start_delta(self):
        """(alpha / r) B0 A0, which is no part of what was learned; 0 for an adapter that started at B = 0."""
        return torch.zeros(()) if self.start_A is None else self.product(self.start_B, self.start_A)

    def product(self, B, A):
        d = self.scale * (B @ A)  # (out, in)
        return d.t() if getattr(self.base_layer, "fan_in_fan_out", False) else d

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def widen(self, x):
        """x (..., in + R) and W (out, in + R) whose product is this layer's output: for a head, which loss.py multiplies.

        [x, (alpha / r) A x] times [W, B]. Not W + (alpha / r) B A, which in 16 bit rounds a young adapter to nothing.
        """
        z = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype)) * self.scale
        return torch.cat([x, z], -1), torch.cat([self.weight, self.B().to(self.weight.dtype)], 1)


def is_linear(module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def inject(model: nn.Module, r: int = 8, alpha: float = 16, dropout: float = 0.0, targets=None, rslora: bool = False,
           init: str = "default"):
    """Put adapters on the linear layers that `targets` names and freeze every other weight.

    targets: names such as ["q_proj", "v_proj"] or ["c_attn"] (a layer matches when its name ends so), ["c_attn.q"] for
    one part of a fused matrix, "all" for every linear layer of the blocks; None for Q and V.
    init: "default", "loftq" or "pissa", see lorainit.py. Returns the model.
    Raises UserError for r < 1, dropout outside [0, 1), a target that matches nothing, an init that cannot be.
    """
    if r < 1:
        raise UserError(f"--lora-r {r}: the rank must be at least 1 (or train every weight with --full)")
    if not 0 <= dropout < 1:
        raise UserError(f"--lora-dropout {dropout}: must be at least 0 and below 1")
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise UserError("this model has adapters already; merge them first")
    if init != "default":
        lorainit.check(init, model.bits, weights.stored_bits(weights.find(model.source)), alpha)
    model.requires_grad_(False)
    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    chosen: dict[str, set] = {}  # layer name -> its parts; {None} is the whole layer
    for target in [targets] if isinstance(targets, str) else targets or model.default_targets:
        found = matches(linears, target)
        if not found:
            known = {n.rsplit(".", 1)[-1]: m for n, m in linears.items()}
            names = [*known, *(f"{n}.{p}" for n, m in known.items() for p in getattr(m, "parts", ())), "all"]
            raise UserError(f"--lora-targets {target}: no such layer; this model has {', '.join(sorted(names))}")
        for name, part in found:
            chosen.setdefault(name, set()).add(part)
    for name, parts in chosen.items():
        parts = None if None in parts else tuple(p for p in linears[name].parts if p in parts)  # in the matrix's order
        replace(model, name, LoRALinear(linears[name], r, alpha, dropout, rslora, parts))
    lorainit.start(model, adapters(model), init)
    return model


def matches(linears: dict, target: str) -> list[tuple[str, str | None]]:
    """The (layer, part) pairs that a target names; part None is the whole layer."""
    if target == "all":
        return [(n, None) for n in linears if not n.endswith("lm_head")]
    whole = [(n, None) for n in linears if f".{n}".endswith(f".{target}")]
    layer, _, part = target.rpartition(".")
    return whole or [(n, part) for n, m in linears.items()
                     if f".{n}".endswith(f".{layer}") and part in getattr(m, "parts", ())]


def replace(model: nn.Module, name: str, module: nn.Module):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


# ---------------------------------------------------------------------------------------------- PEFT's files

def save(model: nn.Module, folder):
    """Write adapter_model.safetensors and adapter_config.json as PEFT does. Only the adapters: MBs, not GBs.

    A pissa adapter is written as what it adds to the *original* weights, s (B A - B0 A0), which is an adapter of twice
    the rank, [B, -B0] times [A; A0]. A loftq adapter belongs to the quantised base and is written as it is; its
    start, which merging needs, goes to start.safetensors.
    """
    found = adapters(model)
    if not found:
        raise UserError(f"{folder}: nothing to save, the model has no adapters")
    tensors, starts, ranks, alphas = {}, {}, {}, {}
    for name, m in found.items():
        key = f"base_model.model.{weights.checkpoint_name(model, name)}.lora_"
        A, B = m.lora_A, m.B()
        if model.lora_init == "pissa":
            A, B = torch.cat([A, m.start_A]), torch.cat([B, -m.start_B], 1)
        elif m.start_A is not None:
            starts |= {f"{key}A.weight": m.start_A, f"{key}B.weight": m.start_B}
        tensors |= {f"{key}A.weight": A, f"{key}B.weight": B}
        ranks[name] = rank = len(A)  # r times the number of parts, and 2 for pissa; alpha grows so that the scale stays
        alphas[name] = m.scale * (math.sqrt(rank) if m.rslora else rank)
    first, one = next(iter(found.items()))
    r, alpha = ranks[first], alphas[first]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": getattr(model, "source", None),
        "r": r, "lora_alpha": alpha, "lora_dropout": one.dropout,
        # Layers unlike the first: c_attn's q and v (rank 2r) beside a whole matrix (rank r).
        "rank_pattern": {n: rank for n, rank in ranks.items() if rank != r},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
        "use_rslora": one.rslora, "target_modules": sorted(found), "bias": "none", "modules_to_save": None,
        "fan_in_fan_out": getattr(one.base_layer, "fan_in_fan_out", False), "inference_mode": True,
        "init_lora_weights": True,
    }
    # PEFT ignores a file's metadata. Here it tells which parts a fused matrix's adapter is made of, and the base.
    about = {"parts": json.dumps({n: m.parts for n, m in found.items() if m.parts}), "init": model.lora_init}
    if hasattr(model, "bits"):
        about["bits"] = str(model.bits)
    if starts:
        weights.write_tensors(Path(folder) / "start.safetensors", starts)
    weights.write_tensors(Path(folder) / "adapter_model.safetensors", tensors, about)
    weights.write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


# adapter_config.json options that change the arithmetic and are not implemented: refused unless switched off.
UNSUPPORTED = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "layer_replication",
               "use_qalora", "alora_invocation_tokens", "target_parameters")


def of_layer(config: dict, name: str) -> tuple[int, float]:
    """r and alpha of a layer: adapter_config.json's, unless PEFT's rank_pattern or alpha_pattern names the layer."""
    def find(key, patterns):
        matching = [v for p, v in (config.get(patterns) or {}).items() if re.match(rf"(.*\.)?({p})$", name)]
        return matching[0] if matching else config.get(key, 8)  # 8 is PEFT's default for both
    return find("r", "rank_pattern"), find("lora_alpha", "alpha_pattern")


def trained_with(folder) -> tuple[str, int | None]:
    """How an adapter started ("default", "loftq", "pissa"), and over how many bits; None where the file does not say."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():  # load() says what is missing
        return "default", None
    with weights.opened(path) as f:
        about = f.metadata() or {}
    return about.get("init", "default"), int(about["bits"]) if "bits" in about else None


def load(model: nn.Module, folder):
    """Inject the adapters that `folder` holds (PEFT's layout, written here or by PEFT) and load them. Returns the model.

    Strict both ways: every tensor must find its layer and every layer both of its tensors. Raises UserError.
    """
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise UserError("this model has adapters already; merge them first")
    found = read(model, folder)
    init, bits = trained_with(folder)
    if init == "loftq" and bits != model.bits:
        raise UserError(f"{folder} corrects the rounding of {bits}-bit weights (--lora-init loftq), and these have "
                        f"{model.bits}: load the model with --bits {bits}, or merge (python lora.py merge)")
    if init == "pissa":
        lorainit.check(init, model.bits, weights.stored_bits(weights.find(model.source)))
    model.requires_grad_(False)
    for name, m in found.items():
        replace(model, name, m)
    lorainit.restore(model, found, init)
    return model


def read(model: nn.Module, folder, device=None) -> dict[str, LoRALinear]:
    """The adapters in `folder`, checked against the model's layers but not put there: layer name -> LoRALinear.

    device: where they go (default: where their layers are; a model without storage will do). Raises UserError.
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
    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    found, about = read_factors(model, path, linears)
    all_parts, init = json.loads(about.get("parts", "{}")), about.get("init", "default")
    starts = read_factors(model, folder / "start.safetensors", linears)[0] if init == "loftq" else {}
    targets = config.get("target_modules")
    for name in linears if isinstance(targets, list) and not config.get("layers_to_transform") else ():
        if name not in found and any(name == t or name.endswith("." + t) for t in targets):
            raise UserError(f"{path}: layer {name} has no adapter, though adapter_config.json's target_modules names it")
    modules = {}
    for name, (a, b) in found.items():
        base, parts = linears[name], tuple(all_parts.get(name, ())) or None
        rank, alpha = of_layer(config, weights.checkpoint_name(model, name))
        n = (len(parts) if parts else 1) * (2 if init == "pissa" else 1)
        if len(a) != rank or rank % n:
            raise UserError(f"{path}: layer {name} has rank {len(a)}, adapter_config.json says {rank}"
                            + (f"; it must be a multiple of {n}" if n > 1 else ""))
        rslora = config.get("use_rslora", False)
        alpha /= math.sqrt(n) if rslora else n  # as saved, it is for the whole rank
        m = LoRALinear(base, rank // n, alpha, config.get("lora_dropout", 0.0), rslora, parts, device)
        if init == "pissa":
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
        tensors, about = {k: f.get_tensor(k).float() for k in f.keys()}, f.metadata() or {}  # noqa: SIM118 (no dict)
    places = {f"base_model.model.{weights.checkpoint_name(model, n)}": n for n in linears}
    found: dict[str, dict] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B") or layer not in places:
            raise UserError(f"{path}: tensor {key} has no place in this model")
        found.setdefault(places[layer], {})[kind] = tensor
    if not found:
        raise UserError(f"{path}: the adapter is empty")
    for name, ab in found.items():
        base = linears[name]
        if len(ab) != 2:
            raise UserError(f"{path}: layer {name} has {' and '.join(ab)} only")
        a, b = ab["lora_A"], ab["lora_B"]
        if a.dim() != 2 or b.shape != (base.out_features, len(a)) or a.shape[1] != base.in_features:
            raise UserError(f"{path}: layer {name} is ({base.out_features}, {base.in_features}), "
                            f"its adapter B {list(b.shape)}, A {list(a.shape)}")
        found[name] = a, b
    return found, about


# ---------------------------------------------------------------------------------------------- merging

def merge(model: nn.Module):
    """W <- W + (alpha / r) B A, and the adapters are gone: the model is a plain one again, as fast as before.

    Explicit and idempotent (merging inside eval() has merged twice, or not at all, elsewhere). Only into float32:
    a 16-bit W would round the small delta away, another model than the one that was trained. Returns the model.
    """
    for name, m in adapters(model).items():
        if isinstance(m.base_layer, quant.LowBitLinear):
            raise UserError(f"{name} is held in {model.bits} bit, which would round the adapter away; python lora.py merge "
                            f"takes the weights as they were before")
        if m.base_layer.weight.dtype != torch.float32:
            raise UserError(f"{name} is held in {str(m.base_layer.weight.dtype).removeprefix('torch.')}: merging into it "
                            f"would not be exact; load the model with bits=32 and its adapter, then merge")
    for name, m in adapters(model).items():
        # A new tensor, not +=: a tied head's weight is the embedding too, and only the head is adapted.
        m.base_layer.weight = nn.Parameter((m.base_layer.weight + m.delta()).detach(), requires_grad=False)
        replace(model, name, m.base_layer)
        if name.endswith("lm_head"):
            model.config.tied_head = False
    return model


def main(argv=None):
    from files import merging  # the command; it imports this file
    merging.main(argv)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
