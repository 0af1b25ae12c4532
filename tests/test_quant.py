"""quant.py compared with bitsandbytes: codes, layers, loading; and training over few bits.

Codes and scales must be equal bit for bit. Products may differ by their rounding.
"""
import copy
import json
import shutil
from functools import partial

import pytest
import torch
from conftest import LLAMA, held_dtype, make_folder
from runs import no_picture, run
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import data
import generate
import gpt2
import lora
import memory
from errors import UserError
from files import peft_files, weights, writing
from techniques import quant
from techniques.optim import AdamW

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])
BITS = pytest.mark.parametrize("bits", [8, 4])
WIDE = {"gpt2": {"n_embd": 64}, "llama": {"hidden_size": 64, "intermediate_size": 128}}
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes").functional


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each family in bfloat16; 64 divides its widths."""
    root = tmp_path_factory.mktemp("models")
    for family in WIDE:
        folder = make_folder(root / family, family, **WIDE[family])
        weights.save(weights.load(folder), folder, "bfloat16")
    return {family: root / family for family in WIDE}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(module) -> dict:
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def assert_same_state(a: dict, b: dict):
    assert a.keys() == b.keys()
    for n in a:
        assert a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]), n


def low_bit(model) -> dict:
    return {n: m for n, m in model.named_modules() if isinstance(m, quant.LowBitLinear)}


# ---------------------------------------------------------------------------------------------- codes

def outliers():
    x = rand(64, 256)
    x[0, 3], x[9, 9], x[63, 255] = 1e4, -3e3, 700
    return x


def zero_blocks():
    x = rand(64, 256)
    x[5, :64], x[63, -64:], x[:, 128:192] = 0, 0, 0
    return x


def ties():
    """Blocks with the largest magnitude 1, whose other values lie on and beside the borders between NF4's levels."""
    m = quant.midpoints(quant.NF4)
    near = torch.cat([m, m.nextafter(torch.ones(())), m.nextafter(-torch.ones(())), quant.NF4])
    x = near.repeat(34)[:32 * 63].view(32, 63)
    return torch.cat([torch.ones(32, 1), x], 1)


WEIGHTS = {  # in most, 256 does not divide the number of blocks; in many, 64 does not divide the columns
    **{"x".join(map(str, s)): partial(rand, *s) for s in ((1024, 256), (96, 32), (32, 56), (7, 64), (3, 192), (64, 1),
                                                           (100, 320), (5, 64 * 257), (130, 128), (1, 64))},
    "outliers": outliers, "zero blocks": zero_blocks, "ties": ties, "ties, scaled": lambda: ties() * (1 + rand(32, 1).abs()),
    "zeros": lambda: torch.zeros(16, 64), "constant": lambda: torch.full((16, 64), 0.3),
    "negative constant": lambda: torch.full((16, 64), -0.3), "-0.0": lambda: rand(16, 64).where(rand(16, 64) > 0, -0.0),
    "half steps of int8": lambda: torch.arange(-127.0, 127.5, 0.5)[None, :].repeat(64, 1),
    "few values": lambda: torch.randint(-3, 4, (64, 256), generator=torch.Generator().manual_seed(0)) / 3,
    "eleven decades": lambda: rand(256, 256) * torch.logspace(-8, 3, 256)[:, None],
    "tiny": lambda: rand(64, 64) * 1e-30, "huge": lambda: rand(64, 64) * 1e30, "small": lambda: rand(64, 64) * 1e-4,
    "large": lambda: rand(64, 64) * 1e4,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WEIGHTS)
def test_codes_and_scales_are_those_of_bitsandbytes(case, dtype, bnb):
    w = WEIGHTS[case]().to(dtype)
    if not torch.isfinite(w).all():
        assert case == "huge" and dtype == torch.float16
        return
    codes, scale = quant.quantize_int8(w)
    theirs, their_scale, _ = bnb.int8_vectorwise_quant(w)
    assert torch.equal(codes, theirs) and torch.equal(scale, their_scale) and scale.dtype == torch.float32
    if w.numel() % quant.BLOCK:
        return
    packed, absmax = quant.quantize_nf4(w)
    plain, plain_state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=False)
    assert torch.equal(packed, plain) and packed.dtype == torch.uint8
    assert torch.equal(absmax, plain_state.absmax) and absmax.dtype == torch.float32
    theirs, double = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert torch.equal(packed, theirs)
    absmax, nested, offset = quant.quantize_absmax(absmax)
    assert torch.equal(absmax, double.absmax) and absmax.dtype == torch.uint8
    assert torch.equal(nested, double.state2.absmax) and torch.equal(offset, double.offset)
    like = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer = quant.NF4Linear(like, packed, absmax, nested, offset)
    single = quant.NF4Linear(like, packed, plain_state.absmax)
    # As one long row: the AVX-512 kernel of bitsandbytes 0.50 starts a new block with every row. Where 64 does not divide
    # the rows, it dequantises with the scales of other blocks (randn(96, 32): a mean error of 0.28 instead of 0.07).
    for d in DTYPES:
        for ours, codes, s in ((layer, theirs, double), (single, plain, plain_state)):
            s.dtype, s.shape = d, torch.Size((1, w.numel()))
            got = ours.dequantize(d)
            assert got.dtype == d and torch.equal(got, bnb.dequantize_4bit(codes, s).view(w.shape)), d


