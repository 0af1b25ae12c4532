"""Loading is strict and takes little memory. A file is saved as a whole or not at all."""
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, ROOT, make_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate
import llama
import lora
from errors import UserError
from files import hub, peft_files, weights, writing


def params(model):
    return {n: p.detach() for n, p in model.named_parameters()}


def assert_same(a, b):
    a, b = params(a), params(b)
    assert a.keys() == b.keys()
    for n in a:
        assert a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]), n


def edit(folder, **changes):
    """Change tensors of model.safetensors: {name: tensor, or None to drop it}."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != "DROP"}))


def shard(folder, weight_map=None):
    """Split model.safetensors into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in files.items():
        save_file({k: tensors[k] for k in own}, folder / file, {"format": "pt"})
    weight_map = {k: file for file, own in files.items() for k in own} if weight_map is None else weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# ---------------------------------------------------------------------------------------------- strict loading

def edit_index(folder, **changes):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {**json.loads(path.read_text())["weight_map"], **changes}}))


def swap(path, make):
    path.unlink()
    make(path)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def header_only(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def missing_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN = {  # how a LLaMA folder is damaged -> what the one line must hold
    "truncated": (truncate, "/model.safetensors: not a whole safetensors file .* download or copy it again"),
    "cut in the header": (header_only, "/model.safetensors: not a whole safetensors file"),
    "text": (lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
             "/model.safetensors: not a whole safetensors file"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "/model.safetensors: not a whole safetensors file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors .*model.safetensors.index.json"),
    "missing shard": (missing_shard, "/model-00002-of-00002.safetensors: the file is missing"),
    "missing tensor": (lambda d: edit(d, **{Q: None}), rf"tensor {Q} of shape \[32, 32\] is missing$"),
    "missing tensors": (lambda d: edit(d, **{Q: None, "model.norm.weight": None}), r"is missing \(and 1 more\)$"),
    "missing untied head": (lambda d: edit(d, **{"lm_head.weight": None}),
                            r"tensor lm_head.weight of shape \[4096, 32\] is missing"),
    "extra tensor": (lambda d: edit(d, **{"model.layers.7.w": torch.ones(2)}),
                     "/model.safetensors: unexpected tensor model.layers.7.w, which .*config.json has no place for"),
    "misshapen tensor": (lambda d: edit(d, **{Q: torch.ones(32, 31)}),
                         rf"/model.safetensors: tensor {Q} has shape \[32, 31\], config.json asks for \[32, 32\]"),
    "integer tensor": (lambda d: edit(d, **{Q: torch.ones(32, 32, dtype=torch.int8)}),
                       rf"/model.safetensors: tensor {Q} holds torch.int8, and config.json does not say how"),
    "index without weight_map": (lambda d: (d / "model.safetensors.index.json").write_text('{"metadata": {}}'),
                                 "/model.safetensors.index.json: no weight_map"),
    "index with an empty weight_map": (lambda d: shard(d, {}), "/model.safetensors.index.json: no weight_map"),
    "index with numbers": (lambda d: shard(d, {Q: 1}), "/model.safetensors.index.json: .*weight_map"),
    "broken index": (lambda d: (d / "model.safetensors.index.json").write_text("{"),
                     "/model.safetensors.index.json: not valid JSON"),
    "pickle only": (pickle_only, "/pytorch_model.bin: pickle weights are not loaded.* Convert: .*save_pretrained"),
    "no config": (lambda d: (d / "config.json").unlink(), "/config.json: No such file"),
    "broken config": (lambda d: (d / "config.json").write_text('{"model_type": '), "/config.json: not valid JSON"),
    "config not UTF-8": (lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), "/config.json: not valid JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "/config.json: expected a JSON object"),
    "config key missing": (lambda d: edit_config(d, hidden_size="DROP"), "/config.json: key 'hidden_size' is missing"),
    "model_type": (lambda d: edit_config(d, model_type="mamba"),
                   r"/config.json: model_type 'mamba' is not supported \(only gpt2, llama, phi\)"),
    "no model_type": (lambda d: edit_config(d, model_type="DROP"), "/config.json: model_type None is not supported"),
    "option": (lambda d: edit_config(d, sliding_window=128),
               "/config.json: option 'sliding_window': 128 is not implemented by llama.py"),
    "quantization_config": (lambda d: edit_config(d, quantization_config={"quant_method": "gptq", "bits": 4}),
                            r"/config.json: the weights are quantised \(gptq\).*--bits 4"),
    "size is text": (lambda d: edit_config(d, hidden_size="32"), "/config.json: hidden_size must be an integer"),
    "no heads": (lambda d: edit_config(d, num_attention_heads=0), "/config.json: num_attention_heads must be an integer"),
    "NaN": (lambda d: edit(d, **{Q: torch.full((32, 32), torch.nan)}), f"/model.safetensors: tensor {Q}: .*not finite"),
    "infinity in a norm": (lambda d: edit(d, **{"model.norm.weight": -torch.ones(32) / 0}), "norm.weight: .*not finite"),
    "tensor in two shards": (lambda d: (shard(d), save_file({Q: torch.ones(32, 32)}, d / "third.safetensors"),
                                        edit_index(d, third="third.safetensors")),
                             rf"/third.safetensors: tensor {Q} is in model-0000[12]-of-00002.safetensors too"),
    "weights are a folder": (lambda d: swap(d / "model.safetensors", Path.mkdir), "/model.safetensors: not a regular file"),
    "index is a folder": (lambda d: (d / "model.safetensors.index.json").mkdir(), "index.json: not a regular file"),
    "line end in a name": (lambda d: edit(d, **{"a\n\x1b[2Jb": torch.ones(1)}), r"unexpected tensor a  \[2Jb"),
}
for outside in ("../outside.safetensors", "/tmp/outside.safetensors", "sub/inside.safetensors", "..", "", "a\0.safetensors",
                "\ud800.safetensors", "pytorch_model.bin"):
    BROKEN[f"index names {outside!r}"] = (lambda d, name=outside: (shard(d), edit_index(d, third=name)),
                                          "/model.safetensors.index.json: '.*' is no name of a safetensors file in this")


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_model_is_refused_in_one_line(case, llama_folder):
    damage, says = BROKEN[case]
    damage(llama_folder)
    with pytest.raises(UserError) as e:
        weights.load(llama_folder)
    message = str(e.value)
    assert "\n" not in message and str(llama_folder) in message
    assert re.search(says, message), message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json",
                                  "model-00001-of-00002.safetensors"])
