"""Ask for the peak of a run before it runs. The answer comes from predict.py, a process of its own.

That process imports PyTorch's compiler (72 MB, 2 seconds), which a training run does not need. It starts in about 3 seconds,
while the run loads its weights. It answers any number of questions: `--fit` asks about fifteen.

A question is a line of JSON: the options, the model's config.json, the types in which the device computes, and the lengths
of the examples in the steps that can make the peak. An answer is a line of JSON too:

    {"peak": bytes, "reserved": bytes or null, "by_category": {...}, "params": what memory.count gives}      or
    {"error": a line}

On a GPU "peak" is what max_memory_allocated will say, and "reserved" what max_memory_reserved will say. On a CPU "peak" is
the peak of live tensor bytes.
"""
import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import data
from errors import UserError
from files import hub, rows, weights
from run import prepare, record, watch
from run.options import TrainConfig, resolve_for
from techniques.device import device_of, type_name

ROOT = Path(__file__).resolve().parent.parent


class Predictor:
    """The prediction's process. Use it as a context manager, or call `close` after the last answer."""

    def __init__(self):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the process's stderr; it closes with this object)
        self.process, self.reason = None, ""
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ledger.predict"], cwd=ROOT, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""},  # (which would hide the folder `ledger`)
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log)
        except OSError as e:  # no memory is left for another process, for example
            self.reason = str(e)

    def ask(self, cfg: TrainConfig, steps: list) -> "Predictor":
        """Ask for the peak of cfg's run. steps: what `examples_of` returns. Does not wait for the answer."""
        _, _, raw_config = weights.config_of(cfg.model)
        adapter = cfg.adapter and os.path.abspath(cfg.adapter)  # the process runs in another folder
        question = {"options": {**dataclasses.asdict(cfg), "adapter": adapter}, "config": raw_config, "steps": steps,
                    "tasks": cfg.tasks, "machine": machine(cfg.device)}
        with contextlib.suppress(OSError):  # the process has died: answer() says why
            if self.process:
                self.process.stdin.write(json.dumps(question) + "\n")
                self.process.stdin.flush()
        return self

    def answer(self) -> dict:
        """The answer to the oldest question that has none yet. Waits for it."""
        line = self.process.stdout.readline() if self.process else ""
        with contextlib.suppress(ValueError):
            return json.loads(line)
        return {"error": self.reason or self.last_words()}

    def last_words(self) -> str:
        self.close()
        self.log.seek(0)
        return (self.log.read().strip().splitlines() or [f"the process ended with status {self.process.returncode}"])[-1]

    def close(self):
        if self.process:
            with contextlib.suppress(OSError):
                self.process.stdin.close()  # it reads questions until there are no more
            self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process and error[0]:
            self.process.kill()
        self.close()


def machine(device: str) -> dict:
    """What the prediction must know of `device`: its types, and its other answers that change what is in memory."""
    device = device_of(device)
    names = ("float32_backward", "flash", "workspace", "logits_chunk", "optimizer_chunk", "nf4_chunk")
    return {"half": type_name(device.half), "products": type_name(device.products),
            "nf4_kernel": device.nf4_kernel is not None, **{name: getattr(device, name) for name in names}}


# ---------------------------------------------------------------------------------------------- the steps to ask about

def examples_of(plan, steps: range) -> list:
    """What can make the peak of `steps`: a list of steps, each a list of micro-batches, each a list of examples, each a
    triple (length, labelled tokens, task or None).

    Of a step, the micro-batches that can make the peak (run/plan.py) are enough, and the first one: only after it are
    there gradients.
    """
    lengths, labels = plan.data.lengths, plan.data.labels
    return [[[(int(lengths[j]), int(labels[j]), plan.data.task_of(j)) for j in plan.numbers(step)[i]]
             for i in sorted({0, *micro_batches})]
            for step, micro_batches in plan.largest(steps).items()]


def largest_steps(cfg: TrainConfig, full_length: bool = False, read: Callable | None = None):
    """(the examples of the run's largest steps, a description of them, cfg completed for the model).

    The lengths are those of the data if the model's tokenizer is on this machine. If it is not (or full_length), every
    example has --max-length tokens. read: --fit reads the data only once.
    """
    model_config, _, _ = weights.config_of(cfg.model)
    here = hub.config_file(cfg.model)
    cfg = copy.copy(cfg)
    resolve_for(cfg, model_config, weights.stored_bits(here.parent) if here else None)
    if (cfg.task_column or not full_length) and here and data.has_tokenizer(here.parent):
        _, _, train_set, val_sets = (read or prepare.read_data)(cfg)
        cfg.tasks = prepare.tasks_of(cfg, train_set, val_sets)
        plan = prepare.plan_steps(train_set, cfg)
        steps = watch.candidates(0, cfg.steps or cfg.epochs * plan.steps_per_epoch)
        return examples_of(plan, steps), f"the largest step of {cfg.data}", cfg
    if cfg.task_column:
        raise UserError(f"--task-column: {cfg.model}'s tokenizer is not on this machine, and the tasks are read with it; "
                        f"leave the option out to predict")
    for source in rows.sources(cfg.data):
        rows.Rows(source.path)  # UserError, if the file is not there
    why = "" if full_length else f" ({cfg.model}'s tokenizer is not on this machine to measure the data)"
    steps = [[[(cfg.max_length, cfg.max_length, None)] * cfg.batch_size] * min(cfg.grad_accum, 2)]
    return steps, f"steps of {cfg.batch_size} x {cfg.grad_accum} examples of {cfg.max_length} tokens, all learned{why}", cfg


# ---------------------------------------------------------------------------------------------- for train.py

def start(cfg: TrainConfig, plan, own_loss: str | None = None) -> Predictor | None:
    """Ask about the run that is about to start or to continue: about all its steps, as `measured` is of all its steps.

    None if the prediction, which runs train.py's step, would be wrong: with --compile, or with another loss (run/hooks.py).
    """
    if cfg.compile or own_loss:
        return None
    return Predictor().ask(cfg, examples_of(plan, watch.candidates(0, cfg.steps)))


def collect(predictor: Predictor | None, own_loss: str | None = None) -> dict:
    """Print the answer and return it. If there is none, say why: training continues without it."""
    why = f"{own_loss} is not train.py's own loss" if own_loss else "--compile changes what is kept"
    answer = predictor.answer() if predictor else {"error": why}
    if predictor:
        predictor.close()
    if "error" in answer:
        print(f"the peak is not predicted: {answer['error']}")
        return {"peak": None, "by_category": None}
    print(f"predicted peak {record.peaks(answer)}")
    return answer


def dry_run(cfg: TrainConfig) -> dict:
    """--dry-run: print what the run would peak at. No weights are read, nothing is downloaded or written."""
    steps, in_words, cfg = largest_steps(cfg)
    with Predictor() as predictor:
        answer = predictor.ask(cfg, steps).answer()
    if "error" in answer:
        raise UserError(f"--dry-run: {answer['error']}")
    print(f"{record.parameters(cfg.model, answer['params'])}\n{in_words}\n")
    print(f"predicted peak on {cfg.device}: {record.peaks(answer)}\n{record.categories(None, answer['by_category'])}")
    return answer
