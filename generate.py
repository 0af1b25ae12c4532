"""Let a model reply: to one prompt, in a chat, or to a file of prompts.

    python generate.py --model M [--adapter DIR] --prompt TEXT          one reply
    python generate.py --model M                                        a chat: each line of input is a turn, /new forgets
    python generate.py --model M --prompts in.jsonl --out out.jsonl     a reply to each row of a file

Several LoRA adapters share one model with --adapter a=DIR --adapter b=DIR. Then each of them answers --prompt. A row of
--prompts names its own ("adapter": "a"; without it, the base model answers). In a chat, /adapter b changes it. Rows with
different adapters share their forwards too (methods/several.py).

`run` is the loop behind all three: a forward for each token, with a KV cache (techniques/kv_cache.py) and a choice of the
next token (techniques/sampling.py). A forward reads every weight once, for one reply or for eight, so eight replies that
share their forwards cost little more than one. When a reply ends, the next one takes its place.

A reply is the same alone and in a batch: its row sees no other row, and it draws from a random generator of its own. Only
rounding differs, because a product of eight rows may sum in another order than that of one row. In float32 the logits
differ by about 1e-5. With --bits 16, 8 or 4 the model computes in 16 bit, and they differ by about 1e-2: enough to change a
word here and there. Then only --batch-size 1 gives exactly the replies of --prompt.
"""
import argparse
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
    import terminal
    terminal.start()

import torch
from tqdm import tqdm

import data
from errors import UserError
from files import peft_files, weights, writing
from files.conversations import Reader
from files.json_files import is_there, show
from files.rows import read_rows
from methods import several
from techniques.device import usable_device
from techniques.few_rows import for_few_rows
from techniques.kv_cache import KVCache
from techniques.sampling import check, choose

if not hasattr(data, "load_tokenizer"):
    raise ImportError(f"{data.__file__} is not Bytewise's data.py: put Bytewise's folder first, sys.path.insert(0, FOLDER)")


# ---------------------------------------------------------------------------------------------- replies

class Reply:
    """A reply while it is made: `add` takes the logits that follow its last token, and chooses the next one.

    new: the ids so far, with the stop id. text: their text, without the end token, a stop string and what follows it.
    ready: the part of `text` that no later token changes. finish_reason: None while it is made; "stop" after a stop id or a
    stop string; "length" after max_new_tokens, or when all of the model's positions are used.

    adapter: which one makes it, of a model with several (methods/several.py); None: the base model.
    Without a tokenizer there is no text. `more` are options of `choose`. Raises UserError for options out of range, and
    for a prompt that is empty or too long.
    """

    def __init__(self, config, ids: list[int], tokenizer=None, stop=(), stop_ids=(), max_new_tokens: int = 64,
                 temperature: float = 0.7, top_p: float = 0.9, seed: int = 0, adapter: str | None = None, **more):
        check(max_new_tokens, temperature, top_p, seed, **more)
        if not ids:
            raise UserError("the prompt is empty: there is nothing to continue")
        if len(ids) >= config.n_positions:
            n, virtual = config.n_positions, getattr(config, "n_virtual", 0)  # (methods/prompt.py)
            raise UserError(f"the prompt has {len(ids)} tokens, the model {n} positions" +
                            f" after {virtual} virtual tokens" * (virtual > 0) + ": nothing can follow")
        self.ids, self.tokenizer, self.stop, self.adapter = ids, tokenizer, stop, adapter
        self.stop_ids = tokenizer.stop_ids if tokenizer else stop_ids
        self.limit = min(max_new_tokens, config.n_positions - len(ids))
        self.seed, self.rng, self.options = seed, None, {"temperature": temperature, "top_p": top_p, **more}
        self.new, self.text, self.ready = [], "", ""
        self.finish_reason = None if self.limit else "length"

    def add(self, logits):
        """logits (V,). Raises UserError if they are not finite."""
        if not all(map(math.isfinite, logits.aminmax())):  # any token would be drawn from nothing
            raise UserError("the logits are not finite (NaN or infinity): the model or its adapter is damaged, or its "
                            "numbers are too large; try --bits 32")
        self.rng = self.rng or torch.Generator().manual_seed(self.seed)
        self.new.append(choose(logits, rng=self.rng, seen=self.ids + self.new, new=self.new, **self.options))
        stopped = self.new[-1] in self.stop_ids
        if self.tokenizer:
            self.text = self.tokenizer.decode(self.new[:-1] if stopped else self.new)
            self.ready = self.text.rstrip("\ufffd")  # part of a character: the next token has its other bytes
            if (cut := min((i for s in self.stop if (i := self.ready.find(s)) >= 0), default=None)) is not None:
                self.text, stopped = self.text[:cut], True
        if stopped or len(self.new) == self.limit:
            self.finish_reason = "stop" if stopped else "length"
            self.ready = self.text.rstrip("\ufffd")
        else:  # what may be the beginning of a stop string waits
            begun = [n for s in self.stop for n in range(1, len(s)) if self.ready.endswith(s[:n])]
            self.ready = self.ready[:len(self.ready) - max(begun, default=0)]


