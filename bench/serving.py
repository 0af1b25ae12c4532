"""The server's speed beside transformers' generate, on the same weights, prompts and number of tokens, in float32.

    python -m bench serving --model DIR            writes docs/bench/serving.md and .json

    one stream           one client, one reply; transformers: one row
    8 clients            eight replies at the same time; transformers: a batch of eight rows of one length, its best case
    one after the other  the same eight replies, each begun when the last has ended: eight times one stream
    first token          of a prompt of 300 words while four others stream, beside the forward of this prompt alone

A shared machine is faster in one second than in the next. So all jobs alternate, each 6 times; their mean times are one turn
of --repeat. A speed is the median of the turns, and a ratio the median of the ratios within a turn. The text is the same:
the greedy tokens of both programs are compared too.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import torch

import data
import generate
from errors import UserError
from files import weights, writing
from techniques.kv_cache import KVCache

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The history of the town begins with a river, a mill and three families who came from the north."
WORDS = "the old mill by the river was sold to a family from the north who kept bees and wrote about the weather".split()
LONG = " ".join(WORDS[i % len(WORDS)] for i in range(300))
TIMES = 6  # that each job runs in a turn


class Client:
    """Speaks to a serve.py of its own, which ends with the `with` block."""

    def __init__(self, model: str):
        self.process = subprocess.Popen([sys.executable, str(ROOT / "serve.py"), "--model", model, "--bits", "32", "--port",
                                         "0", "--max-length", "1024", "--device", "cpu"], stdout=subprocess.PIPE, text=True)
        lines = iter(self.process.stdout.readline, "")
        self.url = next((m[0] for line in lines if (m := re.search(r"http://\S+?:\d+", line))), None)
        if self.url is None:
            raise UserError("serve.py did not start; its lines above say why")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def complete(self, prompt: str, n: int, banned: list[int], on_part=lambda: None, **more) -> list[str]:
        """The pieces of a streamed reply of n tokens."""
        body = {"prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True,
                "logit_bias": dict.fromkeys(banned, -100), **more}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode())
        parts = []
        with urllib.request.urlopen(request) as answer:
            while part := answer.read1(65536):  # it is parsed later: client and server share the two cores
                on_part()
                parts.append(part)
        lines = b"".join(parts).split(b"\n")
        return [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith(b"data: {")]

    def together(self, prompts: list[str], n: int, banned: list[int]) -> float:
        """The seconds that all of them take."""
        threads = [threading.Thread(target=self.complete, args=(p, n, banned)) for p in prompts]
        start = time.perf_counter()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return time.perf_counter() - start


def seconds(job, *args) -> float:
    start = time.perf_counter()
    job(*args)
    return time.perf_counter() - start


def first_token(client: Client, banned: list[int]) -> float:
    """Seconds until the first token of the long prompt, while four others stream."""
    ready = threading.Semaphore(0)
    others = [threading.Thread(target=client.complete, args=(PROMPT, 120, banned, ready.release)) for _ in range(4)]
    for t in others:
        t.start()
    for _ in range(8):  # each of them has some tokens
        ready.acquire()
    start, seen = time.perf_counter(), []
    client.complete(LONG, 2, banned, lambda: seen.append(time.perf_counter()))
    for t in others:
        t.join()
    return seen[0] - start


def rows(model: str, n: int, repeat: int) -> list[dict]:
    """One dict for each turn: seconds of each job. Raises UserError."""
    import transformers
    transformers.logging.set_verbosity_error()
    folder = weights.find(model)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = data.load_tokenizer(model)
    ours, banned = weights.load(model).eval(), sorted(tokenizer.stop_ids)
    ids, long_ids = tokenizer.encode(PROMPT), tokenizer.encode(LONG)

    def theirs(rows: int) -> list[int]:
        given = torch.tensor([ids] * rows)
        found = peer.generate(given, attention_mask=torch.ones_like(given), min_new_tokens=n, max_new_tokens=n,
                              do_sample=False, pad_token_id=0)
        return found[0, len(ids):].tolist()

    def bare():
        generate.step(ours, KVCache(ours.config, len(long_ids), 1), [0], [long_ids])

    found = []
    with Client(model) as client:
        if "".join(client.complete(PROMPT, n, banned)) != tokenizer.decode(theirs(1)):
            print("note: the greedy texts differ", file=sys.stderr)
        jobs = {"transformers, one row": lambda: seconds(theirs, 1),
                "one stream": lambda: client.together([PROMPT], n, banned),
                "8 clients": lambda: client.together([PROMPT] * 8, n, banned),
                "transformers, batch of 8": lambda: seconds(theirs, 8),
                "forward of the long prompt": lambda: seconds(bare),
                "first token beside 4 streams": lambda: first_token(client, banned)}
        for turn in range(repeat):
            row = dict.fromkeys(jobs, 0)
            for name, job in [*jobs.items()] * TIMES:
                row[name] += job() / TIMES
            found.append(row)
            print(f"turn {turn + 1}/{repeat}: " + ", ".join(f"{k} {v:.2f} s" for k, v in row.items()), flush=True)
    return found


def table(found: list[dict], n: int) -> str:
    def median(name):
        return statistics.median(row[name] for row in found)

    def ratio(a, b):
        return statistics.median(row[a] / row[b] for row in found)
    batch = 8 * n / median("transformers, batch of 8")
    lines = ["| tokens/s | here | transformers' generate | ratio |", "|---|---|---|---|",
             f"| one stream | {n / median('one stream'):.1f} | {n / median('transformers, one row'):.1f} | "
             f"{ratio('transformers, one row', 'one stream'):.2f} |",
             f"| 8 clients; a batch of 8 | {8 * n / median('8 clients'):.1f} | {batch:.1f} | "
             f"{ratio('transformers, batch of 8', '8 clients'):.2f} |", "",
             f"8 clients together are {8 * ratio('one stream', '8 clients'):.2f} times as fast as one after the other. "
             f"The first token of a prompt of 300 words comes after {median('first token beside 4 streams'):.2f} s while 4 "
             f"others stream; the forward of this prompt alone takes {median('forward of the long prompt'):.2f} s (ratio "
             f"{ratio('first token beside 4 streams', 'forward of the long prompt'):.2f})."]
    return "\n".join(lines)


def main(argv: list[str], about: dict, command: str) -> bool:
    p = argparse.ArgumentParser(prog="python -m bench serving", description=__doc__.split("\n")[0])
    p.add_argument("--model", default="gpt2-nano", help="as in serve.py (default: %(default)s)")
    p.add_argument("--tokens", type=int, default=64, help="tokens of each reply (default: %(default)s)")
    p.add_argument("--repeat", type=int, default=5, help="turns (default: %(default)s)")
    p.add_argument("--out", default=str(ROOT / "docs" / "bench"), help="folder of the table")
    a = p.parse_args(argv)
    found = rows(a.model, a.tokens, a.repeat)
    text, record = table(found, a.tokens), {"about": about, "command": command, "turns": found}
    print(text)
    writing.write_text(Path(a.out) / "serving.json", json.dumps(record, indent=1))
    writing.write_text(Path(a.out) / "serving.md",
                       f"# The server beside transformers\n\n`{command}`, {about['machine']}\n\n{text}\n")
    return True
