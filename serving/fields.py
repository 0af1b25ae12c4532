"""A request's JSON -> checked options. One table says which fields there are, and what each may be.

The names and the meaning are those of OpenAI's API reference (Chat and Completions); top_k, min_p and repetition_penalty are
vLLM's, which has the same API. null means the default. A field that nobody knows is accepted, as OpenAI's own clients send
new ones every month. A field that is known and not implemented here is refused: its result would be missed.
"""
import json
import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from files.conversations import whole
from files.json_files import show

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS, MOST_PROMPTS = 16, 16, 20, 256


class BadRequest(Exception):
    """What a client did wrong: an answer in OpenAI's form, {"error": {"message", "type", "param", "code"}}."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None,
                 kind: str = "invalid_request_error"):
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.kind = message, param, status, code, kind

    def json(self) -> dict:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refuse(name: str, value, must: str):
    raise BadRequest(f"{name} {show(value)} must be {must}", name)


# ---------------------------------------------------------------------------------------------- one field each

def number(low: float, high: float, says: str) -> Callable:
    def check(name, value):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            refuse(name, value, says)
        return value
    return check


def integer(low: int, high: float, says: str) -> Callable:
    def check(name, value):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(name, value, says)
        return value
    return check


def boolean(name, value):
    if not isinstance(value, bool):
        refuse(name, value, "true or false")
    return value


def text(name, value):
    if not isinstance(value, str):
        refuse(name, value, "a string")
    return whole(value)


def anything(name, value):
    return value


def stops(name, value):
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > MOST_STOPS or not all(isinstance(s, str) and s for s in values):
        what = f"a list of {len(values)}" if isinstance(values, list) and len(values) > MOST_STOPS else show(value)
        raise BadRequest(f"stop {what} must be a string that is not empty, or at most {MOST_STOPS} of them", name)
    return [whole(s) for s in values]


def biases(name, value):
    if not isinstance(value, dict) or len(value) > 1024:
        refuse(name, value, "an object of at most 1,024 token ids")
    found = {}
    for token, bias in value.items():
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            refuse(name, token, "an object from token ids to numbers")
        found[int(token)] = number(-100, 100, "from -100 to 100")(f"{name}[{token}]", bias)
    return found


def stream_options(name, value):
    if not isinstance(value, dict):
        refuse(name, value, "an object")
    return boolean(f"{name}.include_usage", value.get("include_usage") or False)


SAMPLING = {  # name -> (check, default)
    "temperature": (number(0, 2, "a number from 0 to 2"), 1.0),
    "top_p": (number(1e-9, 1, "a number above 0, at most 1"), 1.0),
    "top_k": (integer(-1, 2**31, "a whole number, -1 or 0 for all tokens"), 0),
    "min_p": (number(0, 1, "a number from 0 to 1"), 0.0),
    "repetition_penalty": (number(0.01, 100, "a number from 0.01 to 100"), 1.0),
    "presence_penalty": (number(-2, 2, "a number from -2 to 2"), 0.0),
    "frequency_penalty": (number(-2, 2, "a number from -2 to 2"), 0.0),
    "logit_bias": (biases, {}),
    "seed": (integer(-2**63, 2**64 - 1, "a whole number of 64 bits"), None)}
COMMON = {
    **SAMPLING,
    "model": (text, None),
    "n": (integer(1, MOST_CHOICES, f"a whole number from 1 to {MOST_CHOICES}"), 1),
    "stop": (stops, []),
    "stream": (boolean, False),
    "stream_options": (stream_options, False),
    "user": (anything, None)}
CHAT = {
    **COMMON,
    "messages": (anything, None),
    "max_tokens": (integer(1, math.inf, "a whole number, at least 1"), None),
    "max_completion_tokens": (integer(1, math.inf, "a whole number, at least 1"), None),
    "logprobs": (boolean, False),
    "top_logprobs": (integer(0, MOST_LOGPROBS, f"a whole number from 0 to {MOST_LOGPROBS}"), None)}
COMPLETIONS = {
    **COMMON,
    "prompt": (anything, None),
    "max_tokens": (integer(0, math.inf, "a whole number, at least 0"), 16),
    "echo": (boolean, False),
    "logprobs": (integer(0, MOST_LOGPROBS, f"a whole number from 0 to {MOST_LOGPROBS}"), None)}
# Known and not here, with the values that ask for nothing.
ABSENT = {"tools": [[]], "tool_choice": ["none", "auto"], "functions": [[]], "function_call": ["none", "auto"],
          "response_format": [{"type": "text"}], "modalities": [["text"]], "audio": [], "prediction": [],
          "web_search_options": [], "suffix": [""], "best_of": [1], "use_beam_search": [False], "ignore_eos": [False],
          "min_tokens": [0], "stop_token_ids": [[]], "bad_words": [[]], "prompt_logprobs": [], "guided_json": [],
          "guided_regex": [], "guided_choice": [], "guided_grammar": [], "structured_outputs": [],
          "continue_final_message": [False]}


def read_json(body: bytes) -> dict:
    """Raises BadRequest unless the body is a JSON object."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise BadRequest(f"the body is not JSON: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(found, dict):
        raise BadRequest("the body must be a JSON object")
    return found