def test_int8_rows_of_zeros():
    """Here they stay zeros. bitsandbytes divides by their scale, 0; which integer the NaN becomes depends on the machine."""
    w = rand(4, 64)
    w[2] = 0
    layer = quant.quantize(nn.Linear(64, 4, bias=False), w, 8)
    assert not layer.weight[2].any() and not layer.dequantize()[2].any() and layer.scale[2] == 0
    assert torch.isfinite(layer.dequantize()).all()


def test_int8_is_within_half_a_step():
    w = rand(200, 300)
    error = (quant.quantize(nn.Linear(300, 200), w, 8).dequantize() - w).abs()
    step = w.abs().amax(1, keepdim=True) / 127
    assert (error <= step * 0.50001).all() and error.max() > 0.49 * step.min()


def test_figures_of_the_docstring():
    """The mean error, and the bits a weight, counted from the tensors that exist."""
    w = rand(1024, 1024)
    layer = quant.quantize(nn.Linear(1024, 1024, bias=False), w, 4)
    assert (layer.dequantize() - w).abs().mean() == pytest.approx(0.0728, abs=0.0005)
    stored = sum(t.nbytes for t in layer.state_dict().values())
    assert 8 * (stored - 4) / w.numel() == 4 + 8 / 64 + 32 / (64 * 256)  # 4 bytes: the offset
    assert f"{8 * stored / w.numel():.3f}" == "4.127"
    layer = quant.quantize(nn.Linear(1024, 1024, bias=False), w, 8)
    assert sum(t.nbytes for t in layer.state_dict().values()) == 1024 * 1024 + 4 * 1024


@BITS
def test_chunks_do_not_matter(bits, monkeypatch, on_device):
    w = rand(40, 192)
    like = nn.Linear(192, 40, bias=False)
    whole = quant.quantize(like, w, bits)
    for chunk in (64, 128, 1024, 40 * 192 - 64):
        monkeypatch.setattr(quant, "CHUNK", chunk)
        layer = quant.quantize(like, w, bits)
        assert_same_state(state(layer), state(whole))
        for d in DTYPES:
            found = []
            for n in (chunk, 2**20):
                on_device(nf4_chunk=n)
                found.append(layer.dequantize(d))
            assert torch.equal(*found) and torch.equal(found[0], whole.dequantize(d))


# ---------------------------------------------------------------------------------------------- the layer

def make_layer(kind, bits, bias=True, seed=0, n_in=128, n_out=96):
    """A linear layer, its weight as (out, in), and the same layer in few bits."""
    like = nn.Linear(n_in, n_out, bias=bias) if kind == "Linear" else gpt2.Conv1D(n_in, n_out)
    with torch.no_grad():
        for i, p in enumerate(like.parameters()):
            p.copy_(rand(*p.shape, seed=seed + i) / n_in ** 0.5)
    w = like.weight.detach()
    return like, w.t() if kind == "Conv1D" else w, quant.quantize(like, w, bits)


KINDS = pytest.mark.parametrize("kind, bias", [("Linear", False), ("Linear", True), ("Conv1D", True)])
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@KINDS
@BITS
def test_forward_and_backward_are_those_of_the_dequantised_weight(bits, kind, bias, dtype):
    like, w, layer = make_layer(kind, bits, bias)
    W = layer.dequantize(torch.float64)
    assert (W - w).abs().mean() < (0.01 if bits == 8 else 0.1) * w.abs().mean()  # not transposed
    if dtype != torch.float32:
        like.to(dtype)
    layer.bias = like.bias
    b = like.bias.detach().double() if bias else torch.zeros(())
    x, dy = rand(2, 5, 128, seed=7).to(dtype).requires_grad_(), rand(2, 5, 96, seed=8).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.backward(dy)
    assert x.grad.dtype == dtype
    for got, a, m, c in ((y, x, W.t(), b), (x.grad, dy, W, torch.zeros(()))):
        a = a.detach().double()
        wanted, size = F.linear(a, m.t()) + c, a.abs() @ m.abs() + c.abs()
        error = (got.detach().double() - wanted).abs()
        assert (error <= (2 if dtype != torch.float32 else 8) * EPS[dtype] * size).all()  # three or four roundings
        assert error.mean() < (1 if dtype != torch.float32 else 4) * EPS[dtype] * wanted.abs().mean()


