"""loss.py: value and gradients are those of the textbook cross-entropy, and the logits never exist as a whole.

A name such as nanoGPT#240 is a GitHub issue: the bug that the test looks for, in another project.
"""
import pytest
import torch
from conftest import make_folder
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
from files import weights
from techniques import loss

B, T, C, V = 3, 11, 16, 53


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def problem(bias=True, seed=0):
    torch.manual_seed(seed)
    hidden, head = torch.randn(B, T, C, requires_grad=True), nn.Linear(C, V, bias=bias)
    labels = torch.randint(0, V, (B, T))
    labels[torch.rand(B, T) < 0.4] = loss.IGNORE
    return hidden, head, labels


def textbook(hidden, head, labels):
    return F.cross_entropy(head(hidden).float().view(-1, head.out_features), labels.view(-1), reduction="sum")


def gradients(value, *tensors):
    return torch.autograd.grad(0.37 * value, tensors)  # scaled, as in the loop: a lost factor would be noticed


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000, None])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_textbook(chunk, bias):
    hidden, head, labels = problem(bias)
    wanted, value = textbook(hidden, head, labels), loss.sum_loss(hidden, head, labels, chunk)
    torch.testing.assert_close(value, wanted)
    assert value.dtype == torch.float32 and value.dim() == 0
    inputs = hidden, *head.parameters()
    for a, b in zip(gradients(value, *inputs), gradients(wanted, *inputs), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)


def test_frozen_head_gets_no_gradient():
    hidden, head, labels = problem()
    head.requires_grad_(False)
    value = loss.sum_loss(hidden, head, labels, 4)
    value.backward()
    assert head.weight.grad is None and head.bias.grad is None
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(textbook(hidden, head, labels), hidden)[0])


def test_frozen_hidden_trains_the_head():
    hidden, head, labels = problem()
    value, wanted = loss.sum_loss(hidden.detach(), head, labels, 4), textbook(hidden, head, labels)
    for a, b in zip(gradients(value, *head.parameters()), gradients(wanted, *head.parameters()), strict=True):
        torch.testing.assert_close(a, b)


def test_unlabelled_positions_get_zero_gradient():
    hidden, head, labels = problem()
    loss.sum_loss(hidden, head, labels).backward()
    assert not hidden.grad[labels == loss.IGNORE].any() and hidden.grad[labels != loss.IGNORE].any(-1).all()


def test_nothing_labelled():
    hidden, head, labels = problem()
    value = loss.sum_loss(hidden, head, torch.full_like(labels, loss.IGNORE))
    value.backward()
    assert value.item() == 0
    for t in (hidden, *head.parameters()):
        assert t.grad is not None and not t.grad.any()


def test_sum_of_micro_batches():
    """transformers#34191: a sum, not a mean, so micro-batches with unequal numbers of labels add up to the whole."""
    hidden, head, labels = problem()
    parts = sum(loss.sum_loss(h[None], head, y[None]) for h, y in zip(hidden, labels, strict=True))
    torch.testing.assert_close(parts, loss.sum_loss(hidden, head, labels))


def test_confident_and_wrong_does_not_overflow():
    hidden, head, labels = problem()
    value = loss.sum_loss(1000 * hidden, head, labels)
    torch.testing.assert_close(value, textbook(1000 * hidden, head, labels))
    assert value > 1000 and gradients(value, hidden)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_too", [False, True])
