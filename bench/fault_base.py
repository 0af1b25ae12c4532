"""What the fault campaign damages (faults.py): tiny models, tokenizers, adapters, data, and a run that is not finished."""
import contextlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import train
from files import weights, writing
from files.hub import ASSETS
from train import TrainConfig

SIZES = {"vocab_size": 4100, "bos_token_id": 4095, "eos_token_id": 4095}
GPT2 = {"model_type": "gpt2", **SIZES, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
LLAMA = {"model_type": "llama", **SIZES, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "hidden_act": "silu",
         "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": {
             "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 64}}
PHI = {"model_type": "phi", **SIZES, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
       "num_attention_heads": 4, "max_position_embeddings": 128, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5,
       "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "tie_word_embeddings": False}
RUNS = {"LoRA": {}, "--full": {"full": True}, "PiSSA": {"lora_init": "pissa", "lora_dropout": 0.1},
        "LoftQ, 4 bit, paged 8-bit AdamW": {"lora_init": "loftq", "bits": 4, "optimizer": "paged_adamw8bit", "pack": True}}


def make_model(folder: Path, config: dict):
    folder.mkdir()
    writing.write_text(folder / "config.json", json.dumps(config))
    model = weights.from_scratch(str(folder))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)  # so that the reply depends on every layer
    weights.save(model, folder)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    writing.write_text(folder / "special_tokens_map.json", json.dumps(special))
    writing.write_text(folder / "tokenizer_config.json", json.dumps({
        **special, "add_bos_token": config is LLAMA, "model_max_length": 128, "added_tokens_decoder": {
            "4095": {"content": "<|endoftext|>", "special": True, "lstrip": False}}}))


def make_base(base: Path) -> dict:
    """Everything that is damaged later: three models with three kinds of tokenizer, adapters, data, an unfinished run."""
    import tokenizers
    gpt2, llama, phi = base / "gpt2", base / "llama", base / "phi"
    for folder, config in ((gpt2, GPT2), (llama, LLAMA), (phi, PHI)):
        make_model(folder, config)
    for f in ("vocab.json", "merges.txt"):
        shutil.copy(ASSETS / "gpt2-nano" / f, gpt2 / f)
    writing.write_text(gpt2 / "added_tokens.json", json.dumps({"    ": 4096, "\t\t": 4097}))

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt")))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(llama / "tokenizer.json"), pretty=False)
    writing.write_text(llama / "generation_config.json", json.dumps({"eos_token_id": [4095, 4094], "do_sample": True}))
    shutil.copy(ASSETS / "gpt2-nano" / "chat_template.jinja", llama)
    with safe_open(llama / "model.safetensors", "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (no dict)
    where = {k: f"model-{i % 2 + 1}-of-2.safetensors" for i, k in enumerate(tensors)}
    for name in set(where.values()):
        save_file({k: t for k, t in tensors.items() if where[k] == name}, llama / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    writing.write_text(llama / "model.safetensors.index.json", json.dumps(index))
    (llama / "model.safetensors").unlink()

    import base64
    ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    writing.write_text(phi / "tokenizer.model", ranks)
    for f, values in (("config.json", {**PHI, "bos_token_id": 256, "eos_token_id": 257}),  # Llama 3's names
                      ("special_tokens_map.json", {"eos_token": "<|end_of_text|>"}), ("tokenizer_config.json", {
                          "bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|end_of_text|>"})):
        writing.write_text(phi / f, json.dumps(values))

    rows = [{"instruction": f"Say the number {i} " + "please " * (i % 4), "input": "now" if i % 3 == 0 else "",
             "output": "It is " + " ".join(map(str, range(i % 9 + 1))) + "."} for i in range(12)]
    writing.write_text(base / "rows.json", json.dumps(rows))
    writing.write_text(base / "rows.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    writing.write_text(base / "rows.csv", "instruction,input,output\n" + "".join(
        f'"{r["instruction"]}",{r["input"]},"{r["output"]}"\n' for r in rows))
    writing.write_text(base / "rows.txt", "\n".join(r["instruction"] for r in rows) + "\n")
    unfinished(base, base / "run", {})
    unfinished(base, base / "loftq", RUNS["LoftQ, 4 bit, paged 8-bit AdamW"])
    for name in ("run", "loftq"):
        shutil.copytree(base / name / "adapter", base / f"{name}-adapter")
    return {}


def config_of(base: Path, out: Path, options: dict) -> TrainConfig:
    return TrainConfig(model=str(base / "gpt2"), data=str(base / "rows.jsonl"), val_frac=0.25, out=str(out), device="cpu",
                       steps=4, save_every=1, eval_every=1, samples=1, batch_size=4, max_length=96, **options)


def unfinished(base: Path, out: Path, options: dict):
    """A run that was stopped in its third step."""
    step, calls = train.train_step, []

    def train_step(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)
    train.train_step = train_step
    with contextlib.suppress(KeyboardInterrupt):
        train.main(config_of(base, out, options))
    train.train_step = step
