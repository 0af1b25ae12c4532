"""Sampling, one token at a time, with a KV cache.

    python generate.py --model M [--adapter DIR] [--prompt TEXT]       without --prompt: each line of input gets a reply

A new token attends to the k and v of every earlier token, and these never change. With a cache that keeps them, a new token
costs the work of one token instead of T tokens. The cache takes, in bytes a token (GPT-2 in float32, the others in 16 bit):

    2 * n_layer * n_kv_head * head_dim * bytes a number      GPT-2 124M      2 * 12 * 768 * 4      =  74 kB
                                                             LLaMA-7B        2 * 32 * 4096 * 2     = 524 kB
                                                             Llama 3.2 1B    2 * 16 * 8 * 64 * 2   =  33 kB
"""
import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
    import terminal
    terminal.start()

import torch

import data
from errors import UserError
from files import peft_files, weights
from files.json_files import is_there
from techniques.device import usable_device

if not hasattr(data, "load_tokenizer"):
    raise ImportError(f"{data.__file__} is not Bytewise's data.py: put Bytewise's folder first, sys.path.insert(0, FOLDER)")


class KVCache:
    """k and v of every layer, allocated once for `max_length` tokens. The models call `extend`."""

    def __init__(self, config, max_length: int):
        self.max_length, self.length = max_length, 0
        self.n_layer = config.n_layer
        self.k, self.v = [None] * config.n_layer, [None] * config.n_layer

    def extend(self, layer: int, k, v):
        """Append k, v (B, K, T, D). Returns the k and v of all tokens so far, each (B, K, length + T, D).

        The first call may have any T, each later call T = 1. Raises ValueError for another T.
        """
        T = k.shape[2]
        if self.k[layer] is None:
            shape = (k.shape[0], k.shape[1], self.max_length, k.shape[3])
            self.k[layer], self.v[layer] = k.new_empty(shape), v.new_empty(shape)
        elif T != 1:
            raise ValueError("a KV cache takes the whole prompt first and then one token at a time")
        end = self.length + T
        self.k[layer][:, :, self.length:end], self.v[layer][:, :, self.length:end] = k, v
        if layer == self.n_layer - 1:
            self.length = end  # the tokens count when every layer has added them
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def choose(logits, temperature: float, top_p: float, rng) -> int:
    """logits (V,) -> a token id, drawn from softmax(logits / temperature).

    Only the most likely tokens take part: the smallest set whose probabilities sum to top_p or more (nucleus sampling,
    arXiv:1904.09751). Temperature 0 takes the most likely token.
    """
    if temperature < 1e-5:  # (logits / temperature must not overflow)
        return int(logits.argmax())
    p, order = torch.softmax(logits.float() / temperature, -1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0  # the token that crosses top_p stays
    return int(order[torch.multinomial(p.cpu(), 1, generator=rng)])


def check(max_new_tokens: int, temperature: float, top_p: float, seed: int):
    """Raise UserError for an option out of its range. (nan is in no range.)"""
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature} must not be negative or infinite, --top-p {top_p} must be in (0, 1]")
    if max_new_tokens < 0 or not 0 <= seed < 2**32:
        raise UserError(f"--max-new-tokens {max_new_tokens} must not be negative, --seed {seed} in 0 ... 4294967295")


@torch.no_grad()
def stream(model, ids: list[int], max_new_tokens: int = 64, temperature: float = 0.7, top_p: float = 0.9, seed: int = 0,
           stop_ids=()) -> Iterator[int]:
    """Yield new token ids, up to and with the first stop id. It ends earlier after max_new_tokens, or when all of the
    model's positions are used. Raises UserError for options out of range, and for a prompt that is empty or too long."""
    check(max_new_tokens, temperature, top_p, seed)
    if not ids:
        raise UserError("the prompt is empty: there is nothing to continue")
    limit = model.config.n_positions
    if len(ids) >= limit:
        raise UserError(f"the prompt has {len(ids)} tokens, the model {limit} positions: nothing can follow")
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        rng = torch.Generator().manual_seed(seed)
        cache = KVCache(model.config, min(limit, len(ids) + max_new_tokens))
        x = torch.tensor([ids], device=device)
        for _ in range(min(max_new_tokens, limit - len(ids))):
            last = model.hidden(x, cache=cache)[:, -1]  # the head's V * C products for the last position only
            logits = model.head(last)[0]
            if not torch.isfinite(logits).all():  # any token would be drawn from nothing
                raise UserError("the logits are not finite (NaN or infinity): the model or its adapter is damaged, or its "
                                "numbers are too large; try --bits 32")
            token = choose(logits, temperature, top_p, rng)
            yield token
            if token in stop_ids:
                return
            x = torch.tensor([[token]], device=device)
    finally:
        model.train(was_training)