@BITS
def test_autocast_multiplies_in_16_bit_and_hands_back_the_inputs_gradient_in_its_type(bits):
    _, _, layer = make_layer("Linear", bits)
    x = rand(3, 128).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.abs().max() > 0


@BITS
def test_float16_neither_overflows_nor_vanishes_where_the_dequantised_product_does_not(bits):
    """A sum of 64 codes of 127, each times 100, is too large for float16. A scale of 1e-5, times a gradient of 1e-3, is too
    small."""
    like = nn.Linear(64, 64, bias=False)
    layer = quant.quantize(like, torch.full((64, 64), 0.01), bits)
    x = torch.full((1, 64), 100.0, dtype=torch.float16, requires_grad=True)
    torch.testing.assert_close(layer(x).float(), torch.full((1, 64), 64.0), rtol=5e-3, atol=0)
    layer = quant.quantize(like, torch.full((64, 64), 1e-3), bits)
    layer(x).backward(torch.full((1, 64), 1e-3, dtype=torch.float16))
    torch.testing.assert_close(x.grad.float(), torch.full((1, 64), 6.4e-5), rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@BITS
def test_nothing_dequantised_is_kept(bits, dtype, on_device):
    """Six layers of 131 kB (bfloat16) in a row. Between forward and backward only the last output is live, and the memory
    of one dequantised layer, which all six use. Autograd would keep six dequantised weights."""
    device = on_device(nf4_chunk=4096)  # a bound on the temporaries of any layer
    chain = nn.Sequential(*[make_layer("Linear", bits, False, i, 256, 256)[2] for i in range(6)])
    one, n_x = 256 * 256 * dtype.itemsize, 4 * 256 * dtype.itemsize
    x = rand(4, 256).to(dtype).requires_grad_()
    with memory.Ledger(chain) as ledger:
        chain(x).sum().backward()  # makes what is made only once
        assert [t.nbytes for name, t in device.rooms.items() if name[0] == "layer"] == [one]
        x.grad = None
        before = ledger.peak = sum(ledger.live.values())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("something is saved"), lambda t: t):
            y = chain(x)
        assert sum(ledger.live.values()) - before == n_x
        assert ledger.peak - before < 0.3 * one
        ledger.peak = 0
        y.backward(y.detach())
        assert sum(ledger.live.values()) - before <= 2 * n_x + 8
        assert ledger.peak - before < 0.3 * one


