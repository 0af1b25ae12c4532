"""The server's page: what its source must not hold, and the page itself in headless Chromium, against a stub of the server.

The stub answers on 127.0.0.1 with what a test puts into it, piece by piece, so a test sees a reply that is half there.
"""
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

SOURCE = (ROOT / "serving" / "page.html").read_text(encoding="utf-8")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
METRICS = """# TYPE bytewise_resident_bytes gauge
bytewise_resident_bytes 512000000
bytewise_kv_cache_bytes 7000000
bytewise_requests_running 1
bytewise_requests_waiting 0
bytewise_generated_tokens_total 42
"""


# ---------------------------------------------------------------------------------------------- the source

def test_nothing_comes_from_another_address():
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?\s*(?:https?:)?//""", SOURCE)
    assert not re.search(r"url\(|@import|\bimport\b\s*[({\"']", SOURCE)
    assert re.findall(r"<(?:link|script|img|iframe)\b[^>]*?(?:src|href)=\"(\w+:?)", SOURCE) == ["data:"]  # the icon


def test_text_never_becomes_html_or_code():
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc",
                 "DOMParser", "createContextualFragment", "setHTMLUnsafe"):
        assert word not in SOURCE, word


def test_the_policy_forbids_all_but_this_server():
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', SOURCE)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {"default-src": "'none'", "style-src": "'unsafe-inline'", "script-src": "'unsafe-inline'",
                     "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}


# ---------------------------------------------------------------------------------------------- a server to talk to

