"""gpt2.py, llama.py and phi.py: the logits of transformers, for every kind of batch and with recomputed layers.

A name such as trl#805 is a GitHub issue: the bug that the test looks for, in another project.
"""
import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import randomise

import generate
import gpt2
import llama
import lora
import memory
import phi
from errors import UserError
from files import weights
from techniques import attention, loss

REFERENCE = Path(__file__).parent / "reference"
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
LLAMA = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
PHI = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
       "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 48, "rope_theta": 500000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
GPT2_CASES = {
    "plain": {}, "n_inner": {"n_inner": 40}, "gelu": {"activation_function": "gelu"}, "one head": {"n_head": 1},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"}, "eight heads": {"n_head": 8},
    "untied": {"tie_word_embeddings": False}, "eps": {"layer_norm_epsilon": 0.1},
}
LLAMA_CASES = {
    "mha": {"num_key_value_heads": 4}, "gqa": {}, "mqa": {"num_key_value_heads": 1}, "head_dim": {"head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "eps": {"rms_norm_eps": 0.1},
    "llama3": {"rope_parameters": LLAMA3, "head_dim": 16}, "linear": {"rope_parameters": LINEAR},
}
PHI_CASES = {
    "mha": {}, "gqa": {"num_key_value_heads": 2}, "mqa": {"num_key_value_heads": 1}, "head_dim": {"head_dim": 16},
    "two fifths": {"hidden_size": 80, "partial_rotary_factor": 0.4}, "whole head": {"partial_rotary_factor": 1.0},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.25}},
    "tied": {"tie_word_embeddings": True}, "eps": {"layer_norm_eps": 0.1},
}
CASES = [pytest.param(f, o, id=f"{f}-{n}")
         for f, c in (("gpt2", GPT2_CASES), ("llama", LLAMA_CASES), ("phi", PHI_CASES)) for n, o in c.items()]
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])


def build(family, **overrides):
    """One of our models with every parameter random."""
    if family == "gpt2":
        return randomise(gpt2.GPT2(gpt2.Config.from_json({**GPT2, **overrides})))
    if family == "phi":
        return randomise(phi.Phi(phi.Config.from_json({**PHI, "num_key_value_heads": 2, **overrides})))
    return randomise(llama.Llama(llama.Config.from_json({**LLAMA, "rope_parameters": LLAMA3, "head_dim": 16, **overrides})))


def token_ids(*shape, seed=1):
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def reference(folder, family, **overrides):
    """Logits of transformers' model with every parameter random; the model is saved to `folder`."""
    transformers = pytest.importorskip("transformers")
    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **overrides}))
    elif family == "phi":
        model = transformers.PhiForCausalLM(transformers.PhiConfig(**{**PHI, **overrides}))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **overrides}))
    shard = {"max_shard_size": "20KB"} if folder.name == "shards" else {}
    randomise(model.eval()).save_pretrained(folder, **shard)
    with torch.no_grad():
        logits = model(token_ids(2, 48)).logits
    assert logits.std() > 0.5
    return logits


@torch.no_grad()
def error(folder, expected):
    """Largest difference of logits, relative to their spread."""
    return ((weights.load(folder)(token_ids(2, 48)) - expected).abs().max() / expected.std()).item()


# ---------------------------------------------------------------------------------------------- parity

@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_logits_equal_transformers(tmp_path, family, overrides):
    assert error(tmp_path, reference(tmp_path, family, **overrides)) <= 1e-5


