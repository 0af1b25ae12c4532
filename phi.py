"""Phi-1, Phi-1.5 and Phi-2, from token ids to logits, in one file.

Gunasekar et al., "Textbooks Are All You Need" (2023, arXiv:2306.11644) and Li et al. on Phi-1.5 (arXiv:2309.05463); the
block is GPT-J's (Wang and Komatsuzaki, 2021). What differs from llama.py:

* Attention and MLP read the output of the same norm: x + attn(ln(x)) + mlp(ln(x)). A layer has one norm instead of two.
* Partial rotary positions: only the first 2/5 (Phi-2) or 1/2 of a head's D numbers are rotated by the token's position.
* LayerNorm and a GELU MLP of two matrices, as in GPT-2, instead of RMSNorm and SwiGLU.
* Every linear layer has a bias, the head too. The head is not tied.
* q . k can exceed float16's largest number, 65,504. Then softmax turns the infinities into nan
  (github.com/huggingface/transformers/issues/28163). So in float16, attention is computed in float32
  (`attend(..., float32=True)`). bfloat16 has the range of float32 and does not need this.
  Cost: float32 copies of q, k, v and y of one layer at a time, 16C bytes a token: Phi-2, 4 x 512 tokens: 84 MB. These
  products do not use the 16-bit matrix units. What is kept for backward stays in 16 bit.

What the activations cost, a token and layer, in 16 bit and without recomputation: the input of the norm (2C bytes), the
adapters' input (2C), q, k, v (2C + 4KD), attention's output (2C), GELU's input (2F).
Phi-2 (C = KD = 2560, F = 10240, 32 layers): 51 kB a layer, 1.6 MB a token, 839 MB for 512 tokens, half of LLaMA-7B's.
(On a CPU, and in float16, attention's output is computed again instead: 46 kB a layer.)

The 0.1 dropout of Phi-2's config.json is not applied. In fine-tuning, the adapter can have dropout instead (lora.py).

Shapes: B batch, T time, C n_embd, H heads, K key/value heads, D head_dim, R rotary_dim, F n_inner, V vocab.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from techniques.attention import attend
from techniques.recompute import recompute

# Keys of config.json that the model depends on. The loader checks them: an int is a size, a float is above 0.
ROPE = {"rope_type": str, "type": str, "rope_theta": float, "partial_rotary_factor": float}
KEYS = {"vocab_size": int, "max_position_embeddings": int, "num_hidden_layers": int, "num_attention_heads": int,
        "num_key_value_heads": int, "head_dim": int, "hidden_size": int, "intermediate_size": int, "layer_norm_eps": float,
        "rope_theta": float, "partial_rotary_factor": float, "rope_scaling": ROPE, "rope_parameters": ROPE,
        "hidden_act": str, "tie_word_embeddings": bool}
# Keys of config.json that change nothing in what the model computes, in use or in fine-tuning.
HARMLESS = set("""architectures auto_map model_type transformers_version torch_dtype dtype bos_token_id eos_token_id
    pad_token_id initializer_range attention_dropout embd_pdrop resid_pdrop use_cache return_dict id2label label2id
    chunk_size_feed_forward task_specific_params gradient_checkpointing""".split())


@dataclass
class Config:
    vocab_size: int = 51200
    n_positions: int = 2048
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32
    head_dim: int = 80
    rotary_dim: int = 32
    n_embd: int = 2560
    n_inner: int = 10240
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied_head: bool = False

    @classmethod
    def from_json(cls, c: dict) -> "Config":
        """Read a checkpoint's config.json. Raises ValueError for any option that this file does not implement."""
        c = {k: v for k, v in c.items() if k not in HARMLESS and not k.startswith("_")}
        rope = {**(c.pop("rope_scaling", None) or {}), **(c.pop("rope_parameters", None) or {})}  # old and new key
        for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.5)):  # outside rope_scaling or in it
            outside = c.pop(key, None)
            if rope.get(key) is None:
                rope[key] = default if outside is None else outside
        n_embd, n_head = c.pop("hidden_size"), c.pop("num_attention_heads")
        head_dim = c.pop("head_dim", None) or n_embd // n_head
        d = cls(vocab_size=c.pop("vocab_size"), n_positions=c.pop("max_position_embeddings", 2048),
                n_layer=c.pop("num_hidden_layers"), n_head=n_head, n_kv_head=c.pop("num_key_value_heads", None) or n_head,
                head_dim=head_dim, rotary_dim=int(head_dim * rope.pop("partial_rotary_factor")), n_embd=n_embd,
                n_inner=c.pop("intermediate_size"), norm_eps=c.pop("layer_norm_eps", 1e-5),
                rope_theta=rope.pop("rope_theta"), tied_head=c.pop("tie_word_embeddings", False))
        if d.n_head % d.n_kv_head:
            raise ValueError(f"num_attention_heads {n_head} is not divisible by num_key_value_heads {d.n_kv_head}")
        if d.rotary_dim % 2 or not 0 < d.rotary_dim <= head_dim:
            raise ValueError(f"partial_rotary_factor turns {d.rotary_dim} of a head's {head_dim} numbers; "
                             "it must be an even number of them, at least 2")
        if (act := c.pop("hidden_act", "gelu_new")) != "gelu_new":
            raise ValueError(f"hidden_act {act!r} is not implemented (only gelu_new)")
        if (kind := rope.pop("rope_type", None) or rope.get("type") or "default") != "default":
            raise ValueError(f"rope_scaling of type {kind!r} is not implemented by phi.py")
        rope.pop("type", None)  # the oldest spelling of rope_type
        for key, value in {**rope, **c}.items():  # an option that is null, false or empty is switched off
            if value:
                raise ValueError(f"option {key!r:.99}: {value!r:.99} is not implemented by phi.py")
        return d


