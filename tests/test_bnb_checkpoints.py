"""Checkpoints that transformers + bitsandbytes wrote: they load as they are, and damaged ones are refused in one line."""
import json
import re
import shutil

import pytest
import torch
from conftest import held_dtype, make_folder
from runs import no_picture, run, timeless
from safetensors.torch import load_file
from test_quant import FAMILIES, IDS, WIDE, assert_same_state, low_bit, state
from test_weights import edit, edit_config

import generate
from errors import UserError
from files import peft_files, weights
from techniques import half

KINDS = {  # name -> BitsAndBytesConfig, save_pretrained's options, bits
    "nf4-double": (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), {}, 4),
    "nf4": (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), {}, 4),
    "int8": (dict(load_in_8bit=True), {}, 8),
    "shards": (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
               dict(max_shard_size="4KB"), 4),
    "skip": (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "v_proj", "attn.c_proj"]),
             {}, 4),
    "skip int8": (dict(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "v_proj", "attn.c_proj"]), {}, 8),
}
KIND = pytest.mark.parametrize("kind", KINDS)


class Place:
    """place(family, kind) -> a model folder, written by transformers when a test first asks for it."""

    def __init__(self, root):
        self.root = root
        for family in (*WIDE, "tied"):
            more = {"tie_word_embeddings": True} if family == "tied" else {}
            kind = "gpt2" if family == "gpt2" else "llama"
            folder = make_folder(root / family, kind, **WIDE[kind], **more)
            weights.save(weights.load(folder), folder, "bfloat16")

    def __call__(self, family, kind):
        folder = self.root / f"{family}-{kind}"
        if not folder.exists():
            transformers = pytest.importorskip("transformers")
            pytest.importorskip("bitsandbytes")
            options, saving, _ = KINDS[kind]
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.root / family, quantization_config=transformers.BitsAndBytesConfig(**options), dtype=torch.bfloat16,
                device_map="cpu")
            model.save_pretrained(folder, **saving)
            for f in ("vocab.json", "merges.txt"):
                shutil.copy(self.root / family / f, folder / f)
        return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("bnb"))


@pytest.fixture
def damaged(place, tmp_path):
    return lambda kind: shutil.copytree(place("llama", kind), tmp_path / "damaged")


# ---------------------------------------------------------------------------------------------- they load as they are

@pytest.mark.parametrize("family", ["gpt2", "llama", "tied"])
@KIND
def test_codes_and_scales_are_the_files_and_our_own(family, kind, place):
    """Equal bit for bit: the layer, the tensors of the file, and what --bits makes of the 16-bit folder."""
    folder, bits = place(family, kind), KINDS[kind][2]
    files = weights.weight_files(folder)
    stored = {k: t for f in files for k, t in load_file(f).items()}
    if kind == "shards":
        where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert any(where[k] != where[f"{k}.absmax"] for k in where if f"{k}.absmax" in where)
    model, own = weights.load(folder, bits=bits), weights.load(place.root / family, bits=bits)
    skipped = {n for n in low_bit(own) if "skip" in kind and n.endswith(("v_proj", "attn.c_proj"))}
    assert low_bit(model).keys() == low_bit(own).keys() - skipped and bool(skipped) == ("skip" in kind)
    for n, layer in low_bit(model).items():
        key = weights.checkpoint_name(model, n)
        assert torch.equal(layer.weight, stored[f"{key}.weight"])
        if bits == 8:
            assert torch.equal(layer.scale, stored[f"{key}.SCB"])
        else:
            assert torch.equal(layer.absmax, stored[f"{key}.weight.absmax"])
        if kind in ("nf4", "skip"):  # absmax in float32, which --bits 4 does not write
            assert layer.nested_absmax is None and layer.absmax.dtype == torch.float32
            assert torch.equal(layer.weight, own.get_submodule(n).weight)
        else:
            assert_same_state(state(layer), state(own.get_submodule(n)))
    for n, p in model.named_parameters():
        if p.dtype.is_floating_point:
            owner = model.get_submodule(n.rpartition(".")[0])
            W = p.t() if isinstance(owner, half.HalfLinear) and owner.fan_in_fan_out else p
            assert p.dtype == held_dtype(p) and torch.equal(W.bfloat16(), stored[weights.checkpoint_name(model, n)]), n
    assert (model.lm_head.weight is next(model.parameters())) == (family != "llama")  # the head stays tied


