"""files/tokenizer.py gives the same ids as the reference libraries, for every kind of tokenizer file."""
import base64
import json
import random
import shutil

import pytest
import sentencepiece
import tiktoken
import tokenizers
from conftest import NANO, ROOT
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
from errors import UserError
from files import tokenizer

SHARED = ROOT.parent / "shared" / "tokenizers"
TEXTS = ["Hello world", "", " ", "a", " leading and trailing ", "It's we'll I'VE they'd don't 'quoted'", "x  y   z    \t\tw",
         "line\nline\n\n\nline\r\n  indented\n", "1 22 333 4444 1234567890 3.14e-10",
         "naïve café Ελληνικά русский 中文字 日本語 עברית",
         "👍🏽 👩‍👩‍👧‍👦🇳🇴 ok", "e\u0301 \u00a0 \u200b \u2028 \ufeff", "<|endoftext|> <s> </s> <|im_end|> [INST]",
         "!?...;:--(){}<>\\/\"`~^",
         "def f(x):\n    return x ** 2  # square\n", "\n", "\n\n\n", "   \n ", "ab cd", "The end."]


def corpus(n=300):
    rows = [json.loads(x) for x in (ROOT / "assets" / "support.jsonl").read_text(encoding="utf-8").splitlines()[:n]]
    return [row[k] for row in rows for k in ("instruction", "response")]


def nano_files():
    """(vocab, merges) of gpt2-nano, read without data.py."""
    vocab = json.loads((NANO / "vocab.json").read_text(encoding="utf-8"))
    lines = (NANO / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    return vocab, [tuple(x.split(" ")) for x in lines if x]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path.parent


def byte_level(folder, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), bos=None, vocab_size=600, **config):
    """Train a byte-level BPE, write its tokenizer.json into `folder`, and return it as the reference."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(specials), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tok.train_from_iterator(corpus(), trainer)
    if bos:
        tok.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tok.token_to_id(bos))])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": specials[-1], "bos_token": bos, **config})
    return tok


def train_sentencepiece(folder, vocab_size=600):
    """A sentencepiece model as LLaMA's: BPE, bytes for unknown characters, spaces kept, a space added in front."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size, model_type="bpe",
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", add_dummy_prefix=True, num_threads=1, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def llama2_json(folder, sp, bos=True, **config):
    """The same model as Hugging Face converts it: BPE over the whole text; a normaliser adds the space in front."""
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    merges = []
    for piece, rank in vocab.items():
        if rank > 258:
            splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            merges += [(rank, vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab]
    tok = tokenizers.Tokenizer(models.BPE(vocab, [m[3:] for m in sorted(merges)], unk_token="<unk>", fuse_unk=True,
                                          byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    if bos:
        tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", **config})
    return tok


@pytest.fixture(scope="module")
def sp(tmp_path_factory):
    """(folder, reference). The folder has the fewest files that a LLaMA checkpoint can have beside the weights."""
    folder = tmp_path_factory.mktemp("sp")
    oracle = train_sentencepiece(folder)
    write_json(folder / "config.json", {"bos_token_id": 1, "eos_token_id": 2})
    return folder, oracle


# ---------------------------------------------------------------------------------------------- GPT-2's files

def test_gpt2_files_equal_transformers_and_tokenizers():
    import transformers
    vocab, merges = nano_files()
    slow = tokenizers.ByteLevelBPETokenizer(vocab, merges, add_prefix_space=False)
    hf = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    ours = data.load_tokenizer("gpt2-nano")
    for text in [*TEXTS, *corpus(20)]:
        assert ours.encode(text) == slow.encode(text).ids, text
        if "<|endoftext|>" not in text:  # transformers reads its name even in a user's text
            assert ours.encode(text) == hf.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eos, ours.eos_id, ours.stop_ids, ours.vocab_size) == ("<|endoftext|>", 4095, {4095}, 4096)
    assert not ours.adds_bos
    assert ours.encode("a<|endoftext|>", specials=True) == [*ours.encode("a"), 4095]
    assert 4095 not in ours.encode("a<|endoftext|>")


def test_gpt2_files_with_other_special_tokens(tmp_path):
    """ByteLevelBPETokenizer's training puts <s>, </s>, ... first. They are neither bytes nor merges, so they are special."""
    tok = tokenizers.ByteLevelBPETokenizer()
    tok.train_from_iterator(corpus(60), vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
                            show_progress=False)
    tok.save_model(str(tmp_path))
    write_json(tmp_path / "config.json", {"eos_token_id": 2})
    ours = data.load_tokenizer(str(tmp_path))
    assert (ours.eos, ours.eos_id) == ("</s>", 2)
    assert ours.encode("yes</s>", specials=True) == [*ours.encode("yes"), 2]
    for text in TEXTS:
        oracle = tok.encode(text).ids
        assert ours.encode(text, specials=True) == oracle, text
        assert ours.decode(oracle) == text
    assert 2 not in ours.encode("yes</s>")


def phi_files(folder, source, first):
    """Phi's files beside tokenizer.json: GPT-2's, and tokens for 31 down to 2 spaces and 9 down to 2 tabs."""
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    added = {text: first + i for i, text in enumerate(runs)}
    folder.mkdir(parents=True, exist_ok=True)
    for f in ("vocab.json", "merges.txt"):
        shutil.copy(source / f, folder / f)
    write_json(folder / "added_tokens.json", added)
    plain = dict(lstrip=False, rstrip=False, single_word=False)
    options = {i: {"content": text, "normalized": True, "special": False, **plain} for text, i in added.items()}
    options[first - 1] = {"content": "<|endoftext|>", "normalized": False, "special": True, **plain}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CodeGenTokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "add_prefix_space": False, "added_tokens_decoder": options})
    return added


