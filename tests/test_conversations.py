"""Rows as they are delivered: every layout of columns, tools, parts, weights; ids and masks equal to transformers'."""
import json

import pytest
import transformers
from test_data import CHATML, build, learned_runs
from test_tokenizers import byte_level

import data
from errors import UserError
from files import conversations, rows
from files.conversations import Reader

# Qwen2.5's chat template, with what newer ones have: marks around what the assistant generates. transformers makes its masks
# of assistant tokens from them.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content if message.content else '' }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n' if message.content or not loop.first else '' }}{{- '<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a \"city\", in °C", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
    {"name": "clock", "parameters": {}}]
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}},
         {"type": "function", "function": {"name": "clock", "arguments": {}}}]
USER = {"role": "user", "content": "And now?"}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy!"}]
SYSTEM = {"role": "system", "content": "You are a pirate."}
WITH_TOOLS = [*TALK, USER, {"role": "assistant", "content": None, "tool_calls": CALLS},
              {"role": "tool", "name": "weather", "content": "{\"°C\": 3}"}, {"role": "tool", "content": "noon"},
              {"role": "assistant", "content": "3 °C at noon."}]

# row -> the messages, and the tools, that transformers gets
ROWS = {
    "openai": ({"messages": [SYSTEM, *TALK]}, [SYSTEM, *TALK], None),
    "developer": ({"messages": [{**SYSTEM, "role": "developer"}, *TALK]}, [SYSTEM, *TALK], None),
    "openai, system beside": ({"messages": TALK, "system": "You are a pirate."}, [SYSTEM, *TALK], None),
    "alpaca, system": ({"instruction": "Hi", "output": "Ahoy!", "system": "You are a pirate."}, [SYSTEM, *TALK], None),
    "alpaca, history": ({"instruction": "And now?", "input": None, "output": "Aye.", "history": [["Hi", "Ahoy!"]]},
                        [*TALK, USER, {"role": "assistant", "content": "Aye."}], None),
    "alpaca, both": ({"instruction": "And now?", "response": "Aye.", "history": '[["Hi", "Ahoy!"]]',
                      "system": SYSTEM["content"]},
                     [SYSTEM, *TALK, USER, {"role": "assistant", "content": "Aye."}], None),
    "sharegpt, system": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy!"}],
                          "system": "You are a pirate."}, [SYSTEM, *TALK], None),
    "sharegpt, tools": ({"conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ahoy!"}, {"from": "human", "value": "And now?"},
        {"from": "function_call", "value": json.dumps([c["function"] for c in CALLS])},
        {"from": "observation", "value": "{\"°C\": 3}"}, {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "3 °C at noon."}], "tools": json.dumps(TOOLS)}, WITH_TOOLS, TOOLS),
    "openai, tools": ({"messages": [
        *TALK, USER, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a1", **CALLS[0], "function": {"name": "weather", "arguments": "{\"city\": \"Zürich\", \"days\": 2}"}},
            {**CALLS[1], "function": {"name": "clock", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "a1", "content": "{\"°C\": 3}"}, {"role": "tool", "content": "noon"},
        WITH_TOOLS[-1]], "tools": TOOLS}, WITH_TOOLS, TOOLS),
    "openai, older": ({"messages": [USER, {"role": "assistant", "content": None, "function_call": {
        "name": "clock", "arguments": "{}"}}, {"role": "function", "name": "clock", "content": "noon"}, WITH_TOOLS[-1]]},
        [USER, {"role": "assistant", "content": None, "tool_calls": CALLS[1:]}, *WITH_TOOLS[-2:]], None),
    "call with words": ({"messages": [USER, {"role": "assistant", "content": "Let me look.", "tool_calls": CALLS}]},
                        [USER, {"role": "assistant", "content": "Let me look.", "tool_calls": CALLS}], None),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "value": "i"}]},
                            {"role": "assistant", "content": [{"type": "text", "text": "Ahoy!"}]}]}, TALK, None),
    "trl": ({"prompt": [SYSTEM, TALK[0]], "completion": [TALK[1]]}, [SYSTEM, *TALK], None),
}


@pytest.fixture(scope="module")
def toks(tmp_path_factory):
    """(ours, transformers') tokenizer with a template that knows tools."""
    folder = tmp_path_factory.mktemp("qwen")
    byte_level(folder)
    ours = data.load_tokenizer(str(folder))
    hf = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=ours.bos,
                                              eos_token=ours.eos)
    hf.chat_template = QWEN
    return ours, hf


@pytest.mark.parametrize("name", ROWS)
def test_ids_and_masks_equal_transformers(toks, name):
    ours, hf = toks
    row, messages, tools = ROWS[name]
    conversation = Reader().read("f:1", row)
    assert data.render(QWEN, conversation.messages, ours, tools=conversation.tools) == hf.apply_chat_template(
        messages, tools=tools, tokenize=False)
    assert conversation.tools == tools and [m["role"] for m in conversation.messages] == [m["role"] for m in messages]
    wanted = hf.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    ids, learned = data.encode(conversation, QWEN, ours)
    n = len(ids)
    assert ids == wanted["input_ids"][:n] and [int(x) for x in learned] == list(wanted["assistant_masks"])[:n]
    assert not any(wanted["assistant_masks"][n:]) and hf.decode(wanted["input_ids"][n:]) == "\n"


