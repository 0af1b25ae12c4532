"""methods/dora.py, ia3.py, bottleneck.py, and --lora-plus: PEFT both ways, gradients, merging, memory, --resume."""
import copy
import json

import pytest
import torch
from conftest import make_data, make_folder
from runs import no_picture, run, steps, timeless
from safetensors.torch import load_file, save_file
from test_lora import IDS, MERGED, adapted, assert_same, hf_model, logits
from test_predict import InProcess, assert_predicted

import data
import export
import gpt2
import lora
import memory
import train
from errors import UserError
from files import peft_files, weights, writing
from files.rows import read_rows
from ledger import ask
from methods import bottleneck, dora, ia3, prefix, prompt
from run import prepare
from techniques import half
from techniques.device import device_of
from techniques.loss import token_loss
from techniques.optim import OPTIMIZERS

METHODS = {"dora": dora.inject, "ia3": ia3.inject, "bottleneck": bottleneck.inject}
EACH = pytest.mark.parametrize("method", METHODS)
SMALL = {"bottleneck": {"size": 8}, "dora": {"r": 3, "alpha": 7}, "ia3": {}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models and data. The tests share them, so none of them may write into them."""
    root = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "llama", "phi"):
        make_folder(root / family, family)
    make_data(root / "data.jsonl", 20)
    make_data(root / "val.jsonl", 3)
    return {name: root / name for name in ("gpt2", "llama", "phi", "data.jsonl", "val.jsonl")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    no_picture(monkeypatch)


def randomise(model, seed=3):
    """Move what is trained far from where it starts. Lengths and factors: by some 30 %."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if "lora_magnitude" in n or "magnitude" in n or "factor" in n or "ia3_l" in n:
                p.mul_(1 + 0.3 * noise)
            elif p.requires_grad:
                p.copy_(0.5 * noise / p.shape[-1] ** 0.5)
    return model


def changed(folder, method, bits=32, **options):
    return randomise(METHODS[method](weights.load(folder, bits=bits), **{**SMALL[method], **options}))


def as_peft(folder, config):
    peft = pytest.importorskip("peft")
    return randomise(peft.get_peft_model(hf_model(folder), config(peft)))


# ---------------------------------------------------------------------------------------------- PEFT, both ways

@pytest.mark.parametrize(("family", "method", "options"), [
    ("gpt2", "dora", {}), ("gpt2", "dora", {"targets": ["c_attn"]}), ("gpt2", "dora", {"targets": "all", "rslora": True}),
    ("llama", "dora", {"targets": "all"}), ("phi", "dora", {"targets": "all", "rslora": True}),
    ("gpt2", "ia3", {}), ("llama", "ia3", {}), ("phi", "ia3", {})], ids=str)
def test_our_file_in_peft_and_back(folders, tmp_path, family, method, options):
    peft, ours = pytest.importorskip("peft"), changed(folders[family], method, **options)
    peft_files.save(ours, tmp_path)
    base = hf_model(folders[family])
    before = logits(base)
    assert_same(logits(peft.PeftModel.from_pretrained(base, tmp_path)), logits(ours), before, 3e-5)
    back = peft_files.load(weights.load(folders[family]), tmp_path)
    assert torch.equal(logits(back), logits(ours)) and back.method == method
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {n: p.requires_grad
                                                                       for n, p in ours.named_parameters()}


@pytest.mark.parametrize(("family", "config"), [
    ("gpt2", lambda peft: peft.LoraConfig(use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    ("llama", lambda peft: peft.LoraConfig(use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"])),
    ("phi", lambda peft: peft.LoraConfig(use_dora=True, r=4, lora_alpha=10, target_modules=["dense", "v_proj"])),
    *((family, lambda peft: peft.IA3Config(task_type="CAUSAL_LM")) for family in ("gpt2", "llama", "phi"))],
    ids=["gpt2-dora", "llama-dora", "phi-dora", "gpt2-ia3", "llama-ia3", "phi-ia3"])
def test_a_file_of_peft_here(folders, tmp_path, family, config):
    """Where PEFT's IA3 puts factors is its choice: all of c_attn; in Phi q, v and fc2."""
    theirs = as_peft(folders[family], config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = peft_files.load(weights.load(folders[family]), tmp_path)
    assert_same(logits(ours), logits(theirs), logits(hf_model(folders[family])), 3e-5)
    peft_files.save(ours, tmp_path / "again")
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == \
        load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
    assert torch.equal(logits(peft_files.load(weights.load(folders[family]), tmp_path / "again")), logits(ours))


@pytest.mark.parametrize(("family", "targets"), [("gpt2", None), ("gpt2", "all"), ("llama", "all")])
def test_doras_gradients_are_pefts(folders, tmp_path, family, targets):
    """The length is a constant in backward. If it were not, A's and B's gradients would have another direction."""
    peft, ours = pytest.importorskip("peft"), changed(folders[family], "dora", targets=targets)
    peft_files.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(hf_model(folders[family]), tmp_path, is_trainable=True)
    for model in (ours.double(), theirs.double()):  # (the lengths are still float32's: 3e-5 was observed)
        out = model(IDS)
        out = out if isinstance(out, torch.Tensor) else out.logits
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, m in lora.adapters(ours).items():
        its = theirs.get_submodule(f"base_model.model.{weights.checkpoint_name(ours, name)}")
        m_grad = its.lora_magnitude_vector["default"].weight.grad
        wanted = [its.lora_A["default"].weight.grad, *(m_grad[rows] for rows in m.rows()),
                  *(b[rows] for rows, b in zip(m.rows(), its.lora_B["default"].weight.grad.split(m.r, 1)))]
        for a, b in zip([m.lora_A.grad, *(p.grad for p in m.magnitude), *(p.grad for p in m.lora_B)], wanted, strict=True):
            assert b.any() and (a - b).norm() < 2e-4 * b.norm(), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_ia3s_gradients_are_pefts(folders, tmp_path, family):
    peft, ours = pytest.importorskip("peft"), changed(folders[family], "ia3")
    peft_files.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(hf_model(folders[family]), tmp_path, is_trainable=True).double()
    (ours.double()(IDS).logsumexp(-1).sum() + theirs(IDS).logits.logsumexp(-1).sum()).backward()
    for name, m in lora.layers(ours).items():
        its = theirs.get_submodule(f"base_model.model.{weights.checkpoint_name(ours, name)}").ia3_l["default"].grad.flatten()
        own = its[32:] if m.parts else its  # k and v, of GPT-2's q, k and v
        assert own.any() and (m.factor.grad - own).norm() < 1e-5 * own.norm(), name


def test_bottleneck_is_its_equation(folders):
    """Output and gradients, that of the input too, against the docstring's line with nothing of bottleneck.py in it."""
    model = changed(folders["phi"], "bottleneck").double()
    for m in lora.layers(model).values():
        x, W, b = torch.randn(5, m.base_layer.in_features).double().requires_grad_(), m.weight, m.bias
        own = [m.down, m.down_bias, m.up, m.up_bias]
        y = x @ W.t() + b
        z = y @ m.down.t() + m.down_bias
        wanted = y + z * 0.5 * (1 + torch.erf(z / 2**0.5)) @ m.up.t() + m.up_bias
        torch.testing.assert_close(m(x), wanted)
        for a, b in zip(*(torch.autograd.grad(out.square().sum(), [x, *own]) for out in (m(x), wanted)), strict=True):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------- bits and the start

@EACH
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_starts_at_the_model_itself(folders, family, bits, method):
    for amp in (False, True) if bits != 16 else (True,):
        model = weights.load(folders[family], bits=bits)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            base = logits(model)
            METHODS[method](model, **SMALL[method])
            assert torch.equal(logits(model), base)
            changed_to = logits(randomise(model))
            assert not torch.equal(changed_to, base) and changed_to.dtype == base.dtype
            for m in lora.layers(model).values():  # a float32 parameter must not make a 16-bit layer's output float32
                x = torch.randn(2, m.base_layer.in_features, dtype=torch.bfloat16 if amp else torch.float32)
                assert m(x).dtype == m.base_layer(x).dtype


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dora_is_its_equation(folders, family, bits):
    """m V / |V| from the dequantised weight, V made as a whole. The norm is float32, also under autocast."""
    model = changed(folders[family], "dora", bits=bits, targets=None if family == "gpt2" else "all")
    for m in lora.adapters(model).values():
        W, x = dora.rows_of(m.base_layer).double(), torch.randn(5, m.base_layer.in_features)
        V = W + m.scale * (m.B() @ m.lora_A).double()
        for dtype in (None, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                lengths, y = m.lengths(), m(x.to(dtype or (m.weight.dtype if bits == 16 else torch.float32)))
            assert lengths.dtype == torch.float32
            torch.testing.assert_close(lengths.double(), V.norm(dim=1), rtol=1e-5, atol=0)
            whole = V.norm(dim=1)
            for rows, own in zip(m.rows(), m.magnitude):
                whole[rows] = own.double()
            wanted = x.double() @ (whole / V.norm(dim=1))[:, None].mul(V).t() + (0 if m.bias is None else m.bias.double())
            exact = dtype is None and y.dtype == torch.float32
            assert (y.double() - wanted).abs().max() <= (1e-5 if exact else 0.05) * wanted.std()


def test_doras_norm_converts_a_16_bit_weight_by_pieces(folders, monkeypatch, on_device):
    on_device()
    monkeypatch.setattr(half, "CHUNK", 64)  # two rows of 32
    model = changed(folders["llama"], "dora", bits=16)
    for m in lora.adapters(model).values():
        V = dora.rows_of(m.base_layer).float() + m.delta()
        torch.testing.assert_close(m.lengths(), V.norm(dim=1), rtol=1e-5, atol=0)
    assert device_of("cpu").rooms["half", torch.float32].numel() == 64


def test_a_row_of_zeros_has_a_finite_loss_in_dora(folders):
    model = weights.load(folders["llama"])
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3] = 0
    base = logits(model)
    assert torch.equal(logits(dora.inject(model)), base)
    model(IDS).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------- merging, switching off

@pytest.mark.parametrize(("family", "method", "options"), [
    ("gpt2", "dora", {}), ("gpt2", "dora", {"targets": "all"}), ("llama", "dora", {"targets": "all", "rslora": True}),
    ("phi", "dora", {"targets": "all"}), ("gpt2", "ia3", {}), ("llama", "ia3", {}), ("phi", "ia3", {})], ids=str)
def test_merged_in_memory_and_as_a_file(folders, tmp_path, family, method, options, capsys):
    model, base = changed(folders[family], method, **options), logits(weights.load(folders[family]))
    peft_files.save(model, tmp_path / "a")
    wanted, out = logits(model), tmp_path / "out"
    export.main(["merge", "--model", str(folders[family]), "--adapter", str(tmp_path / "a"), "--out", str(out)])
    assert_same(logits(weights.load(out)), wanted, base, MERGED)
    assert_same(logits(hf_model(out)), wanted, base, MERGED)
    moved = float(capsys.readouterr().out.split("by at most ")[1].split()[0])  # `compare` makes the trained model again
    assert moved < 1e-4
    for _ in range(2):
        assert lora.merge(model) is model and not lora.layers(model) and model.method is None
        assert_same(logits(model), wanted, base, MERGED)
    if family != "llama":  # a factor behind a layer scales its bias, one before it does not
        before, after = (load_file(f / "model.safetensors") for f in (folders[family], out))
        moved = {n.split(".", 3)[-1] for n in before if n.endswith(".bias") and not torch.equal(before[n], after[n])}
        assert moved == ({"gpt2": {"attn.c_attn.bias"}, "phi": {"self_attn.k_proj.bias", "self_attn.v_proj.bias"}}[family]
                         if method == "ia3" else set())


@pytest.mark.parametrize("method", ["dora", "ia3"])
@pytest.mark.parametrize("bits", [16, 4])
def test_an_adapter_of_fewer_bits_is_merged_into_the_stored_weights(folders, tmp_path, bits, method, capsys):
    model = changed(folders["gpt2"], method, bits=bits)
    before = logits(model)
    with pytest.raises(UserError, match="export.py merge" if bits == 4 else "bits=32"):
        lora.merge(model)
    assert torch.equal(logits(model), before)
    peft_files.save(model, tmp_path / "a")
    export.main(["merge", "--model", str(folders["gpt2"]), "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "o")])
    said = capsys.readouterr().out
    assert f"({bits} bit)" in said and float(said.split("by at most ")[1].split()[0]) < (1 if bits == 4 else 0.1)
    exact = peft_files.load(weights.load(folders["gpt2"]), tmp_path / "a")
    assert_same(logits(weights.load(tmp_path / "o")), logits(exact), logits(weights.load(folders["gpt2"])), MERGED)


@pytest.mark.parametrize(("inject", "why"), [
    (bottleneck.inject, "a nonlinear function"), (prompt.inject, "word vectors"), (prefix.inject, "keys and values")])
def test_what_is_no_weight_is_not_merged(folders, tmp_path, inject, why):
    model = inject(weights.load(folders["gpt2"]), 5)
    peft_files.save(model, tmp_path / "a")
    (tmp_path / "o").mkdir()
    argv = ["merge", "--model", "no-such-model", "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "o" / "new")]
    with pytest.raises(UserError, match=f"--method {model.method} cannot be merged into"):
        lora.merge(model)
    with pytest.raises(UserError, match=f"--method {model.method} cannot be merged: .*{why}") as e:
        export.main(argv)
    assert "\n" not in str(e.value) and not list((tmp_path / "o").iterdir())


@EACH
@pytest.mark.parametrize("bits", [32, 4])
def test_switched_off_it_is_the_model_itself(folders, bits, method):
    base = logits(weights.load(folders["gpt2"], bits=bits))
    model = changed(folders["gpt2"], method, bits=bits)
    names, before = [n for n, _ in model.named_parameters()], logits(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), before) and not torch.equal(before, base)
    assert [n for n, _ in model.named_parameters()] == names  # AdamW's states belong to names, in this order


@pytest.mark.parametrize("inject", [prompt.inject, prefix.inject])
def test_virtual_tokens_cannot_be_switched_off(folders, inject):
    model = inject(weights.load(folders["gpt2"]), 5)
    with pytest.raises(UserError, match=f"--method {model.method}: its virtual tokens"), lora.disabled(model):
        pass


# ---------------------------------------------------------------------------------------------- the toggles of memory

def gradients(model, examples, batch=8, pack=False, ckpt_every=0):
    model.ckpt_every = ckpt_every
    model.zero_grad()
    n_labels = sum(e.n_labels for e in examples)
    for i in range(0, len(examples), batch):
        b = data.collate(examples[i:i + batch], pack, 128)
        (token_loss(model, b, model.hidden(b.ids, b.positions, b.segments)) / n_labels).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@EACH
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_do_not_depend_on_the_layout(folders, family, method):
    tokenizer = data.load_tokenizer(str(folders[family]))
    found = data.build(read_rows(folders["data.jsonl"]), tokenizer, data.load_template("auto", tokenizer), 128)
    examples, model = [found[i] for i in range(8)], changed(folders[family], method)
    wanted = gradients(model, examples)
    for layout in ({"ckpt_every": 1}, {"pack": True}, {"batch": 2}, {"batch": 4, "pack": True, "ckpt_every": 2}):
        got = gradients(model, examples, **layout)
        assert got.keys() == wanted.keys()
        for n, g in wanted.items():
            assert g.any() and (got[n] - g).norm() < 3e-4 * g.norm(), (layout, n)  # (q's are small: 4e-5 was observed)


RUN = {"steps": 4, "save_every": 1, "eval_every": 4, "batch_size": 4, "seed": 5, "lr": 1e-2, "warmup_steps": 1}


def go(folders, out, family="gpt2", **more):
    return run(out, folders[family], folders["data.jsonl"], **{**RUN, "val_data": str(folders["val.jsonl"]), **more})


@pytest.mark.parametrize("options", [
    {"method": "dora", "bits": 4, "lora_dropout": 0.1, "lora_plus": 4.0}, {"method": "ia3", "optimizer": "adamw8bit"},
    {"method": "bottleneck", "bottleneck": 8, "optimizer": "adamw8bit", "ckpt_every": 1}, {"method": "dora", "pack": True},
    {"lora_plus": 4.0, "optimizer": "adamw8bit"}], ids=str)
def test_a_killed_run_continues_bit_for_bit(folders, tmp_path, options, monkeypatch):
    whole = go(folders, tmp_path / "whole", **options)
    assert whole[-1]["loss"] != whole[0]["loss"]
    cls, taken = OPTIMIZERS[options.get("optimizer", "adamw")], []
    real = cls.step

    def step(self, *args, **kwargs):
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(cls, "step", step)
        go(folders, tmp_path / "run", **options)
    train.main(train.TrainConfig(out=str(tmp_path / "run"), resume=True))
    assert timeless(steps(tmp_path / "run")) == timeless(whole)
    for file in ("adapter/adapter_model.safetensors", "state/state.safetensors"):
        a, b = load_file(tmp_path / "run" / file), load_file(tmp_path / "whole" / file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file


@EACH
@pytest.mark.parametrize("toggles", [{}, {"amp": True, "bits": 4, "ckpt_every": 1}, {"amp": True, "pack": True}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_predicted_is_measured(folders, tmp_path, family, method, toggles, monkeypatch, on_device):
    """As for LoRA, equal to the byte but for 16-bit layer_norm on a CPU (test_predict.py)."""
    on_device()
    monkeypatch.setattr(ask, "Predictor", InProcess)
    go(folders, tmp_path, family, method=method, **toggles)
    found = json.loads((tmp_path / "summary.json").read_text())["memory"]
    assert_predicted(found, 0.02 * found["measured_peak"] if toggles and family == "gpt2" else 0)


# ---------------------------------------------------------------------------------------------- LoRA+

def test_lora_plus_is_adamw_with_two_rates(folders):
    """B at 4 times the rate, in the groups of PEFT's create_loraplus_optimizer."""
    peft_groups = pytest.importorskip("peft.optimizers").create_loraplus_optimizer
    model = adapted(folders["llama"], targets="all")
    twin, config = copy.deepcopy(model), train.TrainConfig(lora_plus=4.0, lr=1e-2, device="cpu")
    optimizer = prepare.make_optimizer(model, config)
    wanted = {n for n, _ in twin.named_parameters() if "lora_B" in n}
    names = {id(p): n for n, p in twin.named_parameters()}
    theirs = peft_groups(twin, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0, weight_decay=0.0, eps=1e-8)
    assert {names[id(p)] for g in theirs.param_groups if g["lr"] == 4e-2 for p in g["params"]} == wanted
    for _ in range(3):
        for m, o in ((model, optimizer), (twin, theirs)):
            o.zero_grad()
            m(IDS).logsumexp(-1).sum().backward()
            for group in o.param_groups if o is optimizer else ():
                group["lr"] = 1e-2 * group.get("times", 1)  # as the loop in train.py does
            o.step()
    for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=n)


def test_a_first_step_moves_b_four_times_as_far(folders, tmp_path):
    """AdamW's first step is the rate, in each number. B starts at 0; A's step is what it is without --lora-plus."""
    moved = {}
    for times in (None, 4.0):
        go(folders, tmp_path / str(times), "llama", steps=1, warmup_steps=0, lora_plus=times, clip=0.0)
        moved[times] = load_file(tmp_path / str(times) / "adapter" / "adapter_model.safetensors")
    for n, t in moved[4.0].items():
        plain = moved[None][n]
        assert t.any() and torch.allclose(t, 4 * plain if "lora_B" in n else plain, rtol=1e-5, atol=1e-8), n


# ---------------------------------------------------------------------------------------------- a second stage

@EACH
def test_a_second_stage_starts_where_the_first_ended(folders, tmp_path, method, monkeypatch, on_device):
    on_device()
    go(folders, tmp_path / "first", method=method, **({"bottleneck": 8} if method == "bottleneck" else {}))
    monkeypatch.setattr(ask, "Predictor", InProcess)
    go(folders, tmp_path / "second", adapter=str(tmp_path / "first" / "adapter"), steps=2)
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "second"))
    assert second["loss"]["val_before"] == pytest.approx(first["loss"]["val_after"], rel=1e-6)
    assert first["loss"]["val_after"] != first["loss"]["val_before"]
    assert json.loads((tmp_path / "second" / "config.json").read_text())["options"]["method"] == method
    assert second["memory"]["predicted_peak"] == second["memory"]["measured_peak"]


def test_a_second_stage_of_pefts_ia3_is_predicted_with_its_layers(folders, tmp_path, monkeypatch, on_device):
    on_device()
    monkeypatch.setattr(ask, "Predictor", InProcess)
    as_peft(folders["phi"], lambda peft: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["fc2", "fc1", "dense"],
                                                        feedforward_modules=["fc2"])).save_pretrained(tmp_path / "a")
    go(folders, tmp_path / "run", "phi", adapter=str(tmp_path / "a"), steps=2)
    assert_predicted(json.loads((tmp_path / "run" / "summary.json").read_text())["memory"], 0)


# ---------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize(("words", "named"), [
    ("--method dora --lora-targets lm_head", "--method dora cannot adapt lm_head"),
    ("--method lora --bottleneck 8", "--bottleneck has no effect with --method lora, only with bottleneck"),
    ("--method ia3 --lora-r 4", "--lora-r has no effect with --method ia3, only with lora and dora"),
    ("--method bottleneck --lora-plus 4", "--lora-plus has no effect with --method bottleneck"),
    ("--method bottleneck --bottleneck 0", "--bottleneck 0: must be from 1"),
    ("--method dora --lora-init pissa", "--lora-init has no effect with --method dora"),
    ("--full --lora-plus 4", "--lora-plus has no effect with --full"), ("--lora-plus nan", "--lora-plus nan: must be above"),
    ("--full --method ia3", "--method has no effect with --full"),
    ("--adapter {ia3} --method lora", "--method lora: the adapter in .* has ia3; leave it out"),
    ("--adapter {dora} --method ia3", "--method ia3: the adapter in .* has dora; leave it out"),
    ("--adapter {bottleneck} --bottleneck 9", "--bottleneck 9: the adapter in .* has 8; leave it out"),
    ("--adapter {ia3} --lora-plus 4", "--lora-plus has no effect with --method ia3"),
])
def test_options_that_do_not_go_together(folders, tmp_path, words, named):
    for method in METHODS:
        if f"{{{method}}}" in words:
            peft_files.save(changed(folders["gpt2"], method), tmp_path / method)
    words = words.format(**{method: tmp_path / method for method in METHODS}).split()
    with pytest.raises(UserError, match=named) as e:
        train.main(train.parse(["--model", str(folders["gpt2"]), "--data", str(folders["data.jsonl"]), "--steps", "1",
                                "--out", str(tmp_path / "out"), *words]))
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


K, FC2 = "base_model.model.model.layers.1.self_attn.k_proj.", "base_model.model.model.layers.0.mlp.down_proj."
Q, O_ = "base_model.model.model.layers.1.self_attn.q_proj.", "model.layers.2.self_attn.o_proj."


def rename(old, new):
    return lambda t: t.update({new: t.pop(old)})


@pytest.mark.parametrize(("method", "damage", "named"), [
    ("ia3", rename(K + "ia3_l", K.replace("layers.1", "layers.7") + "ia3_l"), "layers.7.self_attn.k_proj.* has no place"),
    ("ia3", rename(K + "ia3_l", "base_model.model.lm_head.ia3_l"), "lm_head.ia3_l has no place"),
    ("ia3", lambda t: t.update({K + "ia3_l": t[K + "ia3_l"][:5]}), r"layers.1.self_attn.k_proj is \(16, 32\), its factors"),
    ("ia3", lambda t: t.update({FC2 + "ia3_l": t[FC2 + "ia3_l"].flatten()}), "layers.0.mlp.down_proj is"),
    ("ia3", lambda t: t.update({K + "ia3_l": t[K + "ia3_l"] * torch.nan}), "k_proj.ia3_l.*not finite"),
    ("ia3", lambda t: t.update({K + "ia3_l": t[K + "ia3_l"].int()}), "holds torch.int32"),
    ("ia3", lambda t: t.clear(), "the adapter is empty"),
    ("dora", lambda t: t.pop(Q + "lora_magnitude_vector"), "layers.1.self_attn.q_proj has lora_A and lora_B only"),
    ("dora", lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(31)}), "has 32 rows, its magnitude"),
    ("dora", lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(32, 1)}), "has 32 rows, its magnitude"),
    ("bottleneck", lambda t: t.pop("base_model.model." + O_ + "up"), "o_proj.up is missing"),
    ("bottleneck", lambda t: t.pop("base_model.model." + O_ + "down_bias"), "o_proj.down_bias is missing"),
    ("bottleneck", lambda t: t.update({"base_model.model." + O_ + "up": torch.ones(8, 32)}), r"o_proj.up is \[8, 32\]"),
    ("bottleneck", lambda t: t.update({O_ + "side": torch.ones(8)}), "side has no place"),
], ids=lambda x: "" if callable(x) else x)  # (a function's text has its address)
def test_a_damaged_file_is_refused(folders, tmp_path, method, damage, named):
    peft_files.save(changed(folders["llama"], method), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    writing.write_tensors(file, tensors)
    model = weights.load(folders["llama"])
    with pytest.raises(UserError, match=named) as e:
        peft_files.load(model, tmp_path)
    assert file.name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("size", [9, 10**12, None, "8", 0])
def test_a_bottleneck_of_another_width_than_its_file_says(folders, tmp_path, size):
    """10^12 would be an allocation of terabytes, if the file were not asked first."""
    peft_files.save(changed(folders["llama"], "bottleneck"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bottleneck": size}))
    with pytest.raises(UserError, match="inner widths|bottleneck must be an integer"):
        peft_files.load(weights.load(folders["llama"]), tmp_path)


def test_doras_head_in_a_file(folders, tmp_path):
    peft_files.save(changed(folders["llama"], "dora"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    head = {f"base_model.model.lm_head.{n}": t for n, t in (("lora_A.weight", torch.ones(3, 32)), (
        "lora_B.weight", torch.ones(4096, 3)), ("lora_magnitude_vector", torch.ones(4096)))}
    save_file({**load_file(file), **head}, file)
    with pytest.raises(UserError, match="--method dora cannot adapt lm_head"):
        peft_files.load(weights.load(folders["llama"]), tmp_path)


# ---------------------------------------------------------------------------------------------- the documented bytes

@pytest.mark.parametrize(("inject", "megabytes"), [
    (lora.inject, 4.72), (dora.inject, 5.01), (ia3.inject, 0.88), (bottleneck.inject, 38.07), (prompt.inject, 0.25),
    (prefix.inject, 5.90)])
def test_bytes_of_the_trained_parameters(inject, megabytes):
    """methods/__init__.py's examples: GPT-2 124M at the default sizes, 16 bytes a trained parameter."""
    model = inject(weights.without_storage(gpt2.GPT2, gpt2.Config()))
    assert round(16 * memory.count(model)["trainable"] / 1e6, 2) == megabytes


@pytest.mark.parametrize(("method", "kept"), [  # of GPT-2's layer, C = 32, F = 128, r = 3 for q and v, m = 8
    ("dora", 2 * (32 + 2 * 3 + 3 * 32)), ("ia3", 2 * (3 * 32 + 128)), ("bottleneck", 2 * (2 * 32 + 4 * 8))])
def test_what_backward_keeps(folders, method, kept):
    """Bytes a token in 16 bit, as the docstrings say them."""
    model, T = changed(folders["gpt2"], method, bits=16), 64
    for m in lora.layers(model).values():
        x = torch.randn(1, T, m.base_layer.in_features, dtype=torch.bfloat16, requires_grad=True)
        own, found = {t.untyped_storage()._cdata for t in (*m.parameters(), *m.buffers())}, {}

        def pack(t, own=own, found=found):
            if t.untyped_storage()._cdata not in own and T in t.shape:
                found[t.untyped_storage()._cdata] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        kept -= sum(t.untyped_storage().nbytes() for t in found.values()) / T / model.config.n_layer
        assert y.dtype == torch.bfloat16
    assert kept == pytest.approx(0)
