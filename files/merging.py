"""Merging: W + s (B A - B0 A0), a plain model folder again, which needs no adapter and runs as fast as before.

W is the weight *as the checkpoint has it*, whatever bits the adapter was trained over. To merge into the 4-bit codes would
mean to round again, and the step between two codes, a tenth of the weight, is larger than what an adapter adds: the
answers change (peft#2321). To merge into W takes the rounding error out of the model, which the adapter may have learned to
live with: the answers change too, but towards the full model. How much, the command measures and says.

B0 A0 is where the adapter started (lorainit.py). pissa: the base was W - s B0 A0, so this is what was trained, but for the
rounding. loftq: the base was Q, and Q + s B0 A0 ~ W: the start stands for a rounding error that W has not. Otherwise 0.

Nothing is ever there as a whole. Tensors are read, added to and written a shard of 2 GB at a time, and the two models that
are compared run layer by layer: a layer's weights are read when its turn comes, and dropped. In float32 LLaMA-7B's are 0.81
GB, and the model 27.

Usage: python lora.py merge --model M --adapter DIR --out DIR [--dtype float32]
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import data
import lora
from techniques import quant
from files import weights

SHARD = 2 * 10**9  # bytes
TEXT = ("The three primary colours are red, yellow and blue. In 1969 two people walked on the Moon, while a third waited in "
        "orbit. To make tea, boil some water, pour it over the leaves and wait for four minutes.")


class Merge:
    """An adapter and the checkpoint it was trained on: every weight of the merged model and of the one that was trained."""

    def __init__(self, model: str, adapter: str):
        self.checkpoint = weights.Checkpoint(model)
        self.model = self.checkpoint.model  # shapes only
        self.adapters = lora.read(self.model, adapter, device="cpu")
        self.init, self.bits = lora.trained_with(adapter)
        self.low_bit = weights.low_bit_weights(self.model) if self.bits in (8, 4) else ()
        self.tied_head = self.model.config.tied_head and "lm_head" not in self.adapters  # its delta is not the embedding's
        self.shapes = {n: p.shape for n, p in self.model.named_parameters()}
        if not self.tied_head:
            self.shapes["lm_head.weight"] = self.model.lm_head.weight.shape

    @torch.no_grad()
    def merged(self, name: str) -> torch.Tensor:
        W, m = self.checkpoint.read(name), self.adapters.get(name.removesuffix(".weight"))
        return W + (m.delta() - m.start_delta()) if m else W

    @torch.no_grad()
    def trained(self, name: str) -> torch.Tensor:
        W, m = self.checkpoint.read(name), self.adapters.get(name.removesuffix(".weight"))
        if m and self.init == "pissa":
            W = W - m.start_delta()
        if name in self.low_bit:
            like = self.model.get_submodule(name.removesuffix(".weight"))
            W = quant.quantize(like, W, self.bits).dequantize()
            W = W.t() if getattr(like, "fan_in_fan_out", False) else W
        elif self.bits in (16, 8, 4):
            W = W.to(weights.half_dtype("cpu")).float()
        return W + m.delta() if m else W


def shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in groups of at most `limit` bytes, in order; a larger tensor has one of its own."""
    groups, room = [], 0
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def write(merge: Merge, folder: Path, dtype: str) -> int:
    """The merged weights as Hugging Face files: one, or shards and their index. Returns the bytes of the weights."""
    kind = weights.DTYPES[dtype]
    sizes = {n: shape.numel() * kind.itemsize for n, shape in merge.shapes.items()}
    groups, where = shards(sizes, SHARD), {}
    bar = tqdm(total=len(sizes), desc="merging", unit="tensor", disable=not sys.stderr.isatty())
    for i, names in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for n in names:
            tensors[weights.checkpoint_name(merge.model, n)] = merge.merged(n).to(kind)
            bar.update()
        where |= dict.fromkeys(tensors, file)
        weights.write_tensors(folder / file, tensors)
    bar.close()
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        weights.write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return sum(sizes.values())


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, weight) -> torch.Tensor:
    """The logits (T, V) of a model without storage for ids (T,). weight(name) -> float32: asked for when the layer's turn
    comes, and dropped after it."""
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


def compare(merge: Merge, folder: Path) -> str:
    """The merged model in `folder` against the one that was trained, both in float32 arithmetic, in a sentence."""
    tokenizer = data.load_tokenizer(str(merge.checkpoint.folder))
    ids = torch.tensor(data.prompt_ids([(TEXT, False)], "", tokenizer)[:merge.model.config.n_positions])
    written = weights.Checkpoint(str(folder))
    before = logits(merge.model, ids, merge.trained)
    after = logits(written.model, ids, written.read)
    same = (before.argmax(-1) == after.argmax(-1)).sum().item()
    return (f"logits differ from the model that was trained ({merge.bits or 32} bit"
            + ("" if merge.bits else ", as far as the adapter says") +
            f") by at most {(before - after).abs().max():.2g} (their standard deviation is {before.std():.2g}); "
            f"the most likely token is the same at {same} of {len(ids)} positions")


def main(argv=None):
    p = argparse.ArgumentParser(prog="lora.py", description="Merge an adapter into its model: a plain Hugging Face folder.")
    sub = p.add_subparsers(dest="command", required=True)
    m = sub.add_parser("merge", help="write the merged model")
    m.add_argument("--model", required=True, help="short name, hub repository or folder of the base model, not quantised")
    m.add_argument("--adapter", required=True, help="folder with adapter_model.safetensors and adapter_config.json")
    m.add_argument("--out", required=True, help="folder to write; must not exist")
    m.add_argument("--dtype", choices=weights.DTYPES, default="float32", help="type of the written weights")
    a = p.parse_args(argv)
    with weights.new_folder(a.out) as tmp:
        merge = Merge(a.model, a.adapter)
        for f in weights.TOKENIZER_FILES:  # the template and the end token that the adapter was trained with
            if (Path(a.adapter) / f).is_file():
                shutil.copyfile(Path(a.adapter) / f, tmp / f)
        size = write(merge, tmp, a.dtype)
        weights.save_about(tmp, merge.checkpoint.folder, a.dtype, merge.tied_head)
        line = compare(merge, tmp)
    print(f"{a.out}: merged model, {size / 1e6:,.1f} MB in {a.dtype}\n{line}")
