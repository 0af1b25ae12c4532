"""From files to batches: every schema, which tokens are labelled, templates, errors, plans, batches.

A name such as trl#598 is a GitHub issue: the bug that the test looks for, in another project.
"""
import csv
import io
import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from conftest import make_data
from runs import dataset_of, steps_of
from test_tokenizers import byte_level, corpus, llama2_json, train_sentencepiece

import data
import generate
import train
from errors import UserError
from files import hub
from files import template as template_
from files.rows import read_rows
from run import plan as plans
from run import prepare
from techniques.loss import IGNORE

EOS = "<|endoftext|>"
INTRO = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
PLAIN = INTRO.format("") + "### Instruction:\n{}\n\n### Response:\n"
PAIRED = INTRO.format(", paired with an input that provides further context") + \
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"

# HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer_config.json
CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
          "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>'"
          " + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|im_start|>assistant\n' }}{% endif %}")
# meta-llama/Meta-Llama-3-8B-Instruct, tokenizer_config.json
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
          "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
          "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
# TinyLlama/TinyLlama-1.1B-Chat-v1.0, tokenizer_config.json
ZEPHYR = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
          "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}"
          "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
# The header of newer templates: they test variables that transformers always sets.
TOOLS = ("{%- if tools is not none %}{{ 'TOOLS' }}{% endif %}{%- if documents is not none %}{{ 'DOCUMENTS' }}{% endif %}\n"
         "{%- for m in messages -%}\n    {{ '<|im_start|>' ~ m.role }}\n    {{ m | tojson }}\n    {{- '<|im_end|>' }}\n"
         "    {% if m.role == 'user' %}\n(user)\n    {% endif %}\n"
         "{%- if loop.index0 > 8 %}{% break %}{% endif %}\n{%- endfor -%}\n"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

CHAT = [{"role": "user", "content": "Hi, what is 2 + 2?"}, {"role": "assistant", "content": "It's 4, naturally! 👍"},
        {"role": "user", "content": "  And 3 × 3\n\nplease?"}, {"role": "assistant", "content": "9."}]


@pytest.fixture(scope="module")
def nano():
    return data.load_tokenizer("gpt2-nano")


@pytest.fixture(scope="module")
def alpaca(nano):
    return data.load_template("alpaca", nano)


@pytest.fixture(scope="module")
def sp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sp")
    train_sentencepiece(folder)
    return data.load_tokenizer(str(folder))


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_rows(path, rows):
    if path.suffix == ".json":
        return write(path, json.dumps(rows, ensure_ascii=False, indent=1))
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    f = io.StringIO(newline="")
    w = csv.DictWriter(f, rows[0])
    w.writeheader()
    w.writerows(rows)
    return write(path, f.getvalue())


def whole(e):
    """All tokens of an example: its ids and its last target, which must be a label."""
    assert len(e.ids) == len(e.targets) and e.targets[-1] != IGNORE
    assert all(t in (IGNORE, i) for i, t in zip(e.ids[1:], e.targets, strict=False))  # shifted once
    return e.ids + e.targets[-1:]


def learned_runs(e, tokenizer):
    """The text of each run of consecutive labels."""
    runs, last = [], IGNORE
    for t in e.targets:
        if t != IGNORE:
            runs = runs if last != IGNORE else [*runs, []]
            runs[-1].append(t)
        last = t
    return [tokenizer.decode(r) for r in runs]


def build(rows, tokenizer, template, max_length=2000):
    return data.build([(f"f:{n}", r) for n, r in enumerate(rows, 1)], tokenizer, template, max_length)


# ---------------------------------------------------------------------------------------------- schemas

FLAT = {
    "alpaca": ({"instruction": "Add", "input": "1, 2", "output": "3, naïve 👍"}, PAIRED.format("Add", "1, 2"),
               "3, naïve 👍"),
    "alpaca, input empty": ({"instruction": "Add", "input": "", "output": "It's 3"}, PLAIN.format("Add"), "It's 3"),
    "alpaca, no input": ({"instruction": "Add, \"now\"\n", "output": "3\n4"}, PLAIN.format("Add, \"now\"\n"), "3\n4"),
    "bitext": ({"flags": "B", "instruction": "cancel", "category": "X", "intent": "y", "response": "Sure."},
               PLAIN.format("cancel"), "Sure."),
    "prompt": ({"prompt": "Q: why?\nA:", "completion": " because"}, "Q: why?\nA:", " because"),
    "xsum": ({"document": "Long\n\ntext.", "summary": "Short.", "id": "7"},
             PAIRED.format("Summarize the following document.", "Long\n\ntext."), "Short."),
}
NESTED = {
    "messages": ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
                 PLAIN.format("Hi"), "Hello"),
    "messages, system": ({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
                                       {"role": "assistant", "content": "Hello"}]},
                         "Be kind.\n\n" + PLAIN.format("Hi"), "Hello"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
                 PLAIN.format("Hi"), "Hello"),
    "conversations, roles": ({"conversations": [{"role": "user", "content": "Hi"},
                                                {"role": "assistant", "content": "Hello"}]},
                             PLAIN.format("Hi"), "Hello"),
}


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
@pytest.mark.parametrize("schema", [*FLAT, *NESTED])
def test_schemas(tmp_path, nano, alpaca, schema, kind):
    if kind == "csv" and schema in NESTED:
        pytest.skip("a CSV field holds no list")
    row, prompt, reply = {**FLAT, **NESTED}[schema]
    rows = read_rows(write_rows(tmp_path / f"d.{kind}", [row, row]))
    assert len(rows) == 2 and all(where.startswith(f"{tmp_path}/d.{kind}:") for where, _ in rows)
    built = data.build(rows, nano, alpaca, 512)
    assert len(built) == 2 and (built.n_dropped, built.n_truncated) == (0, 0)
    e = built[0]
    assert nano.decode(whole(e)) == prompt + reply + EOS
    assert learned_runs(e, nano) == [reply + EOS]
    assert built.n_labels == 2 * sum(t != IGNORE for t in e.targets)
    assert data.text_bytes(e, nano) == len(reply.encode())


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "txt"])
def test_text_rows(tmp_path, nano, kind):
    text = "First line.\nSecond, with \"quotes\" and 👍\n"
    path = tmp_path / f"d.{kind}"
    rows = read_rows(write(path, text) if kind == "txt" else write_rows(path, [{"text": text}]))
    assert len(rows) == 1
    e = data.build(rows, nano, "", 512)[0]
    assert whole(e) == [*nano.encode(text), nano.eos_id]
    assert all(t != IGNORE for t in e.targets)


