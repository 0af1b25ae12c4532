"""Text to token ids and back, with the tokenizer files that the checkpoint has. The first of these three is used:

    tokenizer.json              the `tokenizers` library                                        most checkpoints today
    tokenizer.model             sentencepiece, or tiktoken for Llama 3's original file          LLaMA 1 and 2, Llama 3
    vocab.json + merges.txt     tiktoken; added_tokens.json may add tokens (Phi: for            GPT-2, gpt2-nano, Phi
                                several spaces or tabs)

`encode` adds no special tokens, and by default it reads "<|endoftext|>" in a text as plain characters. The template writes
the special tokens, and only its text is encoded with specials=True. (For plain text, data.py adds them.) If the template and
the tokenizer both added a BOS token, the model would be trained on prompts with two of them, which no other program uses.
"""
import base64
import re
from itertools import groupby
from pathlib import Path

from errors import UserError
from files import hub

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`, and what the checkpoint says about its special tokens.

    specials: name -> id. eos, eos_id: the end-of-text token. stop_ids: the ids that end a generation. bos: a name or None;
    adds_bos: whether texts start with it. chat_template: the checkpoint's own jinja template, or None.
    Raises UserError if the folder has no tokenizer, a damaged one, or no end-of-text token.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        meta = {}
        for f in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / f).is_file():
                meta.update({k: v for k, v in hub.read_json(folder / f).items() if v is not None})
        self.specials: dict[str, int] = {}
        self.bos = self.eos_id = None  # the tokenizer's file may set them; tokenizer_config.json takes precedence
        if (folder / "tokenizer.json").is_file():
            self._from_tokenizers(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").is_file():
            data = (folder / "tokenizer.model").read_bytes()
            if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", data):  # Llama 3: each line is a token in base64 and its rank
                self._from_tiktoken(data)
            else:
                self._from_sentencepiece(folder / "tokenizer.model")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            self._from_gpt2(folder, meta)
        else:
            raise UserError(f"{folder}: no tokenizer in it (tokenizer.json, tokenizer.model, or vocab.json + merges.txt)")
        self.bos = self._token_text(meta.get("bos_token")) or self.bos
        eos = self._token_text(meta.get("eos_token"))
        self.eos_id = self.specials.get(eos) if eos else self.eos_id
        self._ids_from_config(folder)
        if self.eos_id is None:
            raise UserError(f"{folder}: no end-of-text token is named in tokenizer_config.json or config.json")
        names = {i: s for s, i in self.specials.items()}
        self.eos = eos or names.get(self.eos_id) or self.decode([self.eos_id])
        self.adds_bos = bool(meta.get("add_bos_token", self.adds_bos)) and bool(self.bos)
        self.chat_template = self._read_template(folder, meta)
        # LLaMA 1 and 2 put a space before every text, so "a" alone is another token than "a" after a newline. Then `encode`
        # needs the tokens of a newline: see `continued` there.
        self._newline = self._encode("\n", False) if self._encode("a", False) != self._encode("\na", False)[-1:] else None

    @staticmethod
    def _token_text(token):
        return token.get("content") if isinstance(token, dict) else token

    def _ids_from_config(self, folder: Path):
        """Set stop_ids from the tokenizer, generation_config.json and config.json; set eos_id if the tokenizer has none."""
        self.stop_ids = set()
        for f in ("generation_config.json", "config.json"):
            if (folder / f).is_file():
                ids = hub.read_json(folder / f).get("eos_token_id")
                ids = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
                self.stop_ids.update(ids)
                if self.eos_id is None and ids:
                    self.eos_id = ids[0]
        if self.eos_id is not None:
            self.stop_ids.add(self.eos_id)

    @staticmethod
    def _read_template(folder: Path, meta: dict) -> str | None:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        template = meta.get("chat_template")
        if isinstance(template, list):  # several templates, each with a name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        return template

    def _from_tokenizers(self, path: Path):
        import tokenizers
        try:
            tok = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises plain Exception
            raise UserError(f"{path}: not a readable tokenizer ({e})") from None
        tok.no_truncation()  # the file may contain the settings of an earlier training run
        tok.no_padding()
        self.specials = {t.content: i for i, t in tok.get_added_tokens_decoder().items() if t.special}

        def encode(text, specials):
            tok.encode_special_tokens = not specials  # True: the library encodes names of specials as ordinary text
            return tok.encode(text, add_special_tokens=False).ids
        self._encode, self.decode = encode, lambda ids: tok.decode(list(ids), skip_special_tokens=False)
        added = tok.encode("", add_special_tokens=True).tokens
        self.bos, self.adds_bos = added[0] if added else None, len(added) > 0
        self.vocab_size = tok.get_vocab_size()

    def _from_bpe(self, ranks: dict, split: str, added: dict | None = None):
        """added: {text: id}, such as {"    ": 50284}. This text becomes this token everywhere, before any merge."""
        import tiktoken
        ids = {**self.specials, **(added or {})}
        bpe = tiktoken.Encoding(self.folder.name, pat_str=split, mergeable_ranks=ranks, special_tokens=ids)

        def any_of(tokens):  # the longest first, so that ten spaces are one token of ten, not five tokens of two
            return re.compile("(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")")
        marks = {True: any_of(ids), False: any_of(added or {})}

        def encode(text, specials):  # split returns text, mark, text, ...: the marks are at the odd places
            return [i for n, s in enumerate(marks[specials].split(text))
                    for i in ([ids[s]] if n % 2 else bpe.encode_ordinary(s))]
        # A model may have more rows than there are tokens, and sample one (Phi-2: 51,200 rows, 50,295 tokens): no text.
        self._encode, self.decode = encode, lambda ids: bpe.decode([i for i in ids if i < bpe.n_vocab])
        self.vocab_size = bpe.n_vocab

    def _from_tiktoken(self, data: bytes):
        ranks = {base64.b64decode(t): int(rank) for t, rank in (line.split() for line in data.splitlines())}
        names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                 "reserved_special_token_2", "reserved_special_token_3", "start_header_id", "end_header_id",
                 "reserved_special_token_4", "eot_id"] + [f"reserved_special_token_{i}" for i in range(5, 251)]
        self.specials = {f"<|{n}|>": len(ranks) + i for i, n in enumerate(names)}
        self._from_bpe(ranks, LLAMA3_SPLIT)
        self.bos, self.adds_bos = "<|begin_of_text|>", True

    def _from_gpt2(self, folder: Path, meta: dict):
        vocab = hub.read_json(folder / "vocab.json")
        # vocab.json writes each byte as a printable character (GPT-2's bytes_to_unicode). byte_of is the way back.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        # tiktoken takes a token's id as the rank of its merge: the ids must follow the order of merges.txt, as GPT-2's do.
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [m.replace(" ", "", 1) for m in lines if m and not m.startswith("#version")]
        merged = [vocab.get(m) for m in merges]
        if None in merged or merged != sorted(merged):
            raise UserError(f"{folder / 'merges.txt'}: does not match vocab.json's order; bring a tokenizer.json instead")
        # No text can become a token that is neither a byte nor a merge: so it is special ("<|endoftext|>", "</s>").
        plain = {*byte_of, *merges}
        self.specials = {token: i for token, i in vocab.items() if token not in plain}
        ranks = {bytes(byte_of[ch] for ch in token): i for token, i in vocab.items() if token not in self.specials}
        self._from_bpe(ranks, GPT2_SPLIT, self._added_tokens(folder, vocab, meta))
        self.adds_bos = False

    def _added_tokens(self, folder: Path, vocab: dict, meta: dict) -> dict[str, int]:
        """The ordinary tokens of added_tokens.json: {text: id}. Those that tokenizer_config.json calls special go to
        self.specials instead. Raises UserError for two tokens with one id and for options that only a tokenizer.json has."""
        path = folder / "added_tokens.json"
        added = hub.read_json(path) if path.is_file() else {}
        owner = {i: token for token, i in vocab.items()}
        options = {o["content"]: o for o in (meta.get("added_tokens_decoder") or {}).values()}
        named = [v for k, v in meta.items() if k.endswith("_token")] + (meta.get("additional_special_tokens") or [])
        named = {self._token_text(v) for v in named}
        for token, i in added.items():
            if owner.setdefault(i, token) != token:
                raise UserError(f"{path}: {token!r} and {owner[i]!r} have the same id, {i}")
            for option in ("lstrip", "rstrip", "single_word"):
                if options.get(token, {}).get(option):
                    raise UserError(f"{path}: {token!r} has the option {option}; that needs a tokenizer.json")
            if token in named or options.get(token, {}).get("special"):
                self.specials[token] = i
        return {token: i for token, i in added.items() if token not in self.specials}

    def _from_sentencepiece(self, path: Path):
        import sentencepiece
        try:
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as e:
            raise UserError(f"{path}: not a readable sentencepiece model ({e})") from None
        self.specials = {sp.id_to_piece(i): i for i in (sp.bos_id(), sp.eos_id()) if i >= 0}
        marks = re.compile("(" + "|".join(map(re.escape, self.specials)) + ")")

        def encode(text, specials):
            if not specials:
                return sp.encode(text)
            return [i for s in marks.split(text) if s for i in ([self.specials[s]] if s in self.specials else sp.encode(s))]

        def decode(ids):  # sentencepiece's own decode leaves special tokens out
            runs = groupby(map(int, ids), names.__contains__)
            return "".join("".join(names[i] for i in run) if special else sp.decode(list(run)) for special, run in runs)
        names = {i: s for s, i in self.specials.items()}
        self._encode, self.decode = encode, decode
        self.bos = sp.id_to_piece(sp.bos_id()) if sp.bos_id() >= 0 else None
        self.eos_id = sp.eos_id() if sp.eos_id() >= 0 else None
        self.adds_bos, self.vocab_size = True, sp.get_piece_size()

    def encode(self, text: str, specials: bool = False, continued: bool = False) -> list[int]:
        """text -> ids. specials: a special token's name in `text` becomes this token, not characters.

        continued: `text` continues another piece of text. So it must not get the space that LLaMA 1 and 2 put before every
        text: it is encoded after a newline, whose tokens are then removed. (A newline never merges with what follows.)
        """
        if continued and self._newline is not None and text:
            return self._encode("\n" + text, specials)[len(self._newline):]
        return self._encode(text, specials)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model. name: a short name, org/name or a folder."""
    return Tokenizer(hub.find(str(name)))
