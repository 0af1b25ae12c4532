"""`python -m bench gpu` (bench/gpu.py) on a CPU: all that can run without a GPU does; a GPU's answers are stand-ins.

No line of it has run on a GPU.
"""
import contextlib
import json
import os
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from conftest import REAL_PREDICTOR

import memory
import train
from bench import gpu
from bench import gpu_claims as claims
from errors import UserError
from ledger import ask
from run import options
from techniques import optim, quant

ABOUT = {"date": "today", "machine": "a test", "versions": {"torch": "2"}, "commit": None}
CUDA = torch.autograd.DeviceType.CUDA


class Predictor:
    """Stands in for the prediction's process: always the same answer."""
    peak, reserved, asked = 10**6, None, []

    def ask(self, cfg, steps):
        self.asked.append(steps)

    def answer(self):
        return {"peak": self.peak, "reserved": self.reserved}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def b(tmp_path):
    return claims.Bench("cpu", tmp_path, tmp_path / "gpu.jsonl", ("--amp", "--full --grad-accum 2"))


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def start(out, *words, combinations=()):
    return gpu.main(["--device", "cpu", "--out", str(out), *words], ABOUT, combinations)


def stages(monkeypatch, **of):
    """The bench's stages are these generators, of 30 s each."""
    monkeypatch.setattr(gpu, "STAGES", {name: (stage, 30) for name, stage in of.items()})


# ---------------------------------------------------------------------------------------------- the stages

def test_every_stage_runs_on_a_cpu(tmp_path, monkeypatch):
    """(but compile: 40 seconds)"""
    monkeypatch.setattr(claims, "PARITY", claims.PARITY[-2:])
    monkeypatch.setattr(claims, "T4", claims.T4[-2:])
    monkeypatch.setattr(claims, "WITHIN", 10**4)
    monkeypatch.setattr(ask, "Predictor", Predictor)
    names = [name for name in gpu.STAGES if name != "compile"]
    assert start(tmp_path, "--stages", ",".join(names), combinations=("--amp --bits 4",)) is True
    found = lines(tmp_path)
    assert list(dict.fromkeys(x["stage"] for x in found)) == names
    assert [(x["stage"], x["what"]) for x in found if "skipped" in x] == [
        ("card", "GPU"), ("nf4", "speed"), *[("speed", what) for _ in range(4) for what in ("busy", "waits")]]
    assert {x["skipped"] for x in found if "skipped" in x} == {"needs a GPU"} and all(x.get("ok", True) for x in found)
    assert len([x for x in found if x["stage"] == "attention"]) == 18
    assert all(x["scale"] > 1 for x in found if x["stage"] == "t4")  # float16: the scaler works
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"\n## {name}\n" in text for name in names) and "python -m bench gpu --device cpu" in text


def test_the_prediction_is_asked_about_the_job_that_runs(b, monkeypatch):
    """On a CPU the prediction is exact. So a question about other lengths or options would show."""
    monkeypatch.setattr(ask, "Predictor", REAL_PREDICTOR)
    b.combinations = ("--amp", "--full --grad-accum 2")
    gpu.run_stage(b, "memory")
    found = lines(b.folder)
    assert [(x["model"], x["options"]) for x in found] == [(claims.SMALL, "--amp"), (claims.SMALL, "--full --grad-accum 2"),
                                                           ("gpt2", "--amp")]
    assert [x["off %"] for x in found[:2]] == [0, 0] and abs(found[2]["off %"]) < 1, found


@pytest.mark.parametrize("predicted,reserved,ok", [(1.04, 1.04, True), (1.06, 1, False), (0.94, 1, False), (1, 1.06, False)])
def test_a_prediction_holds_within_5_per_cent(predicted, reserved, ok, b, monkeypatch):
    monkeypatch.setattr(memory, "cuda_peak", lambda device: (10**6, 2 * 10**6))
    predictor = Predictor()
    predictor.peak, predictor.reserved = predicted * 10**6, reserved * 2 * 10**6
    assert claims.peaks(b, claims.Job(b, "gpt2", "--amp"), predictor)["ok"] is ok


def test_a_failed_case_takes_its_answer_from_the_prediction(b, monkeypatch):
    """Else every later case would be compared with the prediction of the one before."""
    answers = []
    monkeypatch.setattr(claims, "measured_peaks", lambda b, job: 1 / 0)
    monkeypatch.setattr(Predictor, "answer", lambda self: answers.append(1) or {"error": "none"})
    with pytest.raises(ZeroDivisionError):
        claims.peaks(b, claims.Job(b, "gpt2", ""), Predictor())
    assert answers == [1]


