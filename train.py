"""Fine-tune a language model on the machine you have: the loop, from top to bottom.

    python train.py                                                          the bundled model and data, a minute on a CPU
    python train.py --model gpt2 --lora-r 8 --amp --ckpt-every 2             GPT-2 124M
    python train.py --model DIR --data FILE --lora-r 8 --amp --batch-size 4  a model folder, your data

Read `train` first: it is the loop. Around it stand the options (TrainConfig), what is checked before anything is loaded
(resolve), the learning rate, evaluation; record.py writes the files that a run leaves in --out.

One step:   for each micro-batch:  loss = sum of token losses / labelled tokens of the *whole step*;  loss.backward()
            unscale (float16 only) -> clip -> AdamW -> zero
The division is by the step's labels, not the micro-batch's: a mean of means weighs a token in a short micro-batch more
than one in a long one, and 8 micro-batches of 1 are then not a batch of 8.
"""
import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tqdm import tqdm

import data
import generate
import lora
import lorainit
import memory
import record
import weights
from hub import ASSETS
from loss import sum_loss
from optim import OPTIMIZERS
from weights import UserError


def option(default, group, help, **extra):
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **extra})


@dataclass
class TrainConfig:
    """Every option there is; the command line is generated from these lines. None means: decided in resolve()."""

    model: str = option("gpt2-nano", "model", "short name (gpt2, llama-3.2-1b, smollm2-135m, ...), org/name or folder")
    bits: int = option(None, "model", "how frozen weights are held (default: as stored if in 8 or 4; --amp: 16; else 32)",
                       choices=(32, 16, 8, 4), type=int)
    device: str = option(None, "model", "cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)", type=str)
    seed: int = option(0, "model", "of the adapters, the order of the data, dropout")
    compile: bool = option(False, "model", "torch.compile every block; needs a C++ compiler, takes a minute to start")
    from_scratch: bool = option(False, "model", "start from random weights: pretraining, with --full")
    lora_r: int = option(8, "lora", "rank r of the adapters")
    lora_alpha: float = option(16.0, "lora", "the adapters' output is scaled by alpha / r")
    lora_dropout: float = option(0.0, "lora", "dropout on the adapters' input")
    lora_targets: str = option(None, "lora", "layers with an adapter, such as q_proj,v_proj or c_attn or all (default: Q "
                               "and V; all for gpt2-nano)", type=str)
    rslora: bool = option(False, "lora", "scale by alpha / sqrt(r) instead")
    lora_init: str = option("default", "lora", "where adapters start: at nothing, at the error of rounding to 8 or 4 bits "
                            "(loftq), at the weights' largest directions (pissa)", choices=lorainit.INITS)
    full: bool = option(False, "lora", "train every weight, no adapters")
    data: str = option(None, "data", "JSON, JSONL, CSV or TXT file (default: the bundled assets/support.jsonl)", type=str)
    val_data: str = option(None, "data", "held-out file (default: val-frac of --data; the bundled data brings its own)",
                           type=str)
    val_frac: float = option(0.1, "data", "share of the rows held out when there is no --val-data")
    template: str = option("auto", "data", "auto (the model's chat template, else alpaca), chat, alpaca or a .jinja file")
    max_length: int = option(None, "data", "positions an example may have, the rest is cut off (default: 512, or all the "
                             "model has)", type=int)
    pack: bool = option(False, "data", "lay the examples of a micro-batch end to end instead of padding them")
    show_batch: bool = option(False, "data", "print the first micro-batch, what is learned marked, and stop")
    amp: bool = option(False, "memory", "matrix products in bfloat16 (float16 on cards without it)")
    ckpt_every: int = option(0, "memory", "recompute every N-th layer's activations in backward (0: none, 1: all)")
    ckpt_offload: bool = option(False, "memory", "what a checkpointed layer keeps waits in host memory")
    batch_size: int = option(8, "memory", "examples a micro-batch")
    grad_accum: int = option(1, "memory", "micro-batches an optimizer step")
    optimizer: str = option("adamw", "memory", "adamw8bit: states of 8 bits; paged_adamw8bit: and in the machine's memory; "
                            "offload_adamw: on the CPU, so that --full --amp has 16-bit weights", choices=tuple(OPTIMIZERS))
    lr: float = option(None, "train", "peak learning rate (default: by the model's width, see default_lr)", type=float)
    schedule: str = option("cosine", "train", "learning rate after warm-up", choices=("cosine", "linear", "constant"))
    warmup_steps: int = option(None, "train", "steps of linear warm-up (default: 5 %% of the steps)", type=int)
    weight_decay: float = option(0.0, "train", "AdamW's decoupled weight decay, on matrices")
    clip: float = option(1.0, "train", "largest norm of the gradient (0: no clipping)")
    epochs: int = option(3, "train", "passes over the data, unless --steps")
    steps: int = option(None, "train", "optimizer steps", type=int)
    eval_every: int = option(None, "train", "steps between evaluations (default: an epoch)", type=int)
    save_every: int = option(None, "train", "steps between saves of what --resume needs (default: as eval-every)", type=int)
    samples: int = option(3, "output", "held-out prompts answered before and after, in samples.md")
    out: str = option(None, "output", "folder of the run (default: runs/MODEL-1, -2, ...)", type=str)
    resume: bool = option(False, "output", "continue the run in --out where its last save left it")