CASTS = {
    "to(bfloat16) twice": lambda m: m.to(torch.bfloat16).to(torch.bfloat16), "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(), "float": lambda m: m.float(), "half, float": lambda m: m.half().float(),
    "to(cpu) twice": lambda m: m.to("cpu").to("cpu"), "double": lambda m: m.double(), "deepcopy": copy.deepcopy,
    "deepcopy of half": lambda m: copy.deepcopy(m.half()), "eval, train": lambda m: m.eval().train(),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
@BITS
def test_casts_leave_codes_and_scales_alone(bits, inside, cast):
    layer = make_layer("Linear", bits)[2]
    module = nn.Sequential(layer) if inside else layer
    before, w = state(module), layer.dequantize()
    again = CASTS[cast](module)
    after = state(again)
    for n in before:
        if "bias" not in n:
            assert after[n].dtype == before[n].dtype and torch.equal(after[n], before[n]), n
    assert torch.equal((again[0] if inside else again).dequantize(), w)


@BITS
def test_every_tensor_moves(bits):
    """To "meta", the only other device that always exists. A tensor that stays behind would fail on a GPU."""
    layer = make_layer("Linear", bits)[2].to("meta", torch.bfloat16)
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert {t.device.type for t in tensors.values()} == {"meta"}
    assert {n: t.dtype for n, t in tensors.items()} == {
        "bias": torch.bfloat16, **({"weight": torch.int8, "scale": torch.float32} if bits == 8 else
                                   {"weight": torch.uint8, "absmax": torch.uint8, "nested_absmax": torch.float32,
                                    "offset": torch.float32})}


@BITS
def test_saved_loaded_and_moved_twice(bits, tmp_path):
    """bitsandbytes#1946: there a saved 4-bit layer lost its quantisation state."""
    one, other = (nn.Sequential(make_layer("Linear", bits, seed=s)[2]) for s in (0, 5))
    wanted = state(one)
    save_file(one.state_dict(), tmp_path / "layer.safetensors")
    assert not torch.equal(other[0].weight, one[0].weight)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    other.half().float().to("cpu").to("cpu")
    for n, t in state(other).items():
        if "bias" not in n:
            assert t.dtype == wanted[n].dtype and torch.equal(t, wanted[n]), n
    assert torch.equal(other[0].dequantize(), one[0].dequantize())


@BITS
def test_refuses_to_be_trained(bits, folders):
    layer = make_layer("Linear", bits)[2]
    assert not layer.weight.requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        layer.requires_grad_(True)
    model = lora.inject(weights.load(folders["llama"], bits=bits), r=2, targets="all")
    before = state(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.copy_(rand(*p.shape))
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trainable)
    optimizer = AdamW([{"params": list(trainable.values()), "weight_decay": 0.1}], lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS).float().logsumexp(-1).mean().backward()
    optimizer.step()
    after = state(model)
    assert_same_state({n: t for n, t in before.items() if "lora_" not in n},
                      {n: t for n, t in after.items() if "lora_" not in n})
    assert all(not torch.equal(before[n], after[n]) for n in trainable)


# ---------------------------------------------------------------------------------------------- weights.load

LAYERS = {"gpt2": {f"h.{i}.{m}" for i in range(3) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
          "llama": {f"model.layers.{i}.{m}_proj" for i in range(3) for m in
                    (*(f"self_attn.{p}" for p in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")}}
BAND = {("gpt2", 8): 0.015, ("gpt2", 4): 0.13, ("llama", 8): 0.05, ("llama", 4): 0.6}  # of the logits' spread; seen: half


@FAMILIES
@BITS
def test_load(family, bits, folders):
    """Only the blocks' linear layers are quantised, from the file's numbers. The logits stay close to those at 32 bits."""
    model, full = weights.load(folders[family], bits=bits), weights.load(folders[family])
    assert low_bit(model).keys() == LAYERS[family]
    assert {type(m) for m in low_bit(model).values()} == {quant.LAYERS[bits]}
    for n, p in model.named_parameters():
        owner = n.rpartition(".")[0]
        if n.endswith(".weight") and owner in LAYERS[family]:
            like = full.get_submodule(owner)
            assert_same_state(state(model.get_submodule(owner)),
                              {**state(quant.quantize(like, like.weight.detach(), bits)),
                               **({"bias": like.bias.detach().bfloat16().to(held_dtype(like.bias))}
                                  if like.bias is not None else {})})
        else:
            assert p.dtype == held_dtype(p) and torch.equal(p.bfloat16(), full.get_parameter(n).bfloat16()), n
    with torch.no_grad():
        wanted = full(IDS)
        error = (model(IDS).float() - wanted).std() / wanted.std()
    assert BAND[family, bits] / 4 < error < BAND[family, bits]


@FAMILIES
@BITS
def test_bytes(family, bits, folders):
    """As many parameters as at 32 bits, and exactly the stored bytes, which the ledger counts as weights."""
    model, full = weights.load(folders[family], bits=bits).requires_grad_(False), memory.count(weights.load(folders[family]))
    n = memory.count(model)
    assert n["total"] == full["total"]
    layers = [m.n_weights for m in low_bit(model).values()]
    rows = sum(m.out_features for m in low_bit(model).values())
    vectors = sum(p.numel() * (held_dtype(p).itemsize - 2) for p in model.parameters() if p.dim() < 2)
    by_hand = 2 * (full["total"] - sum(layers)) + vectors + (
        sum(layers) + 4 * rows if bits == 8 else sum(k // 2 + k // 64 + 4 * -(-k // 64 // 256) + 4 for k in layers))
    assert n["bytes"] == by_hand
    with memory.Ledger(model) as ledger:
        assert ledger.live == {**dict.fromkeys(memory.CATEGORIES, 0), "weights": by_hand}
    lora.inject(model, r=2)
    with memory.Ledger(model) as ledger:
        assert ledger.live["weights"] == by_hand and ledger.live["adapters"] > 0
    assert memory.count(model)["total"] == full["total"] + memory.count(model)["trainable"]


@FAMILIES
@BITS
@pytest.mark.parametrize("first", ["bias", "weight"])
def test_shards(family, bits, first, folders, tmp_path):
    """One of two files holds the weights, the other the biases of the same layers, in both orders."""
    shutil.copytree(folders[family], tmp_path / "shards")
    tensors = load_file(folders[family] / "model.safetensors")
    (tmp_path / "shards" / "model.safetensors").unlink()
    files = {"1.safetensors": [k for k in tensors if k.endswith(first)],
             "2.safetensors": [k for k in tensors if not k.endswith(first)]}
    for file, names in files.items():
        save_file({k: tensors[k] for k in names}, tmp_path / "shards" / file, {"format": "pt"})
    index = {"weight_map": {k: file for file, names in files.items() for k in names}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_state(state(weights.load(tmp_path / "shards", bits=bits)), state(weights.load(folders[family], bits=bits)))


class Real(memory.Ledger):
    """A Ledger that leaves out tensors on "meta", which have a size and no storage."""

    def follow(self, tensor, category="activations"):
        if tensor.device.type != "meta":
            super().follow(tensor, category)


@BITS
def test_loading_holds_one_tensor_beside_the_quantised_model(bits, tmp_path, monkeypatch):
    """The layers have 4.2 M weights: 8.4 MB in 16 bit, 2.2 MB in 4. The largest tensor of the file has 1 MB in float32."""
    monkeypatch.setattr(quant, "CHUNK", 8192)  # a bound on the temporaries of any layer
    folder = tmp_path / "m"
    folder.mkdir()
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 64}
    (folder / "config.json").write_text(json.dumps(config))
    full = weights.from_scratch(folder)
    writing.write_tensors(folder / "model.safetensors", dict(full.named_parameters()))
    largest = max(p.nbytes for p in full.parameters())
    layers = sum(m.weight.numel() for n, m in full.named_modules() if lora.is_linear(m) and n != "lm_head")
    del full
    with Real(nn.Module()) as ledger:
        model = weights.load(folder, bits=bits)
    stored = memory.count(model)["bytes"]
    assert stored <= sum(ledger.live.values()) < stored + 2000  # the tables of NF4 and of the nested codes
    assert stored + largest < ledger.peak < stored + 2.1 * largest
    assert stored + 2.1 * largest < 2 * layers, "the bound says nothing about a model held in 16 bit"


def put(folder, name, value, index=0):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[index] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@FAMILIES
@BITS
def test_a_weight_that_is_not_finite_is_named(bits, family, value, folders, tmp_path):
    folder = shutil.copytree(folders[family], tmp_path / "m")
    name = "transformer.h.1.mlp.c_fc.weight" if family == "gpt2" else "model.layers.1.mlp.up_proj.weight"
    put(folder, name, value, index=777)
    with pytest.raises(UserError, match=f"/model.safetensors: tensor {name}: a weight is not finite"):
        weights.load(folder, bits=bits)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
@BITS
def test_a_run_stops_before_it_begins_at_a_damaged_16_bit_weight(bits, name, folders, tmp_path, data_file):
    """The loader names it, also where it is not quantised."""
    folder = shutil.copytree(folders["llama"], tmp_path / "m")
    put(folder, name, float("nan"), index=slice(None, 60))
    with pytest.raises(UserError, match=f"/model.safetensors: tensor {name}: a weight is not finite"):
        run(tmp_path / "out", folder, data_file, bits=bits, amp=True, steps=1)


# ---------------------------------------------------------------------------------------------- training

@BITS
def test_a_run_with_everything(bits, folders, tmp_path, data_file, monkeypatch):
    """With dropout, recomputed layers and packing: config.json holds the bits, and the loss falls."""
    no_picture(monkeypatch)
    options = dict(amp=True, steps=6, lora_r=4, lora_dropout=0.1, lora_targets="all", ckpt_every=2, pack=True, lr=2e-2)
    got = run(tmp_path / "a", folders["gpt2"], data_file, bits=bits, **options)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["options"]["bits"] == bits
    assert got[-1]["loss"] < got[0]["loss"] - 0.3
    model = peft_files.load(weights.load(folders["gpt2"], bits=bits), tmp_path / "a" / "adapter")
    assert all(m.delta().any() for m in lora.adapters(model).values())


@BITS
def test_generate(bits, folders, capsys):
    """The command's reply is the model's argmax, token by token."""
    generate.main(["--model", str(folders["llama"]), "--bits", str(bits), "--raw", "--prompt", "Say", "--temperature", "0",
                   "--max-new-tokens", "8", "--device", "cpu"])
    said = capsys.readouterr().out
    model, tokenizer = weights.load(folders["llama"], bits=bits), data.load_tokenizer(str(folders["llama"]))
    ids = tokenizer.encode("Say")
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert said.strip() == tokenizer.decode(ids).strip()