def generate(model, ids, max_new_tokens: int = 64, temperature: float = 0.7, top_p: float = 0.9, seed: int = 0,
             stop_ids=()) -> list[int]:
    """Prompt ids (a list, or a tensor (T,) or (1, T)) -> prompt and continuation, as a list of ids."""
    ids = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else list(ids)
    return ids + list(stream(model, ids, max_new_tokens, temperature, top_p, seed, stop_ids))


def reply(model, tokenizer, ids: list[int], on_text: Callable[[str], None] | None = None, **options) -> str:
    """The continuation of `ids` as text, without its end token. on_text is called with each new part of the text.

    options: those of `stream`.
    """
    new, shown = [], 0
    for token in stream(model, ids, stop_ids=tokenizer.stop_ids, **options):
        if token in tokenizer.stop_ids:
            break
        new.append(token)
        text = tokenizer.decode(new)
        if on_text and not text.endswith("\ufffd"):  # part of a character: the next token has its other bytes
            on_text(text[shown:])
            shown = len(text)
    return tokenizer.decode(new)


def main(argv=None):
    p = argparse.ArgumentParser(prog="generate.py", description="Let a model reply.")
    p.add_argument("--model", default="gpt2-nano", help="short name, hub repository or folder (default: %(default)s)")
    p.add_argument("--adapter", help="folder of a LoRA adapter, such as runs/gpt2-nano-1/adapter")
    p.add_argument("--prompt", help="what to reply to; without it, every line of standard input gets a reply")
    p.add_argument("--raw", action="store_true", help="continue the prompt itself, without a chat template")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the most likely token")
    p.add_argument("--top-p", type=float, default=0.9)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--bits", type=int, choices=(32, 16, 8, 4), help="bits of each weight in memory (default: 8 or 4 if "
                   "the checkpoint is stored so or the adapter was trained so, else 32)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    a = p.parse_args(argv)
    if a.prompt is not None and not a.raw and not a.prompt.strip():  # the model would answer to the empty template
        raise UserError("--prompt is empty: there is nothing to reply to")
    check(a.max_new_tokens, a.temperature, a.top_p, a.seed)
    if a.max_new_tokens == 0:
        raise UserError("--max-new-tokens 0 must be at least 1")
    bits = a.bits or weights.stored_bits(weights.find(a.model))
    if not bits and a.adapter:
        _, trained = peft_files.trained_with(a.adapter)
        bits = trained if trained in (8, 4) else None
    model = weights.load(a.model, bits=bits or 32, device=usable_device(a.device))
    tokenizer = data.load_tokenizer(a.model)  # also with an adapter: its rows of the embedding are the model's
    template = data.load_template("auto", tokenizer)
    if a.adapter:
        peft_files.load(model, a.adapter)
        saved = Path(a.adapter) / "chat_template.jinja"  # the template that the adapter was trained with
        template = data.read_text(saved) if is_there(saved) else template

    def answer(text):
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that the locale could not read
        if a.raw:
            row = [(text, False)]
            print(text, end="")
        else:
            row = [{"role": "user", "content": text}]
        reply(model, tokenizer, data.prompt_ids(row, template, tokenizer), lambda s: print(s, end="", flush=True),
              max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_p=a.top_p, seed=a.seed)
        print()

    if a.prompt is not None:
        return answer(a.prompt)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            answer(line)


if __name__ == "__main__":
    terminal.run(main, needs_a_reader=True)
