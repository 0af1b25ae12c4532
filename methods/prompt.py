"""Prompt tuning: train the vectors of n words that stand before every text, and nothing else.

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning" (arXiv:2104.08691), section 2:

    x = [P; embedding(ids)]        P (n, C) trained: n vectors that need not be those of any word

Cost: 16 n C bytes, GPT-2 124M with n = 20: 0.25 MB. Each text is n tokens longer: n of the model's positions, and n more
tokens' activations. P starts at the vectors of words (section 3.2: better than random ones for models below 10B).

How it works here. A virtual token has an id beyond the vocabulary: V, V + 1, ..., V + n - 1. `hidden` writes these ids
before each text, in a packed row before each example. So positions and masks need nothing new. Afterwards it removes the
virtual tokens' outputs, so the loss sees the text's positions alone. With a KV cache, an empty slot is given the virtual
tokens first.
"""
import types

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora
from errors import UserError


class PromptedEmbedding(nn.Module):
    """The frozen embedding, and the trained vectors of the ids V, V + 1, ..."""

    def __init__(self, base: nn.Embedding, prompt: Tensor):
        super().__init__()
        self.base_layer, self.prompt = base, nn.Parameter(prompt.detach().float())

    def forward(self, ids):
        V = self.base_layer.num_embeddings
        x, mine = self.base_layer(ids.clamp(max=V - 1)), F.embedding((ids - V).clamp(min=0), self.prompt)
        return torch.where((ids >= V)[..., None], mine.to(x.dtype), x)

    @property
    def weight(self):
        return self.base_layer.weight


def embedding(model: nn.Module) -> tuple[str, nn.Embedding]:
    """The token embedding and its name: the first nn.Embedding of the model."""
    return next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding))


def inject(model: nn.Module, n: int = 20, ids: list[int] | None = None) -> nn.Module:
    """Put n trained vectors before every text, and freeze every weight. Returns the model. Raises UserError.

    ids: the tokens whose vectors they start from, repeated or cut to n of them; None: random vectors as long as these.
    """
    lora.refuse_adapters(model)
    check(model.config, n)
    name, base = embedding(model)
    W = base.weight.detach()
    start = W[repeated(ids, n)] if ids else torch.randn(n, W.shape[1], device=W.device) * W.std()
    model.requires_grad_(False)
    lora.replace(model, name, PromptedEmbedding(base, start))
    return before_the_text(model, "prompt", n, hidden)


def check(config, n: int, where: str = ""):
    """Raises UserError unless the model has room for n virtual tokens, a word and a reply. where: of a file, its name."""
    if not 1 <= n <= config.n_positions - 2:
        raise UserError((f"{where}: {n} virtual tokens" if where else f"--virtual-tokens {n}") +
                        f": must be from 1 to {config.n_positions - 2}, the model has {config.n_positions} positions")


def repeated(ids: list[int], n: int) -> list[int]:
    return (ids * (n // len(ids) + 1))[:n]


def before_the_text(model: nn.Module, method: str, n: int, hidden) -> nn.Module:
    """Set `hidden`, and leave the text n positions fewer. KVCache reads n_virtual."""
    model.method, model.hidden = method, types.MethodType(hidden, model)
    model.config.n_virtual, model.config.n_positions = n, model.config.n_positions - n
    return model


def empty_slots(cache, B: int) -> list[int]:
    """The slots of a forward of B rows that have no token yet."""
    return [slot for slot, start in zip(cache.slots or range(B), cache.starts(B)) if start == 0]


def hidden(model, ids: Tensor, positions: Tensor | None = None, segments: list[int] | None = None, cache=None) -> Tensor:
    """The model's `hidden` with the virtual tokens before each text. Arguments and result are those of the model's own."""
    run, n = type(model).hidden, model.config.n_virtual
    V = embedding(model)[1].num_embeddings
    virtual = torch.arange(V, V + n, device=ids.device).expand(len(ids), n)
    if cache is not None:
        for slot in empty_slots(cache, len(ids)):
            run(model, virtual[:1], cache=cache.rows([slot], [n]))
        return run(model, ids, positions, segments, cache)
    if segments is None:
        return run(model, torch.cat([virtual, ids], 1))[:, n:]
    ids = torch.cat([x for text in ids.split(segments, 1) for x in (virtual, text)], 1)
    longer = [n + t for t in segments]
    positions = torch.cat([torch.arange(t, device=ids.device) for t in longer])[None]
    return torch.cat([h[:, n:] for h in run(model, ids, positions, longer).split(longer, 1)], 1)
