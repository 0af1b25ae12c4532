"""export.py combine: sums of adapters, against PEFT's add_weighted_adapter."""
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from safetensors.torch import load_file, save_file

import export
import lora
from errors import UserError
from files import combining, peft_files, weights
from methods import dora, ia3

IDS = torch.arange(1, 24)[None] * 37 % 4000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("combine")
    return {family: make_folder(place / family, family) for family in ("gpt2", "llama")}


def adapter(base, to, seed=1, **options) -> Path:
    """A folder with a random adapter, as Bytewise saves it."""
    model = lora.inject(weights.load(base), **{"r": 4, "alpha": 8, **options})
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in lora.adapters(model).values():
            for p in (m.lora_A, *m.lora_B):
                p.copy_(torch.randn(p.shape, generator=rng) / p.shape[1] ** 0.5)
    peft_files.save(model, to)
    return Path(to)


def deltas(base, folder) -> dict:
    return {n: m.delta().detach() for n, m in peft_files.read(weights.load(base), folder).items()}


def combine(base, out, *adapters, **options):
    words = [x for text in adapters for x in ("--adapter", str(text))]
    export.main(["combine", "--model", str(base), *words, "--out", str(out),
                 *(str(x) for name, value in options.items() for x in (f"--{name}", value))])
    return Path(out)


def in_peft(base, folders, factors, how, rank=None):
    """PEFT's model with its own combination of the adapters."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for i, folder in enumerate(folders):
        model = model.load_adapter(folder, str(i)) and model if i else peft.PeftModel.from_pretrained(model, folder, "0")
    model.add_weighted_adapter([str(i) for i in range(len(folders))], factors, "sum", how, svd_rank=rank)
    model.set_adapter("sum")
    return model.eval()


def peft_deltas(model) -> dict:
    return {n.removeprefix("base_model.model.").removeprefix("transformer."): m.get_delta_weight("sum").detach()
            for n, m in model.named_modules() if hasattr(m, "get_delta_weight") and "sum" in m.lora_A}


def assert_close(a: dict, b: dict):
    assert a.keys() == b.keys()
    for n in a:
        assert (a[n] - b[n]).abs().max() < 1e-5 * max(1, b[n].abs().max()), n
    assert max(d.abs().max() for d in b.values()) > 0.1


CASES = {  # options of the two adapters
    "same": ({}, {}), "scales": ({"alpha": 3}, {"alpha": 20}), "ranks": ({"r": 2}, {"r": 5}),
    "layers": ({"targets": ["q_proj", "down_proj"]}, {"targets": ["q_proj", "v_proj"]}),
    "whole": ({"targets": "all"}, {"targets": "all"})}


@pytest.mark.parametrize("how", combining.HOW)
@pytest.mark.parametrize(("family", "case"), [("llama", "same"), ("llama", "scales"), ("llama", "ranks"),
                                              ("llama", "layers"), ("gpt2", "same"), ("gpt2", "scales"), ("gpt2", "whole")])
def test_the_sum_is_pefts(family, case, how, folders, tmp_path):
    if (case, how) == ("ranks", "linear"):
        pytest.skip("linear needs equal ranks")
    base = folders[family]
    a, b = (adapter(base, tmp_path / str(i), i, **o) for i, o in enumerate(CASES[case]))
    out = combine(base, tmp_path / "out", f"{a}:0.7", f"{b}:-0.3", how=how)
    theirs = in_peft(base, [a, b], [0.7, -0.3], how)
    assert_close(deltas(base, out), peft_deltas(theirs))
    model = peft_files.load(weights.load(base), out).eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert (model(IDS) - expected).abs().max() < 1e-4 * expected.std()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out).eval()
    with torch.no_grad():
        assert (again(IDS).logits - expected).abs().max() < 1e-4 * expected.std(), "as PEFT reads the files"


def test_cat_is_the_weighted_sum_of_three_with_rslora_and_parts(folders, tmp_path):
    """Rank-stabilised first: PEFT's own sum would be sqrt(rank) too large (its new adapter keeps use_rslora)."""
    base = folders["gpt2"]
    three = [adapter(base, tmp_path / "a", 1, rslora=True, r=2), adapter(base, tmp_path / "b", 2, targets="c_attn", r=3),
             adapter(base, tmp_path / "c", 3, targets=["c_attn.k"])]
    out = combine(base, tmp_path / "out", f"{three[0]}:0.5", three[1], f"{three[2]}:-2e-1")
    parts = [deltas(base, f) for f in three]
    assert_close(deltas(base, out), {n: 0.5 * parts[0][n] + parts[1][n] - 0.2 * parts[2][n] for n in parts[0]})
    assert not json.loads((out / "adapter_config.json").read_text())["use_rslora"]


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_equal_parts_stay_parts(how, folders, tmp_path):
    base = folders["gpt2"]
    a, b = (adapter(base, tmp_path / str(i), i) for i in (1, 2))
    out = combine(base, tmp_path / "out", a, b, how=how)
    assert peft_files.options(out, str(base))["lora_targets"] == "c_attn.q,c_attn.v"
    assert peft_files.options(out, str(base))["lora_r"] == {"cat": 8, "linear": 4}[how]


