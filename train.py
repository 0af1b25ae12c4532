"""Fine-tune a language model on the machine you have: the loop, from top to bottom.

    python train.py                                                          the bundled model and data, a minute on a CPU
    python train.py --model gpt2 --lora-r 8 --amp --ckpt-every 2             GPT-2 124M
    python train.py --model DIR --data FILE --lora-r 8 --amp --batch-size 4  a model folder, your data
    python train.py --model llama-13b --amp --dry-run                        the peak memory before the run
    python train.py --model llama-2-7b --fit 8GB                             the options with which it fits

Read `train_step` first, then `train`: the loop. What surrounds them is in run/: options, data and model, evaluation, the
measured peak, saving and resuming, and the files that a run leaves in --out.

One step:   for each micro-batch:  loss = sum of token losses / labelled tokens of the *whole step*;  loss.backward()
            unscale (float16 only) -> clip -> AdamW -> zero

The loss is divided by the labels of the step, not by those of the micro-batch. A mean of means would give a token in a
short micro-batch more weight than one in a long micro-batch, and 8 micro-batches of 1 would not be a batch of 8.
"""
import math
import os
import sys
import time

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
    import terminal
    terminal.start()

import torch

import compare
import data
import generate
import memory
from errors import UserError
from files import weights
from ledger import ask
from ledger.fit import fit
from run import prepare, record, state, tasks, trackers
from run.evaluate import evaluate_run, is_due, why_not_finite
from run.hooks import Hooks
from run.interrupt import Interrupt, Interrupted
from run.options import TrainConfig, parse, resolve, resolve_for
from run.plan import Plan
from run.watch import PeakWatch
from techniques.compilation import compile_blocks
from techniques.device import autocast
from techniques.loss import token_loss


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Of optimizer step 0, 1, ..., cfg.steps - 1: linear up over warmup_steps, then by the schedule towards 0.

    It depends on the step alone. So there is nothing to save, and no micro-batch can advance it.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.lr * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.schedule]


def train_step(model, optimizer, scaler, batches: list[data.Batch], cfg: TrainConfig, sum_of=token_loss) -> tuple:
    """One optimizer step over its micro-batches -> (loss, norm of the gradient). Uses cfg's device, amp and clip.

    sum_of(model, batch, hidden): the sum of a micro-batch's losses.

    Raises FloatingPointError, and leaves the weights as they are, where the loss or the gradient is not finite. With a
    float16 scaler, a gradient that overflows is no error: the scaler skips the step.
    """
    n_labels = sum(b.n_labels for b in batches)
    losses = []
    for batch in batches:  # each backward frees its graph: memory does not grow with grad_accum
        batch.to(cfg.device)
        tasks.route(model, batch.tasks, batch.segments)  # --task-column: each example through the adapter of its task
        with autocast(cfg.device, cfg.amp):
            hidden = model.hidden(batch.ids, batch.positions, batch.segments)  # (B, T, C)
            loss = sum_of(model, batch, hidden) / n_labels
        losses.append(loss.detach())
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # before clipping: the threshold is in units of the true gradient
    tasks.weigh(model, batches, optimizer.master)  # --task-column: each adapter by the labels of its own task
    trained = [optimizer.master(p) for p in model.parameters() if p.requires_grad]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
    # Read only now, and all losses at once: each read makes the host wait for a GPU.
    loss_sum, grad_norm = sum(loss.item() for loss in torch.stack(losses).cpu()), grad_norm.item()
    if not math.isfinite(loss_sum) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
        raise FloatingPointError(f"loss {loss_sum}, gradient norm {grad_norm}")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss_sum, grad_norm