def default_lr(width: int, full: bool) -> float:
    """5e-5 * (2000 / n_embd)^0.781, ten times that for adapters: the fit to many LLaMA runs in Schulman et al.,
    "LoRA Without Regret" (2025). GPT-2 124M: 1.1e-3 with LoRA; LLaMA-7B: 2.9e-4."""
    return float(f"{5e-5 * (1 if full else 10) * (2000 / width) ** 0.781:.2g}")


def resolve(cfg: TrainConfig) -> TrainConfig:
    """Fill in what depends on other options; refuse what cannot apply. Nothing has been read or written yet."""
    cfg = dataclasses.replace(cfg)
    default = TrainConfig()
    for name in ("max_length", "batch_size", "grad_accum", "epochs", "steps", "eval_every", "save_every"):
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("ckpt_every", "warmup_steps", "weight_decay", "clip", "samples", "lr"):
        if (value := getattr(cfg, name)) is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value}: must not be negative")
    if cfg.full:
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "rslora", "lora_init"):
            if getattr(cfg, name) != getattr(default, name):
                raise UserError(f"--{name.replace('_', '-')} has no effect with --full, which trains the weights themselves")
        if cfg.bits in (8, 4) or cfg.bits == 16 and cfg.optimizer != "offload_adamw":
            raise UserError(f"--bits {cfg.bits} with --full: small updates vanish in so few bits. --optimizer offload_adamw "
                            f"keeps float32 masters of 16-bit weights; adapters, without --full, train over {cfg.bits} bits")
    elif cfg.from_scratch:
        raise UserError("--from-scratch needs --full: adapters on frozen random weights learn nothing")
    if cfg.val_data and cfg.val_frac != default.val_frac:
        raise UserError("--val-frac has no effect with --val-data")
    if cfg.data is None:
        if cfg.val_data or cfg.val_frac != default.val_frac:
            raise UserError("--val-data and --val-frac belong to --data; the bundled data brings its own held-out file")
        cfg.data, cfg.val_data = str(ASSETS / "support.jsonl"), str(ASSETS / "support-heldout.jsonl")
    if cfg.steps and cfg.epochs != default.epochs:
        raise UserError("--steps and --epochs both say how long to train; give one")
    if cfg.model == "gpt2-nano" and cfg.lora_targets is None and not cfg.full:
        # 4M parameters know little that Q and V alone could steer, and default_lr fits larger models: see LOG.md.
        cfg.lora_targets, cfg.lr = "all", 5e-3 if cfg.lr is None else cfg.lr
    if cfg.ckpt_offload and not cfg.ckpt_every:
        raise UserError("--ckpt-offload has no effect without --ckpt-every: it moves what a recomputed layer keeps")
    cfg.device = weights.usable_device(cfg.device)
    return cfg