@torch.inference_mode()  # (no_grad still counts each tensor's versions: SmolLM2-135M takes 51 ms a token, and 47 without)
def step(model, cache: KVCache, slots: list[int], ids: list[list[int]], adapters: list | None = None, whole=()):
    """One forward: ids[b] follow the tokens in slot slots[b], and go through adapters[b] (methods/several.py).

    Returns for each b the logits after its last id, (1, V): the head's V * C products are done for these positions only.
    whole: the numbers b for which they are wanted after each of its ids, (len(ids[b]), V).
    """
    device, counts = next(model.parameters()).device, [len(i) for i in ids]
    several.route(model, adapters or [None] * len(ids), counts)
    h = model.hidden(torch.tensor([sum(ids, [])], device=device), cache=cache.rows(slots, counts))
    wanted = [n if b in whole else 1 for b, n in enumerate(counts)]
    last = [t for t, n in zip(accumulate(counts), wanted) for t in range(t - n, t)]
    several.route(model, adapters or [None] * len(ids), wanted)  # the head may have adapters too
    return model.head(h[:, last])[0].split(wanted)


def run(model, replies: list[Reply], batch_size: int = 1) -> Iterator[Reply]:
    """Make the replies, at most batch_size at the same time. Yields a reply each time it has a new token.

    Prompts are read one by one, without padding. Then each forward gives every running reply one token, until one ends.
    """
    waiting, running = deque(r for r in replies if not r.finish_reason), []  # running[slot]
    if not waiting:
        return
    cache = KVCache(model.config, max(len(r.ids) + r.limit for r in waiting), min(batch_size, len(waiting)))
    was_training = model.training
    model.eval()
    try:
        with several.adapter(model, None):  # afterwards, rows go the way that they went before
            while waiting or running:
                if waiting and len(running) < batch_size:
                    running.append(waiting.popleft())
                    slots, ids = [len(running) - 1], [running[-1].ids]
                else:
                    slots, ids = list(range(len(running))), [r.new[-1:] for r in running]
                for slot, logits in zip(slots, step(model, cache, slots, ids, [running[slot].adapter for slot in slots])):
                    running[slot].add(logits[-1])
                    yield running[slot]
                for slot in reversed(slots):
                    if running[slot].finish_reason:
                        cache.release(slot)
                        last = running.pop()
                        if slot < len(running):  # the last reply moves here: slots that are neighbours need no copies
                            running[slot] = last
                            cache.move(len(running), slot)
    finally:
        model.train(was_training)


def stream(model, ids: list[int], max_new_tokens: int = 64, temperature: float = 0.7, top_p: float = 0.9, seed: int = 0,
           stop_ids=(), **more) -> Iterator[int]:
    """Yield new token ids, up to and with the first stop id. It ends earlier after max_new_tokens, or when all of the
    model's positions are used. more: other options of `choose`. Raises UserError as Reply does."""
    yield from (r.new[-1] for r in run(model, [Reply(
        model.config, ids, None, (), stop_ids, max_new_tokens, temperature, top_p, seed, **more)]))