def train(run: state.Run, plan: Plan, val_sets: dict, params: dict, predictor: ask.Predictor | None) -> dict:
    """The loop around the step, from the run's step to its last; returns what summary.json holds."""
    cfg, model, seen, hooks = run.cfg, run.model, run.seen, run.hooks
    started = time.perf_counter() - seen["wall_s"]
    prompts = data.prompts(next(iter(val_sets.values())), cfg.samples, run.tokenizer)
    seen["samples"] = seen["samples"] or replies(run, prompts)
    if cfg.compile:
        compile_blocks(model)
    if seen["val_before"] is None:
        evaluate_run(run, val_sets, "val_before")
    prediction = ask.collect(predictor, hooks.own_loss)
    watch = PeakWatch(model, run.optimizer, plan, cfg, run.step, seen)
    progress = record.Progress(run)
    model.train()
    with Interrupt() as interrupt:
        while not run.ended:
            start, lr = time.perf_counter(), learning_rate(run.step, cfg)
            for group in run.optimizer.param_groups:
                group["lr"] = lr * group.get("times", 1)  # --lora-plus
            examples = plan.micro_batches(run.step)
            with watch.step(run.step) as timed:
                batches = [hooks.collate(m, cfg.pack, cfg.max_length) for m in examples]
                try:
                    loss, grad_norm = train_step(model, run.optimizer, run.scaler, batches, cfg, hooks.loss)
                    run.note(loss, grad_norm)
                except FloatingPointError as e:
                    raise UserError(f"step {run.step + 1}: {e}: {why_not_finite(model, cfg, run.step)}") from None
            run.step += 1
            tokens, step_s = sum(b.n_tokens for b in batches), time.perf_counter() - start
            line = {"step": run.step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens,
                    "examples": sum(b.n_examples for b in batches), "step_s": step_s, "tokens_per_s": tokens / step_s}
            hooks.on_step(run, line)
            progress(line, timed)
            if is_due(run.step, cfg):
                evaluate_run(run, val_sets, "val_after")
                progress.say(f"step {run.step}: held-out loss {seen['val_after']:.4f} (best {seen['val_best']:.4f})")
            last = run.ended
            if cfg.sample_every and run.step % cfg.sample_every == 0 and not last:
                seen["samples"] += replies(run, prompts)
                record.write_samples(run, prompts)
            seen["wall_s"] = time.perf_counter() - started
            if run.step % cfg.save_every == 0 or last or interrupt.seen:
                run.save()
            if interrupt.seen and not last:
                progress.close()
                print(f"interrupted after step {run.step}; continue with: --out {run.out} --resume")
                raise Interrupted(interrupt.seen)
    progress.close()
    if run.step < cfg.steps:
        print(f"stopped after step {run.step} of {cfg.steps}: {cfg.patience} evaluations without a lower held-out loss than "
              f"{seen['val_best']:.4f} (--patience)")
    record.write_samples(run, prompts, replies(run, prompts))
    seen["wall_s"] = time.perf_counter() - started
    return record.summarise(run, params, prediction, plan.data)


def replies(run: state.Run, prompts: list) -> list[str]:
    """What the model answers to each prompt: greedy decoding, at most 64 tokens."""
    longest = max(1, run.model.config.n_positions - 64)
    with autocast(run.cfg.device, run.cfg.amp):
        return [generate.reply(run.model, run.tokenizer, ids[-longest:], max_new_tokens=64, temperature=0,
                               adapter=tasks.adapters_of(run.model, task)) for ids, _, task in prompts]


def main(cfg: TrainConfig, **own) -> dict:
    """Train as `cfg` says; returns what summary.json holds. Raises UserError, and KeyboardInterrupt after saving.

    own: a loss of your own, what happens after a step, and more: see run/hooks.py.
    """
    hooks = Hooks(**own)
    if cfg.fit:
        hooks.refuse("--fit predicts")
        return fit(cfg)
    if cfg.resume:
        cfg = state.options_of_run(cfg)
        if not cfg.given and (summary := state.finished(cfg)):
            return summary
    cfg = resolve(cfg)
    if cfg.dry_run:
        hooks.refuse("--dry-run predicts")
        return ask.dry_run(cfg)
    if cfg.compare:
        hooks.refuse("--compare measures")
    folder = weights.find(cfg.model)
    model_config, _, _ = weights.read_config(folder)
    resolve_for(cfg, model_config, weights.stored_bits(folder))
    tokenizer, template, train_set, val_sets = hooks.read_data(cfg)
    cfg.tasks = prepare.tasks_of(cfg, train_set, val_sets)
    plan = prepare.plan_steps(train_set, cfg)
    if cfg.show_batch:
        print(data.show(plan.micro_batches(0)[0], tokenizer, sys.stdout.isatty()))
        return {}
    prepare.resolve_steps(cfg, plan)
    inputs = {**prepare.inputs(cfg, template), "loss": hooks.own_loss}
    if cfg.resume:
        state.check_inputs(cfg, inputs)
        state.check_changes(cfg)
        if summary := state.finished(cfg):
            return summary
    with record.claimed(cfg) as out:
        predictor = ask.start(cfg, plan, hooks.own_loss)
        model = prepare.load_model(cfg)
        optimizer, scaler = prepare.make_optimizer(model, cfg), prepare.make_scaler(cfg)
        run = state.Run(cfg, out, model, optimizer, scaler, tokenizer, template, hooks)
        params = memory.count(model)
        if not cfg.resume:
            record.write_config(out, cfg, inputs)
        else:
            state.write_changes(cfg)
        record.announce(cfg, params, train_set, val_sets, out)
        with trackers.opened(run):
            summary = train(run, plan, val_sets, params, predictor)
        if cfg.compare:
            run = model = optimizer = None  # their memory is free: the model is loaded again, without adapters
            compare.end_of_run(cfg, out, tokenizer, template, next(iter(val_sets.values())))
        return summary


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    terminal.run(lambda: main(parse()))
