"""The training loop: what a step computes, what a run leaves, how it stops.

A name such as trl#805 is a GitHub issue: the bug that the test looks for, in another project.
"""
import dataclasses
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_data, make_folder
from runs import dataset_of, evaluations, lines, no_picture, options, run, steps, steps_of, timeless
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import data
import export
import generate
import lora
import memory
import train
from errors import UserError
from files import peft_files, weights, writing
from files.rows import read_rows
from files.template import ALPACA
from run import prepare, record, state
from run.evaluate import evaluate, is_due, spread
from run.options import resolve_bits
from run.plan import Plan, covers
from techniques import loss
from techniques.optim import AdamW
from train import TrainConfig

FAMILIES = ("gpt2", "llama", "phi")
ROWS = 18


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with one tiny model of each family, rows of unequal length and held-out rows."""
    folder = tmp_path_factory.mktemp("shared")
    for family in FAMILIES:
        make_folder(folder / family, family)
    make_data(folder / "data.jsonl", ROWS)
    make_data(folder / "val.jsonl", 4)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    no_picture(monkeypatch)  # (the fixture `finished` runs before this one, and draws)


@pytest.fixture
def go(shared, tmp_path):
    """go(family, name of the run, **options) -> its step lines; the run's folder is tmp_path / name."""
    def train_it(family="gpt2", name="run", **more):
        more.setdefault("val_data", str(shared / "val.jsonl"))
        return run(tmp_path / name, shared / family, more.pop("data", shared / "data.jsonl"), **more)
    return train_it


def examples(shared, family, file="data.jsonl"):
    return list(dataset(shared, family, file))


def dataset(shared, family, file="data.jsonl"):
    tokenizer = data.load_tokenizer(str(shared / family))
    return data.build(read_rows(shared / file), tokenizer, data.load_template("auto", tokenizer), 128)


