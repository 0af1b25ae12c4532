"""Programs that people use, against serve.py itself: openai, LangChain, lm-evaluation-harness, curl, Prometheus, a browser.

One server for all of them, with gpt2-nano and two random adapters. What a client must get is computed here, from the same
weights by a plain forward.
"""
import asyncio
import collections
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request

import pytest
import test_page
import torch
from conftest import NANO, ROOT
from runs import no_picture

import compare
import data
import generate
import lora
from files import peft_files, weights

pytestmark = pytest.mark.clients
KEY = "a secret"
MODELS = ["gpt2-nano", "support", "poems"]
HELLO = [{"role": "user", "content": "Hello, who are you?"}]
NO_END = {"4095": -100}  # <|endoftext|>: a reply with this logit_bias has as many tokens as it may have
browser = test_page.browser


def need(package: str):
    return pytest.importorskip(package, reason=f"{package} is not installed: pip install -r requirements-clients.txt")


# ---------------------------------------------------------------------------------------------- the server, what is right

@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """The three models, each loaded alone, and where the adapters lie."""
    folder, models = tmp_path_factory.mktemp("adapters"), {"gpt2-nano": weights.load(str(NANO)).eval()}
    for seed, name in enumerate(MODELS[1:], 2):
        model = lora.inject(weights.load(str(NANO)), r=4, alpha=8, targets="all").eval()
        rng = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1, generator=rng)  # B too: zeros would change nothing
        peft_files.save(model, folder / name)
        models[name] = model
    tokenizer = data.load_tokenizer(str(NANO))
    return types.SimpleNamespace(folder=folder, models=models, tokenizer=tokenizer,
                                 template=data.load_template("auto", tokenizer))


def adapter_options(oracle) -> list[str]:
    return [x for name in MODELS[1:] for x in ("--adapter", f"{name}={oracle.folder / name}")]


def greedy(oracle, name, prompt, n):
    """The reply of n tokens to a text (continued as it is) or to messages."""
    ids = oracle.tokenizer.encode(prompt) if isinstance(prompt, str) else data.prompt_ids(
        prompt, oracle.template, oracle.tokenizer)
    return generate.reply(oracle.models[name], oracle.tokenizer, ids, temperature=0, max_new_tokens=n)


@torch.no_grad()
def likelihood(oracle, name, context: list[int], following: list[int]):
    """log p(following | context), and whether each of its tokens is the most likely one."""
    logs = oracle.models[name](torch.tensor([context + following])).float().log_softmax(-1)[0, len(context) - 1:-1]
    found = logs[torch.arange(len(following)), following]
    return found.sum().item(), bool((found == logs.amax(-1)).all())


@pytest.fixture(scope="module")
def server(oracle, tmp_path_factory):
    """A running serve.py: its url, its votes, the adapters' folder."""
    place = tmp_path_factory.mktemp("server")
    votes, errors = place / "votes.jsonl", place / "stderr"
    command = [sys.executable, ROOT / "serve.py", "--model", "gpt2-nano", *adapter_options(oracle), "--port", "0", "--slots",
               "4", "--queue", "12", "--votes", votes, "--allow-loading", oracle.folder, "--api-key", KEY]
    with open(errors, "w") as stderr, pytest.MonkeyPatch.context() as m, subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        for name in ("no_proxy", "NO_PROXY"):
            m.setenv(name, "127.0.0.1")
        try:
            found = next(filter(None, (re.search(r"http://localhost:(\d+)/", line) for line in process.stdout)), None)
            assert found, errors.read_text()
            yield types.SimpleNamespace(url=f"http://127.0.0.1:{found[1]}", votes=votes)
            process.send_signal(signal.SIGINT)
            process.wait(10)
        finally:
            process.kill()
    assert errors.read_text() == ""


# ---------------------------------------------------------------------------------------------- the openai package

@pytest.fixture(scope="module")
def openai():
    return need("openai")


