"""Sampling against transformers, rows of a KV cache against each row alone, stop strings, the chat, a file of prompts."""
import io
import json
import math
import sys

import pytest
import torch
from conftest import make_folder

import data
import generate
import lora
from errors import UserError
from files import weights
from techniques import sampling
from techniques.kv_cache import KVCache

FAMILIES = ["gpt2", "llama", "phi"]  # llama and phi with grouped queries
PROMPTS = [[5, 17, 300, 4000, 2, 9], [44], [7, 7, 8] * 9, [1000, 2000, 3000], [12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {f: make_folder(place / f, f, tie_word_embeddings=False) for f in FAMILIES}


@pytest.fixture(params=FAMILIES)
def model(request, folders):
    return weights.load(folders[request.param]).eval()


# ---------------------------------------------------------------------------------------------- sampling

def some_logits():
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 500, generator=rng) * torch.tensor([[0.5], [2.0], [8.0]])
    ties = torch.randint(-3, 4, (2, 500), generator=rng).float()
    return [*wide, *ties, torch.zeros(500), torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0])]


OPTIONS = [{}, {"top_k": 1}, {"top_k": 7}, {"top_k": 10**6}, {"top_p": 0.5}, {"top_p": 1e-9}, {"min_p": 0.1}, {"min_p": 1.0},
           {"temperature": 0.3}, {"temperature": 3.0}, {"top_k": 40, "top_p": 0.7, "min_p": 0.05, "temperature": 1.4},
           {"top_k": 3, "top_p": 0.999}, {"top_p": 0.8, "min_p": 0.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_candidates_are_those_of_transformers(options):
    """The same probabilities. Which of several equally likely tokens top_p leaves out depends on the order of sorting."""
    t = pytest.importorskip("transformers")
    o = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **options}
    chain = [t.TemperatureLogitsWarper(o["temperature"])]
    chain += [t.TopKLogitsWarper(o["top_k"])] if o["top_k"] else []
    chain += [t.TopPLogitsWarper(o["top_p"])] if o["top_p"] < 1 else []
    chain += [t.MinPLogitsWarper(o["min_p"])] if o["min_p"] else []
    for logits in some_logits():
        wanted = logits[None]
        for warp in chain:
            wanted = warp(None, wanted)
        wanted = wanted.softmax(-1)[0]
        p, ids = sampling.candidates(logits, **o)
        got = torch.zeros_like(wanted).scatter(0, ids, p / p.sum())
        if len(set(logits.tolist())) == len(logits) or "top_p" not in options:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got.sort().values, wanted.sort().values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_is_that_of_transformers(penalty, monkeypatch):
    t = pytest.importorskip("transformers")
    seen = [3, 1, 4, 1, 5, 0, 4]
    drawn_from = []
    monkeypatch.setattr(sampling, "candidates", lambda logits, *more: drawn_from.append(logits) or (torch.ones(1), [0]))
    for logits in some_logits():
        before = logits.clone()
        wanted = t.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[i for i in seen if i < len(logits)]]),
                                                            logits[None].clone())[0]
        options = {"repetition_penalty": penalty, "seen": [i for i in seen if i < len(logits)]}
        sampling.choose(logits, 1.0, 1.0, torch.Generator(), **options)
        torch.testing.assert_close(drawn_from.pop(), wanted, rtol=0, atol=0)
        assert sampling.choose(logits, 0, 1.0, None, **options) == int(wanted.argmax())
        assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature, top_p", [(0.7, 0.9), (1.0, 1.0), (5.0, 0.999)])
def test_a_token_is_drawn_as_often_as_it_is_likely(temperature, top_p):
    """4,000 draws of some 12 possible tokens (of all 4,096 in the last case): each share within 5 standard deviations."""
    logits = torch.full((4096,), -60.0)
    logits[:12] = torch.randn(12, generator=torch.Generator().manual_seed(1))
    logits = logits[torch.randperm(4096, generator=torch.Generator().manual_seed(2))]
    rng, n = torch.Generator().manual_seed(3), 4000
    counts = torch.bincount(torch.tensor([sampling.choose(logits, temperature, top_p, rng) for _ in range(n)]),
                            minlength=4096)
    p, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    wanted = torch.zeros(4096).scatter(0, order, p / p.sum())
    assert ((counts / n - wanted).abs() <= 5 * (wanted * (1 - wanted) / n).sqrt() + 2 / n).all()
    assert (counts > 0).sum() > 5