def read_fields(body: dict, table: dict) -> dict:
    """The fields of `table`, checked, or their defaults. Raises BadRequest, which names the field."""
    for name, nothing in ABSENT.items():
        if body.get(name) is not None and body[name] not in nothing:
            raise BadRequest(f"{name} is not supported here", name, code="unsupported_parameter")
    return {name: default if body.get(name) is None else check(name, body[name])
            for name, (check, default) in table.items()}


# ---------------------------------------------------------------------------------------------- what both routes need

@dataclass(frozen=True)
class Options:
    """Of one request. sampling: those of generate.Reply. max_new_tokens None: as many as there is room for. top: Job's."""
    model: str | None
    sampling: dict
    stop: list[str]
    n: int
    max_new_tokens: int | None
    top: int | None
    echo: bool
    stream: bool
    include_usage: bool

    def of(self, number: int) -> dict:
        """The sampling options of the choice `number`: each has its own seed."""
        return {**self.sampling, "seed": (self.sampling["seed"] + number) % 2**32}


def options(body: dict, is_chat: bool) -> Options:
    """Raises BadRequest."""
    f = read_fields(body, CHAT if is_chat else COMPLETIONS)
    if is_chat and f["top_logprobs"] and not f["logprobs"]:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    sampling = {name: f[name] for name in SAMPLING}
    sampling["top_k"] = max(0, sampling["top_k"])
    sampling["seed"] = secrets.randbits(32) if f["seed"] is None else f["seed"] % 2**32
    if is_chat:
        most = f["max_tokens"] if f["max_completion_tokens"] is None else f["max_completion_tokens"]
        top = (f["top_logprobs"] or 0) if f["logprobs"] else None
    else:
        most, top = f["max_tokens"], f["logprobs"]
    return Options(f["model"], sampling, f["stop"], f["n"], most, top, f.get("echo", False), f["stream"],
                   f["stream_options"])


