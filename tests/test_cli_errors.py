"""An error at the command line ends in one line that names its cause, and leaves no output folder behind.

Starting PyTorch takes seconds. So most cases call main() in this process, and at least one for each program is a command.
"""
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import GPT2, LLAMA, ROOT, make_data, make_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export
import generate
import train
from errors import UserError
from files import peft_files, weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for all cases, with a good model, data, an adapter and a finished run. No case may change it."""
    base = tmp_path_factory.mktemp("place")
    make_folder(base / "good", "gpt2")
    make_folder(base / "other", "gpt2", n_embd=48)
    make_folder(base / "narrow", "gpt2", n_embd=20)
    make_data(base / "data.jsonl", 20)
    run = train.main(train.parse(["--model", f"{base}/good", "--data", f"{base}/data.jsonl", "--out", f"{base}/run",
                                  "--steps", "1", "--samples", "0", "--max-length", "64"]))
    assert run["steps"] == 1
    shutil.copytree(base / "good", base / "torn")
    whole = (base / "torn" / "model.safetensors").read_bytes()
    (base / "torn" / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    for name, config in (("windowed", {**LLAMA, "sliding_window": 64}), ("exotic", {**GPT2, "model_type": "mamba"}),
                         ("unscaled", {**GPT2, "scale_attn_weights": False}),
                         ("gptq", {**GPT2, "quantization_config": {"quant_method": "gptq", "bits": 4}})):
        shutil.copytree(base / "good", base / name)
        (base / name / "config.json").write_text(json.dumps(config))
    for name, value in (("undefined", float("nan")), ("infinite", float("inf"))):
        shutil.copytree(base / "good", base / name)
        tensors = load_file(base / name / "model.safetensors")
        tensors["transformer.h.2.attn.c_proj.weight"][3, 5] = value
        save_file(tensors, base / name / "model.safetensors", {"format": "pt"})
    rows = (base / "data.jsonl").read_text().splitlines()
    for name, content in {
            "empty.jsonl": b"", "blank.jsonl": b"\n \n",
            "latin.jsonl": "\n".join(rows[:2]).encode() + b'\n{"text": "caf\xe9"}\n',
            "broken.jsonl": "\n".join([*rows[:2], rows[2][:-1], *rows[3:]]).encode(),
            "broken.json": b'[{"text": "a"},\n{"text": ]', "object.json": b'{"text": "a"}',
            "list.jsonl": b'{"text": "a"}\n[1]\n', "columns.jsonl": b'{"question": "a", "reply": "b"}\n' * 9,
            "null.jsonl": "\n".join([rows[0], json.dumps({"instruction": "a", "output": None})]).encode(),
            "number.jsonl": b'{"prompt": "a", "completion": 3}\n' * 9, "table.xlsx": b"PK",
            "nothing.jsonl": b'{"instruction": "a", "output": ""}\n' * 20, "one.jsonl": rows[0].encode(),
            "quote.csv": b'instruction,output\na,"b\n'}.items():
        (base / name).write_bytes(content)
    (base / "not-an-adapter").mkdir()
    (base / "occupied").mkdir()
    (base / "occupied" / "mine.txt").write_text("x")
    (base / "no-save").mkdir()  # a run stopped before its first save
    shutil.copy(base / "run" / "config.json", base / "no-save")
    return base


@pytest.fixture(autouse=True)
def nothing_changes(place):
    def listing():
        return {str(f.relative_to(place)): f.stat().st_mtime_ns for f in place.rglob("*")}
    before = listing()
    yield
    assert listing().keys() == before.keys(), "files were left behind, or are gone"
    assert listing() == before, "files were changed"


def check(message, says):
    assert "\n" not in message and "Traceback" not in message
    assert re.search(says, message), message


# Each case is appended to --model good --data data.jsonl --out new --max-length 64, and may replace these options.
IS_ADAPTER = r"--model .*run/adapter is an adapter, not a model; type --model \S*good --adapter \S*run/adapter$"
TRAIN = {
    "torn weights": ("--model torn", "torn/model.safetensors: not a whole safetensors file"),
    "unknown model": ("--model gpt5", "--model gpt5: no such folder, and no short name .* org/name"),
    "model not here": ("--model nobody/nothing", "nobody/nothing is not on this machine.*a local folder .*gpt2-nano"),
    "model is a file": ("--model data.jsonl", "--model .*data.jsonl: no such folder"),
    "option of LLaMA": ("--model windowed", "windowed/config.json: option 'sliding_window': 64 is not implemented"),
    "option of GPT-2": ("--model unscaled", "unscaled/config.json: scale_attn_weights"),
    "kind of model": ("--model exotic", "exotic/config.json: model_type 'mamba' is not supported"),
    "no data": ("--data none.jsonl", "none.jsonl: cannot be read .No such file"),
    "data is a folder": ("--data run/state", "run/state: no data file in this folder"),
    "empty data": ("--data empty.jsonl", "empty.jsonl: no rows in it"),
    "blank data": ("--data blank.jsonl", "blank.jsonl: no rows in it"),
    "not UTF-8": ("--data latin.jsonl", r"latin.jsonl:3: not UTF-8 \(byte"),
    "a comma too many": ("--data data.jsonl,", "an empty name of a file, or a comma"),
    "a weight of nothing": ("--data data.jsonl:0", "the weight of a file must be a number above 0"),
    "columns that are not known": ("--columns question=instruction", "--columns question=instruction: expected KNOWN=YOURS"),
    "broken line": ("--data broken.jsonl", r"broken.jsonl:3: broken JSON"),
    "broken JSON": ("--data broken.json", r"broken.json:2: broken JSON"),
    "not an array": ("--data object.json", r"object.json: expected a JSON array"),
    "not an object": ("--data list.jsonl", r"list.jsonl:2: expected an object.* found list"),
    "broken CSV": ("--data quote.csv", r"quote.csv:\d+: broken CSV"),
    "kind of file": ("--data table.xlsx", r"table.xlsx: .*(unknown kind of file|not UTF-8)"),
    "columns": ("--data columns.jsonl", "columns.jsonl:[0-9]: no known columns among question, reply; expected messages"),
    "null": ("--data null.jsonl --val-data data.jsonl", "null.jsonl:2: field 'output' must be text, found null"),
    "number": ("--data number.jsonl", "number.jsonl:[0-9]+: field 'completion' must be text, found int"),
    "nothing to learn": ("--data nothing.jsonl", "nothing.jsonl: all [0-9]+ rows were dropped"),
    "all cut off": ("--max-length 4", "all [0-9]+ rows were dropped.*--max-length 4"),
    "held-out missing": ("--val-data none.jsonl", "none.jsonl: cannot be read"),
    "nothing held out": ("--val-frac 0", "--val-frac 0.0 of 20 rows leaves 0 to validate on"),
    "all held out": ("--val-frac 1", "--val-frac 1.0 of 20 rows leaves 20 to validate on and 0 to train on"),
    "one row": ("--data one.jsonl", "--val-frac 0.1 of 1 rows leaves 0 to validate on"),
    "template": ("--template none.jinja", "--template .*none.jinja: neither auto, chat, alpaca nor a readable file"),
    "no chat template": ("--template chat", "--template chat: .*good has no chat template"),
    "positions": ("--max-length 129", "--max-length 129: .*good has 128 positions"),
    "max-length 0": ("--max-length 0", "--max-length 0: must be at least 1"),
    "rank 0": ("--lora-r 0", "--lora-r 0: the rank must be at least 1"),
    "rank -1": ("--lora-r -1", "--lora-r -1: the rank must be at least 1"),
    "dropout 1": ("--lora-dropout 1", "--lora-dropout 1.0: must be at least 0 and below 1"),
    "targets": ("--lora-targets q_proj", "--lora-targets q_proj: no such layer; this model has all, c_attn, c_attn.k"),
    "one of the targets": ("--lora-targets c_attn,v_proj", "--lora-targets v_proj: no such layer"),
    "full and rank": ("--full --lora-r 4", "--lora-r has no effect with --full"),
    "full in 16 bit": ("--full --bits 16 --amp", "--bits 16 with --full"),
    "random, frozen": ("--from-scratch", "--from-scratch needs --full"),
    "full in 8 bit": ("--full --bits 8 --amp", "--bits 8 with --full: .*adapters, without --full"),
    "full in 4 bit": ("--full --bits 4", "--bits 4 with --full: .*adapters, without --full"),
    "64 does not divide": ("--bits 4 --amp --model narrow",
                           "narrow/model.safetensors: tensor transformer.h.0.attn.c_attn.weight: 1,200 weights are not a "
                           "multiple of 64.*--bits 8 or 16"),
    "NaN in 8 bit": ("--bits 8 --amp --model undefined", "undefined/.*transformer.h.2.attn.c_proj.weight: .*not finite"),
    "NaN in 4 bit": ("--bits 4 --amp --model undefined", "undefined/.*transformer.h.2.attn.c_proj.weight: .*not finite"),
    "infinity in 8 bit": ("--bits 8 --amp --model infinite", "tensor transformer.h.2.attn.c_proj.weight: .*not finite"),
    "infinity in 4 bit": ("--bits 4 --amp --model infinite", "tensor transformer.h.2.attn.c_proj.weight: .*not finite"),
    "GPTQ": ("--model gptq", r"gptq/config.json: the weights are quantised \(gptq\).*--bits 4"),
    "recompute nothing": ("--ckpt-every 4", "--ckpt-every 4 recomputes nothing: .*good has 3 layers"),
    "offload nothing": ("--ckpt-offload", "--ckpt-offload has no effect without --ckpt-every"),
    "ckpt-every -1": ("--ckpt-every -1", "--ckpt-every -1: must not be negative"),
    "steps 0": ("--steps 0", "--steps 0: must be at least 1"),
    "steps and epochs": ("--steps 2 --epochs 2", "--steps and --epochs both say"),
    "lr -1": ("--lr -1", "--lr -1.0: must be a number above 0"),
    "lr nan": ("--lr nan", "--lr nan: must"),
    "lr 0": ("--lr 0", "--lr 0.0: must be a number above 0, or nothing is learned"),
    "alpha 0": ("--lora-alpha 0", "--lora-alpha 0.0: must be a number above 0"),
    "alpha of 10^308": ("--lora-alpha 1e308", "--lora-alpha 1e[+]308: must be at most 1e9"),
    "clip of 10^300": ("--clip 1e300", "--clip 1e[+]300: must be at most 1e9"),
    "alpha nan": ("--lora-alpha nan", "--lora-alpha nan: must be a number above 0"),
    "alpha inf": ("--lora-alpha inf", "--lora-alpha inf: must be a number above 0"),
    "dropout nan": ("--lora-dropout nan", "--lora-dropout nan: must be at least 0 and below 1"),
    "clip nan": ("--clip nan", "--clip nan: must not be negative, nan or infinite"),
    "weight decay inf": ("--weight-decay inf", "--weight-decay inf: must not be negative, nan or infinite"),
    "val-frac nan": ("--val-frac nan", "--val-frac nan: must be from 0 to 1"),
    "val-frac 2": ("--val-frac 2", "--val-frac 2.0: must be from 0 to 1"),
    "seed -1": ("--seed -1", "--seed -1: must be from 0 to 4294967295"),
    "seed 2**64": (f"--seed {2**64}", f"--seed {2**64}: must be from 0 to 4294967295"),
    "rank of no use": ("--lora-r 33", "--lora-r 33: .*good is 32 wide; an adapter of a higher rank"),
    "rank too large": (f"--lora-r {10**12}", f"--lora-r {10**12}: must be below 2147483648"),
    "length too large": (f"--max-length {10**12}", f"--max-length {10**12}: must be below 2147483648"),
    "batch too large": (f"--batch-size {10**12}", f"--batch-size {10**12}: must be at most 10,000"),
    "samples too many": (f"--samples {10**12}", f"--samples {10**12}: must be below 2147483648"),
    "steps too many": (f"--steps {10**12}", f"--steps {10**12}: must be below 2147483648"),
    "GPU 1000": ("--dry-run --device cuda:1000", "--device cuda:1000: only cpu, cuda and mps"),
    "batch 0": ("--batch-size 0", "--batch-size 0: must be at least 1"),
    "device": ("--device nonsense", "--device nonsense: "),
    "device not here": ("--device cuda:77", "--device cuda:77: "),
    "another run": ("--out run", "--out .*run exists and holds another run; choose another folder, or .*--resume"),
    "out is a file": ("--out data.jsonl", "--out .*data.jsonl exists"),
    "out below a file": ("--out data.jsonl/run", "data.jsonl/run.* could not be written"),
    "resume nothing": ("--resume", "--resume: .*new holds no run"),
    "resume unsaved": ("--out no-save --resume", "--resume: .*state.safetensors is missing, the run was stopped before"),
    "resume otherwise": ("--out run --resume --lr 0.5", "--resume: the run in .*run has taken 1 steps, and is to have "
                         "1; give more --steps, or leave --lr out"),
    "resume with a larger rank": ("--out run --resume --lora-r 9", "--resume with a changed option: --lora-r 9, .*has 8;"),
    "an adapter as the model": ("--model run/adapter", IS_ADAPTER),
    "resume with an adapter as the model": ("--out run --resume --model run/adapter", IS_ADAPTER),
    "resume other model": ("--out run --resume --model other", "--resume: the base model is not what .* began with"),
}


BASE = ["--model", "good", "--data", "data.jsonl", "--out", "new", "--max-length", "64"]


def arguments(words, place):
    """The words, with the names of files and folders in `place` made absolute."""
    names = {f.name for f in place.iterdir()} | {"new", "none.jsonl", "none.jinja"}
    return [str(place / w) if w.partition("/")[0] in names else w for w in words]


@pytest.mark.parametrize("case", TRAIN)
def test_train(case, place, monkeypatch):
    monkeypatch.chdir(place)
    words, says = TRAIN[case]
    with pytest.raises(UserError) as e:
        train.main(train.parse(arguments([*BASE, *words.split()], place)))
    check(str(e.value), says)


GENERATE = {
    "an adapter as the model": ("--model run/adapter --prompt hi", IS_ADAPTER),
    "torn weights": ("--model torn --prompt hi", "torn/model.safetensors: not a whole safetensors file"),
    "empty prompt": (["--prompt", ""], "prompt is empty"),
    "blank prompt": (["--prompt", "  "], "prompt is empty"),
    "empty raw prompt": (["--raw", "--prompt", ""], "the prompt is empty"),
    "long prompt": (["--prompt", "word " * 200], r"the prompt has 2\d\d tokens, the model 128 positions"),
    "no adapter": ("--prompt hi --adapter none", "none/adapter_config.json: No such file"),
    "not an adapter": ("--prompt hi --adapter not-an-adapter", "not-an-adapter/adapter_config.json: No such file"),
    "adapter of another width": ("--prompt hi --model other --adapter run/adapter",
                                 r"adapter_model.safetensors: layer h.0.attn.c_attn is \(144, 48\), its adapter B \[96,"),
    "temperature": ("--prompt hi --temperature -1", "--temperature -1.0 must not be negative"),
    "temperature nan": ("--model torn --prompt hi --temperature nan", "--temperature nan must not be"),  # before weights
    "temperature inf": ("--prompt hi --temperature inf", "--temperature inf must not be negative or infinite"),
    "top-p": ("--prompt hi --top-p 0", r"--top-p 0.0 must be in \(0, 1\]"),
    "top-p nan": ("--prompt hi --top-p nan", r"--top-p nan must be in \(0, 1\]"),
    "no new tokens": ("--prompt hi --max-new-tokens 0", "--max-new-tokens 0 must be at least 1"),
    "seed -1": ("--prompt hi --seed -1", "--seed -1 in 0 ... 4294967295"),
    "seed 2**64": (f"--prompt hi --seed {2**64}", f"--seed {2**64} in 0 ... 4294967295"),
    "top-k": ("--prompt hi --top-k -1", "--top-k -1 must not be negative"),
    "min-p": ("--prompt hi --min-p 2", r"--min-p 2.0 must be in \[0, 1\]"),
    "min-p nan": ("--prompt hi --min-p nan", "--min-p nan must be in"),
    "penalty": ("--prompt hi --repetition-penalty 0", r"--repetition-penalty 0.0 must be in \[0.01, 100\]"),
    "penalty inf": ("--prompt hi --repetition-penalty inf", "--repetition-penalty inf must be"),
    "empty stop": (["--prompt", "hi", "--stop", "a", "--stop", ""], "--stop is empty"),
    "system and raw": ("--prompt hi --raw --system S", "--system needs a chat template"),
    "prompts and prompt": ("--prompts data.jsonl --out new --prompt hi", "--prompts needs --out, .*and no --prompt"),
    "prompts without out": ("--prompts data.jsonl", "--prompts needs --out"),
    "out without prompts": ("--prompt hi --out new", "--out needs --prompts"),
    "batch size without prompts": ("--prompt hi --batch-size 2", "--batch-size needs --prompts"),
    "batch size": ("--prompts data.jsonl --out new --batch-size 0", "--batch-size 0 must be at least 1"),
    "out exists": ("--model torn --prompts data.jsonl --out data.jsonl", "--out .*data.jsonl exists; choose another"),
    "no prompts": ("--prompts none.jsonl --out new", "none.jsonl: cannot be read"),
    "device": ("--prompt hi --device nonsense", "--device nonsense: "),
    "device not here": ("--prompt hi --device cuda:77", "--device cuda:77: "),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(case, place):
    words, says = GENERATE[case]
    words = words.split() if isinstance(words, str) else words
    words = [str(place / "none") if w == "none" else w for w in arguments(["--model", "good", *words], place)]
    with pytest.raises(UserError) as e:
        generate.main(words)
    check(str(e.value), says)


def test_adapter_of_another_family(place, tmp_path):
    with pytest.raises(UserError) as e:
        peft_files.load(weights.load(make_folder(tmp_path / "llama", "llama")), place / "run" / "adapter")
    check(str(e.value), "tensor base_model.model.transformer.h.0.attn.c_attn.lora_[AB].weight has no place in this model")


@pytest.mark.parametrize("words, says", [
    ("--model good --adapter none --out new", "none/adapter_config.json: No such file"),
    ("--model torn --adapter run/adapter --out new", "torn/model.safetensors: not a whole safetensors file"),
    ("--model run/adapter --adapter run/adapter --out new", IS_ADAPTER),
    ("--model other --adapter run/adapter --out new", "layer h.0.attn.c_attn is"),
    ("--model good --adapter run/adapter --out data.jsonl", "data.jsonl exists"),
])
def test_merge(words, says, place):
    words = [str(place / "none") if w == "none" else w for w in arguments(words.split(), place)]
    with pytest.raises(UserError) as e:
        export.main(["merge", *words])
    check(str(e.value), says)


# ---------------------------------------------------------------------------------------------- real commands

def command(place, words, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    script, *words = words
    return subprocess.run([sys.executable, str(ROOT / script), *arguments(words, place)], env=env, cwd=place, text=True,
                          capture_output=True, timeout=120, stdin=subprocess.DEVNULL, **more)


@pytest.mark.parametrize("words, says", [
    (["train.py", *BASE, "--model", "torn", "--max-length", "128"], "torn/model.safetensors: not a whole"),
    (["train.py", *BASE, "--data", "broken.jsonl"], "broken.jsonl:3: broken JSON"),
    (["generate.py", "--model", "gpt5", "--prompt", "hi"], "--model gpt5: no such folder"),
    (["generate.py", "--model", "windowed", "--prompt", "hi"], "windowed/config.json: option 'sliding_window'"),
    (["export.py", "merge", "--model", "good", "--adapter", "run/adapter", "--out", "occupied"],
     "occupied exists and is not"),
])
def test_true_runs(words, says, place):
    p = command(place, words)
    assert p.returncode == 1 and p.stdout == ""
    assert p.stderr.startswith("error: ") and p.stderr.count("\n") == 1, p.stderr
    check(p.stderr.rstrip("\n"), says)


def test_disk_full_while_training(place, tmp_path):
    """A limit on the size of files stands in for the full disk. The files that were written before stay whole."""
    limit = 65_000  # more than vocab.json and the adapter have, less than the state
    assert (place / "good" / "vocab.json").stat().st_size < limit
    out = tmp_path / "out"
    p = command(place, ["train.py", *BASE, "--out", str(out), "--steps", "1", "--samples", "0", "--lora-targets",
                        "all"],
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert p.returncode == 1
    assert p.stderr.startswith("error: ") and p.stderr.count("\n") == 1, p.stderr
    check(p.stderr.rstrip("\n"), r"/out/state/state.safetensors: could not be written .*what was there before is untouched")
    left = [f for f in out.rglob("*") if f.is_file()]
    assert not any("tmp" in f.name for f in left), left
    for f in left:
        if f.suffix == ".safetensors":
            with safe_open(f, "pt") as opened:
                assert list(opened.keys())
    assert not (out / "summary.json").exists()
    with pytest.raises(UserError, match="stopped before its first save"):
        train.main(train.parse(["--out", str(out), "--resume"]))


def test_prompts_that_are_not_utf8(place, monkeypatch, capsys):
    """Such bytes arrive as half characters, on the command line and from standard input (terminal.py sets this)."""
    few = ["--model", str(place / "good"), "--raw", "--max-new-tokens", "1", "--temperature", "1e-300"]
    generate.main([*few, "--prompt", "caf\udce9"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors="surrogateescape"))
    generate.main(few)
    assert capsys.readouterr().out.count("caf\ufffd") == 2


def test_the_good_ones_work(place, tmp_path, capsys):
    """The same inputs without the errors work, so each case above fails because of its error."""
    both = arguments(["--model", "good", "--adapter", "run/adapter"], place)
    generate.main([*both, "--prompt", "hi", "--max-new-tokens", "2"])
    export.main(["merge", *both, "--out", str(tmp_path / "m")])
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert merged.keys() == load_file(place / "good" / "model.safetensors").keys()
    assert all(torch.isfinite(t).all() for t in merged.values())
    assert "merged model" in capsys.readouterr().out
