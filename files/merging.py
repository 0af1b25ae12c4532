"""Merging: W + s (B A - B0 A0). The result is a plain model folder. It needs no adapter and runs as fast as before.

W is the weight *as the checkpoint stores it*, for any --bits that the adapter was trained with.

* Merging into 4-bit codes would round again. The step between two codes is about a tenth of the block's largest weight,
  which is more than an adapter adds: the answers would change (peft#2321).
* Merging into W removes the rounding error, which the adapter may have learned to correct. The answers change too, but
  towards the full model. `compare` measures how much.

B0 A0 is where the adapter started (techniques/lora_init.py). It is 0 for "default". For pissa the base was W - s B0 A0, so
the sum is the model that was trained, up to rounding. For loftq the base was Q(W), and Q(W) + s B0 A0 is close to W: the
start corrects a rounding error that W does not have.

The model never exists as a whole. Tensors are read, merged and written in shards of 2 GB. The two models that are compared
run layer by layer: a layer's weights are read before it runs, and dropped after it. LLaMA-7B in float32: 0.81 GB for a
layer, 27 GB for the model.
"""
import json
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from files import method_files, peft_files, weights, writing
from methods import refuse_merge
from techniques import quant
from techniques.device import device_of

SHARD = 2 * 10**9  # bytes


class Merge:
    """An adapter and the checkpoint it was trained on: every weight of the merged model and of the one that was trained."""

    def __init__(self, model: str, adapter: str):
        refuse_merge(method := method_files.method_of(adapter))
        self.stored = weights.StoredWeights(model)
        self.model = self.stored.model  # shapes only
        read = method_files.read_ia3 if method == "ia3" else peft_files.read
        self.adapters = read(self.model, adapter, device="cpu")
        self.init, self.bits = peft_files.trained_with(adapter)
        self.low_bit = weights.low_bit_weights(self.model) if self.bits in (8, 4) else ()
        # An adapter on the head does not change the embedding. So after merging the two are different matrices.
        self.tied_head = self.model.config.tied_head and self.model.head_name not in self.adapters
        self.shapes = {n: p.shape for n, p in self.model.named_parameters()}
        if not self.tied_head:
            self.shapes[f"{self.model.head_name}.weight"] = self.model.head.weight.shape

    @torch.no_grad()
    def merged(self, name: str) -> torch.Tensor:
        """A weight or a bias of the merged model, float32."""
        W, (layer, _, kind) = self.stored.read(name), name.rpartition(".")
        m = self.adapters.get(layer)
        if kind == "bias":
            return m.merged_bias(W) if m else W
        return m.merged(W) - m.start_delta() if m else W

    @torch.no_grad()
    def trained(self, name: str) -> torch.Tensor:
        """The same weight as it was in training (its base rounded to --bits), with its adapter added, float32."""
        W, (layer, _, kind) = self.stored.read(name), name.rpartition(".")
        m = self.adapters.get(layer)
        if m and kind == "weight" and peft_files.STARTS[self.init].joined:
            W = W - m.start_delta()
        if name in self.low_bit:
            linear = self.model.get_submodule(layer)
            W = quant.quantize(linear, W, self.bits).dequantize()
            W = W.t() if getattr(linear, "fan_in_fan_out", False) else W
        elif self.bits in (16, 8, 4):
            W = W.to(device_of("cpu").half).float()
        return (m.merged_bias(W) if kind == "bias" else m.merged(W)) if m else W


def shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names in groups of at most `limit` bytes, in order. A larger tensor has a group of its own."""
    groups, left = [], 0
    for name, size in sizes.items():
        if size > left:
            groups.append([])
            left = limit
        groups[-1].append(name)
        left -= size
    return groups


def write(merge: Merge, folder: Path, dtype: str) -> int:
    """Write the merged weights as Hugging Face files: one, or shards and an index. Returns the bytes of the weights."""
    kind = weights.DTYPES[dtype]
    sizes = {n: shape.numel() * kind.itemsize for n, shape in merge.shapes.items()}
    groups, where = shards(sizes, SHARD), {}
    bar = tqdm(total=len(sizes), desc="merging", unit="tensor", disable=not sys.stderr.isatty())
    for i, names in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for n in names:
            key, W = weights.checkpoint_name(merge.model, n), merge.merged(n)
            weights.check_finite(W, merge.stored.folder, key, kind)
            tensors[key] = W.to(kind)
            bar.update()
        where |= dict.fromkeys(tensors, file)
        writing.write_tensors(folder / file, tensors)
    bar.close()
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        writing.write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return sum(sizes.values())


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, weight) -> torch.Tensor:
    """ids (T,) -> the logits (T, V) of a model without storage.

    weight(name) -> a float32 tensor. It is called just before the layer runs, and its result is dropped afterwards.
    """
    blocks = set(model.blocks)
    inside = {m for b in blocks for m in b.modules()}
    units = {n: m for n, m in model.named_modules() if m in blocks or m._parameters and m not in inside}
    hooks = []
    for name, unit in units.items():
        shapes = dict(unit.named_parameters())

        def fill(unit, _, name=name, shapes=shapes):
            for n in shapes:
                weights.set_parameter(unit, n, weight(f"{name}.{n}"))

        def drop(unit, *_, shapes=shapes):
            for n, p in shapes.items():
                weights.set_parameter(unit, n, p)

        hooks += [unit.register_forward_pre_hook(fill), unit.register_forward_hook(drop)]
    try:
        return model.eval()(ids[None])[0]
    finally:
        for h in hooks:
            h.remove()


def compare(merge: Merge, folder: Path, ids: list[int]) -> str:
    """A sentence: how much the logits of the merged model in `folder` differ from the trained one's on the text `ids`.

    Both models compute in float32.
    """
    ids = torch.tensor(ids[:merge.model.config.n_positions])
    written = weights.StoredWeights(str(folder))
    before = logits(merge.model, ids, merge.trained)
    after = logits(written.model, ids, written.read)
    same = (before.argmax(-1) == after.argmax(-1)).sum().item()
    return (f"logits differ from the model that was trained ({merge.bits or 32} bit"
            + ("" if merge.bits else ", as far as the adapter says") +
            f") by at most {(before - after).abs().max():.2g} (their standard deviation is {before.std():.2g}); "
            f"the most likely token is the same at {same} of {len(ids)} positions")
