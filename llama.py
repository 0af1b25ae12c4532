"""LLaMA 1, 2, 3, 3.1, 3.2, TinyLlama, SmolLM2, from token ids to logits, in one file.

Touvron et al., "LLaMA" (2023, arXiv:2302.13971) and "Llama 2" (arXiv:2307.09288). What differs from gpt2.py:

* RMSNorm instead of LayerNorm: no mean, no bias.
* Rotary positions (RoPE): q and k are rotated inside attention. There is no table of position embeddings.
* SwiGLU instead of GELU: silu(gate(x)) * up(x), three matrices of width F, about 8/3 C, instead of two of width 4C.
* Grouped-query attention: each of the K key/value heads serves H / K of the H query heads (Llama 2 70B, all of Llama 3).
* q, k and v are three Linear layers without bias, stored as (out, in). Only the small models have a tied head.

What the activations cost, a token and layer, in 16 bit and without recomputation: the inputs of the two norms (4C bytes),
the adapters' input (2C), q, k, v (2C + 4KD), attention's output (2C), SwiGLU's gate and up (4F).
LLaMA-7B (C = KD = 4096, F = 11008, 32 layers): 14C + 4F = 101,376 bytes, 101 kB a layer. A token costs 3.24 MB in the 32
layers, and 512 tokens cost 1.66 GB. (On a CPU attention's output is computed again instead: 2C bytes less.)

Shapes: B batch, T time, C n_embd, H heads, K key/value heads, D head_dim, F n_inner, V vocab.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from techniques.attention import attend
from techniques.device import device_of
from techniques.recompute import recompute

# Keys of config.json that the model depends on. The loader checks them: an int is a size, a float is above 0.
ROPE = {"rope_type": str, "type": str, "rope_theta": float, "factor": float, "low_freq_factor": float,
        "high_freq_factor": float, "original_max_position_embeddings": float}
KEYS = {"vocab_size": int, "max_position_embeddings": int, "num_hidden_layers": int, "num_attention_heads": int,
        "num_key_value_heads": int, "head_dim": int, "hidden_size": int, "intermediate_size": int, "rms_norm_eps": float,
        "rope_theta": float, "rope_scaling": ROPE, "rope_parameters": ROPE, "hidden_act": str, "attention_bias": bool,
        "mlp_bias": bool, "tie_word_embeddings": bool}
# Keys of config.json that change nothing in what the model computes, in use or in fine-tuning.
HARMLESS = set("""architectures model_type transformers_version torch_dtype dtype bos_token_id eos_token_id pad_token_id
    unk_token_id initializer_range attention_dropout use_cache return_dict id2label label2id chunk_size_feed_forward
    max_sequence_length pretraining_tp task_specific_params gradient_checkpointing""".split())


@dataclass
class Config:
    vocab_size: int = 32000
    n_positions: int = 2048
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32
    head_dim: int = 128
    n_embd: int = 4096
    n_inner: int = 11008
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ...}
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False

    @classmethod
    def from_json(cls, c: dict) -> "Config":
        """Read a checkpoint's config.json. Raises ValueError for any option that this file does not implement."""
        c = {k: v for k, v in c.items() if k not in HARMLESS and not k.startswith("_")}
        rope = {**(c.pop("rope_scaling", None) or {}), **(c.pop("rope_parameters", None) or {})}  # old and new key
        theta = rope.pop("rope_theta", None) or c.pop("rope_theta", None) or 10000.0
        c.pop("rope_theta", None)
        n_embd, n_head = c.pop("hidden_size"), c.pop("num_attention_heads")
        d = cls(vocab_size=c.pop("vocab_size"), n_positions=c.pop("max_position_embeddings", 2048),
                n_layer=c.pop("num_hidden_layers"), n_head=n_head, n_embd=n_embd,
                n_kv_head=c.pop("num_key_value_heads", None) or n_head, head_dim=c.pop("head_dim", None) or n_embd // n_head,
                n_inner=c.pop("intermediate_size"), norm_eps=c.pop("rms_norm_eps", 1e-6),
                rope_theta=theta, rope_scaling=read_rope_scaling(rope), attention_bias=c.pop("attention_bias", False),
                mlp_bias=c.pop("mlp_bias", False), tied_head=c.pop("tie_word_embeddings", False))
        if d.n_head % d.n_kv_head:
            raise ValueError(f"num_attention_heads {n_head} is not divisible by num_key_value_heads {d.n_kv_head}")
        if d.head_dim % 2 or not d.head_dim:
            raise ValueError(f"a head has {d.head_dim} numbers; rotary positions turn pairs, so it must be an even number")
        if (act := c.pop("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act {act!r} is not implemented (only silu)")
        for key, value in c.items():  # an option that is null, false or empty is switched off
            if value:
                raise ValueError(f"option {key!r:.99}: {value!r:.99} is not implemented by llama.py")
        return d


def read_rope_scaling(rope: dict) -> dict | None:
    """Check config.json's rope_scaling (old) or rope_parameters (new) and return it with the key `rope_type`."""
    rope = dict(rope)
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)  # the oldest spelling of rope_type
    keys = {"default": set(), "linear": {"factor"}, "llama3": {"factor", "low_freq_factor", "high_freq_factor",
                                                              "original_max_position_embeddings"}}
    if kind not in keys:
        raise ValueError(f"rope_scaling of type {kind!r} is not implemented (only linear and llama3)")
    if missing := keys[kind] - rope.keys():
        raise ValueError(f"rope_scaling of type {kind!r} lacks {', '.join(sorted(missing))}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError("rope_scaling: low_freq_factor must be below high_freq_factor")
    if extra := {k: v for k, v in rope.items() if k not in keys[kind] and v}:
        raise ValueError(f"rope_scaling option {extra!r:.99} is not implemented for type {kind!r}")
    return None if kind == "default" else {"rope_type": kind, **rope}


def rope_tables(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions (..., T) -> the tables (cos, cos) and (-sin, sin), each (..., T, 1, D), in float32.

    The angles are position * theta^(-2i/D), i < D/2 (RoFormer, arXiv:2104.09864, eq. 15). Each forward makes the tables
    again, and all its layers use them: 8D bytes a token, LLaMA-7B 1 kB. They are no buffer of the model, because
    `.to(bfloat16)` would round a buffer to 8 significant bits. The angles must be float32 too: between 2048 and 4096
    bfloat16 holds only every 16th number, so an angle there would be wrong by up to 8 radians.
    """
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim)
    if s := config.rope_scaling:
        if s["rope_type"] == "linear":  # compressed positions: 4096 trained positions serve factor * 4096
            freq = freq / s["factor"]
        else:  # Llama 3.1: slow frequencies are divided by factor, fast ones kept, those between are a mixture
            turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # over the pretraining context
            keep = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
            keep = keep.clamp(0, 1)
            freq = keep * freq + (1 - keep) * freq / s["factor"]
    with torch.autocast(positions.device.type, enabled=False):
        angle = positions.float()[..., None, None] * freq  # (..., T, 1, D/2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class Rope(torch.autograd.Function):
    """Rotate the pairs (x[i], x[i + D/2]) of x (B, T, H, D) by the tables' angles.

    Hugging Face's checkpoints pair the numbers so ("split-half"). Meta's original files pair (x[2i], x[2i + 1]). The wrong
    pairing raises no error, and the model writes fluent nonsense.
    The gradient of a rotation is the rotation back, so backward needs only the tables.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, sin, -1), None, None


def rotate(x, cos, sin):
    """Rope.apply. While nothing is trained, its records would take a tenth of the time of a token (SmolLM2-135M)."""
    return Rope.apply(x, cos, sin) if torch.is_grad_enabled() else turn(x, cos, sin, 1)


def turn(x, cos, sin, way: int):
    """(a, b) -> (a cos - b sin, b cos + a sin), in float32. The table `sin` is (-sin, sin), and roll makes (b, a).

    way: -1 turns back. (The tables are float32, so the products are too, whatever x is.)
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, value=way).to(x.dtype)


def row_dot(a, b):
    """sum(a b) of each row, (..., C) -> (..., 1), in the type of a and b.

    Autocast is off, because it treats vecdot as a matrix product and would compute it in 16 bit. bfloat16 has only 8
    significant bits, and float16 overflows when the sum is above 65,504."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.linalg.vecdot(a, b)[..., None]


class RMSNormFunction(torch.autograd.Function):
    """y = w x r,  r = 1 / sqrt(mean(x^2) + eps)  (arXiv:1910.07467), in float32. Each row (token) has one r.

    With g = w dy:   dx = r g - x r^3 mean(g x).    Kept for backward: x in 16 bit, 2C bytes a token, and r, 4 bytes.
    From plain operations autograd would keep x in float32, 4C bytes, and where w is trained x r too: 8C bytes.
    LLaMA-7B with LoRA, the 64 norms of the layers, 512 tokens: 268 MB instead of 537 MB.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        x32 = x.to(torch.float32, copy=True)
        r = torch.rsqrt(row_dot(x32, x32) / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        return x32.mul_(r).to(torch.promote_types(x.dtype, weight.dtype)).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        x32, dx, dw = x.float(), None, None
        if ctx.needs_input_grad[1]:
            dw = (grad * x32 * r).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = grad.to(torch.float32, copy=True).mul_(weight)
            mean = row_dot(g, x32) / x.shape[-1]
            dx = g.mul_(r).addcmul_(x32, mean * r.pow(3), value=-1).to(x.dtype)
        return dx, dw, None


class RMSNorm(nn.Module):
    def __init__(self, n_embd: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_embd))
        self.eps = eps

    def forward(self, x):
        if not torch.is_grad_enabled() and x.dtype == self.weight.dtype == torch.float32:
            # The same in 6 calls without a record: a quarter of the time for one token (SmolLM2-135M: 61 norms a token)
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            r = torch.full((), self.eps, device=x.device).addcmul(norm, norm, value=1 / x.shape[-1]).rsqrt_()
            return (x * r).mul_(self.weight)
        if device_of(x.device).rms_norm_kernel and x.dtype == self.weight.dtype:  # it keeps the same: x and r
            with torch.autocast(x.device.type, enabled=False):  # autocast would make a float32 copy of x
                return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return RMSNormFunction.apply(x, self.weight, self.eps)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202). Kept for backward: gate and up, 4F bytes a token. silu(gate) is computed again,
    which saves 2F bytes a token and layer. LLaMA-7B, 512 tokens: 2 * 11008 * 32 * 512 = 361 MB."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, K, D, bias = config.n_embd, config.n_head, config.n_kv_head, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, D
        self.q_proj = nn.Linear(C, H * D, bias=bias)
        self.k_proj = nn.Linear(C, K * D, bias=bias)
        self.v_proj = nn.Linear(C, K * D, bias=bias)
        self.o_proj = nn.Linear(H * D, C, bias=bias)

    def forward(self, x, cos, sin, segments=None, cache=None):
        B, T, C = x.shape
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim), cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim), cos, sin).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)  # of all tokens so far; x has the new ones
        y = attend(q, k, v, segments, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C, F_, bias = config.n_embd, config.n_inner, config.mlp_bias
        self.gate_proj = nn.Linear(C, F_, bias=bias)
        self.up_proj = nn.Linear(C, F_, bias=bias)
        self.down_proj = nn.Linear(F_, C, bias=bias)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)  # (B, T, C) -> (B, T, F)
        return self.down_proj(SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, segments=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, segments, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything but the head. The checkpoint calls this part `model.`"""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)


