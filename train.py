"""Fine-tune a language model on the machine you have: the loop, from top to bottom.

    python train.py                                                          the bundled model and data, a minute on a CPU
    python train.py --model gpt2 --lora-r 8 --amp --ckpt-every 2             GPT-2 124M
    python train.py --model DIR --data FILE --lora-r 8 --amp --batch-size 4  a model folder, your data

Read `train_step` first, then `train`: the loop. Around them stand the learning rate, evaluation, saving and resuming;
options.py has the options and what they refuse, record.py the files that a run leaves in --out.

One step:   for each micro-batch:  loss = sum of token losses / labelled tokens of the *whole step*;  loss.backward()
            unscale (float16 only) -> clip -> AdamW -> zero
The division is by the step's labels, not the micro-batch's: a mean of means weighs a token in a short micro-batch more
than one in a long one, and 8 micro-batches of 1 are then not a batch of 8.
"""
import dataclasses
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext

import torch
from tqdm import tqdm

import data
import generate
from files import hub
import lora
from techniques import lora_init
import memory
from ledger import predict
from techniques import quant
from run import record
from files import weights
from techniques.loss import sum_loss
from techniques.optim import OPTIMIZERS
from run.options import TrainConfig, parse, resolve, resolve_for
from errors import UserError


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
    if cfg.dry_run:
        return dry_run(cfg)
    folder = weights.find(cfg.model)
    model_config, _, raw_config = weights.read_config(folder)
    resolve_for(cfg, model_config, weights.stored_bits(folder))
    tokenizer, template, train_set, val_set = read_data(cfg)
    plan = data.Plan(train_set, cfg.batch_size, cfg.grad_accum, cfg.seed, cfg.pack)
    if cfg.show_batch:
        print(data.show(plan.micro_batches(0)[0], tokenizer, sys.stdout.isatty()))
        return {}
    cfg.steps = cfg.steps or cfg.epochs * plan.steps_per_epoch
    cfg.warmup_steps = cfg.steps // 20 if cfg.warmup_steps is None else cfg.warmup_steps
    if cfg.warmup_steps >= cfg.steps:
        raise UserError(f"--warmup-steps {cfg.warmup_steps}: the run has {cfg.steps} steps, the full rate is never reached")
    cfg.eval_every = cfg.eval_every or plan.steps_per_epoch
    cfg.save_every = cfg.save_every or cfg.eval_every
    out = record.prepare_out(cfg)
    done = record.steps_done(cfg)
    prediction = None if cfg.compile else predict.start(cfg, predict.sizes(plan, plan.largest(watched(done, cfg.steps))))

    torch.manual_seed(cfg.seed)
    offload = cfg.full and cfg.optimizer == "offload_adamw"  # float32 on the CPU first: the masters
    place, bits = ("cpu", 32) if offload else (cfg.device, cfg.bits)
    model = weights.from_scratch(cfg.model, place, cfg.seed) if cfg.from_scratch else weights.load(cfg.model, bits, place)
    prepare(model, cfg)
    if cfg.ckpt_offload and torch.device(cfg.device).type != "cuda":
        print(f"--ckpt-offload: on {cfg.device} host and device memory are the same; nothing moves, nothing is saved")
    run = Run(cfg, out, model, tokenizer, template, plan, val_set, raw_config)
    params = memory.count(model)
    print(record.parameters(cfg.model, params))
    for name, d in (("training", train_set), ("held-out", val_set)):
        print(f"{name}: {len(d):,} examples, {d.n_labels:,} labelled tokens of {sum(len(e.ids) for e in d.examples):,}"
              + (f"; {d.n_dropped} rows dropped (nothing to learn)" if d.n_dropped else "")
              + (f"; {d.n_truncated} cut at {cfg.max_length}" if d.n_truncated else ""))
    if not cfg.resume:
        record.write_config(out, cfg)
    print(f"{cfg.steps} steps of {cfg.batch_size} x {cfg.grad_accum}, lr {cfg.lr:g}, {cfg.device}"
          + (f", {str(weights.half_dtype(cfg.device)).removeprefix('torch.')}" if cfg.amp else "") + f" -> {out}")
    return run.train(params, prediction)


def read_data(cfg: TrainConfig):
    tokenizer = data.load_tokenizer(cfg.model)
    template = data.load_template(cfg.template, tokenizer)
    rows = data.read_rows(cfg.data)
    rows, val_rows = (rows, data.read_rows(cfg.val_data)) if cfg.val_data else data.split(rows, cfg.val_frac, cfg.seed)
    train_set, val_set = (data.build(r, tokenizer, template, cfg.max_length) for r in (rows, val_rows))
    return tokenizer, template, train_set, val_set