def gradients(monkeypatch, train_it) -> list[torch.Tensor]:
    """The gradients of a run's first step, before they are clipped."""
    found = []

    def spy(parameters, max_norm, *args, **kwargs):
        parameters = list(parameters)
        if not found:
            found.extend(p.grad.clone() for p in parameters)
        return torch.nn.utils.clip_grad.clip_grad_norm_(parameters, max_norm, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        train_it()
    return found


def assert_same_gradients(got, wanted, tolerance=1e-6):
    assert len(got) == len(wanted)
    norm = torch.stack([g.norm() for g in wanted]).norm()
    difference = torch.stack([(a - b).norm() for a, b in zip(got, wanted, strict=True)]).norm()
    assert difference <= tolerance * norm, f"gradients differ by {difference / norm:.1e} of their norm {norm:.3g}"


# ---------------------------------------------------------------------------------------------- one step

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_micro_batches_have_the_gradient_of_one_batch(family, full, go, shared, monkeypatch):
    """transformers#34191: 8 micro-batches of 1, 4 of 2 and one batch of 8 have the gradient of PyTorch's cross-entropy."""
    first = steps_of([len(e.ids) for e in examples(shared, family)], 8, 1, 0, 0)[0][0]
    chosen = [examples(shared, family)[i] for i in first]
    assert len({sum(t != -100 for t in e.targets) for e in chosen}) > 3  # unequal, so a mean of means would differ

    def of(b, ga):
        return gradients(monkeypatch, lambda: go(family, f"{b}x{ga}", steps=1, batch_size=b, grad_accum=ga, full=full))

    model = weights.load(str(shared / family))
    if full:
        model.requires_grad_(True)
    else:
        torch.manual_seed(0)
        lora.inject(model)
    batch = data.collate(chosen)
    F.cross_entropy(model(batch.ids).flatten(0, 1), batch.targets.flatten()).backward()
    wanted = [p.grad for p in model.parameters() if p.requires_grad]
    assert_same_gradients(of(8, 1), wanted)
    for b, ga in ((2, 4), (1, 8)):
        assert_same_gradients(of(b, ga), wanted)


def test_an_example_without_a_label_changes_nothing(go, shared, monkeypatch, tmp_path):
    """unsloth-zoo#1023: an example whose labels are all masked adds 0 to the loss and 0 to the number of labels."""
    make_data(tmp_path / "seven.jsonl", 7)
    seven = dict(data=tmp_path / "seven.jsonl", steps=2, lr=1e-3)
    wanted = gradients(monkeypatch, lambda: go(name="without", batch_size=7, **seven))
    micro_batches = Plan.micro_batches

    def with_masked(plan, step):
        examples = [e for m in micro_batches(plan, step) for e in m]
        examples.insert(3, data.Example([5, 6, 7, 8], [loss.IGNORE] * 4))
        return [examples[i:i + plan.how[0]] for i in range(0, 8, plan.how[0])]

    monkeypatch.setattr(Plan, "micro_batches", with_masked)
    for b, ga in ((8, 1), (2, 4), (1, 8)):
        name = f"masked-{b}x{ga}"
        assert_same_gradients(gradients(monkeypatch, lambda b=b, ga=ga, name=name:
                                        go(name=name, batch_size=b, grad_accum=ga, **seven)), wanted)
        got, plain = steps(tmp_path / name), steps(tmp_path / "without")
        assert [x["examples"] for x in got] == [8, 8]
        assert [x["loss"] for x in got] == pytest.approx([x["loss"] for x in plain], rel=1e-5)


def test_memory_does_not_grow_with_grad_accum(go, tmp_path):
    """torchtune#1917: backward frees the graph of its micro-batch."""
    row = json.dumps({"instruction": "Say it " * 20, "output": "word " * 20})
    (tmp_path / "same.jsonl").write_text((row + "\n") * 16)
    for ga in (1, 4):
        go(name=f"ga{ga}", data=tmp_path / "same.jsonl", steps=3, batch_size=4, grad_accum=ga)
    one, four = (json.loads((tmp_path / f"ga{ga}" / "summary.json").read_text())["memory"]["measured_peak"] for ga in (1, 4))
    assert one <= four < 1.05 * one


def test_the_last_window_is_kept_and_weighed_right(go):
    """accelerate#963: 18 rows make steps of 8, 8 and 2 examples. The last step is divided by its own labels."""
    wanted = go(name="8x1", epochs=2, batch_size=8, lr=1e-2)
    got = go(name="2x4", epochs=2, batch_size=2, grad_accum=4, lr=1e-2)
    for xs in (got, wanted):
        assert sorted(x["examples"] for x in xs[:3]) == sorted(x["examples"] for x in xs[3:]) == [2, 8, 8]
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert [x[key] for x in got] == pytest.approx([x[key] for x in wanted], rel=1e-5)


def test_every_example_once_an_epoch(shared):
    lengths = [len(e.ids) for e in examples(shared, "gpt2")]
    for b, ga in ((8, 1), (2, 4), (5, 3), (100, 1)):
        epochs = [steps_of(lengths, b, ga, 0, epoch) for epoch in (0, 1)]
        for plan in epochs:
            assert sorted(i for step in plan for micro in step for i in micro) == list(range(ROWS))
        assert b == 100 or epochs[0] != epochs[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_do_not_see_each_other(family, shared):
    """trl#805: the loss of each example and the gradient of all are as if each example were alone."""
    chosen = examples(shared, family)[:5]
    model = weights.load(str(shared / family))

    def total(es, pack):
        batch = data.collate(es, pack)
        return loss.sum_loss(model.hidden(batch.ids, batch.positions, batch.segments), model.head, batch.targets)

    alone = [total([e], False) for e in chosen]
    packed = total(chosen, True)
    torch.testing.assert_close(packed, sum(alone), rtol=1e-6, atol=0)
    for e, wanted in zip(chosen, alone, strict=True):  # one by one: the others' labels masked, not their tokens
        others = [o if o is e else data.Example(o.ids, [loss.IGNORE] * len(o.ids)) for o in chosen]
        torch.testing.assert_close(total(others, True), wanted, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(sum(alone), list(model.parameters()))
    assert_same_gradients(torch.autograd.grad(packed, list(model.parameters())), wanted)
    batch = data.collate(chosen, True)
    blurred = loss.sum_loss(model.hidden(batch.ids, batch.positions), model.head, batch.targets)  # without borders
    assert abs(blurred - packed) > 1e-4 * packed


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_layers_keeps_the_gradients(family, go, monkeypatch):
    """peft#1142: with frozen embeddings and dropout, for every N."""
    def of(n):
        more = dict(ckpt_every=n, lora_dropout=0.3, lora_targets="all")
        return gradients(monkeypatch, lambda: go(family, f"ckpt{n}", steps=1, **more))

    wanted = of(0)
    assert sum(g.norm() > 0 for g in wanted) >= len(wanted) / 2  # B = 0 at the start: only B has a gradient
    for n in (1, 2, 3):
        assert_same_gradients(of(n), wanted)


# ---------------------------------------------------------------------------------------------- learning rate

def test_learning_rate_of_each_schedule():
    total = 110
    for schedule, middle, last in (("cosine", 0.5, 0.5 * (1 + math.cos(math.pi * 0.99))), ("linear", 0.5, 0.01),
                                   ("constant", 1.0, 1.0)):
        cfg = TrainConfig(lr=2.0, schedule=schedule, warmup_steps=10, steps=total)
        of = [train.learning_rate(i, cfg) / cfg.lr for i in range(total)]
        assert of[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])  # step 0 already moves
        assert of[10] == 1 and of[60] == pytest.approx(middle) and of[109] == pytest.approx(last)
        assert all(a >= b for a, b in zip(of[10:], of[11:], strict=False))
        cfg.warmup_steps = 0
        assert train.learning_rate(0, cfg) == cfg.lr


def test_the_schedule_counts_optimizer_steps(go, monkeypatch):
    """accelerate#963: in 6 steps of 4 micro-batches, AdamW is called 6 times, with the 6 learning rates of the schedule."""
    used, adamw = [], AdamW.step

    def spy(self, *args, **kwargs):
        used.append([g["lr"] for g in self.param_groups])
        return adamw(self, *args, **kwargs)

    monkeypatch.setattr(AdamW, "step", spy)
    got = go(steps=6, batch_size=2, grad_accum=4, lr=1e-2, warmup_steps=2, schedule="linear")
    wanted = [0.5e-2, 1e-2, 1e-2, 0.75e-2, 0.5e-2, 0.25e-2]
    assert [x["lr"] for x in got] == pytest.approx(wanted)
    assert used == [[x["lr"]] * 2 for x in got]
    assert [x["step"] for x in got] == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------- float16

@pytest.fixture
def float16(on_device):
    """The CPU's 16-bit type is float16, as on GPUs without bfloat16."""
    on_device(half=torch.float16, products=torch.float16)


@pytest.mark.parametrize("family", FAMILIES)
def test_float16_follows_float32(family, go, float16):
    """lightning#9330: every step exceeds the threshold, so clipping scaled gradients would give another trajectory."""
    common = dict(steps=6, lr=1e-2, clip=0.1)
    wanted, got = go(family, "float32", **common), go(family, "float16", amp=True, **common)
    for key, tolerance in (("loss", 2e-3), ("grad_norm", 1e-2)):
        assert [x[key] for x in got] == pytest.approx([x[key] for x in wanted], rel=tolerance)
    assert all(x["grad_norm"] > 0.1 for x in got)


def test_float16_unscales_before_it_clips(go, float16, monkeypatch):
    calls = []

    def spy(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(name) or real(*a, **k))

    for owner, name in ((torch.amp.GradScaler, "unscale_"), (torch.amp.GradScaler, "step"), (torch.amp.GradScaler, "update"),
                        (torch.nn.utils, "clip_grad_norm_")):
        spy(owner, name)
    go(steps=2, amp=True, batch_size=2, grad_accum=2)
    assert calls == ["unscale_", "clip_grad_norm_", "step", "update"] * 2


def too_large_a_scale(monkeypatch, power: int):
    real = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", lambda self, device, enabled:
                        real(self, device, init_scale=2.0**power, enabled=enabled))


def test_float16_skips_a_step_that_overflows_and_resumes_there(go, shared, float16, tmp_path, monkeypatch):
    too_large_a_scale(monkeypatch, 24)
    got = go(steps=12, amp=True, save_every=1, lr=1e-2)
    skipped = [not math.isfinite(x["grad_norm"]) for x in got]
    n = sum(skipped)
    assert 1 <= n < 10 and skipped == [True] * n + [False] * (12 - n)
    assert all(math.isfinite(x["loss"]) for x in got) and steps(tmp_path / "run")[-1]["loss"] < got[0]["loss"]

    adamw, calls = AdamW.step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # after one skipped step, the moments have not been touched
            raise KeyboardInterrupt
        return adamw(self, *args, **kwargs)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(AdamW, "step", interrupted)
        go(name="again", steps=12, amp=True, save_every=1, lr=1e-2)
    train.main(TrainConfig(out=str(tmp_path / "again"), resume=True))
    assert repr(timeless(steps(tmp_path / "again"))) == repr(timeless(got))  # repr: nan is not equal to nan


def test_float16_that_never_fits_stops(go, float16, tmp_path, monkeypatch):
    """LlamaFactory#2916: a run that overflows at every scale stops."""
    too_large_a_scale(monkeypatch, 120)
    with pytest.raises(UserError, match=r"step 25: .*float16"):
        go(steps=40, amp=True, batch_size=1)
    assert not (tmp_path / "run" / "summary.json").exists()


# ---------------------------------------------------------------------------------------------- stopping

@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family,name", [("gpt2", "transformer.h.1.mlp.c_fc.weight"), ("llama", "model.norm.weight"),
                                         ("phi", "lm_head.bias")])
