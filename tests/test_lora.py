"""lora.py and files/peft_files.py: which layers get adapters, PEFT's format both ways, merging, precision.

A name such as litgpt#629 is a GitHub issue: the bug that the test looks for, in another project.
"""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, held_dtype, make_data, make_folder
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import data
import export
import lora
from errors import UserError
from files import peft_files, weights, writing
from files.rows import read_rows
from run.evaluate import evaluate
from techniques import loss
from train import TrainConfig, main

FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
IDS = torch.randint(0, 4096, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One tiny model folder for each kind. The tests share it, so none of them may write into it."""
    root = tmp_path_factory.mktemp("models")
    return {"gpt2": make_folder(root / "gpt2", "gpt2"), "llama": make_folder(root / "llama", "llama"),
            "phi": make_folder(root / "phi", "phi"),
            "tied llama": make_folder(root / "tied", "llama", tie_word_embeddings=True)}


def randomise_adapters(model, seed=2):
    """Set A and B to random numbers: with B = 0 the adapter would change nothing."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.copy_(0.5 * torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5)
    return model


def adapted(folder, bits=32, **options):
    return randomise_adapters(lora.inject(weights.load(folder, bits=bits), **{"r": 3, "alpha": 7, **options}))


@torch.no_grad()
def logits(model):
    out = model.eval()(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


MERGED = 3e-5  # (W + s B A) x and W x + s B A x are rounded differently


def assert_same(a, b, other=None, tolerance=1e-5):
    """a and b are equal, and clearly different from `other` (else equality would prove nothing)."""
    assert (a - b).abs().max() <= tolerance * b.std()
    if other is not None:
        assert (b - other).abs().max() > 0.1 * b.std()


def hf_model(folder):
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------- targets

@pytest.mark.parametrize(("family", "targets", "layers"), [
    ("gpt2", None, ["attn.c_attn"]),
    ("gpt2", ["c_attn.q", "c_attn.k"], ["attn.c_attn"]),
    ("gpt2", ["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
    ("gpt2", ["attn.c_proj"], ["attn.c_proj"]),
    ("gpt2", "all", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    ("llama", None, ["self_attn.q_proj", "self_attn.v_proj"]),
    ("llama", ["k_proj", "down_proj"], ["self_attn.k_proj", "mlp.down_proj"]),
    ("phi", None, ["self_attn.q_proj", "self_attn.v_proj"]),
    ("phi", "all", [*(f"self_attn.{p}_proj" for p in "qkv"), "self_attn.dense", "mlp.fc1", "mlp.fc2"]),
    ("llama", "all", [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]),
])
def test_targets(folders, family, targets, layers):
    model = lora.inject(weights.load(folders[family]), targets=targets)
    blocks = "h" if family == "gpt2" else "model.layers"
    assert set(lora.adapters(model)) == {f"{blocks}.{i}.{layer}" for i in range(3) for layer in layers}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if ".lora_A" in n or ".lora_B" in n}


def test_fused_parts_touch_only_their_rows(folders):
    model = weights.load(folders["gpt2"])
    x = torch.randn(2, 5, 32)
    before = model.h[0].attn.c_attn(x)
    randomise_adapters(lora.inject(model, r=2))
    q, k, v = (model.h[0].attn.c_attn(x) - before).split(32, -1)
    assert model.h[0].attn.c_attn.parts == ("q", "v")
    assert q.abs().max() > 0.1 and v.abs().max() > 0.1 and not k.any()


@FAMILIES
def test_fresh_adapter_changes_nothing(folders, family):
    model = weights.load(folders[family])
    before = logits(model)
    assert torch.equal(before, logits(lora.inject(model, targets="all")))
    assert all(m.lora_A.any() for m in lora.adapters(model).values())


@pytest.mark.parametrize(("options", "named"), [
    ({"targets": ["nonsense"]}, "nonsense"), ({"targets": ["q_proj", "c_attn"]}, "c_attn"), ({"targets": ["proj"]}, "proj"),
    ({"targets": ["q_proj.q"]}, "q_proj.q"), ({"r": 0}, "--lora-r 0"), ({"r": -1}, "--lora-r -1"),
    ({"dropout": 1.0}, "--lora-dropout 1.0"), ({"dropout": -0.1}, "--lora-dropout -0.1"),
    *(({"alpha": alpha}, f"--lora-alpha {alpha}: must be above 0") for alpha in (0, -1, float("nan"), float("inf"))),
])
def test_bad_options_are_named_and_leave_no_adapter(folders, options, named):
    model = weights.load(folders["llama"])
    with pytest.raises(UserError, match=named):
        lora.inject(model, **options)
    assert not lora.adapters(model)


def test_second_injection_is_refused(folders):
    with pytest.raises(UserError, match="already"):
        lora.inject(adapted(folders["llama"]))


# ---------------------------------------------------------------------------------------------- PEFT, both ways

TO_PEFT = [
    ("gpt2", {}), ("gpt2", {"rslora": True}), ("gpt2", {"targets": ["c_attn"]}), ("gpt2", {"targets": ["c_attn.v"]}),
    ("gpt2", {"targets": ["c_attn.q", "c_attn.k"]}), ("gpt2", {"targets": ["attn.c_proj"]}),
    ("gpt2", {"targets": ["c_fc", "c_proj"]}), ("gpt2", {"targets": "all", "rslora": True}),
    ("gpt2", {"targets": ["lm_head"]}), ("gpt2", {"targets": ["c_attn.q", "c_attn.v", "c_fc"]}),
    ("gpt2", {"targets": ["c_fc", "c_attn.q", "c_attn.k"], "rslora": True}),
    ("llama", {}), ("llama", {"targets": "all"}), ("llama", {"targets": "all", "rslora": True}),
    ("llama", {"targets": ["o_proj", "lm_head"]}), ("tied llama", {"targets": ["down_proj"]}),
    ("phi", {}), ("phi", {"targets": ["q_proj", "v_proj", "k_proj", "dense", "fc1", "fc2"]}),
    ("phi", {"targets": "all", "rslora": True}), ("phi", {"targets": ["lm_head", "dense"]}),
]


@pytest.mark.parametrize(("kind", "options"), TO_PEFT, ids=str)
def test_our_adapter_in_peft_and_back(folders, tmp_path, kind, options):
    """litgpt#629, peft#3531: the scale, GPT-2's transposed weights, and q's and v's adapters saved as one."""
    peft = pytest.importorskip("peft")
    ours = adapted(folders[kind], **options)
    peft_files.save(ours, tmp_path)
    base = hf_model(folders[kind])
    before = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert_same(logits(theirs), logits(ours), before)
    back = peft_files.load(weights.load(folders[kind]), tmp_path)
    assert_same(logits(back), logits(ours))
    assert all(back.get_submodule(n).scale == pytest.approx(m.scale) for n, m in lora.adapters(ours).items())


FROM_PEFT = [
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_proj", "c_fc"], "fan_in_fan_out": True, "use_rslora": True}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_dropout": 0.1}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 5}}),
    ("phi", {"target_modules": ["q_proj", "v_proj", "k_proj", "dense", "fc1", "fc2"], "lora_dropout": 0.1}),
    ("phi", {"target_modules": "all-linear"}), ("phi", {"target_modules": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 5}, "alpha_pattern": {"q_proj": 20}}),
]