def rope_tables(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions (..., T) -> the tables (cos, cos) and (-sin, sin), each (..., T, 1, R), in float32.

    The angles are position * theta^(-2i/R), i < R/2 (RoFormer, arXiv:2104.09864, eq. 15, with R in place of D). Each
    forward makes the tables again: they are no buffer of the model, because `.to(float16)` would round a buffer.
    """
    R = config.rotary_dim
    freq = config.rope_theta ** -(torch.arange(0, R, 2, device=positions.device).float() / R)
    with torch.autocast(positions.device.type, enabled=False):
        angle = positions.float()[..., None, None] * freq  # (..., T, 1, R/2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class Rope(torch.autograd.Function):
    """Rotate the pairs (x[i], x[i + R/2]), i < R/2, of x (B, T, H, D) by the tables' angles. x[R:] stays as it is.

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


def turn(x, cos, sin, way: int):
    """(a, b) -> (a cos - b sin, b cos + a sin), in float32. The table `sin` is (-sin, sin), and roll makes (b, a).

    way: -1 turns back.
    """
    R = cos.shape[-1]
    ab = x[..., :R]
    return torch.cat([torch.addcmul(ab * cos, ab.roll(R // 2, -1), sin, value=way).to(x.dtype), x[..., R:]], -1)


class LayerNorm(nn.LayerNorm):
    """The kernel computes in float32 inside. Autocast is off: on a GPU it would keep a float32 copy of x for backward."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.layer, self.head_dim = layer, D
        self.q_proj = nn.Linear(C, H * D)
        self.k_proj = nn.Linear(C, K * D)
        self.v_proj = nn.Linear(C, K * D)
        self.dense = nn.Linear(H * D, C)

    def forward(self, x, cos, sin, segments=None, cache=None):
        B, T, C = x.shape
        q = Rope.apply(self.q_proj(x).view(B, T, -1, self.head_dim), cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = Rope.apply(self.k_proj(x).view(B, T, -1, self.head_dim), cos, sin).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)  # of all tokens so far; x has the new ones
        y = attend(q, k, v, segments, mask, float32=q.dtype == torch.float16)  # q . k can exceed 65,504
        return self.dense(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.n_inner)
        self.fc2 = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # (B, T, C) -> (B, T, F) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, segments=None, cache=None):
        h = self.input_layernorm(x)
        return x + self.self_attn(h, cos, sin, segments, cache) + self.mlp(h)


class Decoder(nn.Module):
    """Everything but the head. The checkpoint calls this part `model.`"""

    def __init__(self, config: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.final_layernorm = LayerNorm(config.n_embd, eps=config.norm_eps)


class Phi(nn.Module):
    """Phi-1, 1.5 and 2. files/weights.py lists what every family offers, under "Adding a model family"."""

    prefix = ""  # the names in this file are the checkpoint's complete names
    head_name = "lm_head"
    default_targets = ("q_proj", "v_proj")
    keys_and_values, outputs = ("k_proj", "v_proj"), ("self_attn.dense", "fc2")  # for the methods in methods/

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.ckpt_every, self.ckpt_offload = config, 0, False
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.tie()

    def tie(self):
        """The published Phi models are not tied. Phi-2's head has 51200 x 2560 weights, 131M of its 2,780M parameters."""
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
        return self.model.final_layernorm(x)

    def forward(self, ids: Tensor, positions: Tensor | None = None, segments: list[int] | None = None, cache=None) -> Tensor:
        return self.head(self.hidden(ids, positions, segments, cache))  # (B, T, V)
