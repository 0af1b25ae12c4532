"""Activation checkpointing: forget what a layer's forward kept, compute it again when backward asks for it.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016, arXiv:1604.06174). Backward needs what every layer
computed on the way forward, but it visits one layer after another. So a checkpointed layer keeps its input x alone; when
backward reaches it, the layer runs again from x, and its activations exist only while backward passes through it.

Autograd lets us stand between it and what it keeps: whatever an operator saves for backward goes through `pack`, what
pack returns is kept in its place, and `unpack` must make the tensor of it again (torch.autograd.graph.saved_tensors_hooks).
Here pack returns a number: "the layer's n-th saved tensor". The first unpack runs the layer a second time, under hooks
that catch what is saved, and its n-th saved tensor is the one. The graph is the first run's: a weight's gradient arrives
once, and a frozen embedding below (an x that needs no gradient) is no special case. The second run ends with the last
saved tensor, before the layer's last matrix product, which nobody would read (unless it carries an adapter).

    activations   L layers keep 2C bytes a token (x in 16 bit; with --full it is float32, 4C) and one its whole a:
                  2C L + a instead of L a.   GPT-2 124M (a = 22C), 4 x 512 tokens: 38 + 35 MB, not 415.
                  LLaMA-7B (a = 102 kB), 512 tokens: 134 + 52 MB, not 1,661.
                  The paper's segments of k layers keep 2C L / k + k a: least at k = sqrt(2C L / a), 1.0 and 1.6 here.
                  So a segment is one layer, and --ckpt-every N leaves the layers between as they are, for speed.
    time          backward costs two forwards (one where the weights are frozen: no product for their gradients); the
                  second run 2/3 of one in GPT-2, 3/4 in LLaMA. N = 1: 22-26 % more with --full, 33-39 % with LoRA.
    offload       x waits in host memory: a is all that stays on the card. 2C bytes a token and layer cross the bus twice.
                  LLaMA-7B, 512 tokens: 134 MB out while the layers compute, 134 MB back, which backward waits for; at
                  25 GB/s (PCIe 4.0 x16) 5 ms of a step of 19 TFLOP. 32,768 tokens: 8.6 GB of the card's memory.
"""
import sys
from contextlib import suppress
from functools import cache

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import record_function


def checkpoint(block, x, *rest, offload: bool = False):
    """block(x, *rest); for backward only x is kept, with offload in host memory. Gradients are equal bit for bit.

    The block must do the same both times: no state of its own but weights and PyTorch's random numbers (`rest` is kept as
    it is: put nothing large there). Backward raises RuntimeError where the second run saves other shapes than the first.
    """
    layer = Recomputed(block, x, rest, offload)
    with saved_tensors_hooks(uncompiled(layer.forget), layer.recall):
        return block(x, *rest)


def uncompiled(hook):
    """--compile would translate the hook with the layer that calls it, anew for each length of its list."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook  # (disable would import the compiler)


class SecondRunDone(Exception):
    """Leaves the second run once every tensor that the first one saved is there again."""


class Recomputed:
    """What a checkpointed layer keeps until its backward: x, and the state that its forward depends on (the type that
    autocast multiplies in; 5 kB of random state, so that dropout draws the same)."""

    def __init__(self, block, x, rest: tuple, offload: bool):
        kind = x.device.type
        self.block, self.rest, self.device, self.needs_grad = block, rest, x.device, x.requires_grad
        self.x = to_host(x.detach()) if offload else x.detach()
        self.autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        self.cards = [] if kind == "cpu" else [x.device]  # whose random state counts, beside the CPU's
        self.random = [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.cards)]
        self.shapes, self.found = [], {}  # of the saved tensors, in their order; the tensors, made again

    def forget(self, tensor) -> int:
        self.shapes.append(tensor.shape)
        return len(self.shapes) - 1

    def recall(self, n: int):
        if n not in self.found:  # the first that backward asks for; or another backward through a retained graph
            self.found = dict(enumerate(self.run_again()))
        return self.found.pop(n)  # each operator asks once: its tensors are freed when its backward is done

    def run_again(self) -> list:
        found = []

        def catch(tensor):
            found.append(tensor.detach())
            if len(found) == len(self.shapes):
                raise SecondRunDone

        x = to_device(self.x, self.device).detach().requires_grad_(self.needs_grad)
        with (record_function("recompute"),  # a name for the ledger (memory.py)
              torch.random.fork_rng(self.cards, device_type=self.device.type),  # afterwards: the random state of before
              torch.autocast(self.device.type, **self.autocast), torch.enable_grad(),
              saved_tensors_hooks(uncompiled(catch), lambda _: None)):
            torch.set_rng_state(self.random[0])
            for card, state in zip(self.cards, self.random[1:]):
                torch.get_device_module(card).set_rng_state(state, card)
            with suppress(SecondRunDone):
                self.block(x, *self.rest)
        if [t.shape for t in found] != self.shapes:
            raise RuntimeError(f"{type(self.block).__name__} saved other tensors when it was computed again: what it does "
                               "must not change between forward and backward (train() or eval(), a cache)")
        return found


def to_host(x):
    """x in pinned host memory (the card can read and write it by itself: the copy runs beside the next kernels).

    On a CPU, and on Apple's chips, there is one memory: x itself.
    """
    if x.device.type != "cuda":
        return x
    host, copies = torch.empty_like(x, device="cpu", pin_memory=True), copy_stream(x.device)
    copies.wait_stream(torch.cuda.current_stream(x.device))  # until x is computed
    with torch.cuda.stream(copies):
        host.copy_(x, non_blocking=True)
    x.record_stream(copies)  # x's memory serves another tensor only after the copy
    return host


def to_device(x, device):
    if x.device == device:
        return x
    torch.cuda.current_stream(device).wait_stream(copy_stream(device))  # until the copy out is complete
    return x.to(device, non_blocking=True)


@cache
def copy_stream(device):
    return torch.cuda.Stream(device)
