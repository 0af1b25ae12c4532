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
from conftest import ROOT, adapted, make_folder

import data
import generate
import serve
from errors import UserError
from files import peft_files, weights
from memory import rss
from methods import dora, ia3, prefix, prompt, several
from serving import engine as engines

FAMILIES = ["gpt2", "llama"]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# A random model's 4,096 tokens are all about as likely, so rounding would change a draw now and then. Among 20 it does not.
DRAW = {"temperature": 1.0, "top_p": 1.0, "top_k": 20}
POSITIONS = {"gpt2": "n_positions", "llama": "max_position_embeddings"}


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
    reply = generate.Reply(model.config, ids, tokenizer, **{**DRAW, **options})
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
        if path in (TEXT, CHAT) and isinstance(body, dict):
            body = {**DRAW, **body}
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
        model = rng.choice([None, "a", "b"])
        asked = " ".join(rng.choices(["hello", "the", "sea", "42"], k=rng.choice([1, 9, 70])))
        options = {"temperature": rng.choice([0, 0.8, 1.3]), "seed": rng.randrange(2**32), "max_tokens": rng.randint(1, 30),
                   "top_p": rng.choice([0.5, 1]), "top_k": rng.choice([3, 20]), "min_p": rng.choice([0, 0.01]),
                   "repetition_penalty": rng.choice([1, 1.4])}
        requests.append((i % 2 == 0, model, asked, options))
    wanted = [said(folder, [asked] if is_chat else asked, adapter=model, max_new_tokens=o["max_tokens"],
                   **{k: v for k, v in o.items() if k != "max_tokens"})
              for is_chat, model, asked, o in requests]

    def reply(request):
        is_chat, model, asked, options = request
        what = {"messages": [{"role": "user", "content": asked}]} if is_chat else {"prompt": asked}
        answer = live.good(CHAT if is_chat else TEXT, model=model or family, **what, **options)
        (choice,) = answer["choices"]
        assert answer["model"] == (model or family)
        assert answer["object"] == ("chat.completion" if is_chat else "text_completion")
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
    wanted = [said(folder, p, adapter="a", seed=s, max_new_tokens=6)
              for p in ("one", "two") for s in (2**32 - 2, 2**32 - 1, 0)]
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
    at = next(i for i in range(8, 28) if all(part.isascii() and part.strip() for part in parts[i:i + 2]))
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
    for seed in range(5):
        wanted = said(folder, "x", seed=seed, max_new_tokens=40, temperature=2.0, logit_bias=bias)
        options = {"prompt": "x", "seed": seed, "max_tokens": 40, "temperature": 2,
                   "logit_bias": {str(k): v for k, v in bias.items()}}
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
    body = {"model": model, **user("hello"), "seed": 4, "max_tokens": 12, "logprobs": True}
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
    assert len(ids) > engines.ECHO_PIECE
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
        for n, at in enumerate(found["text_offset"][:len(ids)]):  # (the reply has halves of characters)
            part = tokenizer.decode(everything[n:n + 1])
            assert text.startswith(part.replace("\ufffd", ""), at), (n, part)
        assert found["text_offset"][len(ids):len(ids) + 1] == [len(text)] * (n_new > 0)
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
        plain = logs(folder, start, None)[-1][new[0]].item()
        near(answer["logprobs"]["token_logprobs"][0], plain)  # the model's own, before all that
    forced = live.good(TEXT, prompt="x", max_tokens=4, logit_bias={"77": 100})["choices"][0]["text"]
    assert forced == tokenizer.decode([77] * 4)


def test_null_is_the_default_and_unknown_fields_are_accepted(live, folder):
    nothing = dict.fromkeys(["temperature", "top_p", "top_k", "min_p", "n", "stop", "stream", "stream_options", "logprobs",
                             "logit_bias", "presence_penalty", "frequency_penalty", "echo", "user", "model", "tools",
                             "response_format"])
    wanted = said(folder, "hello", seed=1, max_new_tokens=16, top_k=0)
    unknown = {"store": True, "metadata": {"a": 1}, "new in 2031": [[]]}
    neutral = {"top_k": 0, "tools": [], "best_of": 1, "response_format": {"type": "text"}}
    for more in ({"top_k": -1}, nothing, {"top_k": 0, **unknown}, neutral):
        answer = live.good(TEXT, prompt="hello", seed=1, **more)
        assert answer["choices"][0]["text"] == wanted.text and answer["choices"][0]["logprobs"] is None
    asked = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    long = live.good(CHAT, messages=[{"role": "user", "content": asked}], seed=1, max_tokens=None, logit_bias={"4095": -100})
    assert long["usage"]["total_tokens"] == 512  # as many as there is room for
    assert len({live.good(TEXT, prompt="hello")["choices"][0]["text"] for _ in range(3)}) == 3  # no seed: a random one
    short = live.good(CHAT, messages=[{"role": "user", "content": "x"}], max_tokens=50, max_completion_tokens=2)
    assert short["usage"]["completion_tokens"] == 2


# ---------------------------------------------------------------------------------------------- the engine, step by step

class Said(engines.Job):
    """A job that keeps its events."""

    def __init__(self, folder, asked, name=None, adapter=None, **options):
        model, tokenizer, _ = reference(folder)
        self.events, self.wanted = [], said(folder, asked, adapter=name, **options)
        super().__init__(generate.Reply(model.config, self.wanted.ids, tokenizer, adapter=adapter and adapter.key,
                                        **{**DRAW, **options}), self.events.append, adapter)

    def right(self):
        end, text = self.events[-1].finish_reason, "".join(e.text for e in self.events)
        return (text, end) == (self.wanted.text, self.wanted.finish_reason)