@pytest.fixture(scope="module")
def client(openai, server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_lists_the_models(client, oracle):
    found = {m.id: m for m in client.models.list()}
    assert list(found) == MODELS and found["support"].parent == "gpt2-nano"
    assert found["support"].root == str(oracle.folder / "support") and client.models.retrieve("poems").id == "poems"


@pytest.mark.parametrize("name", MODELS)
def test_openai_chat_whole_and_streamed(name, client, oracle):
    right = greedy(oracle, name, HELLO, 12)
    asked = dict(model=name, messages=HELLO, temperature=0, max_tokens=12)
    reply = client.chat.completions.create(**asked)
    assert reply.choices[0].message.content == right and reply.choices[0].message.role == "assistant"
    assert reply.model == name and reply.choices[0].finish_reason == "length"
    n = len(data.prompt_ids(HELLO, oracle.template, oracle.tokenizer))
    usage = (n, 12, n + 12)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == usage
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == right and len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert {c.id for c in chunks} == {chunks[0].id} and all(c.usage is None for c in chunks)
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and all(c.usage is None and len(c.choices) == 1 for c in chunks)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == usage


def test_openai_accumulates_a_stream(client, oracle):
    """The package's own helper joins the pieces, logprobs and usage too. It takes only a reply that ends by itself."""
    right = greedy(oracle, "poems", HELLO, 20)
    end = right[-8:]
    with client.chat.completions.stream(model="poems", messages=HELLO, temperature=0, stop=end, logprobs=True,
                                        top_logprobs=2, stream_options={"include_usage": True}) as stream:
        kinds = collections.Counter(event.type for event in stream)
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == right[:right.index(end)] != ""
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens > 3
    assert kinds["content.delta"] > 3 and kinds["content.done"] == 1


def test_openai_choices_seed_and_stop(client, oracle):
    asked = dict(model="gpt2-nano", messages=HELLO, temperature=1.0, max_tokens=12)
    first, again = (client.chat.completions.create(**asked, n=2, seed=5) for _ in range(2))
    texts = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1] and texts[0] != texts[1]
    assert texts == [c.message.content for c in again.choices]
    assert texts[0] != client.chat.completions.create(**asked, seed=6).choices[0].message.content
    pieces = ["", ""]
    for chunk in client.chat.completions.create(**asked, n=2, seed=5, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == texts
    right = greedy(oracle, "gpt2-nano", HELLO, 12)
    stopped = client.chat.completions.create(**{**asked, "temperature": 0}, stop=[right[5:9], "never"]).choices[0]
    assert stopped.message.content == right[:right.index(right[5:9])] and stopped.finish_reason == "stop"


def test_openai_logprobs(client, oracle):
    choice = client.chat.completions.create(model="support", messages=HELLO, temperature=0, max_tokens=6, logprobs=True,
                                            top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert len(content) == 6 and "".join(t.token for t in content) == choice.message.content
    for token in content:
        top = [t.logprob for t in token.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True) and top[0] == token.logprob < 0
        assert bytes(token.bytes).decode() == token.token == token.top_logprobs[0].token
    ids = data.prompt_ids(HELLO, oracle.template, oracle.tokenizer)
    reply = oracle.tokenizer.encode(choice.message.content)
    assert likelihood(oracle, "support", ids, reply)[0] == pytest.approx(sum(t.logprob for t in content), abs=1e-4)


def test_openai_six_at_once_on_different_adapters(openai, server, oracle):
    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
            async def one(name, words):
                text = ""
                async for chunk in await client.chat.completions.create(
                        model=name, messages=words, temperature=0, max_tokens=10 + len(words[0]["content"]), stream=True):
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*(one(*x) for x in asked))

    asked = [(name, [{"role": "user", "content": words}]) for name in MODELS for words in ("Why?", "Tell me of the king")]
    right = [greedy(oracle, name, words, 10 + len(words[0]["content"])) for name, words in asked]
    assert asyncio.run(ask()) == right and len(set(right)) == 6


def test_openai_completions(client, oracle):
    asked = dict(model="support", temperature=0, max_tokens=8)
    texts = ["In the beginning", "The people of the"]
    right = [greedy(oracle, "support", text, 8) for text in texts]
    ids = [oracle.tokenizer.encode(text) for text in texts]
    for prompt, wanted in ((texts[0], right[:1]), (texts, right), (ids[0], right[:1]), (ids, right)):
        found = client.completions.create(prompt=prompt, **asked)
        assert [c.text for c in found.choices] == wanted and [c.index for c in found.choices] == [*range(len(wanted))]
    pieces = ["", ""]
    for chunk in client.completions.create(prompt=texts, **asked, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == right
    echo = client.completions.create(prompt=texts[0], model="support", max_tokens=0, echo=True, logprobs=1).choices[0]
    found = echo.logprobs
    assert echo.text == texts[0] == "".join(found.tokens) and found.token_logprobs[0] is None
    assert sum(found.token_logprobs[1:]) == pytest.approx(likelihood(oracle, "support", ids[0][:1], ids[0][1:])[0], abs=1e-4)
    assert all(t in top for t, top in zip(found.tokens[1:], found.top_logprobs[1:]))  # likely or not
    assert [echo.text[i:i + len(t)] for i, t in zip(found.text_offset, found.tokens)] == found.tokens


def test_openai_errors(openai, client):
    asked = dict(model="gpt2-nano", messages=HELLO)
    with pytest.raises(openai.NotFoundError, match="gpt2-nano, support, poems") as e:
        client.chat.completions.create(**{**asked, "model": "gpt-4o"})
    assert (e.value.code, e.value.param, e.value.type) == ("model_not_found", "model", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="temperature") as e:
        client.chat.completions.create(**asked, temperature=3)
    assert e.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="prompt has .* tokens, the model 512 positions"):
        client.completions.create(model="gpt2-nano", prompt=[1] * 512)
    with pytest.raises(openai.BadRequestError, match="17 replies; this server takes at most 16"):
        client.completions.create(model="gpt2-nano", prompt=["Hello"] * 17)
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong") as e:
        client.with_options(api_key="another").models.list()
    assert e.value.code == "invalid_api_key"


def test_openai_a_full_queue(openai, client):
    asked = dict(model="gpt2-nano", messages=HELLO, logit_bias=NO_END)
    with client.chat.completions.create(**asked, n=16, stream=True) as stream:  # 4 slots, and 12 may wait
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="try again") as e:
            client.chat.completions.create(**asked)
    assert int(e.value.response.headers["Retry-After"]) > 0
    patient = client.with_options(max_retries=5)  # the stream is closed: there is room again
    assert patient.chat.completions.create(**asked, max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_answers_have_the_form_of_openai(kind, stream, openai, client):
    """create() takes JSON of any form; model_validate does not. (Its form of a completion's piece has no finish_reason null,
    but OpenAI's server sends it.)"""
    is_chat = kind == "chat"
    form = openai.types.Completion if not is_chat else openai.types.chat.ChatCompletionChunk if stream else \
        openai.types.chat.ChatCompletion
    more = dict(stream=True, stream_options={"include_usage": True}) if stream else {}
    more |= dict(messages=HELLO, logprobs=True, top_logprobs=2) if is_chat else dict(prompt="Hello", logprobs=2)
    route = client.chat.completions if is_chat else client.completions
    with route.with_streaming_response.create(model="poems", max_tokens=5, logit_bias=NO_END, n=2, seed=1, **more) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream" if stream else "application/json")
        body = raw.read().decode()
    events = body.split("\n\n") if stream else ["data: " + body]
    if stream:
        assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2] if stream else events:
        found = json.loads(event.removeprefix("data: "))
        for choice in found["choices"] if stream and not is_chat else ():
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        form.model_validate(found, strict=True)