class Stub:
    """answers: what the next requests get, in order: a list of pieces of text; a pair (status, error's message); or "drop",
    for a stream that breaks off. Without one, a reply says the model's name. A threading.Event among the pieces: wait for
    it. A dict among them is sent as it is.
    """

    def __init__(self):
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                stub.get(self)

            def do_POST(self):
                stub.post(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.reset()

    def reset(self):
        self.asked, self.votes, self.paths, self.answers = [], [], [], []
        self.models, self.votes_on, self.votes_fail, self.key = ["gpt2-nano", "support", "poet"], True, False, None
        self.left = threading.Event()  # a client has gone away in the middle of a stream

    def send(self, h, status, body=b"", kind="application/json", **headers):
        h.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
            h.send_header(name.replace("_", "-"), str(value))
        h.end_headers()
        h.wfile.write(body)

    def refuse(self, h, status, message, **headers):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.send(h, status, json.dumps({"error": error}).encode(), **headers)

    def forbidden(self, h):
        if self.key and h.headers["Authorization"] != f"Bearer {self.key}":
            self.refuse(h, 401, "no key")
            return True

    def get(self, h):
        self.paths.append(h.path)
        if h.path == "/":
            self.send(h, 200, SOURCE.encode(), "text/html; charset=utf-8")
        elif self.forbidden(h):
            pass
        elif h.path == "/v1/models":
            rows = [{"id": m, "object": "model", "root": m, "parent": self.models[0] if i else None}
                    for i, m in enumerate(self.models)]
            self.send(h, 200, json.dumps({"object": "list", "data": rows}).encode())
        elif h.path == "/votes":
            self.send(h, 200, json.dumps({"on": self.votes_on}).encode())
        elif h.path == "/metrics":
            self.send(h, 200, METRICS.encode(), "text/plain")
        else:
            self.refuse(h, 404, f"nothing is at {h.path}")

    def post(self, h, body):
        if self.forbidden(h):
            return
        if h.path == "/votes":
            if self.votes_fail:
                return self.refuse(h, 500, "the disk is full")
            self.votes.append(body)
            return self.send(h, 204)
        self.asked.append(body)
        answer = self.answers.pop(0) if self.answers else [f"I am {body['model']}."]
        if isinstance(answer, tuple):
            return self.refuse(h, *answer, **({"Retry_After": 3} if answer[0] == 429 else {}))
        try:
            self.stream(h, answer)
        except OSError:
            self.left.set()

    def stream(self, h, pieces):
        h.send_response(200)
        h.send_header("Content-Type", "text/event-stream")
        h.end_headers()
        h.wfile.write(b": keep-alive\n\n")
        for piece in pieces:
            if isinstance(piece, threading.Event):
                while not piece.wait(0.05):
                    h.wfile.write(b": keep-alive\n\n")  # raises when the client has gone away
                continue
            if piece == "drop":
                return
            whole = piece if isinstance(piece, dict) else {"choices": [{"delta": {"content": piece}, "finish_reason": None}]}
            event = f"data: {json.dumps(whole, ensure_ascii=False)}\n\n".encode()
            cut = next((i + 1 for i, byte in enumerate(event) if byte > 127), len(event) // 2)
            h.wfile.write(event[:cut])  # an event, even a character, may come in two pieces
            time.sleep(0.05 if event[cut - 1] > 127 else 0)
            h.wfile.write(event[cut:])
        usage = {"prompt_tokens": 3, "completion_tokens": 21, "total_tokens": 24}
        for last in ({"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage}):
            h.wfile.write(f"data: {json.dumps(last)}\n\n".encode())
        h.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def browser():
    if sync_playwright is None:
        pytest.skip("playwright is not installed: pip install -r requirements-clients.txt")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome is on the PATH")
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server():
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


@pytest.fixture
def stub(server):
    server.reset()
    return server


@pytest.fixture
def visit(browser, stub):
    """visit(script="", **options of a context): the page, opened. At the end no script has failed, nothing was blocked."""
    contexts, failed = [], []

    def enter(script="", **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1000, "height": 700}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda e: failed.append(str(e)))
        page.on("console", lambda m: failed.append(m.text) if m.type in ("error", "warning") else None)
        page.on("request", lambda r: None if r.url.startswith((stub.url, "data:")) else failed.append(r.url))
        if script:
            page.add_init_script(script)
        page.goto(stub.url)
        if not stub.key:
            expect(page.locator("#model option")).to_have_count(len(stub.models))
        return page

    yield enter
    for context in contexts:
        context.close()
    # Chromium itself writes a line for each answer that is not 2xx and each broken stream. Those are wanted.
    assert [x for x in failed if "Failed to load resource" not in x] == []


def say(page, words):
    page.fill("#prompt", words)
    page.press("#prompt", "Enter")


def reply_to(page, words):
    """Say it; return the finished reply's element."""
    n = page.locator(".reply").count()
    say(page, words)
    reply = page.locator(".reply").nth(n)
    expect(reply).to_have_attribute("aria-busy", "false")
    return reply.locator(".words")


# ---------------------------------------------------------------------------------------------- chat

@pytest.mark.clients
def test_a_reply_appears_while_it_is_made(visit, stub):
    go = threading.Event()
    stub.answers = [["The sky ", "is ", go, "blüe."]]
    page = visit()
    say(page, "Hello")
    words = page.locator(".reply .words")
    expect(words).to_have_text("The sky is")
    assert page.locator("#announcer").text_content() == ""  # a screen reader hears the finished reply, once
    expect(page.locator("#send")).to_be_hidden()
    go.set()
    expect(words).to_have_text("The sky is blüe.")
    expect(page.locator("#announcer")).to_have_text("gpt2-nano: The sky is blüe.")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))
    expect(page.locator("#memory")).to_have_text("512 MB (KV cache 7 MB)")
    expect(page.locator("#requests")).to_have_text("1 running, 0 waiting")
    asked = stub.asked[0]
    assert asked["stream"] is True and asked["stream_options"] == {"include_usage": True}
    assert "/favicon.ico" not in stub.paths


@pytest.mark.clients
def test_the_exact_number_of_tokens_gives_the_speed(visit, stub):
    """20 tokens after the first, in the time that the page's clock says: 2 seconds."""
    page = visit("let now = 0; performance.now = () => (now += 1000);")
    stub.answers = [["two", " pieces"]]  # calls of the clock: 1 (first), 2 (last) for one; 3 (last) for the other
    reply_to(page, "Hello")
    expect(page.locator("#speed")).to_have_text("10.0 tokens/s")


@pytest.mark.clients
def test_html_and_javascript_of_a_reply_are_text(visit, stub):
    bad = ["<img src=x onerror=\"document.title='run'\">", "<script>document.title='run'</script>",
           "[here](javascript:document.title='run')", "<a href=\"javascript:document.title='run'\">x</a>",
           "[d](data:text/html,<script>document.title='run'</script>)", "![i](https://example.com/pixel.png)",
           "<svg onload=\"document.title='run'\">", "`<b>x</b>`", "[q](https://example.com/\"onclick=\"document.title='run')"]
    stub.answers = [["\n\n".join(bad)], ["ok"]]
    page = visit()
    words = reply_to(page, "<img src=x onerror=\"document.title='run'\">")
    for text in bad[:4] + [bad[6]]:
        expect(words).to_contain_text(text)
    for node in page.locator("a").all():
        assert node.get_attribute("href").startswith("https://example.com/") and not node.get_attribute("onclick")
        assert node.get_attribute("rel").startswith("noopener")
    assert page.locator("#conversation :is(img, script, svg, iframe)").count() == 0
    expect(page.locator(".prompt")).to_have_text(stub.asked[0]["messages"][0]["content"])
    assert page.title() == "Bytewise" and words.locator("a").count() == 2


MARKDOWN = """# Title

Some **bold**, *italic*, ***both***, `a*b*c` and snake_case_word, 2 * 3 * 4, \\*star\\*.
Second line: see https://example.com/a_(b). Or [this](https://example.com/x).

1. one
2. two
   - inner **x**

   still two
3. three

> quoted
> - point

| name | n |
|------|--:|
| a    | 1 |

```python
if a < b:  # **not bold**

    print("<i>")
```
---
end"""


@pytest.mark.clients
def test_markdown(visit, stub):
    page = visit()
    stub.answers = [[MARKDOWN[i:i + 7] for i in range(0, len(MARKDOWN), 7)]]
    words = reply_to(page, "Show")
    assert words.locator("h4").inner_text() == "Title"
    paragraph = words.locator("p").first
    assert paragraph.locator("strong").all_inner_texts() == ["bold", "both"]
    assert paragraph.locator("em").all_inner_texts() == ["italic", "both"]
    assert paragraph.locator("code").all_inner_texts() == ["a*b*c"]
    assert paragraph.locator("a").evaluate_all("xs => xs.map(x => [x.textContent, x.getAttribute('href')])") == [
        ["https://example.com/a_(b)", "https://example.com/a_(b)"], ["this", "https://example.com/x"]]
    assert "snake_case_word, 2 * 3 * 4, *star*.\nSecond line" in paragraph.inner_text()
    items = words.locator("> ol > li")
    assert items.count() == 3 and items.nth(1).locator("ul > li strong").inner_text() == "x"
    assert items.nth(1).locator("> p").all_inner_texts() == ["two", "still two"]
    assert words.locator("blockquote li").inner_text() == "point"
    assert words.locator("th").all_inner_texts() == ["name", "n"] and words.locator("td").all_inner_texts() == ["a", "1"]
    assert words.locator("pre").text_content() == 'if a < b:  # **not bold**\n\n    print("<i>")'
    assert words.locator("hr").count() == 1 and words.locator("> p").last.inner_text() == "end"


@pytest.mark.clients
def test_marks_without_end_take_no_time(visit):
    page = visit()
    texts = ["*a " * 30000, "`" * 9000, "[" * 9000, "> " * 5000 + "x", "_" * 9000, "**a" * 5000, "- " * 5000, "|-" * 9000,
             "1. x\n" * 3000, "https://a(" * 2000, "[a](https://" * 2000, "\\" * 9000, "# " * 9000, "|a|\n|-|\n" * 2000]
    times = page.evaluate("""texts => texts.map((text) => {
        const start = performance.now(); markdown(text); return performance.now() - start; })""", texts)
    assert max(times) < 500, dict(zip([t[:8] for t in texts], times))


@pytest.mark.clients
def test_stop_ends_the_request_and_keeps_the_part(visit, stub):
    never = threading.Event()
    stub.answers = [["A part", never]]
    page = visit()
    say(page, "Hello")
    expect(page.locator(".words")).to_contain_text("A part")
    page.click("#stop")
    assert stub.left.wait(3), "the server does not see that the client has gone"
    expect(page.locator(".words")).to_contain_text("Stopped.")
    reply_to(page, "More")
    assert stub.asked[1]["messages"] == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "A part"},
                                         {"role": "user", "content": "More"}]