CODE = ["def f(x):\n        if x:\n            return  x\n", "\tif (x) {\n\t\t\treturn 1;\t \t}\n", " " * 40 + "x",
        "\t" * 12 + "y", "a  b   c" + " " * 31 + "d" + " " * 32, "  \t\t  ", "a <|endoftext|>  b", "\n\n    <|endoftext|>",
        "  "]


def check_phi(folder, source, first, tmp_path):
    """Compare vocab.json + merges.txt + added_tokens.json, and the tokenizer.json made of them, with transformers."""
    import transformers
    added = phi_files(folder, source, first)
    hf = transformers.CodeGenTokenizer.from_pretrained(folder)
    assert len(hf) == first + 38
    hf.save_pretrained(tmp_path / "json")
    without = tmp_path / "without"
    without.mkdir()
    for f in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / f, without / f)
    bare = data.load_tokenizer(str(without))
    for ours in (data.load_tokenizer(str(folder)), data.load_tokenizer(str(tmp_path / "json"))):
        for text in [*TEXTS, *CODE, *corpus(20)]:
            assert ours.encode(text, specials=True) == hf(text).input_ids, text
            assert ours.decode(ours.encode(text)) == ours.decode(ours.encode(text, specials=True)) == text
            assert first - 1 not in ours.encode(text)
            if "<|endoftext|>" not in text:
                assert ours.encode(text) == hf(text).input_ids, text
        assert ours.encode("    x") == [added["    "], *ours.encode("x")] != bare.encode("    x")
        assert ours.encode("  <|endoftext|>") == [added["  "], *bare.encode("<|endoftext|>")]
        assert ours.specials == {"<|endoftext|>": first - 1} and (ours.eos_id, ours.stop_ids) == (first - 1, {first - 1})
        assert ours.vocab_size == first + 38 and not ours.adds_bos
        assert ours.decode([*ours.encode("a"), first + 38, *ours.encode("  b")]) == "a  b"  # the model has rows to spare


def test_phi_files_equal_transformers(tmp_path):
    check_phi(tmp_path / "phi", NANO, 4096, tmp_path)