def hf_dequantised(folder):
    """transformers' model of the folder, and the same model in float32 with the weights that bitsandbytes dequantises."""
    import transformers
    from bitsandbytes import functional as B
    low = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    wanted = low.state_dict()
    for n, m in low.named_modules():
        if type(m).__name__ == "Linear4bit":
            m.weight.quant_state.dtype = torch.float32
            w = B.dequantize_4bit(m.weight.data, m.weight.quant_state)
            m.weight.quant_state.dtype = torch.bfloat16
        elif type(m).__name__ == "Linear8bitLt":
            w = B.int8_vectorwise_dequant(m.weight.data, m.weight.SCB)
        else:
            continue
        wanted[f"{n}.weight"] = w.t() if type(model.get_submodule(n)).__name__ == "Conv1D" else w
    with torch.no_grad():
        for n, p in model.named_parameters():
            assert p.dtype == torch.float32
            p.copy_(wanted[n])
    return low, model


@FAMILIES
@KIND
def test_logits_are_transformers_own(family, kind, place):
    """From the dequantised weights: in float32 only the order of additions differs, in bfloat16 also the rounding."""
    folder = place(family, kind)
    low, exact = hf_dequantised(folder)
    ours = weights.load(folder, bits=KINDS[kind][2])
    with torch.no_grad():
        half, theirs = ours(IDS).float(), low(IDS).logits.float()
        wanted = exact(IDS).logits
        got = ours.float()(IDS)
    assert (got - wanted).abs().max() < 2e-5 * wanted.std()
    for x in (half, theirs):
        assert (x - wanted).std() < 0.04 * wanted.std()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bits_are_those_stored(kind, place, data_file, tmp_path, monkeypatch):
    """Without --bits the stored bits are used. Other bits and --full are refused, and the message says what to do."""
    no_picture(monkeypatch)
    folder, bits = place("llama", kind), KINDS[kind][2]
    for other in {32, 16, 8, 4} - {bits}:
        with pytest.raises(UserError, match=f"--bits {other}: .* are stored in {bits} bit, load them with --bits {bits}$"):
            weights.load(folder, bits=other)
        with pytest.raises(UserError, match=f"--bits {other}: .*load them with --bits {bits}"):
            run(tmp_path / "refused", folder, data_file, bits=other, amp=True, steps=1)
    with pytest.raises(UserError, match=f"--full: .* is stored in {bits} bit; only adapters"):
        run(tmp_path / "refused", folder, data_file, full=True, steps=1)
    stored = run(tmp_path / "stored", folder, data_file, amp=True, steps=2)
    assert json.loads((tmp_path / "stored" / "config.json").read_text())["options"]["bits"] == bits
    assert len(stored) == 2


