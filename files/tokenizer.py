"""Text to token ids and back, with the tokenizer files that the checkpoint has. The first of these three is used:

    tokenizer.json              the `tokenizers` library                                        most checkpoints today
    tokenizer.model             sentencepiece, or tiktoken for Llama 3's original file          LLaMA 1 and 2, Llama 3
    vocab.json + merges.txt     tiktoken; added_tokens.json may add tokens (Phi: for            GPT-2, gpt2-nano, Phi
                                several spaces or tabs)

`encode` adds no special tokens, and by default it reads "<|endoftext|>" in a text as plain characters. The template writes
the special tokens, and only its text is encoded with specials=True. (For plain text, data.py adds them.) If the template and
the tokenizer both added a BOS token, the model would be trained on prompts with two of them, which no other program uses.

A long text is encoded in pieces, because the libraries take too much memory for it, or fail. It is cut at the end of a word
or of a line, and only where both sides together get the same ids as each side alone. So the ids are those of the whole text.
"""
import base64
import contextlib
import re
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

from errors import UserError
from files import hub
from files.json_files import check_file, is_there, read_json, show

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+")
PIECE, CONTEXT = 2**16, 100  # characters: of a piece of a long text, and on each side of a cut that is tried
LONGEST = 400_000  # characters without a cut
CUT = re.compile(r"[^\W_](?=\s)|(?<=\S)\n(?=\S)")  # the end of a word, or of a line


def reason(e: BaseException | str) -> str:
    """An exception's message in one line of at most 300 characters."""
    return " ".join(str(e).split())[:300] or type(e).__name__


@contextlib.contextmanager
def in_one_line(what):
    """Inside, what a library raises becomes a UserError that begins with `what`."""
    try:
        yield
    except BaseException as e:  # a panic in Rust is no Exception, and each library has its own class for it
        if isinstance(e, UserError) or not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({reason(e)})") from None


def read_text(path: Path) -> str:
    check_file(path)
    with in_one_line(f"{path}: cannot be read as UTF-8 text"):
        return path.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- tokenizer_config.json

def is_name(token) -> bool:
    return isinstance(token, str) or isinstance(token, dict) and isinstance(token.get("content"), str)


def is_template(value) -> bool:
    return isinstance(value, str) or isinstance(value, list) and all(
        isinstance(t, dict) and isinstance(t.get("name"), str) and isinstance(t.get("template"), str) for t in value)


FORMS = {  # key -> (whether a value has the right form, the form in words); and every "..._token" is a name
    "additional_special_tokens": (lambda v: isinstance(v, list) and all(map(is_name, v)), "a list of names"),
    "added_tokens_decoder": (lambda v: isinstance(v, dict) and all(isinstance(o, dict) and is_name(o) for o in v.values()),
                             "an object of objects, each with a `content`"),
    "chat_template": (is_template, "text, or a list of objects, each with a `name` and a `template`"),
    "add_bos_token": (lambda v: isinstance(v, bool), "true or false"),
}