def test_a_damaged_checkpoint_is_named(family, name, full, tmp_path, data_file):
    """LlamaFactory#2916: there training continued for hours with a gradient norm of nan."""
    folder = make_folder(tmp_path / "damaged", family)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"damaged/model.safetensors: tensor {name}: a weight is not finite"):
        run(tmp_path / "run", folder, data_file, steps=3, full=full)
    assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "state").exists()


@pytest.mark.parametrize("more", [{}, {"full": True}, {"clip": 0.0}], ids=["lora", "full", "no-clip"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_diverges_stops_and_names_the_learning_rate(family, more, go, tmp_path):
    """LlamaFactory#2916: there training continued for hours with a gradient norm of nan."""
    with pytest.raises(UserError, match=r"step [23]: .*lower --lr \(now 1e\+06\)"):
        go(family, steps=10, lr=1e6, **more)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert len(steps(tmp_path / "run")) < 3 and all(math.isfinite(x["loss"]) for x in steps(tmp_path / "run"))


def stop_in_step(monkeypatch, n: int, how):
    """Call how() inside optimizer step n, until the returned context is left."""
    adamw, calls = AdamW.step, []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            how()
        return adamw(self, *args, **kwargs)

    context = monkeypatch.context()
    context.__enter__().setattr(AdamW, "step", step)
    return context


def final_tensors(out):
    return load_file(out / "adapter" / "adapter_model.safetensors"), load_file(out / "state" / "state.safetensors")


@pytest.mark.parametrize("family,dropout", [("gpt2", 0.25), ("llama", 0.0), ("phi", 0.25)])
def test_twenty_steps_are_ten_and_resume_and_ten(family, dropout, go, tmp_path, monkeypatch):
    """nanoGPT#467: equal bit for bit, whether a run dies inside a step and repeats some, or Ctrl-C lets its step finish."""
    common = dict(steps=20, lr=1e-2, batch_size=2, grad_accum=2, save_every=10, eval_every=10, lora_dropout=dropout)
    go(family, "whole", **common)

    def die():
        raise KeyboardInterrupt

    for name, n, how in (("died", 14, die), ("ctrl-c", 10, lambda: os.kill(os.getpid(), signal.SIGINT))):
        context = stop_in_step(monkeypatch, n, how)
        with pytest.raises(KeyboardInterrupt):
            go(family, name, **common)
        context.__exit__(None, None, None)
        out = tmp_path / name
        assert steps(out)[-1]["step"] == (13 if name == "died" else 10) and not (out / "summary.json").exists()
        summary = train.main(TrainConfig(out=str(out), resume=True))
        for got, wanted in zip(final_tensors(out), final_tensors(tmp_path / "whole"), strict=True):
            assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in wanted)
        assert timeless(lines(out)) == timeless(lines(tmp_path / "whole"))
        whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
        assert summary["loss"] == whole["loss"] and summary["steps"] == 20


def test_a_second_ctrl_c_stops_at_once(go, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    context = stop_in_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        go(steps=6, save_every=2)
    context.__exit__(None, None, None)
    assert len(steps(tmp_path / "run")) == 2 and signal.getsignal(signal.SIGINT) is before
    train.main(TrainConfig(out=str(tmp_path / "run"), resume=True))
    assert [x["step"] for x in steps(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_save_that_breaks_off_leaves_the_last_one(go, tmp_path, monkeypatch):
    """The run dies when half a file is written. The earlier file is still there."""
    real, calls = writing.save_file, []

    def breaks_off(tensors, path, metadata):
        real(tensors, path, metadata)
        if "state" in Path(path).name:
            calls.append(1)
            if len(calls) == 3:
                Path(path).write_bytes(Path(path).read_bytes()[:100])
                raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(writing, "save_file", breaks_off)
        go(steps=5, save_every=1)
    assert load_file(tmp_path / "run" / "state" / "state.safetensors")
    train.main(TrainConfig(out=str(tmp_path / "run"), resume=True))
    assert [x["step"] for x in steps(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert not [f for f in (tmp_path / "run").rglob("*") if ".tmp" in f.name]


def test_a_line_cut_in_the_middle_is_dropped_on_resume(go, tmp_path, monkeypatch):
    def die():
        with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
            f.write('{"step": 4, "loss": 7.')
        raise KeyboardInterrupt

    context = stop_in_step(monkeypatch, 4, die)
    with pytest.raises(KeyboardInterrupt):
        go(steps=5, save_every=2)
    context.__exit__(None, None, None)
    train.main(TrainConfig(out=str(tmp_path / "run"), resume=True))
    assert [x["step"] for x in steps(tmp_path / "run")] == [1, 2, 3, 4, 5]


def argv(cfg: TrainConfig) -> list[str]:
    words = []
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if value != f.default:
            words += ["--" + f.name.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.003)


def n_lines(out) -> int:
    path = Path(out) / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_ctrl_c_in_a_terminal(shared, tmp_path):
    out = tmp_path / "run"
    cfg = options(out, shared / "gpt2", shared / "data.jsonl", steps=30, save_every=1000, eval_every=1000)
    p = subprocess.Popen([sys.executable, ROOT / "train.py", *argv(cfg)], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE)
    wait_for(lambda: n_lines(out) >= 4, p)  # the first evaluation and 3 steps
    p.send_signal(signal.SIGINT)
    stdout, stderr = p.communicate(timeout=60)
    assert p.returncode == 130 and "Traceback" not in stderr and "error" not in stderr
    assert "--resume" in stdout.splitlines()[-1]
    done = steps(out)[-1]["step"]
    assert 3 <= done < 30 and (out / "state" / "state.safetensors").is_file() and not (out / "summary.json").exists()
    train.main(train.parse(["--out", str(out), "--resume"]))
    assert [x["step"] for x in steps(out)] == list(range(1, 31)) and (out / "summary.json").is_file()


# Imports once, then forks a child for each line of arguments. A new interpreter for each would take seconds to start.
SERVER = """
import json
import os
import sys
import train
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        train.main(train.parse(json.loads(line)))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_any_moment_leaves_a_state_to_resume_from(shared, tmp_path):
    out, rng = tmp_path / "run", random.Random(time.time_ns())
    cfg = options(out, shared / "gpt2", shared / "data.jsonl", steps=32, save_every=1, eval_every=1000, full=True)
    pipes = dict(text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, **pipes)
    with server:
        words = argv(cfg)
        for _ in range(3):
            before = n_lines(out)
            server.stdin.write(json.dumps(words) + "\n")
            server.stdin.flush()
            pid = int(server.stdout.readline())
            # A resumed run first rewrites metrics.jsonl without the steps after its save: fewer lines, then more.
            wait_for(lambda n=before: n_lines(out) >= n + 3, server)
            time.sleep(rng.uniform(0, 0.04))
            os.kill(pid, signal.SIGKILL)
            assert int(server.stdout.readline()) == signal.SIGKILL  # it was killed, and had not finished
            state = load_file(out / "state" / "state.safetensors")  # whole
            assert len(state) > 10 and all(torch.isfinite(v.float()).all() for v in state.values())
            words = ["--out", str(out), "--resume"]
        server.stdin.close()
    train.main(train.parse(words))
    assert [x["step"] for x in steps(out)] == list(range(1, 33))
    assert weights.load(str(out / "model"))


# ---------------------------------------------------------------------------------------------- evaluation

@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_loss_is_the_mean_over_tokens(family, shared):
    found, tokenizer = examples(shared, family), data.load_tokenizer(str(shared / family))
    model = weights.load(str(shared / family))
    total, labels, means = 0.0, 0, []
    with torch.no_grad():
        for e in found:
            each = F.cross_entropy(model(torch.tensor([e.ids]))[0], torch.tensor(e.targets), reduction="sum").item()
            n = sum(t != -100 for t in e.targets)
            total, labels, means = total + each, labels + n, [*means, each / n]
    replies = [json.loads(line)["output"] for line in (shared / "data.jsonl").read_text().splitlines()]
    n_bytes = sum(len(r.encode()) for r in replies)
    for b, pack in ((1, False), (5, False), (5, True), (100, False)):
        got = evaluate(model, dataset_of(found), TrainConfig(device="cpu", batch_size=b, pack=pack), tokenizer)
        assert got["val_loss"] == pytest.approx(total / labels, rel=1e-6)
        assert got["val_bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-6)
    assert abs(sum(means) / len(means) - total / labels) > 1e-3  # the mean of means is another number


@pytest.mark.parametrize("family", FAMILIES)
def test_two_evaluations_are_equal_whatever_the_dropout(family, shared):
    """nanoGPT#240: there dropout stayed on in evaluation."""
    found, cfg, values = examples(shared, family), TrainConfig(device="cpu", batch_size=4), []
    tokenizer = data.load_tokenizer(str(shared / family))
    for dropout in (0.0, 0.5):
        model = weights.load(str(shared / family))
        torch.manual_seed(0)
        lora.inject(model, dropout=dropout)
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.normal_()
        model.train()
        before = torch.get_rng_state()
        values += [evaluate(model, dataset_of(found), cfg, tokenizer) for _ in range(2)]
        assert model.training and torch.equal(torch.get_rng_state(), before)
        hidden = model.hidden(torch.tensor([found[0].ids]))
        assert torch.equal(hidden, model.hidden(torch.tensor([found[0].ids]))) == (dropout == 0)  # on in training
    assert all(v == values[0] for v in values)


def test_when_an_evaluation_is_due():
    """The last step always; and none that is at most half of --eval-every before it."""
    def due(last, every):
        return [s for s in range(1, last + 1) if is_due(s, TrainConfig(steps=last, eval_every=every))]

    assert due(25, 24) == [25] and due(25, 12) == [12, 25] and due(24, 12) == [12, 24] and due(3, 1) == [1, 2, 3]
    assert due(18, 12) == [18] and due(19, 12) == [12, 19] and due(5, 2) == [2, 5] and due(3, 9) == [3]
    for last in range(1, 40):
        for every in range(1, 40):
            found = due(last, every)
            assert found[-1] == last and all(2 * (b - a) > every for a, b in zip(found, found[1:], strict=False))


def test_an_evaluation_of_some_examples(go, shared, tmp_path):
    assert spread(7, 3).tolist() == [0, 2, 4] and spread(2, None).tolist() == spread(2, 2).tolist() == [0, 1]
    go(steps=2, eval_every=1, eval_examples=2)
    found, tokenizer = dataset(shared, "gpt2", "val.jsonl"), data.load_tokenizer(str(shared / "gpt2"))
    wanted = evaluate(weights.load(str(shared / "gpt2")), found, TrainConfig(device="cpu"), tokenizer,
                      numbers=torch.tensor([0, 2]))
    assert evaluations(tmp_path / "run")[0] == {"step": 0, **{k: pytest.approx(v, rel=1e-6) for k, v in wanted.items()}}
    with pytest.raises(UserError, match="--eval-examples 5: only 4 examples are held out"):
        go(name="more", steps=2, eval_examples=5)


def test_several_held_out_files(go, shared, tmp_path, capsys):
    """Each has a name, also two of the same name. best/ goes by the first. Samples are of the first."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "val.jsonl").write_text("".join(json.dumps({"instruction": f"zebra {i}", "output": "zebra " * (i + 2)}) + "\n"
                                             for i in range(3)))
    files = f"{shared / 'val.jsonl'},{shared / 'data.jsonl'},{other / 'val.jsonl'}"
    go(steps=6, eval_every=2, val_data=files, samples=1)
    evals = evaluations(tmp_path / "run")
    assert [list(x) for x in evals] == [["step", "val_loss", "val_bits_per_byte", "val_loss/data", "val_bits_per_byte/data",
                                         "val_loss/val-2", "val_bits_per_byte/val-2"]] * 4
    model = peft_files.load(weights.load(str(shared / "gpt2")), tmp_path / "run" / "adapter")
    for name, path in (("", shared / "val.jsonl"), ("/data", shared / "data.jsonl"), ("/val-2", other / "val.jsonl")):
        tokenizer = data.load_tokenizer(str(shared / "gpt2"))
        got = evaluate(model, dataset(shared, "gpt2", path), TrainConfig(device="cpu"), tokenizer)
        assert evals[-1]["val_loss" + name] == pytest.approx(got["val_loss"], rel=1e-5)
    loss_ = json.loads((tmp_path / "run" / "summary.json").read_text())["loss"]
    assert loss_["val_best"] == min(x["val_loss"] for x in evals[1:])
    assert loss_["others"] == {n: {"before": evals[0][f"val_loss/{n}"], "after": evals[-1][f"val_loss/{n}"]}
                               for n in ("data", "val-2")}
    out = capsys.readouterr().out
    assert "held-out val-2: 3 examples" in out and re.search(r"^val-2 +\d+\.\d{4} -> ", out, re.M)
    for wrong in (f"{shared / 'val.jsonl'},", ",x"):
        with pytest.raises(UserError, match="a comma without a file beside it"):
            go(name="wrong", val_data=wrong)
    with pytest.raises(UserError, match="nowhere.jsonl"):
        go(name="wrong", val_data=f"{shared / 'val.jsonl'},nowhere.jsonl")
    (tmp_path / "a,b.jsonl").write_bytes((other / "val.jsonl").read_bytes())
    assert list(prepare.val_sources(str(tmp_path / "a,b.jsonl"))) == ["a,b"]  # one file
    with pytest.raises(UserError, match="a held-out file has no weight"):
        go(name="wrong", val_data=f"{shared / 'val.jsonl'}:2")


# ---------------------------------------------------------------------------------------------- what a run leaves

def test_samples_during_training(go, tmp_path):
    """Greedy replies of the model as it is then: those after step 2 of 5 are the final ones of a run that ends there."""
    same = dict(lr=1e-2, samples=2, schedule="constant", full=True)
    go(steps=5, sample_every=2, **same)
    go(name="two", steps=2, **same)
    texts = (tmp_path / "run" / "samples.md").read_text(), (tmp_path / "two" / "samples.md").read_text()
    assert re.findall(r"^\*\*(.*):\*\*$", texts[0], re.M) == ["Before", "After step 2", "After step 4", "After",
                                                             "Held-out reply"] * 2
    replies = [re.findall(rf"^\*\*{title}:\*\*\n\n((?:>.*\n)+)", text, re.M)
               for title, text in zip(("After step 2", "After"), texts, strict=True)]
    assert replies[0] == replies[1] and len(replies[0]) == 2
    with pytest.raises(UserError, match="--sample-every 5: there are 5 steps"):
        go(name="late", steps=5, sample_every=5, samples=1)


def test_the_running_mean_has_no_bias():
    assert record.running_mean([3.0] * 30) == pytest.approx([3.0] * 30)
    assert record.running_mean([5.0, 1.0, 2.0]) == pytest.approx([5, (0.9 * 5 + 1) / 1.9, (0.81 * 5 + 0.9 + 2) / 2.71])


def test_the_picture(go, tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **kw: panels.extend(
        [(ax.get_ylabel(), {line.get_label(): list(line.get_ydata()) for line in ax.lines}) for ax in self.axes]))
    go(name="a_$x$_", steps=4, eval_every=2, lr=1e-2)
    got, evals = steps(tmp_path / "a_$x$_"), evaluations(tmp_path / "a_$x$_")
    (label, curves), (rate, rates), (norm, norms) = panels
    assert (label, rate, norm) == ("loss per labelled token (nats)", "learning rate", "gradient norm")
    assert curves == {"training, each step": [x["loss"] for x in got], "held-out": [x["val_loss"] for x in evals],
                      "training, running mean": record.running_mean([x["loss"] for x in got])}
    assert [*rates.values()] == [[x["lr"] for x in got]] and [*norms.values()] == [[x["grad_norm"] for x in got]]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_commands_to_type_next_work(full, go, tmp_path, monkeypatch, capsys):
    go(name="my run", steps=2, full=full)
    summary = json.loads((tmp_path / "my run" / "summary.json").read_text())
    assert "next          " + "\n              ".join(summary["next"]) in capsys.readouterr().out
    programs = []
    for line in summary["next"]:
        python, program, *words = shlex.split(line)
        assert python == "python" and Path(program).is_file()
        programs.append(Path(program).name)
        {"generate.py": generate, "export.py": export}[programs[-1]].main(words)
    assert programs == ["generate.py"] + ["export.py"] * (not full)
    assert full or (tmp_path / "my run" / "merged" / "model.safetensors").is_file()
    monkeypatch.chdir(ROOT)
    assert record.next_commands(TrainConfig(full=full), Path("r"))[0].startswith("python generate.py --model ")


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request, shared, tmp_path_factory):
    """A run of 9 steps that unlearns the held-out replies: its best evaluation is not its last, but gpt2's second and the
    others' first. It is better by 0.05 and more, and moves by 0.0001 from one kind of CPU to another. At lr 0.1 it moved
    by 0.05 (gpt2 and phi: 0.01), since Adam takes a step of lr along a gradient that is all rounding, too."""
    out = tmp_path_factory.mktemp("finished") / request.param
    zebras = shared / "zebras.jsonl"
    zebras.write_text("".join(json.dumps({"instruction": f"Say zebra {i}", "output": "zebra " * (i + 2)}) + "\n"
                              for i in range(4)))
    cfg = options(out, shared / request.param, shared / "data.jsonl", val_data=str(zebras), steps=9, eval_every=3, lr=0.03,
                  schedule="constant", lora_targets="all", samples=2, batch_size=4, grad_accum=2, weight_decay=0.1)
    return request.param, out, train.main(cfg), cfg


def number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def test_the_files_of_a_run(finished, shared):
    family, out, summary, cfg = finished
    top = {"config.json", "metrics.jsonl", "summary.json", "adapter", "best", "state", "loss.png", "samples.md"}
    assert {f.name for f in out.iterdir()} == top
    assert {f.name for f in (out / "state").iterdir()} == {"state.safetensors"}
    for folder in ("adapter", "best"):
        assert {f.name for f in (out / folder).iterdir()} == {"adapter_model.safetensors", "adapter_config.json",
                                                              "chat_template.jinja", "generation_config.json", "README.md",
                                                              "vocab.json", "merges.txt", "tokenizer_config.json"}
        assert (out / folder / "chat_template.jinja").read_text() == ALPACA
        assert json.loads((out / folder / "generation_config.json").read_text()) == {"eos_token_id": [4095]}
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and (out / "loss.png").stat().st_size > 5000

    config = json.loads((out / "config.json").read_text())
    assert config.keys() == {"options", "versions", "seed", "commit", "arithmetic", "inputs"}
    of_no_run = {"resume", "show_batch", "dry_run", "fit", "no_cache"}
    assert config["options"].keys() == {f.name for f in dataclasses.fields(TrainConfig)} - of_no_run
    given = {k: v for k, v in dataclasses.asdict(cfg).items() if v is not None and k not in of_no_run}
    assert {k: config["options"][k] for k in given} == given
    assert config["options"]["warmup_steps"] == 0 and config["options"]["bits"] == 32  # as resolved
    assert config["versions"]["torch"] == torch.__version__

    got, evals = steps(out), evaluations(out)
    assert [x["step"] for x in got] == list(range(1, 10)) and [x["step"] for x in evals] == [0, 3, 6, 9]
    for x in got:
        assert x.keys() == {"step", "loss", "lr", "grad_norm", "tokens", "examples", "step_s", "tokens_per_s"}
        assert all(number(v) for v in x.values()) and x["step_s"] > 0 and x["lr"] == 0.03
        assert x["tokens_per_s"] == pytest.approx(x["tokens"] / x["step_s"])
    assert all(x.keys() == {"step", "val_loss", "val_bits_per_byte"} for x in evals)
    epoch = sum(len(e.ids) for e in examples(shared, family))
    assert sum(x["tokens"] for x in got[:3]) == epoch and sum(x["examples"] for x in got[:3]) == ROWS

    samples = (out / "samples.md").read_text()
    assert samples.count("## Prompt") == samples.count("**Before:**") == samples.count("**After:**") == 2
    assert "Say zebra 0" in samples and "> zebra zebra" in samples


def test_the_model_card(finished, tmp_path):
    """PEFT's front matter, what the run knows, and nothing of this machine."""
    from huggingface_hub import ModelCard
    family, out, summary, cfg = finished
    for folder, loss_ in (("adapter", summary["loss"]["val_after"]), ("best", summary["loss"]["val_best"])):
        text = (out / folder / "README.md").read_text()
        card = ModelCard(text)
        assert card.data.to_dict() == {"base_model": family, "library_name": "peft", "tags": ["lora"],
                                       "pipeline_tag": "text-generation"}
        assert f"{summary['loss']['val_before']:.4f} before training, {loss_:.4f} after" in card.text
        assert "rank 8 and alpha 16 on all" in card.text and "`data.jsonl`" in card.text and "/" not in text
        assert ("Step 9 of 9, each of 8 examples" in text) == (folder == "adapter")


def test_a_card_claims_no_loss_that_was_not_measured(go, tmp_path):
    go(steps=3, eval_every=2, save_every=3)
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "Step 3 of 3" in text and "after this step" in text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["options"]["steps"] = 5  # as if it had been interrupted after step 3, where nothing is evaluated
    cfg = TrainConfig(**config["options"], resume=True)
    model, tokenizer = prepare.load_model(cfg), data.load_tokenizer(cfg.model)
    state.Run(cfg, tmp_path / "run", model, prepare.make_optimizer(model, cfg), prepare.make_scaler(cfg), tokenizer,
              "", train.Hooks()).export("adapter")
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "Step 3 of 5" in text and "after this step" not in text
    go(name="near the end", steps=5, eval_every=4, save_every=4)  # the evaluation at step 5 takes the place of that at 4
    cfg = TrainConfig(**json.loads((tmp_path / "near the end" / "config.json").read_text())["options"], resume=True)
    model = prepare.load_model(cfg)
    near = state.Run(cfg, tmp_path / "near the end", model, prepare.make_optimizer(model, cfg), prepare.make_scaler(cfg),
                     tokenizer, "", train.Hooks())
    near.step = 4
    near.export("adapter")
    text = (tmp_path / "near the end" / "adapter" / "README.md").read_text()
    assert "Step 4 of 5" in text and "after this step" not in text


def test_the_bases_tokenizer_and_generation_config_lie_beside_the_adapter(shared, tmp_path):
    """transformers reads an adapter's tokenizer and template there, and gets the ids that were trained on."""
    from transformers import AutoTokenizer, GenerationConfig
    nano, chat = ROOT / "assets" / "gpt2-nano", make_folder(tmp_path / "chat", "llama")
    AutoTokenizer.from_pretrained(nano).save_pretrained(chat)  # a tokenizer.json
    for f in ("vocab.json", "merges.txt"):
        os.remove(chat / f)
    (chat / "chat_template.jinja").write_text("{{ bos_token }}" + ALPACA)
    (chat / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.8,
                                                             "bos_token_id": 4095, "eos_token_id": 4095}))
    for model, template in ((nano, "auto"), (chat, "auto"), (chat, "alpaca")):
        out = tmp_path / f"{model.name}-{template}"
        run(out, model, shared / "data.jsonl", val_data=str(shared / "val.jsonl"), steps=1, template=template)
        for folder in ("adapter", "best"):
            theirs, ours = AutoTokenizer.from_pretrained(out / folder), data.load_tokenizer(str(model))
            assert theirs("Hello, my world  1")["input_ids"] == ours.encode("Hello, my world  1")
            assert (theirs.eos_token, theirs.eos_token_id) == (ours.eos, ours.eos_id)
            messages = [{"role": "user", "content": "Say the number 1"}]
            wanted = data.prompt_ids(messages, data.load_template(template, ours), ours)
            assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == wanted
            if model == chat:
                replies = GenerationConfig.from_pretrained(out / folder)
                assert (replies.temperature, replies.top_p, replies.bos_token_id) == (0.6, 0.8, 4095)
                assert replies.do_sample is True and replies.eos_token_id == [4095]
                assert (out / folder / "tokenizer.json").read_bytes() == (chat / "tokenizer.json").read_bytes()


def test_the_files_of_a_run_obey_the_umask_and_the_tokenizer_is_copied_once(go, tmp_path, monkeypatch):
    copies, real = [], shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: copies.append(a) or real(a, b))
    before = os.umask(0o027)
    try:
        go(steps=3, save_every=1, eval_every=3)
    finally:
        os.umask(before)
    assert len(copies) == 4  # vocab.json and merges.txt, to adapter/ and best/
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "run").rglob("*") if f.is_file()} == {0o640}


def test_the_summary(finished, shared):
    family, out, summary, cfg = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {k: set(v) if isinstance(v, dict) else None for k, v in summary.items()} == {
        "params": {"total", "trainable", "percent"},
        "memory": {"predicted_peak", "predicted_by_category", "measured_peak", "reserved", "rss_peak", "by_category"},
        "loss": {"first", "last", "val_before", "val_after", "val_best", "perplexity", "others"},
        "data": {"rows", "examples", "labels", "rows_dropped", "rows_cut", "labels_cut"},
        "tokens_per_s": None, "examples_per_s": None, "wall_s": None, "eval_s": None, "steps": None, "next": None,
        "arithmetic": {"weights", "products", "why"}}
    got, evals, loss_ = steps(out), evaluations(out), summary["loss"]
    assert (loss_["first"], loss_["last"]) == (got[0]["loss"], got[-1]["loss"])
    values = [x["val_loss"] for x in evals]
    assert (loss_["val_before"], loss_["val_after"], loss_["val_best"]) == (values[0], values[-1], min(values[1:]))
    assert loss_["perplexity"] == pytest.approx(math.exp(values[-1])) and loss_["others"] == {}
    assert 0 < summary["eval_s"] < summary["wall_s"]
    m, params = summary["memory"], summary["params"]
    assert m["reserved"] is None and m["rss_peak"] > 50e6 and tuple(m["by_category"]) == memory.CATEGORIES
    assert sum(m["by_category"].values()) == m["measured_peak"]
    assert m["by_category"]["weights"] == 4 * (params["total"] - params["trainable"])
    assert m["by_category"]["adapters"] == 4 * params["trainable"]
    assert m["by_category"]["optimizer"] >= 8 * params["trainable"]
    assert params["percent"] == pytest.approx(100 * params["trainable"] / params["total"])
    plan = Plan(dataset(shared, family), cfg.batch_size, cfg.grad_accum, cfg.seed)
    before, late = [], []  # sizes of earlier steps; the steps that the ledger does not follow, because they are no larger
    for i in range(1, 9):  # the first step is not followed: it warms up
        if all(any(covers(b, a) for b in before) for a in plan.sizes(i)):
            late.append(got[i])
        before += plan.sizes(i)
    assert 0 < len(late) < 7
    assert summary["tokens_per_s"] == pytest.approx(sum(x["tokens"] for x in late) / sum(x["step_s"] for x in late))
    assert summary["examples_per_s"] == pytest.approx(sum(x["examples"] for x in late) / sum(x["step_s"] for x in late))
    assert summary["steps"] == 9 and summary["wall_s"] > sum(x["step_s"] for x in got)


def test_best_is_the_lowest_held_out_loss(finished, shared):
    family, out, summary, cfg = finished
    values = summary["loss"]
    assert values["val_best"] < 0.997 * values["val_after"]  # else this test proves nothing
    for folder, wanted in (("best", "val_best"), ("adapter", "val_after")):
        model = peft_files.load(weights.load(str(shared / family)), out / folder)
        got = evaluate(model, dataset(shared, family, "zebras.jsonl"), cfg, data.load_tokenizer(str(shared / family)))
        assert got["val_loss"] == pytest.approx(values[wanted], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_trains_every_weight_and_leaves_model_folders(family, go, shared, tmp_path):
    go(family, full=True, steps=8, eval_every=2, lr=0.03, schedule="constant")
    out, start = tmp_path / "run", dict(weights.load(str(shared / family)).named_parameters())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["params"]["percent"] == 100 and summary["memory"]["by_category"]["adapters"] == 0
    assert not (out / "adapter").exists()
    for folder, wanted in (("model", "val_after"), ("best", "val_best")):
        model = weights.load(str(out / folder))
        assert (out / folder / "chat_template.jinja").is_file()
        assert not [n for n, p in model.named_parameters() if torch.equal(p, start[n])]
        found, tokenizer = dataset(shared, family, "val.jsonl"), data.load_tokenizer(str(shared / family))
        got = evaluate(model, found, TrainConfig(device="cpu", batch_size=8), tokenizer)["val_loss"]
        assert got == pytest.approx(summary["loss"][wanted], rel=1e-5)
        ours, theirs = (data.load_tokenizer(str(f)).encode("a b") for f in (out / folder, shared / family))
        assert ours == theirs


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_learns(family, full, go, tmp_path):
    """Four facts. Before training the loss is near that of a uniform guess (log 4096 = 8.3). --full learns them by heart;
    LoRA comes part of the way, because it cannot change the rows of the frozen random head."""
    facts = ("red", " stop"), ("green", " go"), ("blue", " sky"), ("white", " snow")
    toy = tmp_path / "toy.jsonl"
    toy.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in facts))
    more, bar = ({"full": True, "lr": 1e-2}, 0.1) if full else ({"lora_targets": "all", "lora_r": 8, "lr": 3e-2}, 0.5)
    go(family, data=toy, val_data=str(toy), steps=40, batch_size=4, eval_every=40, **more)
    values = json.loads((tmp_path / "run" / "summary.json").read_text())["loss"]
    assert values["val_before"] > 7 and values["val_after"] < bar * values["val_before"], values