def test_weight_0_is_seen_and_not_learned(toks):
    ours, _ = toks
    messages = [TALK[0], {**TALK[1], "weight": 0}, USER, {"role": "assistant", "content": "Aye.", "weight": 1}]
    e, = build([{"messages": messages}], ours, QWEN)
    assert learned_runs(e, ours) == ["Aye.<|im_end|>"] and "Ahoy!" in ours.decode(e.ids)
    e, = build([{"prompt": messages[:3], "completion": messages[3:]}], ours, QWEN)  # TRL: the completion is learned
    assert learned_runs(e, ours) == ["Aye.<|im_end|>"]
    e, = build([{"prompt": [*TALK, USER], "completion": messages[3:]}], ours, QWEN)
    assert learned_runs(e, ours) == ["Aye.<|im_end|>"] and "Ahoy!" in ours.decode(e.ids)
    with pytest.raises(UserError, match="all 1 rows were dropped"):
        build([{"messages": messages[:2]}], ours, QWEN)


def test_what_a_template_leaves_out_is_refused(toks):
    ours, _ = toks
    no_system = ("{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
                 "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
                 "{% endif %}")
    loses_calls = CHATML.replace("message['content']", "(message['content'] or '')")
    for template, name, says in ((no_system, "alpaca, system", "leaves out the system message 'You are a pirate.'"),
                                 (loses_calls, "call with words", "leaves out the call of 'weather'"),
                                 (CHATML, "sharegpt, tools", "fails|leaves out"),
                                 (data.load_template("alpaca", ours), "openai, tools", "fails|leaves out")):
        with pytest.raises(UserError, match=f"^f:1: the chat template ({says})"):
            build([ROWS[name][0]], ours, template)
    with pytest.raises(UserError, match="leaves out the tool 'weather'"):
        build([{"messages": TALK, "tools": TOOLS}], ours, CHATML)
    assert build([{"messages": TALK, "tools": []}, {"messages": TALK, "tools": None}], ours, CHATML).n_rows == 2
    columns = conversations.parse_columns("tools=")
    row = Reader(columns).read("f:1", {"messages": TALK, "tools": TOOLS})
    assert row.tools is None


def test_what_is_not_used_is_counted():
    reader = Reader(conversations.parse_columns("instruction=question,response=answer,system="))
    row = {"question": "a", "answer": "b", "category": "c", "id": None, "note": "", "system": "s"}
    assert reader.read("f:1", row).messages == [{"role": "user", "content": "a", "input": ""},
                                                {"role": "assistant", "content": "b"}]
    reader.read("f:2", {**row, "id": 0})
    assert reader.names_of_unused() == {"column 'category'": 2, "column 'system'": 2, "column 'id'": 1}
    reader = Reader()
    reader.read("f:1", {"messages": [{**TALK[0], "date": "now"}, {**TALK[1], "date": "now", "name": "Bob"}], "input": "x"})
    assert reader.names_of_unused() == {"key 'date' of a message": 2, "column 'input'": 1}


@pytest.mark.parametrize("spec", ["instruction", "answer=response", "instruction=a,instruction=b", "=a", ",", "text=a,"])
def test_columns_that_cannot_be(spec):
    with pytest.raises(UserError, match=r"^--columns .*expected KNOWN=YOURS"):
        conversations.parse_columns(spec)


def call(**function):
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]}


@pytest.mark.parametrize("row, says", [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "part of type 'image_url'"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "part of type 'input_audio'; only text"),
    ({"messages": [{"role": "user", "content": [3]}]}, "part of type 'int'"),
    ({"messages": [{"role": "user", "content": {}}]}, "'content' must be text, found dict"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "'content' must be text, found NoneType"),
    ({"messages": [{**USER, "tool_calls": CALLS}]}, "a message of 'user' calls a tool"),
    ({"messages": [USER, {**TALK[1], "weight": 0.5}]}, r"weight is 0 \(not learned\) or 1, found 0.5"),
    ({"messages": [USER, {**TALK[1], "weight": True}]}, "found True"),
    (call(name="f", arguments="{"), "the arguments of a tool call is no JSON|are no JSON"),
    (call(name="f", arguments="[1]"), r"arguments of a tool call must be an object, found \[1\]"),
    (call(arguments={}), "a tool call needs a function's name"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(1)"}]}, "no JSON"),
    ({"messages": TALK, "tools": "weather"}, "'tools' is no JSON"),
    ({"messages": TALK, "tools": [{"type": "function"}]}, "'tools' must be a list of functions"),
    ({"messages": TALK, "tools": {"name": "f"}}, "'tools' must be a list of functions"),
    ({"messages": [SYSTEM, *TALK], "system": "Be kind."}, "two system texts"),
    ({"instruction": "a", "output": "b", "history": ["a", "b"]}, "'history' must be a list of pairs of texts"),
    ({"instruction": "a", "output": "b", "system": 3}, "field 'system' must be text, found int"),
    ({"prompt": "a", "completion": "b", "tools": TOOLS}, "a prompt that is text goes without a template, so 'tools'"),
    ({"prompt": TALK[:1], "completion": "b"}, "field 'completion' must be a list of objects"),
])
def test_bad_rows(row, says):
    with pytest.raises(UserError, match=f"^f:1: .*({says})"):
        Reader().read("f:1", row)