@pytest.mark.clients
def test_a_short_or_empty_reply_says_why(visit, stub):
    page = visit()
    stub.answers = [[], ["Once upon", {"choices": [{"delta": {}, "finish_reason": "length"}]}]]
    assert reply_to(page, "Hello").inner_text() == "The reply is empty."
    assert reply_to(page, "Hello").inner_text().split("\n")[-1] == "Cut at the limit of tokens."


@pytest.mark.clients
def test_turns_settings_and_regenerate(visit, stub):
    page = visit()
    stub.answers = [["First."], ["Second."], ["Third."]]
    reply_to(page, "One")
    page.fill("#temperature", "1.3")
    page.fill("#max-tokens", "9")
    page.select_option("#model", "support")
    reply_to(page, "Two")
    buttons = page.get_by_role("button", name="Regenerate")
    expect(buttons).to_have_count(1)  # of the last reply only
    buttons.click()
    expect(page.locator(".words").nth(1)).to_have_text("Third.")
    one, two, again = stub.asked
    assert one["temperature"] == 0.7 and one["model"] == "gpt2-nano"
    assert two["temperature"] == 1.3 and two["max_tokens"] == 9 and two["model"] == "support"
    assert [m["content"] for m in two["messages"]] == ["One", "First.", "Two"]
    assert again["messages"] == two["messages"] and again["seed"] != two["seed"]
    page.fill("#temperature", "")
    page.click("#new")
    expect(page.locator(".exchange")).to_have_count(0)
    reply_to(page, "Three")
    assert [m["content"] for m in stub.asked[3]["messages"]] == ["Three"] and "temperature" not in stub.asked[3]
    assert page.locator("#model").input_value() == "support"


