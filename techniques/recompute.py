"""Recomputation: forget what a layer's forward kept, compute it again when backward asks for it.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016, arXiv:1604.06174). The ecosystem's other names for
it are activation checkpointing and gradient checkpointing. Backward needs what every layer computed in forward, but it
visits one layer after another. So a recomputed layer keeps only its input x. When backward reaches the layer, the layer
runs again from x, and its activations exist only while backward passes through it.

Autograd has hooks for what it saves (torch.autograd.graph.saved_tensors_hooks): a saved tensor goes through `pack`;
autograd keeps what pack returns; `unpack` must turn it into the tensor again.

1. Here pack returns a number n: "the n-th tensor that this layer saved".
2. The first unpack runs the layer a second time. Hooks catch every tensor that this second run saves.
3. The n-th caught tensor is the one that unpack returns.

Autograd keeps the graph of the first run. So each weight gets its gradient once, and an x that needs no gradient (above
a frozen embedding) is no special case. The second run stops when the last saved tensor is there. Usually this is before
the layer's last matrix product, whose result nobody needs; if this product has an adapter, it runs too.

    activations   L layers keep 2C bytes a token each (x in 16 bit; with --full x is float32, 4C), and one layer at a time
                  has all its activations, a bytes a token:    2C L + a   instead of   L a.
                  GPT-2 124M (a = 22C), 4 x 512 tokens: 38 + 35 MB instead of 415 MB.
                  LLaMA-7B (a = 101 kB), 512 tokens: 134 + 52 MB instead of 1.66 GB.
                  The paper groups k layers: 2C L / k + k a, which is least at k = sqrt(2C L / a): 1.0 and 1.6 here.
                  So a group is one layer, and --ckpt-every N leaves the layers between as they are, for speed.
    time          Backward costs two forwards (one where the weights are frozen: it computes no gradient for them). The
                  second run costs 2/3 of a forward in GPT-2 and 3/4 in LLaMA.
                  N = 1: 22-26 % more time with --full, 33-39 % more with LoRA.
    offload       x waits in host memory, and a is all that stays on the GPU. 2C bytes a token and layer cross the bus
                  twice. LLaMA-7B, 512 tokens: 134 MB go out while the layers compute, and come back while backward waits.
                  At 25 GB/s (PCIe 4.0 x16) this takes 5 ms, in a step of 19 TFLOP. 32,768 tokens: 8.6 GB less on the GPU.
                  One x more, whose copy may still run, is on the GPU: 4.2 MB (32,768 tokens: 268 MB).
"""
import sys
from contextlib import suppress
from functools import cache

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import record_function

from techniques.device import device_of


def recompute(block, x, *rest, offload: bool = False):
    """block(x, *rest), and only x is kept for backward (with offload: in host memory).

    Gradients are equal, on a CPU bit for bit. (On a GPU attention's backward adds up dq in no fixed order.)

    The block must do the same in both runs: it may depend on its weights and on PyTorch's random numbers, but on nothing
    else that changes. `rest` is kept as it is, so put nothing large there. Backward raises RuntimeError when the second
    run saves tensors of other shapes than the first.
    """
    layer = RecomputedLayer(block, x, rest, offload)
    with saved_tensors_hooks(uncompiled(layer.forget), layer.recall):
        return block(x, *rest)


def uncompiled(hook):
    """The hook, hidden from the compiler (--compile), which would compile it again for each length of its list."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook  # (disable imports the compiler)


class SecondRunDone(Exception):
    """Leaves the second run once every tensor that the first one saved is there again."""


class RecomputedLayer:
    """What a recomputed layer keeps until its backward: x, and the state that its forward depends on.

    This state is autocast's type and the random state (5 kB), so that dropout draws the same numbers again.
    """

    def __init__(self, block, x, rest: tuple, offload: bool):
        kind = x.device.type
        self.block, self.rest, self.device, self.needs_grad = block, rest, x.device, x.requires_grad
        self.x = to_host(x.detach()) if offload else x.detach()
        self.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        self.gpus = [] if kind == "cpu" else [x.device]  # dropout on a GPU uses that GPU's random state
        self.random = [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.gpus)]
        self.shapes = []  # of the tensors that the first run saved, in their order
        self.again: dict[int, torch.Tensor] = {}  # what the second run saved: number -> tensor

    def forget(self, tensor) -> int:
        self.shapes.append(tensor.shape)
        return len(self.shapes) - 1

    def recall(self, n: int):
        if n not in self.again:  # the first request; or a second backward through a retained graph
            self.again = dict(enumerate(self.run_again()))
        return self.again.pop(n)  # each tensor is asked for once, and freed when its operator's backward is done

    def run_again(self) -> list:
        saved = []

        def catch(tensor):
            saved.append(tensor.detach())
            if len(saved) == len(self.shapes):
                raise SecondRunDone

        x = to_device(self.x, self.device).detach().requires_grad_(self.needs_grad)
        with (record_function("recompute"),  # a name for the ledger (memory.py)
              torch.random.fork_rng(self.gpus, device_type=self.device.type),  # afterwards, the state is as before
              torch.autocast(self.device.type, **self.autocast), torch.enable_grad(),
              saved_tensors_hooks(uncompiled(catch), lambda _: None)):
            torch.set_rng_state(self.random[0])
            for gpu, state in zip(self.gpus, self.random[1:]):
                torch.get_device_module(gpu).set_rng_state(state, gpu)
            with suppress(SecondRunDone):
                self.block(x, *self.rest)
        if [t.shape for t in saved] != self.shapes:
            raise RuntimeError(f"{type(self.block).__name__} saved other tensors when it was computed again: what it does "
                               "must not change between forward and backward (train() or eval(), a cache)")
        return saved


def to_host(x):
    """x in the host's memory; x itself where there is one memory (a CPU, Apple's GPU).

    The memory is pinned: the GPU reads and writes it by itself, so the copy runs beside the next kernels. x is kept until
    the next call: only then the GPU is told to wait for the copy, and x's memory may be used for another tensor.
    (x.record_stream would free x when the *host* sees that the copy is complete. The host runs many layers ahead of the
    GPU, and all their x would exist at once.)
    """
    device = device_of(x.device)
    if not device.own_memory:
        return x
    if not x.is_cuda:  # a prediction: x stands for a GPU's tensor
        device.leaving = x
        return x.to(device.host)
    host, copies = torch.empty_like(x, device=device.host, pin_memory=True), copy_stream(x.device)
    now = torch.cuda.current_stream(x.device)
    if device.leaving is not None:
        now.wait_event(device.leaving[1])
    copies.wait_stream(now)  # wait until x is computed
    with torch.cuda.stream(copies):
        host.copy_(x, non_blocking=True)
    device.leaving = x, copies.record_event()
    return host


def to_device(x, device):
    if x.device == device:
        return x
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(copy_stream(device))  # wait until the copy to the host is complete
    device_of(device).leaving = None
    return x.to(device, non_blocking=True)


@cache
def copy_stream(device):
    return torch.cuda.Stream(device)