def evaluate_held_out(model, folder, rows):
    tokenizer, rows = data.load_tokenizer(str(folder)), read_rows(rows)
    found = data.build(rows, tokenizer, data.load_template("auto", tokenizer), 128)
    return evaluate(model, found, TrainConfig(device="cpu", max_length=128), tokenizer)["val_loss"]


@pytest.mark.parametrize(("family", "options"), FROM_PEFT, ids=str)
def test_peft_adapter_in_ours(folders, tmp_path, family, options):
    peft = pytest.importorskip("peft")
    base = hf_model(folders[family])
    before = logits(base)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=10, **options))
    randomise_adapters(theirs).save_pretrained(tmp_path, save_embedding_layers=False)  # of lm_head only A and B, not W
    ours = peft_files.load(weights.load(folders[family]), tmp_path)
    assert_same(logits(ours), logits(theirs), before)
    assert {m.dropout for m in lora.adapters(ours).values()} == {options.get("lora_dropout", 0.0)}
    assert all(p.requires_grad == ("lora_" in n) for n, p in ours.named_parameters())
    rows, val = make_data(tmp_path / "rows.jsonl", 12), make_data(tmp_path / "val.jsonl", 4)
    wanted = evaluate_held_out(ours, folders[family], val)
    found = main(TrainConfig(model=str(folders[family]), data=str(rows), val_data=str(val),
                                         adapter=str(tmp_path), out=str(tmp_path / "run"), steps=1, samples=0, device="cpu",
                                         max_length=128))
    assert found["loss"]["val_before"] == wanted  # a second stage starts where PEFT's adapter is
    peft_files.save(ours, tmp_path / "again")
    assert_same(logits(peft_files.load(weights.load(folders[family]), tmp_path / "again")), logits(ours))


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_survives(folders, tmp_path, rslora):
    """litgpt#629: r, alpha, dropout and rsLoRA of every layer are read back, also for GPT-2's q and v."""
    before = adapted(folders["gpt2"], r=3, alpha=11, dropout=0.2, rslora=rslora)
    peft_files.save(before, tmp_path)
    after = peft_files.load(weights.load(folders["gpt2"]), tmp_path)
    for name, a in lora.adapters(before).items():
        b = lora.adapters(after)[name]
        assert (b.r, b.parts, b.rslora, b.dropout) == (3, ("q", "v"), rslora, 0.2)
        assert b.alpha == pytest.approx(11) and b.scale == pytest.approx(a.scale)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["lora_alpha"] == pytest.approx(11 * (2 ** 0.5 if rslora else 2))


