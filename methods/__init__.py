"""Other ways to adapt a frozen model than LoRA: a file for each. Nobody has to read them to understand the rest.

    --method     trains                                   bytes a layer, beside the frozen weights     merges   file
    lora         W + s B A                                16 r (in + out) for each matrix              yes      lora.py
    dora         m (W + s B A) / |W + s B A|              the same, 16 out more                        yes      dora.py
    ia3          factors of k, v and the MLP's inside     16 (2 K D + F)                               yes      ia3.py
    bottleneck   a small MLP after attention and MLP      16 * 2 (2 m C + m + C)                       no       bottleneck.py
    prompt       n word vectors before the text           16 n C, once for the model                   no       prompt.py
    prefix       k and v of n words, in every layer       16 * 2 n K D                                 no       prefix.py

A trained parameter costs 16 bytes: 4 for itself, 4 for its gradient, 8 for AdamW. Examples, GPT-2 124M (C = K D = 768,
F = 3072, 12 layers) at the default sizes: lora 4.7 MB, dora 5.0 MB, ia3 0.9 MB, bottleneck (m = 64) 38.1 MB,
prompt (n = 20) 0.2 MB, prefix 5.9 MB.

Each file has `inject`, which freezes the model, puts the method on it, and sets model.method. What they share is in
lora.py: finding layers by name (choose, matches), putting a module in a layer's place (replace). files/peft_files.py and
files/method_files.py read and write PEFT's files.
"""
from errors import UserError

METHODS = ("lora", "dora", "ia3", "bottleneck", "prompt", "prefix")
WHY_NOT_MERGED = {
    "bottleneck": "a nonlinear function, gelu, lies between its two matrices, and no weight computes it",
    "prompt": "its word vectors are input that stands before the text, and no part of a weight",
    "prefix": "its keys and values are input that stands before the text, and no part of a weight"}


def refuse_merge(method: str):
    if method in WHY_NOT_MERGED:
        raise UserError(f"--method {method} cannot be merged: {WHY_NOT_MERGED[method]}; use it beside its model (--adapter)")