@pytest.fixture
def still(place, folder):
    """An engine whose thread does not run: the test makes its steps."""
    engine = engines.Engine(weights.load(folder), slots=3, waiting=2)
    for name in "ab":
        engine.load(name, place / "gpt2-adapters" / name)
    return engine


@torch.no_grad()
def go(engine, steps=10**6):
    while steps and (engine.waiting or engine.running):
        engine.admit()
        if engine.running:
            engine.advance()
        steps -= 1


def test_prompts_are_read_in_pieces_beside_running_replies(still, folder, monkeypatch):
    monkeypatch.setattr(engines, "PIECE", 5)
    first = Said(folder, "a short one", "a", still.adapters["a"], seed=1, max_new_tokens=30)
    still.submit([first])
    go(still, 2)
    jobs = [Said(folder, (*range(200, 200 + n),), seed=n, max_new_tokens=9) for n in (23, 11)]
    still.submit(jobs)
    before, reads = len(first.reply.new), []
    for n in range(1, 8):  # 34 ids in pieces of 5, the older prompt first
        go(still, 1)
        reads.append([j.n_read for j in jobs])
        assert len(first.reply.new) == before + n  # it is not kept waiting
    assert reads == [[5, 0], [10, 0], [15, 0], [20, 0], [23, 2], [23, 7], [23, 11]]
    go(still)
    assert first.right() and all(j.right() for j in jobs) and still.cache.lengths == [0] * 3


def test_the_last_slot_moves_when_a_middle_one_ends(still, folder):
    jobs = [Said(folder, text, seed=n, max_new_tokens=n) for text, n in (("hello", 25), ("you", 4), ("the sea " * 9, 20))]
    late = Said(folder, "one more", "b", still.adapters["b"], max_new_tokens=12)
    still.submit([*jobs, late])
    go(still, 5)
    assert still.running == [jobs[0], jobs[2], late] or still.running == [jobs[0], jobs[2]]
    assert still.cache.lengths[1] > 20  # the long text is there now
    go(still)
    assert all(j.right() for j in (*jobs, late)) and not any(still.cache.lengths)


def test_cancel_and_deadline(still, folder):
    jobs = [Said(folder, "hello", seed=n, max_new_tokens=30) for n in range(5)]
    still.submit(jobs)
    with pytest.raises(engines.Busy, match="3 requests run and 2 wait|5 wait"):
        still.submit([Said(folder, "hello", max_new_tokens=3)])
    go(still, 3)
    still.cancel([jobs[1], jobs[3]])  # one runs, one waits
    jobs[0].deadline = jobs[4].deadline = 0
    go(still, 1)
    assert still.running == [jobs[2]]
    assert jobs[0].events[-1].finish_reason == "length" and jobs[0].wanted.text.startswith(jobs[0].reply.text)
    assert "".join(e.text for e in jobs[0].events) == jobs[0].reply.text != ""
    assert isinstance(jobs[4].events[-1].error, engines.Late)
    more = Said(folder, "and", max_new_tokens=4)
    still.submit([more])
    go(still)
    assert jobs[2].right(), (jobs[2].reply.new, jobs[2].wanted.new)
    assert more.right(), (more.reply.new, more.wanted.new, more.wanted.finish_reason, more.events)
    ends = {k[1]: n for k, n in still.counts.items() if isinstance(k, tuple)}
    assert ends == {"cancelled": 2, "length": 3, "error": 1}
    still.stop()
    with pytest.raises(engines.Stopped):
        still.submit([more])


def test_a_call_that_nobody_waits_for(still):
    """It is left out. set_result would raise, and end the thread."""
    still.thread = threading.Thread(target=still.work, daemon=True)
    still.thread.start()
    hold, held = threading.Event(), threading.Event()
    first = still.call(lambda: held.set() or hold.wait(20))
    assert held.wait(20)
    gone, failed, after = still.call(lambda: 1), still.call(lambda: 1 / 0), still.call(lambda: 2)
    assert gone.cancel()
    hold.set()
    assert first.result(20) and after.result(20) == 2 and isinstance(failed.exception(20), ZeroDivisionError)
    still.stop()
    still.thread.join(20)
    assert not still.thread.is_alive()


def test_an_error_of_the_engine_itself_leaves_nobody_waiting(still, folder, monkeypatch):
    job = Said(folder, "hello", max_new_tokens=30)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(still, "advance", lambda: 1 / 0)
    still.submit([job])
    still.thread = threading.Thread(target=still.work, daemon=True)
    still.thread.start()
    wait_for(lambda: job.events)
    assert job.events[-1].finish_reason == "length" and still.stopping
    with pytest.raises(engines.Stopped):
        still.call(lambda: 1)


# ---------------------------------------------------------------------------------------------- the engine, over HTTP

def in_background(function, n=1):
    pool = ThreadPoolExecutor(n)
    try:
        return [pool.submit(function, i) for i in range(n)]
    finally:
        pool.shutdown(wait=False)


LONG = {"max_tokens": 400, "seed": 1, "logit_bias": {"4095": -100}}