def test_a_pipe_or_a_device_is_refused_at_once(name, llama_folder):
    """Reading a pipe would wait for ever, and reading a device may fill the memory. A link to a file is welcome."""
    if name not in ("config.json", "model.safetensors"):
        shard(llama_folder)
    whole = llama_folder / "whole"
    (llama_folder / name).rename(whole)
    (llama_folder / name).symlink_to(whole)
    weights.load(llama_folder)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/null")):
        swap(llama_folder / name, make)
        end = os.open(llama_folder / name, os.O_RDWR)  # so that even a program that opens the pipe does not wait there
        before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
        signal.alarm(10)
        with pytest.raises(UserError, match=f"{name}: not a regular file"):
            weights.load(llama_folder)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        os.close(end)
        assert not hub.is_complete(llama_folder)


def test_a_number_that_float16_cannot_hold_is_refused(llama_folder, on_device):
    edit(llama_folder, **{Q: torch.full((32, 32), -7e4)})
    weights.load(llama_folder, bits=32)
    weights.load(llama_folder, bits=16)
    on_device(half=torch.float16)
    weights.load(llama_folder, bits=32)
    with pytest.raises(UserError, match=rf"tensor {Q}: 70000 is too large for float16; use float32"):
        weights.load(llama_folder, bits=16)


def test_logits_that_are_not_finite_give_no_token(llama_folder):
    """Every weight is finite, and a sum of them is not."""
    edit(llama_folder, **{"lm_head.weight": torch.full((4096, 32), 1e38)})
    for temperature in (0, 0.7):
        with pytest.raises(UserError, match="the logits are not finite"):
            generate.generate(weights.load(llama_folder), [1, 2, 3], temperature=temperature)