def test_a_wrong_paged_optimizer_is_noticed(b, monkeypatch):
    monkeypatch.setattr(optim.PagedAdamW8bit, "put_back", lambda *args: None)
    gpu.run_stage(b, "optimizers")
    assert [x.get("ok") for x in lines(b.folder)] == [False, True, True, None]


@pytest.mark.parametrize("model,words", [(claims.SMALL, "--amp"), (claims.SMALL, "--full --amp --optimizer offload_adamw")])
def test_another_start_shows_in_the_losses(model, words, b, monkeypatch):
    """What parity compares would not be equal without start_as, where two devices draw other random numbers."""
    rng = torch.Generator()

    def other_numbers(job):
        with torch.no_grad():
            for p in job.model.parameters():
                if p.requires_grad:
                    job.optimizer.master(p).add_(0.02 * torch.randn(p.shape, generator=rng))
                    p.copy_(job.optimizer.master(p))
        return job

    load = claims.Job.load
    monkeypatch.setattr(claims.Job, "load", lambda job: other_numbers(load(job)))
    assert claims.losses_on_both(b, model, words)["worst relative difference"] == 0
    monkeypatch.setattr(claims.Job, "start_as", lambda *args: None)
    assert claims.losses_on_both(b, model, words)["worst relative difference"] > 0


def test_compiled_code_that_computes_something_else(b, monkeypatch):
    """(A stand-in compiles nothing, and then spoils the model.)"""
    compiled = []
    monkeypatch.setattr(options, "check_compiler", lambda device: None)
    monkeypatch.setattr(claims, "compile_blocks", compiled.append)
    found = claims.compiled_and_not(b, "--amp")
    assert found["ok"] is True and found["worst relative difference"] == 0 and len(compiled) == 1
    monkeypatch.setattr(claims, "compile_blocks", lambda model: model.head.weight.data.mul_(9))
    assert claims.compiled_and_not(b, "--amp")["ok"] is False


def test_attention_that_stores_the_matrix_is_noticed(b, monkeypatch):
    assert claims.attention_kernel(b, torch.bfloat16, "grouped", "packed")["ok"] is True
    monkeypatch.setattr(claims.attention, "scaled_dot_product_attention", lambda q, k, v, *a, **how: q @ k.mT @ v)
    result = claims.attention_kernel(b, torch.float32, "plain", "padded")
    assert result == {"kernels": ["the plain formula"], "ok": False}


def test_the_formula_of_mfu(b, monkeypatch):
    """4 FLOPs a weight and token; two examples of 32 tokens in half a second."""
    job = claims.Job(b, claims.SMALL, "--amp --bits 4", full=True).load()
    C, F, V, kv = 64, 128, 512, 32
    n = V * C + 2 * (2 * C * C + 2 * kv * C + 3 * F * C + 2 * C) + C  # the head is the embedding; 2 layers; norms
    monkeypatch.setattr(claims.Job, "timed_steps", lambda job, n: [0.5] * n)
    found = claims.throughput(b, job)
    assert found["tokens/s"] == 128 and found["TFLOP/s"] == pytest.approx(4 * n * 128 / 1e12) and found["MFU %"] is None


# ---------------------------------------------------------------------------------------------- a GPU's answers

@pytest.fixture
def as_a_gpu(monkeypatch):
    """as_a_gpu(): from now on the CPU counts as a GPU, so that the lines run that only a GPU needs -> what was done."""
    def enter():
        done = []
        for name, answer in {"empty_cache": None, "reset_peak_memory_stats": None, "memory_allocated": 100,
                             "max_memory_allocated": 300, "get_device_name": "Tesla T4"}.items():
            monkeypatch.setattr(torch.cuda, name, lambda *device, name=name, answer=answer: done.append(name) or answer)
        monkeypatch.setattr(claims.Bench, "cuda", True)
        monkeypatch.setattr(claims, "COPIED", 2**20)
        return done
    return enter


def test_the_peaks_are_those_of_the_second_and_third_step(b, as_a_gpu, monkeypatch):
    job, step = claims.Job(b, "gpt2", "--amp"), claims.Job.step
    done = as_a_gpu()
    monkeypatch.setattr(memory, "cuda_peak", lambda device: (7, 8))
    monkeypatch.setattr(claims.Job, "step", lambda job: done.append("step") or step(job))
    found = claims.measured_peaks(b, job)
    assert done == ["memory_allocated", "step", "empty_cache", "reset_peak_memory_stats", "step", "step"]
    assert (found["allocated"], found["reserved"], found["before"]) == (7, 8, 100)


