"""Find options that fit into a GPU's memory: `python train.py --model llama-2-7b --fit 8GB --max-length 1024`.

The options that save memory are added one after the other until the run fits. The first ones cost the least time. The peak
of each configuration is predicted (ask.py). Once a later option makes an earlier one unnecessary, the earlier one is removed
again, starting with the one that costs the most time. With 4-bit weights, for example, recomputation may be unnecessary.

    option                   what it costs
    --amp                    nothing: it is usually faster
    fewer examples at once   --batch-size 4 --grad-accum 2 instead of 8: the same steps, but less work for a GPU at a time
    --ckpt-every 2, then 1   a sixth more time, then a third more
    --ckpt-offload           copies over the bus
    --bits 8, then 4         dequantisation, and some precision
    --optimizer              8-bit states, then paged ones, then (with --full) offload_adamw: time in each optimizer step

The search starts from the options on the command line, and with --amp if the device multiplies faster in 16 bit. An option
that differs from its default there keeps its value, with two exceptions: --batch-size may be split while --grad-accum is 1,
and --ckpt-every 2 may become 1.
"""
import dataclasses
import re
import sys
from collections.abc import Callable

import torch
from tqdm import tqdm

import memory
from errors import UserError
from ledger import ask
from run import options, prepare
from techniques.device import compute_dtype

CONTEXT = 500_000_000  # bytes of a GPU's memory that CUDA itself needs. It is 300 to 600 MB