# ---------------------------------------------------------------------------------------------- LangChain

def test_langchain(server, oracle):
    langchain = need("langchain_openai")
    common = dict(model="support", base_url=server.url + "/v1", api_key=KEY, temperature=0, max_retries=0)
    right = greedy(oracle, "support", HELLO, 10)
    chat = langchain.ChatOpenAI(**common, max_tokens=10)
    words = HELLO[0]["content"]
    reply = chat.invoke(words)
    assert reply.content == right and reply.usage_metadata["output_tokens"] == 10
    pieces = list(chat.stream(words))
    assert "".join(p.content for p in pieces) == right and len(pieces) > 5
    both = chat.batch([words, [("system", "Be brief."), ("user", words)]])
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert [r.content for r in both] == [right, greedy(oracle, "support", system, 10)]
    found = langchain.OpenAI(**common, max_tokens=8).invoke("In the beginning")
    assert found == greedy(oracle, "support", "In the beginning", 8)


# ---------------------------------------------------------------------------------------------- lm-evaluation-harness

def task_file(folder, name, rows, **more):
    """NAME.yaml for lm-eval, and its rows beside it. JSON is YAML too."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(json.dumps({
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")},
                                                                 "cache_dir": str(folder / "cache")},
        "test_split": "test", "doc_to_text": "{{context}}", "target_delimiter": "", **more}))


@pytest.fixture
def lm_eval(server, tmp_path, monkeypatch):
    """lm_eval(model, tasks, options): the results of the task files in tmp_path, and each task's samples in their order."""
    need("lm_eval")
    import lm_eval
    from lm_eval.tasks import TaskManager

    def run(model, tasks, more="tokenizer_backend=remote,num_concurrent=3"):
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        found = lm_eval.simple_evaluate(
            model="local-completions", tasks=tasks, log_samples=True, bootstrap_iters=0,
            model_args=f"base_url={server.url}/v1/completions,model={model},max_length=512,auth_token={KEY},{more}",
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
        return found["results"], {name: sorted(samples, key=lambda s: s["doc_id"]) for name, samples in
                                  found["samples"].items()}

    return run


@pytest.mark.parametrize("more", [
    "tokenizer_backend=remote,num_concurrent=3", "tokenizer_backend=remote,tokenized_requests=False,batch_size=4",
    f"tokenizer_backend=huggingface,tokenizer={NANO},batch_size=4"])
def test_lm_eval(more, lm_eval, oracle, tmp_path):
    encode, rows = oracle.tokenizer.encode, []
    for i, context in enumerate(("In the beginning", "The people of the United States", "And the king", "A new government")):
        likely = greedy(oracle, "support", context, 4)
        rows.append({"context": context, "choices": [likely, " of the house, and", " zebra \u00e9t\u00e9"], "label": i % 3,
                     "target": likely if i % 2 else "wrong"})
    task_file(tmp_path, "choices", rows, output_type="multiple_choice", doc_to_choice="{{choices}}",
              doc_to_target="{{label}}", metric_list=[{"metric": "acc"}])
    task_file(tmp_path, "replies", rows, output_type="generate_until", doc_to_target="{{target}}",
              generation_kwargs={"until": ["\n\n\n"], "max_gen_toks": 4, "temperature": 0},
              metric_list=[{"metric": "exact_match"}])
    task_file(tmp_path, "rolling", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{context}}",
              metric_list=[{"metric": "word_perplexity"}])
    results, samples = lm_eval("support", ["choices", "replies", "rolling"], more)
    n_right = 0
    for row, sample in zip(rows, samples["choices"], strict=True):
        n, wanted = len(encode(row["context"])), []
        for choice, (value, is_greedy) in zip(row["choices"], sample["filtered_resps"], strict=True):
            ids = encode(row["context"] + choice)
            wanted.append(likelihood(oracle, "support", ids[:n], ids[n:]))
            assert value == pytest.approx(wanted[-1][0], abs=1e-4) and is_greedy == wanted[-1][1]
        assert [is_greedy for _, is_greedy in wanted] == [True, False, False]
        n_right += max(range(3), key=lambda i: wanted[i][0]) == row["label"]
    assert results["choices"]["acc,none"] == n_right / 4
    assert results["replies"]["exact_match,none"] == 0.5
    for row, sample in zip(rows, samples["rolling"], strict=True):
        wanted = likelihood(oracle, "support", [oracle.tokenizer.eos_id], encode(row["context"]))[0]
        assert sample["filtered_resps"][0] == pytest.approx(wanted, abs=1e-4)