def test_added_tokens_that_are_special(tmp_path):
    """A token is special if tokenizer_config.json calls it special or gives it a role. The others are ordinary text."""
    for f in ("vocab.json", "merges.txt"):
        shutil.copy(NANO / f, tmp_path / f)
    write_json(tmp_path / "added_tokens.json", {"<flag>": 4096, "<pad>": 4097, "<more>": 4098, "<word>": 4099})
    write_json(tmp_path / "tokenizer_config.json", {
        "eos_token": "<|endoftext|>", "pad_token": "<pad>", "additional_special_tokens": ["<more>"],
        "added_tokens_decoder": {"4096": {"content": "<flag>", "special": True}}})
    ours = data.load_tokenizer(str(tmp_path))
    assert ours.specials == {"<|endoftext|>": 4095, "<flag>": 4096, "<pad>": 4097, "<more>": 4098}
    text = "<flag><pad><more><word>"
    assert ours.encode(text, specials=True) == [4096, 4097, 4098, 4099]
    assert [i for i in ours.encode(text) if i > 4094] == [4099] and ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize(("added", "options", "says"), [
    ({"<a>": 5}, {}, r"added_tokens\.json: '<a>' and '.*' have the same id, 5"),
    ({"<a>": 4096, "<b>": 4096}, {}, r"added_tokens\.json: '<b>' and '<a>' have the same id, 4096"),
    ({"<a>": 4096}, {"lstrip": True}, r"added_tokens\.json: '<a>' has the option lstrip; that needs a tokenizer\.json"),
])
def test_added_tokens_that_cannot_be_honoured(tmp_path, added, options, says):
    for f in ("vocab.json", "merges.txt", "config.json"):
        shutil.copy(NANO / f, tmp_path / f)
    write_json(tmp_path / "added_tokens.json", added)
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"4096": {"content": "<a>", **options}}})
    with pytest.raises(UserError, match=says):
        data.load_tokenizer(str(tmp_path))


def test_merges_out_of_order_are_refused(tmp_path):
    for f in ("vocab.json", "config.json"):
        shutil.copy(NANO / f, tmp_path / f)
    lines = (NANO / "merges.txt").read_text(encoding="utf-8").split("\n")
    for broken in ([lines[0], lines[2], lines[1], *lines[3:]], [*lines[:-1], "Ġunheard ofpair"]):
        (tmp_path / "merges.txt").write_text("\n".join(broken), encoding="utf-8")
        with pytest.raises(UserError, match=r"merges\.txt: does not match vocab\.json"):
            data.load_tokenizer(str(tmp_path))
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    assert data.load_tokenizer(str(tmp_path)).encode("Hi") == data.load_tokenizer("gpt2-nano").encode("Hi")


def changed(vocab, **more):
    return json.dumps({**vocab, **more})


VOCAB, MERGES = nano_files()
LINES = [" ".join(pair) for pair in MERGES]
WRONG = [
    ("tokenizer_config.json", '{"eos_token": 5}', "eos_token must be text, or an object with a `content`, found 5"),
    ("tokenizer_config.json", '{"eos_token": "<nope>"}', "eos_token '<nope>' is no special token of the tokenizer"),
    ("tokenizer_config.json", '{"bos_token": "<nope>"}', "bos_token '<nope>' is no special token of the tokenizer"),
    ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder must be an object of objects"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 5}}', "added_tokens_decoder must be an object of objects"),
    ("tokenizer_config.json", '{"additional_special_tokens": [5]}', "additional_special_tokens must be a list of names"),
    ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "chat_template must be text, or a list"),
    ("tokenizer_config.json", '{"add_bos_token": "no"}', "add_bos_token must be true or false, found 'no'"),
    ("special_tokens_map.json", '{"eos_token": ["a"]}', "eos_token must be text"),
    ("special_tokens_map.json", '{"eos_token": {"content": "<nope>"}}', "eos_token '<nope>' is no special token"),
    *[("config.json", json.dumps({"eos_token_id": i}), "eos_token_id .* is no token of the tokenizer .* 4,096")
      for i in (4096, -1, True, 5.0, "5", 2**70, [4095, 4096], {"a": 1})],
    ("config.json", '{"eos_token_id": 94}', r"the end-of-text token '.*' has the id 94, but its text is encoded as \["),
    ("config.json", '{"eos_token_id": 4095, "vocab_size": 4095}', "gives the id 4095, but config.json's vocab_size is 4095"),
    ("generation_config.json", '{"eos_token_id": [4095, 9999]}', "eos_token_id 9999 is no token of the tokenizer"),
    *[("vocab.json", changed(VOCAB, the=i), "'the' has the id .*; a token is not empty, and its id is a whole number from 0")
      for i in ("5", 1.5, -1, None, True, 2**31, float("nan"))],
    ("vocab.json", changed(VOCAB, **{"": 4096}), "'' has the id 4096; a token is not empty"),
    ("vocab.json", changed(VOCAB, more=5), "'more' and '.*' have the same id, 5"),
    ("vocab.json", changed({k: v for k, v in VOCAB.items() if k != "\u00ff"}), "no token for the byte 255"),
    ("merges.txt", "", "merges.txt: no line makes vocab.json's token '.*'; the file is not whole"),
    ("merges.txt", "#version: 0.2\n", "merges.txt: no line makes vocab.json's token"),
    ("merges.txt", "\n".join(LINES[:-1]), "merges.txt: no line makes vocab.json's token"),
    ("merges.txt", "\n".join(["".join(LINES[0].split()), *LINES[1:]]), "merges.txt: does not match vocab.json"),
    ("merges.txt", b"\xff", "merges.txt: cannot be read as UTF-8 text"),
    ("chat_template.jinja", b"\xff", "chat_template.jinja: cannot be read as UTF-8 text"),
]


