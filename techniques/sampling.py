"""From logits to the next token: what may follow, and which of it is drawn.

The options and their order are those of transformers, whose logits processors give the same distribution:

    repetition_penalty   a token that the text has already becomes less likely: its logit is divided by the penalty, or
                         multiplied if it is negative (CTRL, arXiv:1909.05858, section 4.1)
    presence_penalty     is taken from the logit of a token that the reply has already, and frequency_penalty once for each
                         time that it has it (OpenAI's API; not in transformers). logit_bias is added
    temperature          below 1, likely tokens become more likely; 0 takes the most likely one
    top_k                only the k most likely tokens, and those that are as likely as the last of them
                         (arXiv:1805.04833, section 5.4); 0: all
    top_p                only the smallest set of tokens whose probabilities sum to top_p or more (nucleus sampling,
                         arXiv:1904.09751)
    min_p                only tokens with at least min_p times the probability of the most likely one (arXiv:2407.01082)
"""
import math

import torch
from torch import Tensor

from errors import UserError


def choose(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator, top_k: int = 0, min_p: float = 0.0,
           repetition_penalty: float = 1.0, seen=(), new=(), presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
           logit_bias: dict[int, float] | None = None) -> int:
    """logits (V,) -> a token id. seen: the ids of the text so far, prompt and reply, for the repetition penalty; new: those
    of the reply alone, for the other two. logit_bias: what is added to the logits of some ids."""
    logits = logits.float()
    if repetition_penalty != 1 and len(seen):
        seen, logits = torch.tensor(seen, device=logits.device), logits.clone()
        x = logits[seen]
        logits[seen] = torch.where(x < 0, x * repetition_penalty, x / repetition_penalty)
    if (presence_penalty or frequency_penalty) and new:
        counts = torch.bincount(torch.tensor(new, device=logits.device), minlength=len(logits))
        logits = logits - frequency_penalty * counts - presence_penalty * (counts > 0)
    if logit_bias:
        ids, added = torch.tensor(list(logit_bias)), torch.tensor([float(x) for x in logit_bias.values()])
        logits = logits.index_add(0, ids.to(logits.device), added.to(logits.device))
    if temperature < 1e-5:  # (logits / temperature must not overflow)
        return int(logits.cpu().numpy().argmax())  # (10 us for 49,152 logits; torch.argmax takes 100 us on a CPU)
    p, ids = candidates(logits, temperature, top_p, top_k, min_p)
    total = p.cpu().double().cumsum(-1)  # one uniform number for each token: the place where it falls among the sums
    u = torch.rand((), generator=rng, dtype=torch.float64) * total[-1]
    place = min(int(torch.searchsorted(total, u, right=True)), int(torch.searchsorted(total, total[-1])))
    return int(ids[place])


def candidates(logits: Tensor, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0):
    """logits (V,) -> (p, ids): the tokens that may be drawn and perhaps others, with p = 0 for those that are left out.

    The probabilities that are left sum to less than 1: whoever draws divides by their sum. If top_p or min_p leave tokens
    out, the most likely token comes first. To sort all of 49,152 takes 6 ms on a CPU core, to find the first 256 0.8 ms; so
    more are looked at only if these do not reach top_p.
    """
    logits = logits.float() / temperature
    if top_k:
        last = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < last, -math.inf)
    p = torch.softmax(logits, -1)
    if top_p == 1 and min_p == 0:
        return p, torch.arange(len(p), device=p.device)
    for n in (256, 4096, len(p)):
        head, ids = p.topk(min(n, len(p)))
        before = head.cumsum(-1) - head
        if len(head) == len(p) or before[-1] >= top_p or head[-1] < min_p * head[0]:
            break
    head[before >= top_p] = 0  # the token that crosses top_p stays
    head[head < min_p * head[0]] = 0
    return head, ids


def check(max_new_tokens: int, temperature: float, top_p: float, seed: int, top_k: int = 0, min_p: float = 0.0,
          repetition_penalty: float = 1.0, presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
          logit_bias: dict[int, float] | None = None):
    """Raise UserError for an option out of its range. (nan is in no range.) The last three are fields of a request only, and
    serving/fields.py checks them."""
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature} must not be negative or infinite, --top-p {top_p} must be in (0, 1]")
    if max_new_tokens < 0 or not 0 <= seed < 2**32:
        raise UserError(f"--max-new-tokens {max_new_tokens} must not be negative, --seed {seed} in 0 ... 4294967295")
    if top_k < 0:
        raise UserError(f"--top-k {top_k} must not be negative (0: no limit)")
    if not 0 <= min_p <= 1:
        raise UserError(f"--min-p {min_p} must be in [0, 1]")
    if not 0.01 <= repetition_penalty <= 100:  # (a logit times the penalty must not overflow)
        raise UserError(f"--repetition-penalty {repetition_penalty} must be in [0.01, 100]; 1 changes nothing")