class Llama(nn.Module):
    """The LLaMA family. files/weights.py lists what every family offers, under "Adding a model family"."""

    prefix = ""  # the names in this file are the checkpoint's complete names
    head_name = "lm_head"
    default_targets = ("q_proj", "v_proj")
    keys_and_values, outputs = ("k_proj", "v_proj"), ("o_proj", "down_proj")  # for the methods in methods/

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.ckpt_every, self.ckpt_offload = config, 0, False
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """Llama 3.2 1B shares 128256 x 2048 weights between embedding and head: 263M of its 1,236M parameters."""
        if self.config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def head(self):
        return self.lm_head

    @property
    def blocks(self):
        return self.model.layers

    def hidden(self, ids: Tensor, positions: Tensor | None = None, segments: list[int] | None = None, cache=None) -> Tensor:
        """Token ids (B, T) -> the final norm's output (B, T, C).

        positions: (B, T) or (T,). Default: 0..T-1, or those that follow each row's tokens in the cache.
        segments: the lengths of the examples in a packed row (then B is 1). cache: a kv_cache.KVCache.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device) if cache is None else cache.positions(ids)
        cos, sin = rope_tables(self.config, positions)
        x = self.model.embed_tokens(ids)  # (B, T, C)
        for i, block in enumerate(self.model.layers):
            if self.ckpt_every and (i + 1) % self.ckpt_every == 0 and torch.is_grad_enabled():
                x = recompute(block, x, cos, sin, segments, cache, offload=self.ckpt_offload)  # keeps x alone
            else:
                x = block(x, cos, sin, segments, cache)
        return self.model.norm(x)

    def forward(self, ids: Tensor, positions: Tensor | None = None, segments: list[int] | None = None, cache=None) -> Tensor:
        return self.head(self.hidden(ids, positions, segments, cache))  # (B, T, V)
