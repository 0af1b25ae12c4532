"""The same job in transformers + PEFT (+ bitsandbytes): what `python -m bench peers` compares train.py with.

    python -m bench.transformers_peft --model gpt2 --amp                      float32 weights under autocast, as documented
    python -m bench.transformers_peft --model DIR --data FILE --amp --bits 4  nf4 with double quantisation, in bfloat16

A plain loop as the two projects document it: from_pretrained, get_peft_model (r 8, alpha 16, on Q and V or GPT-2's c_attn),
torch.autocast, torch.optim.AdamW. It uses Alpaca's prompt, has a loss on the replies only, and pads each batch to its
longest example. This is the only file outside tests/ that imports transformers and PEFT. Three parts come from this project,
so that both programs do the same job: the rows and which of them are held out (data.py), the folder of a model's name
(files/hub.py), and the RSS (memory.py).

Three things are to the peer's advantage:

* GPT-2's own dropout of 0.1 is switched off, because train.py does not apply it.
* Quantised models skip prepare_model_for_kbit_training, which would hold embedding and head in float32.
* The RSS is measured before the held-out loss is computed.

The last line of its output is JSON in the shape of summary.json, with a list of all losses added.
"""
import argparse
import json
import os
import random
import sys
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

import data  # noqa: E402
import memory  # noqa: E402
from errors import UserError  # noqa: E402
from files import conversations, weights  # noqa: E402
from files.hub import ASSETS  # noqa: E402
from files.rows import read_rows  # noqa: E402
from techniques.device import usable_device  # noqa: E402

try:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
except ImportError as e:
    sys.exit(f"error: bench/transformers_peft.py needs {e.name}: pip install -r requirements-dev.txt")


def load(args):
    folder, quantised = str(weights.find(args.model)), {}
    if args.bits:
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
               "bnb_4bit_compute_dtype": torch.bfloat16}
        config = BitsAndBytesConfig(**(nf4 if args.bits == 4 else {"load_in_8bit": True}))
        quantised = {"device_map": args.device, "quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if args.bits else torch.float32, **quantised)
    if not args.bits:
        model.to(args.device)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gpt2 = model.config.model_type == "gpt2"
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, fan_in_fan_out=gpt2, task_type="CAUSAL_LM",
                        target_modules=["c_attn"] if gpt2 else ["q_proj", "v_proj"])
    return get_peft_model(model, config), AutoTokenizer.from_pretrained(folder)


def examples(rows, tokenizer, max_length: int) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each instruction row, cut at max_length. A label of -100 has no loss. Raises UserError."""
    built = []
    for where, row in rows:
        messages = conversations.Reader().read(where, row).messages
        if len(messages) != 2 or "input" not in messages[0]:
            raise UserError(f"{where}: the bench reads rows with instruction and output only")
        user, reply = messages
        prompt = ("Below is an instruction that describes a task"
                  + (", paired with an input that provides further context" if user["input"] else "")
                  + ". Write a response that appropriately completes the request.\n\n"
                  + f"### Instruction:\n{user['content']}\n\n"
                  + (f"### Input:\n{user['input']}\n\n" if user["input"] else "") + "### Response:\n")
        prompt = tokenizer(prompt)["input_ids"]
        reply = tokenizer(reply["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) < max_length:  # else nothing is left of the reply
            built.append(((prompt + reply)[:max_length], ([-100] * len(prompt) + reply)[:max_length]))
    return built


def batch(chosen, device) -> dict:
    longest = max(len(ids) for ids, _ in chosen)
    pads = [longest - len(ids) for ids, _ in chosen]
    return {"input_ids": torch.tensor([ids + [0] * n for (ids, _), n in zip(chosen, pads)], device=device),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for (ids, _), n in zip(chosen, pads)], device=device),
            "labels": torch.tensor([labels + [-100] * n for (_, labels), n in zip(chosen, pads)], device=device)}


def main(args) -> dict:
    started = time.perf_counter()
    torch.manual_seed(0)
    rng = random.Random(0)
    args.device = usable_device(args.device)
    if args.data:
        all_rows = read_rows(args.data)
        mask = data.held_out_rows(len(all_rows), round(0.01 * len(all_rows)), 0)
        rows, held_out = ([row for row, out in zip(all_rows, mask) if out == wanted] for wanted in (False, True))
    else:
        rows, held_out = (read_rows(ASSETS / f) for f in ("support.jsonl", "support-heldout.jsonl"))
    model, tokenizer = load(args)
    train_set, val_set = (examples(r, tokenizer, args.max_length) for r in (rows, held_out))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0.0)
    amp = torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=args.amp)
    if (cuda := torch.device(args.device).type == "cuda"):
        torch.cuda.reset_peak_memory_stats(args.device)

    model.train()
    order, losses, seconds, tokens = [], [], [], []
    for _ in range(args.steps):
        start = time.perf_counter()
        if len(order) < args.batch_size:
            order = rng.sample(range(len(train_set)), len(train_set))
        chosen, order = [train_set[i] for i in order[:args.batch_size]], order[args.batch_size:]
        with amp:
            loss = model(**batch(chosen, args.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        tokens.append(sum(len(ids) for ids, _ in chosen))
    rss, allocated = memory.rss_peak(), memory.cuda_peak(args.device)

    model.eval()
    total = labels = 0
    with torch.no_grad(), amp:
        for i in range(0, len(val_set), args.batch_size):
            b = batch(val_set[i:i + args.batch_size], args.device)
            n = int((b["labels"][:, 1:] != -100).sum())
            total, labels = total + model(**b).loss.item() * n, labels + n
    timed = sum(seconds[1:])
    trainable, all_params = model.get_nb_trainable_parameters()
    return {"params": {"total": all_params, "trainable": trainable, "percent": 100 * trainable / all_params},
            "memory": {"predicted_peak": None, "measured_peak": allocated[0] if cuda else None,
                       "reserved": allocated[1] if cuda else None, "rss_peak": rss, "by_category": None,
                       "predicted_by_category": None},
            "loss": {"first": losses[0], "last": losses[-1], "val_after": total / labels}, "losses": losses,
            "tokens_per_s": sum(tokens[1:]) / timed if timed else None,
            "examples_per_s": args.batch_size * (args.steps - 1) / timed if timed else None,
            "wall_s": time.perf_counter() - started, "steps": args.steps,
            "arithmetic": {"products": "bfloat16" if args.amp or args.bits else "float32"}}


if __name__ == "__main__":
    p = argparse.ArgumentParser(prog="python -m bench.transformers_peft",
                                description="One LoRA job in transformers + PEFT, for python -m bench peers.")
    p.add_argument("--model", default="gpt2-nano")
    p.add_argument("--data", help="instruction rows (default: the bundled examples)")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--max-length", type=int, default=256)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--amp", action="store_true", help="torch.autocast in bfloat16")
    p.add_argument("--bits", type=int, choices=(8, 4), help="quantise the weights with bitsandbytes")
    p.add_argument("--device")
    try:
        print(json.dumps(main(p.parse_args())))
    except UserError as e:
        sys.exit(f"error: {e}")
