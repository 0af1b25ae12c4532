"""optim.py against torch.optim.AdamW."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import optim


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs(weight_decay):
    """50 steps at a changing learning rate, the first tensor without a gradient in a third of them."""
    start = [torch.randn(13, 9), torch.randn(5, 3, 2), torch.randn(7)]
    ours, fused, plain = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(3))

    def groups(params):
        return [{"params": params[:2], "weight_decay": weight_decay}, {"params": params[2:], "weight_decay": 0.0}]

    optimizers = [optim.AdamW(groups(ours), lr=1e-2), torch.optim.AdamW(groups(fused), lr=1e-2, fused=True),
                  torch.optim.AdamW(groups(plain), lr=1e-2, foreach=False)]
    for step in range(50):
        for i, same in enumerate(zip(ours, fused, plain, strict=True)):
            grad = torch.randn(start[i].shape) * 10 ** -i if step % 3 or i else None
            for p in same:
                p.grad = grad
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            o.step()
    for p, q, r in zip(ours, fused, plain, strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-7)
        state = optimizers[0].state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == optimizers[1].state[q]["step"]
        assert sum(t.nbytes for t in state.values()) == 8 * p.numel() + 4
    optimizers[0].zero_grad()
    assert all(p.grad is None for p in ours)


@pytest.mark.parametrize("more", [[], ["--ckpt-every", "2", "--ckpt-offload"]], ids=["", "ckpt"])
def test_training_does_not_import_pytorchs_compiler(more, tmp_path):
    """72 MB and 2 seconds; torch.optim, a random start on "meta", a dispatch mode, torch.utils.checkpoint and autograd.grad
    would each bring it."""
    code = ("import sys, train; train.main(train.parse(sys.argv[1:]));"
            "sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules)")
    options = ["--steps", "3", "--amp", "--samples", "1", "--out", tmp_path / "run", *more]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