def test_a_full_queue_is_429_and_waiting_has_its_limit(place, folder, slow):
    live = Live("--model", folder, "--slots", 1, "--queue", 1, "--keep-alive", 0.05, "--deadline", 0.8)
    try:
        one = live.stream(TEXT, prompt="x", **LONG)
        first = [next(one)]
        two = live.stream(TEXT, prompt="y", **LONG)
        assert next(two) is None  # a comment while it waits
        assert live.ask("/metrics")[1].count("bytewise_requests_waiting 1\n") == 1
        refused = live.send(TEXT, {"prompt": "z"})
        assert refused.status == 429 and int(refused.headers["Retry-After"]) > 0
        error = json.loads(refused.read())["error"]
        assert error["code"] == "rate_limit_exceeded" and "1 wait" in error["message"]
        refused.connection.close()
        # never, however long it waits
        status, answer = live.ask(TEXT, {"prompt": ["x", "y", "z"]})
        assert status == 400 and "3" in answer["error"]["message"], answer
        (rest,) = joined([*first, *one])
        whole = said(folder, "x", max_new_tokens=400, seed=1, logit_bias={4095: -100}).text
        assert rest["end"] == "length" and rest["text"] and whole.startswith(rest["text"]) and len(rest["text"]) < len(whole)
        two.close()
        live.quiet()
    finally:
        live.close()


def test_a_waiting_request_that_is_late_is_503(live, slow):
    """Its deadline is set here, because all slots must run on."""
    runs = [live.stream(TEXT, prompt="x", **LONG) for _ in range(4)]
    for r in runs:
        next(r)
    stream, whole = in_background(lambda i: live.ask(TEXT, {"prompt": "y"}) if i else list(live.stream(TEXT, prompt="y")), 2)
    wait_for(lambda: len(live.engine.waiting) == 2)
    for job in list(live.engine.waiting):
        job.deadline = 0
    status, answer = whole.result(20)
    assert status == 503 and answer["error"]["code"] == "unavailable" and "no slot was free" in answer["error"]["message"]
    assert stream.result(20)[-1]["error"] == answer["error"]
    for r in runs:
        r.close()


def test_a_forward_that_fails_ends_its_replies_only(live, folder, monkeypatch, capsys):
    real, fail, reached = engines.step, threading.Event(), threading.Event()

    def step(*args):
        time.sleep(0.01)
        if len(args[2]) == 3:
            reached.set()
            if fail.is_set():
                fail.clear()
                raise MemoryError("no room")
        return real(*args)

    monkeypatch.setattr(engines, "step", step)
    stream, *wholes = in_background(lambda i: live.ask(TEXT, {"prompt": "x", **LONG}) if i else
                                    list(live.stream(TEXT, prompt="x", **LONG)), 3)
    assert reached.wait(20)
    fail.set()
    for status, answer in (w.result(20) for w in wholes):
        assert status == 500 and answer["error"]["type"] == "server_error" and "MemoryError" in answer["error"]["message"]
    assert "MemoryError" in stream.result(20)[-1]["error"]["message"]
    live.quiet()
    assert live.good(TEXT, prompt="x", seed=3)["choices"][0]["text"] == said(folder, "x", seed=3, max_new_tokens=16).text


def test_nan_of_one_adapter_ends_its_rows_only(live, folder, slow):
    Bs = [p for m in several.of(live.engine.model, "a").values() for n, p in m.named_parameters() if "lora_B" in n]
    kept = [B.data.clone() for B in Bs]
    live.engine.call(lambda: [B.data.fill_(float("nan")) for B in Bs]).result(20)
    try:
        asked = [("a", "x"), (None, "x"), ("b", "x"), ("a", "y"), ("b", "y"), (None, "y")]
        found = in_background(lambda i: live.ask(TEXT, {"model": asked[i][0], "prompt": asked[i][1], "seed": i}), 6)
        for i, ((name, text), f) in enumerate(zip(asked, found)):
            status, answer = f.result(20)
            if name == "a":
                assert status == 500 and "not finite" in answer["error"]["message"]
            else:
                assert answer["choices"][0]["text"] == said(folder, text, adapter=name, seed=i, max_new_tokens=16).text
        status, answer = live.ask(TEXT, {"model": "a", "prompt": "x y z", "max_tokens": 0, "echo": True, "logprobs": 1})
        assert status == 500 and "not finite" in answer["error"]["message"], answer  # no token is chosen here
    finally:
        live.engine.call(lambda: [B.data.copy_(x) for B, x in zip(Bs, kept)]).result(20)
    assert live.good(TEXT, prompt="x", seed=1, model="a")["choices"][0]["text"] == said(folder, "x", adapter="a", seed=1,
                                                                                        max_new_tokens=16).text


def hang_up(response):
    """As a client that is killed: its socket is closed while the answer comes."""
    response.connection.sock and response.connection.sock.close()
    response.close()
    response.connection.close()


def test_a_client_that_hangs_up_frees_its_slots(live, slow):
    body = {"prompt": ["x", "y"], "n": 3, **LONG}
    stream = live.send(TEXT, {**body, "stream": True})
    wait_for(lambda: len(live.engine.running) == 4 and len(live.engine.waiting) == 2)
    stream.readline()
    hang_up(stream)
    began = time.monotonic()
    live.quiet()
    assert time.monotonic() - began < 2
    c = http.client.HTTPConnection("127.0.0.1", live.port)
    c.request("POST", TEXT, json.dumps(body))
    wait_for(lambda: len(live.engine.running) == 4 and len(live.engine.waiting) == 2)
    time.sleep(0.05)  # tokens come all the time
    c.close()
    began = time.monotonic()
    live.quiet()
    assert time.monotonic() - began < 2.5  # 400 tokens of 10 ms take 4 s
    half = socket.create_connection(("127.0.0.1", live.port))
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    half.close()  # before the body has come


# ---------------------------------------------------------------------------------------------- adapters that come and go

