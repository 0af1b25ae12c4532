"""GPT-2, from token ids to logits, in one file.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). Each token has one vector, and these
vectors are the residual stream x. Identical blocks, one after another, read x and add to it:

    x = wte[ids] + wpe[positions]          token embedding + position embedding
    x = x + attn(ln_1(x))                  tokens exchange information
    x = x + mlp(ln_2(x))                   each token is processed by itself     ... n_layer times
    logits = ln_f(x) @ wte.T               the head is the token embedding again ("tied")

The attributes have the checkpoint's own names (`h.0.attn.c_attn.weight`), so loading needs no table of names.
The 0.1 dropout of GPT-2's pretraining is not applied. In fine-tuning, the adapter can have dropout instead (lora.py).

What the activations cost. For each token and layer, backward needs in 16 bit: the inputs of the two norms (4C bytes),
the adapter's input (2C), q, k, v (6C), attention's output (2C) and GELU's input (8C). Together: 22C bytes. GPT-2 124M
(C = 768, 12 layers), 4 x 512 tokens: 22 * 768 * 12 * 2048 = 415 MB, more than its 249 MB of weights. (On a CPU
attention's output is computed again instead: 20C.) `ckpt_every` saves most of these bytes: a recomputed layer keeps
only its input, 2C bytes a token, and runs a second time in backward (recompute.py).

Shapes: B batch, T time, C n_embd, H heads, D head_dim (C = H * D), F n_inner, V vocab.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from techniques.attention import attend
from techniques.recompute import recompute

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # config.json -> F.gelu(approximate=)

# Keys of config.json that the model depends on. The loader checks them: an int is a size, a float is above 0.
KEYS = {"vocab_size": int, "n_positions": int, "n_layer": int, "n_head": int, "n_embd": int, "n_inner": int,
        "layer_norm_epsilon": float, "activation_function": str, "scale_attn_weights": bool, "tie_word_embeddings": bool}
# Keys of config.json that change nothing in what the model computes, in use or in fine-tuning.
HARMLESS = set("""architectures model_type transformers_version torch_dtype dtype bos_token_id eos_token_id pad_token_id
    attn_pdrop embd_pdrop resid_pdrop initializer_range n_ctx use_cache return_dict id2label label2id
    chunk_size_feed_forward task_specific_params gradient_checkpointing""".split())


@dataclass
class Config:
    vocab_size: int = 50257
    n_positions: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12
    head_dim: int = 64
    n_embd: int = 768
    n_inner: int = 3072
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    tied_head: bool = True

    @classmethod
    def from_json(cls, c: dict) -> "Config":
        """Read a checkpoint's config.json. Raises ValueError for any option that this file does not implement."""
        c = {k: v for k, v in c.items() if k not in HARMLESS and not k.startswith(("_", "summary_"))}
        d = cls(vocab_size=c.pop("vocab_size"), n_positions=c.pop("n_positions"), n_layer=c.pop("n_layer"),
                n_head=c.pop("n_head"), n_embd=c.pop("n_embd"), norm_eps=c.pop("layer_norm_epsilon", 1e-5),
                activation=c.pop("activation_function", "gelu_new"), tied_head=c.pop("tie_word_embeddings", True))
        d.n_kv_head, d.head_dim, d.n_inner = d.n_head, d.n_embd // d.n_head, c.pop("n_inner", None) or 4 * d.n_embd
        if d.n_embd % d.n_head:
            raise ValueError(f"n_embd {d.n_embd} is not divisible by n_head {d.n_head}")
        if d.activation not in ACTIVATIONS:
            raise ValueError(f"activation_function {d.activation!r} is not implemented (only {', '.join(ACTIVATIONS)})")
        if not c.pop("scale_attn_weights", True):
            raise ValueError("scale_attn_weights: false is not implemented")
        for key, value in c.items():  # an option that is null, false or empty is switched off
            if value:
                raise ValueError(f"option {key!r:.99}: {value!r:.99} is not implemented by gpt2.py")
        return d


class Conv1D(nn.Module):
    """y = x W + b with W stored as (in, out), the transpose of a Linear's weight. GPT-2's checkpoints store it so."""

    fan_in_fan_out = True  # PEFT's name for this layout; lora.py and files/ read it

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)  # t() is a view: no copy


class LayerNorm(nn.LayerNorm):
    """(x - mean) / std * weight + bias, in the type of x. The kernel computes in float32 inside and rounds once.

    So autocast is switched off here. On a GPU it would give the kernel a float32 copy of a 16-bit x, and return float32.
    Backward would keep this copy: 4C bytes a token and norm instead of 2C. GPT-2 124M has 25 norms; for 4 x 512 tokens
    they would keep 157 MB instead of 79 MB. (A CPU's autocast makes no such copy.)
    """

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        C = config.n_embd
        self.layer, self.n_head, self.head_dim = layer, config.n_head, config.head_dim
        self.c_attn = Conv1D(C, 3 * C)  # q, k and v from one matrix product
        self.c_attn.parts = {"q": C, "k": C, "v": C}  # so that q and v can have an adapter, and k none
        self.c_proj = Conv1D(C, C)

    def forward(self, x, segments=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, self.head_dim).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)  # of all tokens so far; x has the new ones
        y = attend(q, k, v, segments, mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.n_inner)
        self.c_proj = Conv1D(config.n_inner, config.n_embd)
        self.approximate = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))  # (B, T, C) -> (B, T, F) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, segments=None, cache=None):
        x = x + self.attn(self.ln_1(x), segments, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 small to XL. files/weights.py lists what every family offers, under "Adding a model family"."""

    prefix = "transformer."  # newer checkpoints and PEFT adapters put this before every name but the head's
    head_name = "lm_head"
    default_targets = ("c_attn.q", "c_attn.v")
    keys_and_values, outputs = ("c_attn.k", "c_attn.v"), ("attn.c_proj", "mlp.c_proj")  # for the methods in methods/

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.ckpt_every, self.ckpt_offload = config, 0, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """One matrix has two roles. GPT-2 124M: its 50257 x 768 weights are stored, and counted, once instead of twice."""
        if self.config.tied_head:
            self.lm_head.weight = self.wte.weight

    @property
    def head(self):
        return self.lm_head

    @property
    def blocks(self):
        return self.h

    def hidden(self, ids: Tensor, positions: Tensor | None = None, segments: list[int] | None = None, cache=None) -> Tensor:
        """Token ids (B, T) -> the final norm's output (B, T, C).

        positions: (B, T) or (T,). Default: 0..T-1, or those that follow each row's tokens in the cache.
        segments: the lengths of the examples in a packed row (then B is 1). cache: a kv_cache.KVCache.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device) if cache is None else cache.positions(ids)
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        for i, block in enumerate(self.h):
            if self.ckpt_every and (i + 1) % self.ckpt_every == 0 and torch.is_grad_enabled():
                x = recompute(block, x, segments, cache, offload=self.ckpt_offload)  # keeps x alone
            else:
                x = block(x, segments, cache)
        return self.ln_f(x)

    def forward(self, ids: Tensor, positions: Tensor | None = None, segments: list[int] | None = None, cache=None) -> Tensor:
        return self.head(self.hidden(ids, positions, segments, cache))  # (B, T, V)