def parse_size(text: str) -> int:
    """"8GB", "7.5 GiB", "24000MB" -> bytes. GB are decimal (a GPU sold as "8 GB" has 8 GiB = 8.6 GB). Raises UserError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    m = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if not m or m[2].upper() not in units or not float(m[1]):
        raise UserError(f"--fit {text}: write a size such as 8GB, 7.5GiB or 24000MB")
    return int(float(m[1]) * units[m[2].upper()])


def savings(cfg: options.TrainConfig) -> list[dict]:
    """The options to set in each step of the search, in order. Options that the command line has set are left out."""
    default, steps = options.TrainConfig(), []

    def saving(**toggles):
        if all(getattr(cfg, k) in (getattr(default, k), v) for k, v in toggles.items()):
            steps.append(toggles)

    saving(amp=True)
    examples, size = cfg.batch_size * cfg.grad_accum, cfg.batch_size
    while size > 1 and cfg.grad_accum == 1:
        size //= 2
        if examples % size == 0:
            steps.append({"batch_size": size, "grad_accum": examples // size})
    if cfg.ckpt_every in (0, 2):
        steps += [{"ckpt_every": 2}, {"ckpt_every": 1}]
    if cfg.ckpt_every in (0, 1, 2):
        saving(ckpt_offload=True)
    if not cfg.full:
        saving(bits=8)
        saving(bits=4)
    for optimizer in ("adamw8bit", "paged_adamw8bit", "offload_adamw")[:3 if cfg.full else 2]:
        saving(optimizer=optimizer)
    return [toggles for toggles in steps if any(getattr(cfg, k) != v for k, v in toggles.items())]


def flags(toggles: dict) -> str:
    """The options as they are written on a command line."""
    return " ".join(f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in toggles.items() if v)


def search(cfg: options.TrainConfig, left: Callable, first: str = "as it is"):
    """Add savings until the run fits, then remove those that have become unnecessary.

    left(cfg) -> the bytes that stay free; negative if cfg does not fit. first: cfg in words. Returns ([(what was tried, its
    cfg, bytes left)], the configuration that fits and costs the least time, or None).
    """
    tried = []

    def fits(text, candidate):
        tried.append((text, candidate, left(candidate)))
        return tried[-1][2] >= 0

    best, fitting = cfg, fits(first, cfg)
    for toggles in savings(cfg):
        if fitting:
            break
        best = dataclasses.replace(best, **toggles)
        fitting = fits(f"+ {flags(toggles)}", best)
    if not fitting:
        return tried, None
    for group in removals(cfg, best):
        for toggles in group:
            candidate = dataclasses.replace(best, **toggles)
            if not fits(f"back: {in_words(toggles)}", candidate):
                break
            best = candidate
    return tried, best


def removals(cfg: options.TrainConfig, best: options.TrainConfig):
    """What may have become unnecessary, the most expensive first. Each group goes back, step by step, to the command line's
    value; `search` stops in a group at the first step that does not fit."""
    if best.ckpt_every != cfg.ckpt_every:
        group = [{"ckpt_every": n, "ckpt_offload": cfg.ckpt_offload} for n in (1, 2, 0)]
        yield [t for t in group if t["ckpt_every"] in (cfg.ckpt_every, 2, 1)
               and (t["ckpt_every"], t["ckpt_offload"]) != (best.ckpt_every, best.ckpt_offload)
               and not 0 < t["ckpt_every"] < best.ckpt_every]
    sizes, size = [], best.batch_size
    while (size := 2 * size) <= cfg.batch_size:
        sizes.append({"batch_size": size, "grad_accum": cfg.batch_size * cfg.grad_accum // size})
    yield sizes


def in_words(toggles: dict) -> str:
    return flags(toggles) if toggles.get("ckpt_every", 1) else "nothing recomputed"


def command(cfg: options.TrainConfig) -> str:
    """The command line that runs cfg."""
    default, not_typed = options.TrainConfig(), ("dry_run", "fit")
    typed = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in not_typed}
    return "python train.py " + flags({k: v for k, v in typed.items() if v != getattr(default, k)})


def fit(wish: options.TrainConfig) -> dict:
    """--fit: print what was tried, and the command to type. Raises UserError if nothing fits."""
    memory_size, size, device = wish.fit, parse_size(wish.fit), wish.device
    for name in ("resume", "compile", "show_batch", "dry_run"):
        if getattr(wish, name):
            raise UserError(f"--fit with --{name.replace('_', '-')}: --fit searches, prints and stops; leave one out")
    wish = dataclasses.replace(wish, fit=None, dry_run=True, device=wish.device or "cuda")
    options.resolve(wish)  # it says in one line what is wrong with an option
    if faster := not wish.amp and compute_dtype(wish.device, True) != torch.float32:
        wish = dataclasses.replace(wish, amp=True)
    data_of_run = []

    def read(cfg):  # no option of the search changes what the data become
        if not data_of_run:
            data_of_run.append(prepare.read_data(cfg))
        return data_of_run[0]

    answers = {}  # by command, because the search asks for some configurations twice
    bar = tqdm(desc="predicting", unit=" configurations", disable=not sys.stderr.isatty(), leave=False)

    def left(cfg) -> int:
        steps, in_words, cfg = ask.largest_steps(options.resolve(cfg), wish.data is None, read)
        if (key := command(cfg)) not in answers:
            answers[key] = predictor.ask(cfg, steps).answer(), in_words
            bar.update()
        answer, _ = answers[key]
        if "error" in answer:
            raise UserError(f"--fit: {answer['error']}")
        return size - CONTEXT * (wish.device != "cpu") - (answer["reserved"] or answer["peak"])

    with ask.Predictor() as predictor, bar:
        tried, best = search(wish, left, "+ --amp" if faster else "as it is")
    where = f"a GPU of {memory.human(size)}, {memory.human(CONTEXT)} of which are CUDA's own"
    where = f"{memory.human(size)} of tensors" if wish.device == "cpu" else where
    print(f"{wish.model} on {where}\n{next(iter(answers.values()))[1]}\n")
    width = max(len(text) for text, *_ in tried)
    for text, _, rest in tried:
        print(f"{text:{width}}  {memory.human(size - rest):>10}  {'fits' if rest >= 0 else 'too large'}")
    if best is None:
        least = min(tried, key=lambda t: -t[2])
        raise UserError(f"nothing fits into {memory_size}. The least is {memory.human(size - least[2])}, for "
                        f"{command(dataclasses.replace(least[1], device=device))}; take a smaller model, a shorter "
                        f"--max-length, or a larger GPU")
    rest = next(rest for _, cfg, rest in tried if cfg == best)
    best = dataclasses.replace(best, device=device, dry_run=False)
    beside = f", beside the {memory.human(CONTEXT)} for CUDA" if wish.device != "cpu" else ""
    print(f"\nthis command leaves {memory.human(rest)} free{beside}:\n\n{command(best)}")
    return {"command": command(best), "options": dataclasses.asdict(best), "left": rest}
