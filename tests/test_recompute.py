"""recompute.py: what a recomputed layer keeps, what it computes again, and that nothing else changes."""
import pytest
import torch
from conftest import make_folder
from torch import nn
from torch.nn import functional as F

import lora
import memory
from files import weights
from techniques import loss, recompute

FAMILIES = ("gpt2", "llama")
B, T, C = 4, 64, 32  # C: conftest's n_embd


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {f: make_folder(tmp_path_factory.mktemp(f) / f, f) for f in FAMILIES}


def build(folder, every=0, offload=False, full=False, amp=False):
    model = weights.load(folder, bits=16 if amp and not full else 32)
    if full:
        model.requires_grad_(True)
    else:
        lora.inject(model, r=4, dropout=0.2, targets="all")
        rng = torch.Generator().manual_seed(5)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.2, generator=rng)
    model.train()
    model.ckpt_every, model.ckpt_offload = every, offload
    return model


def backward(model, amp=False, segments=None, times=1):
    ids = torch.randint(0, 4096, (1 if segments else B, T), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    for _ in range(times):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            total = loss.sum_loss(model.hidden(ids, segments=segments), model.head, ids)
        total.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


class OtherMemory:
    """Stands in for the host of a GPU: to_host turns a tensor into bytes outside PyTorch, and to_device brings it back."""

    def __init__(self, monkeypatch):
        self.bytes = self.out = self.back = 0
        monkeypatch.setattr(recompute, "to_host", self.to_host)
        monkeypatch.setattr(recompute, "to_device", self.to_device)

    def to_host(self, x):
        self.out += 1
        self.bytes += x.nbytes
        return x.dtype, x.clone().view(torch.uint8).numpy().copy()

    def to_device(self, x, device):
        if isinstance(x, torch.Tensor):
            return x  # not offloaded
        self.back += 1
        return torch.tensor(x[1]).view(x[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"full": True}, {"amp": True}, {"amp": True, "full": True}],
                         ids=["lora", "full", "lora-amp", "full-amp"])