def test_the_losses_of_compare_are_those_of_lm_eval(lm_eval, oracle, tmp_path, monkeypatch):
    """lm-eval through the server, which batches as it likes; compare.py in batches of its own. The end token is a label."""
    rows = [json.loads(line) for line in (ROOT / "assets" / "support-heldout.jsonl").read_text().splitlines()[::12]]
    rows = [{"prompt": row["instruction"], "completion": " " + row["response"]} for row in rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "general.txt").write_text("Some other text.")
    no_picture(monkeypatch)
    compare.main(["--model", "gpt2-nano", *adapter_options(oracle), "--data", str(tmp_path / "data.jsonl"), "--general",
                  str(tmp_path / "general.txt"), "--out", str(tmp_path / "out"), "--device", "cpu"])
    examples = json.loads((tmp_path / "out" / "compare.json").read_text())["examples"]
    task_file(tmp_path, "one_choice", [{"context": row["prompt"], "choice": row["completion"] + oracle.tokenizer.eos}
                                       for row in rows],
              output_type="multiple_choice", doc_to_choice="{{[choice]}}", doc_to_target="0",
              metric_list=[{"metric": "acc"}])
    for name in MODELS:
        _, samples = lm_eval(name, ["one_choice"])
        for row, example, sample in zip(rows, examples, samples["one_choice"], strict=True):
            ((value, _),) = sample["filtered_resps"]
            n = len(oracle.tokenizer.encode(row["completion"])) + 1
            assert -value / n == pytest.approx(example["losses"][name], abs=1e-4)