def resolve_bits(cfg: TrainConfig, stored: int | None) -> int:
    """How the frozen weights are held. stored: 8 or 4 for a checkpoint that is quantised already."""
    if stored and cfg.full:
        raise UserError(f"--full: {cfg.model} is stored in {stored} bit; only adapters can be trained on it")
    bits = cfg.bits or stored or (16 if cfg.amp and (not cfg.full or cfg.optimizer == "offload_adamw") else 32)
    if bits < 32 and not cfg.amp:
        raise UserError(f"--bits {bits} needs --amp: such weights are multiplied in 16 bit")
    lorainit.check(cfg.lora_init, bits, stored, cfg.lora_alpha)
    return bits


def learning_rate(step: int, cfg: TrainConfig, total: int) -> float:
    """Of optimizer step 0, 1, ..., total - 1: linear up over warmup_steps, then by the schedule towards 0. A function of
    the step alone: nothing to save, and no micro-batch can advance it."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, total - cfg.warmup_steps)
    return cfg.lr * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.schedule]


def autocast(cfg: TrainConfig):
    """--amp: matrix products in 16 bit.

    Autocast over *float32* weights keeps a 16-bit copy of each for the whole forward, which is how a well-known report
    found that AMP raised its memory: LLaMA-7B, 27 GB of weights + 13.5 GB of copies. Frozen weights need no float32
    master, so with --amp they are held in 16 bit from the start (13.5 GB) and autocast finds nothing to copy.
    """
    if not cfg.amp:
        return nullcontext()
    return torch.autocast(torch.device(cfg.device).type, dtype=weights.half_dtype(cfg.device))


@torch.no_grad()
def evaluate(model, examples, cfg) -> dict:
    """Mean loss over the labelled tokens, and bits per byte of labelled text, which tokenizers do not change."""
    model.eval()
    total = labels = 0
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    for i in range(0, len(order), cfg.batch_size):
        batch = data.collate([examples[j] for j in order[i:i + cfg.batch_size]], cfg.pack, cfg.max_length).to(cfg.device)
        with autocast(cfg):
            total += sum_loss(model.hidden(batch.ids, batch.positions, batch.segments), model.head, batch.targets).item()
        labels += batch.n_labels
    model.train()
    return {"val_loss": total / labels, "val_bits_per_byte": total / math.log(2) / max(1, sum(e.n_bytes for e in examples))}


def why_not_finite(model, cfg, step: int) -> str:
    """The likely cause of a loss or gradient that is not a number: the base weights, the trained ones, or the precision."""
    for n, p in model.named_parameters():
        if not torch.isfinite(p).all():
            if step == 0 or not p.requires_grad:
                return f"the checkpoint is damaged: {n} is not finite"
            return f"training diverged: {n} is not finite; lower --lr (now {cfg.lr:g}) or --clip (now {cfg.clip:g})"
    if cfg.amp:
        kind = str(weights.half_dtype(cfg.device)).removeprefix("torch.")
        return f"the weights are finite, so the {kind} arithmetic overflowed; try without --amp, or a lower --lr"
    return f"the weights are finite, so the activations overflowed; lower --lr (now {cfg.lr:g})"


def main(cfg: TrainConfig) -> dict:
    """Train as `cfg` says; returns what summary.json holds. Raises UserError, and KeyboardInterrupt after saving."""
    if cfg.resume:
        cfg = record.options_of_run(cfg)
    cfg = resolve(cfg)
    folder = weights.find(cfg.model)
    model_config, _, raw_config = weights.read_config(folder)
    cfg.bits = resolve_bits(cfg, weights.stored_bits(folder))
    cfg.max_length = cfg.max_length or min(512, model_config.n_positions)
    if cfg.max_length > model_config.n_positions:
        raise UserError(f"--max-length {cfg.max_length}: {cfg.model} has {model_config.n_positions} positions")
    if cfg.ckpt_every > model_config.n_layer:
        raise UserError(f"--ckpt-every {cfg.ckpt_every} recomputes nothing: {cfg.model} has {model_config.n_layer} layers")
    cfg.lr = default_lr(model_config.n_embd, cfg.full) if cfg.lr is None else cfg.lr

    tokenizer = data.load_tokenizer(cfg.model)
    template = data.load_template(cfg.template, tokenizer)
    rows = data.read_rows(cfg.data)
    rows, val_rows = (rows, data.read_rows(cfg.val_data)) if cfg.val_data else data.split(rows, cfg.val_frac, cfg.seed)
    train_set, val_set = (data.build(r, tokenizer, template, cfg.max_length) for r in (rows, val_rows))
    if cfg.show_batch:
        first = data.plan([len(e.ids) for e in train_set.examples], cfg.batch_size, cfg.grad_accum, cfg.seed, 0)[0][0]
        print(data.show([train_set.examples[i] for i in first], tokenizer, sys.stdout.isatty()))
        return {}
    steps_per_epoch = math.ceil(len(train_set) / (cfg.batch_size * cfg.grad_accum))
    cfg.steps = cfg.steps or cfg.epochs * steps_per_epoch
    cfg.warmup_steps = cfg.steps // 20 if cfg.warmup_steps is None else cfg.warmup_steps
    if cfg.warmup_steps >= cfg.steps:
        raise UserError(f"--warmup-steps {cfg.warmup_steps}: the run has {cfg.steps} steps, the full rate is never reached")
    cfg.eval_every = cfg.eval_every or steps_per_epoch
    cfg.save_every = cfg.save_every or cfg.eval_every
    out = record.prepare_out(cfg)

    torch.manual_seed(cfg.seed)
    offload = cfg.full and cfg.optimizer == "offload_adamw"  # float32 on the CPU first: the masters
    place, bits = ("cpu", 32) if offload else (cfg.device, cfg.bits)
    model = weights.from_scratch(cfg.model, place, cfg.seed) if cfg.from_scratch else weights.load(cfg.model, bits, place)
    if cfg.full:
        model.requires_grad_(True)
    else:
        targets = cfg.lora_targets.split(",") if cfg.lora_targets else None
        init = "default" if cfg.resume else cfg.lora_init  # the start comes with the state
        lora.inject(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, targets, cfg.rslora, init)
    model.ckpt_every, model.ckpt_offload = cfg.ckpt_every, cfg.ckpt_offload
    if cfg.ckpt_offload and torch.device(cfg.device).type != "cuda":
        print(f"--ckpt-offload: on {cfg.device} host and device memory are the same; nothing moves, nothing is saved")
    run = Run(cfg, out, model, tokenizer, template, train_set, val_set, raw_config)
    params = memory.count(model)
    print(f"{cfg.model}: {params['total']:,} parameters in {memory.human(params['bytes'])}, "
          f"{params['trainable']:,} trainable ({params['percent']:.4f} %)")
    for name, d in (("training", train_set), ("held-out", val_set)):
        print(f"{name}: {len(d):,} examples, {d.n_labels:,} labelled tokens of {sum(len(e.ids) for e in d.examples):,}"
              + (f"; {d.n_dropped} rows dropped (nothing to learn)" if d.n_dropped else "")
              + (f"; {d.n_truncated} cut at {cfg.max_length}" if d.n_truncated else ""))
    if not cfg.resume:
        record.write_config(out, cfg)
    print(f"{cfg.steps} steps of {cfg.batch_size} x {cfg.grad_accum}, lr {cfg.lr:g}, {cfg.device}"
          + (f", {str(weights.half_dtype(cfg.device)).removeprefix('torch.')}" if cfg.amp else "") + f" -> {out}")
    return run.train(params)


class Run:
    """The state of one training run: the model, the optimizer, where it stands, and what it has seen."""

    def __init__(self, cfg, out, model, tokenizer, template, train_set, val_set, raw_config):
        self.cfg, self.out, self.model, self.tokenizer, self.template = cfg, out, model, tokenizer, template
        self.train_set, self.val_set, self.raw_config = train_set, val_set, raw_config
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in trainable.values() if p.dim() >= 2]
        vectors = [p for p in trainable.values() if p.dim() < 2]  # norms and biases are not decayed
        where = {} if cfg.optimizer != "offload_adamw" else {
            "device": cfg.device, "dtype": weights.half_dtype(cfg.device) if cfg.full and cfg.bits == 16 else torch.float32}
        self.optimizer = OPTIMIZERS[cfg.optimizer]([{"params": matrices, "weight_decay": cfg.weight_decay},
                                                    {"params": vectors, "weight_decay": 0.0}], cfg.lr, **where)
        self.trainable = {n: self.optimizer.master(p) for n, p in trainable.items()}  # clipped and saved
        # float16 ends at 6e-5 on the small side, where gradients live: multiply the loss by a large number (the scale),
        # divide the gradients by it before clipping; halve it and skip the step whenever something overflows.
        half = cfg.amp and weights.half_dtype(cfg.device) == torch.float16
        self.scaler = torch.amp.GradScaler(torch.device(cfg.device).type, enabled=half)
        self.step, self.seen = 0, {"wall_s": 0.0, "loss_first": None, "loss_last": None, "val_before": None,
                                   "val_after": None, "val_best": None, "samples": [], "skipped": 0}
        if cfg.resume:
            self.load_state()
        self.interrupted = False

    def micro_batches(self, step: int) -> list:
        epoch, i = divmod(step, math.ceil(len(self.train_set) / (self.cfg.batch_size * self.cfg.grad_accum)))
        if getattr(self, "planned", None) != epoch:
            lengths = [len(e.ids) for e in self.train_set.examples]
            self.plan = data.plan(lengths, self.cfg.batch_size, self.cfg.grad_accum, self.cfg.seed, epoch)
            self.planned = epoch
        examples = self.train_set.examples
        return [data.collate([examples[j] for j in m], self.cfg.pack, self.cfg.max_length) for m in self.plan[i]]

    def train_step(self) -> dict:
        """One optimizer step over its micro-batches; returns the line for metrics.jsonl."""
        cfg, model, start = self.cfg, self.model, time.perf_counter()
        batches = self.micro_batches(self.step)
        n_labels = sum(b.n_labels for b in batches)
        lr = learning_rate(self.step, cfg, cfg.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss_sum = 0.0
        for batch in batches:  # each backward frees its graph: memory does not grow with grad_accum
            batch.to(cfg.device)
            with autocast(cfg):
                hidden = model.hidden(batch.ids, batch.positions, batch.segments)
                loss = sum_loss(hidden, model.head, batch.targets) / n_labels
            loss_sum += loss.item()
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)  # before clipping: the threshold is in units of the true gradient
        grad_norm = torch.nn.utils.clip_grad_norm_(self.trainable.values(), cfg.clip or math.inf).item()
        if not math.isfinite(loss_sum) or not (math.isfinite(grad_norm) or self.may_skip()):
            raise UserError(f"step {self.step + 1}: loss {loss_sum}, gradient norm {grad_norm}: "
                            f"{why_not_finite(model, cfg, self.step)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        tokens, step_s = sum(b.n_tokens for b in batches), time.perf_counter() - start
        return {"step": self.step, "loss": loss_sum, "lr": lr, "grad_norm": grad_norm, "tokens": tokens,
                "examples": sum(b.n_examples for b in batches), "step_s": step_s, "tokens_per_s": tokens / step_s}

    def may_skip(self) -> bool:
        """A float16 step whose gradient overflowed is skipped at a halved scale; 25 in a row are not the scale's fault."""
        self.seen["skipped"] += 1
        return self.scaler.is_enabled() and self.seen["skipped"] < 25

    def train(self, params: dict) -> dict:
        cfg, model, seen = self.cfg, self.model, self.seen
        started = time.perf_counter() - seen["wall_s"]
        prompts = [p for p in map(data.prompt_of, self.val_set.rows) if p]
        prompts = prompts[::max(1, len(prompts) // max(1, cfg.samples))][:cfg.samples]
        if not seen["samples"]:
            seen["samples"] = self.sample(prompts)
        if cfg.compile:
            for block in model.blocks:
                block.compile(dynamic=True)
        if seen["val_before"] is None:
            self.evaluate("val_before")
        if torch.device(cfg.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(cfg.device)
        speed, ledger, first = [], None, self.step
        measured = first + 1 if cfg.steps > first + 1 else first  # AdamW's state exists from the second step on
        model.train()
        bar = tqdm(total=cfg.steps, initial=self.step, disable=not sys.stderr.isatty(), desc="training", unit="step")
        with InterruptFlag() as interrupt:
            while self.step < cfg.steps:
                # The ledger watches every operator of one step, where CUDA's allocator does not count for us.
                if self.step == measured and torch.device(cfg.device).type != "cuda" and not cfg.compile:
                    with memory.Ledger(model, self.optimizer) as ledger:
                        line = self.train_step()
                else:
                    line = self.train_step()
                    if self.step > first + 1:
                        speed.append(line)
                seen["loss_first"] = line["loss"] if seen["loss_first"] is None else seen["loss_first"]
                seen["loss_last"] = line["loss"]
                seen["skipped"] = seen["skipped"] if not math.isfinite(line["grad_norm"]) else 0
                record.log(self.out, line)
                peak = self.peak(ledger)
                bar.set_postfix_str(f"loss {line['loss']:.3f}, lr {line['lr']:.1e}, {line['tokens_per_s']:,.0f} tok/s, "
                                    f"peak {memory.human(peak)}")
                bar.update()
                if bar.disable and (self.step % max(1, cfg.steps // 20) == 0 or self.step == cfg.steps):
                    print(f"step {self.step}/{cfg.steps}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  "
                          f"{line['tokens_per_s']:,.0f} tokens/s  peak {memory.human(peak)}", flush=True)
                if self.step % cfg.eval_every == 0 or self.step == cfg.steps:
                    self.evaluate("val_after")
                    bar.write(f"step {self.step}: held-out loss {seen['val_after']:.4f} (best {seen['val_best']:.4f})",
                              file=sys.stdout)
                seen["wall_s"] = time.perf_counter() - started
                if self.step % cfg.save_every == 0 or self.step == cfg.steps or interrupt.seen:
                    self.save_state()
                if interrupt.seen and self.step < cfg.steps:
                    bar.close()
                    print(f"interrupted after step {self.step}; continue with: --out {self.out} --resume")
                    raise KeyboardInterrupt
        bar.close()
        after = self.sample(prompts)
        record.write_samples(self.out / "samples.md", cfg, prompts, seen["samples"], after)
        seen["wall_s"] = time.perf_counter() - started
        cuda = memory.cuda_peak(cfg.device)
        summary = {
            "params": {k: params[k] for k in ("total", "trainable", "percent")},
            "memory": {"measured_peak": self.peak(ledger), "reserved": cuda[1] if cuda else None,
                       "rss_peak": memory.rss_peak(), "by_category": ledger.at_peak if ledger else None},
            "loss": {"first": seen["loss_first"], "last": seen["loss_last"], "val_before": seen["val_before"],
                     "val_after": seen["val_after"], "val_best": seen["val_best"]},
            "tokens_per_s": record.per_second(speed, "tokens"), "examples_per_s": record.per_second(speed, "examples"),
            "wall_s": seen["wall_s"], "steps": self.step,
        }
        weights.write_text(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        record.plot_losses(self.out)
        record.report(summary, self.out)
        return summary

    def peak(self, ledger) -> int | None:
        cuda = memory.cuda_peak(self.cfg.device)
        return cuda[0] if cuda else ledger.peak if ledger else None

    def evaluate(self, key: str):
        result = evaluate(self.model, self.val_set.examples, self.cfg)
        self.seen[key] = result["val_loss"]
        record.log(self.out, {"step": self.step, **result})
        if not math.isfinite(result["val_loss"]):
            raise UserError(f"step {self.step}: held-out loss {result['val_loss']}: "
                            f"{why_not_finite(self.model, self.cfg, self.step)}")
        if key == "val_after" and (self.seen["val_best"] is None or result["val_loss"] < self.seen["val_best"]):
            self.seen["val_best"] = result["val_loss"]
            self.export("best")

    def sample(self, prompts) -> list[str]:
        if not prompts:
            return []
        texts = []
        room = max(1, self.model.config.n_positions - 64)
        with autocast(self.cfg):
            for prompt, _ in prompts:
                ids = data.prompt_ids(prompt, self.template, self.tokenizer)[-room:]
                texts.append(generate.reply(self.model, self.tokenizer, ids, max_new_tokens=64, temperature=0))
        return texts

    # ------------------------------------------------------------------------------------------ files

    def export(self, name: str):
        """adapter/ or best/ in PEFT's layout (--full: a model folder), with the template and end token beside it."""
        folder = self.out / name
        if self.cfg.full:
            dtype = self.raw_config.get("dtype") or self.raw_config.get("torch_dtype")  # the newer and the older key
            weights.save(self.model, folder, dtype if dtype in weights.DTYPES else "float32", self.trainable)
        else:
            lora.save(self.model, folder)
        weights.write_text(folder / "chat_template.jinja", self.template)
        ends = {"eos_token_id": sorted(self.tokenizer.stop_ids)}
        weights.write_text(folder / "generation_config.json", json.dumps(ends) + "\n")

    def save_state(self):
        """What --resume needs, in one file, so that it appears whole: weights, AdamW's moments, RNG, and the numbers."""
        tensors = {f"param/{n}": p.detach() for n, p in self.trainable.items()}
        for n, p in self.trainable.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer/{key}/{n}"] = value
        for n, m in lora.adapters(self.model).items():
            if m.start_A is not None:
                tensors |= {f"start/{n}.A": m.start_A, f"start/{n}.B": m.start_B}
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.device(self.cfg.device).type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.cfg.device)
        numbers = {"step": self.step, "seen": self.seen, "scaler": self.scaler.state_dict()}
        weights.write_tensors(self.out / "state" / "state.safetensors", {k: v.cpu() for k, v in tensors.items()},
                              {"numbers": json.dumps(numbers)})
        self.export("model" if self.cfg.full else "adapter")

    def load_state(self):
        path = self.out / "state" / "state.safetensors"
        with weights.opened(path) as f:
            numbers, names = json.loads(f.metadata()["numbers"]), set(f.keys())
            with torch.no_grad():
                for n, p in self.trainable.items():
                    self.model.get_parameter(n).copy_(p.copy_(f.get_tensor(f"param/{n}")))
                    if f"optimizer/step/{n}" in names:  # (not if every step so far was skipped)
                        for key, value in self.optimizer.init_state(p).items():
                            value.copy_(f.get_tensor(f"optimizer/{key}/{n}"))
            for n, m in lora.adapters(self.model).items():
                if f"start/{n}.A" in names:
                    m.keep_start(f.get_tensor(f"start/{n}.A"), f.get_tensor(f"start/{n}.B"))
            lorainit.restore(self.model, lora.adapters(self.model), self.cfg.lora_init)
            torch.set_rng_state(f.get_tensor("rng/cpu"))
            if "rng/cuda" in names and torch.device(self.cfg.device).type == "cuda":
                torch.cuda.set_rng_state(f.get_tensor("rng/cuda"), self.cfg.device)
        self.step, self.seen = numbers["step"], numbers["seen"]
        self.scaler.load_state_dict(numbers["scaler"])
        record.rewind_log(self.out, self.step)
        print(f"resumed {self.out} after step {self.step}")


class InterruptFlag:
    """Ctrl-C during the loop lets the step finish and the loop save; a second Ctrl-C stops at once."""

    def __enter__(self):
        self.seen = False
        try:
            self.before = signal.signal(signal.SIGINT, self.note)
        except ValueError:  # not the main thread (a notebook's kernel, a test): leave Ctrl-C as it is
            self.before = None
        return self

    def note(self, signum, frame):
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *error):
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def parse(argv=None) -> TrainConfig:
    p = argparse.ArgumentParser(prog="train.py", description="Fine-tune a language model, every byte accounted for.")
    groups = {}
    for f in dataclasses.fields(TrainConfig):
        group = groups.setdefault(f.metadata["group"], p.add_argument_group(f.metadata["group"]))
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.type is bool:
            group.add_argument(name, action="store_true", help=text)
        else:
            text += "" if f.default is None else " (default: %(default)s)"
            group.add_argument(name, type=f.metadata.get("type", f.type), default=f.default, help=text,
                               choices=f.metadata.get("choices"), metavar=None if "choices" in f.metadata else "X")
    return TrainConfig(**vars(p.parse_args(argv)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(parse())
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
