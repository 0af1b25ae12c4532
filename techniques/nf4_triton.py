"""NF4 to 16 or 32 bits on a GPU, in one pass: a Triton kernel (Tillet, Kung and Cox, "Triton", MAPL 2019).

For each weight, the kernel reads 0.5 bytes of codes and 4 / 64 bytes of absmax, writes 2 bytes, and multiplies once.
So only the speed of the GPU's memory counts. LLaMA-7B's largest layer has 4096 x 11008 weights: 2.56 bytes each make
116 MB, or 35 microseconds at an H100's 3.35 TB/s. With PyTorch's operators, every intermediate result (codes as
integers, levels and products in float32) would be written to memory and read again: some ten times as many bytes.

    byte i of `packed` = code of weight 2i << 4 | code of weight 2i + 1          absmax of weight j = absmax[j // 64]
    out[j] = level[code] * absmax[j // 64] in float32, then rounded to the nearest, ties to even

The arithmetic is that of quant.dequantize_nf4, so the results are equal bit for bit.
"""
import functools

import torch
import triton
import triton.language as tl

SIZE = 1024  # bytes of codes for each program: 2048 weights, 16 for each thread of its four warps


@triton.jit
def kernel(packed, absmax, levels, out, n_bytes, size: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * size  # 64 bits: a matrix may have more than 2^31 weights
    i = start + tl.arange(0, size)
    byte = tl.load(packed + i, mask=i < n_bytes, other=0).to(tl.int32)
    scale = tl.load(absmax + i // 32, mask=i < n_bytes, other=0.0)  # a block of 64 weights is 32 bytes
    earlier = tl.load(levels + (byte >> 4)) * scale  # 16 levels, 64 bytes: they stay in the L1 cache
    later = tl.load(levels + (byte & 15)) * scale
    j = 2 * start + tl.arange(0, 2 * size)
    tl.store(out + j, tl.interleave(earlier, later).to(out.dtype.element_ty), mask=j < 2 * n_bytes)


@functools.cache
def on_device(levels: torch.Tensor, device: torch.device) -> torch.Tensor:
    return levels.to(device)


def dequantize(packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """packed (n / 2, 1) uint8, absmax (n / 64,) float32 -> `out` (n elements), all on one GPU. levels (16,): quant.NF4."""
    n_bytes = packed.numel()
    kernel[(triton.cdiv(n_bytes, SIZE),)](packed, absmax, on_device(levels, packed.device), out, n_bytes, SIZE)
    return out