# ---------------------------------------------------------------------------------------------- curl

@pytest.fixture
def curl(server, tmp_path):
    """curl(path, *options): (status, body)."""
    if not shutil.which("curl"):
        pytest.skip("curl is not on the PATH")

    def ask(path, *options, key=KEY):
        done = subprocess.run(["curl", "-sS", "-o", tmp_path / "body", "-w", "%{http_code}", "-H",
                               f"Authorization: Bearer {key}", *options, server.url + path], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return int(done.stdout), (tmp_path / "body").read_text()

    return ask


def test_curl_chat_and_stream(curl, oracle):
    """curl -d says application/x-www-form-urlencoded, or nothing: the body is JSON all the same."""
    body, right = dict(model="poems", messages=HELLO, temperature=0, max_tokens=9), greedy(oracle, "poems", HELLO, 9)
    for more in ([], ["-H", "Content-Type: application/json"], ["-H", "Content-Type:"]):
        status, answer = curl("/v1/chat/completions", "-d", json.dumps(body), *more)
        assert status == 200 and json.loads(answer)["choices"][0]["message"]["content"] == right
    status, answer = curl("/v1/chat/completions", "-N", "-d", json.dumps({**body, "stream": True}))
    *events, done, end = answer.split("\n\n")
    assert status == 200 and (done, end) == ("data: [DONE]", "") and len(events) > 5
    events = [json.loads(e.removeprefix("data: ")) for e in events if not e.startswith(":")]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == right


def ask(server, path, body=None):
    body = body and json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, body, {"Authorization": f"Bearer {KEY}"})
    return urllib.request.urlopen(request)


def test_a_body_that_is_too_large_gets_an_answer(curl, server, tmp_path):
    """Not a broken connection. Python's own client would see one: it reads nothing before it has sent everything."""
    with open(tmp_path / "zeros", "wb") as f:
        f.truncate(100 * 2**20)
    status, answer = curl("/v1/completions", "--data-binary", f"@{tmp_path / 'zeros'}")
    assert status == 413 and json.loads(answer)["error"]["code"] == "request_too_large"
    with pytest.raises(urllib.error.HTTPError, match="413"):
        ask(server, "/v1/completions", {"prompt": "x" * 40 * 2**20})


def test_curl_loads_and_unloads_an_adapter(curl, oracle):
    (oracle.folder / "later").mkdir(exist_ok=True)
    shutil.copytree(oracle.folder / "support", oracle.folder / "later" / "one", dirs_exist_ok=True)
    ask = json.dumps({"model": "one", "messages": HELLO, "temperature": 0, "max_tokens": 9})
    assert curl("/v1/chat/completions", "-d", ask)[0] == 404
    assert curl("/v1/load_lora_adapter", "-d", '{"lora_name": "one", "lora_path": "later/one"}')[0] == 200
    assert json.loads(curl("/v1/chat/completions", "-d", ask)[1])["choices"][0]["message"]["content"] == greedy(
        oracle, "support", HELLO, 9)
    assert curl("/v1/load_lora_adapter", "-d", '{"lora_name": "two", "lora_path": "../one"}')[0] == 403
    assert curl("/v1/unload_lora_adapter", "-d", '{"lora_name": "one"}')[0] == 200
    assert curl("/v1/chat/completions", "-d", ask)[0] == 404
    assert curl("/v1/models", key="")[0] == 401


# ---------------------------------------------------------------------------------------------- Prometheus

