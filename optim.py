"""AdamW (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2): what the training step does with its gradients.

    m <- b1 m + (1 - b1) g            the gradient, smoothed
    v <- b2 v + (1 - b2) g^2          its square, smoothed
    p <- p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

m and v are two float32 numbers beside every trained parameter: 8 bytes. With the float32 parameter and its gradient a
trained parameter costs 16 bytes, a frozen one 2. LLaMA-7B: 6.74e9 * 16 = 108 GB in full; LoRA with r = 16 on Q and V
trains 8.4M of them: 134 MB.

torch.optim.AdamW computes the same, number for number. Making one imports PyTorch's compiler, though: 72 MB, 2 seconds.
"""
from collections import defaultdict

import torch

SLICE = 2**20  # numbers at a time: the temporary square root then takes 4 MB, and all of it stays in the CPU's cache


class AdamW:
    """The interface of torch.optim.Optimizer, as far as train.py and GradScaler use it.

    groups: [{"params": [...], "weight_decay": float}, ...]. state: {parameter: {"step", "exp_avg", "exp_avg_sq"}}, made
    by the parameter's first step.
    """

    def __init__(self, groups: list[dict], lr: float, betas=(0.9, 0.999), eps: float = 1e-8):
        self.param_groups = [{**g, "lr": lr, "betas": betas, "eps": eps} for g in groups]
        self.state: dict[torch.Tensor, dict] = defaultdict(dict)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                                         "exp_avg_sq": torch.zeros_like(p)}
                    self.update(p, **self.state[p], **{k: group[k] for k in ("lr", "betas", "eps", "weight_decay")})

    def update(self, p, step, exp_avg, exp_avg_sq, lr, betas, eps, weight_decay):
        step += 1
        t, (b1, b2) = step.item(), betas
        flat = (x.reshape(-1).split(SLICE) for x in (p, p.grad, exp_avg, exp_avg_sq))
        for w, g, m, v in zip(*flat, strict=True):
            w.mul_(1 - lr * weight_decay)
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            w.addcdiv_(m, v.sqrt().div_((1 - b2**t) ** 0.5).add_(eps), value=-lr / (1 - b1**t))

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