@pytest.fixture(scope="module")
def loading(place):
    """A server that may load what is in gpt2-adapters/allowed."""
    allowed = place / "gpt2-adapters" / "allowed"
    for name in "ab":
        shutil.copytree(place / "gpt2-adapters" / name, allowed / "deep" / name)
    peft_files.save(adapted(make_folder(place / "wide", n_embd=48), 0), allowed / "wide")
    peft_files.save(adapted(place / "gpt2", 0, method=dora), allowed / "dora")
    (allowed / "link").symlink_to(place / "gpt2-adapters" / "a")
    shutil.copytree(place / "gpt2-adapters" / "a", allowed / "linked")
    (allowed / "linked" / "adapter_config.json").unlink()
    (allowed / "linked" / "adapter_config.json").symlink_to(place / "gpt2-adapters" / "a" / "adapter_config.json")
    (allowed / "deeplink").symlink_to(allowed / "deep")
    live = Live("--model", place / "gpt2", "--allow-loading", allowed, "--slots", 3)
    yield live
    live.close()


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def test_a_reloaded_adapter(loading, place, folder, slow):
    """A reply that runs goes on with the weights with which it began. Then they go."""
    spot = place / "gpt2-adapters" / "allowed" / "changing"
    shutil.copytree(place / "gpt2-adapters" / "a", spot)
    model, n = loading.engine.model, sum(p.numel() for p in loading.engine.model.parameters())
    assert loading.ask(LOAD, {"lora_name": "mine", "lora_path": "changing"})[0] == 200
    assert [(m["id"], m["parent"]) for m in loading.ask("/v1/models")[1]["data"]] == [("gpt2", None), ("mine", "gpt2")]
    body = {"model": "mine", "prompt": "hello", "seed": 2, "max_tokens": 30}
    old = said(folder, "hello", adapter="a", seed=2, max_new_tokens=30).text
    new = said(folder, "hello", adapter="newer", seed=2, max_new_tokens=30).text
    runs, = in_background(lambda i: loading.good(TEXT, **body))
    wait_for(lambda: loading.engine.running and loading.engine.running[0].reply.new)
    shutil.rmtree(spot)
    shutil.copytree(place / "gpt2-adapters" / "newer", spot)
    assert loading.ask(LOAD, {"lora_name": "mine", "lora_path": str(spot)})[0] == 200
    assert not runs.done() and len(several.names(model)) == 2
    assert loading.good(TEXT, **body)["choices"][0]["text"] == new != old
    assert runs.result(20)["choices"][0]["text"] == old
    loading.quiet()
    assert len(several.names(model)) == 1
    runs, = in_background(lambda i: loading.good(TEXT, **body))
    wait_for(lambda: loading.engine.running and loading.engine.running[0].reply.new)
    assert loading.ask(UNLOAD, {"lora_name": "mine"})[0] == 200
    status, answer = loading.ask(TEXT, body)
    assert status == 404 and answer["error"]["code"] == "model_not_found" and "gpt2" in answer["error"]["message"]
    assert not runs.done() and runs.result(20)["choices"][0]["text"] == new
    loading.quiet()
    assert several.names(model) == [] and sum(p.numel() for p in model.parameters()) == n
    shutil.rmtree(spot)


@pytest.mark.parametrize("body, says", [
    ({"lora_path": "../a"}, "not below"), ({"lora_path": "deep/../../b"}, "not below"), ({"lora_path": "/etc"}, "not below"),
    ({"lora_path": "deep/a/.."}, "not below"), ({"lora_path": "a\0b"}, "not below"),
    ({"lora_path": "link"}, "links"), ({"lora_path": "linked"}, "links"), ({"lora_path": "deeplink/a"}, "links"),
    ({"lora_path": "nothing"}, "no such folder"), ({"lora_path": "x" * 5000}, "no such folder"),
    ({"lora_path": "\ud800"}, "no such folder"), ({"lora_path": "linked/adapter_model.safetensors"}, "no such folder"),
    ({"lora_path": "wide"}, "wide"), ({"lora_path": "dora"}, "DoRA"), ({"lora_path": "deep"}, "adapter_config.json"),
    ({"lora_path": "deep/a", "lora_name": "gpt2"}, "base"), ({"lora_path": "deep/a", "lora_name": "../x"}, "named"),
    ({"lora_path": "deep/a", "lora_name": "\ud800"}, "named"),
    ({"lora_path": 5}, "two strings"), ({"lora_name": None, "lora_path": "deep/a"}, "two strings")])
def test_what_may_not_be_loaded(body, says, loading):
    status, answer = loading.ask(LOAD, {"lora_name": "x", **body})
    message = answer["error"]["message"]
    assert 400 <= status < 500 and says in message and "\n" not in message, answer
    assert several.names(loading.engine.model) == list(loading.engine.adapters) == []


def test_loading_is_off_without_the_option(live, loading):
    for path in (LOAD, UNLOAD):
        assert live.ask(path, {"lora_name": "x", "lora_path": "y"})[0] == 404
    for name in ("x", None, [1], {}, "\ud800"):
        assert loading.ask(UNLOAD, {"lora_name": name})[0] == 404