def test_random_weights_that_do_not_fit_into_memory(llama_folder):
    edit_config(llama_folder, vocab_size=2**24, hidden_size=2**24, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(UserError, match="llama-tiny: the weights do not fit into memory"):
        weights.from_scratch(llama_folder)


def test_other_bits_are_refused(llama_folder):
    with pytest.raises(UserError, match="--bits 5"):
        weights.load(llama_folder, bits=5)


def test_shards_equal_one_file(llama_folder):
    whole = weights.load(llama_folder)
    shard(llama_folder)
    assert_same(whole, weights.load(llama_folder))


def test_tied_head_stored_twice(tmp_path):
    folder = make_folder(tmp_path / "tied", "llama", tie_word_embeddings=True)
    one = weights.load(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert one.lm_head.weight is one.model.embed_tokens.weight
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, **{"lm_head.weight": embedding.clone()})
    assert_same(one, weights.load(folder))
    edit(folder, **{"lm_head.weight": embedding + 1e-3})
    with pytest.raises(UserError, match=r"lm_head.weight differs from the embedding.*\"tie_word_embeddings\": false"):
        weights.load(folder)
    edit(folder, **{"lm_head.weight": embedding[:, :5].contiguous()})
    with pytest.raises(UserError, match=r"lm_head.weight has shape \[4096, 5\], config.json asks for \[4096, 32\]"):
        weights.load(folder)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_files_of_every_age(prefix, gpt2_folder):
    """The files of 2019 have no prefix and hold the causal masks. Newer files have the prefix, and no masks."""
    now = weights.load(gpt2_folder)
    old = {k.removeprefix("transformer."): v for k, v in load_file(gpt2_folder / "model.safetensors").items()}
    for i in range(3):
        old[f"h.{i}.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8)
        old[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file({prefix + k: v for k, v in old.items()}, gpt2_folder / "model.safetensors")
    assert_same(now, weights.load(gpt2_folder))
    edit(gpt2_folder, **{f"{prefix}h.0.attn.c_attn.bias": None})  # a real bias is not a mask
    with pytest.raises(UserError, match=r"h.0.attn.c_attn.bias of shape \[96\] is missing"):
        weights.load(gpt2_folder)


# ---------------------------------------------------------------------------------------------- 16 bit, and small

def test_16_bit_weights_and_32_bit_adapters(gpt2_folder):
    model = weights.load(gpt2_folder, bits=16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    full = params(weights.load(gpt2_folder))
    for n, p in params(model).items():
        assert torch.equal(p, full[n].bfloat16()), n
    lora.inject(model, r=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def python(code, *args, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], env=env, text=True,
                          capture_output=True, timeout=120, **more)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's /proc")
def test_loading_holds_no_second_copy(tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    config = {**LLAMA, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 9}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in llama.Llama(llama.Config.from_json(config)).named_parameters()}
    save_file({n: torch.ones(shape, dtype=torch.bfloat16) for n, shape in shapes.items()}, folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    assert 50e6 < size < 80e6
    p = python("""
        import sys
        from files import weights
        def status(key):
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
        weights.load(sys.argv[2], bits=16)  # imports and pools, once
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
        before = status("VmRSS")
        model = weights.load(sys.argv[1], bits=16)
        print(status("VmHWM") - before)
    """, folder, make_folder(tmp_path / "warm-up", "llama"))
    assert p.returncode == 0, p.stderr
    grown = int(p.stdout)
    assert 0.9 * size < grown < 1.6 * size, f"{grown / size:.2f} times the file"


# ---------------------------------------------------------------------------------------------- saving

@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_save_and_reload(family, tmp_path):
    model = weights.load(make_folder(tmp_path / "a", family))
    weights.save(model, tmp_path / "b")
    assert_same(model, weights.load(tmp_path / "b"))
    assert {f.name for f in (tmp_path / "b").iterdir()} == {"config.json", "model.safetensors", "vocab.json", "merges.txt"}


def test_save_as_float16(gpt2_folder, tmp_path):
    model = weights.load(gpt2_folder)
    weights.save(model, tmp_path / "half", "float16")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    again = params(weights.load(tmp_path / "half"))
    for n, p in params(model).items():
        assert torch.equal(again[n], p.half().float()), n


@pytest.mark.parametrize("error, raised", [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), None),
                                           (ValueError("a bug"), None)])
def test_atomic_when_the_writer_fails(error, raised, tmp_path):
    path = tmp_path / "deep" / "file.json"
    writing.write_text(path, "before")
    with pytest.raises(raised or type(error)) as e, writing.atomic(path) as tmp:
        tmp.write_text("half")
        raise error
    if raised:
        assert re.search("file.json: could not be written .*No space left.* untouched", str(e.value))
    assert path.read_text() == "before"
    assert os.listdir(path.parent) == ["file.json"]


def test_atomic_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="could not be written"):
        writing.write_text(tmp_path / "file" / "config.json", "{}")


def test_full_disk(gpt2_folder, tmp_path):
    """A limit on the size of files stands in for a full disk. The earlier model stays whole, and nothing else is left."""
    target = tmp_path / "target"
    weights.save(weights.load(gpt2_folder), target)
    before = {f.name: f.read_bytes() for f in target.iterdir()}
    peft_files.save(lora.inject(weights.load(gpt2_folder), r=2), tmp_path / "adapter")
    p = python("""
        import resource
        import signal
        import sys
        import export
        from errors import UserError
        from files import weights, writing
        source, target, adapter, merged = sys.argv[1:]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        model = weights.from_scratch(source, seed=1)
        for act in (lambda: weights.save(model, target), lambda: writing.write_text(target + "/config.json", "x" * 200_000),
                    lambda: export.main(["merge", "--model", source, "--adapter", adapter, "--out", merged])):
            try:
                act()
            except UserError as e:
                print(e)
    """, gpt2_folder, target, tmp_path / "adapter", tmp_path / "merged")
    assert p.returncode == 0, p.stderr
    lines = p.stdout.splitlines()
    assert len(lines) == 3 and all("could not be written" in line for line in lines), p.stdout
    assert "model.safetensors" in lines[0] and "config.json" in lines[1] and "model.safetensors" in lines[2]
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["adapter", "gpt2-tiny", "target"], "something is left of the merged model"


def test_modes_follow_the_umask(gpt2_folder, tmp_path):
    """safetensors alone would write a file that only its owner can read."""
    before = os.umask(0o027)
    try:
        weights.save(weights.load(gpt2_folder), tmp_path / "a")
        with writing.new_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "a").iterdir()} == {0o640}
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750