@pytest.mark.clients
def test_a_new_chat_ends_the_reply_that_is_made(visit, stub):
    stub.answers = [["A part", threading.Event()]]
    page = visit()
    say(page, "Hello")
    expect(page.locator(".words")).to_contain_text("A part")
    page.click("#new")
    assert stub.left.wait(3) and page.locator("#announcer").text_content() == ""
    assert reply_to(page, "Again").inner_text() == "I am gpt2-nano."
    assert len(stub.asked[1]["messages"]) == 1 and page.locator(".error").count() == 0


# ---------------------------------------------------------------------------------------------- errors

@pytest.mark.clients
@pytest.mark.parametrize("answer, words", [
    ((400, "temperature is 9: give 0 to 2"), "temperature is 9: give 0 to 2"),
    ((429, "The queue is full."), "The queue is full. Try again in 3 s."),
    (["A part", "drop"], "The connection to the server broke: is serve.py still running?"),
    (["A part", {"error": {"message": "the deadline has passed", "type": "server_error", "code": None}}],
     "the deadline has passed")])
def test_an_error_is_one_sentence_with_a_way_on(visit, stub, answer, words):
    stub.answers = [answer, ["Now it works."]]
    page = visit()
    say(page, "Hello")
    expect(page.get_by_role("alert").locator("p")).to_have_text(words)
    if isinstance(answer, list):
        expect(page.locator(".words")).to_have_text("A part")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".words")).to_have_text("Now it works.")
    assert page.get_by_role("alert").count() == 0 and stub.asked[0]["messages"] == stub.asked[1]["messages"]