def test_prometheus_counts(server, oracle):
    parse = need("prometheus_client.parser").text_string_to_metric_families

    def read():
        with ask(server, "/metrics") as answer:
            families = list(parse(answer.read().decode()))
        assert all(f.type in ("counter", "gauge", "summary") and f.documentation for f in families)
        return collections.Counter({(s.name.removeprefix("bytewise_"), *s.labels.values()): s.value
                                    for f in families for s in f.samples})

    before = read()
    body = {"model": "support", "messages": HELLO, "max_tokens": 5, "n": 2, "logit_bias": NO_END}
    ask(server, "/v1/chat/completions", body).close()
    ask(server, "/v1/completions", {"prompt": "Hello", "max_tokens": 30, "temperature": 0, "stop": greedy(
        oracle, "gpt2-nano", "Hello", 3)}).close()
    with ask(server, "/v1/chat/completions", {**body, "n": 1, "max_tokens": 400, "stream": True}) as stream:
        stream.readline()
    for _ in range(100):  # the server sees within a forward or two that the client has gone
        after = read()
        if after["requests_total", "cancelled"] > before["requests_total", "cancelled"]:
            break
        time.sleep(0.05)
    new = {k: v - before[k] for k, v in after.items()}
    n, n_other = len(data.prompt_ids(HELLO, oracle.template, oracle.tokenizer)), len(oracle.tokenizer.encode("Hello"))
    ends = {k[1]: v for k, v in new.items() if k[0] == "requests_total" and v}
    assert ends == {"length": 2, "stop": 1, "cancelled": 1}
    assert new["prompt_tokens_total",] in (2 * n + n_other, 3 * n + n_other)  # the last one may have gone before its turn
    assert 13 <= new["generated_tokens_total",] < 400 and new["first_token_seconds_count",] in (3, 4)
    assert 0 < new["first_token_seconds_sum",] < 60 and new["forwards_total",] >= 8
    assert after["slots",] == 4 and after["adapters",] == 2 and after["requests_running",] == after["requests_waiting",] == 0
    cache = 4 * 512 * 2 * 4 * 256 * 4  # slots, positions, k and v, layers, width, bytes
    assert after["kv_cache_bytes",] == cache and after["resident_bytes",] > cache


# ---------------------------------------------------------------------------------------------- the page

@pytest.fixture
def page(browser, server):
    """The page, opened and with its key. At the end, nothing is in the browser's console."""
    failed, context = [], browser.new_context(viewport={"width": 1000, "height": 700})
    with contextlib.closing(context):
        page = context.new_page()
        page.set_default_timeout(10000)
        page.on("pageerror", lambda e: failed.append(str(e)))
        page.on("console", lambda m: failed.append(m.text) if m.type in ("error", "warning") else None)
        page.goto(server.url)
        test_page.expect(page.locator("#key")).to_be_focused()
        assert [x for x in failed if "401" not in x] == []  # the browser itself says that the models were refused
        failed.clear()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        test_page.expect(page.locator("#model option")).to_have_text(["gpt2-nano (base)", *MODELS[1:]])
        page.fill("#temperature", "0")
        yield page
        assert failed == []


def test_the_page_chats_with_an_adapter_and_stops(page, oracle):
    expect = test_page.expect
    page.select_option("#model", "support")
    page.fill("#max-tokens", "12")
    reply = test_page.reply_to(page, HELLO[0]["content"])
    assert reply.inner_text().split() == greedy(oracle, "support", HELLO, 12).split() + "Cut at the limit of tokens.".split()
    expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))
    page.click("#new")
    page.select_option("#model", "gpt2-nano")
    page.fill("#max-tokens", "490")
    test_page.say(page, HELLO[0]["content"])  # it has no end: "And the Lord, and the Lord, and the Lord,"
    expect(page.locator(".words")).to_contain_text("Lord")
    page.click("#stop")
    expect(page.locator(".words")).to_contain_text("Stopped.")
    part = page.locator(".words").inner_text()
    assert len(part) < len(greedy(oracle, "gpt2-nano", HELLO, 490))
    expect(page.locator("#requests")).to_have_text("0 running, 0 waiting")


def test_the_page_keeps_a_blind_vote(page, server, oracle):
    expect = test_page.expect
    page.fill("#max-tokens", "12")
    page.check("#blind")
    page.select_option("#model", "support")
    page.select_option("#other", "poems")
    test_page.say(page, HELLO[0]["content"])
    with page.expect_response("**/votes"):  # the page shows the names before the server has the vote
        page.get_by_role("button", name="Reply 2", exact=True).click()
    heads = page.locator(".exchange h3")
    expect(heads).to_have_text([re.compile("Reply 1: "), re.compile("Reply 2: ")])
    second = heads.nth(1).inner_text().removeprefix("Reply 2: ")
    (row,) = [json.loads(line) for line in server.votes.read_text().splitlines()]
    assert {row["a"], row["b"]} == {"support", "poems"} and row["prompt"] == HELLO[0]["content"]
    assert row[row["vote"]] == second
    assert row["replies"] == {letter: greedy(oracle, row[letter], HELLO, 12) for letter in "ab"}