def watched(done: int, steps: int) -> range:
    """The steps among which the ledger looks for the peak: it leaves out the first, before which AdamW has no state."""
    return range(min(done + 1, steps - 1), steps)


def prepare(model, cfg: TrainConfig):
    """Say what is trained (adapters, or everything) and what is recomputed."""
    if cfg.full:
        model.requires_grad_(True)
    else:
        targets = cfg.lora_targets.split(",") if cfg.lora_targets else None
        init = "default" if cfg.resume else cfg.lora_init  # the start comes with the state
        lora.inject(model, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, targets, cfg.rslora, init)
    model.ckpt_every, model.ckpt_offload = cfg.ckpt_every, cfg.ckpt_offload


class Run:
    """The state of one training run: the model, the optimizer, where it stands, and what it has seen."""

    def __init__(self, cfg, out, model, tokenizer, template, plan, val_set, raw_config):
        self.cfg, self.out, self.model, self.tokenizer, self.template = cfg, out, model, tokenizer, template
        self.plan, self.val_set, self.raw_config = plan, val_set, raw_config
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

    def micro_batches(self, step: int) -> list:
        return [data.collate(m, self.cfg.pack, self.cfg.max_length) for m in self.plan.micro_batches(step)]

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

    def train(self, params: dict, prediction) -> dict:
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
        predicted = record.predicted(prediction)
        cuda = "cuda" if torch.device(cfg.device).type == "cuda" else None
        if cuda:
            torch.cuda.reset_peak_memory_stats(cfg.device)
        # The ledger watches the second step, as AdamW's state exists from there on, and every later one that is larger than
        # those it has seen: of 336 some 10. What they need is the peak of the run.
        speed, ledger, largest, to_watch = [], None, [(0, 0), (0, 0)], watched(self.step, cfg.steps)
        model.train()
        bar = tqdm(total=cfg.steps, initial=self.step, disable=not sys.stderr.isatty(), desc="training", unit="step")
        with InterruptFlag() as interrupt:
            while self.step < cfg.steps:
                size = self.plan.size(self.step)
                sizes = [size, size[::-1]]  # by positions, by labels: one or the other makes the peak (data.Plan.largest)
                if self.step in to_watch and any(a > b for a, b in zip(sizes, largest)) and not cfg.compile:
                    largest = list(map(max, sizes, largest))
                    with memory.Ledger(model, self.optimizer, quant.kept(), cuda) as book:
                        line = self.train_step()
                    ledger = max(ledger or book, book, key=lambda book: book.peak)
                else:
                    line = self.train_step()
                    if self.step > to_watch.start:  # neither the first, which warms up, nor a watched one
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
        summary = {
            "params": {k: params[k] for k in ("total", "trainable", "percent")},
            "memory": {"predicted_peak": predicted["peak"], "measured_peak": self.peak(ledger),
                       "reserved": memory.cuda_peak(cfg.device)[1] if cuda else None, "rss_peak": memory.rss_peak(),
                       "predicted_by_category": predicted["by_category"],
                       "by_category": ledger.at_peak if ledger else None},
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


def dry_run(cfg: TrainConfig) -> dict:
    """--dry-run: what the run would peak at. No weights are read, nothing is downloaded or written."""
    sizes, of, cfg = largest_step(cfg)
    found = predict.predict(cfg, sizes)
    record.report_dry_run(cfg, found, of)
    return found


def largest_step(cfg: TrainConfig, full_length: bool = False):
    """(the sizes of the run's largest step, what they are in words, cfg completed for the model).

    The lengths are the data's if the model's tokenizer is on this machine. If not (or full_length), all are --max-length."""
    model_config, _, _ = weights.config_of(cfg.model)
    here = hub.config_file(cfg.model)
    cfg = dataclasses.replace(cfg)
    resolve_for(cfg, model_config, weights.stored_bits(here.parent) if here else None)
    if not full_length and here and data.has_tokenizer(here.parent):
        _, _, train_set, _ = read_data(cfg)
        plan = data.Plan(train_set, cfg.batch_size, cfg.grad_accum, cfg.seed, cfg.pack)
        steps = plan.largest(watched(0, cfg.steps or cfg.epochs * plan.steps_per_epoch))
        return predict.sizes(plan, steps), f"the largest step of {cfg.data}", cfg
    data.read_rows(cfg.data)
    why = "" if full_length else f" ({cfg.model}'s tokenizer is not on this machine to measure the data)"
    sizes = [[[(cfg.max_length, cfg.max_length)] * cfg.batch_size] * min(cfg.grad_accum, 2)]
    return sizes, f"steps of {cfg.batch_size} x {cfg.grad_accum} examples of {cfg.max_length} tokens, all learned{why}", cfg


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(parse())
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