def test_equal_tensors_make_equal_files(tmp_path):
    """safetensors writes the keys of its metadata in a random order, so there is one. Earlier files have several."""
    metadata, tensors = {"parts": "{}", "init": "default", "bits": "4"}, {"x": torch.ones(2)}
    for name in ("a", "b"):
        writing.write_tensors(tmp_path / name, tensors, metadata if name == "a" else dict(reversed(metadata.items())))
    save_file(tensors, tmp_path / "old", {"format": "pt", **metadata})
    writing.write_tensors(tmp_path / "plain", tensors)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as f, safe_open(tmp_path / "plain", "pt") as plain:
        assert len(f.metadata()) == 1 and plain.metadata() == {"format": "pt"}
    for name in ("a", "old"):
        with weights.opened(tmp_path / name) as f:
            read = weights.read_metadata(f, name)
            assert {k: read[k] for k in metadata} == metadata
    for damaged in ("{", "[]", '{"bits": 4}', "[" * 9999):
        save_file(tensors, tmp_path / "damaged", {"bytewise": damaged})
        with weights.opened(tmp_path / "damaged") as f, pytest.raises(UserError, match="damaged: its metadata"):
            weights.read_metadata(f, tmp_path / "damaged")


def test_leftovers_of_killed_processes_are_removed(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {f".a.json.tmp{ended.pid}": False, f"deep/.b.safetensors.tmp{ended.pid}": False, f".c.tmp{os.getpid()}": False,
             f".d.tmp{os.getppid()}": True, f"a.json.tmp{ended.pid}": True, ".e.tmp": True, ".f.tmpx": True, ".tmp1": True,
             "deep/.tmpAb12Cd": False,
             f".g.tmp{10**30}": True}
    (tmp_path / "deep").mkdir()
    for name in names:
        (tmp_path / name).write_text("x")
    folder = tmp_path / f".model.tmp{ended.pid}"
    (folder / "inside").mkdir(parents=True)
    with writing.new_folder(tmp_path / "model"):
        assert not folder.exists() and all((tmp_path / name).exists() for name in names), "only those of its own name"
    folder.mkdir()
    writing.remove_leftovers(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names and not folder.exists()

    def kill(pid, signal):
        raise PermissionError
    monkeypatch.setattr(os, "kill", kill)  # the process belongs to someone else
    folder.mkdir()
    writing.remove_leftovers(tmp_path)
    assert folder.exists()


def test_new_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(UserError, match=f"{name} exists and is not empty"), writing.new_folder(tmp_path / name):
            pytest.fail("entered")
    with pytest.raises(UserError, match="cannot be created"), writing.new_folder(tmp_path / "file" / "below"):
        pytest.fail("entered")
    for error in (UserError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), writing.new_folder(tmp_path / "empty") as tmp:
            (tmp / "half").write_text("x")
            raise error
        assert not any((tmp_path / "empty").iterdir())
    with pytest.raises(UserError, match="could not be written"), writing.new_folder(tmp_path / "empty") as tmp:
        raise OSError(28, "No space left on device")
    for name in ("empty", "new"):
        with writing.new_folder(tmp_path / name) as tmp:
            (tmp / "whole").write_text("x")
        assert os.listdir(tmp_path / name) == ["whole"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "full", "new"]
    assert os.listdir(tmp_path / "full") == ["mine.txt"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_from_scratch_is_its_seed(family, tmp_path):
    folder = make_folder(tmp_path / "m", family)
    (folder / "model.safetensors").unlink()  # only config.json is read
    torch.manual_seed(1)
    a = weights.from_scratch(folder, seed=3)
    torch.manual_seed(2)
    assert_same(a, weights.from_scratch(folder, seed=3))
    other = params(weights.from_scratch(folder, seed=4))
    for n, p in params(a).items():
        if p.dim() == 2:
            assert not torch.equal(p, other[n]), n
            residual = n.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight", "dense.weight", "fc2.weight"))
            assert abs(p.std() / (0.02 / (6 ** 0.5 if residual else 1)) - 1) < 0.1, n
        else:
            assert torch.equal(p, torch.full_like(p, float(n.endswith("weight")))), n
