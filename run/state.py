"""A run's state: the model, the optimizer, and the steps done. It is saved, exported, and loaded by --resume.

`state/state.safetensors` is one file, so it is written whole or not at all. It holds the trained weights, AdamW's moments,
the random state, and the numbers that the run has collected. So a resumed run continues bit for bit.

With --keep 3 the two states before it stay: state-000100.safetensors is that of step 100. --resume reads only the newest. If
that one is damaged, the message says which older one to copy over it. None is passed over silently.

What a kill may leave follows from one order of writing: best/ and adapter/ first, then the state; after the last step
samples.md, loss.png, and at the very end summary.json. So whatever the state has seen is there, and a run is *finished* when
its state has taken all steps and summary.json exists. What a kill has left half done is done again by --resume.

A resumed run may get more steps, another learning rate or another schedule. The learning rate of a step depends on these
options alone, so the rest of the run follows the new curve. Example: after 100 of 100 steps of a cosine schedule the rate is
almost 0. With --steps 200, the next step has half of --lr, and step 200 is almost 0.
"""
import contextlib
import copy
import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

import lora
import memory
from errors import UserError
from files import fingerprint, hub, peft_files, weights, writing
from files.json_files import check, checked, parse_json, read_json
from run import card, record
from run.evaluate import is_due
from run.hooks import Hooks
from run.options import TrainConfig, check_ranges
from techniques.device import type_name
from techniques.optim import AdamW

# What a run collects for summary.json, as it is before the first step. The state holds it too.
SEEN = {"wall_s": 0.0, "loss_first": None, "loss_last": None, "val_before": None, "val_after": None, "val_best": None,
        "without_better": 0, "eval_s": 0.0, "samples": [], "skipped": 0, "peak": None, "reserved": None, "rss_peak": 0,
        "by_category": dict.fromkeys(memory.CATEGORIES, 0), "timed": {"tokens": 0, "examples": 0, "step_s": 0.0}}


def same_kind(value, start) -> bool:
    """Whether a number of a state can be what began as `start`: a list of texts, a dict of the same names, or a number."""
    if isinstance(start, list):
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if isinstance(start, dict):
        return isinstance(value, dict) and value.keys() == start.keys() and all(same_kind(v, 0) for v in value.values())
    return value is None and start is None or isinstance(value, (int, float)) and not isinstance(value, bool)


