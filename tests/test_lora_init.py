"""lora_init.py and merging.py: starts compared with linalg.svd and PEFT, files, resuming, merging after few bits.

A name such as qlora#44 is a GitHub issue: the bug that the test looks for, in another project.
"""
import json
import re
import shutil
import subprocess
import sys
from itertools import count

import pytest
import torch
from conftest import ROOT, make_data, make_folder
from runs import lines, no_picture, options, run, timeless
from safetensors.torch import load_file
from test_lora import IDS, MERGED, assert_same, hf_model, logits, randomise_adapters

import data
import export
import lora
import memory
import train
from errors import UserError
from files import merging, peft_files, weights, writing
from techniques import lora_init, quant
from techniques.device import device_of

KINDS = [("gpt2", {}), ("gpt2", {"targets": "all", "rslora": True}), ("llama", {"targets": "all"}), ("phi", {}),
         ("tied llama", {"targets": ["q_proj", "lm_head"], "rslora": True})]
STARTS = [("loftq", 8), ("loftq", 4), ("pissa", 32), ("pissa", 16), ("pissa", 8), ("pissa", 4)]
EVERY_KIND = pytest.mark.parametrize(("kind", "more"), KINDS, ids=["gpt2", "gpt2-all", "llama", "phi", "tied"])
EVERY_START = pytest.mark.parametrize(("init", "bits"), STARTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {**{family: make_folder(root / family, family) for family in ("gpt2", "llama", "phi")},
            "tied llama": make_folder(root / "tied", "llama", tie_word_embeddings=True)}


def start(folder, init, bits, **more):
    stored = weights.StoredWeights(folder).read
    return lora.inject(weights.load(folder, bits=bits), **{"r": 3, "alpha": 7, "init": init, "stored": stored, **more})


def learn(model, seed=5):
    """Move every number of the adapters a little, as training would."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.add_(0.3 * p.std() * torch.randn(p.shape, generator=rng) if p.any() else
                       0.05 * torch.randn(p.shape, generator=rng))
    return model


def held(base):
    """The weight that a layer multiplies with, (out, in), float32."""
    if isinstance(base, quant.FrozenLinear):
        return base.dequantize()
    return (base.weight.t() if getattr(base, "fan_in_fan_out", False) else base.weight).float()


def of_rank(R, r):
    U, S, Vt = torch.linalg.svd(R.double(), full_matrices=False)
    return (U[:, :r] * S[:r] @ Vt[:r]).float()


def rows_of(m):
    return [slice(0, 32), slice(64, 96)] if m.parts == ("q", "v") else [slice(None)]


# ---------------------------------------------------------------------------------------------- Eckart and Young

@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1210, 1300), (1300, 1210), (3, 50)], ids=str)
@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_best_approximation_is_linalg_svds(shape, spectrum):
    """For both methods: all eigenvectors of a small matrix, and block Lanczos on a large one (2 * 12 * 25 < 1210)."""
    R = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if spectrum == "decaying":
        R = R * 0.9 ** torch.arange(shape[1])
    U, S, Vt = lora_init.best(R, 4)
    true = torch.linalg.svdvals(R.double())
    k = min(4, *shape)
    assert U.shape == (shape[0], k) and Vt.shape == (k, shape[1])
    assert torch.allclose(S.double(), true[:k], rtol=1e-5)
    rest = (R - U * S @ Vt).double().square().sum()
    assert rest <= true[k:].square().sum() + 1e-6 * true.square().sum()


# ---------------------------------------------------------------------------------------------- the starts

@EVERY_KIND
@pytest.mark.parametrize("bits", [8, 4])
def test_loftq_starts_at_the_best_correction(folders, kind, more, bits):
    model, plain = start(folders[kind], "loftq", bits, **more), weights.load(folders[kind], bits=bits)
    full = weights.load(folders[kind])
    for name, m in lora.adapters(model).items():
        if name == "lm_head":  # it is in 16 bit, so it has the default start
            assert m.lora_A.any() and not m.B().any() and m.start_A is None
            continue
        base, W = plain.get_submodule(name), held(full.get_submodule(name))
        assert torch.equal(m.base_layer.weight, base.weight)  # the codes do not change
        error, got = W - held(base), m.scale * m.B() @ m.lora_A
        for rows in rows_of(m):
            best = of_rank(error[rows], 3)
            assert (got[rows] - best).norm() < 1e-4 * best.norm()
            assert (error - got)[rows].norm() < 0.97 * error[rows].norm()
        if m.parts:
            assert not got[32:64].any()
        # each factor gets the square root of the singular values
        assert torch.allclose(m.lora_A.norm(dim=1), torch.cat([b.norm(dim=0) for b in m.lora_B]), rtol=1e-4)


@EVERY_KIND
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_pissa_splits_the_weight(folders, kind, more, bits):
    model, full = start(folders[kind], "pissa", bits, **more), weights.load(folders[kind])
    for name, m in lora.adapters(model).items():
        W, got = held(full.get_submodule(name)).detach(), (m.scale * m.B() @ m.lora_A).detach()
        for rows in rows_of(m):
            best = of_rank(W[rows], 3)
            assert (got[rows] - best).norm() < 1e-4 * best.norm()
        rest = W - got
        if isinstance(m.base_layer, quant.LowBitLinear):
            # A number half-way between two codes may take either, and one of 1,024 that does is a tenth of the error. So
            # what is quantised here is W minus the program's own product s B A. This product and the one above are each
            # wrong by at most r + 1 = 4 roundings of their terms, 2^-24 of each; the difference from W adds one more.
            layer, product = full.get_submodule(name), m.start_delta()
            own = W - (product.t() if getattr(layer, "fan_in_fan_out", False) else product)
            terms = m.scale * m.B().abs() @ m.lora_A.abs()
            assert ((own - rest).abs() <= 2**-24 * (2 * 4 * terms + 2 * rest.abs())).all()
            wanted = quant.quantize(layer, layer.weight.detach() - product, bits).dequantize()
            assert torch.equal(held(m.base_layer), wanted)
            assert (held(m.base_layer) + got - W).norm() < (held(weights.load(folders[kind], bits=bits).get_submodule(name))
                                                           - W).norm()
        else:
            assert (held(m.base_layer) - rest).abs().max() < (1e-5 if bits == 32 else 2**-8 * rest.abs().max())
    if kind == "tied llama":  # the embedding shares its matrix, and must not change
        assert torch.equal(model.model.embed_tokens.weight.float(), full.model.embed_tokens.weight.to(
            torch.float32 if bits == 32 else torch.bfloat16).float())
    if bits == 32:
        assert_same(logits(model), logits(full))


@pytest.mark.parametrize(("family", "target", "rslora"), [("gpt2", "c_fc", False), ("llama", "q_proj", True)])
def test_pissa_is_pefts(folders, family, target, rslora, monkeypatch):
    """PEFT's formulas over linalg.svd in float64. In float32, as PEFT has it, their B A is wrong by up to 1.1e-5 of its
    largest number: the rounding of W, eps |W|, over the gap between singular values 3 and 4, here 1e-5. Ours: 4e-7."""
    peft, svd = pytest.importorskip("peft"), torch.linalg.svd
    model = hf_model(folders[family])
    with monkeypatch.context() as m:
        m.setattr(torch.linalg, "svd", lambda W, full_matrices: [x.float() for x in svd(W.double(), full_matrices)])
        theirs = peft.get_peft_model(model, peft.LoraConfig(
            task_type="CAUSAL_LM", r=3, lora_alpha=7, init_lora_weights="pissa", target_modules=[target], use_rslora=rslora,
            fan_in_fan_out=family == "gpt2"))
    ours = start(folders[family], "pissa", 32, targets=[target], rslora=rslora)
    layers = {n.removeprefix("base_model.model.").removeprefix("transformer."): m for n, m in theirs.named_modules()
              if hasattr(m, "lora_A")}
    assert layers.keys() == lora.adapters(ours).keys()
    for name, m in lora.adapters(ours).items():
        t = layers[name]
        BA = t.lora_B["default"].weight @ t.lora_A["default"].weight
        assert (m.B() @ m.lora_A - BA).abs().max() < 1e-5 * BA.abs().max()
        assert (m.base_layer.weight - t.base_layer.weight).abs().max() < 1e-5
        assert torch.allclose(m.lora_A.norm(dim=1), t.lora_A["default"].weight.norm(dim=1), rtol=1e-4)


def test_weights_without_any_rounding_error_can_still_learn(folders, tmp_path):
    """These weights were quantised and written as floats, so W - Q(W) is 0. With A = B = 0 all gradients would be 0."""
    shutil.copytree(folders["llama"], tmp_path / "m")
    model = weights.load(folders["llama"], bits=8)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"] = model.get_submodule(name).dequantize()
    writing.write_tensors(tmp_path / "m" / "model.safetensors", tensors)
    m = start(tmp_path / "m", "loftq", 8).get_submodule(name)
    assert m.lora_A.std() > 0.01 and not (m.B().abs() > 1e-3).any()


def test_the_starts_take_no_random_numbers(folders):
    after = []
    for init in lora_init.INITS:
        torch.manual_seed(3)
        start(folders["llama"], init, 4)
        after.append(torch.rand(3))
    assert all(torch.equal(x, after[0]) for x in after)


def stored_in_4_bits(folder, at):
    """A copy whose config.json says that it is stored in 4 bits; the program looks only there."""
    shutil.copytree(folder, at)
    config = json.loads((at / "config.json").read_text())
    q = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (at / "config.json").write_text(json.dumps({**config, "quantization_config": q}))
    return at


@pytest.mark.parametrize(("options", "named"), [
    ({"init": "loftq", "bits": 32}, "add --bits 4"), ({"init": "loftq", "bits": 16}, "add --bits 4"),
    ({"init": "svd", "bits": 32}, "--lora-init svd"), ({"init": "pissa", "bits": 32, "alpha": 0}, "--lora-alpha 0"),
])
def test_starts_that_cannot_be_are_refused(folders, options, named):
    model = weights.load(folders["llama"], bits=options.pop("bits"))
    with pytest.raises(UserError, match=named):
        lora.inject(model, **options)
    assert not lora.adapters(model)


@pytest.mark.parametrize(("more", "named"), [
    ({"lora_init": "loftq"}, "add --bits 4"), ({"lora_init": "loftq", "amp": True, "bits": 16}, "add --bits 4"),
    ({"lora_init": "pissa", "full": True}, "--lora-init has no effect with --full"),
    ({"lora_init": "pissa", "lora_alpha": -1.0}, "--lora-alpha"),
    ({"lora_init": "loftq", "amp": True, "stored": True}, "4 bits of them"),
    ({"lora_init": "pissa", "amp": True, "stored": True}, "4 bits of them"),
])
def test_training_that_cannot_start_so_is_refused(folders, tmp_path, more, named):
    folder = stored_in_4_bits(folders["llama"], tmp_path / "m") if more.pop("stored", False) else folders["llama"]
    with pytest.raises(UserError, match=named):
        run(tmp_path / "run", folder, make_data(tmp_path / "data.jsonl"), **more)
    assert not (tmp_path / "run").exists()


def test_a_damaged_weight_is_named(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 4] = torch.nan
    writing.write_tensors(tmp_path / "m" / "model.safetensors", tensors)
    with pytest.raises(UserError, match="layers.1.self_attn.q_proj.weight: a weight is not finite"):
        start(tmp_path / "m", "pissa", 32)


# ---------------------------------------------------------------------------------------------- files

def test_reload_in_a_fresh_process(folders, tmp_path):
    """qlora#44, litgpt#629, bitsandbytes#1946: the same codes, the same adapter, the same logits."""
    code = ("import sys, torch\nfrom files import peft_files, weights\n"
            "out = sys.argv[1]\n"
            "jobs, ids, dtype = torch.load(out)\n"
            "got = []\n"
            "for folder, bits, adapter in jobs:\n"
            "    model = peft_files.load(weights.load(folder, bits, 'cpu', dtype if bits < 32 else None), adapter)\n"
            "    with torch.no_grad():\n"
            "        got.append((model.eval()(ids), {n: t for n, t in model.state_dict().items()}))\n"
            "torch.save(got, out)")
    jobs, wanted = [], []
    for i, ((init, bits), (kind, more)) in enumerate((s, k) for s in STARTS for k in KINDS):
        model = learn(start(folders[kind], init, bits, **more))
        peft_files.save(model, tmp_path / str(i))
        jobs.append((str(folders[kind]), bits, str(tmp_path / str(i))))
        wanted.append((logits(model), {n: t.clone() for n, t in model.state_dict().items()}))
    products = device_of("cpu").products  # the process below would measure this machine, and may find another type
    torch.save((jobs, IDS, products), tmp_path / "io.pt")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "io.pt")], cwd=ROOT, check=True)
    for job, (got, tensors), (expected, own) in zip(jobs, torch.load(tmp_path / "io.pt"), wanted, strict=True):
        assert_same(got, expected)
        # In float32 the adapter alone makes the difference: a hundred times what assert_same allows.
        least = 0.02 if products == torch.bfloat16 else 1e-3
        assert (got - logits(weights.load(job[0], bits=job[1]))).abs().max() > least
        assert tensors.keys() == own.keys(), job
        for n in own:
            assert torch.equal(tensors[n], own[n]), (job, n)


