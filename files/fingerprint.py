"""What a run was made from, in a few hashes, so that --resume can tell whether the same data and the same model are there.

A path says nothing: the file behind it may have been edited, and the same file may have moved. So a run's config.json has

    data, val_data     SHA-256 of the whole file
    template           SHA-256 of the template's text
    tokenizer          SHA-256 of the tokenizer's files, their names included
    adapter            SHA-256 of the files of --adapter
    weights            SHA-256 of config.json and of a sample of the weights: every header (names, types, shapes), and the
                       first 1,024 bytes of each tensor

Hashing all weights would read LLaMA-7B's 13.5 GB once more, a minute. The sample is 291 kB. It notices another checkpoint
and a tensor that was set to zero, but not a change in the middle of one tensor.
"""
import hashlib
import json
from pathlib import Path

from errors import UserError
from files import hub, weights
from files.json_files import is_there

SAMPLE = 1024  # bytes of each tensor


def of_file(path) -> str:
    """The SHA-256 of a file's content. Raises UserError if it cannot be read."""
    try:
        is_there(Path(path))  # refuses a pipe and a device: they would keep the program waiting
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_tokenizer(folder: Path) -> str:
    files = [f for f in weights.TOKENIZER_FILES if (folder / f).is_file()]
    return of_text(json.dumps([(f, of_file(folder / f)) for f in files]))


def of_adapter(folder: Path) -> str:
    start = "start.safetensors"  # (of loftq only)
    files = ["adapter_config.json", "adapter_model.safetensors", *[start] * (folder / start).is_file()]
    return of_text(json.dumps([(f, of_file(folder / f)) for f in files]))


def of_weights(folder: Path) -> str:
    """Of a model's config.json and safetensors files. Their format: 8 bytes, the length of the header; the header, a JSON
    object {tensor: {"dtype", "shape", "data_offsets": [begin, end]}}; the tensors' bytes, to which the offsets refer."""
    digest = hashlib.sha256(of_file(folder / "config.json").encode())
    for path in hub.weight_files(folder):
        with weights.opened(path), open(path, "rb") as f:  # opened: UserError if this is no whole safetensors file
            size = int.from_bytes(f.read(8), "little")
            header = f.read(size)
            digest.update(header)
            offsets = sorted(t["data_offsets"] for name, t in json.loads(header).items() if name != "__metadata__")
            for begin, end in offsets:
                f.seek(8 + size + begin)
                digest.update(f.read(min(SAMPLE, end - begin)))
    return digest.hexdigest()
