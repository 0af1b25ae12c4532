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
import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from errors import UserError


@dataclass
class Device:
    """The answers for one device. The defaults are a GPU's."""

    type: str  # "cpu", "cuda" or "mps"
    half: torch.dtype = torch.bfloat16  # the 16-bit type that it multiplies natively
    float32_backward: bool = False  # attention's backward is faster in float32 than in 16 bit (attention.py)
    host: str = "cpu"  # where offloaded tensors wait (optim.py, recompute.py)
    logits_chunk: int = 2**22  # logits that exist at the same time (loss.py): 16.8 MB in float32
    optimizer_chunk: int = 2**22  # elements of a chunk of an 8-bit optimizer (optim.py): 16.8 MB in float32
    nf4_kernel: Callable | None = None  # dequantises 4-bit weights in one pass (nf4_triton.py); None: quant.py does it
    # How many of many equal pieces of work are run; the others are skipped. None: run all. Only the prediction sets
    # it: it computes nothing, and three pieces (one in use, one that arrives, one that leaves) need as much memory as
    # thousands.
    pieces: int | None = None
    rooms: dict[tuple, torch.Tensor] = field(default_factory=dict)

    @property
    def own_memory(self) -> bool:
        """Whether offloading frees anything. A CPU and Apple's GPU share one memory with the host."""
        return self.type == "cuda"

    def room(self, name: tuple, n: int, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The first `n` elements of the room `name`. `make(n)` makes the room when it is missing or too small."""
        if name not in self.rooms or len(self.rooms[name]) < n:
            self.rooms[name] = make(n)
        return self.rooms[name][:n]


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
    if device.type == "cpu":
        # 512 kB of float32 stay in a core's cache; a GPU would spend its time on starting kernels that small.
        return Device("cpu", float32_backward=True, optimizer_chunk=2**17)
    if device.type == "cuda":
        # GPUs before Ampere emulate bfloat16: correctly, but very slowly (nanoGPT#277).
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device("cuda", half=torch.bfloat16 if native else torch.float16, nf4_kernel=triton_kernel())
    return Device(device.type)


@functools.cache
def triton_kernel() -> Callable | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from techniques import nf4_triton
    return nf4_triton.dequantize


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
    """--amp: matrix products in 16 bit.

    Autocast over *float32* weights keeps a 16-bit copy of each weight for the whole forward. LLaMA-7B: 27 GB of weights
    and 13.5 GB of copies. Frozen weights need no float32 master. So with --amp they are held in 16 bit from the start
    (13.5 GB), and autocast has nothing to copy.
    """
    return torch.autocast(torch.device(device).type, dtype=device_of(device).half) if enabled else nullcontext()


def usable_device(name: str | None) -> str:
    """`name`, if a tensor can be put there, or else UserError. Default: "cuda" where there is a GPU, else "cpu"."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return name


def type_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