@EVERY_KIND
def test_pissa_is_saved_over_the_original_weights(folders, tmp_path, kind, more):
    """PEFT can load it over the plain checkpoint: it has twice the rank, [B, -B0] [A; A0]."""
    peft = pytest.importorskip("peft")
    ours = learn(start(folders[kind], "pissa", 32, **more))
    peft_files.save(ours, tmp_path)
    base = hf_model(folders[kind])
    before = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert_same(logits(theirs), logits(ours), before, MERGED)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 6 * len(next(iter(lora.adapters(ours).values())).lora_B)
    back = peft_files.load(weights.load(folders[kind]), tmp_path)
    peft_files.save(back, tmp_path / "again")
    tensors, again = (load_file(at / "adapter_model.safetensors") for at in (tmp_path, tmp_path / "again"))
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[k], again[k]) for k in tensors)
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config == {**again, "lora_alpha": pytest.approx(again["lora_alpha"])}


def test_loftq_is_saved_as_it_is_and_bound_to_its_bits(folders, tmp_path):
    model = learn(start(folders["gpt2"], "loftq", 4))
    peft_files.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, m in lora.adapters(model).items():
        key = f"base_model.model.transformer.{name}.lora_"
        assert torch.equal(tensors[f"{key}A.weight"], m.lora_A) and torch.equal(tensors[f"{key}B.weight"], m.B())
    assert peft_files.trained_with(tmp_path) == ("loftq", 4)
    for bits in (32, 16, 8):
        with pytest.raises(UserError, match=r"--bits 4, or merge"):
            peft_files.load(weights.load(folders["gpt2"], bits=bits), tmp_path)
    whole = load_file(tmp_path / "start.safetensors")
    wider = {k: torch.cat([t, t], 0 if ".lora_A." in k else 1) for k, t in whole.items()}
    other = {k.replace("attn.c_attn", "attn.c_proj"): t[:32] if ".lora_B." in k else t for k, t in whole.items()}
    for damaged in (wider, other):
        writing.write_tensors(tmp_path / "start.safetensors", damaged)
        with pytest.raises(UserError, match=r"start.safetensors: layer h.0.attn.c_\w+ does not fit the adapter"):
            peft_files.load(weights.load(folders["gpt2"], bits=4), tmp_path)
    (tmp_path / "start.safetensors").unlink()
    with pytest.raises(UserError, match=r"start.safetensors: the file is missing"):
        peft_files.load(weights.load(folders["gpt2"], bits=4), tmp_path)


