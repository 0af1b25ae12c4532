"""What a client gets: the events of a request's replies -> OpenAI's JSON, whole or in pieces (server-sent events).

A reply of "Hi you" with `stream`, one line for each event of the engine:

    data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}], ...}
    data: {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": null}], ...}
    data: {"choices": [{"index": 0, "delta": {"content": " you"}, "finish_reason": null}], ...}
    data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], ...}
    data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}, ...}   if asked for
    data: [DONE]
"""
import json
import secrets
import time

from serving.engine import Event, Job, Token
from serving.fields import Options


class Answer:
    """The answer to one request. jobs: its replies, `n` for each prompt. said: for `echo`, the text of each job's prompt."""

    def __init__(self, jobs: list[Job], options: Options, model: str, is_chat: bool, tokenizer, said: list[str]):
        self.jobs, self.options, self.is_chat, self.tokenizer = jobs, options, is_chat, tokenizer
        self.texts, self.tokens, self.ends = list(said), [[] for _ in jobs], [None] * len(jobs)
        self.n_new, self.said = [0] * len(jobs), said
        kind = "chat.completion" if is_chat else "text_completion"
        self.head = {"id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12), "object": kind,
                     "created": int(time.time()), "model": model}
        self.places = [(0, [], [])] * len(jobs)  # for the logprobs of a completion, see `offset`

    def take(self, number: int, event: Event):
        """An event of the job `number`."""
        self.texts[number] += event.text
        self.tokens[number] += event.tokens
        self.n_new[number], self.ends[number] = event.n_new, event.finish_reason

    def usage(self) -> dict:
        n_prompt = sum(len(job.reply.ids) for job in self.jobs[::self.options.n])
        return {"prompt_tokens": n_prompt, "completion_tokens": sum(self.n_new),
                "total_tokens": n_prompt + sum(self.n_new)}

    def whole(self) -> dict:
        """The answer when all jobs have ended."""
        choices = []
        for number, text in enumerate(self.texts):
            body = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append({"index": number, **body, "logprobs": self.logprobs(number, self.tokens[number]),
                            "finish_reason": self.ends[number]})
        return {**self.head, "choices": choices, "usage": self.usage()}

    # ------------------------------------------------------------------------------------------ in pieces

    def first(self) -> list[str]:
        """The chunks before any token: the role, or with `echo` the prompt."""
        if self.is_chat:
            return [self.chunk(n, {"role": "assistant", "content": ""}) for n in range(len(self.jobs))]
        return [self.chunk(n, text) for n, text in enumerate(self.said) if text]

    def piece(self, number: int, event: Event) -> str:
        """The chunk of an event; nothing for one that has nothing to show."""
        if not event.text and not event.tokens and not event.finish_reason:
            return ""
        body = ({"content": event.text} if event.text else {}) if self.is_chat else event.text
        return self.chunk(number, body, event.finish_reason, event.tokens)

    def chunk(self, number: int, body, finish_reason: str | None = None, tokens=()) -> str:
        choice = {"index": number, "delta" if self.is_chat else "text": body, "finish_reason": finish_reason,
                  "logprobs": self.logprobs(number, tokens) if tokens else None}
        usage = {"usage": None} if self.options.include_usage else {}
        kind = {"object": "chat.completion.chunk"} if self.is_chat else {}
        return sse({**self.head, **kind, "choices": [choice], **usage})

    def last(self) -> str:
        """The chunks after all tokens."""
        kind = {"object": "chat.completion.chunk"} if self.is_chat else {}
        usage = sse({**self.head, **kind, "choices": [], "usage": self.usage()}) if self.options.include_usage else ""
        return usage + DONE

    # ------------------------------------------------------------------------------------------ logprobs

    def logprobs(self, number: int, tokens) -> dict | None:
        if self.options.top is None:
            return None
        if self.is_chat:
            return {"content": [{**self.named(t.id, t.logprob), "top_logprobs": [self.named(*pair) for pair in t.top]}
                                for t in tokens]}
        return {"tokens": [self.key(t.id) for t in tokens], "token_logprobs": [t.logprob for t in tokens],
                "top_logprobs": [self.most_likely(t) for t in tokens],
                "text_offset": [self.offset(number, t.id) for t in tokens]}

    def offset(self, number: int, i: int) -> int:
        """Where the text of the next token begins. The tokens of one character all have its place.

        A token alone is decoded otherwise than after others: a part of a character becomes U+FFFD, and LLaMA 1 and 2 leave
        out a first space. So each is decoded behind the last one that ended a character.
        """
        at, last, begun = self.places[number]
        begun = [*begun, i]
        text = self.tokenizer.decode([*last, *begun])
        if text.endswith("\ufffd") and len(begun) < 4:  # (no character has more than 4 bytes)
            self.places[number] = at, last, begun
        else:
            self.places[number] = at + len(text) - len(self.tokenizer.decode(last)), [i], []
        return at

    def most_likely(self, t: Token) -> dict | None:
        """{text: logprob}, the token itself first. OpenAI's form has it too, likely or not."""
        return None if t.logprob is None else {self.key(i): x for i, x in ((t.id, t.logprob), *t.top)}

    def key(self, i: int) -> str:
        """Two tokens must not have one key: of those that are a part of a character, the text would be the same."""
        text = self.token(i)
        return f"token_id:{i}" if "\ufffd" in text else text

    def named(self, token: int, logprob: float) -> dict:
        text = self.token(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def token(self, i: int) -> str:
        return self.tokenizer.decode([i])


def sse(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


DONE = "data: [DONE]\n\n"