def test_a_scaler_that_skips_the_first_steps(b, monkeypatch):
    """Without AdamW's state the measured peak would be too small."""
    job, step, taken = claims.Job(b, "gpt2", "--amp"), claims.Job.step, []
    monkeypatch.setattr(claims.Job, "step", lambda job: taken.append(1) or (step(job) if len(taken) > 3 else 9.0))
    claims.measured_peaks(b, job)
    assert len(taken) == 3 + 1 + 2


def test_attentions_bytes(b, as_a_gpu, monkeypatch):
    as_a_gpu()
    found = claims.attention_kernel(b, torch.float32, "grouped", "packed")
    assert found["extra bytes"] == 200 and found["bytes of T x T"] == 8 * 2048**2 * 4 and found["ok"]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9)
    assert not claims.attention_kernel(b, torch.float32, "grouped", "packed")["ok"]


def test_the_bytes_of_the_nf4_kernel(b, as_a_gpu, monkeypatch):
    layer = quant.quantize(torch.nn.Linear(128, 64, bias=False), torch.randn(64, 128), 4)
    as_a_gpu()
    monkeypatch.setattr(claims, "warm_seconds", lambda work, device, n: work() is None or 1e-3)
    found = claims.nf4_speed(b, layer)
    assert found["GB/s"] == pytest.approx(64 * 128 * 2.5625 / 1e-3 / 1e9) and found["kernel us"] == pytest.approx(1000)
    assert found["share %"] == pytest.approx(100 * 64 * 128 * 2.5625 / (2 * 2**20))
    assert claims.nf4_bits(b, layer)["ok"] is False  # a GPU on which Triton does not run


def test_the_peak_of_a_gpu():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "Tesla T4", "NVIDIA L40", "NVIDIA T400")
    assert [claims.peak_of(name) for name in names] == [989e12, 756e12, 312e12, 65e12, None, None]


def test_wall_and_busy(b, as_a_gpu, monkeypatch):
    job = claims.Job(b, "gpt2", "--amp").load()
    as_a_gpu()
    profile = types.SimpleNamespace(events=lambda: [event("a", 0, 5)])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profile))
    monkeypatch.setattr(claims.Job, "timed_steps", lambda job, n: [10e-6] * n)
    found = claims.busy(b, job)
    assert (found["wall ms"], found["busy %"]) == (pytest.approx(0.01), pytest.approx(50))


def event(name, start, end, device=CUDA, user=False):
    return types.SimpleNamespace(name=name, device_type=device, is_user_annotation=user,
                                 time_range=types.SimpleNamespace(start=start, end=end))


def test_busy_time_counts_what_overlaps_once():
    """In microseconds; the step took 100."""
    host = event("on the host", 40, 50, torch.autograd.DeviceType.CPU)
    events = [event("a", 20, 30), event("b", 0, 10), event("copy", 5, 12), event("b", 22, 25), host,
              event("step", 0, 99, user=True), event("Context Sync", 30, 90)]
    found = claims.busy_times(events, 100e-6)
    assert found["busy ms"] == pytest.approx(0.022) and found["busy %"] == pytest.approx(22) and found["kernels"] == 4
    assert found["longest, ms"] == {"b": 0.01, "a": 0.01, "copy": 0.01}


def test_a_wait_is_counted_where_this_project_causes_it(b, monkeypatch):
    """Two waits inside PyTorch, called from one line of train.py; the debug mode ends, whatever happens."""
    modes, clip = [], torch.nn.utils.clip_grad_norm_

    namespace = {"warnings": warnings, "clip": clip}
    source = "def waits_twice(*args):\n for _ in range(2): warnings.warn('called a synchronizing CUDA operation (x)')\n" \
             " warnings.warn('another')\n return clip(*args)"
    exec(compile(source, "/site-packages/torch/nn/utils/clip_grad.py", "exec"), namespace)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    job = claims.Job(b, "gpt2", "--amp").load()
    b.device = "cuda"
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", namespace["waits_twice"])
    found = claims.waits(b, job)
    source = Path(train.__file__).read_text().splitlines()
    (place, n), = found["places"].items()
    assert found["waits"] == n == 2 and modes == ["warn", "default"]
    assert place.startswith("train.py:") and "clip_grad_norm_" in source[int(place.partition(":")[2]) - 1]
    monkeypatch.setattr(claims.Job, "step", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        claims.waits(b, job)
    assert modes[2:] == ["warn", "default"]


def test_about_the_card(b, monkeypatch):
    its = types.SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 10**9, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: its)

    def no_program(*args, **how):
        raise FileNotFoundError("nvidia-smi")
    monkeypatch.setattr(claims.subprocess, "run", lambda *args, **how: types.SimpleNamespace(stdout="550.1\n550.1\n"))
    b.device = "cuda"
    found = claims.about_gpu(b)
    assert (found["name"], found["capability"], found["driver"]) == ("NVIDIA H100", "9.0", "550.1")
    monkeypatch.setattr(claims.subprocess, "run", no_program)
    assert claims.about_gpu(b)["driver"] is None


