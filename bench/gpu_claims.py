"""The cases of `python -m bench gpu`: each measures one thing that this project claims about a GPU. gpu.py runs them.

A stage is a generator of cases, and a case is (what it is about, a function that measures it). Its result may have "ok":
whether a claim holds. Weights and tokens are random: bytes and times do not depend on them.
"""
import collections
import contextlib
import dataclasses
import gc
import json
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import memory
import train
from files import hub, weights, writing
from ledger import ask
from run import prepare
from run.options import parse, resolve, resolve_for
from techniques import attention, optim, quant
from techniques.compilation import compile_blocks
from techniques.device import CPU, Device, compute_dtype, device_of, pretend, synchronize, type_name

ROOT = Path(__file__).resolve().parent.parent
SMALL, BIG = "smollm2-135m", "llama-3.2-1b"  # shapes: grouped heads and a tied head, both
TINY = {"gpt2": {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4},
        "llama": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2}}
COPIED = 2**30  # bytes of the copy that measures the memory's speed: more than any cache holds
WITHIN = 5  # per cent: how far a prediction may be from what is measured
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 3e-3}  # of a loss, relative: CPU against GPU
PEAK = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "T4": 65}  # 16 bit, dense; TFLOP/s


class NeedsGPU(Exception):
    """A case that only a GPU can run."""


@dataclasses.dataclass
class Bench:
    """device: "cuda", "cuda:1", "cpu". folder: for models. path: gpu.jsonl. combinations: options of `bench predict`."""
    device: str
    folder: Path
    path: Path
    combinations: tuple = ()

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def need_gpu(self):
        if not self.cuda:
            raise NeedsGPU

    def model(self, name: str) -> str:
        """A folder with the shape of `name` and random weights (gpt2-nano: the bundled model)."""
        if name == "gpt2-nano":
            return name
        folder, raw = self.folder / name, hub.known_config(name)
        if not (folder / "model.safetensors").exists():
            folder.mkdir(exist_ok=True)
            writing.write_text(folder / "config.json", json.dumps(raw if self.cuda else raw | TINY[raw["model_type"]]))
            weights.save(weights.from_scratch(str(folder)), folder, "bfloat16")
        return str(folder)

    def record(self, stage: str, result: dict):
        line = json.dumps({"stage": stage, **result})
        with self.path.open("a", encoding="utf-8") as f:
            f.write(line + "\n")
        print(line, flush=True)

    def clear(self):
        """Free what the last case left, so that the next one measures its own memory."""
        gc.collect()
        device_of(self.device).rooms.clear()
        if self.cuda:
            torch.cuda.empty_cache()


