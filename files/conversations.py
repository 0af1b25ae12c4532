"""A row of a data file -> a conversation: its messages as a chat template reads them, its tools, and what is learned.

The columns say what a row is (COLUMNS). These are the layouts in which public data is delivered: Alpaca's, OpenAI's,
ShareGPT's, TRL's, XSUM's, and plain text. Nothing that a row says is dropped silently: a column or a key of a message that
is not used is counted in `unused`, and train.py names it. What cannot be learned from, such as an image, is refused.
"""
import json
from collections import Counter
from dataclasses import dataclass, field

from errors import UserError
from files.json_files import show
from files.tokenizer import reason

COLUMNS = {  # a row is of the first kind whose needed columns it has: (needed, may also be there)
    "messages": (("messages",), ("system", "tools")),  # OpenAI
    "conversations": (("conversations",), ("system", "tools")),  # ShareGPT
    "output": (("instruction", "output"), ("input", "system", "history")),  # Alpaca
    "response": (("instruction", "response"), ("input", "system", "history")),
    "summary": (("document", "summary"), ()),  # XSUM
    "completion": (("prompt", "completion"), ("system", "tools")),  # TRL: texts, or lists of messages
    "text": (("text",), ())}
KNOWN = ", ".join("+".join(needed) for needed, _ in COLUMNS.values())
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "model": "assistant", "bing": "assistant", "system": "system", "developer": "system", "tool": "tool",
         "observation": "tool", "function": "tool", "function_call": "assistant"}
KEYS = {"role", "from", "content", "value", "weight", "tool_calls", "function_call"}  # of a message
PASSED = ("name", "tool_call_id")  # keys of a message that a template may use; they reach it as they are


@dataclass
class Conversation:
    """messages: [{"role": "system" | "user" | "assistant" | "tool", "content": text}]. A user's may have an "input"; an
    assistant's may have "tool_calls" (then its content may be None), and "weight": 0 if it is not to be learned.
    tools: what the template gets. pieces: [(text, learned)] of a row that needs no template; then there are no messages."""
    messages: list[dict] = field(default_factory=list)
    tools: list[dict] | None = None
    pieces: list[tuple[str, bool]] = field(default_factory=list)

    def has_reply(self) -> bool:
        """Whether there is anything to learn besides the end-of-text token."""
        learned = [m for m in self.messages if m["role"] == "assistant" and m.get("weight") != 0]
        return any(text for text, learn in self.pieces if learn) or any(m["content"] or m.get("tool_calls") for m in learned)