@pytest.mark.clients
def test_a_message_without_a_reply_is_not_sent_again(visit, stub):
    stub.answers = [(400, "no"), ["Yes."]]
    page = visit()
    say(page, "Lost")
    expect(page.get_by_role("alert")).to_be_visible()
    reply_to(page, "Kept")
    assert [m["content"] for m in stub.asked[1]["messages"]] == ["Kept"]


@pytest.mark.clients
def test_a_key_is_asked_for_and_kept_in_memory(visit, stub):
    stub.key = "secret"
    page = visit()
    expect(page.get_by_role("alert").locator("p")).to_have_text(
        "This server needs an API key: enter it at the top of the page.")
    expect(page.locator("#key")).to_be_focused()
    page.evaluate("poll()")  # without a key, it does not ask each two seconds for a refusal
    assert "/metrics" not in stub.paths
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_count(1)
    page.fill("#key", "secret")
    page.click("#use-key")
    expect(page.locator("#model option")).to_have_count(3)
    expect(page.get_by_role("alert")).to_have_count(0)
    assert reply_to(page, "Hello").inner_text() == "I am gpt2-nano."
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


# ---------------------------------------------------------------------------------------------- blind A/B

def compare(page, words="Who are you?"):
    page.check("#blind")
    page.select_option("#model", "gpt2-nano")
    page.select_option("#other", "poet")
    say(page, words)


@pytest.mark.clients
@pytest.mark.parametrize("coin, names", [(0.2, ["gpt2-nano", "poet"]), (0.8, ["poet", "gpt2-nano"])])
def test_a_blind_vote_names_the_right_model(visit, stub, coin, names):
    page = visit(f"Math.random = () => {coin};")
    letter = {"gpt2-nano": "a", "poet": "b"}
    for choice, right in (("Reply 1", letter[names[0]]), ("Reply 2", letter[names[1]]), ("Tie", "tie")):
        go = threading.Event()
        stub.answers = [["This ", go, "one."], ["That ", go, "one."]]
        compare(page)
        exchange, conversation = page.locator(".exchange").last, page.locator("#conversation")
        button, words = exchange.get_by_role("button", name=choice, exact=True), exchange.locator(".words")
        expect(words).to_have_text([re.compile("This|That")] * 2)
        expect(button).to_have_count(0)  # no vote on half a reply
        go.set()
        expect(button).to_be_visible()
        for place in (exchange, page.locator("#announcer")):
            assert not re.search("gpt2-nano|poet", place.inner_html())
        said = dict(zip(names, words.all_inner_texts()))
        with page.expect_response("**/votes"):
            button.click()
        expect(exchange.locator("h3")).to_have_text([f"Reply {i + 1}: {name}" for i, name in enumerate(names)])
        expect(button).to_have_count(0)
        expect(exchange.locator(".foot p").last).to_be_focused()
        assert stub.votes[-1] == {"prompt": "Who are you?", "a": "gpt2-nano", "b": "poet", "vote": right,
                                  "replies": {"a": said["gpt2-nano"], "b": said["poet"]}}
    assert len(stub.votes) == 3 and conversation.locator(".error").count() == 0
    assert sorted(body["model"] for body in stub.asked) == ["gpt2-nano"] * 3 + ["poet"] * 3


@pytest.mark.clients
def test_a_vote_that_was_not_kept_can_be_sent_again(visit, stub):
    page = visit()
    stub.votes_fail = True
    compare(page)
    page.get_by_role("button", name="Tie").click()
    expect(page.get_by_role("alert").locator("p")).to_have_text("the disk is full")
    stub.votes_fail = False
    with page.expect_response("**/votes"):
        page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    assert len(stub.votes) == 1


@pytest.mark.clients
def test_a_comparison_has_no_history_and_leaves_none(visit, stub):
    page = visit()
    reply_to(page, "One")
    compare(page, "Two")
    page.get_by_role("button", name="Tie").click()
    page.uncheck("#blind")
    reply_to(page, "Three")
    assert [[m["content"] for m in body["messages"]] for body in stub.asked] == [
        ["One"], ["Two"], ["Two"], ["One", "I am gpt2-nano.", "Three"]]