class Job:
    """What train.py makes from `options`: model, optimizer, examples. The examples are random tokens, the same each step.

    full: every example has --max-length tokens, all of them labelled. Else the lengths differ, and each example begins with
    tokens that are not labelled.
    """

    def __init__(self, b: Bench, model: str, options: str, device: str | None = None, full: bool = False):
        small = [] if b.cuda else ["--max-length", "32", "--batch-size", "2"]
        cfg = resolve(parse(["--model", b.model(model), "--device", device or b.device, *small, *options.split()]))
        config, _, _ = weights.config_of(cfg.model)
        resolve_for(cfg, config, None)
        rng = torch.Generator().manual_seed(cfg.seed)
        self.cfg, self.micro_batches = cfg, []
        for _ in range(cfg.grad_accum):
            examples = []
            for i in range(cfg.batch_size):
                n = cfg.max_length - (0 if full else i * cfg.max_length // (2 * cfg.batch_size))
                ids, hidden = torch.randint(0, 500, (n + 1,), generator=rng).tolist(), 0 if full else n // 4
                examples.append(data.Example(ids[:-1], [data.IGNORE] * hidden + ids[1 + hidden:]))
            self.micro_batches.append(examples)

    def load(self) -> "Job":
        self.model = prepare.load_model(self.cfg).train()
        self.optimizer, self.scaler = prepare.make_optimizer(self.model, self.cfg), prepare.make_scaler(self.cfg)
        if self.cfg.compile:
            compile_blocks(self.model)
        return self

    def step(self) -> float:
        """One step of train.py, from the examples to the new weights -> its loss."""
        batches = [data.collate(m, self.cfg.pack, self.cfg.max_length) for m in self.micro_batches]
        return train.train_step(self.model, self.optimizer, self.scaler, batches, self.cfg)[0]

    def timed_steps(self, n: int) -> list[float]:
        """The seconds of n steps."""
        return [seconds(self.step, self.cfg.device) for _ in range(n)]

    def start_as(self, other: "Job"):
        """Take over the trained parameters of the same job on another device: random numbers differ between devices."""
        with torch.no_grad():
            for mine, its in zip(self.model.parameters(), other.model.parameters(), strict=True):
                if mine.requires_grad:
                    self.optimizer.master(mine).copy_(other.optimizer.master(its))
                    mine.copy_(self.optimizer.master(mine))


def seconds(work, device: str, n: int = 1) -> float:
    """The mean time of n calls, until the device has finished them."""
    synchronize(torch.device(device))
    start = time.perf_counter()
    for _ in range(n):
        work()
    synchronize(torch.device(device))
    return (time.perf_counter() - start) / n


def warm_seconds(work, device: str, n: int) -> float:
    seconds(work, device, n)
    return seconds(work, device, n)


def off(predicted: float, measured: float) -> float:
    """By how many per cent the prediction is too high."""
    return 100 * (predicted / measured - 1)


# ------------------------------------------------------------------------------------------------------ card

def card(b: Bench):
    yield {"what": "GPU"}, lambda: about_gpu(b)
    yield {"what": "techniques/device.py"}, lambda: {
        **ask.machine(b.device), "rms_norm_kernel": device_of(b.device).rms_norm_kernel, "why": device_of(b.device).why}


def about_gpu(b: Bench) -> dict:
    b.need_gpu()
    its, driver = torch.cuda.get_device_properties(b.device), None
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # a container may lack nvidia-smi
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.partition("\n")[0]
    return {"name": its.name, "capability": f"{its.major}.{its.minor}", "memory": its.total_memory,
            "processors": its.multi_processor_count, "driver": driver, "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version()}


# ------------------------------------------------------------------------------------------------------ attention

class Kernels(TorchDispatchMode):
    """Collects the names of PyTorch's attention kernels that run. None of them: the plain formula."""

    def __init__(self):
        super().__init__()
        self.names = []

    @classmethod
    def _should_skip_dynamo(cls):  # (see memory.py)
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if "attention" in name and name not in self.names:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def attention_kernels(b: Bench):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for heads in ("plain", "grouped"):
            for layout in ("padded", "packed", "mask"):
                yield ({"type": type_name(dtype), "heads": heads, "layout": layout},
                       lambda d=dtype, h=heads, w=layout: attention_kernel(b, d, h, w))


def attention_kernel(b: Bench, dtype: torch.dtype, heads: str, layout: str) -> dict:
    """Forward and backward of 8 heads. padded: no mask, as for padding on the right. mask: generation, forward only; no
    claim is made about it."""
    T, rows = 2048 if b.cuda else 64, 1 if layout == "packed" else 2
    q, k, v = (torch.randn(rows, h, T, 64, device=b.device, dtype=dtype, requires_grad=layout != "mask")
               for h in (8, *([8 if heads == "plain" else 2] * 2)))
    mask = torch.ones(T, T, dtype=torch.bool, device=b.device).tril().expand(rows, 1, T, T) if layout == "mask" else None
    if b.cuda:
        before = torch.cuda.memory_allocated(b.device)
        torch.cuda.reset_peak_memory_stats(b.device)
    with Kernels() as kernels:
        y = attention.attend(q, k, v, [T // 4, T - T // 4] if layout == "packed" else None, mask)
        if mask is None:
            y.sum().backward()
    result = {"kernels": kernels.names or ["the plain formula"]}
    if b.cuda:
        extra, matrix = torch.cuda.max_memory_allocated(b.device) - before, rows * 8 * T * T * dtype.itemsize
        result |= {"extra bytes": extra, "bytes of T x T": matrix}
    return result if mask is not None else {**result, "ok": bool(kernels.names) and (not b.cuda or extra < matrix)}


# ------------------------------------------------------------------------------------------------------ nf4

def nf4(b: Bench):
    rows, columns = (4096, 11008) if b.cuda else (64, 128)  # LLaMA-7B's largest layer
    linear = torch.nn.Linear(columns, rows, bias=False, device="meta")
    layer = quant.quantize(linear, torch.randn(rows, columns), 4).to(b.device)
    yield {"what": "equal to PyTorch's operators"}, lambda: nf4_bits(b, layer)
    yield {"what": "speed"}, lambda: nf4_speed(b, layer)


def nf4_bits(b: Bench, layer) -> dict:
    kernel, found = device_of(b.device).nf4_kernel, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fast = layer.dequantize(dtype)
        with pretend(b.device, dataclasses.replace(device_of(b.device), nf4_kernel=None, rooms={})):
            found[type_name(dtype)] = torch.equal(fast, layer.dequantize(dtype))
    return {"kernel": "Triton" if kernel else "PyTorch", **found, "ok": all(found.values()) and (not b.cuda or bool(kernel))}


def nf4_speed(b: Bench, layer) -> dict:
    """For each weight the kernel reads 0.5 bytes of codes and 4 / 64 of absmax, and writes 2. A copy reads and writes."""
    b.need_gpu()
    absmax, n = layer.absmax32(), layer.n_weights
    out = torch.empty(layer.out_features, layer.in_features, dtype=torch.bfloat16, device=b.device)
    a, to = (torch.empty(COPIED, dtype=torch.uint8, device=b.device) for _ in range(2))
    kernel = warm_seconds(lambda: quant.dequantize_nf4(layer.weight, absmax, out), b.device, 50)
    copy, scales = warm_seconds(lambda: to.copy_(a), b.device, 50), warm_seconds(layer.absmax32, b.device, 50)
    speed, limit = (0.5 + 4 / 64 + 2) * n / kernel / 1e9, 2 * a.nbytes / copy / 1e9
    return {"kernel us": kernel * 1e6, "GB/s": speed, "copy GB/s": limit, "share %": 100 * speed / limit,
            "absmax32 us": scales * 1e6}


# ------------------------------------------------------------------------------------------------------ optimizers

def optimizers(b: Bench):
    yield {"what": "paged_adamw8bit and adamw8bit"}, lambda: compared(stepped(b, "paged_adamw8bit", b.device),
                                                                      stepped(b, "adamw8bit", b.device), True)
    for dtype in (torch.float32, torch.bfloat16):  # the type of the weights and gradients on the GPU
        yield {"what": f"offload_adamw and adamw on the CPU, gradients in {type_name(dtype)}"}, lambda d=dtype: compared(
            stepped(b, "offload_adamw", b.device, d), stepped(b, "adamw", "cpu", d), True)
    yield {"what": "offload_adamw and adamw on the GPU: not the same kernel"}, lambda: compared(
        stepped(b, "offload_adamw", b.device), stepped(b, "adamw", b.device), False)


def stepped(b: Bench, name: str, device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The weights and the states after 5 steps with given gradients, on the CPU. dtype: what gradients are rounded to."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(5000 if b.cuda else 500, 1000)] * 3 + [(70,)]  # several chunks of an 8-bit optimizer
    params = [torch.nn.Parameter(torch.randn(s, generator=rng).to(device)) for s in shapes]
    more = {"device": device, "dtype": dtype} if name == "offload_adamw" else {}
    optimizer = optim.OPTIMIZERS[name]([{"params": params, "weight_decay": 0.1}], 1e-3, **more)
    for _ in range(5):
        gradients = [torch.randn(s, generator=rng).to(dtype) for s in shapes]
        sum((p * g.to(device, p.dtype)).sum() for p, g in zip(params, gradients)).backward()  # dp is exactly g
        optimizer.step()
        optimizer.zero_grad()
    masters = [optimizer.master(p) for p in params]
    return [t.detach().cpu() for m in masters for t in (m, *optimizer.state[m].values())]


def compared(a: list[torch.Tensor], b: list[torch.Tensor], must_be_equal: bool) -> dict:
    equal = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    worst = max((x.float() - y.float()).abs().max().item() for x, y in zip(a, b))
    return {"equal": equal, "largest difference": worst, **({"ok": equal} if must_be_equal else {})}


# ------------------------------------------------------------------------------------------------------ memory

def memory_peaks(b: Bench):
    with ask.Predictor() as predictor:
        for model, combinations in ((SMALL, b.combinations), ("gpt2", b.combinations[::3])):
            for options in combinations:
                yield {"model": model, "options": options}, lambda m=model, o=options: peaks(b, Job(b, m, o), predictor)


def peaks(b: Bench, job: Job, predictor: ask.Predictor) -> dict:
    """The peak of a job's second and third step: the prediction's process computes it meanwhile."""
    two = job.micro_batches[:2]  # the others are alike, and gradients exist after the first one
    predictor.ask(job.cfg, [[[(len(e.ids), e.n_labels) for e in m] for m in two]] * 2)
    try:
        measured = measured_peaks(b, job)
    finally:
        predicted = predictor.answer()  # after an error too, or the next case would get this answer
    if "error" in predicted:
        return {**measured, "error": f"not predicted: {predicted['error']}"}
    result = {"predicted": predicted["peak"], **measured, "off %": off(predicted["peak"], measured["allocated"])}
    if measured["reserved"]:
        result |= {"predicted reserved": predicted["reserved"],
                   "reserved off %": off(predicted["reserved"], measured["reserved"])}
    return {**result, "ok": all(abs(result.get(key, 0)) <= WITHIN for key in ("off %", "reserved off %"))}


def measured_peaks(b: Bench, job: Job) -> dict:
    """In bytes. before: what earlier cases have left allocated on the GPU: cuBLAS's workspaces, and nothing else."""
    before = torch.cuda.memory_allocated(b.device) if b.cuda else 0
    job.load()
    while not job.optimizer.state:  # AdamW's state exists after its first step, and float16's scaler may skip some
        job.step()
    if b.cuda:  # as run/watch.py does
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(b.device)
    rooms = device_of(b.device).rooms.values()
    with memory.Ledger(job.model, job.optimizer, rooms, "cuda" if b.cuda else None) as ledger:
        losses = [job.step(), job.step()]
    allocated, reserved = memory.cuda_peak(b.device) or (ledger.peak, None)
    return {"allocated": allocated, "reserved": reserved, "live": ledger.peak, "before": before, "loss": losses[-1]}


# ------------------------------------------------------------------------------------------------------ parity

PARITY = (("gpt2-nano", "--full"), ("gpt2-nano", "--amp"), (SMALL, ""), (SMALL, "--amp --lora-targets all"),
          (SMALL, "--amp --bits 8 --pack"), (SMALL, "--amp --bits 4 --ckpt-every 1 --ckpt-offload"),
          (SMALL, "--amp --optimizer paged_adamw8bit --lora-targets all"),
          (SMALL, "--full --amp --optimizer offload_adamw --grad-accum 2"))


def parity(b: Bench):
    for model, options in PARITY:
        yield {"model": model, "options": options}, lambda m=model, o=options: losses_on_both(b, m, o)


def losses_on_both(b: Bench, model: str, options: str) -> dict:
    """The CPU multiplies in the GPU's types. Both start from the same adapters."""
    types = {"half": device_of(b.device).half, "products": device_of(b.device).products}
    short = f"--batch-size 4 --max-length 64 {options}"
    with pretend("cpu", Device("cpu", **types, **CPU)):
        there = Job(b, model, short, "cpu").load()
        here = Job(b, model, short).load()
        here.start_as(there)
        theirs, ours = [there.step() for _ in range(6)], [here.step() for _ in range(6)]
    worst = max(abs(x / y - 1) for x, y in zip(ours, theirs))
    tolerance = TOLERANCE[compute_dtype(b.device, here.cfg.amp)]
    return {"first loss": theirs[0], "last loss": theirs[-1], "worst relative difference": worst, "tolerance": tolerance,
            "ok": worst <= tolerance}


# ------------------------------------------------------------------------------------------------------ speed

def speed(b: Bench):
    """Two batches for each model: 8 x 512 tokens, and 1 x 512, where the host may be slower than the GPU."""
    for bits in (16, 4):
        job = Job(b, BIG, f"--amp --bits {bits}" + " --batch-size 8 --max-length 512" * b.cuda, full=True).load()
        for _ in range(2):
            about = {"bits": bits, "batch": f"{len(job.micro_batches[0])} x {job.cfg.max_length}"}
            yield {"what": "tokens/s", **about}, lambda job=job: throughput(b, job)
            yield {"what": "busy", **about}, lambda job=job: busy(b, job)
            yield {"what": "waits", **about}, lambda job=job: waits(b, job)
            job.micro_batches = [job.micro_batches[0][:1]]


def throughput(b: Bench, job: Job) -> dict:
    """MFU = 4N * tokens/s / peak: "model FLOPs utilization" (Chowdhery et al., "PaLM", 2022, appendix B).

    A weight multiplies and adds once a token in a product. N weights: 2N FLOPs in forward, and 2N in backward, for the
    gradient of the inputs; a frozen weight has none of its own. Attention, adapters and recomputation are not counted.
    N includes the embedding, because the head is the same matrix. peak: the manufacturer's, and that of a large product.
    """
    job.timed_steps(2)
    s, tokens = statistics.median(job.timed_steps(5)), sum(len(e.ids) for m in job.micro_batches for e in m)
    count = memory.count(job.model)
    flops = 4 * (count["total"] - count["trainable"]) * tokens / s
    n, dtype = 8192 if b.cuda else 256, compute_dtype(b.device, True)
    x, y = (torch.randn(n, n, device=b.device).to(dtype) for _ in range(2))
    limit = 2 * n**3 / warm_seconds(lambda: x @ y, b.device, 20)
    peak = peak_of(torch.cuda.get_device_name(b.device)) if b.cuda else None
    return {"step s": s, "tokens/s": tokens / s, "TFLOP/s": flops / 1e12, "of a large product %": 100 * flops / limit,
            "large product TFLOP/s": limit / 1e12, "MFU %": peak and 100 * flops / peak}


def peak_of(name: str) -> float | None:
    """FLOP/s of a GPU by its name. None: not known."""
    return next((1e12 * peak for key, peak in PEAK.items() if re.search(rf"\b{key}\b", name)), None)


def busy(b: Bench, job: Job) -> dict:
    """The time of a step against the time in which the GPU computes or copies. The rest: the GPU waits for the host."""
    b.need_gpu()
    wall = statistics.median(job.timed_steps(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds(job.step, b.device)
    return {"wall ms": 1e3 * wall, **busy_times(profile.events(), wall)}


def busy_times(events: list, wall: float) -> dict:
    """From a profile's events: those on the GPU, without the names that programs give to parts of a step."""
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
               and e.name != "Context Sync"]
    us, by_name = covered([(e.time_range.start, e.time_range.end) for e in kernels]), collections.Counter()
    for e in kernels:
        by_name[e.name[:60]] += e.time_range.end - e.time_range.start
    return {"busy ms": us / 1e3, "busy %": us / wall / 1e4, "kernels": len(kernels),
            "longest, ms": {name: round(n / 1e3, 2) for name, n in by_name.most_common(5)}}


def covered(intervals: list[tuple[float, float]]) -> float:
    """The length of the union of intervals: two streams that are busy at the same time count once."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def waits(b: Bench, job: Job) -> dict:
    """Where in a step the host waits for the GPU. train.py wants one place: the losses and the norm, after backward."""
    b.need_gpu()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        places = places_that_warn(job.step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": sum(places.values()), "places": places}


def places_that_warn(work) -> dict[str, int]:
    """{"train.py:88": 2, ...}: the innermost line of this project for each warning that PyTorch gives of a wait."""
    places = collections.Counter()

    def note(message, category, filename, lineno, file=None, line=None):
        if "called a synchronizing" not in str(message):
            return
        frame = sys._getframe()
        while frame and (frame.f_code is note.__code__ or not is_ours(frame.f_code.co_filename)):
            frame = frame.f_back
        places[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else f"{filename}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        work()
    return dict(places)


def is_ours(filename: str) -> bool:
    return Path(filename).is_relative_to(ROOT) and "site-packages" not in filename  # (a .venv may be inside the folder)


# ------------------------------------------------------------------------------------------------------ t4, compile

T4 = (("gpt2-nano", "--amp --lora-targets all"), (SMALL, "--amp"), (SMALL, "--amp --bits 4 --ckpt-every 1"),
      (SMALL, "--full --amp --optimizer offload_adamw"))


def like_a_t4(b: Bench):
    """A T4 has float16 and no FlashAttention. Its workspace and its speed are not imitated."""
    if b.cuda:
        torch.backends.cuda.enable_flash_sdp(False)  # (of this stage's process)
    device = dataclasses.replace(device_of(b.device), half=torch.float16, products=torch.float16, flash=False, rooms={})
    with pretend(b.device, device), ask.Predictor() as predictor:
        for model, options in T4:
            yield {"model": model, "options": options}, lambda m=model, o=options: trained_like_a_t4(b, m, o, predictor)


def trained_like_a_t4(b: Bench, model: str, options: str, predictor: ask.Predictor) -> dict:
    job = Job(b, model, options)
    result = peaks(b, job, predictor)
    losses = [job.step() for _ in range(9)]
    falls = losses[-1] < result["loss"]
    return {**result, "last loss": losses[-1], "scale": job.scaler.get_scale(), "ok": falls and result.get("ok", False)}


def compiled(b: Bench):
    for options in ("--amp", "--amp --bits 4 --ckpt-every 1"):
        yield {"model": SMALL, "options": f"{options} --compile"}, lambda o=options: compiled_and_not(b, o)


def compiled_and_not(b: Bench, options: str) -> dict:
    """The first step compiles, or reads the compiled code of an earlier run."""
    found = {}
    for more in ("", " --compile"):
        job = Job(b, SMALL, options + more).load()
        first = time.perf_counter()
        losses = [job.step()]
        first = time.perf_counter() - first
        losses += [job.step() for _ in range(3)]
        found[more] = first, statistics.median(job.timed_steps(5)), losses
    (_, plain, wanted), (first, fast, losses) = found.values()
    worst = max(abs(x / y - 1) for x, y in zip(losses, wanted))
    return {"first step s": first, "step s": fast, "not compiled, step s": plain, "worst relative difference": worst,
            "ok": worst <= TOLERANCE[compute_dtype(b.device, True)]}


STAGES = {  # name: (its cases, its budget in seconds)
    "card": (card, 30), "attention": (attention_kernels, 20), "nf4": (nf4, 25), "optimizers": (optimizers, 30),
    "memory": (memory_peaks, 110), "parity": (parity, 50), "speed": (speed, 110), "t4": (like_a_t4, 30),
    "compile": (compiled, 75)}