def test_autocast_is_close_to_float32(dtype, weights_too):
    hidden, head, labels = problem()
    wanted, inputs = loss.sum_loss(hidden, head, labels), (hidden, *head.parameters())
    exact = gradients(wanted, *inputs)
    if weights_too:
        head.to(dtype)
    with torch.autocast("cpu", dtype):
        value = loss.sum_loss(hidden, head, labels, 4)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(wanted.item(), rel=5e-3) and value != wanted
    for p, a, b in zip(inputs, gradients(value, *inputs), exact, strict=True):
        assert a.dtype == p.dtype
        assert (a.float() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("frozen", [True, False])
def test_full_logits_never_exist(on_device, frozen):
    n, t, v = 4, 32, 300
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(n, t, C, requires_grad=True), nn.Linear(C, v), torch.randint(0, v, (n, t))
    head.requires_grad_(not frozen)
    on_device(logits_chunk=16 * v)
    with Largest() as ours:
        loss.sum_loss(hidden, head, labels).backward()
    with Largest() as plain:
        textbook(hidden, head, labels).backward()
    assert 16 * v <= ours.numel < 20 * v  # a chunk, or the head's own weight
    assert plain.numel == n * t * v


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_training_step_never_makes_full_logits(tmp_path, on_device, family):
    model = lora.inject(weights.load(make_folder(tmp_path, family)), r=2)
    on_device(logits_chunk=8 * 4096)
    ids = torch.randint(0, 4096, (2, 40))
    with Largest() as largest:
        loss.sum_loss(model.hidden(ids), model.head, ids).backward()
    assert largest.numel < 2 * 40 * 4096
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [4, None])
def test_head_with_an_adapter_trains(chunk, bias):
    hidden, base, labels = problem(bias)
    head = lora.LoRALinear(base.requires_grad_(False), 3, 6)
    nn.init.normal_(head.lora_B[0])
    logits = head(hidden).view(-1, V)
    wanted, value = F.cross_entropy(logits, labels.view(-1), reduction="sum"), loss.sum_loss(hidden, head, labels, chunk)
    torch.testing.assert_close(value, wanted)
    inputs = hidden, head.lora_A, head.lora_B[0]
    for a, b in zip(gradients(value, *inputs), gradients(wanted, *inputs), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_young_adapter_counts_over_a_16_bit_head():
    """VersatIL#5, for the head: W + delta, rounded to bfloat16, would be W again, and the loss would not change."""
    torch.manual_seed(0)
    head = lora.LoRALinear(nn.Linear(64, 200, bias=False).requires_grad_(False).to(torch.bfloat16), 3, 6)
    hidden, labels = torch.randn(1, 1000, 64).bfloat16(), torch.randint(0, 200, (1, 1000))
    before = loss.sum_loss(hidden, head, labels)
    slope, = torch.autograd.grad(before, head.lora_B[0])
    with torch.no_grad():
        head.lora_B[0] -= 1e-4 * slope.sign()
    change = loss.sum_loss(hidden, head, labels) - before
    assert change.item() == pytest.approx(-1e-4 * slope.abs().sum().item(), rel=0.3)


def test_adapter_on_phis_head(tmp_path):
    """A head with a bias and an adapter: loss and gradients equal the textbook's."""
    model = lora.inject(weights.load(make_folder(tmp_path, "phi")), r=2, targets=["lm_head", "q_proj"])
    nn.init.normal_(model.lm_head.lora_B[0])
    ids = torch.randint(0, 4096, (2, 8), generator=torch.Generator().manual_seed(0))
    trainable = [p for p in model.parameters() if p.requires_grad]
    value = loss.sum_loss(model.hidden(ids), model.head, ids)
    wanted = F.cross_entropy(model(ids).view(-1, 4096), ids.view(-1), reduction="sum")
    torch.testing.assert_close(value, wanted)
    for a, b in zip(gradients(value, *trainable), gradients(wanted, *trainable), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    model.lm_head.base_layer.bias.data.zero_()
    assert abs(loss.sum_loss(model.hidden(ids), model.head, ids) - wanted) > 0.01, "the bias does nothing here"


def test_dropout_of_a_head_adapter():
    """nanoGPT#240: the head's dropout, too, is on in training and off in evaluation."""
    hidden, base, labels = problem()
    head = lora.LoRALinear(base, 3, 6, dropout=0.5)
    nn.init.normal_(head.lora_B[0])
    assert loss.sum_loss(hidden, head.eval(), labels) == loss.sum_loss(hidden, head, labels)
    assert loss.sum_loss(hidden, head.train(), labels) != loss.sum_loss(hidden, head, labels)


def test_adapter_on_a_tied_head_leaves_the_embedding(tmp_path):
    """The head's adapter gets a gradient; the embedding, which shares the head's matrix, gets none."""
    model = lora.inject(weights.load(make_folder(tmp_path, "gpt2")), r=2, targets=["lm_head"])
    ids = torch.randint(0, 4096, (1, 8))
    loss.sum_loss(model.hidden(ids), model.head, ids).backward()
    assert model.lm_head.lora_B[0].grad.any()
    assert model.wte.weight.grad is None and model.lm_head.base_layer.weight is model.wte.weight