def test_pissa_needs_the_original_weights_again(folders, tmp_path):
    model = learn(start(folders["llama"], "pissa", 4))
    peft_files.save(model, tmp_path / "adapter")
    plain = weights.load(folders["llama"], bits=4)
    plain.source = str(stored_in_4_bits(folders["llama"], tmp_path / "m"))
    with pytest.raises(UserError, match="full precision"):
        peft_files.load(plain, tmp_path / "adapter")
    assert not lora.adapters(plain)


@pytest.mark.parametrize("bits", [32, 8])
def test_pissa_over_other_bits_is_the_same_model_but_for_the_rounding(folders, tmp_path, bits):
    model = learn(start(folders["llama"], "pissa", 4))
    peft_files.save(model, tmp_path)
    merged = merging.Merge(str(folders["llama"]), str(tmp_path))
    other = peft_files.load(weights.load(folders["llama"], bits=bits), tmp_path)
    for name, m in lora.adapters(other).items():
        got, wanted = held(m.base_layer) + m.delta(), merged.merged(f"{name}.weight")
        assert (got - wanted).abs().max() < (1e-5 if bits == 32 else 0.02 * wanted.abs().max())


def test_bits_are_recorded_and_generate_takes_them(folders, tmp_path, monkeypatch, capsys):
    import generate
    seen, load = [], weights.load
    monkeypatch.setattr(weights, "load", lambda name, bits, device: seen.append(bits) or load(name, bits, device))
    for bits, given in ((4, []), (8, []), (16, []), (32, []), (4, ["--bits", "16"])):
        model = randomise_adapters(lora.inject(load(folders["llama"], bits=bits)))
        peft_files.save(model, tmp_path / f"{bits}")
        assert peft_files.trained_with(tmp_path / f"{bits}") == ("default", bits)
        generate.main(["--model", str(folders["llama"]), "--adapter", str(tmp_path / f"{bits}"), "--prompt", "a",
                       "--max-new-tokens", "2", *given])
    assert seen == [4, 8, 32, 32, 16]


