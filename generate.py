"""Sampling, one token at a time, with a KV cache.

Attention over T tokens needs every earlier token's k and v, and they never change. Keeping them makes a new token cost
one token's work instead of T: the cache is 2 * n_layer * n_kv_head * head_dim numbers a token. GPT-2 124M in float32:
2 * 12 * 768 * 4 = 74 kB a token; LLaMA-7B in 16 bit 512 kB; Llama 3.2 1B, with 8 key/value heads of 64, 32 kB.

Usage: python generate.py --model M [--adapter DIR] [--prompt TEXT]       without --prompt: a line of input, a reply
"""
import argparse
import sys
from pathlib import Path

import torch

import data
from errors import UserError
from files import peft_files, weights
from techniques.device import usable_device


class KVCache:
    """k and v of every layer, allocated once for `max_length` tokens. The models call `extend`."""

    def __init__(self, config, max_length: int):
        self.max_length, self.length = max_length, 0
        self.n_layer = config.n_layer
        self.k, self.v = [None] * config.n_layer, [None] * config.n_layer

    def extend(self, layer: int, k, v):
        """Append k, v (B, K, T, D); returns everything so far (B, K, length + T, D). Any T first, then T = 1."""
        T = k.shape[2]
        if self.k[layer] is None:
            shape = (k.shape[0], k.shape[1], self.max_length, k.shape[3])
            self.k[layer], self.v[layer] = k.new_empty(shape), v.new_empty(shape)
        elif T != 1:
            raise ValueError("a KV cache takes the whole prompt first and then one token at a time")
        end = self.length + T
        self.k[layer][:, :, self.length:end], self.v[layer][:, :, self.length:end] = k, v
        if layer == self.n_layer - 1:
            self.length = end  # the last layer has seen these tokens
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


def choose(logits, temperature: float, top_p: float, rng) -> int:
    """Draw from softmax(logits / temperature), cut to the smallest set of tokens whose probability reaches top_p
    (nucleus sampling, arXiv:1904.09751). Temperature 0 takes the most likely token."""
    if temperature == 0:
        return int(logits.argmax())
    p, order = torch.softmax(logits.float() / temperature, -1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0  # the token that crosses top_p stays
    return int(order[torch.multinomial(p.cpu(), 1, generator=rng)])


@torch.no_grad()
def stream(model, ids, max_new_tokens: int = 64, temperature: float = 0.7, top_p: float = 0.9, seed: int = 0, stop_ids=()):
    """Yield new token ids until a stop id, max_new_tokens or the end of the model's positions."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature} must not be negative, --top-p {top_p} must be in (0, 1]")
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
            last = model.hidden(x, cache=cache)[:, -1]  # the head's V * C work for one position only
            token = choose(model.head(last)[0], temperature, top_p, rng)
            yield token
            if token in stop_ids:
                return
            x = torch.tensor([[token]], device=device)
    finally:
        model.train(was_training)


def generate(model, ids, max_new_tokens: int = 64, temperature: float = 0.7, top_p: float = 0.9, seed: int = 0, stop_ids=()):
    """Prompt ids (a list, or a tensor (T,) or (1, T)) -> prompt and continuation, as a list of ids."""
    ids = ids.flatten().tolist() if isinstance(ids, torch.Tensor) else list(ids)
    return ids + list(stream(model, ids, max_new_tokens, temperature, top_p, seed, stop_ids))


def reply(model, tokenizer, ids, on_text=None, **options) -> str:
    """The continuation of `ids` as text, without its end token; on_text(piece) is called as the text grows."""
    new, shown = [], 0
    for token in stream(model, ids, stop_ids=tokenizer.stop_ids, **options):
        if token in tokenizer.stop_ids:
            break
        new.append(token)
        text = tokenizer.decode(new)
        if on_text and not text.endswith("\ufffd"):  # half a character: its other bytes are in the next token
            on_text(text[shown:])
            shown = len(text)
    return tokenizer.decode(new)


def main(argv=None):
    p = argparse.ArgumentParser(prog="generate.py", description="Let a model reply.")
    p.add_argument("--model", default="gpt2-nano", help="short name, hub repository or folder (default: %(default)s)")
    p.add_argument("--adapter", help="folder of a LoRA adapter, such as runs/gpt2-nano-1/adapter")
    p.add_argument("--prompt", help="what to reply to; without it, every line of standard input gets a reply")
    p.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the most likely token")
    p.add_argument("--top-p", type=float, default=0.9)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--bits", type=int, choices=(32, 16, 8, 4), help="how the weights are held (default: as stored, or as "
                   "the adapter was trained if in 8 or 4, else 32)")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    a = p.parse_args(argv)
    if a.prompt is not None and not a.raw and not a.prompt.strip():  # its template alone would get an answer
        raise UserError("--prompt is empty: there is nothing to reply to")
    bits = a.bits or weights.stored_bits(weights.find(a.model))
    if not bits and a.adapter:
        _, trained = peft_files.trained_with(a.adapter)
        bits = trained if trained in (8, 4) else None
    model = weights.load(a.model, bits=bits or 32, device=usable_device(a.device))
    tokenizer = data.load_tokenizer(a.model)
    template = data.load_template("auto", tokenizer)
    if a.adapter:
        peft_files.load(model, a.adapter)
        saved = Path(a.adapter) / "chat_template.jinja"  # the template it was trained with, not the model's
        template = saved.read_text(encoding="utf-8") if saved.is_file() else template

    def answer(text):
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
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