@pytest.mark.parametrize("method", [dora, ia3, prompt, prefix])
def test_adapters_that_cannot_share_are_served_alone(method, place, folder):
    tokenizer = reference(folder)[1]
    out = place / "gpt2-adapters" / method.__name__.rpartition(".")[2]
    peft_files.save(adapted(folder, 7, method=method), out)
    live = Live("--model", folder, "--adapter", out, "--slots", 2)
    try:
        model = peft_files.load(weights.load(folder), out).eval()
        reply = functools.partial(generate.reply, model, tokenizer, max_new_tokens=12, **DRAW)
        texts = ["hello", "the sea " * 50, "hello"]
        found = in_background(lambda i: live.good(TEXT, prompt=texts[i], seed=i, max_tokens=12), 3)
        for i, f in enumerate(found):
            assert f.result(20)["choices"][0]["text"] == reply(tokenizer.encode(texts[i]), seed=i)
        assert [m["id"] for m in live.ask("/v1/models")[1]["data"]] == [out.name]
        assert live.good(TEXT, prompt="x", model=out.name, max_tokens=1)["model"] == out.name
        assert live.ask(TEXT, {"prompt": "x", "model": "gpt2"})[0] == 404  # the base is not there
        live.quiet()
    finally:
        live.close()


# ---------------------------------------------------------------------------------------------- what clients do wrong

def user(content):
    return {"messages": [{"role": "user", "content": content}]}


BAD = [  # route, body, a part of the message, the param
    (CHAT, b"{", "not JSON", None), (CHAT, b"", "not JSON", None), (TEXT, b"[" * 100_000, "not JSON", None),
    (TEXT, b'{"a":' * 100_000, "not JSON", None), (CHAT, b"\xff\xfe\xff", "not JSON", None), (CHAT, [], "JSON object", None),
    (CHAT, "x", "JSON object", None), (TEXT, b"9" * 5000, "", None),
    (CHAT, user("word " * 600), "tokens, the model 512 positions", "messages"),
    (TEXT, {"prompt": "word " * 600}, "tokens, the model 512 positions", "prompt"),
    *((CHAT, {**user("x"), "temperature": v}, "temperature", "temperature") for v in (-1, "hot", True, 3, [], {}, 10**400)),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature", "temperature"),
    (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "top_p": -Infinity}', "top_p", "top_p"),
    *((CHAT, {**user("x"), "n": v}, "from 1 to 16", "n") for v in (10_000, 0, -1, 1.0, "2", True)),
    *((CHAT, {**user("x"), "stop": v}, "stop", "stop") for v in (["a"] * 1000, "", 5, ["a", ""], [None], {})),
    *((CHAT, {**user("x"), "max_tokens": v}, "max_tokens", "max_tokens") for v in (0, -1, 1.5, "9", True)),
    (TEXT, {"prompt": "x", "max_tokens": -1}, "max_tokens", "max_tokens"),
    *((CHAT, {**user("x"), "logit_bias": v}, "logit_bias", "logit_bias")
      for v in ({"4096": 1}, {"999999999": 1}, {"-1": 1}, {"x": 1}, {"\u0665": 1}, [], 3, {str(i): 0 for i in range(1025)})),
    *((CHAT, {**user("x"), "logit_bias": {"1": v}}, "logit_bias[1]", "logit_bias[1]") for v in (101, "1", None, True)),
    (CHAT, {**user("x"), "top_logprobs": 3}, "needs logprobs", "top_logprobs"),
    (CHAT, {**user("x"), "logprobs": True, "top_logprobs": 21}, "from 0 to 20", "top_logprobs"),
    (CHAT, {**user("x"), "logprobs": 5}, "true or false", "logprobs"),
    (TEXT, {"prompt": "x", "logprobs": True}, "logprobs", "logprobs"),
    (CHAT, {**user("x"), "tools": [{"type": "function"}]}, "tools is not supported", "tools"),
    (CHAT, {**user("x"), "response_format": {"type": "json_object"}}, "response_format is not supported", "response_format"),
    (TEXT, {"prompt": "x", "best_of": 3}, "best_of is not supported", "best_of"),
    *((CHAT, {**user("x"), name: v}, name, name) for name, v in (
        ("stream", "yes"), ("stream_options", 1), ("seed", 1.5), ("seed", 2**64), ("model", 7), ("model", ["a"]),
        ("min_p", 2), ("top_k", -2), ("repetition_penalty", 0), ("presence_penalty", 2.1), ("frequency_penalty", "1"))),
    *((CHAT, {"messages": m}, "messages", "messages") for m in ([], None, "x", {})), (CHAT, {}, "messages", "messages"),
    (CHAT, {"messages": ["x"]}, "messages[0]", "messages[0]"),
    *((CHAT, {"messages": [{"role": r, "content": "x"}]}, "messages[0].role", "messages[0].role")
      for r in ("bot", None, 3, [], {})),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "messages[0].content"),
    (CHAT, user([{"type": "image_url", "image_url": {"url": "http://x"}}]), "type text", "messages[0]"),
    (CHAT, user([{"type": "text", "text": 5}]), "type text", "messages[0]"),
    (CHAT, user("  \n"), "empty", "messages"), (CHAT, user([]), "empty", "messages"),
    (CHAT, {"messages": [*user("x")["messages"], {"role": "assistant", "content": "y"}]}, "user's", "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls", "messages[0]"),
    *((TEXT, {"prompt": p}, "prompt", "prompt")
      for p in ([], None, 5, {}, True, [-1], [10**9], [4096], [1, -1], [[1], [4096]])),
    *((TEXT, {"prompt": p}, "prompt[", name) for p, name in (
        ([[]], "prompt[0]"), (["x", 5], "prompt[1]"), ([5, "x"], "prompt[0]"), ([1, None], "prompt[0]"),
        ([True], "prompt[0]"), ([[1], []], "prompt[1]"))),
    (TEXT, {"prompt": [[1, True]]}, "no token id", "prompt"), (TEXT, {"prompt": ["x"] * 257}, "at most 256", "prompt"),
    (TEXT, {"prompt": ""}, "empty", "prompt"), (TEXT, {}, "prompt", "prompt"),
    ("/tokenize", {}, "prompt", "prompt"), ("/tokenize", {"prompt": 5}, "prompt", "prompt"),
    ("/tokenize", {"messages": user("x")["messages"], "model": ["a"]}, "model", "model"),
    ("/detokenize", {"tokens": "x"}, "tokens", "tokens"), ("/detokenize", {"tokens": [4096]}, "4095", "tokens"),
    ("/detokenize", {}, "tokens", "tokens"), ("/detokenize", {"tokens": [[1]]}, "tokens", "tokens")]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input_is_a_400_that_names_the_field(number, live):
    path, body, says, param = BAD[number]
    status, answer = live.ask(path, body)
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}, answer
    error = answer["error"]
    assert says in error["message"] and error["param"] == param and error["type"] == "invalid_request_error", error
    assert "\n" not in error["message"] and len(error["message"]) < 400
    assert (error["code"] == "context_length_exceeded") == ("positions" in says)