@pytest.mark.clients
def test_a_comparison_needs_two_models_and_both_replies(visit, stub):
    page = visit()
    page.check("#blind")
    assert page.locator("#model").input_value() != page.locator("#other").input_value()
    stub.answers = [["Fine.", threading.Event()], (400, "no")]
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.get_by_role("button", name="Tie").count() == 0 and stub.left.wait(3)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("button", name="Tie")).to_be_visible()
    stub.models = ["gpt2-nano"]
    page.click("#new")
    expect(page.locator("#hint")).to_have_text("A comparison needs two models: start serve.py with --adapter NAME=DIR.")
    say(page, "Hello")
    assert page.locator(".exchange").count() == 0


@pytest.mark.clients
def test_without_votes_the_names_are_shown_on_request(visit, stub):
    stub.votes_on = False
    page = visit()
    compare(page)
    expect(page.locator(".foot p")).to_contain_text("start serve.py with --votes FILE")
    assert page.get_by_role("button", name="Tie").count() == 0
    page.get_by_role("button", name="Show the names").click()
    assert sorted(x.split(": ")[1] for x in page.locator(".reply h3").all_inner_texts()) == ["gpt2-nano", "poet"]
    assert stub.votes == []


# ---------------------------------------------------------------------------------------------- speech

NO_SPEECH = """
for (const name of ["speechSynthesis", "SpeechSynthesisUtterance", "SpeechRecognition", "webkitSpeechRecognition"])
  Object.defineProperty(window, name, {value: undefined});
"""
SPEECH = """
window.said = [];
window.SpeechSynthesisUtterance = class { constructor(text) { this.text = text; } };
Object.defineProperty(window, "speechSynthesis", {value: {speak: (x) => said.push(x), cancel: () => said.push("cancel")}});
window.SpeechRecognition = undefined;
window.webkitSpeechRecognition = class {
  constructor() { window.listener = this; }
  start() { this.onstart(); }
  stop() { this.onend(); }
  hear(text, isFinal) { this.onresult({resultIndex: 0, results: [Object.assign([{transcript: text}], {isFinal})]}); }
};
"""


@pytest.mark.clients
def test_no_speech_where_the_browser_has_none(visit):
    page = visit(NO_SPEECH)
    reply_to(page, "Hello")
    assert page.get_by_role("button", name="Read aloud").count() == 0
    expect(page.locator("#dictate")).to_be_hidden()


@pytest.mark.clients
def test_a_reply_is_read_aloud(visit, stub):
    stub.answers = [["# Title\n\nSome **bold** words."]]
    page = visit(SPEECH)
    reply_to(page, "Hello")
    page.get_by_role("button", name="Read aloud").click()
    assert page.evaluate("said.map(x => x.text)") == ["Title", "Some bold words."]  # without the marks
    page.evaluate("said[1].onend()")
    page.get_by_role("button", name="Read aloud").click()
    page.get_by_role("button", name="Stop reading").click()
    assert page.evaluate("said.at(-1)") == "cancel"
    expect(page.get_by_role("button", name="Read aloud")).to_be_visible()


@pytest.mark.clients
def test_dictation_adds_to_the_message(visit):
    page = visit(SPEECH)
    page.fill("#prompt", "Tell me")
    page.click("#dictate")
    expect(page.locator("#dictate")).to_have_attribute("aria-pressed", "true")
    page.evaluate("listener.hear('a sto', false); listener.hear(' a story ', true)")
    assert page.locator("#prompt").input_value() == "Tell me a story"
    page.click("#dictate")
    expect(page.locator("#dictate")).to_have_attribute("aria-pressed", "false")
    page.evaluate("listener.onerror({error: 'not-allowed'})")
    expect(page.locator("#hint")).to_have_text("The browser could not listen: not-allowed.")


# ---------------------------------------------------------------------------------------------- for everybody