@pytest.mark.parametrize("family, kind", [("gpt2", "nf4-double"), ("llama", "int8"), ("tied", "shards")])
def test_training_on_it_is_training_on_the_16_bit_model_with_bits(family, kind, place, data_file, tmp_path, monkeypatch):
    no_picture(monkeypatch)
    options = dict(amp=True, steps=3, lora_r=4, lora_targets="all", lr=1e-2, warmup_steps=1)
    stored = run(tmp_path / "a", place(family, kind), data_file, **options)
    own = run(tmp_path / "b", place.root / family, data_file, bits=KINDS[kind][2], **options)
    assert timeless(stored) == timeless(own) and stored[-1]["loss"] < stored[0]["loss"]


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_generate_takes_the_stored_bits(kind, place, capsys):
    folder = str(place("llama", kind))
    generate.main(["--model", folder, "--raw", "--prompt", "Say", "--max-new-tokens", "4", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("Say")
    with pytest.raises(UserError, match="load them with --bits"):
        generate.main(["--model", folder, "--bits", "16", "--prompt", "hi", "--device", "cpu"])


@FAMILIES
def test_an_adapter_trained_on_4_bit_weights_in_peft_over_bitsandbytes(family, place, data_file, tmp_path, monkeypatch):
    """Over the same codes in float32, only the order of additions differs."""
    peft = pytest.importorskip("peft")
    no_picture(monkeypatch)
    run(tmp_path / "out", place.root / family, data_file, bits=4, amp=True, steps=3, lora_r=4, lr=3e-2)
    _, exact = hf_dequantised(place(family, "nf4-double"))
    with torch.no_grad():
        before = exact(IDS).logits
        theirs = peft.PeftModel.from_pretrained(exact, tmp_path / "out" / "adapter").eval()(IDS).logits
        ours = peft_files.load(weights.load(place.root / family, bits=4), tmp_path / "out" / "adapter").float().eval()(IDS)
        low = hf_dequantised(place(family, "nf4-double"))[0]  # and PEFT over bitsandbytes' own layers, in bfloat16
        half = peft.PeftModel.from_pretrained(low, tmp_path / "out" / "adapter").eval()(IDS).logits.float()
    assert (ours - theirs).abs().max() < 3e-5 * theirs.std()
    moved = (theirs - before).std()
    assert moved > 0.2 * theirs.std() and (half - theirs).std() < 0.3 * moved


# ---------------------------------------------------------------------------------------------- damaged ones

Q = "model.layers.1.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


def change(part, f):
    """Replace one tensor that belongs to Q by f(tensor). Without f, drop it."""
    def damage(folder):
        old = load_file(folder / "model.safetensors").get(f"{Q}.{part}")
        edit(folder, **{f"{Q}.{part}": f(old) if f else None})
    return damage


def change_state(**changes):
    def damage(folder):
        about = json.loads(bytes(load_file(folder / "model.safetensors")[STATE].tolist()))
        about = {k: v for k, v in {**about, **changes}.items() if v != "DROP"}
        edit(folder, **{STATE: torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)})
    return damage


def change_text(text):
    return change("weight.quant_state.bitsandbytes__nf4", lambda t: torch.tensor(list(text), dtype=torch.uint8))


def change_config(**changes):
    def damage(folder):
        q = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_config(folder, quantization_config={**q, **changes})
    return damage


def fp4(folder):
    """The codes are declared fp4, although config.json says nf4."""
    tensors = load_file(folder / "model.safetensors")
    edit(folder, **{STATE: None, STATE.replace("nf4", "fp4"): tensors[STATE]})


WEIGHT = rf"/model.safetensors: tensor {Q}.weight: "
DAMAGED = {  # kind, how it is damaged, what the line must hold
    "fp4": ("nf4", change_config(bnb_4bit_quant_type="fp4"), r"/config.json: the weights are quantised \(fp4 .*--bits 4"),
    "quant_storage": ("nf4", change_config(bnb_4bit_quant_storage="bfloat16"),
                      r"/config.json: the weights are quantised \(nf4 stored as bfloat16\).*--bits 4"),
    "GPTQ": ("nf4", change_config(quant_method="gptq"), r"/config.json: the weights are quantised \(gptq\).*--bits 4"),
    "AWQ": ("nf4", change_config(quant_method="awq"), r"/config.json: the weights are quantised \(awq\).*--bits 4"),
    "fp4 codes": ("nf4", fp4, WEIGHT + "it has neither a quant_state of nf4 nor SCB"),
    "blocksize": ("nf4", change_state(blocksize=128), WEIGHT + "its quant_state has blocksize 128, this model needs 64"),
    "nested blocksize": ("nf4-double", change_state(nested_blocksize=128), WEIGHT + "its quant_state has nested_blocksize"),
    "shape": ("nf4", change_state(shape=[32, 128]), WEIGHT + r"its quant_state has shape \[32, 128\]"),
    "quant_type": ("nf4", change_state(quant_type="fp4"), WEIGHT + "its quant_state has quant_type fp4"),
    "no quant_state": ("nf4", change("weight.quant_state.bitsandbytes__nf4", None), WEIGHT + "it has neither a quant_state"),
    "broken quant_state": ("nf4", change("weight.quant_state.bitsandbytes__nf4", lambda t: t[:-5].clone()), WEIGHT),
    "no absmax": ("nf4", change("weight.absmax", None), WEIGHT + ".*absmax"),
    "no double absmax": ("nf4-double", change("weight.absmax", None), WEIGHT + ".*absmax"),
    "no nested absmax": ("nf4-double", change("weight.nested_absmax", None), WEIGHT + "its codes .*, absmax, nested"),
    "no nested offset": ("nf4-double", change_state(nested_offset="DROP"), WEIGHT + ".*nested_offset"),
    "short absmax": ("nf4", change("weight.absmax", lambda t: t[:-1].clone()), WEIGHT + "its codes .*, absmax, nested"),
    "absmax not finite": ("nf4", change("weight.absmax", lambda t: t * float("nan")), WEIGHT + ".*not finite"),
    "nested absmax not finite": ("nf4-double", change("weight.nested_absmax", lambda t: t * float("inf")),
                                 WEIGHT + ".*not finite"),
    "truncated codes": ("nf4", change("weight", lambda t: t[:-32].clone()), WEIGHT + "its codes .*, absmax, nested"),
    "codes of 16 bit": ("nf4", change("weight", lambda t: t.short()), WEIGHT + ".*int16"),
    "quant_map": ("nf4", change("weight.quant_map", lambda t: t.flip(0)), WEIGHT + "its quant_map is another code than NF4"),
    "nested quant_map": ("nf4-double", change("weight.nested_quant_map", lambda t: t.flip(0)),
                         WEIGHT + "its nested_quant_map is another code"),
    "no SCB": ("int8", change("SCB", None), WEIGHT + "it has neither a quant_state of nf4 nor SCB"),
    "short SCB": ("int8", change("SCB", lambda t: t[1:].clone()), WEIGHT + r".*scales \[63\]"),
    "SCB not finite": ("int8", change("SCB", lambda t: t * float("inf")), WEIGHT + ".*not finite"),
    "int8 codes of another shape": ("int8", change("weight", lambda t: t[1:].clone()), WEIGHT + r"codes \[63, 64\]"),
    "unsigned int8": ("int8", change("weight", lambda t: t.view(torch.uint8)), WEIGHT + ".*uint8"),
    "tiled int8": ("int8", change("weight_format", lambda t: torch.ones_like(t)), WEIGHT + "its int8 codes are in a GPU's"),
    "huge nested offset": ("nf4-double", change_state(nested_offset=10**400), WEIGHT + ".*nested_offset"),
    "nested offset is text": ("nf4-double", change_state(nested_offset="0"), WEIGHT + ".*nested_offset"),
    "nested offset is true": ("nf4-double", change_state(nested_offset=True), WEIGHT + ".*nested_offset"),
    "nested offset is NaN": ("nf4-double", change_state(nested_offset=float("nan")), WEIGHT + ".*nested_offset"),
    "deep quant_state": ("nf4", change_text(b"[" * 99999), WEIGHT + "maximum recursion"),
    "quant_state is a list": ("nf4", change_text(b"[]"), WEIGHT + "its quant_state is no JSON object"),
    "quant_state of numbers": ("nf4", change("weight.quant_state.bitsandbytes__nf4", lambda t: t.float()),
                               WEIGHT + "its quant_state is no JSON object"),
    "quant_state in two dimensions": ("nf4", change("weight.quant_state.bitsandbytes__nf4", lambda t: t[None]),
                                      WEIGHT + "its quant_state is no JSON object"),
    "absmax in 16 bit": ("nf4", change("weight.absmax", lambda t: t.half()), WEIGHT + "its codes .*, absmax, nested"),
    "absmax in two dimensions": ("nf4-double", change("weight.absmax", lambda t: t[None]), WEIGHT + "its codes .*, absmax"),
    "nested absmax of integers": ("nf4-double", change("weight.nested_absmax", lambda t: t.int()), WEIGHT + "its codes"),
    "quant_map in 16 bit": ("nf4", change("weight.quant_map", lambda t: t.half()), WEIGHT + "its quant_map is another code"),
    "SCB of integers": ("int8", change("SCB", lambda t: t.int()), WEIGHT + r".*scales \[64\] of torch.int32"),
    "load_in_8bit is text": ("int8", change_config(load_in_8bit="yes"), "load_in_8bit must be true or false"),
    "extra part": ("nf4", change("weight.zero_point", lambda t: torch.ones(2)),
                   f"/model.safetensors: unexpected tensor {Q}.weight.zero_point"),
    "scales of a 16-bit weight": ("skip", lambda d: edit(d, **{f"{Q.replace('q_', 'v_')}.weight.absmax": torch.ones(64)}),
                                  f"{Q.replace('q_', 'v_')}.weight"),
    "missing codes": ("nf4", change("weight", None), f"{Q}.weight"),
    "codes of a norm": ("nf4", lambda d: edit(d, **{"model.norm.weight": torch.ones(64, dtype=torch.uint8)}),
                        "tensor model.norm.weight holds torch.uint8, and config.json does not say how"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_in_one_line(case, damaged):
    kind, damage, says = DAMAGED[case]
    folder = damaged(kind)
    damage(folder)
    with pytest.raises(UserError) as e:
        weights.load(folder, bits=KINDS[kind][2])
    message = str(e.value)
    assert "\n" not in message and str(folder) in message and not message.endswith((" ", ","))
    assert re.search(says, message), message