# ---------------------------------------------------------------------------------------------- what goes wrong

def test_what_breaks_is_recorded_and_the_rest_runs(tmp_path, monkeypatch, capfd):
    def case(b):
        yield {"n": 1}, lambda: {"value": 1}
        yield {"n": 2}, lambda: 1 / 0
        yield {"n": 3}, lambda: {"value": 3, "ok": False}

    def generator(b):
        yield {"n": 1}, lambda: {"value": 1}
        raise UserError("no model\nsecond line")

    def dies(b):
        yield {"n": 1}, lambda: {"value": 1}
        yield {"n": 2}, lambda: os._exit(3)

    def hangs(b):
        yield {"n": 1}, lambda: {"value": 1}
        yield {"n": 2}, lambda: time.sleep(60)

    stages(monkeypatch, case=case, generator=generator, dies=dies, hangs=hangs, good=lambda b: [({}, dict)])
    gpu.STAGES["hangs"] = hangs, 0.5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)  # the parent must not ask: CUDA does not survive a fork
    with pytest.raises(UserError, match='^5 of 10 results are errors, or claims that do not hold'):
        start(tmp_path)
    found = lines(tmp_path)
    assert [(x["stage"], x.get("n"), x.get("error", x.get("value"))) for x in found] == [
        ("case", 1, 1), ("case", 2, "ZeroDivisionError: division by zero"), ("case", 3, 3),
        ("generator", 1, 1), ("generator", None, "UserError: no model second line"),
        ("dies", 1, 1), ("dies", None, "its process ended with exit code 3 (-N: killed by signal N)"),
        ("hangs", 1, 1), ("hangs", None, "killed after 0.5 s, its time budget: the cases not listed did not run"),
        ("good", None, None)]
    assert "Traceback" not in capfd.readouterr().err and "**no**" in (tmp_path / "gpu.md").read_text()


def test_a_stage_that_does_not_fit_into_the_time_is_skipped(tmp_path, monkeypatch):
    stages(monkeypatch, long=lambda b: 1 / 0, short=lambda b: [({"n": 1}, dict)])
    gpu.STAGES["short"] = gpu.STAGES["short"][0], 5
    assert start(tmp_path, "--seconds", "10")
    assert [x.get("skipped") for x in lines(tmp_path)] == ["its budget is 30 s, and 10 of 10 s are left", None]


def test_the_usual_budgets_fit_into_8_minutes():
    assert sum(budget for _, budget in gpu.STAGES.values()) <= 480


def test_an_interrupted_bench_says_where_its_results_are(tmp_path, monkeypatch, capsys):
    def interrupted(b, name, budget):
        b.record(name, {"value": 1})
        raise KeyboardInterrupt
    monkeypatch.setattr(gpu, "in_fork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, "--stages", "card")
    assert f"the results until now are in {tmp_path / 'gpu.jsonl'}" in capsys.readouterr().out and len(lines(tmp_path)) == 1


@pytest.mark.parametrize("words,said", [
    (("--stages", "card,typo"), "--stages 'typo': only card, attention"), (("--stages", ""), "--stages '': only card"),
    (("--seconds", "0"), "--seconds 0.0: must be above 0"), (("--seconds", "nan"), "--seconds nan: must be above 0"),
    (("--device", "nonsense"), "--device nonsense: "), (("--out", "/dev/null/x"), "--out /dev/null/x could not be written")])
def test_wrong_options(words, said, tmp_path):
    with pytest.raises(UserError) as e:
        start(tmp_path, *words)
    assert str(e.value).startswith(said) and "\n" not in str(e.value) and not (tmp_path / "gpu.jsonl").exists()


def test_no_results_are_lost(tmp_path, monkeypatch):
    stages(monkeypatch, good=lambda b: [({"n": 1}, dict)])
    assert start(tmp_path)
    before = (tmp_path / "gpu.jsonl").read_text()
    with pytest.raises(UserError, match="holds the results of an earlier bench: move it away"):
        start(tmp_path)
    assert (tmp_path / "gpu.jsonl").read_text() == before