def read_meta(folder: Path) -> tuple[dict, dict]:
    """(special_tokens_map.json and, with precedence, tokenizer_config.json, without nulls; key -> the file that has it)."""
    meta, source = {}, {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        for key, value in (read_json(path) if is_there(path) else {}).items():
            name = key.endswith("_token") and not key.startswith("add_")
            has_form, form = (is_name, "text, or an object with a `content`") if name else FORMS.get(key, (None, None))
            if value is not None and has_form and not has_form(value):
                raise UserError(f"{path}: {key} must be {form}, found {show(value)}")
            if value is not None:
                meta[key], source[key] = value, path
    return meta, source


def check_ids(path: Path, ids: dict, owner: dict[int, str]):
    """Raise UserError unless each token has text and an id of its own. owner: id -> token; the tokens are added to it."""
    for token, i in ids.items():
        if not token or type(i) is not int or not 0 <= i < 2**31:
            raise UserError(f"{path}: {show(token)} has the id {show(i)}; a token is not empty, and its id "
                            f"is a whole number from 0")
        if owner.setdefault(i, token) != token:
            raise UserError(f"{path}: {token!r} and {owner[i]!r} have the same id, {i}")


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`, and what the checkpoint says about its special tokens.

    specials: name -> id. eos, eos_id: the end-of-text token. stop_ids, stops: the ids and the texts that end a generation.
    bos: a name or None; adds_bos: whether texts start with it. chat_template: the checkpoint's own jinja template, or None.
    Raises UserError if the folder has no tokenizer, a damaged one, no end-of-text token, or one that is not a token.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        meta, source = read_meta(folder)
        roles = {key: self._token_text(meta[key]) for key in ("bos_token", "eos_token") if key in meta}
        self.specials: dict[str, int] = {}
        self._newline = None
        self.bos = self.eos_id = None  # the tokenizer's file may set them; tokenizer_config.json takes precedence
        if is_there(folder / "tokenizer.json"):
            self._from_tokenizers(folder / "tokenizer.json", roles.values())
        elif is_there(folder / "tokenizer.model"):
            with in_one_line(f"{folder / 'tokenizer.model'}: cannot be read"):
                data = (folder / "tokenizer.model").read_bytes()
            if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", data):  # Llama 3: each line is a token in base64 and its rank
                self._from_tiktoken(folder / "tokenizer.model", data)
            else:
                self._from_sentencepiece(folder / "tokenizer.model", roles.values())
        elif is_there(folder / "vocab.json") and is_there(folder / "merges.txt"):
            self._from_gpt2(folder, meta)
        else:
            raise UserError(f"{folder}: no tokenizer in it (tokenizer.json, tokenizer.model, or vocab.json + merges.txt)")
        for key, name in roles.items():
            if name and name not in self.specials:
                raise UserError(f"{source[key]}: {key} {show(name)} is no special token of the tokenizer beside it")
        self.bos, eos = roles.get("bos_token") or self.bos, roles.get("eos_token")
        self.eos_id = self.specials[eos] if eos else self.eos_id
        self._ids_from_config(folder)
        if self.eos_id is None:
            raise UserError(f"{folder}: no end-of-text token is named in tokenizer_config.json or config.json")
        names = {i: s for s, i in self.specials.items()}
        self.eos = eos or names.get(self.eos_id) or self.decode([self.eos_id])
        self.stops = [self.eos, *(names.get(i) or self.decode([i]) for i in sorted(self.stop_ids - {self.eos_id}))]
        if (ids := self.encode(self.eos, specials=True)) != [self.eos_id]:  # then a template could not write it
            raise UserError(f"{folder}: the end-of-text token {self.eos!r} has the id {self.eos_id}, but its text is "
                            f"encoded as {ids[:9]}")
        self.adds_bos = bool(meta.get("add_bos_token", self.adds_bos)) and bool(self.bos)
        self.chat_template = self._read_template(folder, meta)
        # LLaMA 1 and 2 put a space before every text, so "a" alone is another token than "a" after a newline. Then `encode`
        # needs the tokens of a newline: see `continued` there.
        with in_one_line(f"{folder}: the tokenizer fails"):
            alone, after = self._encode("a", False), self._encode("\na", False)
            self._newline = self._encode("\n", False) if alone != after[-1:] else None

    @staticmethod
    def _token_text(token):
        return token.get("content") if isinstance(token, dict) else token

    def _ids_from_config(self, folder: Path):
        """Set stop_ids from the tokenizer, generation_config.json and config.json; set eos_id if the tokenizer has none.
        Set n_rows, the rows of the model's embedding (None if config.json does not say)."""
        self.stop_ids, self.n_rows = set(), None
        for path in (folder / "generation_config.json", folder / "config.json"):
            config = read_json(path) if is_there(path) else {}
            ids = config.get("eos_token_id")
            ids = [i for i in (ids if isinstance(ids, list) else [ids]) if i is not None]
            for i in ids:
                if type(i) is not int or not 0 <= i < 2**31 or not self._has(i):
                    raise UserError(f"{path}: eos_token_id {show(i)} is no token of the tokenizer beside it, which "
                                    f"has {self.vocab_size:,}")
            self.stop_ids.update(ids)
            if self.eos_id is None and ids:
                self.eos_id = ids[0]
            if type(config.get("vocab_size")) is int:
                self.n_rows = config["vocab_size"]
        if self.eos_id is not None:
            self.stop_ids.add(self.eos_id)

    @staticmethod
    def _read_template(folder: Path, meta: dict) -> str | None:
        if is_there(folder / "chat_template.jinja"):
            return read_text(folder / "chat_template.jinja")
        template = meta.get("chat_template")
        if isinstance(template, list):  # several templates, each with a name
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        return template

    def _from_tokenizers(self, path: Path, roles):
        """roles: names that tokenizer_config.json gives a role. They are special, whatever tokenizer.json says of them."""
        import tokenizers
        with in_one_line(f"{path}: not a readable tokenizer"):
            tok = tokenizers.Tokenizer.from_file(str(path))
            tok.no_truncation()  # the file may contain the settings of an earlier training run
            tok.no_padding()
            self.specials = {t.content: i for i, t in tok.get_added_tokens_decoder().items() if t.special}
            for name in roles:
                if name not in self.specials and (i := tok.token_to_id(name)) is not None:
                    tok.add_special_tokens([name])
                    self.specials[name] = i
            added = tok.encode("", add_special_tokens=True)
            self.bos, self.adds_bos = added.tokens[0] if added.tokens else None, len(added.tokens) > 0
            if added.tokens:
                self.specials.setdefault(self.bos, added.ids[0])

        def encode(text, specials):
            tok.encode_special_tokens = not specials  # True: the library encodes names of specials as ordinary text
            return tok.encode(text, add_special_tokens=False).ids
        self._encode, self.decode = encode, lambda ids: tok.decode(list(ids), skip_special_tokens=False)
        self.vocab_size, self._has = tok.get_vocab_size(), lambda i: tok.id_to_token(i) is not None

    def _from_bpe(self, path: Path, ranks: dict[bytes, int], split: str, added: dict | None = None):
        """added: {text: id}, such as {"    ": 50284}. This text becomes this token everywhere, before any merge.

        path: the file of the ranks, for messages."""
        import tiktoken
        if missing := [b for b in range(256) if bytes([b]) not in ranks]:
            raise UserError(f"{path}: no token for the byte {missing[0]}, so not every text can be encoded")
        ids = {**self.specials, **(added or {})}
        with in_one_line(f"{path}: not a readable tokenizer"):
            bpe = tiktoken.Encoding(self.folder.name, pat_str=split, mergeable_ranks=ranks, special_tokens=ids)
        marks = {True: any_of(ids), False: any_of(added or {})}

        def encode(text, specials):  # split returns text, mark, text, ...: the marks are at the odd places
            return [i for n, s in enumerate(marks[specials].split(text))
                    for i in ([ids[s]] if n % 2 else bpe.encode_ordinary(s))]
        # A model may have more rows than there are tokens, and sample one (Phi-2: 51,200 rows, 50,295 tokens): no text.
        known = {*ranks.values(), *ids.values()}
        self._encode, self.decode = encode, lambda ids: bpe.decode([i for i in ids if i in known])
        self.vocab_size, self._has = bpe.n_vocab, known.__contains__

    def _from_tiktoken(self, path: Path, data: bytes):
        lines = data.splitlines()
        with in_one_line(f"{path}: not lines of a token in base64 and its rank"):
            ranks = {base64.b64decode(t, validate=True): int(rank) for t, rank in map(bytes.split, lines)}
        if len(ranks) < len(lines) or sorted(ranks.values()) != list(range(len(lines))):
            raise UserError(f"{path}: the ranks of its {len(lines):,} tokens are not 0, 1, 2, ..., each once")
        names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                 "reserved_special_token_2", "reserved_special_token_3", "start_header_id", "end_header_id",
                 "reserved_special_token_4", "eot_id"] + [f"reserved_special_token_{i}" for i in range(5, 251)]
        self.specials = {f"<|{n}|>": len(ranks) + i for i, n in enumerate(names)}
        self._from_bpe(path, ranks, LLAMA3_SPLIT)
        self.bos, self.adds_bos = "<|begin_of_text|>", True

    def _from_gpt2(self, folder: Path, meta: dict):
        path, vocab, owner = folder / "vocab.json", read_json(folder / "vocab.json"), {}
        check_ids(path, vocab, owner)
        # vocab.json writes each byte as a printable character (GPT-2's bytes_to_unicode). byte_of is the way back.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        # tiktoken takes a token's id as the rank of its merge: the ids must follow the order of merges.txt, as GPT-2's do.
        lines = read_text(folder / "merges.txt").splitlines()
        pairs = [m.partition(" ") for m in lines if m and not m.startswith("#version")]
        merges = [a + b for a, _, b in pairs]
        merged = [vocab.get(m) for m in merges]
        if None in merged or merged != sorted(merged) or any(a not in vocab or b not in vocab for a, _, b in pairs):
            raise UserError(f"{folder / 'merges.txt'}: does not match vocab.json's order; bring a tokenizer.json instead")
        # No text can become a token that is neither a byte nor a merge: so it is special ("<|endoftext|>", "</s>").
        plain, options = {*byte_of, *merges}, {o["content"]: o for o in meta.get("added_tokens_decoder", {}).values()}
        named = [v for k, v in meta.items() if k.endswith("_token")] + meta.get("additional_special_tokens", [])
        named = {*map(self._token_text, named), *(token for token, o in options.items() if o.get("special"))}
        self.specials = {token: i for token, i in vocab.items() if token not in plain}
        for token in self.specials:  # of a merges.txt that is not whole, most words would be special
            if token not in named and not re.fullmatch(r"<.+>|\[.+\]", token, re.DOTALL):
                raise UserError(f"{folder / 'merges.txt'}: no line makes vocab.json's token {show(token)}; the file "
                                f"is not whole, or tokenizer_config.json must name the token as special")
        try:
            ranks = {bytes(byte_of[ch] for ch in token): i for token, i in vocab.items() if token not in self.specials}
        except KeyError as e:
            raise UserError(f"{path}: a token has the character {e.args[0]!r}, which stands for no byte") from None
        self._from_bpe(path, ranks, GPT2_SPLIT, self._added_tokens(folder, owner, options, named))
        self.adds_bos = False

    def _added_tokens(self, folder: Path, owner: dict, options: dict, named: set) -> dict[str, int]:
        """The ordinary tokens of added_tokens.json: {text: id}. Those that tokenizer_config.json calls special (named) go to
        self.specials instead. Raises UserError for two tokens with one id and for options that only a tokenizer.json has."""
        path = folder / "added_tokens.json"
        added = read_json(path) if is_there(path) else {}
        check_ids(path, added, owner)
        for token, i in added.items():
            for option in ("lstrip", "rstrip", "single_word"):
                if options.get(token, {}).get(option):
                    raise UserError(f"{path}: {token!r} has the option {option}; that needs a tokenizer.json")
            if token in named:
                self.specials[token] = i
        return {token: i for token, i in added.items() if token not in self.specials}

    def _from_sentencepiece(self, path: Path, roles):
        """roles: as in _from_tokenizers."""
        import sentencepiece
        with in_one_line(f"{path}: not a readable sentencepiece model"):
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
            n = sp.get_piece_size()
            ids = [sp.bos_id(), sp.eos_id(), *(sp.piece_to_id(name) for name in roles)]
            self.specials = {sp.id_to_piece(i): i for i in ids if 0 <= i < n and i != sp.unk_id()}
        marks = any_of(self.specials)

        def encode(text, specials):
            if not specials:
                return sp.encode(text)
            return [i for s in marks.split(text) if s for i in ([self.specials[s]] if s in self.specials else sp.encode(s))]

        def decode(ids):  # sentencepiece's own decode leaves special tokens out
            runs = groupby(map(int, ids), names.__contains__)
            return "".join("".join(names[i] for i in run) if special else sp.decode([i for i in run if i < n])
                           for special, run in runs)
        names = {i: s for s, i in self.specials.items()}
        self._encode, self.decode = encode, decode
        self.bos = sp.id_to_piece(sp.bos_id()) if sp.bos_id() >= 0 else None
        self.eos_id = sp.eos_id() if sp.eos_id() >= 0 else None
        self.adds_bos, self.vocab_size, self._has = True, n, lambda i: i < n

    def encode(self, text: str, specials: bool = False, continued: bool = False) -> list[int]:
        """text -> ids. specials: a special token's name in `text` becomes this token, not characters.

        continued: `text` continues another piece of text. So it must not get the space that LLaMA 1 and 2 put before every
        text: it is encoded after a newline, whose tokens are then removed. (A newline never merges with what follows.)
        Raises UserError for a token that the model has no row for, and for a text that the library cannot encode.
        """
        ids = []
        with in_one_line(f"{self.folder}: the tokenizer fails at this text"):
            for piece in self._pieces(text, specials):
                ids += self._encode_piece(piece, specials, continued)
                continued = True
        if ids and self.n_rows is not None and max(ids) >= self.n_rows:
            raise UserError(f"{self.folder}: the tokenizer gives the id {max(ids)}, but config.json's vocab_size is "
                            f"{self.n_rows}: the model has no row for it")
        return ids

    def _encode_piece(self, text: str, specials: bool, continued: bool) -> list[int]:
        if continued and self._newline is not None and text:
            return self._encode("\n" + text, specials)[len(self._newline):]
        return self._encode(text, specials)

    def _pieces(self, text: str, specials: bool) -> Iterator[str]:
        """The text in pieces: each ends at the first safe cut after PIECE characters. Raises UserError if there is none in
        the next LONGEST characters."""
        start = 0
        while start < len(text):
            cuts = (m.end() for m in CUT.finditer(text, start + PIECE))
            end = next((cut for cut in islice(cuts, 100) if self._is_safe(text, cut, specials)), len(text))
            if end - start > PIECE + LONGEST:
                raise UserError(f"more than {LONGEST:,} characters, {text[start + PIECE:start + PIECE + 20]!r} and so on, "
                                f"without the end of a word or a line: break the text into lines")
            yield text[start:end]
            start = end

    def _is_safe(self, text: str, cut: int, specials: bool) -> bool:
        left, right = text[max(0, cut - CONTEXT):cut], text[cut:cut + CONTEXT]
        ids = [self._encode_piece(part, specials, True) for part in (left + right, left, right)]
        return ids[0] == ids[1] + ids[2]


def any_of(tokens) -> re.Pattern:
    """Matches one of the tokens; the longest first, so that ten spaces are one token of ten, not five tokens of two."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")")


def has_tokenizer(folder: Path) -> bool:
    return any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model. name: a short name, org/name or a folder."""
    return Tokenizer(hub.find(str(name)))