def test_bad_rows_are_skipped_and_counted(tmp_path, toks):
    ours, _ = toks
    good = {"messages": TALK}
    bad = [b'{"messages": [', b'{"question": "?"}', b'{"text": "\xff"}', b'[1]',
           json.dumps({"messages": [SYSTEM, SYSTEM]}).encode()]
    lines = [json.dumps(good).encode(), *bad[:3], json.dumps(good).encode(), *bad[3:]]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=r"d\.jsonl:2: broken JSON"):
        data.read_tokens(path, ours, QWEN, use_cache=False)
    tokens = data.read_tokens(path, ours, QWEN, skip_bad=True, use_cache=False)
    assert len(tokens) == 3 and tokens.bad == 4  # (two system messages are a row, though nothing in it is learned)
    assert [r.partition(": ")[0].rpartition(":")[2] for r in tokens.reasons] == ["2", "3", "4"]
    assert data.Dataset([data.Examples(tokens, 64).part()]).n_dropped == 1


# ---------------------------------------------------------------------------------------------- files

def contents(spec):
    return [row for s in rows.sources(str(spec)) for _, row in rows.read_rows(s.path)]


def test_gz_parquet_folders_and_weights(tmp_path, capsys):
    import gzip
    some = [{"instruction": f"a{i}", "output": "b"} for i in range(5)]
    lines = "".join(json.dumps(r) + "\n" for r in some).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(some).encode()))
    (tmp_path / "c.csv").write_text("instruction,output\nx,y\n")
    assert contents(tmp_path / "a.jsonl.gz") == contents(tmp_path / "b.json.gz") == some
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / ".hidden.jsonl").write_text("{")
    assert contents(tmp_path) == [*some, *some, {"instruction": "x", "output": "y"}]
    assert "3 data files; not read: ['README.md']" in capsys.readouterr().out
    found = rows.sources(f"{tmp_path}/a.jsonl.gz:2,{tmp_path}/c.csv,{tmp_path}/b.json.gz:0.5")
    assert [(s.path.name, s.weight) for s in found] == [("a.jsonl.gz", 2), ("c.csv", 1), ("b.json.gz", 0.5)]
    odd = tmp_path / "x,y:3.jsonl"
    odd.write_bytes(lines)
    assert [s.path for s in rows.sources(str(odd))] == [odd]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    for spec, says in (("cut.jsonl.gz", "cannot be read to its end"), ("a.jsonl.gz:0", "the weight of a file must be"),
                       ("a.jsonl.gz:nan", "the weight"), ("none.jsonl", "cannot be read"), ("none/x", "cannot be read")):
        with pytest.raises(UserError, match=says):
            contents(tmp_path / spec)


def test_parquet(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow
    some = [{"messages": [*TALK], "tools": None}, {"messages": TALK[:1], "tools": "[]"}]
    pq.write_table(pyarrow.Table.from_pylist(some), tmp_path / "d.parquet")
    assert contents(tmp_path / "d.parquet") == some
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read as Parquet"):
        contents(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        contents(tmp_path / "d.parquet")


@pytest.mark.parametrize("first", [1, 7, 2**20])
def test_a_json_array_is_read_in_pieces(tmp_path, monkeypatch, first):
    """Wherever the pieces end: inside a text, a number, an escape, between rows."""
    monkeypatch.setattr(rows, "FIRST", first)
    some = [{"a": "x\\\"[{,}]é👍\n", "b": [1, {"c": -1.5e3}], "d": None}, {}, {"long": "y" * 300}, {"e": 12345}]
    path = tmp_path / "d.json"
    for text in (json.dumps(some), json.dumps(some, indent=3, ensure_ascii=False),
                 " \n[ " + ",\n".join(map(json.dumps, some)) + "]\n "):
        path.write_text(text, encoding="utf-8")
        assert [r for _, r in rows.read_rows(path)] == some
    for text, says in (("[{}, {}", "d.json:1: broken JSON"), ("[{}\n {}]", "d.json:2: broken JSON .*','"),
                       ("[{},]", "broken JSON"), ("[{}] x", "Extra data after the array: 'x'"), ("[]", "no rows"),
                       ('[{"a": 1, "a": 2}]', "row 1: .* twice"), ("[] 1", "Extra data"),
                       ('[\n{},\n{"a": }]', r"d.json:3: broken JSON \(Expecting value, column 7")):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            rows.read_rows(path)
