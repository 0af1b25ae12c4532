"""Several adapters on one model: rows of a mixed batch against each adapter alone, gradients, PEFT, the command."""
import functools
import io
import json
import shutil
import sys

import pytest
import torch
from conftest import adapted, make_folder

import generate
import lora
from errors import UserError
from files import peft_files, weights
from methods import dora, ia3, prompt, several
from techniques import loss

FAMILIES = ["gpt2", "llama", "phi"]
OUT, IN = {"gpt2": "c_proj", "llama": "down_proj", "phi": "fc2"}, {"gpt2": "c_attn", "llama": "k_proj", "phi": "k_proj"}
IDS = torch.randint(4096, (6, 11), generator=torch.Generator().manual_seed(1))
MIX = ["a", None, "b", "c", "a", "b"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """For each family a model, and the adapters a (q and v), b (every layer, and the head), c (two layers, rsLoRA)."""
    root = tmp_path_factory.mktemp("several")
    for f in FAMILIES:
        make_folder(root / f, f, tie_word_embeddings=f == "gpt2")
        few = {"a": {"r": 2, "alpha": 3}, "b": {"r": 5, "alpha": 4, "targets": ["all", "lm_head"]},
               "c": {"r": 3, "alpha": 1, "targets": [OUT[f], IN[f]], "rslora": True, "dropout": 0.1}}
        for seed, (name, options) in enumerate(few.items()):
            peft_files.save(adapted(root / f, seed, **options), root / f / name)
    return root


def with_several(folder, bits=32, names="abc"):
    model = weights.load(folder, bits=bits).float().eval()
    for name in names:
        peft_files.add(model, name, folder / name)
    return model


def single(folder, name, bits=32):
    model = weights.load(folder, bits=bits)
    return (peft_files.load(model, folder / name) if name else model).float().eval()


def near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.std().item())  # another order of sums, in three layers


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids)


# ---------------------------------------------------------------------------------------------- a row alone and in a mixture

@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_mixed_batch_is_the_row_alone(family, bits, place):
    model = with_several(place / family, bits)
    several.route(model, MIX)
    mixed, alone = logits(model), {name: logits(single(place / family, name, bits)) for name in {*MIX}}
    assert len({out[0].sum().item() for out in alone.values()}) == 4  # the adapters differ
    for row, name in enumerate(MIX):
        near(mixed[row], alone[name][row])
        with several.adapter(model, name):
            near(logits(model, IDS[row:row + 1])[0], alone[name][row])
    near(logits(model), mixed)  # `adapter` puts back what was routed before
    for off in (several.adapter(model, None), lora.disabled(model)):
        with off:
            assert torch.equal(logits(model), alone[None])  # the same kernels: bit for bit
    several.route(model, [None] * len(MIX))
    assert torch.equal(logits(model), alone[None])


def test_a_row_may_have_two_adapters(place):
    """Both sums are added to each layer, as PEFT does with two active adapters."""
    model = with_several(place / "llama")
    several.route(model, [("a", "c"), "a"])
    mixed = logits(model, IDS[:2])
    merged = single(place / "llama", "a")
    lora.merge(merged)
    near(mixed[0], logits(peft_files.load(merged, place / "llama" / "c").eval(), IDS[:1])[0])
    near(mixed[1], logits(single(place / "llama", "a"), IDS[1:2])[0])


PROMPTS = [[5, 17, 300, 4000, 2, 9], [44], [7, 7, 8] * 9, [1000, 2000, 3000], [*range(12, 20)], [3, 1, 4], [9]]
ADAPTERS = ["b", None, "a", "c", "b", "a", None]


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_replies_that_share_forwards_are_those_of_each_adapter_alone(family, bits, place):
    model, lengths = with_several(place / family, bits), [7, 2, 9, 3, 5, 8, 4]
    wanted = [[r.new for r in generate.run(one, [generate.Reply(one.config, ids, max_new_tokens=n, temperature=0)])][-1]
              for ids, name, n in zip(PROMPTS, ADAPTERS, lengths)
              for one in [functools.lru_cache(single)(place / family, name, bits)]]
    for batch_size in (1, 3, 8):
        replies = [generate.Reply(model.config, ids, max_new_tokens=n, temperature=0, adapter=name)
                   for ids, name, n in zip(PROMPTS, ADAPTERS, lengths)]
        with several.adapter(model, "c"):
            for _ in generate.run(model, replies, batch_size):
                pass
            assert model.routing.rows == {"c": None}  # as it was before
        assert [r.new for r in replies] == wanted
    unrouted = [generate.generate(model, ids, n, 0)[len(ids):] for ids, n in zip(PROMPTS, lengths)]
    assert sum(u != w for u, w in zip(unrouted, wanted)) >= 2  # what the base says is something else