def whole(text: str) -> str:
    """Half a character -> U+FFFD. Text that was cut in UTF-16 can end so; it can be neither tokenised nor written."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_columns(spec: str | None) -> dict[str, str]:
    """--columns instruction=question,response=answer -> {the name that is known here: the name in the file}."""
    columns = {}
    known = {name for needed, more in COLUMNS.values() for name in (*needed, *more)}
    for part in (spec or "").split(",") if spec else ():
        ours, equals, theirs = part.partition("=")
        if not equals or ours not in known or ours in columns:
            raise UserError(f"--columns {part}: expected KNOWN=YOURS (or KNOWN= for a column that is not to be used), each "
                            f"KNOWN once and one of {', '.join(sorted(known))}")
        columns[ours] = theirs
    return columns


class Reader:
    """`read(where, row)` -> Conversation. It counts the columns and keys that it has not used."""

    def __init__(self, columns: dict[str, str] | None = None):
        self.columns, self.unused = columns or {}, Counter()

    def read(self, where: str, row: dict) -> Conversation:
        """Raises UserError for a row without known columns, or with a wrong type in one of them."""
        theirs = {name: ours for ours, name in self.columns.items()}
        row = {theirs.get(name, f"{name}=" if name in self.columns else name): value for name, value in row.items()}
        kind = next((kind for kind, (needed, _) in COLUMNS.items() if all(name in row for name in needed)), None)
        if kind is None:
            columns = reason(", ".join(map(str, row)) or "none")
            raise UserError(f"{where}: no known columns among {columns}; expected {KNOWN}, or name yours with --columns")
        needed, more = COLUMNS[kind]
        for name, value in row.items():
            if name not in needed and name not in more and value not in (None, "", [], {}):
                self.unused["column {}", name.removesuffix("=")] += 1
        if kind == "text":
            return Conversation(pieces=[(text(where, row, "text"), True)])
        if kind == "completion" and not isinstance(row["prompt"], list):
            for name in more:
                if row.get(name):
                    raise UserError(f"{where}: a prompt that is text goes without a template, so {name!r} has no place; "
                                    f"put it into the prompt, or give messages")
            return Conversation(pieces=[(text(where, row, "prompt"), False), (text(where, row, "completion"), True)])
        if kind == "completion":
            given = self.messages(where, row, "prompt")
            messages = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in given]
            messages += self.messages(where, row, "completion")
        elif kind in ("messages", "conversations"):
            messages = self.messages(where, row, kind)
        elif kind == "summary":
            ask = {"role": "user", "content": "Summarize the following document.", "input": text(where, row, "document")}
            messages = [ask, {"role": "assistant", "content": text(where, row, "summary")}]
        else:
            messages = history(where, row.get("history"))
            messages += [{"role": "user", "content": text(where, row, "instruction"),
                          "input": text(where, row, "input", "") if row.get("input") is not None else ""},
                         {"role": "assistant", "content": text(where, row, kind)}]
        if row.get("system") and "system" in more:
            if messages and messages[0]["role"] == "system":
                raise UserError(f"{where}: two system texts: the column 'system', and the first message")
            messages.insert(0, {"role": "system", "content": text(where, row, "system")})
        return Conversation(messages, tools_of(where, row.get("tools")) if "tools" in more else None)

    def names_of_unused(self) -> Counter:
        return Counter({form.format(show(name)): n for (form, name), n in self.unused.items()})

    def messages(self, where: str, row: dict, column: str) -> list[dict]:
        turns = row[column]
        if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
            raise UserError(f"{where}: field {column!r} must be a list of objects")
        messages = []
        for turn in turns:
            role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
            role, content = turn.get(role_key), turn.get(text_key)
            if not isinstance(role, str) or role not in ROLES:
                raise UserError(f"{where}: {column}: role {show(role)} is not one of {', '.join(ROLES)}")
            message = {"role": ROLES[role], "content": content}
            calls = content if role == "function_call" else turn.get("tool_calls") or turn.get("function_call")
            if calls:
                if message["role"] != "assistant":
                    raise UserError(f"{where}: {column}: a message of {role!r} calls a tool; only the assistant's can")
                message["tool_calls"] = calls_of(f"{where}: {column}", calls)
            if role == "function_call":
                message["content"] = None
            elif content is not None or not calls:
                message["content"] = joined(f"{where}: {column}", text_key, content)
            if (weight := turn.get("weight")) is not None:
                if weight not in (0, 1) or isinstance(weight, bool):
                    raise UserError(f"{where}: {column}: a message's weight is 0 (not learned) or 1, found {show(weight)}")
                if message["role"] == "assistant":
                    message["weight"] = int(weight)
            message |= {key: turn[key] for key in PASSED if turn.get(key) is not None}
            for key, value in turn.items():
                if key not in KEYS and key not in PASSED and value not in (None, "", [], {}):
                    self.unused["key {} of a message", key] += 1
            messages.append(message)
        return messages


def text(where: str, row: dict, name: str, default=None) -> str:
    value = row.get(name, default)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: field {name!r} must be text, found {kind}")
    return whole(value)


def joined(where: str, key: str, content) -> str:
    """A message's content, which may be in parts: [{"type": "text", "text": ...}, ...]. Only text can be learned from."""
    if isinstance(content, str):
        return whole(content)
    if not isinstance(content, list):
        raise UserError(f"{where}: {key!r} must be text, found {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        value = part.get("text", part.get("value", part.get("content"))) if isinstance(part, dict) else part
        if kind not in ("text", "str", None) or not isinstance(value, str):
            raise UserError(f"{where}: {key!r} has a part of type {show(kind)}; only text can be learned from")
        texts.append(whole(value))
    return "".join(texts)


def parsed(where: str, what: str, value):
    """An object or a list, which may be written as JSON in a text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: {what} is no JSON ({reason(e)})") from None


def calls_of(where: str, calls) -> list[dict]:
    """OpenAI's tool_calls, its older function_call, or ShareGPT's -> [{"type", "function": {"name", "arguments"}}, ...].

    Arguments become an object: OpenAI writes them as JSON in a text, and templates write an object as JSON.
    """
    calls = parsed(where, "a tool call", calls)
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call needs a function's name and its arguments, found {show(call)}")
        arguments = parsed(where, "the arguments of a tool call", function.get("arguments") or {})
        if not isinstance(arguments, dict):
            raise UserError(f"{where}: the arguments of a tool call must be an object, found {show(arguments)}")
        same = {"id": call["id"]} if call is not function and isinstance(call.get("id"), str) else {}
        result.append({**same, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def tools_of(where: str, tools) -> list[dict] | None:
    tools = parsed(where, "'tools'", tools or None)
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(t, dict) and tool_name(t) for t in tools)):
        raise UserError(f"{where}: 'tools' must be a list of functions, each an object with a name, found {show(tools)}")
    return tools or None


def tool_name(tool: dict) -> str | None:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) and isinstance(function.get("name"), str) else None


def history(where: str, turns) -> list[dict]:
    """Alpaca's history: [[what the user said, what the assistant said], ...]. The assistant's turns are learned."""
    turns = parsed(where, "'history'", turns or [])
    if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 and all(isinstance(s, str) for s in t)
                                              for t in turns):
        raise UserError(f"{where}: 'history' must be a list of pairs of texts, found {show(turns)}")
    return [{"role": role, "content": whole(s)} for t in turns for role, s in zip(("user", "assistant"), t)]
