"""Write *.json: a few logits of three tiny models, computed by transformers. Run: python tests/reference/make.py"""
import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from conftest import randomise  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from files import weights  # noqa: E402

CONFIGS = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 64, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3},
    "llama3": {"model_type": "llama", "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
               "attention_bias": True, "rms_norm_eps": 1e-5, "hidden_act": "silu",
               "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 48}},
    "phi": {"model_type": "phi", "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
            "layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
}
IDS, POSITIONS, TOKENS, SEED = [(7 * i * i + 3) % 64 for i in range(24)], [0, 1, 11, 23], [0, 5, 31, 63], 7

for name, config in CONFIGS.items():
    config_class, model_class, _ = weights.FAMILIES[config["model_type"]]
    model = randomise(model_class(config_class.from_json(config)), SEED)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model.source = folder
        weights.save(model, folder)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        logits = reference(torch.tensor([IDS])).logits[0][POSITIONS][:, TOKENS]
    record = {"config": config, "seed": SEED, "ids": IDS, "positions": POSITIONS, "tokens": TOKENS,
              "logits": logits.tolist()}
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(name, logits.std().item())
