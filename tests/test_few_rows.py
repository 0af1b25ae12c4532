"""Products of few rows: the same numbers as F.linear, whatever the machine is good at."""
import pytest
import torch
from conftest import make_folder
from torch import nn

import generate
from files import weights
from techniques import few_rows
from techniques.device import CPU, Device, detect, device_of, pretend

# (in, out): whether the matrix is stored by columns, and whether it can then be cut into blocks
SIZES = {(64, 640): (True, True), (50, 640): (True, False), (64, 64): (False, False), (128, 64): (False, False),
         (1056, 3200): (False, False)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("product_blocks", [False, True])
def test_every_number_of_rows(product_blocks, size, bias, monkeypatch):
    monkeypatch.setattr(few_rows, "MOST_SUMS", 2 * 15 * 200)  # so that the sums of 15 rows and 640 outputs need four pieces
    plain, fast = (nn.Linear(*size, bias) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    with pretend("cpu", Device("cpu", product_blocks=product_blocks, **CPU)), torch.inference_mode():
        few_rows.for_few_rows(nn.Sequential(fast))
        by_columns, in_blocks = SIZES[size]
        assert fast.in_blocks == (in_blocks and product_blocks)
        assert torch.equal(plain.weight, fast.weight) and fast.weight.is_contiguous() != by_columns
        for rows in range(1, 19):
            for shape in [(1, rows), (rows, 1)]:
                x = torch.randn(*shape, size[0])
                y = fast(x)
                assert y.shape == (*shape, size[1]) and torch.allclose(y, plain(x), atol=1e-5), shape


def test_blocks_are_used_where_they_are_faster(monkeypatch):
    seen = []
    layer, wide = nn.Linear(64, 640), nn.Linear(640, 64)
    monkeypatch.setattr(few_rows, "column_blocks", lambda x, W: seen.append(len(x)) or x @ W.t())  # `append` gives None
    with pretend("cpu", Device("cpu", product_blocks=True, **CPU)):
        few_rows.for_few_rows(nn.Sequential(layer, wide))
        for m in (wide, layer):
            with torch.no_grad():
                for rows in (1, 2, 3, 15, 16):
                    m(torch.randn(1, rows, m.in_features))
        assert seen == [2, 3, 15]
        layer(torch.randn(1, 8, 64)).sum().backward()  # with gradients it is F.linear
        assert len(seen) == 3 and layer.weight.grad.shape == (640, 64)


@pytest.mark.parametrize("capability, product_blocks", [("AVX512", True), ("AVX2", True), ("DEFAULT", False)])
def test_which_cpus_use_blocks(capability, product_blocks, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert detect(torch.device("cpu")).product_blocks == product_blocks


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_a_model(family, tmp_path):
    """Its bytes stay, a tied head stays tied, and eight replies are those of the plain model."""
    make_folder(tmp_path, family)
    models = [weights.load(tmp_path, bits=32, device="cpu").eval() for _ in range(2)]
    with pretend("cpu", Device("cpu", product_blocks=True, **CPU)):
        few_rows.for_few_rows(models[1])
        assert any(isinstance(m, few_rows.FewRows) for m in models[1].modules())
        plain, fast = (dict(m.named_parameters()) for m in models)
        assert plain.keys() == fast.keys() and all(torch.equal(plain[n], fast[n]) for n in plain)
        for n_rows in (1, 3, 8):
            logits = []
            for m in models:
                cache = generate.KVCache(m.config, 16, n_rows)
                generate.step(m, cache, list(range(n_rows)), [[5, 6, 7 + b] for b in range(n_rows)])
                logits.append(torch.cat(generate.step(m, cache, list(range(n_rows)), [[9]] * n_rows)))
                cache.release(0)  # outside of the inference mode in which it was filled
            assert torch.allclose(*logits, atol=1e-4)


def test_few_bits_are_left_alone(tmp_path):
    make_folder(tmp_path, "llama")
    model = weights.load(tmp_path, bits=16, device="cpu")
    few_rows.for_few_rows(model)
    assert not any(isinstance(m, few_rows.FewRows) for m in model.modules())


def test_training_may_write_into_a_room_that_generation_made():
    with pretend("cpu", Device("cpu", **CPU)):
        with torch.inference_mode():
            room = device_of("cpu").room(("a test",), 4, torch.empty)
        room.zero_()
        assert (room * torch.ones(4, requires_grad=True)).requires_grad