# ---------------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize(("family", "init", "bits"), [("gpt2", "loftq", 4), ("llama", "pissa", 4), ("gpt2", "pissa", 32)])
def test_twenty_steps_are_ten_and_resume_and_ten(folders, tmp_path, monkeypatch, family, init, bits):
    """nanoGPT#467: equal bit for bit. The base is computed again from the start that the state holds."""
    no_picture(monkeypatch)
    rows = make_data(tmp_path / "data.jsonl")
    common = dict(steps=20, lr=1e-2, batch_size=2, save_every=10, eval_every=10, lora_dropout=0.25, lora_init=init,
                  bits=bits, amp=bits < 32)
    run(tmp_path / "whole", folders[family], rows, **common)
    calls, step = count(1), train.train_step

    def stop(*args):
        if next(calls) == 14:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as m:
        m.setattr(train, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train.main(options(tmp_path / "cut", folders[family], rows, **common))
    with monkeypatch.context() as m:
        m.setattr(lora_init, "best", None)  # the start must be read from the file, not computed again
        train.main(train.TrainConfig(out=str(tmp_path / "cut"), resume=True))
    for file in ("adapter/adapter_model.safetensors", "state/state.safetensors"):
        got, wanted = load_file(tmp_path / "cut" / file), load_file(tmp_path / "whole" / file)
        assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted)
    assert timeless(lines(tmp_path / "cut")) == timeless(lines(tmp_path / "whole"))
    first = peft_files.load(weights.load(folders[family], bits=bits), tmp_path / "whole" / "adapter")
    moved = [(m.delta() - m.start_delta()).abs().max() for m in lora.adapters(first).values()]
    assert min(moved) > 1e-3  # training did change the adapters