class Run:
    """The model, its optimizer and the progress. `step`: optimizer steps done. `seen`: numbers for summary.json.

    With cfg.resume, the saved state is loaded into all of them.
    """

    def __init__(self, cfg: TrainConfig, out: Path, model: nn.Module, optimizer: AdamW, scaler, tokenizer, template: str,
                 hooks: Hooks):
        self.cfg, self.out, self.model, self.optimizer, self.scaler = cfg, out, model, optimizer, scaler
        self.tokenizer, self.template, self.hooks, self.trackers = tokenizer, template, hooks, []
        self.trained = {n: optimizer.master(p) for n, p in model.named_parameters() if p.requires_grad}
        self.step, self.seen = 0, copy.deepcopy(SEEN)
        self.last = "model" if cfg.full else "adapter"  # the folder of what was trained, as it is after the last save
        if cfg.resume:
            self.load()
        self.saved = self.step  # of the newest state

    @property
    def ended(self) -> bool:
        return has_ended(self.cfg, self.step, self.seen)

    def log(self, line: dict):
        """Write a line of metrics.jsonl, and send it to the trackers of --report."""
        record.log(self.out, line)
        for tracker in self.trackers:
            tracker(line)

    def note(self, loss: float, grad_norm: float):
        """Collect a step's result. Raises FloatingPointError after 25 overflows in a row: a smaller scale does not help."""
        seen, overflow = self.seen, not math.isfinite(grad_norm)  # float16: the scaler skipped the step
        seen["loss_first"] = loss if seen["loss_first"] is None else seen["loss_first"]
        seen["loss_last"] = loss
        seen["skipped"] = seen["skipped"] + 1 if overflow else 0
        if seen["skipped"] == 25:
            raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}")

    def export(self, name: str):
        """Write adapter/ or best/ in PEFT's format (--full: a model folder), with all that replies need: the tokenizer, the
        template, and the base's generation_config.json with the end tokens; and with a model card."""
        for task in self.cfg.tasks or ("",):
            self.export_to(self.out / name / task, name, task)

    def export_to(self, folder: Path, name: str, task: str):
        if self.cfg.full:
            raw = read_json(hub.find(self.cfg.model) / "config.json")
            dtype = raw.get("dtype") or raw.get("torch_dtype")  # the newer and the older key
            weights.save(self.model, folder, dtype if dtype in weights.DTYPES else "float32", self.trained)
        else:
            peft_files.save(self.model, folder, task or None)
            weights.save_tokenizer(self.tokenizer.folder, folder, self.tokenizer.eos)
        writing.write_text(folder / "chat_template.jinja", self.template)
        replies = weights.optional_json(self.tokenizer.folder / "generation_config.json")
        replies["eos_token_id"] = sorted(self.tokenizer.stop_ids)
        writing.write_text(folder / "generation_config.json", json.dumps(replies) + "\n")
        evaluated = name == "best" or is_due(self.step, self.cfg)
        card.write(folder, self, self.seen["val_best" if name == "best" else "val_after"] if evaluated else None, task)

    def save(self):
        """Export the current adapter (--full: model), and write what --resume needs."""
        self.export(self.last)
        self.seen["rss_peak"] = max(self.seen["rss_peak"], memory.rss_peak())
        tensors = {f"param/{n}": p.detach() for n, p in self.trained.items()}
        for n, p in self.trained.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer/{key}/{n}"] = value
        for n, m in lora.adapters(self.model).items():
            if m.start_A is not None:
                tensors |= {f"start/{n}.A": m.start_A, f"start/{n}.B": m.start_B}
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.device(self.cfg.device).type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.cfg.device)
        numbers = {"step": self.step, "seen": self.seen, "scaler": self.scaler.state_dict()}
        tensors = {name: t.cpu() for name, t in tensors.items()}
        numbers = json.dumps(numbers)
        self.keep_newest()
        writing.write_tensors(state_file(self.out), tensors, {"numbers": numbers, "sha256": fingerprint.of_text(numbers)})
        self.saved = self.step
        if self.cfg.keep > 1:
            older = older_states(self.out)
            kept = sorted(step for step in older if step < self.step)[1 - self.cfg.keep:]
            for step in older.keys() - kept:  # (also those of later steps, if one has gone back to an older state)
                older[step].unlink()

    def keep_newest(self):
        """--keep: give the newest state a second name, which stays when the next state takes the first."""
        newest = state_file(self.out)
        if self.cfg.keep > 1 and 0 < self.saved < self.step:
            with writing.atomic(newest.with_name(f"state-{self.saved:06d}.safetensors")) as tmp:
                tmp.unlink()
                try:
                    os.link(newest, tmp)  # no copy: both names are the same file
                except OSError:  # a disk without links
                    shutil.copyfile(newest, tmp)

    def load(self):
        """Raises UserError for a state that does not belong to this run."""
        with saved_state(self.cfg) as (f, numbers):
            names = set(f.keys())
            left = {n for n in names if not n.startswith("rng/")}  # what nothing has asked for

            def read(wanted: torch.Tensor, name: str) -> torch.Tensor:
                left.discard(name)
                return like(wanted, f, name)
            with torch.no_grad():
                for n, p in self.trained.items():
                    self.model.get_parameter(n).copy_(p.copy_(read(p, f"param/{n}")))
                    if f"optimizer/step/{n}" in names:  # (not if every step so far was skipped)
                        for key, value in self.optimizer.init_state(p).items():
                            value.copy_(read(value, f"optimizer/{key}/{n}"))
            for n, m in lora.adapters(self.model).items():
                if f"start/{n}.A" in names:
                    m.keep_start(read(m.lora_A, f"start/{n}.A"), read(m.B(), f"start/{n}.B"))
            if left:  # a tensor that may be absent could be there under a damaged name
                raise ValueError(f"tensor {min(left)} is not known")
            if self.cfg.method == "lora" and not self.cfg.full:
                peft_files.restore_base(self.model, self.cfg.lora_init)
            torch.set_rng_state(like(torch.get_rng_state(), f, "rng/cpu"))
            if "rng/cuda" in names and torch.device(self.cfg.device).type == "cuda":
                torch.cuda.set_rng_state(like(torch.cuda.get_rng_state(self.cfg.device), f, "rng/cuda"), self.cfg.device)
            if numbers["scaler"]:  # (a run that begins in bfloat16 has none, and may continue in float16)
                self.scaler.load_state_dict(numbers["scaler"])
        self.step, self.seen = numbers["step"], {**self.seen, **numbers["seen"]}  # (older states have fewer numbers)
        record.rewind_log(self.out, self.step)
        if self.ended:  # all steps are taken, but not everything is written: nothing saves again
            self.export(self.last)
        print(f"resumed {self.out} after step {self.step}")
        path, now = self.out / "config.json", record.arithmetic(self.cfg)
        before = read_json(path)["arithmetic"]
        if before.get("products") != now["products"]:
            print(f"its products ran in {before.get('products')} until here, now run in {now['products']} ({now['why']}); "
                  f"the run will not equal an uninterrupted one bit for bit")


def state_file(out) -> Path:
    return Path(out) / "state" / "state.safetensors"


