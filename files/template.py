"""Chat templates: a conversation -> the text that the model was trained on, by the checkpoint's own jinja program.

A template is a program by a stranger, so it runs in jinja2's sandbox, with limits of time and output. `render` calls it.
"""
import datetime
import functools
import json
import math
import time
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from errors import UserError
from files.conversations import tool_name, whole
from files.json_files import check_file
from files.tokenizer import Tokenizer, read_text, reason

# The Alpaca prompt (Taori et al., 2023), written as a chat template. So there is one mechanism for all prompts, and any tool
# that reads chat_template.jinja can use the adapter. A user message may have an `input` besides its content.
ALPACA = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content + '\n\n' }}
{%- elif m.role == 'user' %}
{%- if loop.first or messages[loop.index0 - 1].role == 'system' %}{{ 'Below is an instruction that describes a task' +
(', paired with an input that provides further context' if m.input else '') +
'. Write a response that appropriately completes the request.\n\n' }}{% endif %}
{{- '### Instruction:\n' + m.content + '\n\n' + ('### Input:\n' + m.input + '\n\n' if m.input else '') }}
{%- elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + ('' if loop.last else '\n\n') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""


def load_template(spec: str, tokenizer: Tokenizer) -> str:
    """The jinja source of a template. spec: "auto" (the checkpoint's own, else Alpaca), "chat" (the checkpoint's own),
    "alpaca", or a .jinja file. Raises UserError."""
    if spec in ("auto", "chat") and tokenizer.chat_template:
        return tokenizer.chat_template
    if spec == "chat":
        raise UserError(f"--template chat: {tokenizer.folder} has no chat template; use alpaca, or a .jinja file")
    if spec in ("auto", "alpaca"):
        return ("{{ bos_token }}" if tokenizer.adds_bos else "") + ALPACA
    try:
        check_file(Path(spec))
    except UserError:
        raise UserError(f"--template {spec}: neither auto, chat, alpaca nor a readable file") from None
    return read_text(Path(spec))


SECONDS, MOST = 5, 10**6  # of CPU time for one conversation; characters that a template may add to it


class Sandbox(ImmutableSandboxedEnvironment):
    """A template is a program by a stranger. jinja2's sandbox keeps it away from Python's own functions. This class also
    ends one that takes too long: each call, product, power and piece of output is counted, and the clock is read at every
    32nd (reading it takes as long as rendering a short row)."""
    intercepted_binops = frozenset({"*", "**"})
    n_checks, end = 0, math.inf

    def start(self):
        self.n_checks, self.end = 0, math.inf

    def check(self, n_characters: int = 0, limit: int = 0):
        self.n_checks += 1
        if self.n_checks % 32 == 0:
            now = time.thread_time()
            self.end = min(self.end, now + SECONDS)
            if now > self.end:
                raise UserError(f"the chat template takes longer than {SECONDS} s")
        if n_characters > limit:
            raise UserError(f"the chat template writes more than {limit:,} characters")

    def call(self, *args, **kwargs):
        self.check()
        return super().call(*args, **kwargs)

    def call_binop(self, context, operator, left, right):
        lengths = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
        self.check(lengths[0] * lengths[1] if lengths != [left, right] else 0, MOST)
        if operator == "**" and abs(right) > 64:
            raise UserError(f"the chat template takes a power above 64: {reason(right)}")
        return super().call_binop(context, operator, left, right)


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what the assistant says, in newer templates. It is printed as it is."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)  # compiling takes longer than tokenising
def compiled(template: str) -> jinja2.Template:
    def raise_exception(message):
        raise jinja2.TemplateError(message)
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    env.globals.update(raise_exception=raise_exception, strftime_now=lambda f: datetime.datetime.now().strftime(f))
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return env.from_string(template)


def render(template: str, messages: list[dict], tokenizer: Tokenizer, prompt: bool = False,
           tools: list | None = None) -> str:
    """messages -> text. With prompt=True the text ends with the words after which the model answers. tools: the functions
    that the model may call.

    Raises UserError for a template that refuses the messages, fails, takes too long or writes too much.
    """
    if ".input" not in template:  # the template does not use `input`: make it part of the content
        messages = [{"role": m["role"], "content": m["content"] + "\n\n" + m["input"]} if m.get("input") else m
                    for m in messages]
    limit = MOST + 10 * sum(len(m["content"] or "") + len(m.get("input", "")) for m in messages)
    limit += 10 * len(json.dumps(tools)) if tools else 0
    try:
        jinja, text, n = compiled(template), [], 0
        jinja.environment.start()
        for piece in jinja.generate(messages=messages, bos_token=tokenizer.bos or "", eos_token=tokenizer.eos,
                                    add_generation_prompt=prompt, tools=tools, documents=None):
            text.append(piece)
            jinja.environment.check(n := n + len(piece), limit)
    except jinja2.TemplateError as e:
        raise UserError(f"the chat template refused the messages: {reason(e)}") from None
    except UserError:
        raise
    except Exception as e:  # it can raise whatever a program can: a division by zero, an endless recursion
        raise UserError(f"the chat template fails: {type(e).__name__}: {reason(e)}") from None
    return whole("".join(text))


def check_nothing_is_left_out(messages: list[dict], tools: list | None, text: str):
    """Raise UserError if `text`, which a template made from the rest, lacks a system text, a tool's answer, a call, a tool.

    A template that does not know tools writes nothing for them, and says nothing of it.
    """
    for m in messages:
        if m["role"] in ("system", "tool") and (content := (m["content"] or "").strip()) not in text and \
                json.dumps(content, ensure_ascii=False)[1:-1] not in text:
            raise UserError(f"the chat template leaves out the {m['role']} message {reason(content)[:60]!r}; choose another "
                            f"template (train.py --template)")
        for call in m.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise UserError(f"the chat template leaves out the call of {call['function']['name']!r}: it knows no tools; "
                                f"choose another template (train.py --template)")
    for tool in tools or ():
        if tool_name(tool) not in text:
            raise UserError(f"the chat template leaves out the tool {tool_name(tool)!r}: it knows no tools; choose another "
                            f"with --template, or leave the column out with --columns tools=")