# ---------------------------------------------------------------------------------------------- merging

def merge(folder, adapter, out, *more):
    export.main(["merge", "--model", str(folder), "--adapter", str(adapter), "--out", str(out), *more])


@EVERY_KIND
@pytest.mark.parametrize(("init", "bits"), [("default", 8), ("default", 4), ("default", 16), *STARTS])
def test_merging_takes_the_full_weights_and_says_what_changed(folders, tmp_path, capsys, kind, more, init, bits):
    """peft#2321: the weights are W + s (B A - B0 A0), and the printed difference is that of the two whole models."""
    model = learn(start(folders[kind], init, bits, **more))
    peft_files.save(model, tmp_path / "adapter")
    merge(folders[kind], tmp_path / "adapter", tmp_path / "out")
    tensors, plain = load_file(tmp_path / "out" / "model.safetensors"), weights.load(folders[kind])
    for name, m in lora.adapters(model).items():
        W = plain.get_submodule(name).weight
        BA = m.scale * (m.B() @ m.lora_A)
        if m.start_A is not None:
            BA = BA - m.scale * (m.start_B @ m.start_A)
        BA = BA.t() if getattr(plain.get_submodule(name), "fan_in_fan_out", False) else BA
        got = tensors[weights.checkpoint_name(plain, f"{name}.weight")]
        assert (got - (W + BA)).abs().max() < 1e-5 and (got - W).abs().max() > 1e-4
    assert ("lm_head.weight" in tensors) == (kind != "gpt2")
    for n, p in plain.named_parameters():
        if n.removesuffix(".weight") not in lora.adapters(model):
            assert torch.equal(tensors[weights.checkpoint_name(plain, n)], p)
    merged = logits(weights.load(tmp_path / "out"))
    assert_same(logits(hf_model(tmp_path / "out")), merged)
    if init == "pissa" and bits == 32:
        assert_same(merged, logits(model), logits(plain), MERGED)

    tokenizer = data.load_tokenizer(str(folders[kind]))
    ids = torch.tensor([tokenizer.encode(export.TEXT)])[:, :128]
    with torch.no_grad():
        after = weights.load(tmp_path / "out")(ids)
        before = peft_files.load(weights.load(folders[kind], bits=bits), tmp_path / "adapter").float()(ids)
    said = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"logits differ from the model that was trained \((\d+) bit\) by at most (\S+) \(their standard "
                         r"deviation is (\S+)\); the most likely token is the same at (\d+) of (\d+) positions", said)
    assert found, said
    assert int(found[1]) == bits and float(found[3]) == pytest.approx(before.std().item(), rel=0.06)
    assert float(found[2]) == pytest.approx((before - after).abs().max().item(), rel=0.06, abs=1e-4)
    same = (before.argmax(-1) == after.argmax(-1)).sum().item()
    assert abs(int(found[4]) - same) <= 1 and int(found[5]) == ids.shape[1]
    assert bits in (32, 16) or float(found[2]) > 0.01