# ---------------------------------------------------------------------------------------------- options

@pytest.mark.parametrize("family, first, more", [
    ("gpt2", {"lora_r": 3, "lora_dropout": 0.25}, {}), ("phi", {"lora_targets": "all", "rslora": True, "lora_r": 4}, {}),
    ("llama", {"amp": True, "bits": 4}, {"amp": True}), ("gpt2", {"amp": True, "bits": 8}, {"amp": True}),
    ("llama", {"amp": True, "bits": 4, "lora_init": "loftq"}, {"amp": True}),
    ("gpt2", {"lora_init": "pissa", "lora_targets": "c_attn.q,c_fc"}, {})], ids=str)
def test_a_second_stage_starts_where_the_adapter_is(family, first, more, go, tmp_path):
    """Rank, alpha, layers, start and bits are the adapter's. So is the held-out loss at step 0, to the last digit."""
    go(family, "first", **first, steps=4, lr=0.02)
    adapter = tmp_path / "first" / "adapter"
    go(family, "second", **more, adapter=str(adapter), steps=4, lr=0.02)
    before, after = evaluations(tmp_path / "first"), evaluations(tmp_path / "second")
    assert after[0]["step"] == 0 and after[0]["val_loss"] == before[-1]["val_loss"] != after[-1]["val_loss"]
    one, two = (json.loads((tmp_path / n / "config.json").read_text())["options"] for n in ("first", "second"))
    names = ("lora_r", "lora_alpha", "lora_dropout", "rslora", "lora_init", "bits")
    assert [one[n] for n in names] == [two[n] for n in names]
    assert two["lora_targets"] == {"gpt2": "c_attn.q,c_attn.v", "llama": "q_proj,v_proj"}.get(
        family, "dense,fc1,fc2,k_proj,q_proj,v_proj") or first["lora_targets"] == two["lora_targets"]
    old, new = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("first", "second"))
    assert {k: t.shape for k, t in old.items()} == {k: t.shape for k, t in new.items()}
    state_ = load_file(tmp_path / "second" / "state" / "state.safetensors")
    assert {t.item() for n, t in state_.items() if n.startswith("optimizer/step/")} == {4}  # a new optimizer