def test_svd_has_the_rank_asked_for_and_says_what_is_missed(folders, tmp_path, capsys):
    base = folders["llama"]
    a, b = (adapter(base, tmp_path / str(i), i) for i in (1, 2))
    out = combine(base, tmp_path / "out", a, b, how="svd", rank=3)
    missed = float(capsys.readouterr().out.split("misses the sum by ")[1].split(" %")[0])
    off = size = 0
    for n, D in deltas(base, a).items():
        D = D + deltas(base, b)[n]
        S = torch.linalg.svdvals(D)
        off, size = off + S[3:].square().sum(), size + S.square().sum()
        mine = deltas(base, out)[n]
        assert torch.linalg.svdvals(mine)[3] < 1e-5 and math.isclose((D - mine).norm(), S[3:].norm(), rel_tol=1e-4)
    assert 1 < missed < 100 and missed == pytest.approx(100 * float(off / size) ** 0.5, rel=0.05)
    assert deltas(base, combine(base, tmp_path / "one", a, how="svd")).keys() == deltas(base, a).keys()


def test_linear_of_equal_halves_is_exact_and_of_others_is_not(folders, tmp_path, capsys):
    base = folders["llama"]
    a, b = (adapter(base, tmp_path / str(i), i) for i in (1, 2))
    assert_close(deltas(base, combine(base, tmp_path / "half", f"{a}:0.5", how="linear")),
                 {n: d / 2 for n, d in deltas(base, a).items()})
    assert float(capsys.readouterr().out.split("misses the sum by ")[1].split(" %")[0]) < 1e-4
    combine(base, tmp_path / "two", a, b, how="linear")
    assert float(capsys.readouterr().out.split("misses the sum by ")[1].split(" %")[0]) > 10


def test_a_pissa_adapter_adds_what_training_added(folders, tmp_path):
    base = folders["llama"]
    model = weights.load(base)
    lora.inject(model, r=3, init="pissa", stored=weights.StoredWeights(str(base)).read)
    with torch.no_grad():
        for m in lora.adapters(model).values():
            m.lora_A.mul_(1.1)
            m.lora_B[0].add_(0.05)
    expected = {n: (m.delta() - m.start_delta()).detach() for n, m in lora.adapters(model).items()}
    peft_files.save(model, tmp_path / "p")
    plain = adapter(base, tmp_path / "a")
    got = deltas(base, combine(base, tmp_path / "out", tmp_path / "p", f"{plain}:2"))
    assert_close(got, {n: d + 2 * deltas(base, plain)[n] for n, d in expected.items()})
    assert peft_files.trained_with(tmp_path / "out") == ("default", 32)


