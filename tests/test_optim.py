"""optim.py against torch.optim.AdamW."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import optim


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs(weight_decay, monkeypatch):
    """50 steps, with more than one slice a tensor, a tensor without a gradient in some steps, and two learning rates."""
    monkeypatch.setattr(optim, "SLICE", 50)
    start = [torch.randn(13, 9), torch.randn(5, 3, 2), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    a, b = (make([{"params": ps[:2], "weight_decay": weight_decay}, {"params": ps[2:], "weight_decay": 0.0}], lr=1e-2)
            for make, ps in ((optim.AdamW, ours), (torch.optim.AdamW, theirs)))
    for step in range(50):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = q.grad = torch.randn(p.shape) * 10 ** -i if step % 3 or i else None
        for o in (a, b):
            for group in o.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            o.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    for p, q in zip(ours, theirs, strict=True):
        assert set(a.state[p]) == {"step", "exp_avg", "exp_avg_sq"} and a.state[p]["step"] == b.state[q]["step"]
        assert sum(t.nbytes for t in a.state[p].values()) == 8 * p.numel() + 4
    a.zero_grad()
    assert all(p.grad is None for p in ours)


def test_training_does_not_import_pytorchs_compiler(tmp_path):
    """72 MB and 2 seconds; torch.optim, a random start on "meta", a dispatch mode and autograd.grad would each bring it."""
    code = ("import sys, train; train.main(train.parse(sys.argv[1:]));"
            "sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules)")
    options = ["--steps", "3", "--amp", "--samples", "1", "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
