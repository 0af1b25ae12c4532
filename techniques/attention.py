"""Causal attention: the one place where tokens exchange information. Every model file calls it.

    y_t = sum over s <= t of softmax_s(q_t . k_s / sqrt(D)) v_s                    (arXiv:1706.03762, eq. 1)

The T x T matrix of weights is never stored: PyTorch's kernel works through it in tiles (FlashAttention,
arXiv:2205.14135) and keeps q, k, v, y and one float per row for backward. GPT-2 124M, 4 x 1024 tokens: the matrices
would be 4 * 12 heads * 1024^2 * 4 bytes = 201 MB in each of its 12 layers.
"""
from contextlib import nullcontext

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from techniques.device import device_of


def attend(q, k, v, segments: list[int] | None = None, mask=None, float32: bool = False):
    """q (B, H, T, D) over k, v (B, K, S, D) -> (B, H, T, D). Query head h reads key/value head h // (H / K).

    Without a mask, the S - T places before the text are seen by all, and position t of the text sees s <= S - T + t.
    Without a KV cache S = T, unless a trained prefix stands before the text, or before each of the `segments`
    (methods/prefix.py). No padding mask is needed: padding is on the right of every real token, and a token sees only what
    is on its left.

    mask: (B, 1, T, S), added to the scores: 0 where position t of row b sees s, else -inf. Or the texts of a KV cache
    (techniques/kv_cache.py), each with its own rows of q, places in k and v, and mask. It is for generation: no gradients.

    segments: the lengths of the examples in a packed row (B = 1). Attention runs example by example: its work is
    sum(t^2) instead of (sum t)^2, and no example sees another. float32: 16-bit q, k and v are multiplied and summed in
    float32 (phi.py needs this); the result is 16 bit again.
    """
    if isinstance(mask, list):
        return attend_texts(q.float(), k, v, mask).to(q.dtype) if float32 else attend_texts(q, k, v, mask)
    if q.dtype != torch.float32:
        trained = mask is None and (q.requires_grad or k.requires_grad or v.requires_grad)
        if trained and (float32 or device_of(q.device).float32_backward):
            return Float32Backward.apply(q, k, v, segments, float32)
        if float32:
            return attend(q.float(), k.float(), v.float(), segments, mask if mask is None else mask.float()).to(q.dtype)
    with no_autocast(q.device.type):  # q, k and v already have the right type
        gqa = q.shape[1] != k.shape[1]
        if gqa and not device_of(q.device).reads_groups(q.dtype):  # or PyTorch would store the T x T matrices
            n, gqa = q.shape[1] // k.shape[1], False
            k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
        if segments is None:
            return one_text(q, k, v, mask, gqa)
        longer = [t + (k.shape[2] - q.shape[2]) // len(segments) for t in segments]
        pieces = zip(q.split(segments, 2), k.split(longer, 2), v.split(longer, 2), strict=True)
        return torch.cat([one_text(*qkv, None, gqa) for qkv in pieces], 2)


def attend_texts(q, k, v, texts: list):
    """q (B, H, T, D) over the texts of a KV cache, k and v (slots, K, max_length, D) -> (B, H, T, D)."""
    B, H, T, D = q.shape
    K, q, y = k.shape[1], q.transpose(1, 2).reshape(B * T, H, D), []
    for rows, tokens, slots, S, mask in texts:
        x, its_k, its_v = q[tokens], k[slots, :, :S].to(q.dtype), v[slots, :, :S].to(q.dtype)
        mask = mask if mask is None else mask.to(q.dtype)
        if len(x) > rows:
            y.append(attend(x.transpose(0, 1)[None], its_k, its_v, None, mask)[0].transpose(0, 1))
            continue
        with no_autocast(q.device.type):
            # The H / K heads of a group see the same places: they are H / K queries of one head, which reads k and v once.
            x = scaled_dot_product_attention(x.view(rows, K, -1, D), its_k, its_v, mask, is_causal=False)
        y.append(x.reshape(rows, H, D))
    return (y[0] if len(y) == 1 else torch.cat(y)).view(B, T, H, D).transpose(1, 2)


def no_autocast(device: str):
    """(To enter autocast takes 5 us: as much as a small product.)"""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def one_text(q, k, v, mask, gqa: bool):
    T, before = q.shape[2], k.shape[2] - q.shape[2]
    if mask is None and T > 1 and before:  # a prefix: with as many empty queries before q, is_causal is right. With a T x S
        return one_text(pad(q, (0, 0, before, 0)), k, v, None, gqa)[:, :, before:]  # mask, each layer would keep 4 T S bytes
    return scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=gqa)


class Float32Backward(torch.autograd.Function):
    """Attention whose backward runs in float32, from the 16-bit q, k and v. Forward keeps these three, and not y.

    PyTorch's CPU kernel multiplies 16-bit tiles without the matrix unit: at T = 72 its backward takes 3 times as long as
    in float32. With `float32`, forward runs in float32 too, on every device. 2C + 4KD bytes a token are kept; autograd
    would keep q, k, v and y in float32, 8C + 8KD bytes. Phi-2: 15 kB instead of 41 kB in each of its 32 layers.
    """

    @staticmethod
    def forward(ctx, q, k, v, segments, float32):
        ctx.save_for_backward(q, k, v)
        ctx.segments = segments
        return attend(q.detach(), k.detach(), v.detach(), segments, float32=float32)

    @staticmethod
    def backward(ctx, grad):
        qkv = [x.float().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():  # d (y . grad) / d qkv. The usual way, grad(y, qkv, grad), imports sympy
            product = (attend(*qkv, ctx.segments) * grad).sum()
        return *[g.to(grad.dtype) for g in torch.autograd.grad(product, qkv)], None, None