def test_reload_in_a_fresh_process(folders, tmp_path):
    """qlora#44: there the adapter file was empty."""
    code = ("import sys, torch\nfrom files import peft_files, weights\n"
            "*pairs, out = sys.argv[1:]\n"
            "ids = torch.load(out)\n"
            "models = [peft_files.load(weights.load(m), a) for m, a in zip(pairs[::2], pairs[1::2])]\n"
            "torch.save([m.eval()(ids).detach() for m in models], out)")
    pairs, wanted = [], []
    for family in ("gpt2", "llama", "phi"):
        model = adapted(folders[family])
        peft_files.save(model, tmp_path / family)
        pairs += [folders[family], tmp_path / family]
        wanted.append((logits(model), logits(weights.load(folders[family]))))
    torch.save(IDS, tmp_path / "io.pt")
    subprocess.run([sys.executable, "-c", code, *map(str, pairs), str(tmp_path / "io.pt")], cwd=ROOT, check=True)
    for got, (expected, base) in zip(torch.load(tmp_path / "io.pt"), wanted, strict=True):
        assert_same(got, expected, base)


# ---------------------------------------------------------------------------------------------- broken adapters

KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def drop(t, key):
    t.pop(key)


def rename(t, key):
    t[key.replace("layers.1", "layers.7")] = t.pop(key)


def foreign(t, key):
    t[key.replace("lora_", "lora_embedding_")] = t[key].clone()


def longer(t, key):
    t[key] = torch.cat([t[key], t[key]], 0 if "lora_B" in key else 1)


@pytest.mark.parametrize(("damage", "named"), [
    (drop, "layers.1.self_attn.q_proj"), (rename, "layers.7"), (foreign, "lora_embedding_"),
    (longer, "layers.1.self_attn.q_proj"),
])
@pytest.mark.parametrize("kind", ["A", "B"])
def test_damaged_adapter_is_refused(folders, tmp_path, damage, named, kind):
    """peft#1678: missing and unexpected tensors are both refused, by name."""
    peft_files.save(adapted(folders["llama"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors, KEY.format(kind))
    save_file(tensors, file)
    with pytest.raises(UserError) as e:
        peft_files.load(weights.load(folders["llama"]), tmp_path)
    assert named in str(e.value) and file.name in str(e.value)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("changes", "named"), [
    ({"use_dora": True}, "has lora_A and lora_B only"), ({"peft_type": "IA3"}, "lora_A.weight has no place"),
    ({"peft_type": "LOHA"}, "'LOHA' is not implemented"), ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"r": 5}, "rank"), ({"peft_type": ["LORA"]}, "peft_type"),
    *(({key: value}, f"adapter_config.json: {key} must be an? ") for key, values in {
        "r": [0, -1, 3.0, "3", True, [3], 10**400, float("nan")],
        "lora_alpha": [0, -7, 3.2e10, "7", True, float("nan"), float("inf"), 10**400],
        "lora_dropout": [-0.1, 1, "0", float("nan")]}.items() for value in values),
    *(({key: None}, f"adapter_config.json: {key} is missing") for key in ("r", "lora_alpha")),
    ({"use_rslora": 1}, "use_rslora must be true or false"), ({"target_modules": {}}, "target_modules must be a list"),
    ({"target_modules": ["q_proj", 1]}, "a name in target_modules must be text"), ({"bias": True}, "bias must be text"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base weights"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' must be an integer from 1"),
    ({"alpha_pattern": {"q_proj": "7"}}, "alpha_pattern of 'q_proj' must be a number from 1e-12"),
    ({"alpha_pattern": {"q.proj": 7}}, "alpha_pattern: 'q.proj' names no layer of this model"),
    ({"alpha_pattern": dict.fromkeys(map(str, range(1000)), 7)}, "alpha_pattern has 1,000 patterns, and the model 22"),
    *(({"alpha_pattern": {p: 7}}, "alpha_pattern: pattern '.*' is not implemented") for p in (
        "(a+)+", "([a-z]+)*x", "(.*)*_proj", "(a|a)" * 40, "q_proj|layers.(0|1).v_proj", "((q|v)_proj)", "q_proj$$", "(q",
        "[q]_proj", "\\d", "q_proj\n")),
])
def test_adapter_config_that_cannot_be_honoured_is_refused(folders, tmp_path, changes, named):
    peft_files.save(adapted(folders["llama"]), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=named):
        peft_files.load(weights.load(folders["llama"]), tmp_path)