@pytest.mark.parametrize("name, content, says", WRONG, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WRONG)])
def test_wrong_files_are_refused_by_name(tmp_path, name, content, says):
    for f in ("vocab.json", "merges.txt"):
        shutil.copy(NANO / f, tmp_path / f)
    write_json(tmp_path / "config.json", {"eos_token_id": 4095, "vocab_size": 4096})
    assert data.load_tokenizer(str(tmp_path)).eos_id == 4095
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as e:
        data.load_tokenizer(str(tmp_path))
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_a_character_that_stands_for_no_byte(tmp_path):
    (tmp_path / "merges.txt").write_text("\n".join([*LINES, "<\u4e2d> a"]), encoding="utf-8")
    write_json(tmp_path / "vocab.json", {**VOCAB, "<\u4e2d>": 4096, "<\u4e2d>a": 4097})
    write_json(tmp_path / "config.json", {"eos_token_id": 4095})
    with pytest.raises(UserError, match=r"vocab\.json: a token has the character '\u4e2d', which stands for no byte"):
        data.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("line", [b"IQ==", b"IQ== 5 5", b"IQ== x", b"I Q== 0", b"IQ= 0", b"YW!Ji 256", b"IQ== -1", b"IQ== 0",
                                  b"IQ== 300", b"IQ== " + b"9" * 5000, b"\xff\xff 5"])
def test_wrong_lines_in_llama3s_tokenizer_model(tmp_path, line):
    """Also a rank twice, and a rank that leaves a hole: the ids of the special tokens follow the number of lines."""
    good = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]
    write_json(tmp_path / "config.json", {"eos_token_id": 257})
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(good) + b"\n")
    assert data.load_tokenizer(str(tmp_path)).encode("a<|end_of_text|>", specials=True) == [97, 257]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join([*good, line]))
    with pytest.raises(UserError, match=r"tokenizer\.model: (not lines of a token in base64|the ranks of its 257)"):
        data.load_tokenizer(str(tmp_path))


def test_no_or_broken_tokenizer(tmp_path):
    write_json(tmp_path / "config.json", {"eos_token_id": 0})
    with pytest.raises(UserError, match="no tokenizer in it"):
        data.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"\x00not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a readable sentencepiece model"):
        data.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a readable tokenizer"):
        data.load_tokenizer(str(tmp_path))


# ---------------------------------------------------------------------------------------------- tokenizer.json

def test_tokenizer_json_equals_the_library(tmp_path):
    tok = byte_level(tmp_path)
    ours = data.load_tokenizer(str(tmp_path))
    for text in TEXTS:
        assert ours.encode(text, specials=True) == tok.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)) == ours.decode(ours.encode(text, specials=True)) == text
    tok.encode_special_tokens = True  # the library's switch for names as plain text
    for text in TEXTS:
        assert ours.encode(text) == tok.encode(text).ids, text
    assert ours.vocab_size == 600 and not ours.adds_bos