@pytest.mark.clients
def test_the_keyboard_is_enough(visit, stub):
    stub.answers = [["Part", threading.Event()], ["Whole."]]
    page = visit()
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".words")).to_have_text("Part")
    page.keyboard.press("Escape")
    assert stub.left.wait(3) and stub.asked[0]["messages"][0]["content"] == "one\ntwo"
    regenerate = page.get_by_role("button", name="Regenerate")
    expect(regenerate).to_be_visible()
    for _ in range(6):
        page.keyboard.press("Shift+Tab")
        if regenerate.evaluate("x => x === document.activeElement"):
            break
    assert regenerate.evaluate("x => getComputedStyle(x).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator(".words")).to_have_text("Whole.")
    assert page.evaluate("document.activeElement.id") == "send"  # it came where Stop was, which came where Regenerate was


@pytest.mark.clients
def test_every_control_has_a_name_and_replies_are_not_live(visit):
    page = visit()
    page.check("#blind")
    reply_to(page, "Hello")
    nameless = page.evaluate("""[...document.querySelectorAll("button, select, input, textarea")].filter((x) => !(
        x.getAttribute("aria-label") || (x.labels?.[0] ?? x).textContent.trim())).map((x) => x.outerHTML)""")
    assert nameless == []
    assert page.locator("#conversation, .reply, .words").evaluate_all("xs => xs.every(x => !x.ariaLive)")
    assert page.locator("[aria-live=polite]").evaluate_all("xs => xs.map(x => x.id)") == ["announcer"]


@pytest.mark.clients
def test_a_phone_has_no_horizontal_scrolling(visit, stub):
    stub.answers = [["x" * 400 + "\n\n```\n" + "y" * 400 + "\n```\n|" + "wide column|" * 20 + "\n|" + "-|" * 20]] * 3
    stub.models[2] = "poet" * 20
    page = visit(SPEECH, viewport={"width": 360, "height": 640})
    reply_to(page, "z" * 300)
    page.check("#blind")
    reply_to(page, "z" * 300)
    stub.answers = [(400, "e" * 300)]
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    left, right = page.locator(".blind .reply").nth(0).bounding_box(), page.locator(".blind .reply").nth(1).bounding_box()
    assert right["y"] >= left["y"] + left["height"]  # one below the other
    assert page.locator(".composer").bounding_box()["height"] < 640 / 2


CONTRASTS = """() => {  // WCAG 2.2, "contrast ratio" and "relative luminance"
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => {
    const [r, g, b] = numbers(colour).map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return numbers(colour)[3] === 0 ? behind(node.parentElement) : colour;
  };
  const hasText = (node) => node.matches("input, select, textarea")
    || [...node.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim());
  return [...document.body.querySelectorAll("*")]
    .filter((node) => hasText(node) && node.checkVisibility() && !node.closest(".unseen, script, noscript"))
    .map((node) => {
      const [a, b] = [luminance(getComputedStyle(node).color), luminance(behind(node))];
      return [`${node.tagName} ${node.className}`, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
}"""


@pytest.mark.clients
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, stub, scheme):
    stub.answers = [[MARKDOWN], ["Part", "drop"]]
    page = visit(SPEECH, color_scheme=scheme, reduced_motion="reduce")
    reply_to(page, "Hello")
    page.click("#dictate")
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_be_visible()
    compare(page)
    expect(page.get_by_role("button", name="Tie")).to_be_visible()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 50 and {"A", "CODE", "TD", "BUTTON"} <= {name.split()[0] for name, _ in found}
    assert [x for x in found if x[1] < 4.5] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    assert dark == (scheme == "dark")


@pytest.mark.clients
@pytest.mark.parametrize("wish, animation", [("reduce", "none"), ("no-preference", "wait")])
def test_nothing_moves_for_who_does_not_want_it(visit, stub, wish, animation):
    stub.answers = [[threading.Event()]]
    page = visit(reduced_motion=wish)
    say(page, "Hello")
    moved = page.locator(".words").evaluate("x => getComputedStyle(x, '::after').animationName")
    page.click("#stop")
    assert moved == animation