PATTERNS = ["q_proj", "self_attn.q_proj", r"layers\.1\.self_attn\.q_proj", "layers.(0|2).self_attn.(q|v)_proj",
            "^model.layers.1.mlp.up_proj", "^model.layers.1.mlp.up_proj$", "(q|k)_proj", "up_proj|down_proj", "lm_head"]


def test_patterns_mean_what_they_mean_in_peft(folders, tmp_path):
    """Every pattern alone, and all of them in an order in which later ones match what earlier ones have taken."""
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key
    layers = [n for n, m in weights.load(folders["llama"]).named_modules() if lora.is_linear(m)]
    for patterns in (*([p] for p in PATTERNS), PATTERNS, PATTERNS[::-1]):
        values = {p: i + 1 for i, p in enumerate(patterns)}
        got = peft_files.by_layer(values, layers, tmp_path, "rank_pattern", int, peft_files.RANK)
        assert got and got == {n: values[key] for n in layers if (key := get_pattern_key(patterns, n)) in values}


@pytest.mark.parametrize(("change", "named"), [
    (lambda t: t.int(), "holds torch.int32"), (lambda t: t > 0, "holds torch.bool"), (lambda t: t * torch.nan, "not finite"),
    (lambda t: t / 0, "not finite"), (lambda t: t.flatten(), "its adapter"), (lambda t: t[:0], "its adapter"),
    (lambda t: t.to(torch.complex64), "holds torch.complex64"),
])
@pytest.mark.parametrize("kind", ["A", "B"])
def test_adapter_of_numbers_that_cannot_be(folders, tmp_path, change, named, kind):
    peft_files.save(adapted(folders["llama"]), tmp_path)
    file, key = tmp_path / "adapter_model.safetensors", KEY.format(kind)
    save_file({k: change(t).contiguous() if k == key else t for k, t in load_file(file).items()}, file)
    with pytest.raises(UserError, match=named) as e:
        peft_files.load(weights.load(folders["llama"]), tmp_path)
    assert file.name in str(e.value) and "layers.1.self_attn.q_proj" in str(e.value)