def messages(body: dict) -> list[dict]:
    """The conversation of a request: [{"role", "content": text}]. Raises BadRequest."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        refuse("messages", given, "a list of messages, at least one")
    found = []
    for i, m in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(m, dict):
            refuse(where, m, "an object")
        if m.get("role") not in ("system", "developer", "user", "assistant", "tool"):
            refuse(f"{where}.role", m.get("role"), "system, developer, user, assistant or tool")
        if m.get("tool_calls"):
            raise BadRequest(f"{where}.tool_calls is not supported here", where, code="unsupported_parameter")
        content = m.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise BadRequest(f"{where}.content: only parts of the type text are supported here", where)
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            refuse(f"{where}.content", content, "a string, or a list of text parts")
        found.append({"role": "system" if m["role"] == "developer" else m["role"], "content": whole(content)})
    if found[-1]["role"] not in ("user", "tool"):
        raise BadRequest("the last message must be the user's (or a tool's): a reply follows it", "messages")
    if not found[-1]["content"].strip():
        raise BadRequest("the last message is empty: there is nothing to reply to", "messages")
    return found


def prompts(body: dict, vocab_size: int) -> list[str | list[int]]:
    """The prompts of a completion, each a text or ids: a string, a list of strings, ids, or a list of lists of ids.

    Raises BadRequest.
    """
    given = body.get("prompt")
    if isinstance(given, list) and given and all(type(x) is int for x in given):
        given = [given]
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not found:
        refuse("prompt", given, "a string, a list of strings, token ids, or a list of lists of token ids")
    if len(found) > MOST_PROMPTS:
        raise BadRequest(f"prompt is a list of {len(found)}; at most {MOST_PROMPTS} in one request", "prompt")
    for i, one in enumerate(found):
        if isinstance(one, list):
            check_ids(f"prompt[{i}]", one, vocab_size)
        elif not isinstance(one, str):
            refuse(f"prompt[{i}]", one, "a string or token ids")
    return [whole(one) if isinstance(one, str) else one for one in found]


def check_ids(name: str, ids, vocab_size: int):
    if not isinstance(ids, list) or not ids:
        refuse(name, ids, "a list of token ids that is not empty")
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise BadRequest(f"{name}: {show(i)} is no token id; the model has 0 to {vocab_size - 1}",
                             name.partition("[")[0])


def as_bad_request(e: UserError, param: str | None = None) -> BadRequest:
    """An error of the parts that the commands share: a prompt that is too long, a template that fails."""
    return BadRequest(str(e), param, code="context_length_exceeded" if "positions" in str(e) else None)


# ---------------------------------------------------------------------------------------------- other requests

def check_vote(body: dict, names: list[str]) -> dict:
    """{"prompt", "a", "b", "replies": {"a", "b"}, "vote": "a" | "b" | "tie"}. Raises BadRequest."""
    a, b, replies = body.get("a"), body.get("b"), body.get("replies")
    if a not in names or b not in names or a == b:
        raise BadRequest(f"a and b must be two of {', '.join(names)}", "a")
    if body.get("vote") not in ("a", "b", "tie"):
        raise BadRequest("vote must be a, b or tie", "vote")
    texts = (body.get("prompt"), *(replies.get(x) if isinstance(replies, dict) else None for x in "ab"))
    if not all(isinstance(text, str) for text in texts):
        raise BadRequest("prompt, replies.a and replies.b must be strings", "replies")
    prompt, *texts = map(whole, texts)  # half a character cannot be written
    return {"prompt": prompt, "a": a, "b": b, "replies": dict(zip("ab", texts)), "vote": body["vote"]}


def below(folder: Path, path: str) -> Path:
    """The folder that a request may name: below `folder`, without `..` and links on the way. Raises BadRequest."""
    if "\0" in path or ".." in Path(path).parts or not (place := folder / path).is_relative_to(folder):
        raise BadRequest(f"lora_path {show(path)} is not below the folder of --allow-loading", "lora_path", 403)
    steps = [place, *place.parents]
    try:
        is_folder = place.is_dir()
        has_link = any(p.is_symlink() for p in (*steps[:steps.index(folder)], *(place.iterdir() if is_folder else ())))
    except OSError:  # a name that is too long, a folder that this user may not read
        is_folder = has_link = False
    if has_link:
        raise BadRequest(f"lora_path {show(path)}: links are not followed", "lora_path", 403)
    if not is_folder:
        raise BadRequest(f"lora_path {show(path)}: there is no such folder", "lora_path")
    return place