def generate(model, ids, max_new_tokens: int = 64, temperature: float = 0.7, top_p: float = 0.9, seed: int = 0,
             stop_ids=(), **more) -> list[int]:
    """Prompt ids (a list, or a tensor (T,) or (1, T)) -> prompt and continuation, as a list of ids."""
    ids = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else list(ids)
    return ids + list(stream(model, ids, max_new_tokens, temperature, top_p, seed, stop_ids, **more))


def reply(model, tokenizer, ids: list[int], on_text: Callable[[str], None] | None = None, **options) -> str:
    """The continuation of `ids` as text, without its end token. on_text is called with each new part of the text.

    options: those of `Reply`.
    """
    r, shown = Reply(model.config, ids, tokenizer, **options), 0
    for _ in run(model, [r]):
        if on_text and len(r.ready) > shown:
            on_text(r.ready[shown:])
            shown = len(r.ready)
    return r.text


# ---------------------------------------------------------------------------------------------- a chat, and a file

def whole(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that the locale could not read


def lines(switch: Callable[[str], None] | None = None) -> Iterator[str]:
    """The lines of standard input that are not blank. "/adapter NAME" is no line, but a call of `switch`."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        command, _, name = line.strip().partition(" ")
        if switch and command == "/adapter":
            switch(whole(name.strip()))
        elif command:
            yield whole(line)


def chat(encode: Callable[[list], list[int]], say: Callable[[list[int]], str], system: list[dict], room: int, switch=None):
    """Each line of standard input is a turn, and the model sees all turns before it. "/new" forgets them.

    If the conversation has more than `room` tokens, its oldest turns are forgotten, and a line says so. switch: as for
    `lines`.
    """
    messages = [*system]
    for line in lines(switch):
        if line.strip() == "/new":
            messages = [*system]
            continue
        messages.append({"role": "user", "content": line})
        n_before = len(messages)
        while len(ids := encode(messages)) > room and len(messages) > len(system) + 1:
            del messages[len(system):len(system) + 2]  # a question and its reply
        if len(messages) < n_before:
            print(f"note: the conversation is too long for the model's positions; its oldest messages are forgotten "
                  f"({n_before - len(messages)})", file=sys.stderr)
        messages.append({"role": "assistant", "content": say(ids)})


def conversation(where: str, row: dict, raw: bool, system: list[dict]) -> tuple[list, list | None]:
    """A row of a file of prompts -> what data.prompt_ids takes, and its tools. The reply that it may have at its end is left
    out.

    Raises UserError, which names `where`, for a row without a prompt.
    """
    for name in ("reply", "finish_reason"):
        if name in row:
            raise UserError(f"{where}: the row has a field {name!r}, which the output would overwrite; rename it")
    if not {"prompt", "messages", "conversations", "instruction", "document"} & row.keys():
        raise UserError(f"{where}: no prompt in it; expected prompt, messages, or instruction (and input)")
    no_reply = {"completion": [] if isinstance(row.get("prompt"), list) else "", "output": "", "summary": ""}
    read = Reader().read(where, {**no_reply, **row})
    messages, is_text = read.pieces or read.messages, bool(read.pieces)
    if is_text and not raw and "completion" not in row:  # as --prompt
        messages, is_text = [{"role": "user", "content": messages[0][0]}], False
    if is_text and not system:  # it is continued as it is; prompt and completion are so in training too
        prompt = messages[:1]
    elif is_text or raw:
        raise UserError(f"{where}: " + ("--raw needs a row with a prompt, to continue it" if raw else
                                        "--system needs a chat template, and a prompt with a completion has none"))
    else:
        prompt = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        if not prompt or prompt[-1]["role"] not in ("user", "tool"):
            raise UserError(f"{where}: the conversation does not end with a user turn, which a reply could follow")
        prompt = prompt if prompt[0]["role"] == "system" else [*system, *prompt]
    if not (prompt[-1][0] if isinstance(prompt[-1], tuple) else prompt[-1]["content"]).strip():
        raise UserError(f"{where}: the prompt is empty: there is nothing to reply to")
    return prompt, read.tools


def answer_file(model, tokenizer, encode: Callable[..., list[int]], rows: list[tuple[str, dict]], prompts: list,
                out: Path, batch_size: int, options: dict):
    """Write each row with its reply and finish_reason, in the same order, when all of them are known. Raises UserError."""
    replies = []
    for (where, row), prompt in zip(rows, prompts):
        try:
            replies.append(Reply(model.config, encode(*prompt), tokenizer, adapter=row.get("adapter"), **options))
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
    n_tokens = 0
    bar = tqdm(total=len(rows), desc="replies", unit="row", disable=not sys.stderr.isatty())
    with writing.atomic(out) as tmp, bar:
        for r in run(model, replies, batch_size):
            n_tokens += 1
            if r.finish_reason:
                bar.update()
        lines = [json.dumps({**row, "reply": r.text, "finish_reason": r.finish_reason}, ensure_ascii=False)
                 for (_, row), r in zip(rows, replies)]
        tmp.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")  # (half a character in the row)
    print(f"{len(rows)} replies of {n_tokens:,} tokens are in {out}")


def named(values: list[str]) -> dict[str | None, str]:
    """The values of --adapter -> {name: folder}. A single one may have no name: {None: folder}. Raises UserError."""
    found = {}
    for value in values:
        name, has_name, folder = value.partition("=")
        if not has_name or Path(value).is_dir():
            if len(values) > 1:
                raise UserError(f"--adapter {value}: each of several adapters needs a name: --adapter NAME={value}")
            return {None: value}
        several.check_name(name)
        if name in found:
            raise UserError(f"--adapter {value}: two adapters are named {name}; give another name")
        found[name] = folder
    return found


def recorded_bits(adapters: dict[str | None, str]) -> int | None:
    """8 or 4 if the adapters were trained on such weights, else None. Raises UserError if they do not agree."""
    bits = {folder: trained if trained in (8, 4) else 32 for folder in adapters.values()
            if (trained := peft_files.trained_with(folder)[1])}
    if len(set(bits.values())) > 1:
        raise UserError("the adapters were trained on different weights (" + ", ".join(
            f"{folder}: {n if n < 32 else '32 or 16'} bits" for folder, n in bits.items()) + "); choose with --bits")
    return next((n for n in bits.values() if n < 32), None)


def saved_template(adapters: dict[str | None, str]) -> str | None:
    """The chat template with which the adapters were trained, if a folder has one. Raises UserError if they do not agree."""
    found = {}  # template -> its file
    for folder in adapters.values():
        if is_there(path := Path(folder) / "chat_template.jinja"):
            found.setdefault(data.read_text(path), path)
    if len(found) > 1:
        one, other, *_ = found.values()
        raise UserError(f"{one} and {other} are different chat templates; use the adapters one by one, or --raw")
    return next(iter(found), None)


def main(argv=None):
    p = argparse.ArgumentParser(prog="generate.py", description="Let a model reply.")
    p.add_argument("--model", default="gpt2-nano", help="short name, hub repository or folder (default: %(default)s)")
    p.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR", help="folder of an adapter, such as "
                   "runs/gpt2-nano-1/adapter; with NAME=, several LoRA adapters on one model")
    p.add_argument("--prompt", help="what to reply to; without it, standard input is a chat (/new starts anew; /adapter "
                   "NAME changes the adapter)")
    p.add_argument("--prompts", help="a file with a row for each prompt: prompt, messages, or instruction (and input)")
    p.add_argument("--out", help="the new .jsonl file: the rows of --prompts with reply and finish_reason (stop or length)")
    p.add_argument("--batch-size", type=int, help="replies that are made at the same time for --prompts (default: 8)")
    p.add_argument("--system", help="a system message before the conversation")
    p.add_argument("--raw", action="store_true", help="continue the prompt itself, without a chat template")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the reply before this text; may be "
                   "given several times")
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the most likely token")
    p.add_argument("--top-p", type=float, default=0.9, help="draw from the likeliest tokens with this share of probability")
    p.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens (default: 0, all)")
    p.add_argument("--min-p", type=float, default=0.0, help="draw from tokens with this share of the likeliest one's "
                   "probability (default: 0, all)")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: tokens of the prompt and the reply "
                   "become less likely (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="each reply begins with this seed")
    p.add_argument("--bits", type=int, choices=(32, 16, 8, 4), help="bits of each weight in memory (default: 8 or 4 if "
                   "the checkpoint is stored so or the adapter was trained so, else 32)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    a = p.parse_args(argv)
    if a.prompt is not None and not a.raw and not a.prompt.strip():  # the model would answer to the empty template
        raise UserError("--prompt is empty: there is nothing to reply to")
    options = {"max_new_tokens": a.max_new_tokens, "temperature": a.temperature, "top_p": a.top_p, "seed": a.seed,
               "top_k": a.top_k, "min_p": a.min_p, "repetition_penalty": a.repetition_penalty}
    check(**options)
    if a.max_new_tokens == 0:
        raise UserError("--max-new-tokens 0 must be at least 1")
    if "" in a.stop:
        raise UserError("--stop is empty: every reply would end before its first word")
    if a.system is not None and a.raw:
        raise UserError("--system needs a chat template, and --raw uses none; write it into the prompt")
    if a.prompts is None and (a.out is not None or a.batch_size is not None):
        raise UserError(f"{'--out' if a.out is not None else '--batch-size'} needs --prompts, a file of prompts")
    adapters = named(a.adapter)
    names = [name for name in adapters if name is not None]
    system = [] if a.system is None else [{"role": "system", "content": whole(a.system)}]
    if a.prompts is not None:
        if a.prompt is not None or a.out is None:
            raise UserError("--prompts needs --out, the file for the replies, and no --prompt")
        if a.batch_size is not None and a.batch_size < 1:
            raise UserError(f"--batch-size {a.batch_size} must be at least 1")
        if os.path.lexists(a.out):
            raise UserError(f"--out {a.out} exists; choose another name, or remove it")
        rows = read_rows(a.prompts)
        prompts = [conversation(where, row, a.raw, system) for where, row in rows]
        for where, row in rows:
            if row.get("adapter") not in (None, *names):
                raise UserError(f"{where}: adapter {show(row['adapter'])} is not one of those that --adapter NAME=DIR names "
                                f"({', '.join(names) or 'none'})")
    bits = a.bits or weights.stored_bits(weights.find(a.model))
    model = weights.load(a.model, bits=bits or recorded_bits(adapters) or 32, device=usable_device(a.device))
    for_few_rows(model)
    tokenizer = data.load_tokenizer(a.model)  # also with an adapter: its rows of the embedding are the model's
    for name, folder in adapters.items():
        peft_files.load(model, folder) if name is None else peft_files.add(model, name, folder)
    template = None if a.raw else saved_template(adapters)
    template = data.load_template("auto", tokenizer) if template is None else template
    options["stop"] = [whole(s) for s in a.stop]

    def encode(row, tools=None):
        return data.prompt_ids(row, template, tokenizer, tools)

    def say(ids):
        text = reply(model, tokenizer, ids, lambda s: print(s, end="", flush=True), **options)
        print()
        return text

    def question(text):
        return encode([(text, False)] if a.raw else [*system, {"role": "user", "content": text}])

    def answer(text):
        print(text if a.raw else "", end="")
        return say(question(text))

    def switch(name):
        if name not in ("", *names):
            return print(f"note: no adapter is named {name}; there are {', '.join(names)}", file=sys.stderr)
        options["adapter"] = name or None
        print(f"note: {f'adapter {name}' if name else 'the base model'} answers", file=sys.stderr)

    if a.prompts is not None:
        answer_file(model, tokenizer, encode, rows, prompts, Path(a.out), a.batch_size or 8, options)
    elif a.prompt is not None and names:
        text = whole(a.prompt)
        replies = [Reply(model.config, question(text), tokenizer, adapter=name, **options) for name in names]
        deque(run(model, replies, len(names)), maxlen=0)  # all of them share each forward
        for r in replies:
            print(f"[{r.adapter}]\n{text if a.raw else ''}{r.text}")
    elif a.prompt is not None:
        answer(whole(a.prompt))
    else:
        change, limit = switch if names else None, model.config.n_positions
        if names:
            switch(names[0])
        if a.raw:
            for line in lines(change):
                answer(line)
            return
        chat(encode, say, system, limit - min(a.max_new_tokens, limit // 2), change)  # a reply needs positions too


if __name__ == "__main__":
    terminal.run(main, needs_a_reader=True)
