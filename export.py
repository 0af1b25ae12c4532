"""What a training run leaves, in a form that other programs take.

    python export.py merge --model gpt2 --adapter runs/gpt2-1/best --out gpt2-support [--dtype float32]
    python export.py combine --model gpt2 --adapter runs/gpt2-1/best:0.7 --adapter runs/gpt2-2/best:0.3 --out both

merge       an adapter into its model: a plain Hugging Face folder, which runs as fast as the model (files/merging.py)
combine     adapters of one model into one adapter: their weighted sum (files/combining.py)
"""
import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
    import terminal
    terminal.start()

import data
import lora
from errors import UserError
from files import combining, merging, peft_files, weights, writing
from run import card

TEXT = ("The three primary colours are red, yellow and blue. In 1969 two people walked on the Moon, while a third waited in "
        "orbit. To make tea, boil some water, pour it over the leaves and wait for four minutes.")


def copy_tokenizer(adapter: str, to: Path):
    """With the template and the end tokens that the adapter was trained with."""
    for f in weights.TOKENIZER_FILES:
        if (Path(adapter) / f).is_file():
            shutil.copyfile(Path(adapter) / f, to / f)


def merge(model: str, adapter: str, out: str, dtype: str):
    """Write the merged model to the new folder `out`, and print how far its answers moved. Raises UserError."""
    with writing.new_folder(out) as tmp:
        parts = merging.Merge(model, adapter)
        copy_tokenizer(adapter, tmp)
        base, own = (weights.optional_json(f / "generation_config.json") for f in (parts.stored.folder, Path(adapter)))
        if base or own:  # the base's temperature, and the adapter's end tokens
            writing.write_text(tmp / "generation_config.json", json.dumps({**base, **own}) + "\n")
        card.write_merged(tmp, model, dtype)
        size = merging.write(parts, tmp, dtype)
        weights.save_about(tmp, parts.stored.folder, dtype, parts.tied_head)
        ids = data.prompt_ids([(TEXT, False)], "", data.load_tokenizer(str(parts.stored.folder)))
        moved = merging.compare(parts, tmp, ids)
    print(f"{out}: merged model, {size / 1e6:,.1f} MB in {dtype}\n{moved}")


def combine(model: str, adapters: list[str], out: str, how: str, rank: int | None):
    """Write the weighted sum of `adapters` ("DIR:0.7", ...) to the new folder `out`. Raises UserError."""
    if rank is not None and (how != "svd" or rank < 1):
        raise UserError(f"--rank {rank}: must be at least 1" if how == "svd" else f"--rank has no effect with --how {how}, "
                        f"only with svd")
    terms = [weighted(text) for text in adapters]
    with writing.new_folder(out) as tmp:
        combined, off = combining.combine(model, terms, how, rank)
        peft_files.save(combined, tmp)
        copy_tokenizer(terms[0][0], tmp)
        card.write_combined(tmp, model, terms, how)
        size = (tmp / "adapter_model.safetensors").stat().st_size
    ranks = sorted({len(m.lora_A) for m in lora.adapters(combined).values()})
    print(f"{out}: adapter of rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}, {size / 1e6:,.2f} MB; "
          + ("the exact sum" if how == "cat" else f"it misses the sum by {100 * off:.2g} % of the sum's length"))


def weighted(text: str) -> tuple[str, float]:
    """"DIR:0.7" -> ("DIR", 0.7). Without a weight: 1. Raises UserError."""
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_dir():
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not abs(number) <= 1e6:
        raise UserError(f"--adapter {text}: the weight {weight!r} is not a number from -1e6 to 1e6 (DIR:0.7)")
    return folder, number


def main(argv=None):
    p = argparse.ArgumentParser(prog="export.py", description="Write what was trained in a form that other programs take.")
    commands = p.add_subparsers(dest="command", required=True)
    m = commands.add_parser("merge", help="an adapter into its model: a plain Hugging Face folder")
    m.add_argument("--model", required=True, help="short name, hub repository or folder of the base model, not quantised")
    m.add_argument("--adapter", required=True, help="folder with adapter_model.safetensors and adapter_config.json")
    m.add_argument("--out", required=True, help="folder to write; must not exist")
    m.add_argument("--dtype", choices=weights.DTYPES, default="float32", help="type of the written weights")
    c = commands.add_parser("combine", help="adapters of one model into one: their weighted sum")
    c.add_argument("--model", required=True, help="short name, hub repository or folder of the base model; only config.json "
                   "is read")
    c.add_argument("--adapter", required=True, action="append", metavar="DIR:0.7", help="folder of a LoRA adapter and its "
                   "weight (without one: 1); once for each adapter")
    c.add_argument("--out", required=True, help="folder to write; must not exist")
    c.add_argument("--how", choices=combining.HOW, default="cat", help="cat: exact, the ranks add up; svd: the nearest of "
                   "rank --rank; linear: A's and B's added up by themselves, rough (default: cat)")
    c.add_argument("--rank", type=int, metavar="R", help="of --how svd (default: the largest of the adapters)")
    a = p.parse_args(argv)
    if a.command == "merge":
        merge(a.model, a.adapter, a.out, a.dtype)
    else:
        combine(a.model, a.adapter, a.out, a.how, a.rank)


if __name__ == "__main__":
    terminal.run(main)