def test_a_prompt_that_is_too_long_has_both_numbers(live, folder):
    n = len(reference(folder)[1].encode("word " * 600))
    message = live.ask(TEXT, {"prompt": "word " * 600})[1]["error"]["message"]
    assert str(n) in message and "512" in message
    assert live.ask(TEXT, {"prompt": [[7] * 511]})[0] == 200 and live.ask(TEXT, {"prompt": [[7] * 512]})[0] == 400


def test_statuses(live):
    for status, path, method in ((404, "/nothing", "GET"), (404, "/v1/no", "POST"), (405, CHAT, "GET"), (405, "/", "POST")):
        found, answer = live.ask(path, b"{}" if method == "POST" else None, method=method)
        assert found == status and path in answer["error"]["message"]
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    status, answer = live.ask(CHAT, {**user("x"), "model": "gpt-4"})
    assert status == 404 and all(name in answer["error"]["message"] for name in ("gpt-4", "gpt2", "a, b"))
    assert answer["error"]["code"] == "model_not_found"
    assert live.ask("/v1/models/gpt-4")[0] == 404 and live.ask("/v1/models/b")[1]["id"] == "b"
    cards = live.ask("/v1/models")[1]["data"]
    assert [(c["id"], c["parent"], c["max_model_len"]) for c in cards] == [("gpt2", None, 512), ("a", "gpt2", 512),
                                                                           ("b", "gpt2", 512)]
    assert cards[1]["root"].endswith("gpt2-adapters/a")
    status, page = live.ask("/")
    assert status == 200 and page.startswith("<!") and live.ask("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_413(chunked, live):
    """The client sends all of it, and then reads the answer: its connection must not break before."""
    c = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    body = (b"x" * 2**20 for _ in range(9)) if chunked else b"x" * 9 * 2**20
    c.request("POST", CHAT, body, encode_chunked=chunked, headers={"Transfer-Encoding": "chunked"} if chunked else {})
    r = c.getresponse()
    assert r.status == 413 and json.loads(r.read())["error"]["code"] == "request_too_large"
    c.request("GET", "/health")  # the same connection
    assert c.getresponse().read() == b'{"status":"ok"}'
    c.close()


def test_halves_of_characters(live, folder):
    """JSON can hold half a character. It becomes U+FFFD, as in generate.py."""
    text = live.good(TEXT, prompt="x \ud83d y", seed=1)["choices"][0]["text"]
    assert text == said(folder, "x \ufffd y", seed=1, max_new_tokens=16).text
    assert live.ask(CHAT, {**user("\ud83d"), "max_tokens": 2})[0] == 200
    assert live.ask(TEXT, {"prompt": "x", "stop": "\udc00", "user": "\ud83d"})[0] == 200
    for body in ({"model": "\ud83d", "prompt": "x"}, {"logit_bias": {"\ud83d": 1}, "prompt": "x"},
                 {"stream_options": "\ud83d", "prompt": "x"}, {"messages": [{"role": "\ud83d", "content": "x"}]}):
        assert live.ask(TEXT if "prompt" in body else CHAT, body)[0] in (400, 404)
    assert live.good("/tokenize", prompt="\ud83d")["tokens"] == reference(folder)[1].encode("\ufffd")
    vote = {"prompt": "\ud83d", "a": "a", "b": "b", "replies": {"a": "\ud83d", "b": ""}, "vote": "a"}
    assert live.ask("/votes", vote)[0] == 204


def test_tokenize_and_back(live, folder):
    tokenizer = reference(folder)[1]
    text = "Hello \u00e9\U0001f600  world\n"
    found = live.good("/tokenize", prompt=text)
    assert found == {"tokens": tokenizer.encode(text), "count": len(tokenizer.encode(text)), "max_model_len": 512}
    assert live.good("/detokenize", tokens=found["tokens"]) == {"prompt": text}
    chat = live.good("/tokenize", **user("hello"), model="a")["tokens"]
    assert chat == said(folder, ["hello"], max_new_tokens=1).ids
    assert live.good("/tokenize", prompt="<|endoftext|>")["tokens"] == [4095]
    info = live.ask("/tokenizer_info")[1]
    assert info["eos_token"] == "<|endoftext|>" and info["vocab_size"] == 4096 and "message" in info["chat_template"]


def test_metrics(live, folder):
    def read():
        status, text = live.ask("/metrics")
        assert status == 200 and text.endswith("\n")
        found, kinds = {}, {}
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kinds[name] = line.split()
            elif not line.startswith("# HELP "):
                name, labels, value = re.fullmatch(r'([a-z_]+)(\{end="[a-z]+"\})? (\S+)', line).groups()
                assert kinds[re.sub("_seconds_(sum|count)$", "_seconds", name)] in ("counter", "gauge", "summary")
                found[name + (labels or "")] = float(value)
        return found
    before, n = read(), len(reference(folder)[1].encode("hello there"))
    live.good(TEXT, prompt="hello there", max_tokens=9, n=2, logit_bias={"4095": -100})
    after = read()
    for name, more in (("prompt_tokens_total", 2 * n), ("generated_tokens_total", 18), ("first_token_seconds_count", 2),
                       ('requests_total{end="length"}', 2)):
        assert after[f"bytewise_{name}"] - before.get(f"bytewise_{name}", 0) == more, name
    assert after["bytewise_slots"] == 4 and after["bytewise_adapters"] == 2 and after["bytewise_requests_running"] == 0
    assert after["bytewise_kv_cache_bytes"] == live.engine.cache.nbytes and after["bytewise_resident_bytes"] > 1e8


def test_votes(servers, place):
    live, file = servers["llama"], place / "llama.jsonl"
    assert live.ask("/votes") == (200, {"on": True})
    vote = {"prompt": "which\u2028one?", "a": "llama", "b": "b", "replies": {"a": "one\n", "b": "\u00e9"}, "vote": "tie"}
    for bad in ({"a": "x"}, {"a": "b"}, {"b": ["b"]}, {"vote": "c"}, {"vote": None}, {"prompt": 5}, {"replies": {"a": "x"}},
                {"replies": "x"}, {"replies": {"a": 1, "b": ""}}):
        status, answer = live.ask("/votes", {**vote, **bad})
        assert status == 400 and answer["error"]["message"], bad
    assert not file.exists()
    for v in ("tie", "a"):
        assert live.ask("/votes", {**vote, "vote": v, "more": 1})[0] == 204
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [r["vote"] for r in rows] == ["tie", "a"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", rows[0].pop("time")) and rows[0] == vote


def test_a_key_and_an_origin(place, folder, monkeypatch):
    monkeypatch.setenv("BYTEWISE_API_KEY", "schl\u00fcssel")
    live = Live("--model", folder)
    try:
        for key in (None, "", "Bearer schl", "Bearer \u00e9".encode()):
            headers = {} if key is None else {"Authorization": key}
            for path, body in ((CHAT, user("x")), ("/v1/models", None), ("/metrics", None), ("/tokenize", {"prompt": "x"})):
                status, answer = live.ask(path, body, headers)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert live.ask("/")[0] == live.ask("/health")[0] == 200
        right = {"Authorization": "Bearer schl\u00fcssel".encode()}
        assert live.ask("/v1/models", headers=right)[0] == 200
        assert live.ask("/votes", headers=right) == (200, {"on": False})
        assert live.ask("/votes", {"vote": "a"}, right)[0] == 404
        for origin, status in (("http://evil.example", 403), ("null", 403), (f"http://127.0.0.1:{live.port}", 200),
                               (f"http://127.0.0.1:{live.port + 1}", 403)):
            assert live.ask("/v1/models", headers={**right, "Origin": origin})[0] == status, origin
            assert live.ask("/health", headers={"Origin": origin})[0] == status
    finally:
        live.close()


def test_a_name_that_leads_here_is_not_this_machine(live):
    """DNS rebinding: a page's own host name leads to 127.0.0.1, so its Origin is the Host of its requests."""
    for host, status in ((f"evil.example:{live.port}", 403), ("evil.example", 403), (f"localhost:{live.port}", 200),
                         (f"127.0.0.1:{live.port}", 200), ("localhost", 200)):
        assert live.ask("/v1/models", headers={"Host": host, "Origin": f"http://{host}"})[0] == status, host


def test_a_template_that_raises(place):
    folder = make_folder(place / "raises")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no\nsuch roles') if messages | length > 2 else '' }}"
                                                "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    live = Live("--model", folder)
    try:
        assert live.ask(CHAT, user("x"))[0] == 200
        status, answer = live.ask(CHAT, {"messages": user("x")["messages"] * 3})
        assert status == 400 and "such roles" in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    finally:
        live.close()


# ---------------------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [32, 16])
def test_the_cache_is_as_predicted(bits, family, place, capsys):
    words = ["--model", str(place / family), "--bits", str(bits), "--slots", "3", "--max-length", "100"]
    serve.main([*words, "--dry-run"])
    said_ = capsys.readouterr().out
    assert said_.count("\n") == 1 and "3 slots of 100 positions" in said_
    predicted = serve.predicted(str(place / family), bits, "cpu", 3, 100)[1]
    live = Live(*words)
    try:
        assert live.good(TEXT, prompt="x")["usage"]["completion_tokens"] <= 16
        assert live.engine.cache.nbytes == predicted and serve.human(predicted) in said_
        assert live.ask(TEXT, {"prompt": [[7] * 100]})[0] == 400
    finally:
        live.close()


@pytest.mark.parametrize("words, says", [
    (["--port", "99999"], "99999"), (["--slots", "0"], "--slots 0"), (["--max-length", "1"], "--max-length 1"),
    (["--deadline", "nan"], "--deadline nan"), (["--votes", "/nothing/x.jsonl"], "--votes /nothing"),
    (["--votes", "."], "--votes ."), (["--allow-loading", "/nothing"], "--allow-loading /nothing"),
    (["--adapter", "/nothing"], "/nothing"), (["--adapter", "x=/nothing"], "/nothing"), (["--adapter", "gpt2={a}"], "gpt2"),
    (["--adapter", "{a}", "--adapter", "{b}"], "needs a name"), (["--port", "{busy}"], "is in use"),
    (["--host", "no.such.host.invalid"], "no.such.host")])
def test_what_the_command_refuses(words, says, folder, place, monkeypatch):
    monkeypatch.setattr(serve.Uvicorn, "run", lambda *args, **more: None)  # or it would serve for ever
    with socket.create_server(("127.0.0.1", 0)) as busy:
        adapters = {name: place / "gpt2-adapters" / name for name in "ab"}
        words = [w.format(busy=busy.getsockname()[1], **adapters) for w in words]
        with pytest.raises(UserError) as e:
            serve.main(["--model", str(folder), "--port", "0", *words])
    assert says in str(e.value) and "\n" not in str(e.value)


def test_every_address_warns(folder, capsys):
    for words, warns in ((["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--api-key", "k"], False), ([], False)):
        live = Live("--model", folder, *words)
        live.close()
        assert ("--api-key" in capsys.readouterr().err) == warns


def command(*words):
    return subprocess.Popen([sys.executable, ROOT / "serve.py", *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_a_signal_ends_streams_and_the_process(place, folder):
    """Three commands: Ctrl-C, SIGTERM, and one that ends at once with a line."""
    make_folder(place / "long", n_positions=2048)
    stopped = [command("--model", place / "long", "--port", 0) for _ in range(2)]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        refused = command("--model", folder, "--port", busy.getsockname()[1])
        out, err = refused.communicate(timeout=60)
    assert refused.returncode == 1 and err.startswith("error: ") and err.count("\n") == 1 and "is in use" in err
    for p, sig in zip(stopped, (signal.SIGINT, signal.SIGTERM)):
        try:
            while "serving" not in (line := p.stdout.readline()):
                assert line
            c = http.client.HTTPConnection("127.0.0.1", int(re.search(r":(\d+)/", line).group(1)), timeout=60)
            body = {"prompt": "x", "seed": 1, "stream": True, "n": 3, "logit_bias": {"4095": -100}, "max_tokens": 2000}
            c.request("POST", TEXT, json.dumps(body))
            stream = chunks(c.getresponse())
            first = [next(stream)]
            began = time.monotonic()
            p.send_signal(sig)
            found = joined([*first, *stream], 3)  # with [DONE]
            assert [f["end"] for f in found] == ["length"] * 3 and all(f["text"] for f in found)
            _, err = p.communicate(timeout=60)
            took = time.monotonic() - began
            print(f"{sig.name}: {took:.2f} s")
            assert p.returncode == {signal.SIGINT: 130, signal.SIGTERM: -15}[sig] and "Traceback" not in err
            assert took < 2  # 0.3 s on an idle machine
        finally:
            p.kill()
            p.wait()
            p.stdout.close()
            p.stderr.close()


# ---------------------------------------------------------------------------------------------- everything at once

def test_soak(servers, folder):
    """Requests of random kinds in random order from 8 threads: every answer is right, and nothing stays."""
    live, rng, n = servers["gpt2"], random.Random(7), int(os.environ.get("BYTEWISE_SOAK", 200))
    table = []  # (route, body, the text of each choice)
    for i in range(24):
        name, n_new = rng.choice([None, "a", "b"]), rng.randint(1, 12)
        text = " ".join(rng.choices(["sea", "two", "x", "Hello"], k=rng.choice([1, 5, 60])))
        texts = [said(folder, text if i % 2 else [text], adapter=name, seed=i + c, max_new_tokens=n_new).text
                 for c in range(1 + i % 3)]
        body = {"model": name, "seed": i, "n": len(texts), "max_tokens": n_new}
        table.append((TEXT, {**body, "prompt": text}, texts) if i % 2 else (CHAT, {**body, **user(text)}, texts))
    kinds = ["whole", "stream", "stream", "logprobs", "bad", "lost stream", "lost whole", "tokenize"]
    work, sizes, done = [(rng.choice(kinds), rng.choice(table), rng.random()) for _ in range(n)], {}, itertools.count(1)

    def one(item):
        kind, (path, body, texts), chance = item
        if kind in ("whole", "logprobs"):
            more = {} if kind == "whole" else {"logprobs": 2} if path == TEXT else {"logprobs": True, "top_logprobs": 2}
            choices = live.good(path, **body, **more)["choices"]
            assert [c["text"] if path == TEXT else c["message"]["content"] for c in choices] == texts
            assert all((c["logprobs"] is not None) == bool(more) for c in choices)
        elif kind == "stream":
            assert [c["text"] for c in joined(live.stream(path, **body), len(texts))] == texts
        elif kind == "bad":
            bad = BAD[int(chance * len(BAD))]
            assert live.ask(*bad[:2])[0] == 400
        elif kind == "tokenize":
            assert live.good("/tokenize", prompt=texts[0]).keys() == {"tokens", "count", "max_model_len"}
        else:
            c = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
            c.request("POST", path, json.dumps({**DRAW, **body, "max_tokens": 40, "stream": kind == "lost stream"}))
            time.sleep(chance / 20)
            if kind == "lost stream" and chance < 0.5:
                c.getresponse().read(10)
            c.sock.close()
            c.close()
        if (count := next(done)) in (200, n):
            sizes[count] = rss()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(one, item) for item in work]:
            future.result(60)
    live.quiet()
    assert not any(a.n_jobs for a in live.engine.adapters.values()) and several.names(live.engine.model) == ["a", "b"]
    print({count: f"{size / 1e6:.1f} MB" for count, size in sizes.items()})
    if n > 200:
        assert sizes[n] - sizes[200] < 10e6
