"""What fits on a card: `python memory.py --model llama-2-7b --fit 8GB --max-length 1024`.

Every rung of the ladder is one technique more, in the order of what it costs in time, and each is predicted (predict.py) by
running the training step on tensors without memory. Down until it fits; then back up: what a later rung has made superfluous
is taken off again, the dearest first. So with 4-bit weights nothing may need to be recomputed any more.

    --amp                    faster, if anything
    fewer examples at once   --batch-size 4 --grad-accum 2 instead of 8: the same steps; a card has less to do at a time
    --ckpt-every 2, then 1   a sixth, then a third of the time
    --ckpt-offload           the bus
    --bits 8, then 4         dequantising; a little exactness        (with --full: the optimizer's states in 8 bits, paged,
                                                                      or all but 16-bit weights on the CPU)
"""
import argparse
import dataclasses
import re
import sys

from tqdm import tqdm

import memory
from run import options
from ledger import predict
import train
from errors import UserError

CONTEXT = 500_000_000  # what CUDA itself takes of a card: 300 to 600 MB


def parse_size(text: str) -> int:
    """"8GB", "7.5 GiB", "24000MB" -> bytes. GB are decimal (a card sold as 8 GB has 8 GiB, 8.6 GB). Raises UserError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    m = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if not m or m[2].upper() not in units or not float(m[1]):
        raise UserError(f"--fit {text}: write a size such as 8GB, 7.5GiB or 24000MB")
    return int(float(m[1]) * units[m[2].upper()])


def rungs(cfg: options.TrainConfig) -> list[dict]:
    """The options that each rung sets. One that the command line has set already is left as it is."""
    default, found = options.TrainConfig(), []

    def rung(**toggles):
        if all(getattr(cfg, k) in (getattr(default, k), v) for k, v in toggles.items()):
            found.append(toggles)

    rung(amp=True)
    examples, size = cfg.batch_size * cfg.grad_accum, cfg.batch_size
    while size > 1 and cfg.grad_accum == 1:
        size //= 2
        if examples % size == 0:
            found.append({"batch_size": size, "grad_accum": examples // size})
    if cfg.ckpt_every in (0, 2):
        found += [{"ckpt_every": 2}, {"ckpt_every": 1}]
    if cfg.ckpt_every in (0, 1, 2):
        rung(ckpt_offload=True)
    if not cfg.full:
        rung(bits=8)
        rung(bits=4)
    for optimizer in ("adamw8bit", "paged_adamw8bit", "offload_adamw")[:3 if cfg.full else 2]:
        rung(optimizer=optimizer)
    return [toggles for toggles in found if any(getattr(cfg, k) != v for k, v in toggles.items())]


def flags(toggles: dict) -> str:
    """As the command line spells them."""
    return " ".join(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in toggles.items() if v)


def search(cfg: options.TrainConfig, left) -> tuple[list, options.TrainConfig | None]:
    """Down the ladder until it fits, then back up. left(cfg) -> bytes that stay free, negative if it does not fit.

    Returns ([(what was tried, its cfg, bytes left)], the cheapest configuration that fits or None)."""
    tried = []

    def fits(text, candidate):
        tried.append((text, candidate, left(candidate)))
        return tried[-1][2] >= 0

    best, found = cfg, fits("as it is", cfg)
    for toggles in rungs(cfg):
        if found:
            break
        best = dataclasses.replace(best, **toggles)
        found = fits(f"+ {flags(toggles)}", best)
    if not found:
        return tried, None
    for group in back(cfg, best):
        for toggles in group:
            candidate = dataclasses.replace(best, **toggles)
            if not fits(f"back: {described(toggles)}", candidate):
                break
            best = candidate
    return tried, best


def back(cfg: options.TrainConfig, best: options.TrainConfig):
    """What may have become superfluous, the dearest first: groups of steps towards what the command line asked for."""
    if best.ckpt_every != cfg.ckpt_every:
        group = [{"ckpt_every": n, "ckpt_offload": cfg.ckpt_offload} for n in (1, 2, 0)]
        yield [t for t in group if t["ckpt_every"] in (cfg.ckpt_every, 2, 1)
               and (t["ckpt_every"], t["ckpt_offload"]) != (best.ckpt_every, best.ckpt_offload)
               and not 0 < t["ckpt_every"] < best.ckpt_every]
    sizes, size = [], best.batch_size
    while (size := 2 * size) <= cfg.batch_size:
        sizes.append({"batch_size": size, "grad_accum": cfg.batch_size * cfg.grad_accum // size})
    yield sizes


def described(toggles: dict) -> str:
    return flags(toggles) if toggles.get("ckpt_every", 1) else "nothing recomputed"


def command(cfg: options.TrainConfig) -> str:
    default = options.TrainConfig()
    set_ = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in ("dry_run", "device")}
    return "python train.py " + flags({k: v for k, v in set_.items() if v != getattr(default, k)})


def main(argv=None):
    p = argparse.ArgumentParser(prog="memory.py", description="Find the cheapest options with which a model fits on a card. "
                                "All options of train.py can be given; what is given stays.", allow_abbrev=False)
    p.add_argument("--fit", required=True, metavar="SIZE", help="memory of the card, such as 8GB")
    args, rest = p.parse_known_args(argv)
    card = parse_size(args.fit)
    asked = dataclasses.replace(options.parse(rest), dry_run=True)
    asked.device = asked.device or "cuda"
    found = {}
    bar = tqdm(desc="predicting", unit=" rung", disable=not sys.stderr.isatty(), leave=False)

    def left(cfg) -> int:
        sizes, of, cfg = train.largest_step(options.resolve(cfg), full_length=asked.data is None)
        key = command(cfg)
        if key not in found:
            found[key] = predict.predict(cfg, sizes), of
            bar.update()
        return card - CONTEXT * (asked.device != "cpu") - (found[key][0]["reserved"] or found[key][0]["peak"])

    tried, best = search(asked, left)
    bar.close()
    print(f"{asked.model} on a card of {memory.human(card)}, {memory.human(CONTEXT)} of which are CUDA's own\n"
          f"{next(iter(found.values()))[1]}\n")
    width = max(len(text) for text, *_ in tried)
    for text, _, rest_ in tried:
        need = card - rest_
        print(f"{text:{width}}  {memory.human(need):>10}  {'fits' if rest_ >= 0 else 'too large'}")
    if best is None:
        least = min(tried, key=lambda t: -t[2])
        raise UserError(f"nothing fits into {args.fit}. The least is {memory.human(card - least[2])}, for "
                        f"{command(least[1])}; take a smaller model, a shorter --max-length, or a larger card")
    print(f"\n{command(best)}")
