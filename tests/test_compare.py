"""compare.py: its losses are transformers' and PEFT's, nothing differs from itself, and every bad line is named."""
import json
import re

import pytest
import torch
from conftest import make_data, make_folder
from runs import no_picture, options

import compare
import data
import generate
import lora
import train
from errors import UserError
from files import peft_files, weights
from methods import dora, prefix
from run import comparison


def adapted(folder, to, seed, method=lora, zero=False, **options):
    """Save a random adapter; with B = 0 it changes nothing."""
    model, rng = weights.load(folder), torch.Generator().manual_seed(seed)
    method.inject(model, **options)
    for n, p in model.named_parameters():
        if p.requires_grad and not (zero and "lora_B" in n):
            torch.nn.init.normal_(p, std=0.3 / p.shape[-1] ** 0.5, generator=rng)
    peft_files.save(model, to)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, adapters of it, and rows. Replies of the first 3 rows of answers.jsonl are the base's own, of the next 5
    those of adapter a."""
    root = tmp_path_factory.mktemp("compare")
    make_folder(root / "tiny")
    adapted(root / "tiny", root / "a", 1, r=4, targets=["all"])
    adapted(root / "tiny", root / "b", 2, r=2)
    adapted(root / "tiny", root / "zero", 3, r=2, zero=True)
    adapted(root / "tiny", root / "dora", 4, method=dora, r=2)
    adapted(root / "tiny", root / "prefix", 5, method=prefix, n=20)
    make_data(root / "rows.jsonl", 23)
    (root / "text.txt").write_text("The river was low that year, and nobody could say why. " * 12)
    base, tokenizer, rows = weights.load(root / "tiny"), data.load_tokenizer(str(root / "tiny")), []
    a = peft_files.load(weights.load(root / "tiny"), root / "a")
    for i in range(10):
        prompt = f"What is {i} and {i * i}?"
        says = [generate.reply(m, tokenizer, tokenizer.encode(prompt), max_new_tokens=4, temperature=0) for m in (base, a)]
        assert says[0].strip() != says[1].strip() and all(s.strip() for s in says)
        rows.append({"prompt": prompt, "completion": says[0] if i < 3 else says[1] if i < 8 else "<b>no|such</b> reply"})
    (root / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)
    no_picture(monkeypatch)


def run(out, *words, rows="rows.jsonl"):
    """compare.json of `python compare.py`, on the CPU."""
    compare.main(["--model", "tiny", "--data", str(rows), "--general", "text.txt", "--device", "cpu", "--out", str(out),
                  "--max-length", "100", *map(str, words)])
    return json.loads((out / "compare.json").read_text())


def losses(found, label):
    return torch.tensor([e["losses"][label] for e in found["examples"]])


@pytest.mark.parametrize("words", [[], ["--adapter", "zero"], ["--adapter", "zero=zero", "--adapter", "a=a"]])
def test_what_changes_nothing_differs_by_exactly_nothing(words, tmp_path, capsys):
    found = run(tmp_path / "out", *words)
    label = "zero" if words else "tiny again"
    s, base = found["states"][label], found["states"]["tiny"]
    assert torch.equal(losses(found, label), losses(found, "tiny")) and s["difference"] == [0, 0, 0] and s["improved"] == 0
    assert s["loss"] == base["loss"] and s["general_loss"] == base["general_loss"]
    assert f"{label} changes nothing" in capsys.readouterr().out
    if "a=a" in words:
        assert found["states"]["a"]["difference"][0] != 0


def test_losses_are_those_of_transformers_and_peft(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    found = run(tmp_path / "out", "--adapter", "a=a", "--adapter", "b=b", "--batch-size", 4)
    tokenizer = data.load_tokenizer("tiny")
    rows = compare.read_data("rows.jsonl", tokenizer, data.load_template("auto", tokenizer), 100)
    for label in ("tiny", "a", "b"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained("tiny")
        theirs = (theirs if label == "tiny" else peft.PeftModel.from_pretrained(theirs, label)).eval()
        wanted = []
        for i in range(len(rows)):
            e = rows[i]
            with torch.no_grad():
                logits = theirs(torch.tensor([e.ids])).logits[0]
            wanted.append(torch.nn.functional.cross_entropy(logits, torch.tensor(e.targets)))
        torch.testing.assert_close(losses(found, label), torch.stack(wanted), rtol=0, atol=1e-5)
        s, labels = found["states"][label], rows.labels
        assert s["loss"] == pytest.approx(float((torch.stack(wanted) * labels).sum() / labels.sum()), abs=1e-5)
        assert s["mean_loss"] == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-5)


def test_the_worst_examples_are_those_that_lost_most(tmp_path):
    found = run(tmp_path / "out", "--adapter", "a=a")
    difference, worst = losses(found, "a") - losses(found, "tiny"), found["states"]["a"]["worst"]
    assert worst == difference.argsort(descending=True)[:5].tolist() and 0 < (difference < 0).sum() < 23
    assert found["states"]["a"]["improved"] == (difference < 0).sum()
    texts = [e["text"] for e in found["examples"]]  # without the template's words, which all begin with
    assert texts[3].startswith("3 please please please ###") and texts[0].startswith("0 ###")
    page = (tmp_path / "out" / "compare.md").read_text()
    assert [page.index(compare.safe(texts[i])) for i in worst] == sorted(page.index(compare.safe(texts[i])) for i in worst)


def test_neither_batches_nor_the_others_change_a_number(tmp_path):
    """One by one, in large batches, alone (where the adapter is on the model itself) and beside another."""
    together = run(tmp_path / "together", "--adapter", "a=a", "--adapter", "b=b", "--batch-size", 1)
    alone = run(tmp_path / "alone", "--adapter", "a", "--batch-size", 16)
    for label in ("tiny", "a"):
        torch.testing.assert_close(losses(together, label), losses(alone, label), rtol=0, atol=1e-5)
        assert together["states"][label]["general_loss"] == pytest.approx(alone["states"][label]["general_loss"], abs=1e-5)
    bytes_of = {name: sum(t.nbytes for m in peft_files.read(weights.load("tiny"), name).values()
                          for t in (m.lora_A, *m.lora_B)) for name in "ab"}
    assert {label: s["adapter_bytes"] for label, s in together["states"].items()} == {"tiny": 0, **bytes_of}
    again, base = (run(tmp_path / str(n), *words, "--batch-size", 1) for n, words in enumerate((["--adapter", "a"], [])))
    for label in ("tiny", "a"):  # an adapter that waits is in no peak, and no gradient is
        assert again["states"][label]["peak"] == together["states"][label]["peak"] > again["weight_bytes"]
    assert base["states"]["tiny"]["peak"] == base["states"]["tiny again"]["peak"] == again["states"]["tiny"]["peak"]


@pytest.mark.parametrize("name", ["dora", "prefix"])
def test_an_adapter_that_cannot_share_is_measured_alone(name, tmp_path):
    found = run(tmp_path / "out", "--adapter", name, "--max-examples", 7)
    model, tokenizer = peft_files.load(weights.load("tiny"), name), data.load_tokenizer("tiny")
    rows = compare.read_data("rows.jsonl", tokenizer, data.load_template("auto", tokenizer), 100)
    numbers = torch.arange(7) * 23 // 7
    alone = comparison.measure(model, {name: None}, rows, numbers, 3)[name]
    torch.testing.assert_close(losses(found, name), alone.losses.float(), rtol=0, atol=1e-5)
    assert len(found["examples"]) == 7 and found["states"][name]["difference"][0] != 0
    with pytest.raises(UserError, match="share a model|load it alone"):
        run(tmp_path / "two", "--adapter", "a=a", "--adapter", f"{name}={name}")
    assert {f.name for f in tmp_path.iterdir()} == {"out"}


def test_answers_are_counted_and_tested(tmp_path, capsys):
    found = run(tmp_path / "out", "--adapter", "a=a", "--exact-match", "--max-new-tokens", 4, "--batch-size", 3,
                rows="answers.jsonl")
    base, a = found["states"]["tiny"], found["states"]["a"]
    assert (base["right"], a["right"], a["only_base"], a["only_this"]) == (3, 5, 3, 5)
    assert a["p"] == 2 * (1 + 8 + 28 + 56) / 256  # McNemar's exact test, by hand
    assert [q["replies"]["a"]["right"] for q in found["questions"]] == [False] * 3 + [True] * 5 + [False] * 2
    assert base["reply_tokens_per_s"] > 0 and "5 of 10 (50.0 %)" in capsys.readouterr().out
    text = (tmp_path / "out" / "compare.md").read_text()
    row = next(line for line in text.splitlines() if "such</b> reply" in line)
    assert "`" in row.partition("<b>")[0] and "no\\|such" in row  # no HTML or table of the data is shown as such


def test_a_pattern_finds_the_answer(tmp_path):
    number = comparison.extractor(r"#### (-?\d+)")
    assert (number("so #### 12 and #### 13"), number("12"), comparison.extractor("^[a-z]+")(" ab cd")) == ("12", None, "ab")
    turns = [("user", "hi"), ("assistant", "it is 3"), ("user", "why " * 150), ("assistant", "it is 4")]
    rows = [{"prompt": f"{i}?", "completion": f"it is {i}"} for i in "12x"]
    rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run(tmp_path / "out", "--match", r"\d", "--max-new-tokens", 2, rows=tmp_path / "rows.jsonl")
    assert [q["answer"] for q in found["questions"]] == ["1", "2"]  # the third has none, the fourth no room for a reply
    with pytest.raises(UserError, match="none of the examples has a prompt, and a reference in which"):
        run(tmp_path / "none", "--match", "not there", rows=tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"--match \(: not a regular expression"):
        run(tmp_path / "none", "--match", "(")


VOTE = {"time": "2026-07-01T12:00:00.000Z", "prompt": "Hi", "a": "tiny", "b": "a", "replies": {"a": "x", "b": "y"},
        "vote": "a"}


def write_votes(path, *changes):
    path.write_text("".join(json.dumps({**VOTE, **c}) + "\n" for c in changes))
    return path


def test_votes_are_counted_whatever_side_a_name_was_on(tmp_path, capsys):
    swapped = {"a": "a", "b": "tiny"}
    path = write_votes(tmp_path / "v.jsonl", {}, {"vote": "tie"}, {"vote": "b"}, *[{**swapped, "vote": "a"}] * 8,
                       {"a": "c", "b": "tiny", "vote": "tie"})
    first, second = comparison.read_votes(path)  # a: 1 as b, and 8 as a, of 10
    assert (first["a"], first["b"], first["wins_a"], first["wins_b"], first["ties"]) == ("a", "tiny", 9, 1, 1)
    assert first["share_a"] == 0.9 and first["interval"] == pytest.approx((0.55498, 0.99747), abs=1e-5)
    assert (second["ties"], second["share_a"], second["interval"]) == (1, None, (0, 1))
    run(tmp_path / "out", "--votes", path)
    line = "a against tiny: 9 to 1, and 1 ties; of the others a won 90.0 % (95 % interval 55.5 to 99.7 %)"
    assert line in capsys.readouterr().out and line in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.parametrize("change,words", [
    ({"vote": "c"}, "vote must be a, b or tie, found 'c'"), ({"vote": None}, "vote must be text, found None"),
    ({"time": "noon"}, "time must be as in"), ({"replies": []}, "replies must be an object"),
    ({"replies": {"a": "x"}}, "the reply b must be text, found None"), ({"b": "tiny"}, "a and b are both 'tiny'"),
    ({"a": 3}, "a must be text, found 3")])
def test_a_malformed_vote_is_one_line_with_its_place(change, words, tmp_path):
    path = write_votes(tmp_path / "v.jsonl", {}, change)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}:2: {words}"):
        run(tmp_path / "out", "--votes", path)
    assert {f.name for f in tmp_path.iterdir()} == {"v.jsonl"}


@pytest.mark.parametrize("words,message", [
    (["--adapter", "nowhere"], "nowhere.adapter_config.json"), (["--adapter", "tiny=a"], "both named tiny"),
    (["--max-new-tokens", "9"], "--max-new-tokens has no effect without"), (["--batch-size", "0"], "--batch-size 0 must be"),
    (["--max-examples", "24"], "--max-examples 24: 'rows.jsonl' has 23"),
    (["--max-length", "129"], "--max-length 129: tiny has 128 positions$"),
    (["--max-length", "109", "--adapter", "prefix"], "tiny has 108 positions after 20 virtual tokens"),
    (["--general", "nothing.txt"], "nothing.txt: cannot be read"), (["--data", "bad.jsonl"], "bad.jsonl:2: broken JSON")])
def test_bad_input_is_one_line_and_leaves_nothing(words, message, place, tmp_path):
    (place / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    with pytest.raises(UserError, match=message) as e:
        run(tmp_path / "out", *words)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load", None)
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        run(tmp_path)


@pytest.mark.parametrize("difference,words", [
    ((-0.2, -0.3, -0.1), "a helped: the mean loss of an example changes by -0.2000"), ((0.2, 0.1, 0.3), "a did harm"),
    ((-0.1, -0.3, 0.1), "do not show whether a helped"), ((0.0, 0.0, 0.0), "changes nothing")])
def test_the_verdict_goes_by_the_interval(difference, words):
    assert words in compare.verdict("a", {"difference": difference})


def test_a_run_ends_with_the_comparison(place, tmp_path, monkeypatch, capsys):
    cfg = options(tmp_path / "run", "tiny", "rows.jsonl", steps=4, eval_every=2, compare=True, val_frac=0.3, eval_examples=5)
    summary = train.main(cfg)
    found = json.loads((tmp_path / "run" / "compare" / "compare.json").read_text())
    assert found["states"]["best"]["loss"] == pytest.approx(summary["loss"]["val_best"], abs=1e-5)
    assert found["states"]["tiny"]["loss"] == pytest.approx(summary["loss"]["val_before"], abs=1e-5)
    assert len(found["examples"]) == 5
    (tmp_path / "run" / "compare" / "compare.json").unlink()  # as if it had been killed
    train.main(train.TrainConfig(out=str(tmp_path / "run"), resume=True))
    again = json.loads((tmp_path / "run" / "compare" / "compare.json").read_text())
    assert again["examples"] == found["examples"]
    capsys.readouterr()
    train.main(train.TrainConfig(out=str(tmp_path / "run"), resume=True))
    assert "is finished" in capsys.readouterr().out
    for more in ({"full": True}, {"task_column": "task"}):
        with pytest.raises(UserError, match="--compare puts one adapter"):
            train.main(options(tmp_path / "other", "tiny", "rows.jsonl", compare=True, **more))
    with pytest.raises(UserError, match="--compare measures train.py's own loss, not "):
        train.main(options(tmp_path / "other", "tiny", "rows.jsonl", compare=True), loss=lambda *x: 0)