def test_what_a_folder_needs_comes_from_the_first_adapter(folders, tmp_path, capsys):
    base = folders["llama"]
    a, b = (adapter(base, tmp_path / str(i), i) for i in (1, 2))
    for folder, text in ((a, "first"), (b, "second")):
        (folder / "chat_template.jinja").write_text(text)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4095]}))
    (a / "odd:1").mkdir()
    out = combine(base, tmp_path / "out", f"{a}:0.25", b)
    assert (out / "chat_template.jinja").read_text() == "first" and (out / "generation_config.json").is_file()
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in out.iterdir()}
    readme = (out / "README.md").read_text()
    assert "library_name: peft" in readme and "* 0.25 times `1`\n* 1 times `2`\n" in readme and str(tmp_path) not in readme
    assert "rank 8" in capsys.readouterr().out
    assert export.weighted(str(a / "odd:1")) == (str(a / "odd:1"), 1.0)
    assert export.weighted(f"{a / 'odd:1'}:3") == (str(a / "odd:1"), 3.0)
    assert not list((base).glob("*combine*"))


def test_no_weights_are_read(folders, tmp_path):
    base = tmp_path / "only-a-config"
    base.mkdir()
    (base / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    a = adapter(folders["llama"], tmp_path / "a")
    assert_close(deltas(folders["llama"], combine(base, tmp_path / "out", f"{a}:2")),
                 {n: 2 * d for n, d in deltas(folders["llama"], a).items()})


@pytest.mark.parametrize(("words", "said"), [
    (["A:x"], "A:x: the weight 'x' is not a number"), (["A:nan"], "'nan' is not a number"), (["A:inf"], "'inf' is not"),
    (["A:"], "the weight '' is not a number"), (["A:1e9"], "'1e9' is not a number from -1e6 to 1e6"),
    (["none"], "none/adapter_config.json: No such file"),
    (["A", "R", "--how", "linear"], "layer model.layers.0.self_attn.q_proj has the ranks 4 and 2"),
    (["A", "GPT"], "tensor base_model.model.transformer.h.0.attn.c_attn.lora_A.weight has no place"),
    (["A", "DORA"], "DORA holds a DoRA adapter"), (["IA3", "A"], "IA3 holds an adapter of --method ia3"),
    (["A", "LOFTQ"], "LOFTQ was trained with --lora-init loftq over weights in 4 bit"),
    (["A", "PISSA4"], "PISSA4 was trained with --lora-init pissa over weights in 4 bit"),
    (["A", "--rank", "3"], "--rank has no effect with --how cat"),
    (["A", "--how", "svd", "--rank", "0"], "--rank 0: must be"),
    (["A", "A", "--how", "svd", "--rank", "9"], "--rank 9: the sum of these adapters has at most rank 8"),
    (["HUGE:1e6"], "layer model.layers.0.self_attn.q_proj: the sum is too large for float32"),
    (["A", "--out", "full"], "full exists and is not empty")])
def test_refusals_are_one_line_and_leave_nothing(words, said, folders, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    found = [x if x.startswith("-") or w.startswith("-") else f"--adapter={x}" for w, x in zip(["", *words], words)]
    with pytest.raises(UserError, match=said) as e:
        export.main(["combine", "--model", str(folders["llama"]), *found, *out])
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir()) and not list(place.glob(".*tmp*"))


@pytest.fixture(scope="module")
def place(folders, tmp_path_factory):
    place, base = tmp_path_factory.mktemp("adapters"), folders["llama"]
    a = adapter(base, place / "A")
    adapter(base, place / "R", r=2)
    adapter(folders["gpt2"], place / "GPT")
    peft_files.save(dora.inject(weights.load(base)), place / "DORA")
    peft_files.save(ia3.inject(weights.load(base)), place / "IA3")
    for init in ("loftq", "pissa"):
        model = weights.load(base, bits=4)
        lora.inject(model, r=2, init=init, stored=weights.StoredWeights(str(base)).read)
        peft_files.save(model, place / {"loftq": "LOFTQ", "pissa": "PISSA4"}[init])
    (place / "HUGE").mkdir()
    (place / "HUGE" / "adapter_config.json").write_bytes((a / "adapter_config.json").read_bytes())
    save_file({k: 1e37 * v for k, v in load_file(a / "adapter_model.safetensors").items()},
              place / "HUGE" / "adapter_model.safetensors")
    (place / "full" / "x").mkdir(parents=True)
    return place