@pytest.mark.parametrize(("metadata", "named"), [
    ({"bits": "x"}, "'x' bits"), ({"bits": "5"}, "'5' bits"), ({"init": "svd"}, "'svd'"), ({"parts": "{"}, "not valid JSON"),
    ({"parts": "[]"}, "lists of names"), ({"parts": '{"h.0.attn.c_attn": 3}'}, "lists of names"),
    ({"parts": '{"h.0.attn.c_attn": ["q", "x"]}'}, "no such parts"), ({"parts": "[" * 9999}, "nested too deeply"),
    ({"parts": '{"h.0.attn.c_attn": ["v", "q"]}'}, "no such parts"), ({"parts": '{"h.0.attn.c_proj": ["q"]}'}, None),
])
def test_metadata_that_cannot_be(folders, tmp_path, metadata, named):
    ours = adapted(folders["gpt2"])
    peft_files.save(ours, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    for old in (False, True):  # earlier versions wrote a key for each entry
        if old:
            save_file(load_file(file), file, {"init": "default", "bits": "32", **metadata})
        else:
            writing.write_tensors(file, load_file(file), {"init": "default", "bits": "32", **metadata})
        if named:
            with pytest.raises(UserError, match=named):
                peft_files.load(weights.load(folders["gpt2"]), tmp_path)
        else:
            assert_same(logits(peft_files.load(weights.load(folders["gpt2"]), tmp_path)), logits(ours))


def test_layer_of_the_config_without_tensors_is_refused(folders, tmp_path):
    """peft#1678: the adapter of a whole layer is missing."""
    peft_files.save(adapted(folders["llama"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "layers.1.self_attn.q_proj" not in k}, file)
    with pytest.raises(UserError, match="layers.1.self_attn.q_proj"):
        peft_files.load(weights.load(folders["llama"]), tmp_path)


def test_adapter_of_another_model_is_refused(folders, tmp_path):
    peft_files.save(adapted(folders["gpt2"]), tmp_path)
    with pytest.raises(UserError, match="c_attn"):
        peft_files.load(weights.load(folders["llama"]), tmp_path)


def test_nothing_to_save(folders, tmp_path):
    with pytest.raises(UserError, match="no adapters"):
        peft_files.save(weights.load(folders["llama"]), tmp_path)


# ---------------------------------------------------------------------------------------------- merging

@pytest.mark.parametrize(("kind", "options"), [
    ("gpt2", {}), ("gpt2", {"targets": "all", "rslora": True}), ("llama", {"targets": "all"}), ("tied llama", {}),
    ("llama", {"targets": ["lm_head"]}), ("phi", {"targets": "all"}), ("phi", {"targets": ["lm_head"]}),
], ids=["gpt2", "gpt2-all", "llama-all", "tied", "lm_head", "phi-all", "phi-lm_head"])
def test_merge_is_exact_and_idempotent(folders, kind, options):
    """microsoft/LoRA#34: merging is explicit, and a second call changes nothing."""
    model, base = adapted(folders[kind], **options), logits(weights.load(folders[kind]))
    before = logits(model)
    for _ in range(2):
        assert lora.merge(model) is model and not lora.adapters(model)
        assert_same(logits(model), before, base, MERGED)


def test_eval_and_train_do_not_merge(folders):
    """microsoft/LoRA#34: there eval() merged as a side effect."""
    model = adapted(folders["llama"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    for mode in (False, True, False, False, True, True):
        model.train(mode)(IDS)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@FAMILIES
def test_merge_into_16_bit_is_refused(folders, family):
    model = adapted(folders[family], bits=16)
    before = logits(model)
    with pytest.raises(UserError, match="bits=32"):
        lora.merge(model)
    assert lora.adapters(model) and torch.equal(logits(model), before)


@pytest.mark.parametrize(("kind", "targets"), [("gpt2", None), ("tied llama", "all"), ("phi", "all"), ("phi", ["lm_head"])])
def test_merge_command(folders, tmp_path, kind, targets):
    """peft#2018: the merged model, also with a tied head, gives the same logits here and in transformers."""
    folder = shutil.copytree(folders[kind], tmp_path / "base")
    model = adapted(folder, targets=targets)
    peft_files.save(model, tmp_path / "adapter")
    base_replies, replies = {"temperature": 0.6, "eos_token_id": 1}, {"eos_token_id": [4095]}
    (folder / "generation_config.json").write_text(json.dumps(base_replies))
    (tmp_path / "adapter" / "generation_config.json").write_text(json.dumps(replies))
    out = tmp_path / "merged"
    argv = ["merge", "--model", str(folder), "--adapter", str(tmp_path / "adapter"), "--out", str(out)]
    if kind == "gpt2":  # once as a command; a new process takes seconds
        subprocess.run([sys.executable, "export.py", *argv], cwd=ROOT, check=True)
    else:
        export.main(argv)
    merged = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in merged) == ("lm_head.bias" in merged) == (kind == "phi") and (out / "merges.txt").is_file()
    assert json.loads((out / "generation_config.json").read_text()) == {**base_replies, **replies}
    assert ModelCard((out / "README.md").read_text()).data.base_model == "base"
    base = logits(weights.load(folder))
    assert_same(logits(weights.load(out)), logits(model), base, MERGED)
    assert_same(logits(hf_model(out)), logits(model), base, MERGED)


@pytest.mark.parametrize("kind", ["gpt2", "tied llama"])
def test_merge_unties_an_adapted_head(folders, tmp_path, kind):
    """peft#2018: an adapter of the head alone must not be merged into the embedding that shares its matrix."""
    model = adapted(folders[kind], targets=["lm_head"])
    peft_files.save(model, tmp_path / "adapter")
    out = tmp_path / "merged"
    export.main(["merge", "--model", str(folders[kind]), "--adapter", str(tmp_path / "adapter"), "--out", str(out)])
    embedding = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    merged, base = load_file(out / "model.safetensors"), load_file(folders[kind] / "model.safetensors")
    assert torch.equal(merged[embedding], base[embedding])
    assert (merged["lm_head.weight"] - base[embedding]).abs().max() > 0.1
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same(logits(weights.load(out)), logits(model), logits(weights.load(folders[kind])), MERGED)
    assert_same(logits(hf_model(out)), logits(model), tolerance=MERGED)


def test_merge_into_float16_that_cannot_hold_a_weight(folders, tmp_path):
    folder = make_folder(tmp_path / "m", "llama")
    model = adapted(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 7e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    peft_files.save(model, tmp_path / "a")
    argv = ["merge", "--model", str(folder), "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "out"), "--dtype"]
    with pytest.raises(UserError, match=f"{folder}: tensor model.norm.weight: 70000 is too large for float16; use float32"):
        export.main([*argv, "float16"])
    assert not (tmp_path / "out").exists()
    export.main([*argv, "bfloat16"])


def test_merge_command_in_16_bit_and_into_an_existing_folder(folders, tmp_path):
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    peft_files.save(adapted(folders["llama"]), adapter)
    argv = ["merge", "--model", str(folders["llama"]), "--adapter", str(adapter), "--out", str(out)]
    export.main([*argv, "--dtype", "bfloat16"])
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="not empty"):
        export.main(argv)


# ---------------------------------------------------------------------------------------------- precision and dropout

def train(model, lr, steps):
    """Train with AdamW and bfloat16 autocast; the loss of each step."""
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss.sum_loss(model.train().hidden(IDS), model.head, IDS)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@FAMILIES
def test_adapters_are_float32_over_16_bit_weights(folders, tmp_path, family):
    """peft#1706: both when injected and when loaded."""
    model = adapted(folders[family], bits=16)
    peft_files.save(model, tmp_path)
    for m in (model, peft_files.load(weights.load(folders[family], bits=16), tmp_path)):
        assert {p.dtype for n, p in m.named_parameters() if "lora_" in n} == {torch.float32}
        assert all(p.dtype == held_dtype(p) for n, p in m.named_parameters() if "lora_" not in n)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


def test_fp16_gradients_can_be_unscaled(folders, on_device):
    """peft#1706: "Attempting to unscale FP16 gradients"."""
    on_device(half=torch.float16)
    model = adapted(folders["gpt2"], bits=16)
    assert model.wte.weight.dtype == torch.float16
    trainable = [p for p in model.parameters() if p.requires_grad]
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=4.0), torch.optim.SGD(trainable, lr=1.0)
    with torch.autocast("cpu", torch.float16):
        value = loss.sum_loss(model.hidden(IDS), model.head, IDS)
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in trainable)


@FAMILIES
@pytest.mark.parametrize("bits", [16, 32])
def test_tiny_updates_arrive(folders, family, bits):
    """VersatIL#5: in bfloat16 weights, an update of 1e-6 would be rounded away."""
    model = adapted(folders[family], bits=bits, targets="all")
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, lr=1e-6, steps=1)
    for n, p in model.named_parameters():
        moved = (p != before[n]).float().mean()
        assert moved > 0.9 if "lora_" in n else moved == 0, n


@FAMILIES
def test_training_with_adapters_lowers_the_loss(folders, family):
    torch.manual_seed(0)  # the adapters' start is random
    model = lora.inject(weights.load(folders[family], bits=16), r=4, targets="all")
    losses = train(model, lr=1e-2, steps=12)
    assert losses[-1] < 0.8 * losses[0]


@FAMILIES
def test_dropout_is_on_in_training_and_off_in_evaluation(folders, family):
    """nanoGPT#240: there dropout stayed on in evaluation."""
    model, plain = adapted(folders[family], dropout=0.5), adapted(folders[family], dropout=0.0)
    assert torch.equal(logits(model), logits(model)) and torch.equal(logits(model), logits(plain))
    model.train()
    with torch.no_grad():
        assert (model(IDS) - model(IDS)).abs().max() > 0.01
