"""The machine's matrix limit: how fast it multiplies in a model's own shapes, with nothing else around the products.

    python -m bench.matrix_limit --model gpt2 --positions 512

What `python -m bench speed` compares training with. The model's config.json is enough, no weights are read. Each distinct
shape of the linear layers, in the blocks and of the head, is timed with N rows (positions), on all threads:

    y = x W^T      x (N, in),  W (out, in)        forward
    dx = grad W    grad (N, out)                  backward, to the layer's input; a frozen W has no gradient

limit = the FLOPs of all layers, forward and backward / (the best time of each shape * its number of layers), summed.

What a token of training costs. One product multiplies and adds once for each weight and row: 2 FLOPs. With frozen weights
a token needs two products, 4 FLOPs a weight. The loss multiplies the head only for labelled tokens (loss.py):

    FLOPs a token = 4 * weights of the blocks' linear layers + 4 * weights of the head * (labelled tokens / tokens)
    GPT-2 124M, 70 % labelled: 4 * 12 * 12 * 768^2 + 4 * 50257 * 768 * 0.7 = 340 + 108 = 448 MFLOP

The share of the limit is FLOPs a token * tokens/s / limit: "model FLOPs utilization" (Chowdhery et al., "PaLM", 2022,
appendix B), against a measured peak instead of the manufacturer's.

* Not counted: adapters, attention, norms, softmax, padding, the optimizer. Their time lowers the share.
* Not counted either: --ckpt-every 1 runs 2/3 to 3/4 of each block's forward again (recompute.py). The count is that of the
  same run without it, so the lower share is what recomputation costs.
* The peer multiplies the head for every token. Only the labelled ones are counted, as here. Its tokens/s count the last
  token of each example too, which predicts nothing: 1 in 128 with the bundled rows, to its advantage.
* Counted, and not run: the first block's q, k and v need no dx. GPT-2 124M: 2 of 4 FLOPs in 3C^2 of 144C^2 weights, 1 %.

The last line of its output is JSON in the shape of summary.json, with "gflops" and "flops" added.
"""
import argparse
import json
import sys
import time
from collections import Counter

import torch

import memory
from errors import UserError
from files import weights
from techniques.device import device_of, synchronize, type_name, usable_device

TRIES = 6  # the first one warms up


def layers(name: str) -> tuple[Counter, tuple[int, int]]:
    """({(out, in) of the blocks' linear layers: their number}, (out, in) of the head). Raises UserError."""
    config, model_class, _ = weights.config_of(name)
    model = weights.without_storage(model_class, config)
    linears = [m for m in model.blocks.modules() if hasattr(m, "in_features")]
    return Counter((m.out_features, m.in_features) for m in linears), (model.head.out_features, model.head.in_features)


def training_flops(blocks: Counter, head: tuple[int, int]) -> dict[str, int]:
    """FLOPs of training with frozen weights, for each token in the blocks and for each labelled token in the head."""
    return {"token": 4 * sum(n * out * width for (out, width), n in blocks.items()), "labelled_token": 4 * head[0] * head[1]}


def best_time(shape: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device, tries: int) -> float:
    """Seconds of x W^T and grad W. The numbers are random, because a GPU multiplies zeros and ones faster."""
    out, width = shape
    x, grad, W = (torch.randn(*size, device=device).to(dtype) for size in ((rows, width), (rows, out), shape))
    y, dx = torch.empty_like(grad), torch.empty_like(x)  # made once: new memory is cleared page by page
    times = []
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(x, W.t(), out=y)
        torch.mm(grad, W, out=dx)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def main(args) -> dict:
    started = time.perf_counter()
    if args.positions < 1:
        raise UserError(f"--positions {args.positions}: must be at least 1")
    device = torch.device(usable_device(args.device))
    blocks, head = layers(args.model)
    numbers, flops, gflops = blocks + Counter([head]), training_flops(blocks, head), {}
    for dtype in (torch.float32, device_of(device).half):
        # Where 16 bit is emulated, a product can take 100 times longer: 64 rows, once, say as much.
        slow = dtype != torch.float32 and device_of(device).products == torch.float32
        rows, tries = (min(64, args.positions), 1) if slow else (args.positions, TRIES)
        seconds = sum(n * best_time(shape, rows, dtype, device, tries) for shape, n in numbers.items())
        gflops[type_name(dtype)] = rows * sum(flops.values()) / seconds / 1e9
        print(f"{type_name(dtype)}: {gflops[type_name(dtype)]:,.1f} GFLOP/s in {len(numbers)} shapes with {rows} rows")
    peaks = dict.fromkeys(("predicted_peak", "measured_peak", "reserved", "by_category", "predicted_by_category"))
    return {"params": dict.fromkeys(("total", "trainable", "percent")), "memory": {**peaks, "rss_peak": memory.rss_peak()},
            "loss": dict.fromkeys(("first", "last", "val_after")), "tokens_per_s": None, "examples_per_s": None,
            "wall_s": time.perf_counter() - started, "steps": None, "gflops": gflops, "flops": flops}


if __name__ == "__main__":
    p = argparse.ArgumentParser(prog="python -m bench.matrix_limit",
                                description="This machine's matrix limit in a model's shapes, for python -m bench speed.")
    p.add_argument("--model", default="gpt2-nano")
    p.add_argument("--positions", type=int, default=512, help="rows of each product: the positions of a micro-batch")
    p.add_argument("--device")
    try:
        print(json.dumps(main(p.parse_args())))
    except UserError as e:
        sys.exit(f"error: {e}")