def test_a_draw_of_nearly_1_is_a_token_that_may_be_drawn(monkeypatch):
    """The place is found among sums of float64. Rounding must not lead behind the last token that is left."""
    logits = torch.tensor([0.0, 1.0, -math.inf, 2.0, -math.inf])
    for u, wanted in ((0.0, 0), (1 - 2**-53, 3), (1.0, 3)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: torch.tensor(u, dtype=torch.float64))
        assert sampling.choose(logits, 1.0, 1.0, None) == wanted
        assert sampling.choose(logits, 1.0, 0.99, None) == (3 if u == 0 else 0)  # from the most likely to the least


# ---------------------------------------------------------------------------------------------- rows of a KV cache

@torch.no_grad()
def alone(model, ids):
    return model(torch.tensor([ids]))[0]


def near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, b.std().item()))


@torch.no_grad()
def test_a_row_sees_what_it_sees_alone(model):
    """Rows of different lengths join and leave, in pieces, in slots that are no neighbours. All logits are compared."""
    cache, held = KVCache(model.config, 40, 4), {}
    rng = torch.Generator().manual_seed(1)

    def forward(**pieces):
        slots, counts = [int(s[1:]) for s in pieces], list(pieces.values())
        ids = torch.randint(4096, (1, sum(counts)), generator=rng)
        logits = model(ids, cache=cache.rows(slots, counts))
        for slot, its_ids, its_logits in zip(slots, ids[0].split(counts), logits[0].split(counts), strict=True):
            before = len(held.setdefault(slot, []))
            held[slot] += its_ids.tolist()
            near(its_logits, alone(model, held[slot])[before:])
            assert cache.lengths[slot] == len(held[slot])

    forward(s1=9)
    forward(s0=4, s1=1, s2=6)  # one token, and two prompts
    forward(s2=3, s0=1)  # a piece of a prompt; not in the order of the slots
    forward(s0=1, s1=1, s2=1)
    cache.release(1)
    held.pop(1)
    forward(s3=5, s0=2)
    cache.move(3, 1)
    held[1] = held.pop(3)
    forward(s0=1, s1=1, s2=1)
    forward(s0=1, s2=1, s1=1)  # neighbours, but not in order
    forward(s3=2, s1=1)
    forward(s0=1, s1=30, s3=1)
    assert cache.lengths == [11, 38, 12, 3] and len(cache.k) == 3


@torch.no_grad()
def test_a_text_may_fill_its_slot_beside_a_longer_piece(model):
    """Slot 0 gets position 127, the last that the model has, in a forward of 9 tokens."""
    ids = torch.randint(4096, (1, 128), generator=torch.Generator().manual_seed(2))
    cache = KVCache(model.config, 128, 2)
    model(ids[:, :127], cache=cache.rows([0], [127]))
    two = torch.cat([ids[:, 127:], ids[:, :8]], 1)
    logits = model(two, cache=cache.rows([0, 1], [1, 8]))[0]
    near(logits[:1], alone(model, ids[0].tolist())[127:])
    near(logits[1:], alone(model, ids[0, :8].tolist()))


@torch.no_grad()
def test_a_damaged_row_harms_no_other(model):
    """What a slot holds beyond its length has the weight 0, but 0 * nan would be nan."""
    ids = torch.tensor([PROMPTS[0]])
    cache = KVCache(model.config, 20, 2)
    model(torch.cat([ids, ids], 1), cache=cache.rows([0], [12]))
    for x in cache.v + cache.k:
        x[0, :, :12] = math.nan
    cache.release(0)
    model(ids, cache=cache.rows([1], [6]))
    model(ids[:, :2], cache=cache.rows([0], [2]))
    logits = model(ids[:, 2:4], cache=cache.rows([0, 1], [1, 1]))[0]  # both see 7 places
    near(logits[:1], alone(model, PROMPTS[0][:3])[2:])


def test_the_cache_refuses_what_it_cannot_hold(folders):
    model = weights.load(folders["llama"])
    for slots, counts in (([0, 0], [1, 1]), ([0], [1, 2]), ([0, 1], [1, 0])):
        with pytest.raises(ValueError, match="must be different"):
            KVCache(model.config, 8, 2).rows(slots, counts)
    for ids, counts, says in ((torch.zeros(1, 10), [9, 1], "room for 8"), (torch.zeros(1, 3), [2, 2], "3 ids, but"),
                              (torch.zeros(1, 5), [2, 2], "5 ids, but")):
        with pytest.raises(ValueError, match=says), torch.no_grad():
            model(ids.long(), cache=KVCache(model.config, 8, 2).rows([0, 1], counts))


