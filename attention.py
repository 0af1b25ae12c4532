"""Causal attention: the one place where tokens exchange information. Every model file calls it.

    y_t = sum over s <= t of softmax_s(q_t . k_s / sqrt(D)) v_s                    (arXiv:1706.03762, eq. 1)

The T x T matrix of weights is never stored: PyTorch's kernel works through it in tiles (FlashAttention,
arXiv:2205.14135) and keeps q, k, v, y and one float per row for backward. GPT-2 124M, 4 x 1024 tokens: the matrices
would be 4 * 12 heads * 1024^2 * 4 bytes = 201 MB in each of its 12 layers.
"""
import torch
from torch.nn.functional import scaled_dot_product_attention


def attend(q, k, v, segments: list[int] | None = None):
    """q (B, H, T, D) over k, v (B, K, S, D) -> (B, H, T, D). Query head h reads key/value head h // (H / K).

    Without a KV cache S = T. With one, S >= T = 1: the one new token sees all. There is no padding mask: padding stands
    on the right, where no real token looks. segments: the lengths of the examples in a packed row (B = 1); attention
    runs example by example, so its work is sum(t^2) instead of (sum t)^2 and nothing crosses a border.
    """
    dtype, gqa = q.dtype, q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and dtype != torch.float32 and q.requires_grad:
        # PyTorch's CPU backward multiplies 16-bit tiles without the matrix unit: at T = 72 it takes 3 times as long as
        # in float32, which costs 2 more bytes for each number of q, k, v and y.
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):  # the types are settled
        if segments is None:
            y = scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=gqa)
        else:
            pieces = zip(q.split(segments, 2), k.split(segments, 2), v.split(segments, 2), strict=True)
            y = torch.cat([scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=gqa) for qkv in pieces], 2)
    return y.to(dtype)
