"""gpt2.py and llama.py: the same logits as transformers, from any kind of batch, at any checkpointing."""
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
import loss
import memory
import weights
from weights import UserError

REFERENCE = Path(__file__).parent / "reference"
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
LLAMA = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
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
CASES = [pytest.param(f, o, id=f"{f}-{n}") for f, c in (("gpt2", GPT2_CASES), ("llama", LLAMA_CASES)) for n, o in c.items()]
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])


def build(family, **overrides):
    """One of our models with every parameter random."""
    if family == "gpt2":
        return randomise(gpt2.GPT2(gpt2.Config.from_json({**GPT2, **overrides})))
    return randomise(llama.Llama(llama.Config.from_json({**LLAMA, "rope_parameters": LLAMA3, "head_dim": 16, **overrides})))


def token_ids(*shape, seed=1):
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def reference(folder, family, **overrides):
    """Logits of transformers' model with every parameter random; the model is saved to `folder`."""
    transformers = pytest.importorskip("transformers")
    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**GPT2, **overrides}))
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


def test_parity_notices_another_gelu(tmp_path, monkeypatch):
    expected = reference(tmp_path, "gpt2")
    monkeypatch.setitem(gpt2.ACTIVATIONS, "gelu_new", "none")
    assert error(tmp_path, expected) > 5e-5


def test_parity_notices_interleaved_rope(tmp_path, monkeypatch):
    def interleaved(x, cos, sin):  # Meta's original pairing
        a, b, cos, sin = x[..., ::2], x[..., 1::2], cos.chunk(2, -1)[1], sin.chunk(2, -1)[1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    expected = reference(tmp_path, "llama")
    monkeypatch.setattr(llama, "turn", interleaved)
    assert error(tmp_path, expected) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_frozen_reference_logits(name):
    """Parity where transformers is not installed; reference/make.py wrote the file with it."""
    ref = json.loads((REFERENCE / f"{name}.json").read_text())
    config, model_class = weights.FAMILIES[ref["config"]["model_type"]]
    model = randomise(model_class(config.from_json(ref["config"])), ref["seed"])
    with torch.no_grad():
        logits = model(torch.tensor([ref["ids"]]))[0]
    expected = torch.tensor(ref["logits"])
    assert expected.std() > 0.5
    assert (logits[ref["positions"]][:, ref["tokens"]] - expected).abs().max() <= 1e-5 * expected.std()


# ---------------------------------------------------------------------------------------------- batches and caches

@FAMILIES
def test_padded_batch_equals_single_examples(family):
    """PITFALLS 10: padding must move neither positions nor logits."""
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
    """PITFALLS 11: attention rows that see no key."""
    model, ids = build(family).to(dtype), token_ids(3, 16)
    labels = ids.clone()
    for i, n in enumerate([1, 7, 16]):
        ids[i, n:], labels[i, n:] = 0, loss.IGNORE
    hidden = model.hidden(ids)
    assert model.head(hidden).isfinite().all()
    loss.sum_loss(hidden, model.head, labels).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("rope", [LLAMA3 | {"original_max_position_embeddings": 8192}, {"rope_theta": 10000.0}],
                         ids=["llama3", "plain"])
def test_rope_tables_stay_float32(rope, monkeypatch):
    """PITFALLS 12: 16-bit tables drift at far positions."""
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


def test_kv_cache_refuses_a_second_prompt():
    model, ids = build("llama"), token_ids(1, 6)
    cache = generate.KVCache(model.config, 12)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model(ids, cache=cache)


@FAMILIES
def test_packed_segments_equal_separate_examples(family):
    """PITFALLS 9: packed examples must not see each other."""
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
    """PITFALLS 15: with frozen embeddings and dropout on, every ckpt_every gives the gradients of none."""
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


# ---------------------------------------------------------------------------------------------- refused configs

@pytest.mark.parametrize(("family", "overrides", "named"), [
    ("gpt2", {"activation_function": "relu"}, "relu"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gpt2", {"n_head": 5}, "n_head 5"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("gpt2", {"n_embd": None}, "config.json"),
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("llama", {"sliding_window": 32}, "sliding_window"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("mamba", {}, "mamba"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_unsupported_config_is_named(tmp_path, family, overrides, named):
    base = {"gpt2": GPT2, "llama": LLAMA}.get(family, {})
    (tmp_path / "config.json").write_text(json.dumps({**base, "model_type": family, **overrides}))
    with pytest.raises(UserError) as e:
        weights.read_config(tmp_path)
    assert named in str(e.value) and "config.json" in str(e.value)


@pytest.mark.parametrize(("base", "config"), [(GPT2, gpt2.Config), (LLAMA, llama.Config)])
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
