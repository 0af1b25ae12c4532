"""What this machine is good at: every decision that depends on the hardware, in one value.

Code that must do something else on another machine asks `device_of(tensor.device)`. It compares the names of devices
only around calls of torch.cuda itself (streams, pinned memory, random states). So there is one place to read what
differs, and one value to replace when the code is to behave as on a machine that is not here:

    with pretend("cpu", Device("cuda", half=torch.float16)):      # tensors on "cpu" are treated as a T4's
        train_step(...)

The prediction of a GPU's peak memory works this way (ledger/predict.py), and so do some tests.

A Device also owns the memory that is used again and again, its `rooms`. In one of them, quant.py writes a layer's
weight for one product. New memory for each layer would take a third of the time, because the operating system clears
it page by page. The cost of this room: the bytes of the largest layer in 16 bit. LLaMA-7B: 4096 x 11008 * 2 = 90 MB.
"""
import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from errors import UserError


@dataclass
class Device:
    """The answers for one device. The defaults are a GPU's."""

    type: str  # "cpu", "cuda" or "mps"
    half: torch.dtype = torch.bfloat16  # its 16-bit type, in which --bits 16 holds weights
    products: torch.dtype | None = None  # the type in which --amp multiplies: half (the default), or float32 if faster
    why: str = ""  # the reason for `products`, in words
    float32_backward: bool = False  # attention's backward is faster in float32 than in 16 bit (attention.py)
    host: str = "cpu"  # where offloaded tensors wait (optim.py, recompute.py)
    flash: bool = True  # a GPU: has FlashAttention's kernels, 16 bit only (Ampere and later)
    workspace: int = 2 * 4096 * 1024 + 8 * 16 * 1024  # bytes that a thread's matrix products take on a GPU (cuBLAS)
    logits_chunk: int = 2**24  # logits that exist at the same time (loss.py): 67 MB in float32
    optimizer_chunk: int = 2**22  # elements of a chunk of an 8-bit optimizer (optim.py): 16.8 MB in float32
    nf4_chunk: int = 2**22  # 4-bit weights that quant.py dequantises at the same time: 8 bytes each
    rms_norm_kernel: bool = False  # F.rms_norm is one kernel, in forward and in backward (llama.py)
    product_blocks: bool = False  # a product of few rows is faster in blocks of the matrix (few_rows.py)
    nf4_kernel: Callable | None = None  # dequantises 4-bit weights in one pass (nf4_triton.py); None: quant.py does it
    # How many of many equal pieces of work are run; the others are skipped. None: run all. Only the prediction sets
    # it: it computes nothing, and three pieces (one in use, one that arrives, one that leaves) need as much memory as
    # thousands.
    pieces: int | None = None
    rooms: dict[tuple, torch.Tensor] = field(default_factory=dict)
    leaving: tuple | torch.Tensor | None = None  # what is being copied to the host, and the copy's event (recompute.py)

    def __post_init__(self):
        """Raises ValueError for answers that no device can give."""
        self.products = self.products or self.half
        if self.half not in (torch.bfloat16, torch.float16) or self.products not in (self.half, torch.float32):
            raise ValueError(f"Device {self.type!r}: half {self.half} must be bfloat16 or float16, and products "
                             f"{self.products} must be the same or float32")

    @property
    def own_memory(self) -> bool:
        """Whether offloading frees anything. A CPU and Apple's GPU share one memory with the host."""
        return self.type == "cuda"

    @property
    def float64(self) -> bool:
        return self.type != "mps"

    def reads_groups(self, dtype: torch.dtype) -> bool:
        """Whether attention's kernel takes fewer key/value heads than query heads. On a GPU only FlashAttention does."""
        return self.type != "cuda" or self.flash and dtype != torch.float32

    def room(self, name: tuple, n: int, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The first `n` elements of the room `name`. `make(n)` makes the room when it is missing or too small."""
        if name not in self.rooms or len(self.rooms[name]) < n:
            with torch.inference_mode(False):  # or training could not write into a room that generation made
                self.rooms[name] = make(n)
        return self.rooms[name][:n]


# A CPU's answers. What a core works on should stay in its cache; a GPU would spend its time on starting kernels that small.
CPU = {"float32_backward": True, "logits_chunk": 2**22, "optimizer_chunk": 2**17, "nf4_chunk": 2**20}

DEVICES: dict[torch.device, Device] = {}  # of this process: detected once, or set by pretend()


def device_of(device) -> Device:
    """The Device of a torch.device, or of its name: "cpu", "cuda:1"."""
    key = numbered(device)
    if key not in DEVICES:
        DEVICES[key] = detect(key)
    return DEVICES[key]


def numbered(device) -> torch.device:
    """The device with its number, as a tensor's device always has it: "cuda" -> "cuda:0", or the current GPU."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def detect(device: torch.device) -> Device:
    """What is known about this machine's `device`."""
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        # A GPU that is predicted and not here: the usual answers.
        return Device(device.type, nf4_kernel=hollow_nf4 if device.type == "cuda" else None)
    half, answers = torch.bfloat16, {}
    if device.type == "cpu":
        # AVX2 or AVX512; of other CPUs nobody has measured it
        answers = {**CPU, "product_blocks": torch.backends.cpu.get_cpu_capability().startswith("AVX")}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # what asks no device asks the current one
        if device.type == "cuda":
            generation, _ = torch.cuda.get_device_capability(device)  # 7: Volta, Turing; 8: Ampere, Ada; 9: Hopper
            # GPUs before Ampere emulate bfloat16: correctly, but very slowly (nanoGPT#277).
            half = half if generation >= 8 else torch.float16
            answers = {"flash": generation >= 8, "nf4_kernel": triton_kernel(device),
                       "rms_norm_kernel": hasattr(torch.ops.aten, "_fused_rms_norm")}  # since PyTorch 2.9
            if generation >= 9:
                answers["workspace"] = 2**25
            # cuDNN's attention makes a plan for each new shape, in each thread, and lengths vary here: a mean step of
            # 0.245 s instead of 0.100 (FunASR#3704). PyTorch prefers it on an H100.
            torch.backends.cuda.enable_cudnn_sdp(False)
        products, why = faster_type(device, half)
    return Device(device.type, half, products, why, **answers)


def faster_type(device: torch.device, half: torch.dtype) -> tuple[torch.dtype, str]:
    """(half or float32: the type in which `device` multiplies faster, the measurement in words).

    A CPU without 16-bit units emulates them, and backward's layout is the worst. GFLOP/s of a 64 x 256 x 256 product on one
    core of an EPYC, forward and backward: bfloat16 138 and 146 with AVX-512's units, 15 and 3 without; float32 92 and 85.
    It is measured and not looked up, because the name of an instruction set does not say how fast it is. 16 bit is chosen
    even if it is a fifth slower, because it halves the activations.
    """
    try:
        speed = measure(device, (half, torch.float32))
    except Exception as e:  # each backend raises its own kind: all mean that it cannot be measured
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        return torch.float32, f"products in {type_name(half)} could not be measured on {device.type} ({reason})"
    said = " and ".join(f"{type_name(dtype)} at {n:,.0f} GFLOP/s" for dtype, n in speed.items())
    where = f"one core of this {device.type.upper()}" if device.type == "cpu" else f"this {device.type}"
    return half if speed[half] > speed[torch.float32] / 1.2 else torch.float32, f"{where} multiplies {said}"


def measure(device: torch.device, dtypes) -> dict[torch.dtype, float]:
    """GFLOP/s of x W^T and x W together, the layouts of forward and backward. The best of five tries, on one core.

    On several cores a busy machine makes the threads wait for each other, which says nothing about the types. The types
    take turns. It takes 10 milliseconds, or 50 where 16 bit is slow.
    """
    rows, width = (64, 256) if device.type == "cpu" else (1024, 1024)  # a GPU needs more to be busy
    tensors = {dtype: [torch.ones(n, width, device=device).to(dtype) for n in (rows, width)] for dtype in dtypes}
    seconds = {dtype: [] for dtype in dtypes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(6):  # the first time warms up
            for dtype, (x, W) in tensors.items():
                synchronize(device)
                start = time.perf_counter()
                x @ W.t()
                x @ W
                synchronize(device)
                seconds[dtype].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {dtype: 2 * 2 * rows * width * width / min(times[1:]) / 1e9 for dtype, times in seconds.items()}


def synchronize(device: torch.device):
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def triton_kernel(device: torch.device) -> Callable | None:
    """nf4_triton.dequantize, if it runs. Triton may be installed where nothing compiles: it needs gcc and Python.h."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from techniques import nf4_triton
        nf4_triton.dequantize(torch.zeros(32, dtype=torch.uint8, device=device), torch.zeros(1, device=device),
                              torch.zeros(16), torch.zeros(64, dtype=torch.bfloat16, device=device))
    except Exception as e:  # each part of Triton raises its own kind
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        print(f"Triton does not run here ({reason:.200}): 4-bit weights are dequantised by PyTorch, which is slower; "
              f"it needs gcc and Python.h", file=sys.stderr)
        return None
    return nf4_triton.dequantize


def hollow_nf4(packed, absmax, levels, out):
    """Stands for nf4_triton.dequantize in a prediction: it takes no memory and computes nothing."""
    return out


@contextlib.contextmanager
def pretend(name: str, device: Device):
    """Inside, tensors on `name` are treated as if they were on `device`."""
    key = numbered(name)
    before = DEVICES.get(key)
    DEVICES[key] = device
    try:
        yield device
    finally:
        if before is None:
            del DEVICES[key]
        else:
            DEVICES[key] = before


def autocast(device, enabled: bool = True):
    """--amp: matrix products in 16 bit, if the device multiplies them faster than float32.

    Autocast over *float32* weights keeps a 16-bit copy of each weight for the whole forward. LLaMA-7B: 27 GB of weights
    and 13.5 GB of copies. Frozen weights need no float32 master. So with --amp they are held in 16 bit from the start
    (13.5 GB), and autocast has nothing to copy.
    """
    if compute_dtype(device, enabled) == torch.float32:
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=device_of(device).half)


def compute_dtype(device, amp: bool) -> torch.dtype:
    """The type of products and activations. (bitsandbytes' word for it.)"""
    return device_of(device).products if amp else torch.float32


def usable_device(name: str | None) -> str:
    """`name`, if a tensor can be put there, or else UserError. Default: "cuda" where there is a GPU, else "cpu"."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # Triton starts its kernels on the current GPU, wherever the tensors are
    return name


def type_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