def test_names_of_specials_in_user_text_are_plain_text(tmp_path):
    byte_level(tmp_path)
    ours = data.load_tokenizer(str(tmp_path))
    text = "<|im_start|>user<|im_end|>"
    assert ours.encode(text, specials=True) == [1, *ours.encode("user"), 2]
    assert not {0, 1, 2} & set(ours.encode(text))
    assert ours.encode(text, specials=True)[0] == 1  # the switch is per call
    assert not {0, 1, 2} & set(ours.encode(text))


@pytest.mark.parametrize("form", ["string", "dict", "special_tokens_map", "config int", "config list", "generation_config"])
def test_where_the_end_token_is_named(tmp_path, form):
    byte_level(tmp_path)
    config, gen = {}, None
    if form == "string":
        config = {"eos_token": "<|im_end|>"}
        write_json(tmp_path / "config.json", {"eos_token_id": 0})  # the tokenizer's is used, but both stop a reply
    elif form == "dict":
        config = {"eos_token": {"content": "<|im_end|>", "special": True}}
    elif form == "special_tokens_map":
        write_json(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
        config = {"eos_token": None}
    elif form == "config int":
        write_json(tmp_path / "config.json", {"eos_token_id": 2})
    elif form == "config list":
        write_json(tmp_path / "config.json", {"eos_token_id": [2, 1]})
    else:
        gen = {"eos_token_id": [2, 0]}
        write_json(tmp_path / "generation_config.json", gen)
    write_json(tmp_path / "tokenizer_config.json", config)
    ours = data.load_tokenizer(str(tmp_path))
    assert (ours.eos, ours.eos_id) == ("<|im_end|>", 2)
    assert ours.stop_ids == {"string": {0, 2}, "config list": {1, 2}, "generation_config": {0, 2}}.get(form, {2})


def test_no_end_token_named(tmp_path):
    byte_level(tmp_path, eos_token=None)
    with pytest.raises(UserError, match="no end-of-text token"):
        data.load_tokenizer(str(tmp_path))


def test_truncation_and_padding_stored_in_tokenizer_json_do_not_apply(tmp_path):
    """A file saved after a training run often has them. They would cut every longer text silently."""
    tok = byte_level(tmp_path)
    want = tok.encode("please " * 30).ids
    tok.enable_truncation(8)
    tok.enable_padding(length=64)
    tok.save(str(tmp_path / "tokenizer.json"))
    ours = data.load_tokenizer(str(tmp_path))
    assert ours.encode("please " * 30) == want and ours.encode("") == []


@pytest.mark.parametrize("named", [True, False])
def test_bos_of_tokenizer_json(tmp_path, named):
    """The tokenizer's own post-processor adds BOS, whether or not tokenizer_config.json names it."""
    tok = byte_level(tmp_path, specials=("<|begin|>", "<|end|>"), bos="<|begin|>")
    if not named:
        write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|end|>"})
    ours = data.load_tokenizer(str(tmp_path))
    assert ours.adds_bos and ours.bos == "<|begin|>"
    assert data.tokenize([("Hello", True)], ours, bos=True)[0] == tok.encode("Hello").ids == [0, *ours.encode("Hello")]


def test_add_bos_token_false(tmp_path):
    byte_level(tmp_path, specials=("<|begin|>", "<|end|>"), bos="<|begin|>", add_bos_token=False)
    ours = data.load_tokenizer(str(tmp_path))
    assert not ours.adds_bos and data.tokenize([("Hello", True)], ours, bos=True)[0] == ours.encode("Hello")


# ---------------------------------------------------------------------------------------------- sentencepiece

def test_sentencepiece_equals_the_library(sp):
    folder, oracle = sp
    ours = data.load_tokenizer(str(folder))
    for text in [*TEXTS, *corpus(20)]:
        assert ours.encode(text) == oracle.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.eos, ours.eos_id, ours.vocab_size) == ("</s>", 2, 600)
    assert ours.encode("yes</s>", specials=True) == [*oracle.encode("yes"), 2] and 2 not in ours.encode("yes</s>")
    assert ours.encode("<s>yes", specials=True) == [1, *oracle.encode("yes")]


@pytest.mark.parametrize("meta", [None, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
                                  {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}])
