"""serve.py over real HTTP, on tiny random models: every reply against generate.run, and what clients do wrong.

A server is serve.main itself in a thread (`Live`), so its engine can be watched. BYTEWISE_SOAK=1000 makes the soak longer.
"""
import contextlib
import functools
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, make_folder

import data
import generate
import lora
import serve
from errors import UserError
from files import peft_files, weights
from memory import rss
from methods import dora, ia3, prefix, prompt, several
from serving import engine as engines

FAMILIES = ["gpt2", "llama"]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
POSITIONS = {"gpt2": "n_positions", "llama": "max_position_embeddings"}


def adapted(folder, seed, method=lora, **more):
    """A model with a random adapter. With B = 0 it would change nothing."""
    model, rng = method.inject(weights.load(folder), **more), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=1 / p.shape[-1] ** 0.5, generator=rng)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """For each family a model, and beside it the adapters a and b."""
    root = tmp_path_factory.mktemp("serve")
    for family in FAMILIES:
        make_folder(root / family, family, **{POSITIONS[family]: 512})
        for seed, (name, r) in enumerate({"a": 2, "b": 5, "newer": 3}.items()):
            peft_files.save(adapted(root / family, seed, r=r), root / f"{family}-adapters" / name)
    return root


@functools.cache
def reference(folder):
    """A model of its own with both adapters, its tokenizer and its template: what replies are compared with."""
    model = weights.load(folder).eval()
    for name in ("a", "b", "newer"):
        peft_files.add(model, name, folder.with_name(f"{folder.name}-adapters") / name)
    tokenizer = data.load_tokenizer(folder)
    return model, tokenizer, data.load_template("auto", tokenizer)


def said(folder, asked, **options) -> generate.Reply:
    """What generate.run says. asked: a text, which is continued, or a user's message [text], or ids (a tuple)."""
    model, tokenizer, template = reference(folder)
    ids = (data.prompt_ids([{"role": "user", "content": asked[0]}], template, tokenizer) if isinstance(asked, list) else
           list(asked) if isinstance(asked, tuple) else tokenizer.encode(asked))
    reply = generate.Reply(model.config, ids, tokenizer, **{"temperature": 1.0, "top_p": 1.0, **options})
    for _ in generate.run(model, [reply]):
        pass
    return reply