@pytest.mark.parametrize("kind", ["gpt2", "tied llama"])
def test_shards(folders, tmp_path, monkeypatch, kind):
    targets = ["lm_head"] if kind == "tied llama" else None
    peft_files.save(learn(start(folders[kind], "default", 4, targets=targets)), tmp_path / "adapter")
    merge(folders[kind], tmp_path / "adapter", tmp_path / "one", "--dtype", "bfloat16")
    monkeypatch.setattr(merging, "SHARD", 20_000)
    merge(folders[kind], tmp_path / "adapter", tmp_path / "many", "--dtype", "bfloat16")
    one, index = load_file(tmp_path / "one" / "model.safetensors"), json.loads(
        (tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[1].name == f"model-00002-of-{len(files):05}.safetensors"
    shards = {f.name: load_file(f) for f in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert index["weight_map"].keys() == one.keys()
    for key, tensor in one.items():
        assert torch.equal(shards[index["weight_map"][key]][key], tensor)
    for tensors in shards.values():
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1
    assert_same(logits(weights.load(tmp_path / "many")), logits(hf_model(tmp_path / "many")))


class Live(memory.Ledger):
    """A Ledger that leaves out tensors without storage."""

    def follow(self, tensor, category="activations"):
        if not tensor.is_meta:
            super().follow(tensor, category)


def test_merging_holds_a_shard_and_a_layer(tmp_path, monkeypatch, on_device):
    """Sixteen layers of 0.6 MB in float32 and a head of 2 MB: only a few of them are in memory at a time."""
    folder = make_folder(tmp_path / "m", "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=16)
    peft_files.save(learn(start(folder, "pissa", 4, targets="all")), tmp_path / "adapter")
    job = merging.Merge(str(folder), str(tmp_path / "adapter"))
    size = (folder / "model.safetensors").stat().st_size
    block, head = 4 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 256 + 256), 4 * 128 * 4096
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(merging, "SHARD", block)
    monkeypatch.setattr(quant, "CHUNK", 2**14)  # NF4's workspace and temporaries then take 0.3 MB instead of some 20
    on_device(nf4_chunk=2**14)
    with Live(torch.nn.Module()) as ledger:
        merging.write(job, tmp_path / "out", "float32")
    assert head < ledger.peak < 2.2 * head < 0.7 * size, ledger.peak
    weights.save_about(tmp_path / "out", folder, "float32", False)
    with Live(torch.nn.Module()) as ledger:
        merging.compare(job, tmp_path / "out", list(range(50)))
    assert head < ledger.peak < 3 * head + 2**20 < 0.7 * size, ledger.peak


def test_merging_into_rounded_weights_is_refused(folders, tmp_path):
    model = learn(start(folders["llama"], "default", 4))
    with pytest.raises(UserError, match=r"q_proj is held in 4 bit.* export.py merge"):
        lora.merge(model)
    assert lora.adapters(model)
    peft_files.save(model, tmp_path / "adapter")
    stored = stored_in_4_bits(folders["llama"], tmp_path / "m")
    with pytest.raises(UserError, match="4 bit only.*give the model that it was made from"):
        merge(stored, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_an_adapter_that_does_not_say_its_bits(folders, tmp_path, capsys):
    model = learn(start(folders["llama"], "default", 32))
    peft_files.save(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    writing.write_tensors(file, load_file(file))  # PEFT writes no bits
    merge(folders["llama"], tmp_path / "adapter", tmp_path / "out")
    assert "(32 bit, as far as the adapter says)" in capsys.readouterr().out
    assert_same(logits(weights.load(tmp_path / "out")), logits(model), None, MERGED)