def test_gradients_are_equal_bit_for_bit(family, options, folders, monkeypatch):
    """With dropout, an x that needs no gradient (LoRA), padded and packed, over two backward passes that add up."""
    other = OtherMemory(monkeypatch)
    for segments in (None, [30, 34]):
        wanted, state = backward(build(folders[family], **options), "amp" in options, segments, 2), torch.get_rng_state()
        assert all(g is not None for g in wanted) and sum(g.any() for g in wanted) > len(wanted) / 2
        for every, offload in ((1, False), (2, False), (3, False), (1, True), (2, True)):
            other.out = other.back = 0
            got = backward(build(folders[family], every, offload, **options), "amp" in options, segments, 2)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), (segments, every, offload)
            assert torch.equal(torch.get_rng_state(), state)  # as after a run without recomputation
            assert other.out == other.back == offload * 2 * (3 // every)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_its_input_and_offloaded_nothing(family, amp, folders, monkeypatch, on_device):
    """Between forward and backward a recomputed layer keeps 2C bytes a token (4C in float32). Offloaded: none."""
    on_device(products=torch.bfloat16)

    def kept(every, offload=False):
        model, ids = build(folders[family], every, offload, amp=amp), torch.zeros(B, T, dtype=torch.long)
        with memory.Ledger(model) as ledger, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = model.hidden(ids)
            live = ledger.live["activations"] + ledger.live["temporaries"]  # before backward nothing tells them apart
        y.sum().backward()
        return live

    x = B * T * C * (2 if amp else 4)
    alone, other = kept(1), OtherMemory(monkeypatch)
    assert alone - kept(1, offload=True) == 3 * x == other.bytes
    assert kept(0) > 3 * 10 * x > alone


class Layer(nn.Module):
    """Two matrices and dropout. It counts its runs, those that reach the end, and records the type of its products."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(8, 8, bias=False) for _ in range(2))
        self.runs, self.ended, self.types = 0, 0, []

    def forward(self, x):
        self.runs += 1
        h = F.dropout(self.a(x), 0.5, self.training).relu()
        self.types.append(h.dtype)
        y = self.b(h)
        self.ended += 1
        return x + y


def test_the_second_run_ends_before_the_last_product_and_returns_the_random_state():
    layer, x = Layer(), torch.randn(4, 8)
    y = recompute.recompute(layer, x)
    torch.rand(3)  # forward goes on
    state = torch.get_rng_state()
    y.sum().backward()
    assert (layer.runs, layer.ended) == (2, 1) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("forward,backward", [(True, False), (False, True)])
def test_the_second_run_multiplies_in_the_types_of_the_first(forward, backward):
    layer, x = Layer(), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        y = recompute.recompute(layer, x)
    with torch.autocast("cpu", torch.float16, enabled=backward):
        y.sum().backward()
    assert layer.types == [torch.bfloat16 if forward else torch.float32] * 2


def test_each_weights_hook_is_called_once_with_its_gradient():
    layer, calls = Layer(), []
    for p in layer.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append((p, p.grad.clone())))
    for n in (1, 2):
        recompute.recompute(layer, torch.randn(4, 8)).sum().backward()
        assert len(calls) == 2 * n and all(g.any() for _, g in calls)
        layer.zero_grad()


def test_a_weight_may_change_in_its_hook():
    """An optimizer may run in backward: a weight changes as soon as its gradient exists, and layers below are unaffected."""
    def descend(p):
        p.data.sub_(p.grad)

    grads = []
    for every in (0, 1):
        torch.manual_seed(0)
        layers, x = nn.ModuleList(Layer() for _ in range(3)), torch.randn(4, 8)
        for p in layers.parameters():
            p.register_post_accumulate_grad_hook(descend)
        for layer in layers:
            x = recompute.recompute(layer, x) if every else layer(x)
        x.sum().backward()
        grads.append([p.grad for p in layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_retained_graph_is_passed_twice():
    layer, x = Layer(), torch.randn(4, 8, requires_grad=True)
    y = recompute.recompute(layer, x).sum()
    y.backward(retain_graph=True)
    once = [p.grad.clone() for p in (x, *layer.parameters())]
    y.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip((x, *layer.parameters()), once, strict=True))


def test_what_was_made_again_is_gone_after_backward():
    layer, x = Layer(), torch.randn(4, 8)
    with memory.Ledger(layer) as ledger:
        y = recompute.recompute(layer, x).sum()
        before = sum(ledger.live.values())
        y.backward(retain_graph=True)  # so that the graph is not freed
        kept = ledger.live["activations"]  # of the first run; all that is new is the weights' gradients
        assert sum(ledger.live.values()) == before + ledger.live["gradients"] and ledger.live["gradients"] == 2 * 8 * 8 * 4
    assert kept < ledger.at_peak["activations"]


def test_where_nothing_needs_a_gradient_nothing_is_computed_twice():
    layer, x = Layer().requires_grad_(False), torch.randn(4, 8)
    assert not recompute.recompute(layer, x).requires_grad and layer.runs == 1
    y = recompute.recompute(layer, x.requires_grad_())  # frozen weights, a gradient only passes through
    y.sum().backward()
    assert x.grad.any() and layer.runs == 3


def test_a_layer_that_changed_in_between_is_an_error():
    layer = Layer()
    y = recompute.recompute(layer, torch.randn(4, 8))
    layer.eval()  # no dropout mask is saved now
    with pytest.raises(RuntimeError, match="Layer saved other tensors"):
        y.sum().backward()


def test_on_a_cpu_offload_moves_nothing():
    x = torch.randn(4)
    assert recompute.to_host(x) is x and recompute.to_device(x, x.device) is x


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and streams need a CUDA device")
def test_on_a_card_the_inputs_wait_in_host_memory(folders):
    x = torch.randn(1000, device="cuda")
    host = recompute.to_host(x)
    back = recompute.to_device(host, x.device)
    assert host.is_pinned() and back.device == x.device and torch.equal(back, x)
    grads, peaks = [], []
    for offload in (False, True):
        torch.manual_seed(1)
        layers, x = [nn.Linear(256, 256).cuda() for _ in range(20)], torch.randn(4096, 256, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        for layer in layers:
            x = recompute.recompute(layer, x, offload=offload)
        x.sum().backward()
        grads.append([p.grad for layer in layers for p in layer.parameters()])
        peaks.append(torch.cuda.max_memory_allocated())
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert peaks[1] < peaks[0] - 10 * 4096 * 256 * 4
