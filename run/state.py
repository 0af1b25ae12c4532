"""A run's state: the model, the optimizer, and the steps done. It is saved, exported, and loaded by --resume.

`state/state.safetensors` is one file, so it is written whole or not at all. It holds the trained weights, AdamW's moments,
the random state, and the numbers that the run has collected. So a resumed run continues bit for bit.
"""
import json
import math
from pathlib import Path

import torch
from torch import nn

import lora
from errors import UserError
from files import hub, peft_files, weights
from run import record
from run.options import TrainConfig
from techniques.optim import AdamW


class Run:
    """The model, its optimizer and the progress. `step`: optimizer steps done. `seen`: numbers for summary.json.

    With cfg.resume, the saved state is loaded into all of them.
    """

    def __init__(self, cfg: TrainConfig, out: Path, model: nn.Module, optimizer: AdamW, scaler, tokenizer, template: str):
        self.cfg, self.out, self.model, self.optimizer, self.scaler = cfg, out, model, optimizer, scaler
        self.tokenizer, self.template = tokenizer, template
        self.trained = {n: optimizer.master(p) for n, p in model.named_parameters() if p.requires_grad}
        self.step, self.seen = 0, {"wall_s": 0.0, "loss_first": None, "loss_last": None, "val_before": None,
                                   "val_after": None, "val_best": None, "samples": [], "skipped": 0}
        if cfg.resume:
            self.load()

    def note(self, loss: float, grad_norm: float):
        """Collect a step's result. Raises FloatingPointError after 25 overflows in a row: a smaller scale does not help."""
        seen, overflow = self.seen, not math.isfinite(grad_norm)  # float16: the scaler skipped the step
        seen["loss_first"] = loss if seen["loss_first"] is None else seen["loss_first"]
        seen["loss_last"] = loss
        seen["skipped"] = seen["skipped"] + 1 if overflow else 0
        if seen["skipped"] == 25:
            raise FloatingPointError(f"loss {loss}, gradient norm {grad_norm}")

    def export(self, name: str):
        """Write adapter/ or best/ in PEFT's format (--full: a model folder), with the template and the end tokens."""
        folder = self.out / name
        if self.cfg.full:
            raw = hub.read_json(hub.find(self.cfg.model) / "config.json")
            dtype = raw.get("dtype") or raw.get("torch_dtype")  # the newer and the older key
            weights.save(self.model, folder, dtype if dtype in weights.DTYPES else "float32", self.trained)
        else:
            peft_files.save(self.model, folder)
        weights.write_text(folder / "chat_template.jinja", self.template)
        ends = {"eos_token_id": sorted(self.tokenizer.stop_ids)}
        weights.write_text(folder / "generation_config.json", json.dumps(ends) + "\n")

    def save(self):
        """Write what --resume needs, and export the current adapter (--full: model)."""
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
        weights.write_tensors(state_file(self.out), tensors, {"numbers": json.dumps(numbers)})
        self.export("model" if self.cfg.full else "adapter")

    def load(self):
        with weights.opened(state_file(self.out)) as f:
            numbers, names = json.loads(weights.read_metadata(f, state_file(self.out))["numbers"]), set(f.keys())
            with torch.no_grad():
                for n, p in self.trained.items():
                    self.model.get_parameter(n).copy_(p.copy_(f.get_tensor(f"param/{n}")))
                    if f"optimizer/step/{n}" in names:  # (not if every step so far was skipped)
                        for key, value in self.optimizer.init_state(p).items():
                            value.copy_(f.get_tensor(f"optimizer/{key}/{n}"))
            for n, m in lora.adapters(self.model).items():
                if f"start/{n}.A" in names:
                    m.keep_start(f.get_tensor(f"start/{n}.A"), f.get_tensor(f"start/{n}.B"))
            if not self.cfg.full:
                peft_files.restore_base(self.model, self.cfg.lora_init)
            torch.set_rng_state(f.get_tensor("rng/cpu"))
            if "rng/cuda" in names and torch.device(self.cfg.device).type == "cuda":
                torch.cuda.set_rng_state(f.get_tensor("rng/cuda"), self.cfg.device)
        self.step, self.seen = numbers["step"], numbers["seen"]
        self.scaler.load_state_dict(numbers["scaler"])
        record.rewind_log(self.out, self.step)
        print(f"resumed {self.out} after step {self.step}")
        before, now = hub.read_json(self.out / "config.json").get("arithmetic"), record.arithmetic(self.cfg)
        if before and before["products"] != now["products"]:
            print(f"its products ran in {before['products']} until here, and now run in {now['products']} ({now['why']}): "
                  f"the run will not equal an uninterrupted one bit for bit")


def state_file(out) -> Path:
    return Path(out) / "state" / "state.safetensors"


def steps_done(cfg: TrainConfig) -> int:
    """0, or the step after which --resume continues."""
    if not cfg.resume:
        return 0
    with weights.opened(state_file(cfg.out)) as f:
        return json.loads(weights.read_metadata(f, state_file(cfg.out))["numbers"])["step"]


def options_of_run(cfg: TrainConfig) -> TrainConfig:
    """--resume: the saved run's options. An option that is given again (not at its default) must be the same."""
    if not cfg.out:
        raise UserError("--resume needs --out, the folder of the run to continue")
    path, state = Path(cfg.out) / "config.json", state_file(cfg.out)
    if not path.is_file():
        raise UserError(f"--resume: {cfg.out} holds no run (no config.json in it)")
    if not state.is_file():
        raise UserError(f"--resume: {state} is missing, the run was stopped before its first save; start it again")
    saved = hub.read_json(path)["options"]
    default = TrainConfig()
    for name in saved:
        given = getattr(cfg, name)
        if name != "out" and given != getattr(default, name) and given != saved[name]:
            raise UserError(f"--resume with a changed option: --{name.replace('_', '-')} {given}, the run in {cfg.out} has "
                            f"{saved[name]}; leave it out, or start a new run")
    resumed = TrainConfig(**{**saved, "out": cfg.out, "resume": True, "dry_run": cfg.dry_run, "show_batch": cfg.show_batch})
    resumed.epochs = default.epochs  # the number of steps was resolved from it
    return resumed
