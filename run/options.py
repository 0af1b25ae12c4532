"""Every option of train.py: its default, what depends on it, and which combinations are refused.

The dataclass TrainConfig is the only list of options. The command line, a run's config.json and the comparison of --resume
are made from it. Options that contradict each other, or an option that has no effect beside the others, stop the run before
the weights are loaded. None is silently ignored.
"""
import argparse
import copy
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from errors import UserError
from files import peft_files
from files.hub import ASSETS
from methods import METHODS, prompt
from run import trackers
from techniques import lora_init
from techniques.compilation import check_compiler
from techniques.device import compute_dtype, usable_device
from techniques.optim import OPTIMIZERS


def option(default, group, help, **extra):
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **extra})


@dataclass
class TrainConfig:
    """Every option; the command line is made from these lines. None: it depends on other options, the model or the data,
    and is filled in later (resolve, resolve_for, and resolve_steps in prepare.py)."""

    model: str = option("gpt2-nano", "model", "short name (gpt2, llama-3.2-1b, smollm2-135m, ...), org/name or folder")
    bits: int = option(None, "model", "bits of a frozen weight (default: 8 or 4 if the checkpoint is stored so; else 16 "
                       "with --amp, 32 without)", choices=(32, 16, 8, 4), type=int)
    device: str = option(None, "model", "cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)", type=str)
    seed: int = option(0, "model", "seed of the random start, the held-out rows, the order of the data, and dropout")
    compile: bool = option(False, "model", "torch.compile every block; needs a C++ compiler (on a GPU Triton and gcc), "
                          "takes a minute to start, the next time half of it")
    from_scratch: bool = option(False, "model", "start from random weights (pretraining); needs --full")
    adapter: str = option(None, "lora", "start from the adapter in this folder, trained here or by PEFT, with its rank, "
                          "alpha and layers; if it was trained in 8 or 4 bits, in these", type=str)
    method: str = option("lora", "lora", "what is trained beside the frozen weights (see methods/__init__.py)",
                         choices=METHODS)
    lora_r: int = option(8, "lora", "rank r of the adapters")
    lora_alpha: float = option(16.0, "lora", "the adapters' output is scaled by alpha / r")
    lora_dropout: float = option(0.0, "lora", "dropout on the adapters' input")
    lora_targets: str = option(None, "lora", "layers with an adapter, such as q_proj,v_proj or c_attn or all (default: Q "
                               "and V; all for gpt2-nano)", type=str)
    rslora: bool = option(False, "lora", "scale by alpha / sqrt(r) instead of alpha / r")
    lora_init: str = option("default", "lora", "where adapters start: at zero, at the error of rounding to 8 or 4 bits "
                            "(loftq), at the weights' largest directions (pissa)", choices=lora_init.INITS)
    lora_plus: float = option(None, "lora", "LoRA+: B learns at this many times the rate of A; the paper has 16", type=float)
    bottleneck: int = option(None, "lora", "inner width of --method bottleneck (default: 64)", type=int)
    virtual_tokens: int = option(None, "lora", "of --method prompt and prefix (default: 20)", type=int)
    virtual_init: str = option(None, "lora", "where virtual tokens start: random, words (some, at random), or this text "
                               "(default: words)", type=str)
    full: bool = option(False, "lora", "train every weight, no adapters")
    data: str = option(None, "data", "JSON, JSONL, CSV, TXT or Parquet file, or its .gz; a folder of them; or several, with "
                       "weights: a.jsonl:2,b.jsonl (default: the bundled assets/support.jsonl)", type=str)
    val_data: str = option(None, "data", "held-out file, or several with commas: best/ and --patience go by the first "
                           "(default: --val-frac of --data; the bundled data has its own)", type=str)
    val_frac: float = option(0.1, "data", "share of the rows held out when there is no --val-data")
    columns: str = option(None, "data", "names of columns: instruction=question,response=answer (KNOWN=YOURS)", type=str)
    skip_bad_rows: bool = option(False, "data", "leave out rows that cannot be read, and count them")
    task_column: str = option(None, "data", "train an adapter for each task: the column with the name of a row's task",
                              type=str)
    shared_adapter: bool = option(False, "data", "with --task-column: one more adapter, which all tasks train")
    no_cache: bool = option(False, "data", "tokenise the data anew, and do not keep the result (see files/token_cache.py)")
    template: str = option("auto", "data", "auto (the model's chat template, else alpaca), chat, alpaca or a .jinja file")
    max_length: int = option(None, "data", "most positions of an example, the rest is cut off (default: 512, or the model's "
                             "positions if they are fewer)", type=int)
    pack: bool = option(False, "data", "lay the examples of a micro-batch end to end instead of padding them")
    show_batch: bool = option(False, "data", "print the first micro-batch, with the labelled tokens marked, and stop")
    amp: bool = option(False, "memory", "matrix products in bfloat16 (float16 on a GPU without bfloat16), if the device is "
                       "faster so; else --amp only sets --bits 16")
    ckpt_every: int = option(0, "memory", "recompute every N-th layer in backward; keep only its input (0: none, 1: all)")
    ckpt_offload: bool = option(False, "memory", "the input that a recomputed layer keeps waits in host memory")
    batch_size: int = option(8, "memory", "examples a micro-batch")
    grad_accum: int = option(1, "memory", "micro-batches an optimizer step")
    dry_run: bool = option(False, "memory", "predict the peak and stop: nothing is downloaded, no weights are read")
    fit: str = option(None, "memory", "a GPU's memory, such as 8GB: find the options that fit and cost least time, and stop",
                      type=str)
    optimizer: str = option("adamw", "memory", "adamw8bit: states in 8 bits; paged_adamw8bit: these states in host memory; "
                            "offload_adamw: on the CPU with float32 weights, so that --full --amp has 16-bit weights on the "
                            "GPU", choices=tuple(OPTIMIZERS))
    lr: float = option(None, "train", "highest learning rate (default: by the model's width)", type=float)
    schedule: str = option("cosine", "train", "learning rate after warm-up", choices=("cosine", "linear", "constant"))
    warmup_steps: int = option(None, "train", "steps of linear warm-up (default: 5 %% of the steps)", type=int)
    weight_decay: float = option(0.0, "train", "AdamW's decoupled weight decay, on matrices")
    clip: float = option(1.0, "train", "largest norm of the gradient (0: no clipping)")
    epochs: int = option(3, "train", "passes over the data, unless --steps is given")
    steps: int = option(None, "train", "optimizer steps (default: from --epochs)", type=int)
    eval_every: int = option(None, "train", "steps between evaluations (default: an epoch); the last step has one too, in "
                             "place of one that is at most half as many steps away", type=int)
    eval_examples: int = option(None, "train", "held-out examples of an evaluation, the same each time (default: all)",
                                type=int)
    patience: int = option(None, "train", "stop after N evaluations in a row without a lower held-out loss (default: never)",
                           type=int)
    save_every: int = option(None, "train", "steps between saves of what --resume needs (default: --eval-every)", type=int)
    keep: int = option(1, "output", "states kept in state/: the newest, and the last ones before it")
    samples: int = option(3, "output", "held-out prompts answered before and after training, in samples.md")
    sample_every: int = option(None, "output", "answer these prompts every N steps, too (default: never)", type=int)
    compare: bool = option(False, "output", "end with a comparison of best/ and the base model on the held-out examples, in "
                           "compare/ (see compare.py)")
    report: str = option(None, "output", "send metrics.jsonl's lines also to tensorboard, wandb, or tensorboard,wandb",
                         type=str)
    out: str = option(None, "output", "folder of the run (default: runs/MODEL-1, -2, ...)", type=str)
    resume: bool = option(False, "output", "continue the run in --out from its last save; --steps, --epochs, --lr and "
                         "--schedule may be others: the schedule is computed anew, over all steps")
    tasks: ClassVar[tuple[str, ...]] = ()  # the names of the adapters with --task-column, once the data is read
    given: ClassVar[frozenset[str]] = frozenset()  # the options that the command line names, also those at their defaults


