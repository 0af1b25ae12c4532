"""The Triton kernel equals quant.dequantize_nf4 bit for bit. Skipped where triton is not installed.

Triton comes with PyTorch for CUDA. Without a GPU, `pip install --target DIR triton` brings its interpreter, which runs the
kernel on a CPU, and its compiler:      PYTHONPATH=DIR python -m pytest tests/test_nf4_triton.py
"""
import os
import subprocess
import sys

import pytest
import torch

from techniques import quant

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
triton = pytest.importorskip("triton", reason="triton is not installed: see this file's first lines")
from techniques import nf4_triton  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Numbers of weights: fewer than one program's 2048, exactly 2048, more; and blocks that reach into the next row.
SHAPES = [(1, 64), (3, 64), (96, 32), (32, 64), (100, 320), (33, 64), (5, 64 * 257)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_are_those_of_pytorch(shape, dtype):
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(*shape, generator=rng) * torch.logspace(-6, 2, shape[0])[:, None]
    packed, absmax = quant.quantize_nf4(w)
    packed = packed.copy_(torch.randint(0, 256, packed.shape, generator=rng))  # every pair of codes
    # The same in plain PyTorch, slow and easy to read.
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1).long()
    exact = (quant.NF4[codes].view(-1, 64) * absmax[:, None]).view(shape)
    assert torch.equal(quant.dequantize_nf4(packed, absmax, torch.empty(shape, dtype=dtype)), exact.to(dtype))
    got = nf4_triton.dequantize(packed.to(DEVICE), absmax.to(DEVICE), torch.empty(shape, dtype=dtype, device=DEVICE)).cpu()
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter truncates where a GPU rounds (see the next test)
        exact = (exact.view(torch.int32) & -65536).view(torch.float32)
    assert got.shape == shape and got.dtype == dtype and torch.equal(got, exact.to(dtype))


PTX = """
import triton
from techniques import nf4_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
signature = dict(packed="*u8", absmax="*fp32", levels="*fp32", out="*bf16", n_bytes="i32", size="constexpr")
aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
source = ASTSource(nf4_triton.kernel, signature, {(5,): nf4_triton.SIZE}, aligned)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


def test_the_gpus_instructions():
    """The code that the compiler makes for an H100; this needs no GPU. It rounds to nearest even, keeps float32's smallest
    numbers and writes 16 bytes at a time."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    p = subprocess.run([sys.executable, "-c", PTX], env=env, text=True, capture_output=True, timeout=120)
    assert p.returncode == 0, p.stderr
    ptx = p.stdout
    assert "cvt.rn.bf16" in ptx and "cvt.rz" not in ptx
    assert "mul.f32" in ptx and ".ftz" not in ptx and "fma" not in ptx
    assert "st.global.v4.b32" in ptx