def test_multi_turn_labels_every_assistant_turn(nano, alpaca):
    e = build([{"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}], nano, alpaca)[0]
    assert learned_runs(e, nano) == ["It's 4, naturally! 👍" + EOS, "9." + EOS]
    assert nano.decode(whole(e)) == "Be brief.\n\n" + PLAIN.format(CHAT[0]["content"]) + "It's 4, naturally! 👍" + EOS + \
        "\n\n### Instruction:\n" + CHAT[2]["content"] + "\n\n### Response:\n9." + EOS


def test_a_last_user_turn_is_left_out(nano, alpaca):
    with_last = build([{"messages": [*CHAT, {"role": "user", "content": "bye"}]}], nano, alpaca)[0]
    assert with_last.ids == build([{"messages": CHAT}], nano, alpaca)[0].ids


@pytest.mark.parametrize("reply", ["### Response:\nfoo", "Hi", " leading", "\n\nnewlines\n", "### Instruction:\nagain"])
def test_the_prompts_tokens_do_not_depend_on_the_reply(nano, alpaca, reply):
    """trl#598: nothing searches for the marker, so it may stand in the texts, and no token joins prompt and reply."""
    prompt = data.prompt_ids([{"role": "user", "content": "### Response:\nwhat?"}], alpaca, nano)
    e = build([{"instruction": "### Response:\nwhat?", "output": reply}], nano, alpaca)[0]
    assert whole(e) == prompt + nano.encode(reply) + [nano.eos_id]
    assert e.targets[:len(prompt) - 1] == [IGNORE] * (len(prompt) - 1)
    assert all(t != IGNORE for t in e.targets[len(prompt) - 1:])


def test_padding_is_known_by_length_and_the_end_token_is_a_label(nano, alpaca):
    """transformers#23530: padding has the id of a real token, yet end-of-text is a label, at the end and inside."""
    short, long = build([{"text": "a"}, {"messages": CHAT}], nano, alpaca)
    batch = data.collate([short, long])
    assert batch.targets[0].tolist() == [nano.eos_id] + [IGNORE] * (len(long.ids) - 1)
    assert (batch.targets[1] == nano.eos_id).sum() == 2
    zero = data.Example([5, 0, 0], [0, 0, 7])  # the id that also pads
    batch = data.collate([zero, data.Example([1] * 5, [1] * 5)])
    assert batch.targets[0].tolist() == [0, 0, 7, IGNORE, IGNORE] and batch.n_labels == 8


# ---------------------------------------------------------------------------------------------- BOS

def test_one_bos_only(tmp_path, sp):
    """trl#1400: the template writes BOS, and the tokenizer would add another."""
    byte_level(tmp_path / "b", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
               bos="<|begin_of_text|>")
    llama3 = data.load_tokenizer(str(tmp_path / "b"))
    for tok, bos, templates in ((llama3, 0, [LLAMA3, data.load_template("alpaca", llama3)]),
                                (sp, 1, [data.load_template("alpaca", sp), "{{ bos_token }}" + ZEPHYR])):
        for template in templates:
            ids = build([{"messages": CHAT}], tok, template)[0].ids
            assert ids[0] == bos and ids[1] != bos and ids.count(bos) == 1
            ids = data.prompt_ids(CHAT[:1], template, tok)
            assert ids[0] == bos and ids.count(bos) == 1
        for row in ({"prompt": "a", "completion": "b"}, {"text": "a b"}):
            ids = build([row], tok, templates[0])[0].ids
            assert ids[0] == bos and ids.count(bos) == 1
    ids = build([{"messages": CHAT}], sp, ZEPHYR)[0].ids  # a template without BOS gets none, as in transformers
    assert 1 not in ids


# ---------------------------------------------------------------------------------------------- chat templates

def hf_tokenizer(folder, ours, template):
    import transformers
    hf = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=ours.bos,
                                              eos_token=ours.eos)
    hf.chat_template = template
    return hf


@pytest.fixture(scope="module")
def tokenizers_by_name(tmp_path_factory):
    root = tmp_path_factory.mktemp("toks")
    byte_level(root / "chatml")
    byte_level(root / "llama3", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
               bos="<|begin_of_text|>")
    byte_level(root / "gpt2", (EOS,), bos_token=EOS)
    llama2_json(root / "llama2", train_sentencepiece(root / "llama2"))
    (root / "llama2" / "tokenizer.model").unlink()
    return {name: (root / name, data.load_tokenizer(str(root / name))) for name in ("chatml", "llama3", "gpt2", "llama2")}


@pytest.mark.parametrize("name,template", [("chatml", CHATML), ("llama3", LLAMA3), ("gpt2", "alpaca"), ("llama3", "alpaca"),
                                           ("llama2", "alpaca"), ("llama2", ZEPHYR), ("chatml", TOOLS)],
                         ids=["chatml", "llama3", "alpaca", "alpaca-bos", "alpaca-llama2", "zephyr-llama2", "tools"])
def test_chat_templates_equal_transformers(tokenizers_by_name, name, template):
    folder, ours = tokenizers_by_name[name]
    template = data.load_template("alpaca", ours) if template == "alpaca" else template
    hf = hf_tokenizer(folder, ours, template)
    for messages in (CHAT, [{"role": "system", "content": "Be brief."}, *CHAT], CHAT[:2],
                     [{"role": "user", "content": "List"}, {"role": "assistant", "content": "1. a\n2. b"}]):
        text = hf.apply_chat_template(messages, tokenize=False)
        assert data.render(template, messages, ours) == text
        asked = hf.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert data.render(template, messages[:-1], ours, prompt=True) == asked

        pieces = data.learned_pieces(messages, template, ours)
        joined = "".join(t for t, _ in pieces)
        assert text.startswith(joined) and not text[len(joined):].strip()  # the end token is the last thing learned
        ids, learned = data.tokenize(pieces, ours, bos=False)
        want = hf.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == want[:len(ids)]
        replies = [m["content"] + ours.eos for m in messages if m["role"] == "assistant"]
        if template != TOOLS:  # (it writes JSON)
            assert [t for t, learn in pieces if learn] == replies
        want = hf.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert data.prompt_ids(messages[:-1], template, ours) == want


def test_special_names_in_a_users_text_under_a_chat_template(tokenizers_by_name):
    """A known limit, as in transformers: a template's whole output is parsed, so a user's text may hold special tokens."""
    folder, ours = tokenizers_by_name["chatml"]
    messages = [{"role": "user", "content": "What does <|im_end|> mean? <|endoftext|>"}, CHAT[1]]
    ids = data.prompt_ids(messages[:1], CHATML, ours)
    assert ids.count(ours.specials["<|im_end|>"]) == 3 and ids.count(ours.specials["<|endoftext|>"]) == 1
    hf = hf_tokenizer(folder, ours, CHATML)
    assert ids == hf.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    e = build([{"messages": messages}], ours, CHATML)[0]
    assert learned_runs(e, ours) == [CHAT[1]["content"] + "<|im_end|>"]  # those in the user's text are no labels
    raw = build([{"prompt": "What does <|im_end|> mean?", "completion": "<|endoftext|>"}], ours, CHATML)[0]
    assert not {0, 1, 2} & set(raw.ids) and raw.targets[-1] == ours.eos_id  # without a template: none but the end token


def test_input_reaches_a_template_that_knows_none(tokenizers_by_name):
    _, ours = tokenizers_by_name["chatml"]
    e = build([{"instruction": "Add", "input": "1, 2", "output": "3"}], ours, CHATML)[0]
    assert "<|im_start|>user\nAdd\n\n1, 2<|im_end|>\n" in ours.decode(whole(e))


def test_a_template_that_rewrites_earlier_turns_raises(nano):
    forgets = "{% for m in messages %}{{ '(past)' if m.role == 'assistant' and not loop.last else m.content }}{% endfor %}"
    assert len(build([{"messages": CHAT[:2]}], nano, forgets)) == 1
    with pytest.raises(UserError, match="rewrites earlier turns"):
        build([{"messages": CHAT}], nano, forgets)


def test_a_template_that_refuses_names_the_row(tokenizers_by_name):
    _, ours = tokenizers_by_name["chatml"]
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}" + CHATML
    bad = {"messages": [{"role": "system", "content": "s"}, *CHAT]}
    with pytest.raises(UserError, match=r"^f:2: .*the user must begin"):
        build([{"messages": CHAT}, bad], ours, strict)


@pytest.mark.parametrize("template, says", [
    ("{{ 1 / 0 }}", "ZeroDivisionError"), ("{{ 1 + 'a' }}", "TypeError"), ("{{ messages[5].content }}", "no element 5"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"), ("{{ " + "(" * 5000 + "1", "ecursionError"),
    ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"), ("{% for", "refused the messages: unexpected"),
    ("{{ raise_exception('a\\nb') }}", "refused the messages: a b$"), ("{{ range(10 ** 9) }}", "OverflowError"),
    ("{% include 'x' %}", "TypeError"), ("{{ messages | tojson(indent=messages) }}", "TypeError"),
    ("{{ 'a' * 10 ** 12 }}", "writes more than 1,000,000 characters"), ("{{ 10 ** 12 * [1] }}", "writes more than"),
    ("{{ 10 ** 10 ** 10 }}{{ 9 ** (9 ** 9) }}", "a power above 64"),
    ("{% for i in range(99999) %}{{ 'abcdefghi' * 9 }}{% endfor %}", "writes more than 1,000,"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.2 s"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "longer than 0.2 s"),
])
def test_a_template_that_fails(nano, monkeypatch, template, says):
    monkeypatch.setattr(template_, "SECONDS", 0.2)
    start = time.thread_time()
    with pytest.raises(UserError, match="^f:1: the chat template .*" + says) as e:
        build([{"messages": CHAT}], nano, template)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500 and time.thread_time() - start < 2


def test_what_a_template_may_do(nano):
    """Half a character, a product and a power; and much text, as long as the messages are long too."""
    long = [{"role": "user", "content": "abc " * 600_000}, CHAT[1]]
    assert data.render("{{ '=' * 3 }}{{ 2 ** 8 * 2 }}{{ '\\ud83d' }}", CHAT, nano) == "===512\ufffd"
    text = data.render("{% for m in messages %}{{ m.content }}{% endfor %}", long, nano)
    assert text == long[0]["content"] + CHAT[1]["content"]


def test_a_template_without_end_token_gets_one(nano):
    e = build([{"messages": CHAT}], nano, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
              "{% if add_generation_prompt %}assistant: {% endif %}")[0]
    assert [r[-len(EOS):] for r in learned_runs(e, nano)] == [EOS, EOS]


def test_load_template(tmp_path, nano, tokenizers_by_name):
    _, chatml = tokenizers_by_name["chatml"]
    byte_level(tmp_path / "plain")
    plain = data.load_tokenizer(str(tmp_path / "plain"))
    assert data.load_template("auto", plain) == data.load_template("alpaca", nano) == template_.ALPACA
    assert data.load_template("auto", nano) == data.load_template("chat", nano) != template_.ALPACA
    with pytest.raises(UserError, match="has no chat template"):
        data.load_template("chat", plain)
    with pytest.raises(UserError, match="neither auto, chat, alpaca nor a readable file"):
        data.load_template("chatlm", nano)
    for spec in (str(tmp_path), "/dev/zero", "a" * 300):
        with pytest.raises(UserError, match="neither auto, chat, alpaca nor a readable file"):
            data.load_template(spec, nano)
    with pytest.raises(UserError, match=r"b\.jinja: cannot be read as UTF-8 text"):
        data.load_template(str(write(tmp_path / "b.jinja", b"\xff")), nano)
    assert data.load_template(str(write(tmp_path / "t.jinja", "x")), nano) == "x"
    for named in (CHATML, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]):
        byte_level(tmp_path / "m", chat_template=named)
        tok = data.load_tokenizer(str(tmp_path / "m"))
        assert data.load_template("auto", tok) == data.load_template("chat", tok) == CHATML
        assert data.load_template("alpaca", tok) == template_.ALPACA
    write(tmp_path / "m" / "chat_template.jinja", LLAMA3)
    assert data.load_template("chat", data.load_tokenizer(str(tmp_path / "m"))) == LLAMA3


def test_template_and_end_token_lie_beside_the_adapter(tmp_path, gpt2_folder, monkeypatch, capsys):
    """unsloth#3899: generate.py uses the template of the training run, although the model has another one."""
    write(gpt2_folder / "chat_template.jinja", "WRONG{% for m in messages %}{{ m.content }}{% endfor %}")
    mine = write(tmp_path / "mine.jinja", "{% for m in messages %}<{{ m.role }}> {{ m.content }}{{ eos_token if m.role == "
                 "'assistant' }}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}")
    rows = make_data(tmp_path / "d.jsonl", n=8)
    train.main(train.TrainConfig(model=str(gpt2_folder), data=str(rows), val_frac=0.25, template=str(mine), steps=2,
                                 batch_size=2, lora_r=2, max_length=100, samples=0, device="cpu", out=str(tmp_path / "run")))
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == mine.read_text()
    assert json.loads((adapter / "generation_config.json").read_text()) == {"eos_token_id": [4095]}
    asked = []
    real = generate.reply
    monkeypatch.setattr(generate, "reply", lambda model, tok, ids, *a, **k: asked.append(list(ids)) or real(
        model, tok, ids, *a, **k))
    generate.main(["--model", str(gpt2_folder), "--adapter", str(adapter), "--prompt", "Say the number 1 please ",
                   "--max-new-tokens", "2", "--device", "cpu"])
    tok = data.load_tokenizer(str(gpt2_folder))
    row = read_rows(rows)[1]
    assert row[1]["instruction"] == "Say the number 1 please " and not row[1]["input"]
    e = data.build([row], tok, mine.read_text(), 100)[0]
    first = next(i for i, t in enumerate(e.targets) if t != IGNORE)
    assert asked == [e.ids[:first + 1]]
    assert tok.decode(asked[0]) == "<user> Say the number 1 please \n<assistant> "


# ---------------------------------------------------------------------------------------------- dropped, cut, windows

def test_labels_cut_off_are_dropped_and_counted(nano, alpaca):
    """trl#1053: without any label the loss would be nan or 0."""
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "long " * 100, "output": "b"},
            {"instruction": "a", "output": "word " * 100}]
    n = len(data.prompt_ids([{"role": "user", "content": "a"}], alpaca, nano))
    built = build(rows, nano, alpaca, n + 20)
    assert (len(built), built.n_dropped, built.n_truncated) == (2, 1, 2)
    assert built.n_cut_off == 1 and built.n_lost == 2 + len(nano.encode("word " * 100)) + 1 - 21
    assert all(len(e.ids) <= n + 20 for e in built) and len(built[1].ids) == n + 20
    assert sum(t != IGNORE for t in built[1].targets) == 21
    assert sum(t != IGNORE for t in build(rows[2:], nano, alpaca, n)[0].targets) == 1
    with pytest.raises(UserError, match=r"data: all 3 rows were dropped.*--max-length 10"):
        build(rows, nano, alpaca, 10)
    exact = build(rows[:1], nano, alpaca, n + 1)  # n + 2 tokens are n + 1 positions
    assert exact.n_truncated == 0 and exact[0].targets[-1] == nano.eos_id


def test_empty_replies_are_dropped(nano, alpaca):
    nothing = [{"instruction": "a", "output": ""}, {"prompt": "a", "completion": ""}, {"text": ""}, {"messages": []},
               {"messages": CHAT[:1]}, {"messages": [CHAT[0], {"role": "assistant", "content": ""}]}]
    built = build([*nothing, {"instruction": "a", "output": "b"}], nano, alpaca)
    assert (len(built), built.n_dropped) == (1, len(nothing))
    with pytest.raises(UserError, match=f"all {len(nothing)} rows were dropped"):
        build(nothing, nano, alpaca)


@pytest.mark.parametrize("extra", [-1, 0, 1, 2])
def test_text_becomes_windows_that_lose_nothing(nano, sp, extra):
    text = " ".join(corpus(20))
    for tok in (nano, sp):
        ids = [*([1] if tok is sp else []), *tok.encode(text)]
        ids = ids[:64 * (len(ids) // 64) + extra]
        text = tok.decode(ids)
        want = [*([1] if tok is sp else []), *tok.encode(text), tok.eos_id]
        built = build([{"text": text}], tok, "", 32)
        assert built.n_truncated == 0 and built.n_rows == 1 and len(built) == -(-(len(want) - 1) // 32)
        assert [t for e in built for t in e.targets] == want[1:]
        assert [i for e in built for i in e.ids] == want[:-1]
        assert all(len(e.ids) == 32 for e in list(built)[:-1]) and built[len(built) - 1].ids


def test_prompts_are_the_ids_before_the_last_reply(nano, alpaca):
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [*CHAT, CHAT[0]]}, {"instruction": "x", "output": "y " * 200}]
    whole = [(data.prompt_ids([("a", False)], alpaca, nano), "b", None),
             (data.prompt_ids(CHAT[:3], alpaca, nano), "9.", None),
             (data.prompt_ids([{"role": "user", "content": "x"}], alpaca, nano), "y " * 200, None)]
    for max_length in (1000, 100):  # also where the row is cut
        built = build(rows, nano, alpaca, max_length)
        assert data.prompts(built, 3, nano) == data.prompts(built, 9, nano) == whole
        assert data.prompts(built, 1, nano) == whole[:1] and data.prompts(built, 0, nano) == []
    assert data.prompts(build([{"text": "a b c"}], nano, alpaca), 3, nano) == []
    mixed = build([{"text": "a b c"}, {"prompt": "a", "completion": ""}, *rows, {"text": "d"}], nano, alpaca)
    assert data.prompts(mixed, 5, nano) == whole  # those rows that have a prompt


# ---------------------------------------------------------------------------------------------- files

def test_utf8_bom_crlf_and_line_separators(tmp_path, nano, alpaca):
    rows = [{"instruction": "a\u2028b\u0085c\u000cd", "output": "x\u2029y"}, {"instruction": "e", "output": "f"}]
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    for text in ("\ufeff" + "\n".join(lines), "\r\n".join(lines) + "\r\n", "\n\n" + "\n \n".join(lines)):
        assert [r for _, r in read_rows(write(tmp_path / "d.jsonl", text))] == rows
    assert [r for _, r in read_rows(write(tmp_path / "d.json", "\ufeff" + json.dumps(rows)))] == rows
    where = [w for w, _ in read_rows(write(tmp_path / "d.jsonl", "\r\n\r\n".join(lines)))]
    assert where == [f"{tmp_path}/d.jsonl:1", f"{tmp_path}/d.jsonl:3"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_csv_fields_hold_any_character(tmp_path, quoting):
    """Only CR and LF end a CSV row; str.splitlines would also split at eight other characters."""
    rows = [{"prompt": f"a{c}b", "completion": "x, \"y\"\nz"} for c in "\u2028\u2029\u0085\u000b\u000c\u001c\u001d\u001e"]
    f = io.StringIO(newline="")
    w = csv.DictWriter(f, rows[0], quoting=quoting)
    w.writeheader()
    w.writerows(rows)
    assert [r for _, r in read_rows(write(tmp_path / "d.csv", "\ufeff" + f.getvalue()))] == rows
    assert [r for _, r in read_rows(write(tmp_path / "d.csv", f.getvalue().replace("\r\n", "\n")))] == rows


def test_csv_fields_may_be_long(tmp_path):
    row = {"document": "word " * 40_000, "summary": "words"}
    assert read_rows(write_rows(tmp_path / "d.csv", [row]))[0][1] == row


def test_half_a_character_in_json(tmp_path, nano, sp, tokenizers_by_name):
    """A text that was cut in UTF-16 may end in half an emoji. This is legal JSON, but it cannot be encoded in UTF-8."""
    path = write(tmp_path / "d.jsonl", '{"instruction": "hi \\ud83d", "output": "ok \\ud83d"}\n'
                 '{"messages": [{"role": "user", "content": "\\ude00"}, '
                 '{"role": "assistant", "content": "\\ud83d\\ude00"}]}')
    for tok in (nano, sp, tokenizers_by_name["chatml"][1]):
        built = data.build(read_rows(path), tok, data.load_template("alpaca", tok), 512)
        assert [learned_runs(e, tok) for e in built] == [["ok \ufffd" + tok.eos], ["\U0001f600" + tok.eos]]
        assert learned_runs(built[0], tok)[0].startswith("ok \ufffd")


ROW = '{"instruction": "a", "output": "b"}\n'
BAD = [
    ("d.jsonl", "", r"d\.jsonl: no rows in it"),
    ("d.csv", "\ufeff \n\n", r"d\.csv: no rows in it"),
    ("d.txt", " \n", r"d\.txt: no rows in it"),
    ("d.json", "[]", r"d\.json: no rows in it"),
    ("d.csv", "instruction,output\n", r"d\.csv: no rows in it"),
    ("d.jsonl", (ROW * 2).encode() + b'{"instruction": "caf\xe9", "output": "b"}\n', r"d\.jsonl:3: not UTF-8 \(byte 20"),
    ("d.txt", b"one\ntwo \xff\n", r"d\.txt: not UTF-8 at line 2 "),
    ("d.jsonl", ROW + "\n" + '{"instruction": "a", "output": }\n', r"d\.jsonl:3: broken JSON \(.*column 32"),
    ("d.jsonl", ROW + ROW.strip()[:-1], r"d\.jsonl:2: broken JSON"),
    ("d.json", '[\n{"instruction": "a",\n "output": "b",}\n]', r"d\.json:3: broken JSON"),
    ("d.json", '{"instruction": "a", "output": "b"}', r"d\.json: expected a JSON array of objects"),
    ("d.jsonl", ROW + '{"question": "a", "answer": "b"}', r"d\.jsonl:2: no known columns among question, answer; exp"),
    ("d.jsonl", ROW + "{}", r"d\.jsonl:2: no known columns among none"),
    ("d.csv", "a,b\n1,2\n", r"d\.csv:2: no known columns among a, b"),
    ("d.jsonl", ROW + '{"instruction": null, "output": "b"}', r"d\.jsonl:2: field 'instruction' must be text, found null"),
    ("d.jsonl", ROW + '{"instruction": "a", "output": null}', r"d\.jsonl:2: field 'output' must be text, found null"),
    ("d.jsonl", ROW + '{"instruction": "a", "output": 3}', r"d\.jsonl:2: field 'output' must be text, found int"),
    ("d.jsonl", ROW + '{"text": ["a"]}', r"d\.jsonl:2: field 'text' must be text, found list"),
    ("d.json", '[{"text": "a"}, {"text": 1.5}]', r"d\.json: row 2: field 'text' must be text, found float"),
    ("d.csv", "prompt,completion\na,b\nc\n", r"d\.csv:3: field 'completion' must be text, found null"),
    ("d.jsonl", ROW + '["a", "b"]', r"d\.jsonl:2: expected an object with named fields, found list"),
    ("d.jsonl", ROW + '"a"', r"d\.jsonl:2: expected an object with named fields, found str"),
    ("d.json", "[1]", r"d\.json: row 1: expected an object with named fields, found int"),
    ("d.jsonl", ROW + '{"messages": [{"role": "narrator", "content": "a"}]}', r"d\.jsonl:2: messages: role 'narrator' is"),
    ("d.jsonl", ROW + '{"messages": [{"role": ["user"], "content": "a"}]}', r"d\.jsonl:2: messages: role \['user'\] is not"),
    ("d.jsonl", ROW + '{"messages": [{"content": "a"}]}', r"d\.jsonl:2: messages: role None is not one of"),
    ("d.jsonl", ROW + '{"conversations": [{"from": "human", "value": null}]}',
     r"d\.jsonl:2: conversations: 'value' must be text, found NoneType"),
    ("d.jsonl", ROW + '{"messages": "hello"}', r"d\.jsonl:2: field 'messages' must be a list of objects"),
    ("d.csv", 'prompt,completion\na,b\n"c" d,e\n', r"d\.csv:3: broken CSV"),
    ("d.csv", 'prompt,completion\na,b\n"c,d\n', r"d\.csv:3: broken CSV \(unexpected end of data"),
    ("d.jsonl", ROW + '{"text": "a", "id": ' + "9" * 5000 + "}", r"d\.jsonl:2: JSON that cannot be read \(.*digits"),
    ("d.jsonl", ROW + '{"text": ' + "[" * 100_000, r"d\.jsonl:2: JSON that cannot be read \(.*recursion"),
    ("d.json", "[" * 100_000, r"d\.json: JSON that cannot be read \(.*recursion"),
    ("d.jsonl", ROW + '{"a\\nb": 1, "' + "x" * 9999 + '": 2}', r"d\.jsonl:2: no known columns among a b, x{200,300}; exp"),
    ("d.jsonl", ROW + json.dumps({"messages": [{"role": "x" * 9999, "content": ""}]}),
     r"d\.jsonl:2: .* role 'x{20,40}\.\.\.x{20,40}' is"),
    ("d.csv", "prompt,completion\na,b\nc,d, e\n", r"d\.csv:3: more fields than the header has names"),
    ("d.csv", "text,text\na,b\n", r"d\.csv: two columns have the name 'text'"),
    ("d.bin", "PAR1", r"d\.bin: unknown kind of file"),
]


@pytest.mark.parametrize("name,content,message", BAD, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BAD)])
def test_errors_name_file_and_line(tmp_path, nano, alpaca, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match="^" + re.escape(f"{tmp_path}/") + message) as e:
        data.build(read_rows(path), nano, alpaca, 512)
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000


def test_a_missing_file_a_folder_and_a_pipe(tmp_path, nano):
    """A pipe that nobody writes into, or a device without an end, would be read for ever."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path / "none.jsonl", tmp_path, tmp_path / "pipe.jsonl", tmp_path / ("a" * 300), "/dev/zero"):
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: (cannot be read|not a regular file)"):
            read_rows(path)
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: (cannot be read|not a regular file)"):
            data.read_tokens(path, nano, "")
    with pytest.raises(UserError, match="cannot be read"):
        data.read_tokens(Path("\ud800.jsonl"), nano, "")


# ---------------------------------------------------------------------------------------------- split, plan, collate

def examples_of(n):
    """n rows; row i has one token more than row i - 1."""
    return dataset_of([data.Example([1] * (i + 1), [1] * (i + 1)) for i in range(n)]).parts[0].file


def split(n, fraction, seed):
    """The numbers of the training rows and of the held-out rows."""
    sets = (data.Dataset(parts) for parts in data.split([examples_of(n)], fraction, seed, [False]))
    return [[length - 1 for length in s.lengths.tolist()] for s in sets]


def test_split():
    rows = list(range(100))
    a, b = split(100, 0.1, seed=1)
    assert len(b) == 10 and sorted(a + b) == rows and a == sorted(a) and b == sorted(b)
    assert split(100, 0.1, seed=1) == [a, b] and split(100, 0.1, seed=2) != [a, b]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1)).tolist()
    assert b == sorted(order[:10]) != rows[:10]
    for fraction, n in ((0.0, 100), (0.1, 4), (1.0, 100), (0.5, 1)):
        with pytest.raises(UserError, match=rf"--val-frac {fraction} of {n} rows"):
            split(n, fraction, seed=0)


def test_the_last_windows_of_a_text_are_held_out(tmp_path, nano):
    text = " ".join(corpus(60))
    ids = [*nano.encode(text), nano.eos_id]
    file = data.Examples(data.read_tokens(write(tmp_path / "book.txt", text), nano, "", use_cache=False), 16)
    train_set, val_set = (data.Dataset(parts) for parts in data.split([file], 0.25, 0, [True]))
    n = len(train_set)
    assert len(val_set) == round(0.25 * len(file.rows)) > 2 and n + len(val_set) == len(file.rows)
    assert [t for e in train_set for t in e.targets] == ids[1:16 * n + 1]  # each token is predicted once, in one of the sets
    assert [t for e in val_set for t in e.targets] == ids[16 * n + 1:]


@pytest.mark.parametrize("weight, n", [(1.0, 10), (2.0, 20), (1.5, 15), (0.3, 3)])
def test_a_files_weight(weight, n):
    file = examples_of(10)
    built = data.Dataset([examples_of(4).part(), file.part()], [1.0, weight], seed=1)
    lengths = built.lengths[4:].tolist()
    assert built.lengths[:4].tolist() == [1, 2, 3, 4] and len(lengths) == n
    assert all(lengths.count(i) in (int(weight), int(weight) + 1) for i in range(1, 11))
    assert data.Dataset([examples_of(4).part(), file.part()], [1.0, weight], seed=1).lengths[4:].tolist() == lengths


def test_what_is_cut(nano, alpaca):
    built = build([{"prompt": "a", "completion": " b" * n} for n in (10, 20, 30, 300)], nano, alpaca, 24)
    left = [11, 21, 24, 24]  # the prompt is one token, and each reply has an end token
    assert built.labels.tolist() == left and built.n_lost == 7 + 277
    assert built.what_is_cut() == ("2 of 4 rows cut at 24: 78 % of the learned tokens lost; lengths p50 21, p95 31, max 301"
                                   "; --max-length 512 keeps 100 %")
    assert build([{"text": "a b c " * 99}], nano, alpaca, 24).what_is_cut() is None  # a text becomes windows


def lengths_of(n):
    return torch.randint(1, 200, (n,), generator=torch.Generator().manual_seed(n)).tolist()


@pytest.mark.parametrize("n", [1, 7, 8, 9, 128, 129, 500])
def test_plan_covers_each_epoch_once(n):
    lengths = lengths_of(n)
    for epoch in range(3):
        steps = steps_of(lengths, 4, 2, seed=3, epoch=epoch)
        assert sorted(i for step in steps for micro in step for i in micro) == list(range(n))
        sizes = sorted(sum(map(len, step)) for step in steps)
        assert len(steps) == -(-n // 8) and sizes[1:] == [8] * (len(steps) - 1) and sizes[0] == (n % 8 or 8)
        assert all(0 < len(micro) <= 4 for step in steps for micro in step)
        assert all(len(step) == 2 for step in steps if sum(map(len, step)) == 8)
        assert steps == steps_of(lengths, 4, 2, seed=3, epoch=epoch)
    if n > 100:
        first, second, third = (steps_of(lengths, 4, 2, 3, epoch) for epoch in range(3))
        assert first != second != third != first and first != steps_of(lengths, 4, 2, 4, 0)
        assert {frozenset(sum(s, [])) for s in first} != {frozenset(sum(s, [])) for s in second}


def test_the_plan_in_plain_python():
    """The same examples in the same order, step for step: a run that is continued after an update takes the same steps."""
    for n, batch_size, grad_accum, seed, epoch in ((333, 4, 2, 3, 0), (333, 4, 2, 3, 7), (100, 8, 1, 0, 1), (5, 2, 3, 1, 0)):
        lengths, per_step = lengths_of(n), batch_size * grad_accum
        rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order, steps = torch.randperm(n, generator=rng).tolist(), []
        for w in range(0, n, 16 * per_step):
            window = sorted(order[w:w + 16 * per_step], key=lambda i: -lengths[i])
            steps += [window[s:s + per_step] for s in range(0, len(window), per_step)]
        steps = [steps[i] for i in torch.randperm(len(steps), generator=rng).tolist()]
        wanted = [[step[m:m + batch_size] for m in range(0, len(step), batch_size)] for step in steps]
        assert steps_of(lengths, batch_size, grad_accum, seed, epoch) == wanted


def test_plan_same_steps_for_every_split():
    lengths = lengths_of(333)
    as_sets = [[sum(step, []) for step in steps_of(lengths, b, g, 0, 5)] for b, g in ((8, 1), (4, 2), (2, 4), (1, 8))]
    assert as_sets[0] == as_sets[1] == as_sets[2] == as_sets[3]


def test_plan_sorts_inside_windows_only():
    lengths = lengths_of(2000)
    steps = [sum(step, []) for step in steps_of(lengths, 8, 1, 0, 0)]
    padding = sum(len(s) * max(lengths[i] for i in s) - sum(lengths[i] for i in s) for s in steps)
    assert padding < 0.1 * sum(lengths)  # in random order it is about 0.8
    spread = torch.tensor([float(lengths[s[0]]) for s in steps])
    longer = (spread[1:] > spread[:-1]).float().mean()  # steps are in no order, not even in a window
    assert 0.35 < longer < 0.65


@pytest.mark.parametrize("how", [(1, 1), (4, 1), (2, 4)])
@pytest.mark.parametrize("pack", [False, True])
def test_the_largest_micro_batches(how, pack):
    """A micro-batch is left out exactly if another one, at least as large in every respect, is there."""
    # The longest examples have the fewest labels, so that no micro-batch is the largest in every respect.
    examples = [data.Example([0] * n, [IGNORE] * (n - k) + [0] * k) for n in lengths_of(150) for k in [min(n, 200 - n)]]
    plan = plans.Plan(dataset_of(examples), *how, seed=0, pack=pack)
    steps = range(1, 2 * plan.steps_per_epoch)
    sizes = {(step, i): size for step in steps for i, size in enumerate(plan.sizes(step))}
    chosen = {sizes[step, i] for step, numbers in plan.largest(steps).items() for i in numbers}
    undominated = {a for a in sizes.values()
                   if not any(b != a and b[0] >= a[0] and b[1] >= a[1] and b[2] >= a[2] for b in sizes.values())}
    assert chosen == undominated and len(chosen) > 1


def test_the_largest_micro_batches_of_a_long_run(monkeypatch):
    """No run is planned to its end before it starts: 20 million steps took minutes."""
    examples = [data.Example([0] * n, [0] * n) for n in lengths_of(60)]
    plan = plans.Plan(dataset_of(examples), 2, 1, seed=0)
    monkeypatch.setattr(plans, "PLANNED", 500)
    start = time.process_time()
    assert plan.largest(range(1, 10**9)) == plan.largest(range(1, 501)) != plan.largest(range(1, 91))
    assert time.process_time() - start < 5
    monkeypatch.setattr(plans, "PLANNED", 5)  # three epochs, which is the default, are always planned to their end
    assert plan.largest(range(1, 10**9)) == plan.largest(range(1, 91)) != plan.largest(range(1, 6))


EXAMPLES = [data.Example([1, 2, 3], [IGNORE, 3, 9]), data.Example([4], [9]),
            data.Example([5, 6, 7, 8, 9], [IGNORE] * 3 + [9, 9])]


def test_collate_padded():
    b = data.collate(EXAMPLES, limit=5)
    assert b.ids.tolist() == [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 9]]
    assert b.targets.tolist() == [[IGNORE, 3, 9, IGNORE, IGNORE], [9, *[IGNORE] * 4], [*[IGNORE] * 3, 9, 9]]
    assert b.positions is None and b.segments is None
    assert (b.n_examples, b.n_tokens, b.n_labels) == (3, 9, 5)
    assert b.ids.dtype == b.targets.dtype == torch.int64
    for limit, T in ((8, 8), (100, 8), (7, 7), (None, 5)):  # up to a multiple of 8, but not beyond the limit
        b = data.collate(EXAMPLES, limit=limit)
        assert b.ids.shape == b.targets.shape == (3, T)
        assert (b.targets[:, 5:] == IGNORE).all() and (b.n_tokens, b.n_labels) == (9, 5)


def test_collate_packed():
    b = data.collate(EXAMPLES, pack=True)  # 9 positions, and a segment of padding up to a multiple of 8
    assert b.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, *[0] * 7]]
    assert b.targets.tolist() == [[IGNORE, 3, 9, 9, IGNORE, IGNORE, IGNORE, 9, 9, *[IGNORE] * 7]]
    assert b.positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4, *range(7)]] and b.segments == [3, 1, 5, 7]
    padded = data.collate(EXAMPLES)
    assert (b.n_examples, b.n_tokens, b.n_labels) == (padded.n_examples, padded.n_tokens, padded.n_labels)
    moved = b.to("cpu")
    assert moved.positions.shape == moved.ids.shape == (1, 16)


# ---------------------------------------------------------------------------------------------- show

@pytest.mark.parametrize("colour", [False, True])
def test_show_marks_exactly_what_is_learned(nano, sp, alpaca, colour):
    mark = r"\x1b\[32m(.*?)\x1b\[0m" if colour else r"\[\[(.*?)\]\]"
    rows = [{"messages": CHAT}, {"prompt": "ab", "completion": " cd"}, {"text": "👍 one two"},
            {"instruction": "x", "output": "y"}]
    for tok in (nano, sp):
        examples = list(build(rows, tok, data.load_template("alpaca", tok)))
        shown = re.split(r"(?m)^--- example \d+: .*\n", data.show(examples, tok, colour))[1:]
        assert len(shown) == len(examples)
        for e, text, row in zip(examples, shown, rows, strict=True):
            text = text if e is examples[-1] else text[:-1]
            assert re.sub(mark, r"\1", text, flags=re.S) == tok.decode(whole(e)), row
            if "text" not in row:  # in plain text, all tokens but the first are labels
                want = [m["content"] + tok.eos for m in row.get("messages", []) if m["role"] == "assistant"] or [
                    row.get("completion", row.get("output")) + tok.eos]
                assert re.findall(mark, text, flags=re.S) == want
    cut = list(build(rows[:1], nano, alpaca, len(examples[0].ids) // 2))
    assert data.show(cut, nano, colour).count("\x1b[32m" if colour else "[[") == len(learned_runs(cut[0], nano))


def test_show_header(nano):
    e = data.Example(nano.encode("one two"), [IGNORE, nano.eos_id])
    assert data.show([e, e], nano, False).count("2 positions, 1 learned\none two[[<|endoftext|>]]") == 2


def test_show_batch_trains_nothing(tmp_path, gpt2_folder, data_file, capsys):
    out = train.main(train.TrainConfig(model=str(gpt2_folder), data=str(data_file), max_length=128, batch_size=3,
                                       device="cpu", show_batch=True, out=str(tmp_path / "run")))
    text = capsys.readouterr().out
    assert out == {} and not (tmp_path / "run").exists()
    assert text.count("--- example") == 3 and text.count("[[It is ") == 3 and text.count(EOS + "]]") == 3


def test_show_batch_reads_only_the_first_rows(tmp_path, gpt2_folder, capsys):
    path = make_data(tmp_path / "d.jsonl", prepare.LOOKED_AT)
    for text in ("", "{broken\n"):  # what comes after the first thousand is not even parsed
        path.write_text(path.read_text() + text)
        train.main(train.TrainConfig(model=str(gpt2_folder), data=str(path), max_length=64, batch_size=1, device="cpu",
                                     show_batch=True))
        said = capsys.readouterr().out
        assert "--show-batch looks at the first 1,000 rows" in said and said.count("--- example") == 1
    with pytest.raises(UserError, match=r"d\.jsonl:1001: broken JSON"):
        train.main(train.TrainConfig(model=str(gpt2_folder), data=str(path), max_length=64, device="cpu", dry_run=True))


def test_the_bundled_data_reads(nano, alpaca):
    for name in ("support", "support-heldout"):
        built = data.build(read_rows(hub.ASSETS / f"{name}.jsonl"), nano, alpaca, 512)
        assert (built.n_dropped, built.n_truncated) == (0, 0) and len(built) > 50
