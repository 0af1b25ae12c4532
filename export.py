"""What a training run leaves, in a form that other programs take.

    python export.py merge --model gpt2 --adapter runs/gpt2-1/best --out gpt2-support [--dtype float32]

merge       an adapter into its model: a plain Hugging Face folder, which runs as fast as the model (files/merging.py)
"""
import argparse
import json
import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python -P` leaves it out
    import terminal
    terminal.start()

import data
from files import merging, weights, writing
from run import card

TEXT = ("The three primary colours are red, yellow and blue. In 1969 two people walked on the Moon, while a third waited in "
        "orbit. To make tea, boil some water, pour it over the leaves and wait for four minutes.")


def merge(model: str, adapter: str, out: str, dtype: str):
    """Write the merged model to the new folder `out`, and print how far its answers moved. Raises UserError."""
    with writing.new_folder(out) as tmp:
        parts = merging.Merge(model, adapter)
        for f in weights.TOKENIZER_FILES:  # the template that the adapter was trained with
            if (Path(adapter) / f).is_file():
                shutil.copyfile(Path(adapter) / f, tmp / f)
        base, own = (weights.optional_json(f / "generation_config.json") for f in (parts.stored.folder, Path(adapter)))
        if base or own:  # the base's temperature, and the adapter's end tokens
            writing.write_text(tmp / "generation_config.json", json.dumps({**base, **own}) + "\n")
        card.write_merged(tmp, model, dtype)
        size = merging.write(parts, tmp, dtype)
        weights.save_about(tmp, parts.stored.folder, dtype, parts.tied_head)
        ids = data.prompt_ids([(TEXT, False)], "", data.load_tokenizer(str(parts.stored.folder)))
        moved = merging.compare(parts, tmp, ids)
    print(f"{out}: merged model, {size / 1e6:,.1f} MB in {dtype}\n{moved}")


def main(argv=None):
    p = argparse.ArgumentParser(prog="export.py", description="Write what was trained in a form that other programs take.")
    commands = p.add_subparsers(dest="command", required=True)
    m = commands.add_parser("merge", help="an adapter into its model: a plain Hugging Face folder")
    m.add_argument("--model", required=True, help="short name, hub repository or folder of the base model, not quantised")
    m.add_argument("--adapter", required=True, help="folder with adapter_model.safetensors and adapter_config.json")
    m.add_argument("--out", required=True, help="folder to write; must not exist")
    m.add_argument("--dtype", choices=weights.DTYPES, default="float32", help="type of the written weights")
    a = p.parse_args(argv)
    merge(a.model, a.adapter, a.out, a.dtype)


if __name__ == "__main__":
    terminal.run(main)