@pytest.mark.parametrize("more, says", [
    ({"lora_r": 4}, "--lora-r 4: the adapter in .* has 3; leave it out"),
    ({"lora_alpha": 4.0}, "--lora-alpha 4.0: the adapter in .* has 16.0"), ({"rslora": True}, "--rslora True: the adapter"),
    ({"lora_targets": "c_fc"}, "--lora-targets c_fc: the adapter in .* has c_attn.q,c_attn.v; leave"),
    ({"lora_init": "pissa"}, "--lora-init pissa: the adapter in .* has default"),
    ({"full": True}, "--adapter with --full: merge the adapter first"),
    ({"adapter": "none"}, "none/adapter_config.json: No such file"),
    ({"model": "llama"}, "adapter_model.safetensors: tensor base_model.* has no place in this model")])
def test_options_beside_an_adapter(more, says, go, shared, tmp_path):
    if not (shared / "adapter").exists():
        go(steps=1, lora_r=3)
        shutil.copytree(tmp_path / "run" / "adapter", shared / "adapter")
    family = more.pop("model", "gpt2")
    with pytest.raises(UserError, match=says):
        go(family, "second", **{"adapter": str(shared / "adapter"), **more})
    assert not (tmp_path / "second").exists()
    if "lora_r" in more:  # 8 is the default, but it is typed
        words = ["--model", shared / "gpt2", "--data", shared / "data.jsonl", "--adapter", shared / "adapter", "--lora-r", 8]
        with pytest.raises(UserError, match="--lora-r 8: the adapter in .* has 3"):
            train.main(train.parse([*map(str, words), "--dry-run"]))
        go("gpt2", "second", adapter=str(shared / "adapter"), lora_r=3, steps=1)  # the same is no contradiction