class Live:
    """A server, and a client for it."""

    def __init__(self, *words):
        ready, live = threading.Event(), self

        class Watched(serve.Uvicorn):
            def run(self, sockets):
                live.uvicorn, live.port, live.engine = self, sockets[0].getsockname()[1], self.engine
                ready.set()
                super().run(sockets)

        with pytest.MonkeyPatch.context() as m:
            m.setattr(serve, "Uvicorn", Watched)
            self.thread = threading.Thread(target=serve.main, args=(["--port", "0", *map(str, words)],), daemon=True)
            self.thread.start()
            assert ready.wait(60)

    def close(self):
        self.engine.stop()
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def send(self, path, body=None, headers=(), method=None) -> http.client.HTTPResponse:
        """body: bytes as they are, or what becomes JSON."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        c.request(method or ("GET" if body is None else "POST"), path, given, dict(headers))
        response = c.getresponse()
        response.connection = c
        return response

    def ask(self, path, body=None, headers=(), method=None):
        """(status, the answer's JSON or text)"""
        with self.send(path, body, headers, method) as r:
            text = r.read().decode()
            r.connection.close()
            return r.status, json.loads(text) if r.headers.get_content_type() == "application/json" else text

    def good(self, path, **body):
        status, answer = self.ask(path, body)
        assert status == 200, answer
        return answer

    def stream(self, path, **body):
        """The chunks of a stream, as JSON. A comment is None."""
        with contextlib.closing(self.send(path, {**body, "stream": True})) as r:
            assert r.status == 200 and r.headers.get_content_type() == "text/event-stream", r.read()
            yield from chunks(r)
            r.connection.close()

    def quiet(self):
        """Every slot and the queue are empty, soon."""
        wait_for(lambda: not self.engine.running and not self.engine.waiting)
        assert self.engine.cache.lengths == [0] * self.engine.n_slots


def chunks(response):
    for line in response:
        if line == b": keep-alive\n":
            yield None
        elif line == b"data: [DONE]\n":
            break
        elif line != b"\n":
            assert line.startswith(b"data: "), line
            yield json.loads(line[6:])
    else:
        raise AssertionError("the stream ended without [DONE]")


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def joined(stream, n=1) -> list[dict]:
    """The chunks of a stream -> text, finish_reason and logprobs of each choice."""
    found = [{"text": "", "end": None, "logprobs": []} for _ in range(n)]
    for chunk in stream:
        for c in chunk["choices"] if chunk else ():
            mine = found[c["index"]]
            assert mine["end"] is None  # nothing follows it
            mine["text"] += c["delta"].get("content", "") if "delta" in c else c["text"]
            mine["end"] = c["finish_reason"]
            if c["logprobs"]:
                mine["logprobs"].append(c["logprobs"])
    return found


@pytest.fixture(scope="module")
def servers(place):
    with contextlib.ExitStack() as stack:
        found = {}
        for family in FAMILIES:
            adapters = place / f"{family}-adapters"
            found[family] = Live("--model", place / family, "--adapter", f"a={adapters / 'a'}", "--adapter",
                                 f"b={adapters / 'b'}", "--slots", 4, "--votes", place / f"{family}.jsonl")
            stack.callback(found[family].close)
        yield found


@pytest.fixture
def live(servers):
    yield servers["gpt2"]
    servers["gpt2"].quiet()  # no test may leave anything


@pytest.fixture
def folder(place):
    return place / "gpt2"


@pytest.fixture
def slow(monkeypatch):
    """A forward takes 10 ms, so that a test can do something while replies run."""
    monkeypatch.setattr(engines, "step", lambda *a, step=engines.step: time.sleep(0.01) or step(*a))


# ---------------------------------------------------------------------------------------------- exactness

@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_is_that_of_generate_alone_and_beside_others(family, servers, place):
    live, folder, rng = servers[family], place / family, random.Random(3)
    requests = []
    for i in range(14):
        model, asked = rng.choice([None, "a", "b"]), " ".join(rng.choices(["hello", "the", "sea", "42"], k=rng.choice([1, 9, 70])))
        options = {"temperature": rng.choice([0, 0.8, 1.3]), "seed": rng.randrange(2**32), "max_tokens": rng.randint(1, 30),
                   "top_p": rng.choice([0.5, 1]), "top_k": rng.choice([-1, 0, 7]), "min_p": rng.choice([0, 0.01]),
                   "repetition_penalty": rng.choice([1, 1.4])}
        requests.append((i % 2 == 0, model, asked, options))
    wanted = [said(folder, [asked] if is_chat else asked, adapter=model, max_new_tokens=o["max_tokens"],
                   **{k: max(v, 0) if k == "top_k" else v for k, v in o.items() if k != "max_tokens"})
              for is_chat, model, asked, o in requests]

    def reply(request):
        is_chat, model, asked, options = request
        what = {"messages": [{"role": "user", "content": asked}]} if is_chat else {"prompt": asked}
        answer = live.good(CHAT if is_chat else TEXT, model=model or family, **what, **options)
        (choice,) = answer["choices"]
        assert answer["model"] == (model or family) and answer["object"] == ("chat.completion" if is_chat else "text_completion")
        return choice["message"]["content"] if is_chat else choice["text"], choice["finish_reason"], answer["usage"]

    truth = [(w.text, w.finish_reason, {"prompt_tokens": len(w.ids), "completion_tokens": len(w.new),
                                        "total_tokens": len(w.ids) + len(w.new)}) for w in wanted]
    assert len({t for t, _, _ in truth}) > 8
    assert [reply(r) for r in requests[:5]] == truth[:5]  # alone
    with ThreadPoolExecutor(7) as pool:
        assert list(pool.map(reply, requests)) == truth
    for base in ("gpt2", None):
        if family == "gpt2":
            body = {} if base is None else {"model": base}
            assert live.good(TEXT, prompt="x", max_tokens=5, temperature=0, **body)["model"] == "gpt2"
    live.quiet()


def test_choices_have_their_own_seeds(live, folder):
    answer = live.good(TEXT, prompt=["one", "two"], n=3, seed=2**32 - 2, max_tokens=6, model="a")
    wanted = [said(folder, p, adapter="a", seed=s, max_new_tokens=6) for p in ("one", "two") for s in (2**32 - 2, 2**32 - 1, 0)]
    assert [c["text"] for c in answer["choices"]] == [w.text for w in wanted]
    assert [c["index"] for c in answer["choices"]] == list(range(6)) and len({w.text for w in wanted}) == 6
    n = sum(len(w.ids) for w in wanted[::3])  # a prompt counts once
    assert answer["usage"] == {"prompt_tokens": n, "completion_tokens": 36, "total_tokens": n + 36}
    streamed = list(live.stream(TEXT, prompt=["one", "two"], n=3, seed=2**32 - 2, max_tokens=6, model="a",
                                stream_options={"include_usage": True}))
    assert [c["text"] for c in joined(streamed, 6)] == [w.text for w in wanted]
    assert streamed[-1]["usage"] == answer["usage"] and streamed[-1]["choices"] == []
    assert all(c["usage"] is None for c in streamed[:-1]) and len({c["id"] for c in streamed}) == 1


def test_a_stop_string_across_tokens(live, folder):
    whole, tokenizer = said(folder, "hello", seed=5, max_new_tokens=30), reference(folder)[1]
    parts = [tokenizer.decode([i]) for i in whole.new]
    at = next(i for i in range(8, 28) if parts[i].isascii() and parts[i + 1].isascii() and parts[i].strip() and parts[i + 1].strip())
    stop = parts[at][-1] + parts[at + 1][0]
    n = whole.text.find(stop)
    assert n >= 0
    options = {"prompt": "hello", "seed": 5, "max_tokens": 30}
    for stops in (stop, ["not there", stop], [stop + parts[at + 1][1:] + "never", stop]):
        (choice,) = live.good(TEXT, **options, stop=stops)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (whole.text[:n], "stop")
        (streamed,) = joined(live.stream(TEXT, **options, stop=stops))
        assert (streamed["text"], streamed["end"]) == (whole.text[:n], "stop")
    never = stop + "never"  # its beginning waits, and comes with the end
    assert joined(live.stream(TEXT, **options, stop=never))[0]["text"] == whole.text


def test_a_stream_never_splits_a_character(live, folder):
    """Tokens that are a byte each: F0 9F 98 80 is one character, and alone each is none."""
    tokenizer = reference(folder)[1]
    tokens = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\ufffd"]
    smile, e = tokenizer.encode("\U0001f600"), tokenizer.encode("\u00e9")
    bias = dict.fromkeys((*e, *smile) if set(e) <= set(tokens) else smile, 100)
    n_whole = 0
    for seed in range(12):
        wanted = said(folder, "x", seed=seed, max_new_tokens=40, temperature=2.0, logit_bias=bias)
        options = {"prompt": "x", "seed": seed, "max_tokens": 40, "temperature": 2, "logit_bias": {str(k): v for k, v in bias.items()}}
        pieces = [c["choices"][0]["text"] for c in live.stream(TEXT, **options)]
        assert "".join(pieces) == wanted.text == live.good(TEXT, **options)["choices"][0]["text"]
        n_whole += len(wanted.text.replace("\ufffd", ""))
    assert n_whole and len(smile) + len(e) > 2  # there were characters of several tokens


@torch.no_grad()
def logs(folder, ids, adapter):
    """log_softmax of a plain forward: (len(ids), V)"""
    model = reference(folder)[0]
    with several.adapter(model, adapter):
        return torch.log_softmax(model(torch.tensor([ids])).float(), -1)[0]


def near(a, b):
    assert abs(a - b) < 1e-5, (a, b)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [None, "b"])