@torch.no_grad()
def test_a_step_takes_the_last_of_each_rows_tokens(model):
    ids = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    for row, logits in zip(ids, generate.step(model, KVCache(model.config, 9, 3), [0, 1, 2], ids), strict=True):
        near(logits, alone(model, row)[-1:])
    first, middle, last = generate.step(model, KVCache(model.config, 9, 3), [0, 1, 2], ids, whole={1})
    near(middle, alone(model, ids[1]))
    assert len(first) == len(last) == 1


# ---------------------------------------------------------------------------------------------- replies

def made(model, batch_size, **options):
    replies = [generate.Reply(model.config, ids, **options) for ids in PROMPTS]
    for _ in generate.run(model, replies, batch_size):
        pass
    return replies


@pytest.mark.parametrize("held", ["32", "8", "4", "adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_the_replies_of_each_prompt_alone(family, held, folders):
    """In float32, also over weights of 8 and 4 bits: bfloat16 rounds so coarsely that another order of a sum can be seen."""
    model = weights.load(folders[family], bits=int(held) if held.isdigit() else 32).float()
    if held == "adapter":
        lora.inject(model, r=4)
        rng = torch.Generator().manual_seed(4)
        for n, p in model.named_parameters():
            if "lora_" in n:
                torch.nn.init.normal_(p, std=0.3, generator=rng)
    for options in ({"temperature": 0}, {"temperature": 3.0, "seed": 7, "top_p": 1.0, "repetition_penalty": 1.1}):
        options["max_new_tokens"] = 12
        options["stop_ids"] = {generate.generate(model, PROMPTS[2], **options)[len(PROMPTS[2]) + 4]}
        wanted = [generate.generate(model, ids, **options)[len(ids):] for ids in PROMPTS]
        assert options["temperature"] == 0 or len(set(map(tuple, wanted))) > 3
        for batch_size in (1, 2, 3, 8):
            replies = made(model, batch_size, **options)
            assert [r.new for r in replies] == wanted
            ends = ["stop" if w[-1] in options["stop_ids"] else "length" for w in wanted]
            assert [r.finish_reason for r in replies] == ends


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_rows_differ_by_rounding_only(family, bits, folders):
    model = weights.load(folders[family], bits=bits).eval()
    cache = KVCache(model.config, 40, len(PROMPTS))
    for slot, ids in enumerate(PROMPTS):
        generate.step(model, cache, [slot], [ids])
    together = torch.cat(generate.step(model, cache, list(range(len(PROMPTS))), [[8]] * len(PROMPTS))).float()
    for row, ids in zip(together, PROMPTS):
        cache = KVCache(model.config, 40, 1)
        generate.step(model, cache, [0], [ids])
        assert (row - generate.step(model, cache, [0], [[8]])[0].float()).abs().max() < 0.2 * row.std()


def test_replies_join_as_others_leave(folders, monkeypatch):
    model, rows = weights.load(folders["gpt2"]).train(), []
    step = generate.step
    monkeypatch.setattr(generate, "step", lambda m, c, slots, *more: rows.append(len(slots)) or step(m, c, slots, *more))
    replies = [generate.Reply(model.config, ids, max_new_tokens=n) for ids, n in zip(PROMPTS, (2, 9, 3, 3, 0))]
    assert sum(1 for _ in generate.run(model, replies, 2)) == 17 == sum(rows) and model.training
    assert rows == [1, 1, 2, 1, 2, 2, 1, 2, 2, 1, 1, 1]
    assert replies[4].finish_reason == "length" and not replies[4].new


def test_the_penalty_is_for_tokens_of_the_prompt_and_of_the_reply(folders, monkeypatch):
    model, seen, choose = weights.load(folders["gpt2"]), [], generate.choose
    monkeypatch.setattr(generate, "choose", lambda *args, **more: seen.append(more["seen"]) or choose(*args, **more))
    ids = generate.generate(model, PROMPTS[0], max_new_tokens=3)
    assert seen == [ids[:6], ids[:7], ids[:8]]


class Letters:
    """A tokenizer whose tokens are single characters, or the bytes of one: token 1000 + n is byte n. 0 ends a reply."""
    stop_ids = {0}

    def decode(self, ids):
        return b"".join(bytes([i - 1000]) if i >= 1000 else chr(i).encode() for i in ids).decode("utf-8", "replace")


def told(folders, monkeypatch, tokens, **options):
    """What reply() returns and streams if the model says these tokens."""
    model, said, pieces = weights.load(folders["gpt2"]), iter(tokens), []
    monkeypatch.setattr(generate, "choose", lambda *args, **more: next(said))
    text = generate.reply(model, Letters(), [1, 2], pieces.append, max_new_tokens=len(tokens), **options)
    return text, pieces, next(said, None)


@pytest.mark.parametrize("said, stop, text, pieces", [
    ("one\nUser: two", ["\nUser:"], "one", ["o", "n", "e"]),
    ("one\nUse", ["\nUser:"], "one\nUse", ["o", "n", "e", "\nUse"]),  # no stop string after all
    ("one\nUsed", ["\nUser:"], "one\nUsed", ["o", "n", "e", "\nUsed"]),
    ("aab", ["ab"], "a", ["a"]),  # the a that waits is not the one of the stop string
    ("abcd", ["xx", "bc", "b"], "a", ["a"]),
    ("abc", ["c", "abc"], "", []),
    ("ab", ["ab"], "", []),
    ("abc\0", ["cd"], "abc", ["a", "b", "c"])])
def test_stop_strings(said, stop, text, pieces, folders, monkeypatch):
    assert told(folders, monkeypatch, list(map(ord, said)), stop=stop)[:2] == (text, pieces)


def test_a_stop_string_ends_the_work_and_a_character_may_have_several_tokens(folders, monkeypatch):
    e = [1000 + b for b in "é".encode()]
    text, pieces, following = told(folders, monkeypatch, [97, *e, 98, *e, 99, 100], stop=["bé"])
    assert (text, pieces, following) == ("aé", ["a", "é"], 99)
    assert told(folders, monkeypatch, [97, e[0]])[:2] == ("a\ufffd", ["a"])


# ---------------------------------------------------------------------------------------------- the chat

def talk(monkeypatch, text, **more):
    """-> the conversations that the model was asked to continue. A token is a word."""
    asked = []

    def encode(messages):
        return [w for m in messages for w in m["content"].split()]

    def say(ids):
        asked.append(" ".join(ids))
        return f"r{len(asked)}"

    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    generate.chat(encode, say, more.get("system", []), more.get("room", 99))
    return asked


def test_a_chat_remembers_and_starts_anew(monkeypatch, capsys):
    assert talk(monkeypatch, "a\n\nb b\nc\n /new \nd\n", system=[{"role": "system", "content": "S"}]) == [
        "S a", "S a r1 b b", "S a r1 b b r2 c", "S d"]
    assert capsys.readouterr() == ("", "")


def test_a_chat_that_is_too_long_forgets_its_oldest_turns_and_says_so(monkeypatch, capsys):
    system = [{"role": "system", "content": "S"}]
    assert talk(monkeypatch, "a a a\nb\nc c c c\nd d d d d d d\ne\n", system=system, room=6) == [
        "S a a a", "S a a a r1 b", "S c c c c", "S d d d d d d d", "S e"]
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 3 and all("oldest messages are forgotten" in n for n in notes)


def test_the_command_keeps_the_conversation(folders, monkeypatch, capsys):
    asked, prompt_ids = [], data.prompt_ids
    monkeypatch.setattr(data, "prompt_ids", lambda row, *more: asked.append(list(row)) or prompt_ids(row, *more))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    generate.main(["--model", str(folders["gpt2"]), "--max-new-tokens", "2", "--temperature", "0", "--system", "Be kind."])
    roles = [[m["role"] for m in row] for row in asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"]]
    said = capsys.readouterr().out.split("\n")[0]
    assert asked[-1][2]["content"] == said and asked[-1][1]["content"] == "one"


def test_a_template_without_system_messages(folders, tmp_path):
    folder = make_folder(tmp_path / "deaf", "gpt2")
    (folder / "chat_template.jinja").write_text("{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}"
                                                "{% endfor %}")
    with pytest.raises(UserError, match="the chat template leaves out the system message 'Be kind.'"):
        generate.main(["--model", str(folder), "--prompt", "hi", "--system", "Be kind."])


# ---------------------------------------------------------------------------------------------- a file of prompts

ROWS = [{"prompt": "Say a number", "id": 7}, {"instruction": "Say", "input": "this"}, {"messages": [
    {"role": "user", "content": "One"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "Two é"},
    {"role": "assistant", "content": "wanted"}]}, {"instruction": "Go", "output": "gone"},
    {"prompt": "a raw", "completion": " text"}]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize("options", ["--temperature 0", "--temperature 1.3 --seed 5"])
def test_a_file_of_prompts(options, folders, tmp_path, capsys):
    few = ["--model", str(folders["llama"]), "--max-new-tokens", "9", *options.split()]
    prompts = write_rows(tmp_path / "in.jsonl", ROWS)

    def answers(name, *more):
        generate.main([*few, "--prompts", prompts, "--out", str(tmp_path / name), *more])
        rows = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert [{k: v for k, v in r.items() if k not in ("reply", "finish_reason")} for r in rows] == ROWS
        return [(r["reply"], r["finish_reason"]) for r in rows]

    found = answers("out.jsonl")
    assert "5 replies of 45 tokens are in" in capsys.readouterr().out and {end for _, end in found} == {"length"}
    for row, words in ((0, ["--prompt", "Say a number"]), (3, ["--prompt", "Go"]), (4, ["--raw", "--prompt", "a raw"])):
        generate.main([*few, *words])
        assert capsys.readouterr().out == ("a raw" if row == 4 else "") + found[row][0].rstrip("\ufffd") + "\n"
    stop = found[0][0][5:9]  # of the first reply, and perhaps of others
    wanted = [(text.partition(stop)[0], "stop") if stop in text else (text, end) for text, end in found]
    assert answers("stopped.jsonl", "--stop", stop, "--stop", "never said", "--batch-size", "2") == wanted != found
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "stopped.jsonl"]


def test_which_conversation_a_row_asks_for():
    system = [{"role": "system", "content": "S"}]
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "u"}]}

    def turns(row, raw=False, system=()):
        return generate.conversation("f:1", row, raw, list(system))[0]

    assert turns(ROWS[2]) == [{"role": r, "content": c} for r, c in (("user", "One"), ("assistant", "1"), ("user", "Two é"))]
    assert turns(ROWS[0], system=system) == [*system, {"role": "user", "content": "Say a number"}]
    assert turns(ROWS[1])[0]["input"] == "this" and len(turns(ROWS[1])) == 1
    assert turns(own, system=system) == own["messages"]
    assert turns(ROWS[0], raw=True) == [("Say a number", False)] and turns(ROWS[4]) == [("a raw", False)]