def test_the_base_multiplies_once_for_all_adapters(place, monkeypatch):
    model, products = with_several(place / "llama"), []
    base = model.model.layers[0].self_attn.q_proj.base_layer
    base.register_forward_hook(lambda *_: products.append(1))
    replies = [generate.Reply(model.config, [5], max_new_tokens=4, adapter=name) for name in MIX]
    for _ in generate.run(model, replies, 6):
        pass
    assert len(products) == 6 + 3  # six prompts, and three more tokens of all six


# ---------------------------------------------------------------------------------------------- training

def inject(folder, names="ab", seed=3):
    model, rng = several.inject(weights.load(folder), list(names), r=2, targets="all"), torch.Generator().manual_seed(seed)
    for name in names:
        for m in several.of(model, name).values():
            for p in m.parameters():
                if p.requires_grad:
                    torch.nn.init.normal_(p, std=0.2, generator=rng)
    return model


def gradients(model, name):
    return {(n, k): p.grad for n, m in several.of(model, name).items() for k, p in m.named_parameters() if "lora_" in k}


def backward(model, ids, labels, positions=None, segments=None):
    model.zero_grad()
    loss.sum_loss(model.hidden(ids, positions, segments), model.head, labels).backward()


@pytest.mark.parametrize("ckpt_every", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_gives_gradients_to_its_own_adapter_alone(family, packed, ckpt_every, place):
    model, lengths = inject(place / family), [4, 7, 3, 5]
    model.ckpt_every = ckpt_every
    ids, labels = torch.zeros(4, 7, dtype=torch.long), torch.full((4, 7), loss.IGNORE)
    for row, n in enumerate(lengths):  # padding on the right has no label
        ids[row, :n], labels[row, :n] = IDS[row, :n], IDS[row + 1, :n]

    def train(which):
        rows = [r for r in range(4) if which[r] != "left out"]
        names, some = [which[r] for r in rows], [lengths[r] for r in rows]
        if not packed:
            several.route(model, names)
            return backward(model, ids[rows], labels[rows])
        several.route(model, names, some)
        flat, targets = (torch.cat([x[r, :lengths[r]] for r in rows])[None] for x in (ids, labels))
        backward(model, flat, targets, torch.cat([torch.arange(n) for n in some])[None], some)

    def none(name):
        return all(g is None or not g.any() for g in gradients(model, name).values())

    train(["a", None, "a", None])
    assert none("b") and not none("a")
    train(["a", "left out", "a", "left out"])
    of_a = gradients(model, "a")
    train(["left out", "b", "left out", "b"])
    assert none("a")
    of_b = gradients(model, "b")
    train(["a", "b", "a", "b"])  # together: each has the gradient of its rows
    for alone, together in ((of_a, gradients(model, "a")), (of_b, gradients(model, "b"))):
        assert all(g.any() for g in alone.values())
        for key, g in alone.items():
            torch.testing.assert_close(together[key], g, rtol=1e-4, atol=1e-5 * g.abs().max().item())
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_the_gradients_are_those_of_a_model_with_one_adapter(place, tmp_path):
    model = inject(place / "llama")
    peft_files.save(model, tmp_path, name="a")
    alone = peft_files.load(weights.load(place / "llama"), tmp_path)
    several.route(model, ["a", "b"])
    backward(model, IDS[:2], torch.cat([IDS[2:3], torch.full((1, 11), loss.IGNORE)]))
    backward(alone, IDS[:1], IDS[2:3])
    for (layer, kind), g in gradients(model, "a").items():
        wanted = alone.get_submodule(layer).get_parameter(kind).grad
        torch.testing.assert_close(g, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_an_adapter_on_the_head_has_a_loss_if_all_rows_go_through_it(place):
    model, alone = with_several(place / "llama"), single(place / "llama", "b")
    for name, other in (("b", alone), (None, single(place / "llama", None))):
        with several.adapter(model, name), torch.no_grad():
            one, wanted = (loss.sum_loss(m.hidden(IDS), m.head, IDS) for m in (model, other))
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=0)
    several.route(model, MIX)
    with pytest.raises(UserError, match="on the head cannot have a loss over a batch that mixes"):
        loss.sum_loss(model.hidden(IDS), model.head, IDS)
    with pytest.raises(UserError, match="lm_head cannot have several adapters"):
        several.inject(weights.load(place / "llama"), ["a"], targets=["lm_head"])


# ---------------------------------------------------------------------------------------------- files

def hf(folder):
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapters_in_one_model_of_peft(family, place, tmp_path):
    peft = pytest.importorskip("peft")
    model = with_several(place / family)
    for name in "abc":
        peft_files.save(model, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(hf(place / family), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.load_adapter(tmp_path / "c", "c")
    for name in "bca":
        theirs.set_adapter(name)
        with several.adapter(model, name):
            near(logits(model), theirs.eval()(IDS).logits.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_that_peft_saves_together_are_added_here(family, place, tmp_path):
    peft = pytest.importorskip("peft")
    layers = {"fan_in_fan_out": family == "gpt2", "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=[IN[family]], **layers)
    theirs = peft.get_peft_model(hf(place / family), config)
    theirs.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=2, target_modules=[OUT[family], IN[family]], **layers))
    for n, p in theirs.named_parameters():
        if "lora_" in n:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    model = weights.load(place / family).eval()
    peft_files.add(model, "first", tmp_path)  # PEFT's layout: "default" in the folder itself, others in one of their own
    peft_files.add(model, "second", tmp_path / "other")
    several.route(model, ["first", "second"] * 3)
    mixed = logits(model)
    for k, name in enumerate(("default", "other")):
        theirs.set_adapter(name)
        near(mixed[k::2], theirs.eval()(IDS).logits.detach()[k::2])


def test_an_adapter_is_replaced_while_others_answer(place, tmp_path):
    model = with_several(place / "llama", names="ab")
    several.route(model, MIX[:3])
    before = logits(model, IDS[:3])
    peft_files.add(model, "c", place / "llama" / "c")
    assert torch.equal(logits(model, IDS[:3]), before) and several.names(model) == ["a", "b", "c"]
    several.remove(model, "a")
    after = logits(model, IDS[:3])
    near(after[0], logits(single(place / "llama", None), IDS[:1])[0])
    near(after[1:], before[1:])  # the other rows go on
    peft_files.save(adapted(place / "llama", 9, r=4, targets=["o_proj"]), tmp_path / "new")
    peft_files.add(model, "a", tmp_path / "new")
    near(logits(model, IDS[:3]), after)  # no row goes through it before `route` says so
    several.route(model, MIX[:3])
    new = peft_files.load(weights.load(place / "llama"), tmp_path / "new").eval()
    near(logits(model, IDS[:3])[0], logits(new, IDS[:1])[0])
    assert several.of(model, "a").keys() == {f"model.layers.{i}.self_attn.o_proj" for i in range(3)}
    several.remove(model, "b")
    several.remove(model, "a")
    several.remove(model, "c")
    assert torch.equal(logits(model), logits(single(place / "llama", None)))
    assert not any("lora_" in n for n, _ in model.named_parameters())


# ---------------------------------------------------------------------------------------------- what is refused

def test_what_a_model_with_several_adapters_refuses(place, tmp_path):
    folder = place / "llama"
    model = with_several(folder, names="ab")
    before = logits(model)
    for call, says in ((lambda: lora.merge(model), "--method several cannot be merged"),
                       (lambda: lora.inject(model), "already has adapters"),
                       (lambda: several.inject(model, ["c"]), "already has adapters"),
                       (lambda: peft_files.load(model, folder / "c"), "already has adapters"),
                       (lambda: peft_files.save(model, tmp_path), r"several adapters \(a, b\); say which"),
                       (lambda: peft_files.save(model, tmp_path, name="z"), "no adapter is named 'z'; there are a, b"),
                       (lambda: several.remove(model, "z"), "no adapter is named 'z'; there are a, b"),
                       (lambda: several.route(model, ["z"]), "no adapter is named 'z'; there are a, b"),
                       (lambda: several.adapter(model, "z").__enter__(), "no adapter is named 'z'; there are a, b"),
                       (lambda: list(generate.run(single(folder, "a"), [generate.Reply(model.config, [1], adapter="a")])),
                        "no adapter is named 'a'; there are none"),
                       (lambda: peft_files.add(model, "a", folder / "c"), "two adapters are named a"),
                       (lambda: peft_files.add(single(folder, "a"), "b", folder / "b"), "a single adapter already .lora"),
                       (lambda: several.inject(weights.load(folder), ["a"], r=0), "--lora-r 0"),
                       (lambda: peft_files.add(model, "d", place / "nowhere"), r"nowhere.adapter_config.json")):
        with pytest.raises(UserError, match=says):
            call()
    assert several.names(model) == ["a", "b"] and torch.equal(logits(model), before) and not any(tmp_path.iterdir())
    assert len(lora.adapters(model)) == 6 + 22


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "a.b", "a b", "é", "a\n", "x" * 65])
def test_a_name_must_be_that_of_a_folder(name, place):
    model = weights.load(place / "gpt2")
    with pytest.raises(UserError, match="an adapter cannot be named"):
        peft_files.add(model, name, place / "gpt2" / "a")
    assert several.names(model) == [] and not lora.adapters(model)


@pytest.mark.parametrize("name", ["x" * 64, "type", "-", "keys", "forward", "7"])
def test_a_name_may_be_that_of_a_method(name, place):
    model = weights.load(place / "gpt2").eval()
    peft_files.add(model, name, place / "gpt2" / "a")
    with several.adapter(model, name):
        near(logits(model), logits(single(place / "gpt2", "a")))


@pytest.mark.parametrize("kind, says", [
    ("dora", "only LoRA adapters can share a model, and this is DoRA"),
    ("ia3", "holds ia3, and only LoRA adapters can share a model"),
    ("prompt", "holds prompt, and only LoRA adapters can share a model"),
    ("pissa", "--lora-init loftq and pissa change the frozen weights"),
    ("loftq", "--lora-init loftq and pissa change the frozen weights"),
    ("other", r"layer model.layers.0.self_attn.q_proj is \(32, 32\), its adapter B \[48, 2\]"),
    ("gpt2", "tensor base_model.model.transformer.h.0.attn.c_attn.lora_A.weight has no")])
def test_an_adapter_that_cannot_share_a_model(kind, says, place, tmp_path):
    folder, bits = place / "llama", 4 if kind == "loftq" else 32
    if kind in ("pissa", "loftq"):
        start = weights.load(folder, bits=bits)
        bad = lora.inject(start, r=2, init=kind, stored=weights.StoredWeights(str(folder)).read)
    elif kind == "other":
        bad = adapted(make_folder(tmp_path / "other", "llama", hidden_size=48), 1, r=2)
    else:
        bad = adapted(place / "gpt2" if kind == "gpt2" else folder, 1,
                      method={"dora": dora, "ia3": ia3, "prompt": prompt}.get(kind, lora))
    peft_files.save(bad, tmp_path / "bad")
    model = with_several(folder, bits, "a")
    with pytest.raises(UserError, match=says) as e:
        peft_files.add(model, "bad", tmp_path / "bad")
    assert "\n" not in str(e.value) and several.names(model) == ["a"] and len(lora.adapters(model)) == 6


# ---------------------------------------------------------------------------------------------- the command

def run(place, *words, adapters="ab"):
    generate.main(["--model", str(place / "llama"), "--max-new-tokens", "6", "--temperature", "0", *words,
                   *(w for n in adapters for w in ("--adapter", f"{n}={place / 'llama' / n}"))])


def answer(place, capsys, text, name, *words):
    """What --adapter DIR, or no adapter, answers."""
    run(place, "--prompt", text, *words, *(("--adapter", str(place / "llama" / name)) if name else ()), adapters="")
    return capsys.readouterr().out


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_each_adapter_answers_a_prompt(raw, place, capsys, monkeypatch):
    rows, step = [], generate.step
    monkeypatch.setattr(generate, "step", lambda m, c, slots, *more: rows.append(len(slots)) or step(m, c, slots, *more))
    run(place, "--prompt", "One two", *raw, adapters="bca")
    assert rows == [1] * 3 + [3] * 5  # three prompts, and then one batch
    said = capsys.readouterr().out
    wanted = {name: answer(place, capsys, "One two", name, *raw) for name in "abc"}
    assert said == "".join(f"[{name}]\n{wanted[name]}" for name in "bca") and len(set(wanted.values())) == 3
    run(place, "--prompt", "One two", *raw, adapters="a")  # a single one may have a name
    assert capsys.readouterr().out == f"[a]\n{wanted['a']}"


def test_each_row_of_a_file_names_its_adapter(place, tmp_path, capsys):
    rows = [{"prompt": "One two", "adapter": "b", "id": 3}, {"prompt": "One two", "adapter": None}, {"prompt": "One two"},
            {"prompt": "One two", "adapter": "a"}, {"prompt": "Three", "adapter": "b"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run(place, "--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--batch-size", "3")
    capsys.readouterr()
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [f.pop("reply") + "\n" for f in found] == [answer(place, capsys, r["prompt"], r.get("adapter")) for r in rows]
    assert [{k: v for k, v in f.items() if k != "finish_reason"} for f in found] == rows


@pytest.mark.parametrize("named, value", [("ab", "z"), ("ab", ""), ("ab", ["a"]), ("ab", 7), ("", "a")])
def test_a_row_with_an_unknown_adapter_has_its_line_named(named, value, place, tmp_path):
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "a"}}\n{json.dumps({"prompt": "a", "adapter": value})}\n')
    with pytest.raises(UserError, match=rf"in.jsonl:2: adapter .*\({', '.join(named) or 'none'}\)"):
        run(place, "--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), adapters=named)


def test_a_chat_changes_its_adapter_and_goes_on(place, monkeypatch, capsys):
    asked, real = [], generate.reply

    def reply(model, tokenizer, ids, on_text, adapter=None, **options):
        asked.append((adapter, tokenizer.decode(ids)))
        return real(model, tokenizer, ids, on_text, adapter=adapter, **options)

    monkeypatch.setattr(generate, "reply", reply)
    monkeypatch.setattr(sys, "stdin", io.StringIO("One\n/adapter b\nTwo\n /adapter \n/adapter z\nThree\n/adapter  a \n"))
    run(place, "--max-new-tokens", "2")
    said, notes = capsys.readouterr()
    assert [name for name, _ in asked] == ["a", "b", None]
    assert all(word in asked[2][1] for word in ("One", "Two", "Three")) and "/adapter" not in asked[2][1]
    assert notes.splitlines() == ["note: adapter a answers", "note: adapter b answers", "note: the base model answers",
                                  "note: no adapter is named z; there are a, b", "note: adapter a answers"]
    assert said.startswith(answer(place, capsys, "One", "a", "--max-new-tokens", "2"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("One two\n/adapter b\nOne two\n"))
    run(place, "--raw")
    assert capsys.readouterr().out == "".join(answer(place, capsys, "One two", name, "--raw") for name in "ab")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/adapter b\n"))  # without names it is a line like any other
    run(place, adapters="")
    assert asked[-1][0] is None and "/adapter b" in asked[-1][1]


def test_which_template_and_which_bits(place, tmp_path, capsys, monkeypatch):
    for name in "abc":
        shutil.copytree(place / "llama" / name, tmp_path / name)
    words = [w for n in "abc" for w in ("--adapter", f"{n}={tmp_path / n}")]
    go = ["--model", str(place / "llama"), "--max-new-tokens", "1", "--prompt", "hi", *words]
    held, rendered = [], []
    load, ids = weights.load, generate.data.prompt_ids
    monkeypatch.setattr(weights, "load", lambda *args, bits, **more: held.append(bits) or load(*args, bits=bits, **more))
    monkeypatch.setattr(generate.data, "prompt_ids", lambda row, template, *more: rendered.append(template) or ids(
        row, template, *more))
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    for name in "bc":
        (tmp_path / name / "chat_template.jinja").write_text(template)
    generate.main(go)
    assert set(rendered) == {template} and held == [32]
    (tmp_path / "c" / "chat_template.jinja").write_text(template + " ")
    with pytest.raises(UserError, match=r"b.chat_template.jinja and .*c.chat_template.jinja are different chat templates"):
        generate.main(go)
    generate.main([*go, "--raw"])  # uses no template
    for bits, name in ((4, "a"), (4, "b"), (8, "c")):
        peft_files.save(adapted(place / "llama", 1, bits), tmp_path / name)
    (tmp_path / "c" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"trained on different weights \(.*a: 4 bits, .*b: 4 bits, .*c: 8 bits\); choose"):
        generate.main(go)
    held.clear()
    generate.main([*go, "--bits", "8"])
    peft_files.save(adapted(place / "llama", 1, 4), tmp_path / "c")
    held.clear()
    generate.main(go)
    assert held == [4]
    peft_files.save(adapted(place / "llama", 1, 16), tmp_path / "c")
    with pytest.raises(UserError, match="c: 32 or 16 bits"):
        generate.main(go)


def test_the_values_of_the_option(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1" / "best").mkdir(parents=True)
    assert generate.named([]) == {} and generate.named(["some/where"]) == {None: "some/where"}
    assert generate.named(["lr=1/best"]) == {None: "lr=1/best"}  # it is a folder
    assert generate.named(["a=lr=1/best", "b=x"]) == {"a": "lr=1/best", "b": "x"}
    for values, says in ((["x", "y"], "--adapter x: each of several adapters needs a name: --adapter NAME=x"),
                         (["a=x", "y"], "--adapter y: each of several adapters needs a name"),
                         (["a=x", "a=y"], "--adapter a=y: two adapters are named a"),
                         (["=x"], "cannot be named ''"), (["runs/a=x"], "cannot be named 'runs/a'")):
        with pytest.raises(UserError, match=says):
            generate.named(values)
    with pytest.raises(UserError, match="gone"):
        generate.main(["--model", str(place / "llama"), "--adapter", "a=gone", "--prompt", "hi"])