def test_logprobs_are_those_of_a_plain_forward(adapter, family, servers, place):
    live, folder, model = servers[family], place / family, adapter or family
    tokenizer = reference(folder)[1]
    wanted = said(folder, ["hello"], adapter=adapter, seed=4, max_new_tokens=12)
    table = logs(folder, [*wanted.ids, *wanted.new], adapter)[len(wanted.ids) - 1:]
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "seed": 4, "max_tokens": 12, "logprobs": True}
    for top in (None, 0, 3):
        (choice,) = live.good(CHAT, **body, top_logprobs=top)["choices"]
        (streamed,) = joined(live.stream(CHAT, **body, top_logprobs=top))
        content = choice["logprobs"]["content"]
        assert len(content) == len(wanted.new) and sum((s["content"] for s in streamed["logprobs"]), []) == content
        for row, i, c in zip(table, wanted.new, content):
            assert c["token"] == tokenizer.decode([i])
            near(c["logprob"], row[i].item())
            best = row.topk(top or 1)
            assert len(c["top_logprobs"]) == (top or 0)
            for x, j, t in zip(best.values.tolist(), best.indices.tolist(), c["top_logprobs"]):
                near(t["logprob"], x)
                assert t["token"] == tokenizer.decode([j])
                assert t["bytes"] is None or bytes(t["bytes"]).decode() == t["token"]
    assert live.good(CHAT, **{**body, "logprobs": False})["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("n_new", [0, 7])
@pytest.mark.parametrize("adapter", [None, "a"])
def test_echo_has_the_logprobs_of_the_prompt(adapter, n_new, live, folder):
    text = "The sea \u00e9\U0001f600 and " + "many words of a prompt " * 40  # longer than a piece
    tokenizer, ids = reference(folder)[1], reference(folder)[1].encode(text)
    assert len(ids) > engines.PIECE
    wanted = said(folder, text, adapter=adapter, seed=9, max_new_tokens=n_new)
    everything = [*ids, *wanted.new]
    table = logs(folder, everything, adapter)
    body = {"model": adapter or "gpt2", "echo": True, "max_tokens": n_new, "seed": 9, "logprobs": 2}
    for prompt_ in (text, ids):
        (choice,) = live.good(TEXT, prompt=prompt_, **body)["choices"]
        assert choice["text"] == text + wanted.text and choice["finish_reason"] == "length"
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert [len(x) for x in found.values()] == [len(everything)] * 4
        for row, i, x, top in zip(table, everything[1:], found["token_logprobs"][1:], found["top_logprobs"][1:]):
            near(x, row[i].item())
            near(max(top.values()), row.max().item())  # lm-eval: is it the greedy one?
            assert next(iter(top.values())) == x and 2 <= len(top) <= 3
        for n, at in enumerate(found["text_offset"]):
            part = tokenizer.decode(everything[n:n + 1])
            assert choice["text"].startswith(part.replace("\ufffd", ""), at), (n, part)
        (streamed,) = joined(live.stream(TEXT, prompt=prompt_, **body))
        assert streamed["text"] == choice["text"]
        assert {k: sum((s[k] for s in streamed["logprobs"]), []) for k in found} == found
    assert live.good(TEXT, prompt=text, **{**body, "logprobs": None})["choices"][0]["text"] == text + wanted.text


def test_bias_and_penalties_by_hand(live, folder):
    """Greedy, token by token, from the plain forward."""
    model, tokenizer, _ = reference(folder)
    start = tokenizer.encode("once upon")
    likely = logs(folder, start, None)[-1].topk(4).indices.tolist()
    for options in ({"logit_bias": {str(likely[0]): -100, str(likely[3]): 2.5}}, {"presence_penalty": 2.0},
                    {"frequency_penalty": 1.5}, {"presence_penalty": -1.0, "frequency_penalty": 0.5}):
        new = []
        for _ in range(15):
            x = logs(folder, start + new, None)[-1].clone()
            for i in set(new):
                x[i] -= new.count(i) * options.get("frequency_penalty", 0) + options.get("presence_penalty", 0)
            for i, b in options.get("logit_bias", {}).items():
                x[int(i)] += b
            new.append(int(x.argmax()))
        answer = live.good(TEXT, prompt="once upon", temperature=0, max_tokens=15, logprobs=0, **options)["choices"][0]
        assert answer["text"] == tokenizer.decode(new)
        near(answer["logprobs"]["token_logprobs"][0], logs(folder, start, None)[-1][new[0]].item())  # the model's, before both
    forced = live.good(TEXT, prompt="x", max_tokens=4, logit_bias={"77": 100})["choices"][0]["text"]
    assert forced == tokenizer.decode([77] * 4)


def test_null_is_the_default_and_unknown_fields_are_accepted(live, folder):
    nothing = dict.fromkeys(["temperature", "top_p", "top_k", "min_p", "n", "stop", "stream", "stream_options", "logprobs",
                             "logit_bias", "presence_penalty", "frequency_penalty", "echo", "user", "model", "tools",
                             "response_format"])
    wanted = said(folder, "hello", seed=1, max_new_tokens=16)
    for more in ({}, nothing, {"store": True, "metadata": {"a": 1}, "new in 2031": [[]], "tools": [], "best_of": 1,
                               "response_format": {"type": "text"}}):
        answer = live.good(TEXT, prompt="hello", seed=1, **more)
        assert answer["choices"][0]["text"] == wanted.text and answer["choices"][0]["logprobs"] is None
    asked = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    long = live.good(CHAT, messages=[{"role": "user", "content": asked}], seed=1, max_tokens=None, logit_bias={"4095": -100})
    assert long["usage"]["total_tokens"] == 512  # as many as there is room for
    assert len({live.good(TEXT, prompt="hello")["choices"][0]["text"] for _ in range(3)}) == 3  # no seed: a random one
    short = live.good(CHAT, messages=[{"role": "user", "content": "x"}], max_tokens=50, max_completion_tokens=2)
    assert short["usage"]["completion_tokens"] == 2