def test_nothing_is_left_of_a_file_that_is_not_finished(folders, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    few = ["--model", str(folders["llama"]), "--prompts", write_rows(tmp_path / "in.jsonl", ROWS), "--out"]
    monkeypatch.setattr(generate.Reply, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        generate.main([*few, str(tmp_path / "out.jsonl")])
    assert [f.name for f in tmp_path.iterdir()] == ["in.jsonl"]
    with pytest.raises(UserError, match="could not be written"):  # before the work, not after it
        generate.main([*few, str(tmp_path / "in.jsonl" / "out.jsonl")])


@pytest.mark.parametrize("rows, words, says", [
    ([{"prompt": "a"}, {"question": "b"}], "", "in.jsonl:2: no prompt in it; expected prompt, messages, or instruction"),
    ([{"prompt": 5}], "", "in.jsonl:1: field 'prompt' must be text, found int"),
    ([{"prompt": " "}], "", "in.jsonl:1: the prompt is empty"),
    ([{"prompt": "a", "reply": "b"}], "", "in.jsonl:1: the row has a field 'reply'"),
    ([{"messages": []}], "", "in.jsonl:1: the conversation does not end with a user turn"),
    ([{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}], "", "does not end with a user"),
    ([{"messages": [{"role": "user", "content": "a"}]}], "--raw", "in.jsonl:1: --raw needs a row with a prompt"),
    ([{"prompt": "a", "completion": "b"}], "--system S", "in.jsonl:1: --system needs a chat template"),
    ([{"prompt": "a"}, {"prompt": "word " * 200}], "", r"in.jsonl:2: the prompt has 2\d\d tokens, the model 128 positions"),
    ([], "", "in.jsonl: no rows in it")])
def test_a_bad_row_has_its_line_named(rows, words, says, folders, tmp_path):
    with pytest.raises(UserError, match=says) as e:
        generate.main(["--model", str(folders["gpt2"]), "--prompts", write_rows(tmp_path / "in.jsonl", rows),
                       "--out", str(tmp_path / "out.jsonl"), *words.split()])
    assert "\n" not in str(e.value) and not (tmp_path / "out.jsonl").exists()