def test_sentencepiece_bos_once_before_raw_text(sp, tmp_path, meta):
    folder, oracle = sp
    shutil.copy(folder / "tokenizer.model", tmp_path)
    if meta:
        write_json(tmp_path / "tokenizer_config.json", meta)
    ours = data.load_tokenizer(str(tmp_path))
    assert ours.bos == "<s>" and ours.adds_bos and ours.eos_id == 2 and ours.stop_ids == {2}
    ids, learned = data.tokenize([("ab", False), (" cd", True)], ours, bos=True)
    assert ids == [1, *oracle.encode("ab cd")] and learned[0] is False
    built = data.build([("f:1", {"text": "ab cd"})], ours, "", 64)[0]
    assert built.ids + built.targets[-1:] == [1, *oracle.encode("ab cd"), 2]
    template = data.load_template("alpaca", ours)
    built = data.build([("f:1", {"instruction": "ab", "output": "cd"})], ours, template, 512)[0]
    assert built.ids.count(1) == 1 and built.ids[0] == 1


def continued_pieces(ours, whole):
    for text in TEXTS:
        for cut in range(0, len(text) + 1, 3):
            a, b = text[:cut], text[cut:]
            ids = ours.encode(a) + ours.encode(b, continued=True)
            if a:  # nothing to continue otherwise
                assert ours.decode(ids) == ours.decode(whole(text)), (a, b)
    for a, b in (("ab", " cd"), ("ab\n", "cd"), ("### Response:\n", "Sure, I can help."), ("line.\n", " \n\nnext")):
        assert ours.encode(a) + ours.encode(b, continued=True) == whole(a + b), (a, b)
    assert ours.encode("", continued=True) == []


def test_sentencepiece_continued(sp):
    folder, oracle = sp
    ours = data.load_tokenizer(str(folder))
    continued_pieces(ours, oracle.encode)
    assert ours.encode(" cd", continued=True) != ours.encode(" cd")  # so the test can fail: with one space too many
    assert ours.decode(ours.encode("ab") + ours.encode(" cd", continued=True)) == "ab cd"


