"""What README.md says about the files and the options is true, and its commands run: here in miniature."""
import dataclasses
import json
import re
import shlex
from itertools import count

import pytest
from conftest import ROOT, make_folder
from runs import no_picture
from test_predict import InProcess

import export
import generate
import train
from bench.__main__ import BENCHES
from files import hub
from ledger import ask
from train import TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
FAMILY = {"gpt2": "gpt2", "llama-3.2-1b-instruct": "llama", "llama-3.2-3b-instruct": "llama", "llama-2-7b": "llama",
          "llama-7b": "llama", "llama-13b": "llama", "phi-2": "phi"}


def commands() -> list[list[str]]:
    """The words of every `python FILE.py ...` in a block, in their order."""
    text = "\n".join(block for language, block in BLOCKS if not language).replace("\\\n", " ")
    found = re.findall(r"^(?:\$ |\[\d\] |.*&& )?python (\w+\.py.*)$", text, re.M)
    return [shlex.split(line, comments=True) for line in found]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory where every short name of the README is a tiny model, and every data file exists."""
    place = tmp_path_factory.mktemp("readme")
    for name, family in FAMILY.items():
        make_folder(place / name, family, **({} if family == "gpt2" else {"max_position_embeddings": 2048}))
    chat = {"messages": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here."}]}
    rows = {"chats.jsonl": chat, "xsum.jsonl": {"document": "It rained all day.", "summary": "Rain."},
            "rows.jsonl": {"instruction": "Say yes", "output": "Yes."}}
    for name, row in rows.items():
        (place / name).write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
    return place


def stop_in_step(n: int):
    steps, step = count(1), train.train_step

    def train_step(*args):
        if next(steps) == n:
            raise KeyboardInterrupt
        return step(*args)
    return train_step


def test_the_commands_run(place, monkeypatch, capsys):
    """As they are typed, one after the other, with fewer and shorter steps."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(ask, "Predictor", InProcess)
    no_picture(monkeypatch)
    programs = []
    for program, *words in commands():
        programs.append(program)
        if program == "train.py":
            cfg = train.parse(words)
            if not cfg.resume:
                shorter = {} if cfg.fit or cfg.dry_run else {"max_length": 128, "samples": 0}
                cfg = dataclasses.replace(cfg, steps=2, batch_size=min(2, cfg.batch_size), grad_accum=min(2, cfg.grad_accum),
                                          eval_every=2, **shorter)
            if not words:  # the 60-second run: stopped after two of three steps, so that --resume has something to do
                with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                    m.setattr(train, "train_step", stop_in_step(3))
                    train.main(dataclasses.replace(cfg, steps=3, save_every=1))
            else:
                assert train.main(cfg)
        elif program == "generate.py":
            generate.main([*words, "--max-new-tokens", "2"])
        else:
            assert program == "export.py"
            export.main(words)
    assert len(programs) >= 11 and set(programs) == {"train.py", "generate.py", "export.py"}
    assert (place / "gpt2-support" / "model.safetensors").is_file() and "logits differ" in capsys.readouterr().out

    pytest.importorskip("peft")
    import peft
    import transformers
    theirs, (ours,) = re.search(r"`(peft\.\w+[^`]*)`", README)[1], [b for language, b in BLOCKS if language == "python"]
    exec(theirs, {"peft": peft, "model": transformers.AutoModelForCausalLM.from_pretrained("gpt2")})
    names = {}
    exec(ours.replace("ckpt_every=2)", "ckpt_every=2, steps=2, samples=0, max_length=64)"), names)
    assert len(names["ids"]) > 64 and names["summary"]["steps"] == 2


def test_every_option_named_exists():
    options = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)}
    others = {"--index-url", "--help", "--prompt", "--prompts", "--system", "--temperature", "--top-k", "--top-p", "--min-p",
              "--repetition-penalty", "--stop"}  # of pip, argparse, generate.py
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - options <= others


def test_every_bench_named_exists():
    assert set(re.findall(r"python -m bench (\w+)", README)) <= {"faults", "gpu", *BENCHES}


@pytest.mark.parametrize("page", ["README.md", "docs/README.md", "docs/own-loss.md", "docs/data.md", "docs/compare.md",
                                  "docs/measurements.md", "LOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_short_names_exist():
    sentence = re.search(r"takes a short name \(([^)]*)\)", README)[1]
    assert set(re.findall(r"`([^`]+)`", sentence)) <= set(hub.SHORT_NAMES)
    assert set(re.findall(r"--model ([a-z][\w.-]+)", README)) <= {"gpt2-nano", *hub.SHORT_NAMES}


def test_it_is_short():
    assert len(README.splitlines()) < 260