# What is trained by other methods moves at multiples of LoRA's rate. `python -m bench methods --rates` tried them.
TIMES = {"ia3": 10, "prompt": 10, "prefix": 10}


def default_lr(width: int, full: bool, method: str = "lora") -> float:
    """5e-5 * (2000 / width)^0.781 with --full, ten times that for adapters. width: the model's n_embd.

    Schulman et al., "LoRA Without Regret" (2025), fitted it to LLaMA runs. With LoRA: GPT-2 124M 1.1e-3, LLaMA-7B 2.9e-4.
    """
    return float(f"{5e-5 * (1 if full else 10) * TIMES.get(method, 1) * (2000 / width) ** 0.781:.2g}")


RANGES = [  # options, whether a value is possible (no comparison with nan is true), and the words of the refusal
    ("max_length batch_size grad_accum epochs steps eval_every save_every eval_examples patience keep sample_every",
     lambda n: n >= 1, "must be at least 1"),
    ("bottleneck virtual_tokens", lambda n: 1 <= n <= 1_000_000, "must be from 1 to 1,000,000"),
    ("lora_plus", lambda x: 0 < x <= 1e6, "must be above 0 and at most 1,000,000"),
    ("lora_r", lambda n: n >= 1, "the rank must be at least 1 (or train every weight with --full)"),
    ("batch_size", lambda n: n <= 10_000, "must be at most 10,000; for larger steps there is --grad-accum"),
    ("ckpt_every warmup_steps weight_decay clip samples", lambda x: 0 <= x < math.inf,
     "must not be negative, nan or infinite"),
    ("lr lora_alpha", lambda x: 0 < x < math.inf, "must be a number above 0, or nothing is learned"),
    ("lr lora_alpha weight_decay clip", lambda x: x <= 1e9, "must be at most 1e9; float32 has no room for much more"),
    ("lora_dropout", lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
    ("val_frac", lambda x: 0 <= x <= 1, "must be from 0 to 1"),
    ("seed", lambda n: 0 <= n < 2**32, "must be from 0 to 4294967295"),
    ("max_length grad_accum epochs steps eval_every save_every ckpt_every warmup_steps samples lora_r eval_examples "
     "patience keep sample_every",
     lambda n: n < 2**31, "must be below 2147483648")]


def check_ranges(cfg: TrainConfig, where: str = ""):
    """Raises UserError for a value that is not possible; its message begins with `where`."""
    for names, is_possible, words in RANGES:
        for name in names.split():
            if (value := getattr(cfg, name)) is not None and not is_possible(value):
                raise UserError(f"{where}--{name.replace('_', '-')} {value}: {words}")


def resolve(cfg: TrainConfig) -> TrainConfig:
    """Fill in what depends on other options, and refuse what does not go together. Reads no file. Raises UserError."""
    cfg = copy.copy(cfg)  # (dataclasses.replace would lose `given`)
    default = TrainConfig()
    check_ranges(cfg)
    if cfg.full:
        if cfg.adapter:
            raise UserError("--adapter with --full: merge the adapter first (python export.py merge), then train the merged "
                            "model with --full")
        for name in ("method", *OF_METHOD):
            if getattr(cfg, name) != getattr(default, name):
                raise UserError(f"--{name.replace('_', '-')} has no effect with --full, which trains the weights themselves")
        if cfg.bits in (8, 4) or cfg.bits == 16 and cfg.optimizer != "offload_adamw":
            raise UserError(f"--bits {cfg.bits} with --full: small updates vanish in so few bits. --optimizer offload_adamw "
                            f"keeps float32 masters of 16-bit weights; adapters, without --full, train over {cfg.bits} bits")
    elif cfg.from_scratch:
        raise UserError("--from-scratch needs --full: adapters on frozen random weights learn nothing")
    if cfg.shared_adapter and not cfg.task_column:
        raise UserError("--shared-adapter has no effect without --task-column")
    if cfg.task_column:
        for name, is_given in {"adapter": cfg.adapter, "full": cfg.full, "skip_bad_rows": cfg.skip_bad_rows,
                               "lora_init": cfg.lora_init != "default", "method": cfg.method != "lora"}.items():
            if is_given:
                raise UserError(f"--task-column trains new LoRA adapters side by side, on rows that are all good; leave "
                                f"--{name.replace('_', '-')} out")
    if not cfg.adapter:  # (else the adapter's own method is known first: take_over)
        resolve_method(cfg)
    if cfg.val_data and cfg.val_frac != default.val_frac:
        raise UserError("--val-frac has no effect with --val-data")
    if cfg.data is None:
        if cfg.val_data or cfg.val_frac != default.val_frac:
            raise UserError("--val-data and --val-frac belong to --data; the bundled data brings its own held-out file")
        cfg.data, cfg.val_data = str(ASSETS / "support.jsonl"), str(ASSETS / "support-heldout.jsonl")
    if cfg.steps and cfg.epochs != default.epochs:
        raise UserError("--steps and --epochs both say how long to train; give one")
    if cfg.model == "gpt2-nano" and cfg.lora_targets is None and not cfg.full and cfg.method in ("lora", "dora"):
        # With 4M parameters, adapters on Q and V alone learn too little, and default_lr fits larger models. See LOG.md.
        cfg.lora_targets, cfg.lr = None if cfg.adapter else "all", 5e-3 if cfg.lr is None else cfg.lr
    if cfg.compare and (cfg.full or cfg.task_column):
        raise UserError("--compare puts one adapter on its base model, and with " + (
            "--full there is none; leave it out" if cfg.full else
            "--task-column there are several; leave it out, and use python compare.py --adapter NAME=DIR ..."))
    if cfg.sample_every and not cfg.samples:
        raise UserError("--sample-every has no effect with --samples 0")
    trackers.check(cfg.report)
    if cfg.ckpt_offload and not cfg.ckpt_every:
        raise UserError("--ckpt-offload has no effect without --ckpt-every: it moves what a recomputed layer keeps")
    if cfg.dry_run and (cfg.compile or cfg.show_batch):
        raise UserError("--dry-run cannot predict --compile, which changes what is kept for backward; leave it out"
                        if cfg.compile else "--dry-run and --show-batch both stop the run; give one")
    if not (cfg.dry_run and cfg.device):
        cfg.device = usable_device(cfg.device)
    elif not re.fullmatch(r"(cpu|cuda|mps)(:[0-9]{1,2})?", cfg.device):  # the predicted GPU need not be in this machine
        raise UserError(f"--device {cfg.device}: only cpu, cuda and mps")
    if cfg.compile:
        check_compiler(cfg.device)
    return cfg


def resolve_for(cfg: TrainConfig, config, stored: int | None):
    """Fill in what depends on the model. config: its Config. stored: 8 or 4 if its checkpoint is quantised.

    Raises UserError.
    """
    if cfg.adapter and not cfg.resume:
        take_over(cfg)
        resolve_method(cfg)
    cfg.bits = resolve_bits(cfg, stored)
    positions, virtual = config.n_positions - (cfg.virtual_tokens or 0), ""
    if cfg.virtual_tokens:
        prompt.check(config, cfg.virtual_tokens, cfg.adapter or "")
        virtual = f", of which --virtual-tokens takes {cfg.virtual_tokens}"
    cfg.max_length = cfg.max_length or min(512, positions)
    if cfg.max_length > positions:
        raise UserError(f"--max-length {cfg.max_length}: {cfg.model} has {config.n_positions} positions{virtual}")
    if cfg.ckpt_every > config.n_layer:
        raise UserError(f"--ckpt-every {cfg.ckpt_every} recomputes nothing: {cfg.model} has {config.n_layer} layers")
    # Each layer has n_embd inputs or outputs: its rank is at most that.
    if not cfg.full and not cfg.adapter and cfg.method in ("lora", "dora") and cfg.lora_r > config.n_embd:
        raise UserError(f"--lora-r {cfg.lora_r}: {cfg.model} is {config.n_embd} wide; an adapter of a higher rank has more "
                        f"parameters and learns no more")
    cfg.lr = default_lr(config.n_embd, cfg.full, cfg.method) if cfg.lr is None else cfg.lr


OF_METHOD = {  # options and the methods that have them
    "lora_r": ("lora", "dora"), "lora_alpha": ("lora", "dora"), "lora_dropout": ("lora", "dora"),
    "lora_targets": ("lora", "dora"), "rslora": ("lora", "dora"), "lora_plus": ("lora", "dora"), "lora_init": ("lora",),
    "bottleneck": ("bottleneck",), "virtual_tokens": ("prompt", "prefix"), "virtual_init": ("prompt", "prefix")}


def resolve_method(cfg: TrainConfig):
    """Refuse the options of another --method, and fill in those of this one. Raises UserError."""
    default = TrainConfig()
    for name, methods in OF_METHOD.items():
        if cfg.method not in methods and getattr(cfg, name) != getattr(default, name):
            raise UserError(f"--{name.replace('_', '-')} has no effect with --method {cfg.method}, only with "
                            f"{' and '.join(methods)}")
    if cfg.method == "bottleneck":
        cfg.bottleneck = cfg.bottleneck or 64
    if cfg.method in ("prompt", "prefix"):
        cfg.virtual_tokens = cfg.virtual_tokens or 20
        cfg.virtual_init = "words" if cfg.virtual_init is None else cfg.virtual_init
    if cfg.method == "prefix" and cfg.compile:
        raise UserError("--compile with --method prefix: a block that is given a prefix is not compiled; leave one out")


def take_over(cfg: TrainConfig):
    """--adapter: set the options of LoRA as the adapter has them. Raises UserError for one that was given otherwise."""
    for name, its in peft_files.options(cfg.adapter, cfg.model).items():
        value = getattr(cfg, name)
        given = name in cfg.given or value != getattr(TrainConfig(), name)
        if name == "lora_dropout" and given:
            continue  # it is of this training, not of the adapter
        if given and value != its and not (isinstance(its, float) and math.isclose(value, its)):
            raise UserError(f"--{name.replace('_', '-')} {value}: the adapter in {cfg.adapter} has {its}; leave it out")
        setattr(cfg, name, its)


def resolve_bits(cfg: TrainConfig, stored: int | None) -> int:
    """The bits of a frozen weight. Raises UserError."""
    if stored and cfg.full:
        raise UserError(f"--full: {cfg.model} is stored in {stored} bit; only adapters can be trained on it")
    half_products = compute_dtype(cfg.device, cfg.amp) != torch.float32
    in_16_bit = half_products and cfg.optimizer == "offload_adamw" if cfg.full else cfg.amp
    trained = peft_files.trained_with(cfg.adapter)[1] if cfg.adapter else None
    bits = cfg.bits or stored or (trained if trained in (8, 4) else None) or (16 if in_16_bit else 32)
    if bits == 16 and cfg.full and not half_products:
        raise UserError("--bits 16 with --full: products run in float32 here, and only frozen weights are converted for a "
                        "product; leave --bits out")
    lora_init.check(cfg.lora_init, bits, stored, cfg.lora_alpha)
    return bits


def parse(argv=None) -> TrainConfig:
    """The command line -> TrainConfig, with a group of options for each `group` of its fields."""
    p = argparse.ArgumentParser(prog="train.py", description="Fine-tune a language model, and account for every byte.",
                                argument_default=argparse.SUPPRESS)
    groups = {}
    for f in dataclasses.fields(TrainConfig):
        group = groups.setdefault(f.metadata["group"], p.add_argument_group(f.metadata["group"]))
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            group.add_argument(name, action="store_true", help=text)
        else:
            text += "" if f.default is None else f" (default: {f.default})"
            group.add_argument(name, type=f.metadata.get("type", f.type), help=text, choices=f.metadata.get("choices"),
                               metavar=None if "choices" in f.metadata else "X")
    given = vars(p.parse_args(argv))
    cfg = TrainConfig(**given)
    cfg.given = frozenset(given)
    return cfg