def older_states(out) -> dict[int, Path]:
    """What --keep has kept beside the newest state: {step: file}."""
    return {int(m[1]): p for p in state_file(out).parent.glob("state-*.safetensors")
            if (m := re.fullmatch(r"state-(\d{6,10})\.safetensors", p.name))}


def way_back(out) -> str:
    """What a message about a damaged state adds, if --keep has kept another."""
    older = older_states(out)
    return f"; or copy {older[max(older)]} to {state_file(out)}, and --resume continues from there" if older else ""


def has_ended(cfg: TrainConfig, step: int, seen: dict) -> bool:
    """Whether a run takes no step any more: all are taken, or --patience is at its end."""
    return step == cfg.steps or cfg.patience is not None and seen.get("without_better", 0) >= cfg.patience


@contextlib.contextmanager
def saved_state(cfg: TrainConfig):
    """Yields (the open state of cfg's run, its numbers). Raises UserError for anything in it that cannot be."""
    path = state_file(cfg.out)
    with contextlib.ExitStack() as stack:
        try:
            f = stack.enter_context(weights.opened(path))
        except UserError as e:
            raise UserError(f"{e}{way_back(cfg.out)}") from None
        try:
            metadata = weights.read_metadata(f, path)
            sha256 = fingerprint.of_text(metadata["numbers"])
            if metadata.get("sha256", sha256) != sha256:  # (older states have none)
                raise ValueError("its numbers were changed")
            numbers = parse_json(metadata["numbers"], path)
            step, seen = numbers["step"], dict(numbers["seen"])
            if type(step) is not int or not 0 < step <= cfg.steps:
                raise ValueError(f"step {step} of {cfg.steps}")
            wrong = [name for name, start in SEEN.items() if not same_kind(seen.get(name, start), start)]
            if wrong or not isinstance(numbers["scaler"], dict):
                raise ValueError(f"{(wrong or ['scaler'])[0]} is of another kind")
            yield f, {**numbers, "seen": seen}
        except (LookupError, ValueError, TypeError, RecursionError, RuntimeError, SafetensorError) as e:
            raise UserError(f"{path}: not the state of this run ({e}); start the run again in another folder"
                            f"{way_back(cfg.out)}") from None


def like(wanted: torch.Tensor, f, name: str) -> torch.Tensor:
    """Tensor `name` of a state. Raises ValueError unless it is finite and has the shape and the type of `wanted`."""
    tensor = f.get_tensor(name)
    if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
        raise ValueError(f"{name} has shape {list(tensor.shape)} of {type_name(tensor.dtype)}, "
                         f"not {list(wanted.shape)} of {type_name(wanted.dtype)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} is not finite")
    return tensor


def finished(cfg: TrainConfig) -> dict | None:
    """summary.json of a run that has taken all its steps and has written everything, or None. cfg: its options."""
    if cfg.dry_run or cfg.show_batch:
        return None
    out = Path(cfg.out)
    made = "model/config.json" if cfg.full else f"adapter/{'*/' * bool(cfg.task_column)}adapter_config.json"
    files = [made, "samples.md", "loss.png", "summary.json", *["compare/compare.json"] * cfg.compare]
    with saved_state(cfg) as (_, numbers):
        done, ended = numbers["step"], has_ended(cfg, numbers["step"], numbers["seen"])
    if not ended or not all(any(out.glob(f)) for f in files):
        return None
    early = " (--patience)" if done < cfg.steps else ""
    print(f"{out} is finished: {done} of {cfg.steps} steps are taken{early}, and every file is written")
    return read_json(out / "summary.json")


RESOLVED = ("bits", "device", "data", "max_length", "lr", "warmup_steps", "steps", "eval_every", "save_every")
# A run of an older version has the defaults of these options.
NEW = ("method", "lora_plus", "bottleneck", "virtual_tokens", "virtual_init", "adapter", "eval_examples", "patience", "keep",
       "sample_every", "report", "columns", "skip_bad_rows", "task_column", "shared_adapter", "compare")
# A run may continue with another path, if the content is the same.
MAY_MOVE = ("model", "data", "val_data", "template", "adapter")
MAY_CHANGE = ("steps", "lr", "schedule")  # it may continue for longer, or at another rate; --epochs sets the steps