@FAMILIES
def test_gradients_equal_transformers(tmp_path, family):
    """The gradient of every parameter, through the backward passes that are written by hand."""
    transformers = pytest.importorskip("transformers")
    reference(tmp_path, family)
    ours, theirs = weights.load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = token_ids(2, 48)
    for model in (ours, theirs.eval()):
        logits = model(ids) if model is ours else model(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    wanted = {n.removeprefix(ours.prefix): p.grad for n, p in theirs.named_parameters()}
    for n, p in ours.named_parameters():
        assert (p.grad - wanted[n]).abs().max() <= 1e-4 * wanted[n].abs().max() + 1e-5, n


@FAMILIES
def test_sharded_checkpoint(tmp_path, family):
    expected = reference(tmp_path / "shards", family)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert error(tmp_path / "shards", expected) <= 1e-5


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR], ids=["llama3", "linear"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_old_spelling_of_rope_scaling(tmp_path, rope, kind):
    expected = reference(tmp_path, "llama", rope_parameters=rope)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    old = config.pop("rope_parameters")
    assert old["rope_type"] == rope["rope_type"]
    config["rope_theta"] = old.pop("rope_theta")
    config["rope_scaling"] = {kind: old.pop("rope_type"), **old}
    path.write_text(json.dumps(config))
    assert error(tmp_path, expected) <= 1e-5
    del config["rope_scaling"]
    path.write_text(json.dumps(config))
    assert error(tmp_path, expected) > 0.01, "the scaling has no effect, so this test proves nothing"


@pytest.mark.parametrize("spelling", ["phi-2's", "factor in rope_scaling", "no factor"])
def test_spellings_of_phis_rotary_factor(tmp_path, spelling):
    """Phi-2's config.json has the factor at its top; newer files, by save_pretrained, in rope_parameters. Default: 0.5."""
    factor = 0.5 if spelling == "no factor" else 0.75
    new = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": factor}
    expected = reference(tmp_path, "phi", rope_parameters=new)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("rope_parameters") == new

    def error_with(**spelled):
        (tmp_path / "config.json").write_text(json.dumps({**config, **spelled}))
        return error(tmp_path, expected)

    old = {"rope_theta": 5000.0, **{
        "phi-2's": {"rope_scaling": None, "partial_rotary_factor": factor},
        "factor in rope_scaling": {"rope_scaling": {"type": "default", "partial_rotary_factor": factor}},
        "no factor": {}}[spelling]}
    assert error_with(**old) <= 1e-5
    assert error_with(rope_parameters=new, partial_rotary_factor=0.25, rope_theta=1.0) <= 1e-5  # rope_parameters go first
    assert error_with(**{**old, "rope_scaling": None, "partial_rotary_factor": 0.25}) > 0.01
    assert error_with(**{**old, "rope_theta": 500.0}) > 0.01


def test_parity_notices_another_gelu(tmp_path, monkeypatch):
    expected = reference(tmp_path, "gpt2")
    monkeypatch.setitem(gpt2.ACTIVATIONS, "gelu_new", "none")
    assert error(tmp_path, expected) > 5e-5


def test_parity_notices_interleaved_rope(tmp_path, monkeypatch):
    def interleaved(x, cos, sin, way):  # Meta's original pairing
        a, b, cos, sin = x[..., ::2], x[..., 1::2], cos.chunk(2, -1)[1], sin.chunk(2, -1)[1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    expected = reference(tmp_path, "llama")
    monkeypatch.setattr(llama, "turn", interleaved)
    assert error(tmp_path, expected) > 0.1


@pytest.mark.parametrize("rotary_dim", [2, 8])
def test_parity_notices_another_rotary_dim(tmp_path, monkeypatch, rotary_dim):
    expected, read = reference(tmp_path, "phi"), phi.Config.from_json
    monkeypatch.setattr(phi.Config, "from_json", lambda c: dataclasses.replace(read(c), rotary_dim=rotary_dim))
    assert error(tmp_path, expected) > 0.01


def test_parity_notices_a_serial_block(tmp_path, monkeypatch):
    def serial(self, x, *args):
        x = x + self.self_attn(self.input_layernorm(x), *args)
        return x + self.mlp(self.input_layernorm(x))

    expected = reference(tmp_path, "phi")
    monkeypatch.setattr(phi.Block, "forward", serial)
    assert error(tmp_path, expected) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama3", "phi"])
def test_frozen_reference_logits(name):
    """Equal logits where transformers is not installed: reference/make.py wrote the file with it."""
    ref = json.loads((REFERENCE / f"{name}.json").read_text())
    config, model_class, _ = weights.FAMILIES[ref["config"]["model_type"]]
    model = randomise(model_class(config.from_json(ref["config"])), ref["seed"])
    with torch.no_grad():
        logits = model(torch.tensor([ref["ids"]]))[0]
    expected = torch.tensor(ref["logits"])
    assert expected.std() > 0.5
    assert (logits[ref["positions"]][:, ref["tokens"]] - expected).abs().max() <= 1e-5 * expected.std()


# ---------------------------------------------------------------------------------------------- batches and caches

@FAMILIES
def test_padded_batch_equals_single_examples(family):
    """nnsight#672: padding must change neither positions nor logits."""
    model, lengths = build(family), [5, 1, 17, 11]
    ids = token_ids(4, 17)
    for row, n in zip(ids, lengths, strict=True):
        row[n:] = 0
    with torch.no_grad():
        batch = model(ids)
        for i, n in enumerate(lengths):
            torch.testing.assert_close(batch[i, :n], model(ids[i:i + 1, :n])[0], rtol=0, atol=2e-5)


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_padding_in_16_bit_gives_no_nan(family, dtype):
    """pytorch#103749: attention rows that see no key become nan."""
    model, ids = build(family).to(dtype), token_ids(3, 16)
    labels = ids.clone()
    for i, n in enumerate([1, 7, 16]):
        ids[i, n:], labels[i, n:] = 0, loss.IGNORE
    hidden = model.hidden(ids)
    assert model.head(hidden).isfinite().all()
    loss.sum_loss(hidden, model.head, labels).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# ---------------------------------------------------------------------------------------------- Phi in float16

# One number of q times one of k is 73,728 for every pair, so softmax does not see it, and the gradient of q's number is 0.
# PyTorch's kernel computes this 0 as k's number / sqrt(8) * (1 - sum of p) * what each row of y adds to the loss. It keeps
# one float a row for backward, log sum exp, near 73,728 / sqrt(8) = 26,067, where float32 has steps of 2^-9: the sum of p is
# 1 only to 2^-9, and its rounding is another one on each kind of CPU. So k's number is small and q's is large. With 512 and
# 512 this "0" reached 4 times the largest true gradient of lora_B (seeds 0-11), with 16384 and 4.5 it is 0.011 of it.
LARGE_Q, LARGE_K = 16384.0, 4.5


def phi_of_large_qk():
    """Phi with such a number in q and k, which does not turn, for every token, and adapters; all weights of 16 bit."""
    torch.manual_seed(1)  # of lora_A. Seeds 0-19: logits differ by up to 0.0032 of their spread, gradients by 0.006 to 0.025
    model, rng = lora.inject(build("phi"), r=2, targets="all"), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in lora.adapters(model).values():
            adapter.lora_B[0].normal_(0, 0.05, generator=rng)
        for block in model.blocks:
            for layer, large in ((block.self_attn.q_proj, LARGE_Q), (block.self_attn.k_proj, LARGE_K)):
                for parameter, value in ((layer.base_layer.weight, 0), (layer.base_layer.bias, large), (layer.lora_B[0], 0)):
                    parameter.view(-1, 8, *parameter.shape[1:])[:, -1] = value
        for p in model.parameters():
            p.copy_(p.half())
    return model


def logits_and_gradients(model, ids, amp):
    """With float16's autocast or without; the gradients are those of the adapters, those of k's large number apart."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", torch.float16, enabled=amp):
        hidden = model.hidden(ids)
        value = loss.sum_loss(hidden, model.head, ids)
        with torch.no_grad():
            logits = model.head(hidden).float()
    gradients = []
    for name, g in zip(trainable, torch.autograd.grad(value, list(trainable.values())), strict=True):
        if "k_proj.lora_B" in name:  # k's large number has q's large number as a factor: 2,500 to 10,000 times the others
            g = g.view(-1, 8, 2)
            gradients += [g[:, :-1], g[:, -1]]
        else:
            gradients.append(g)
    return logits, gradients


def true_logits_and_gradients(model, ids):
    """In float64, with the textbook's attention: float32 has an error of its own here, another one on each kind of CPU."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(phi, "attend", lambda q, k, v, *rest, float32: textbook_attention(q.double(), k.double(), v.double()))
        return logits_and_gradients(copy.deepcopy(model).double(), ids, False)


def textbook_attention(q, k, v, mask=None, is_causal=True, enable_gqa=True):
    """softmax(q k^T / sqrt(D)) v, each product in the type of its inputs, as in transformers#28163."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("held", ["16 bit", "32 bit"])
@pytest.mark.parametrize("kernel", ["PyTorch's", "textbook"])
@pytest.mark.parametrize("ckpt_every", [0, 1])
def test_phis_qk_beyond_float16(monkeypatch, held, kernel, ckpt_every):
    """transformers#28163: |q . k| is above float16's 65,504. Forward and backward stay finite with either kernel."""
    model, ids = phi_of_large_qk(), token_ids(2, 12)
    logits, gradients = true_logits_and_gradients(model, ids)
    assert logits.std() > 0.5 and all(g.any() for g in gradients)
    model.ckpt_every = ckpt_every
    if kernel == "textbook":
        monkeypatch.setattr(attention, "scaled_dot_product_attention", textbook_attention)
    if held == "16 bit":
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.half()

    def check():
        half, half_gradients = logits_and_gradients(model, ids, True)
        assert half.isfinite().all() and all(g.isfinite().all() for g in half_gradients)
        assert (half - logits).abs().max() < 0.01 * logits.std()
        for a, b in zip(half_gradients, gradients, strict=True):
            assert (a - b).abs().max() < 0.03 * b.abs().max()
        cache = generate.KVCache(model.config, 12)
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            parts = [model(ids[:, :8], cache=cache)] + [model(ids[:, t:t + 1], cache=cache) for t in range(8, 12)]
        assert cache.k[0].dtype == torch.float16
        assert (torch.cat(parts, 1).float() - logits).abs().max() < 0.01 * logits.std()

    check()
    if kernel == "textbook":  # without the cast it overflows, so the test above does prove something
        monkeypatch.setattr(phi, "attend", lambda *args, float32: attention.attend(*args))
        with pytest.raises(AssertionError, match="isfinite"):
            check()


@pytest.mark.parametrize("segments", [None, [5, 1, 6]])
def test_attention_in_float32_keeps_16_bit_for_backward(segments):
    rng, kept = torch.Generator().manual_seed(0), []
    q, k, v = (torch.randn(1, heads, 12, 8, generator=rng).half().requires_grad_() for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = attention.attend(q, k, v, segments, float32=True)
    assert sum(x.nbytes for x in kept) == 2 * (q.numel() + k.numel() + v.numel())
    wanted = attention.attend(q.float(), k.float(), v.float(), segments)
    assert y.dtype == torch.float16 and torch.equal(y, wanted.half())
    for a, b in zip(torch.autograd.grad(y.float().square().sum(), (q, k, v)),
                    torch.autograd.grad(wanted.half().float().square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(attention.attend(q, k, v, segments, float32=True), y)


# ---------------------------------------------------------------------------------------------- norms under autocast

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", ["16 bit", "32 bit"])
def test_rms_norm_is_float32_under_autocast(dtype, weight_dtype):
    """A sum of squares in 16 bit would have 8 or 11 bits of precision, and 64 numbers around 100 would overflow float16."""
    rng = torch.Generator().manual_seed(0)
    x = (100 * torch.randn(2, 9, 64, generator=rng)).to(dtype)
    norm = llama.RMSNorm(64, 1e-5)
    norm.weight.data = 2.0 ** torch.randint(-3, 4, (64,), generator=rng)  # a product with a power of two is exact
    grad = torch.randn(2, 9, 64, generator=rng).to(dtype)

    def output_and_gradient(x):
        x = x.clone().requires_grad_()
        y = norm(x)
        y.backward(grad.to(x.dtype))
        return y.detach(), x.grad

    wanted = [t.to(dtype) for t in output_and_gradient(x.float())]
    if weight_dtype == "16 bit":
        norm.to(dtype)
    with torch.autocast("cpu", dtype):
        got = output_and_gradient(x)
    assert all(t.isfinite().all() and t.any() for t in wanted)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("family", ["gpt2", "phi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layer_norm_is_outside_autocast(family, dtype, monkeypatch):
    """CUDA's autocast would make and keep a float32 copy. A CPU's does not, so the test sees only whether it is on."""
    model, seen, layer_norm = build(family).to(dtype), [], torch.nn.functional.layer_norm

    def recorded(x, *args):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return layer_norm(x, *args)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", recorded)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(token_ids(1, 5)).dtype == dtype
    assert seen == [(dtype, False)] * (7 if family == "gpt2" else 4)


# ---------------------------------------------------------------------------------------------- tables, caches, packing

@pytest.mark.parametrize("rope", [LLAMA3 | {"original_max_position_embeddings": 8192}, {"rope_theta": 10000.0}],
                         ids=["llama3", "plain"])
def test_rope_tables_stay_float32(rope, monkeypatch):
    """gpt-neox#1003: 16-bit tables are wrong at far positions."""
    seen, tables = [], llama.rope_tables

    def recorded(*args):
        seen.append(tables(*args))
        return seen[-1]

    monkeypatch.setattr(llama, "rope_tables", recorded)
    last = 16383
    model = build("llama", rope_parameters=rope, max_position_embeddings=last + 1).to(torch.bfloat16)
    positions = torch.tensor([0, 1, last])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.hidden(token_ids(1, 3), positions=positions)
    D, factor, old = 16, rope.get("factor"), rope.get("original_max_position_embeddings")
    for i in range(D // 2):
        f = rope["rope_theta"] ** (-2 * i / D)
        if factor:
            wavelength = 2 * math.pi / f
            smooth = (old / wavelength - 1) / (4 - 1)
            f *= min(1.0, max(0.0, smooth)) * (1 - 1 / factor) + 1 / factor
        for table, fn in zip(seen[0], (math.cos, math.sin), strict=True):
            assert table.dtype == torch.float32
            assert table.reshape(3, -1)[2, D // 2 + i].item() == pytest.approx(fn(last * f), abs=2e-3)
    assert all(map(torch.equal, seen[0], tables(model.config, positions)))


@FAMILIES
def test_kv_cache_equals_full_forward(family):
    model, ids = build(family), token_ids(2, 21)
    cache = generate.KVCache(model.config, 21)
    with torch.no_grad():
        parts = [model(ids[:, :8], cache=cache)] + [model(ids[:, t:t + 1], cache=cache) for t in range(8, 21)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=2e-5)
    assert cache.length == 21


@FAMILIES
def test_a_prompt_in_pieces_equals_the_whole(family):
    model, ids = build(family), token_ids(2, 21)
    cache = generate.KVCache(model.config, 21)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split([5, 9, 1, 6], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=0, atol=2e-5)


@FAMILIES
def test_packed_segments_equal_separate_examples(family):
    """trl#805: packed examples must not see each other."""
    model, lengths, ids = build(family), [5, 1, 9, 3], token_ids(1, 18)
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        packed = model(ids, positions=positions, segments=lengths)
        separate = torch.cat([model(part) for part in ids.split(lengths, 1)], 1)
        torch.testing.assert_close(packed, separate, rtol=0, atol=2e-5)
        assert (model(ids, positions=positions) - separate).abs().max() > 0.1


@FAMILIES
def test_causal(family):
    model, ids = build(family), token_ids(1, 12)
    other = ids.clone()
    other[0, 8:] = (other[0, 8:] + 1) % 96
    with torch.no_grad():
        a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :8], b[:, :8], rtol=0, atol=2e-5)
    assert (a[:, 8:] - b[:, 8:]).abs().max() > 0.1


@FAMILIES
def test_checkpointing_keeps_gradients(family):
    """peft#1142: with frozen embeddings and dropout, every ckpt_every gives the gradients of ckpt_every = 0."""
    model = lora.inject(build(family), r=2, dropout=0.3)
    trainable = [p for p in model.parameters() if p.requires_grad]
    rng, ids, calls = torch.Generator().manual_seed(3), token_ids(2, 12), []
    for p in trainable:
        p.data.normal_(generator=rng)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()

    def gradients(every, seed=0):
        model.ckpt_every = every
        model.zero_grad()
        calls.clear()
        torch.manual_seed(seed)
        loss.sum_loss(model.hidden(ids), model.head, ids).backward()
        assert len(calls) == 3 + (3 // every if every else 0), "recomputed layers"
        return [p.grad for p in trainable]

    plain = gradients(0)
    assert all(g.any() for g in plain)
    for every in (1, 2, 3):
        for a, b in zip(plain, gradients(every), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=0)
    assert not torch.allclose(plain[0], gradients(1, seed=1)[0]), "dropout is off"


# ---------------------------------------------------------------------------------------------- sizes

GPT2_SIZES = [(12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080),
              (48, 25, 1600, 1_557_611_200)]
LLAMA32 = {"model_type": "llama", "vocab_size": 128256, "intermediate_size": 8192, "num_key_value_heads": 8,
           "tie_word_embeddings": True, "rope_theta": 500000.0, "max_position_embeddings": 131072, "hidden_act": "silu",
           "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 8192}}


@pytest.mark.parametrize(("n_layer", "n_head", "n_embd", "total"), GPT2_SIZES, ids=["small", "medium", "large", "xl"])
def test_gpt2_sizes(n_layer, n_head, n_embd, total):
    config = {"vocab_size": 50257, "n_positions": 1024, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    with torch.device("meta"):
        assert memory.count(gpt2.GPT2(gpt2.Config.from_json(config)))["total"] == total


def test_llama_7b_size_and_adapters():
    with torch.device("meta"):
        model = llama.Llama(llama.Config())
    assert memory.count(model)["total"] == 6_738_415_616
    lora.inject(model, r=16)
    count = memory.count(model)
    assert (count["trainable"], count["total"]) == (8_388_608, 6_738_415_616 + 8_388_608)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(("overrides", "total"), [
    ({"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}, 1_235_814_400),
    ({"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}, 3_212_749_824),
], ids=["1b", "3b"])
def test_llama_32_sizes(overrides, total):
    with torch.device("meta"):
        assert memory.count(llama.Llama(llama.Config.from_json({**LLAMA32, **overrides})))["total"] == total


PHI_SIZES = [(2048, 24, 0.5, 1_418_270_720), (2560, 32, 0.4, 2_779_683_840)]


@pytest.mark.parametrize(("n_embd", "n_layer", "factor", "total"), PHI_SIZES, ids=["phi-1.5", "phi-2"])
def test_phi_sizes(n_embd, n_layer, factor, total):
    config = {"vocab_size": 51200, "hidden_size": n_embd, "intermediate_size": 4 * n_embd, "num_hidden_layers": n_layer,
              "num_attention_heads": 32, "partial_rotary_factor": factor, "resid_pdrop": 0.1, "qk_layernorm": False}
    with torch.device("meta"), weights.NoInit():
        model = phi.Phi(phi.Config.from_json(config))
        assert memory.count(model)["total"] == total
        if n_layer == 32:
            assert model.config == phi.Config()
            assert memory.count(lora.inject(model, r=8))["trainable"] == 32 * 2 * 8 * (2560 + 2560)


# ---------------------------------------------------------------------------------------------- refused configs

@pytest.mark.parametrize(("family", "overrides", "named"), [
    ("gpt2", {"activation_function": "relu"}, "relu"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"n_head": 5}, "n_head 5"),
    ("gpt2", {"n_embd": None}, "config.json"),
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("llama", {"sliding_window": 32}, "sliding_window"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("phi", {"hidden_act": "gelu"}, "gelu"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    ("phi", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ("phi", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ("phi", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ("phi", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "factor"),
    ("phi", {"partial_rotary_factor": 0.4}, "partial_rotary_factor turns 3 of a head's 8"),
    ("phi", {"partial_rotary_factor": 0.0}, "partial_rotary_factor must be a number from 1e-12"),
    ("phi", {"partial_rotary_factor": 0.1}, "partial_rotary_factor turns 0"),
    ("phi", {"partial_rotary_factor": 1.25}, "partial_rotary_factor turns 10"),
    ("phi", {"sliding_window": 32}, "sliding_window"),
    ("mamba", {}, "mamba"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_unsupported_config_is_named(tmp_path, family, overrides, named):
    base = {"gpt2": GPT2, "llama": LLAMA, "phi": PHI}.get(family, {})
    (tmp_path / "config.json").write_text(json.dumps({**base, "model_type": family, **overrides}))
    with pytest.raises(UserError) as e:
        weights.read_config(tmp_path)
    assert named in str(e.value) and "config.json" in str(e.value)


@pytest.mark.parametrize(("family", "keys"), [
    ("gpt2", "vocab_size n_positions n_embd n_layer n_head n_inner"),
    ("llama", "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
              "max_position_embeddings"),
    ("phi", "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size "
            "max_position_embeddings")])
@pytest.mark.parametrize("value", ["12", 0, -1, 1.5, 16.0, True, [], {}, 2**24 + 1, 10**400, math.nan, math.inf], ids=repr)
def test_a_size_that_is_none_is_named(tmp_path, family, keys, value):
    base = {"gpt2": GPT2, "llama": LLAMA, "phi": PHI}[family]
    for key in keys.split():
        (tmp_path / "config.json").write_text(json.dumps({**base, "model_type": family, key: value}))
        with pytest.raises(UserError, match=rf"config.json: {key} must be an integer from 1 to 16,777,216, found "):
            weights.read_config(tmp_path)


@pytest.mark.parametrize(("family", "overrides", "named"), [
    ("gpt2", {"n_layer": 1025}, "1,025 layers .* at most 1,024 layers"),
    ("llama", {"num_attention_heads": 2**20, "num_key_value_heads": 1, "head_dim": 2**20}, "16,777,216 numbers in all"),
    ("llama", {"head_dim": 7}, "a head has 7 numbers"), ("llama", {"num_attention_heads": 64}, "a head has 0 numbers"),
    *((family, {key: value}, f"{key} must be a number from 1e-12")
      for family, key in (("gpt2", "layer_norm_epsilon"), ("llama", "rms_norm_eps"), ("phi", "layer_norm_eps"),
                          ("llama", "rope_theta"), ("phi", "rope_theta"), ("phi", "partial_rotary_factor"))
      for value in (0, -1e-5, "1e-5", True, math.nan, math.inf, 10**400)),
    ("gpt2", {"layer_norm_epsilon": 1}, "epsilon of the norms is 1"),
    *(("llama", {"rope_scaling": {"type": "linear", "factor": factor}}, "rope_scaling: factor must be a number from 1e-12")
      for factor in (0, -2, "2", [2], math.nan)),
    ("llama", {"rope_scaling": {"type": "linear", "factor": None}}, "lacks factor"),
    ("llama", {"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling: rope_type must be text"),
    ("llama", {"rope_scaling": [2.0]}, "rope_scaling must be an object"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_parameters: rope_theta must be"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 64}}, "low_freq_factor must be below"),
    ("gpt2", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
    ("llama", {"attention_bias": 1}, "attention_bias must be true or false"),
    ("gpt2", {"dtype": ["float32"]}, "dtype must be text"),
    ("gpt2", {"quantization_config": "nf4"}, "quantization_config must be an object"),
    ("gpt2", {"quantization_config": {"quant_method": 4}}, "quant_method must be text"),
    ("gpt2", {"model_type": ["gpt2"]}, "model_type .* is not supported"),
    ("gpt2", {"option": "x" * 10**6}, "option 'option': .{,120} is not implemented"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_value_that_the_model_cannot_have_is_named(tmp_path, family, overrides, named):
    base = {"gpt2": GPT2, "llama": LLAMA, "phi": PHI}[family]
    (tmp_path / "config.json").write_text(json.dumps({**base, "model_type": family, **overrides}))
    with pytest.raises(UserError, match=rf"config.json: .*{named}"):
        weights.read_config(tmp_path)


@pytest.mark.parametrize(("base", "config"), [(GPT2, gpt2.Config), (LLAMA, llama.Config), (PHI, phi.Config)])
def test_options_that_are_switched_off_pass(base, config):
    config.from_json({**base, "new_option": None, "newer_option": False, "use_cache": True, "dtype": "bfloat16"})
    with pytest.raises(ValueError, match="new_option"):
        config.from_json({**base, "new_option": 1})


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size"])
def test_missing_key_is_named(tmp_path, missing):
    config = {"model_type": "llama", **{k: v for k, v in LLAMA.items() if k != missing}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=missing):
        weights.read_config(tmp_path)