def test_llama2_style_tokenizer_json(sp, tmp_path):
    _, oracle = sp
    tok = llama2_json(tmp_path, oracle)
    ours = data.load_tokenizer(str(tmp_path))
    tok.encode_special_tokens = True
    for text in [*TEXTS, *corpus(20)]:
        assert ours.encode(text) == tok.encode(text, add_special_tokens=False).ids, text
        assert ours.encode(text) == oracle.encode(text), text  # the conversion itself is right
        assert ours.decode(ours.encode(text)) == text
    continued_pieces(ours, lambda text: tok.encode(text, add_special_tokens=False).ids)
    assert ours.adds_bos and data.tokenize([("ab", False), (" cd", True)], ours, bos=True)[0] == tok.encode("ab cd").ids


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_metaspace_tokenizer_json(sp, tmp_path, scheme):
    _, oracle = sp
    tok = llama2_json(tmp_path, oracle)
    tok.normalizer, tok.pre_tokenizer = None, pre_tokenizers.Metaspace("▁", scheme, split=False)
    tok.save(str(tmp_path / "tokenizer.json"))
    ours = data.load_tokenizer(str(tmp_path))
    for text in TEXTS:
        assert ours.encode(text, specials=True) == tok.encode(text, add_special_tokens=False).ids, text
    continued_pieces(ours, lambda text: tok.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", ["tokenizer.json", "sentencepiece"])
def test_an_end_token_that_the_vocabulary_lacks(sp, tmp_path, kind):
    """And one that it has, but does not call special: its role makes it special."""
    if kind == "sentencepiece":
        shutil.copy(sp[0] / "tokenizer.model", tmp_path)
        word = sp[1].id_to_piece(400)
    else:
        word = byte_level(tmp_path).id_to_token(400)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<nope>"})
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token '<nope>' is no special token"):
        data.load_tokenizer(str(tmp_path))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": word})
    ours = data.load_tokenizer(str(tmp_path))
    assert (ours.eos, ours.eos_id) == (word, 400) and ours.encode(f"yes{word}", specials=True)[-1] == 400


# ---------------------------------------------------------------------------------------------- long texts

PARTS = [*"aAb\u00e9z\u4e2d\u6587\u3002\uff0c\u5b57_19\u00bd\u00b2 \n\r\t'.,!-<>|/=",
         *"\u00a0\u2028\u3000\x0b\x1c\x85\u0301\u200b\x00\u2581\u0120\u2167",
         *[" ", "\n", "  ", "   ", "\r\n"] * 3, "'s", "'ll", "<|endoftext|>", "</s>", "<s>", "<|im_end|>", "the",
         "def f(x):\n    return", "\U0001f44d", "e\u0301", "1234", ".\n", "\n\n"]


def check_pieces(ours, monkeypatch, texts):
    """Texts that are cut as often as possible have the same ids as in one piece."""
    rng, cuts = random.Random(0), 0
    for _ in range(texts):
        text = "".join(rng.choices(PARTS, k=rng.randrange(10, 400)))
        for specials, continued in ((False, False), (True, False), (False, True), (True, True)):
            monkeypatch.setattr(tokenizer, "PIECE", 10**6)
            whole = ours.encode(text, specials, continued)
            monkeypatch.setattr(tokenizer, "PIECE", 7)
            assert ours.encode(text, specials, continued) == whole, text
            cuts += len(list(ours._pieces(text, specials))) - 1
    assert cuts > 15 * texts


@pytest.mark.parametrize("kind", ["gpt2", "phi", "llama3", "tokenizer.json", "sentencepiece", "llama2 json"])
def test_pieces_have_the_ids_of_the_whole_text(sp, tmp_path, monkeypatch, kind):
    folder = tmp_path / "t"
    if kind == "gpt2":
        folder = NANO
    elif kind == "phi":
        phi_files(folder, NANO, 4096)
    elif kind == "llama3":
        folder.mkdir()
        plain = data.load_tokenizer("gpt2-nano")
        tokens = [bytes([b]) for b in range(256)] + sorted({plain.decode([i]).encode() for i in range(300, 4095)} - {b""})
        tokens = list(dict.fromkeys(t for t in tokens if len(t) == 1 or b"\xef\xbf\xbd" not in t))
        (folder / "tokenizer.model").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
        write_json(folder / "config.json", {"eos_token_id": len(tokens) + 1})
    elif kind == "tokenizer.json":
        byte_level(folder)
    elif kind == "sentencepiece":
        folder = sp[0]
    else:
        llama2_json(folder, sp[1])
    check_pieces(data.load_tokenizer(str(folder)), monkeypatch, 12)


def test_a_cut_that_would_change_the_ids_is_not_made(monkeypatch):
    """With this added token, no cut is safe that has the token around it."""
    ours = data.load_tokenizer("gpt2-nano")
    whole = ours._encode
    monkeypatch.setattr(ours, "_encode", lambda text, specials: [n for part in text.split("a b")
                                                                 for n in [*whole(part, specials), 4095]][:-1])
    text = "x a b y a b a b and a bit more a b"
    for size in range(1, 9):
        monkeypatch.setattr(tokenizer, "PIECE", size)
        assert ours.encode(text) == ours._encode(text, False) and len(list(ours._pieces(text, False))) > 2


def test_a_long_text_without_a_place_to_cut():
    """Nothing reaches tiktoken's regular expressions, which end the process at a million spaces."""
    ours = data.load_tokenizer("gpt2-nano")
    long = " " * (tokenizer.LONGEST + tokenizer.PIECE)
    assert ours.decode(ours.encode(long)) == long
    with pytest.raises(UserError, match="f:1: more than 400,000 characters, ' {20}' and so on, without the end of a word"):
        data.build([("f:1", {"text": long + "x"})], ours, "", 64)
    with pytest.raises(UserError, match="more than 400,000"):
        ours.encode("words " * 40_000 + "\u4e2d" * len(long))


# ---------------------------------------------------------------------------------------------- Llama 3's tokenizer.model

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
                  r"\s+(?!\S)|\s+")  # tokenizer.json of meta-llama/Llama-3.2-1B