def options_of_run(cfg: TrainConfig) -> TrainConfig:
    """--resume: the saved run's options. An option that is given again must be the same, except for MAY_MOVE and MAY_CHANGE
    (from Python it counts if it is not at its default, because then nobody knows whether it was given)."""
    if not cfg.out:
        raise UserError("--resume needs --out, the folder of the run to continue")
    path, state = Path(cfg.out) / "config.json", state_file(cfg.out)
    if not path.is_file():
        raise UserError(f"--resume: {cfg.out} holds no run (no config.json in it)")
    if not state.is_file():
        raise UserError(f"--resume: {state} is missing, the run was stopped before its first save; remove "
                        f"{cfg.out} and start it again{way_back(cfg.out)}")
    config = read_json(path)
    for name, kind in {"options": dict, "versions": dict, "arithmetic": dict, "seed": int}.items():
        check(path, name, config.get(name), kind)
    for name, text in {**config["versions"], **config["arithmetic"]}.items():
        check(path, name, text, str)
    if config.get("commit") is not None:
        check(path, "commit", config["commit"], str)
    default = TrainConfig()
    saved = {**{name: getattr(default, name) for name in NEW}, **config["options"]}
    check_ranges(checked(TrainConfig, saved, path), f"{path}: ")  # here, since some are not used again (epochs)
    if missing := [f.name for f in dataclasses.fields(TrainConfig) if f.name not in (*saved, *record.NOT_SAVED)]:
        raise UserError(f"{path}: option {missing[0]} is missing (the run is of another version)")
    if missing := [name for name in RESOLVED if saved[name] is None]:
        raise UserError(f"{path}: option {missing[0]} is null, and a run knows it")
    new = {}
    for name in saved:
        given = getattr(cfg, name)
        if name == "out" or name not in cfg.given and given == getattr(default, name):
            continue
        if name == "epochs":
            new |= {"epochs": given, "steps": cfg.steps}  # None: the steps are counted anew
        elif given == saved[name]:
            continue
        elif name not in MAY_MOVE + MAY_CHANGE:
            raise UserError(f"--resume with a changed option: --{name.replace('_', '-')} {given}, the run in {cfg.out} has "
                            f"{saved[name]}; leave it out, or start a new run")
        else:
            new[name] = given
    # The number of steps was resolved from the epochs.
    resumed = TrainConfig(**{**saved, "epochs": default.epochs, **new, "out": cfg.out, "resume": True,
                             "dry_run": cfg.dry_run, "show_batch": cfg.show_batch, "no_cache": cfg.no_cache})
    resumed.given = frozenset(new)
    return resumed


def check_changes(cfg: TrainConfig):
    """--resume: print which options of MAY_CHANGE the run had otherwise. Raises UserError if no step is left for them."""
    saved = read_json(Path(cfg.out) / "config.json")["options"]
    changes = {name: getattr(cfg, name) for name in MAY_CHANGE if getattr(cfg, name) != saved[name]}
    if changes:
        with saved_state(dataclasses.replace(cfg, steps=saved["steps"])) as (_, numbers):
            done, ended = numbers["step"], has_ended(cfg, numbers["step"], numbers["seen"])
        if ended and cfg.steps > done:
            raise UserError(f"--resume: --patience has ended the run in {cfg.out} after {done} steps; a new run with "
                            f"--adapter {cfg.out}/best goes on from there")
        if cfg.steps <= done:
            raise UserError(f"--resume: the run in {cfg.out} has taken {done} steps, and is to have {cfg.steps}; give more "
                            f"--steps, or leave {', '.join('--' + name for name in changes)} out")
    for name, value in changes.items():
        print(f"--{name} {saved[name]} -> {value}")


def write_changes(cfg: TrainConfig):
    """--resume: record the options that have changed in the run's config.json, and the new paths of what has moved."""
    path = Path(cfg.out) / "config.json"
    config = read_json(path)
    options = {**config["options"], **{name: getattr(cfg, name) for name in MAY_MOVE + MAY_CHANGE}}
    if options != config["options"]:
        # The old summary goes first: with it, a run that is killed after its last new step would count as finished.
        (Path(cfg.out) / "summary.json").unlink(missing_ok=True)
        shutil.rmtree(Path(cfg.out) / "compare", ignore_errors=True)
        writing.write_text(path, json.dumps({**config, "options": options}, indent=2) + "\n")


WHAT = {"data": "--data", "val_data": "--val-data", "template": "the template", "tokenizer": "the tokenizer",
        "weights": "the base model", "adapter": "--adapter"}


def check_inputs(cfg: TrainConfig, now: dict):
    """--resume: data and model must be those with which the run began. now: prepare.inputs(...). Raises UserError."""
    path = Path(cfg.out) / "config.json"
    before = read_json(path).get("inputs")
    if before is None:
        print(f"{cfg.out} is of an older version, which did not record its data and its model: they are taken as they are")
        return
    check(path, "inputs", before, dict)
    if before.get("loss") != now["loss"]:
        raise UserError(f"--resume: the run in {cfg.out} began with another loss ({before.get('loss') or 'that of train.py'}"
                        f", now {now['loss'] or 'that of train.py'}); give train.main the same one")
    for name, what in WHAT.items():
        if before.get(name) != now[name]:
            raise UserError(f"--resume: {what} is not what the run in {cfg.out} began with (another content: "
                            f"{getattr(cfg, name, None) or cfg.model}); bring back the old one, or start a new run")