def test_train_config_is_the_only_list_of_options(capsys):
    assert train.parse([]) == TrainConfig()
    with pytest.raises(SystemExit) as e:
        train.parse(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for f in dataclasses.fields(TrainConfig):
        assert re.search(rf"^  --{f.name.replace('_', '-')}\s", text, re.M), f.name
        assert f.metadata["help"].split()[0] in text and f"{f.metadata['group']}:\n" in text


def test_every_option_is_parsed_into_its_field():
    other = {bool: True, int: 3, float: 0.25, str: "x"}
    for f in dataclasses.fields(TrainConfig):
        kind = f.metadata.get("type", f.type)
        value = next((c for c in f.metadata.get("choices", ()) if c != f.default), other[kind])
        cfg = train.parse(argv(dataclasses.replace(TrainConfig(), **{f.name: value})))
        assert cfg == dataclasses.replace(TrainConfig(), **{f.name: value}) and isinstance(getattr(cfg, f.name), kind)


@pytest.mark.parametrize("more,wanted", [
    ({"batch_size": 0}, "--batch-size"), ({"grad_accum": 0}, "--grad-accum"), ({"steps": 0}, "--steps"),
    ({"clip": -1.0}, "--clip"), ({"lr": math.nan}, "--lr"), ({"lr": math.inf}, "--lr"), ({"ckpt_every": -1}, "--ckpt-every"),
    ({"ckpt_offload": True}, "--ckpt-every"),
    ({"full": True, "lora_r": 4}, "--lora-r"), ({"full": True, "lora_dropout": 0.1}, "--lora-dropout"),
    ({"full": True, "bits": 16}, "--bits"), ({"from_scratch": True}, "--full"),
    ({"val_data": "x", "data": "y", "val_frac": 0.2}, "--val-frac"), ({"val_data": "x"}, "--data"),
    ({"steps": 5, "epochs": 2}, "--epochs"), ({"device": "nowhere"}, "--device"), ({"patience": 0}, "--patience"),
    ({"keep": 0}, "--keep"), ({"eval_examples": 0}, "--eval-examples"), ({"sample_every": 0}, "--sample-every"),
    ({"sample_every": 2, "samples": 0}, "--sample-every")])
def test_options_that_cannot_apply_are_refused(more, wanted):
    with pytest.raises(UserError, match=wanted):
        resolve_bits(train.resolve(train.TrainConfig(**more)), None)


def test_a_run_is_not_overwritten_and_resume_keeps_its_options(go, shared, tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        train.main(TrainConfig(out=str(tmp_path / "run"), resume=True))
    go(steps=2)
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    with pytest.raises(UserError, match="--resume"):
        go(steps=2)
    with pytest.raises(UserError, match=r"changed option: --batch-size 3"):
        train.main(TrainConfig(out=str(tmp_path / "run"), batch_size=3, resume=True))
    with pytest.raises(UserError, match="needs --out"):
        train.main(TrainConfig(resume=True))
    for more, wanted in (({"max_length": 129}, "--max-length 129"), ({"ckpt_every": 4}, "--ckpt-every 4")):
        with pytest.raises(UserError, match=wanted):
            go(name="other", **more)
    assert before == {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    assert not (tmp_path / "other").exists()  # refused before anything was written