def test_llama3_tokenizer_model(tmp_path):
    vocab, merges = nano_files()
    del vocab["<|endoftext|>"]
    for a, b in (("9", "8"), ("98", "7"), ("987", "6")):  # the pattern cuts numbers into groups of three digits
        if a + b not in vocab:
            vocab[a + b] = len(vocab)
            merges.append((a, b))
    assert "9876" in vocab
    printable = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = [b for b in range(256) if chr(b) in printable]
    rest = [b for b in range(256) if chr(b) not in printable]
    byte_of = {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(rest)}
    to_bytes = {token: bytes(byte_of[c] for c in token) for token in vocab}
    n = len(vocab)
    lines = [base64.b64encode(to_bytes[t]) + b" %d\n" % i for t, i in sorted(vocab.items(), key=lambda item: item[1])]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    write_json(tmp_path / "config.json", {"bos_token_id": n, "eos_token_id": [n + 1, n + 8, n + 9]})
    ours = data.load_tokenizer(str(tmp_path))

    # The real ids, less 128000: https://github.com/meta-llama/llama3, llama/tokenizer.py.
    for name, place in (("begin_of_text", 0), ("end_of_text", 1), ("reserved_special_token_0", 2), ("start_header_id", 6),
                        ("end_header_id", 7), ("eot_id", 9), ("reserved_special_token_5", 10),
                        ("reserved_special_token_250", 255)):
        assert ours.specials[f"<|{name}|>"] == n + place
    assert len(ours.specials) == 256 and ours.vocab_size == n + 256
    assert (ours.eos, ours.eos_id, ours.stop_ids) == ("<|end_of_text|>", n + 1, {n + 1, n + 8, n + 9})

    reference = tiktoken.Encoding("reference", pat_str=LLAMA3_PATTERN, special_tokens={},
                                  mergeable_ranks={to_bytes[t]: i for t, i in vocab.items()})
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    for text in [*TEXTS, *corpus(20), "98765 9876 98 7"]:
        assert ours.encode(text) == reference.encode_ordinary(text) == tok.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert ours.encode(text, specials=True) == [n, n + 6, *ours.encode("user"), n + 7, *ours.encode("\n\nHi"), n + 9]
    assert max(ours.encode(text)) < n and ours.decode(ours.encode(text, specials=True)) == text
    assert ours.bos == "<|begin_of_text|>" and ours.adds_bos
    assert data.tokenize([("Hi", True)], ours, bos=True)[0] == [n, *ours.encode("Hi")]


# ---------------------------------------------------------------------------------------------- the real ones

@pytest.mark.real
@pytest.mark.skipif(not (SHARED / "gpt2" / "merges.txt").is_file(), reason=f"no {SHARED / 'gpt2'}")
def test_real_gpt2(tmp_path):
    for f in ("vocab.json", "merges.txt"):
        shutil.copy(SHARED / "gpt2" / f, tmp_path / f)
    write_json(tmp_path / "config.json", {"eos_token_id": 50256})
    ours = data.load_tokenizer(str(tmp_path))
    assert ours.encode("Hello world") == [15496, 995] and (ours.eos, ours.eos_id) == ("<|endoftext|>", 50256)
    oracle = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    for text in [*TEXTS, *corpus(20)]:
        assert ours.encode(text) == oracle.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.real
@pytest.mark.skipif(not (SHARED / "gpt2" / "merges.txt").is_file(), reason=f"no {SHARED / 'gpt2'}")
def test_real_phi(tmp_path):
    check_phi(tmp_path / "phi", SHARED / "gpt2", 50257, tmp_path)
    ours = data.load_tokenizer(str(tmp_path / "phi"))
    assert [ours.encode(text) for text in (" " * 31, "  ", "\t" * 9, "\t\t")] == [[50257], [50286], [50287], [50294]]


@pytest.mark.real
@pytest.mark.skipif(not (SHARED / "llama2" / "tokenizer.model").is_file(), reason=f"no {SHARED / 'llama2'}")
def test_real_llama2(tmp_path):
    shutil.copy(SHARED / "llama2" / "tokenizer.model", tmp_path)
    ours = data.load_tokenizer(str(tmp_path))
    assert ours.encode("Hello world") == [15043, 3186]
    assert (ours.bos, ours.eos, ours.eos_id, ours.vocab_size, ours.adds_bos) == ("<s>", "</s>", 2, 32000, True)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in [*TEXTS, *corpus(20)]:
        assert ours.encode(text) == oracle.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    continued_pieces(ours, oracle.encode)
