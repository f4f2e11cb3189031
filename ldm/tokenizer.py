"""Text <-> token ids with a CLIP vocabulary, trained on captions or loaded. transformers' `CLIPTokenizer`
gives the same ids and opens the folders written here."""

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from ldm import bpe
from ldm import model_io as weights
from ldm.bpe import END, START, WORD_END, Pair
from ldm.config import UserError

ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}  # transformers' defaults
CONTEXT_LENGTH = 77
QUOTED = 100  # letters of a text in a warning


class Tokenizer:
    """Byte-level BPE (Radford et al. 2021, section 2.4).

    `vocab` maps token -> id, `merges` are in order of rank, `context_length` is L. `added` are tokens found
    in a text before it is split: token -> False when it is looked for in the text as typed, True in the
    normalized text. `special` tokens, always with the four named ones, are left out by `decode`.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[Pair],
        context_length: int = CONTEXT_LENGTH,
        pad_token: str = END,
        unk_token: str = END,
        added: dict[str, bool] | None = None,
        special: Iterable[str] = (),
    ):
        self.vocab, self.merges, self.context_length = vocab, merges, context_length
        self.pad_token, self.unk_token = pad_token, unk_token
        self.special = {START, END, pad_token, unk_token, *special}
        self.added = dict.fromkeys(sorted(self.special), False) | (added or {})
        _check(self)
        self.bos_token_id, self.eos_token_id = vocab[START], vocab[END]
        self.pad_token_id, self.unk_token_id = vocab[pad_token], vocab[unk_token]
        self._typed = {t: vocab[t] for t, normalized in self.added.items() if not normalized}
        self._normalized = {bpe.normalize(t): vocab[t] for t, normalized in self.added.items() if normalized}
        self._split_typed, self._split_normalized = _splitter(self._typed), _splitter(self._normalized)
        self._ranks = {pair: i for i, pair in enumerate(merges)}
        self._tokens = {i: token for token, i in vocab.items()}
        self._bytes = {c: b for b, c in bpe.byte_table().items()}
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int = CONTEXT_LENGTH) -> "Tokenizer":
        """A vocabulary of at most `vocab_size` tokens (fewer when no pair is left that occurs twice), in
        CLIP's order: bytes, bytes that end a word, merges, start, end. UserError below 514 tokens."""
        base = bpe.base_tokens()
        if vocab_size < len(base) + 2:
            raise UserError(f"vocab_size is {vocab_size}; it must be at least {len(base) + 2}: all bytes and the ends")
        words: Counter[str] = Counter()
        for caption, n in Counter(captions).items():
            for word in bpe.split_words(bpe.normalize(caption)):
                words[word] += n
        merges = bpe.learn_merges(words, vocab_size - len(base) - 2)
        tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges), START, END])
        return cls({token: i for i, token in enumerate(tokens)}, merges, context_length)

    def __len__(self) -> int:
        """Rows that an embedding of these tokens needs: the highest id plus one."""
        return max(self.vocab.values()) + 1

    def __call__(self, texts: list[str], warn: bool = True) -> Tensor:
        """Token ids (B, L), int64: start, text, end, padding. A text that is too long is cut, its end token
        kept; a warning names what was cut unless `warn` is False."""
        if isinstance(texts, str):
            raise TypeError("the tokenizer takes a list of texts, not a single string")
        length = self.context_length
        rows = torch.full((len(texts), length), self.pad_token_id, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > length and warn:
                about, cut = quoted(text), quoted(self.decode(ids[length - 1 : -1]))
                message = f"the text {about} has more than {length - 2} tokens; this was cut off: {cut}"
                warnings.warn(message, stacklevel=2)
            ids = [*ids[:-1][: length - 1], self.eos_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        """Start, the ids of the whole text, end; neither cut nor padded."""
        ids = [self.bos_token_id]
        for piece in self._split_typed.split(text):
            if piece in self._typed:
                ids.append(self._typed[piece])
            else:
                ids += self._encode_piece(bpe.normalize(piece))
        return [*ids, self.eos_token_id]

    def _encode_piece(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._split_normalized.split(text):
            if piece in self._normalized:
                ids.append(self._normalized[piece])
            else:
                ids += [i for word in bpe.split_words(piece) for i in self._encode_word(word)]
        return ids

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._cache:
            if len(self._cache) >= 2**16:
                self._cache.clear()  # bounds the memory of a long run
            symbols = bpe.apply_merges(word, self._ranks)
            self._cache[word] = [self.vocab.get(symbol, self.unk_token_id) for symbol in symbols]
        return self._cache[word]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, in lower case and without special tokens; single spaces part the words."""
        data = bytearray()
        for token in (self._tokens[int(i)] for i in ids):
            if token not in self.special:
                known = all(c in self._bytes for c in token)
                data += bytes(self._bytes[c] for c in token) if known else token.encode()
        return data.decode("utf-8", errors="replace").replace(WORD_END, " ").strip()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {
            "bos_token": START,
            "eos_token": END,
            "pad_token": self.pad_token,
            "unk_token": self.unk_token,
        }
        flags = {"lstrip": False, "rstrip": False, "single_word": False}
        listed = {
            str(self.vocab[t]): flags | {"content": t, "normalized": n, "special": t in self.special}
            for t, n in self.added.items()
        }
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length}
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        weights.write_json(folder / "vocab.json", dict(sorted(self.vocab.items(), key=lambda item: item[1])))
        weights.write_json(folder / "special_tokens_map.json", named)
        weights.write_json(folder / "tokenizer_config.json", config | named | {"added_tokens_decoder": listed})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer in a folder, or in `tokenizer/` within it: `tokenizer.json`, or `vocab.json` and
        `merges.txt`, read as transformers' CLIPTokenizer does. UserError names what is not supported."""
        folder = _find(folder)
        try:
            return cls(**_read(folder))
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise UserError(f"a file of the tokenizer in {str(folder)!r} is not as it should be ({reason})") from None


def _read(folder: Path) -> dict[str, Any]:
    """What a folder's tokenizer is made of. UserError names what is not supported; files with values of other types
    make it raise nearly anything."""
    vocab, merges, listed = _read_model(folder)
    config, listed = _read_config(folder, listed)
    names, tokens = _special_tokens(config, listed)
    for key in ("bos_token", "eos_token"):
        if names[key] != ROLES[key]:
            raise UserError(f"{folder}: {key} {names[key]!r} is not supported; CLIP's is {ROLES[key]!r}")
    for content, token in tokens.items():
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise UserError(f"{folder}: token {content!r} with lstrip, rstrip or single_word is not supported")
        if "id" in token:
            vocab.setdefault(content, token["id"])
    length = config.get("model_max_length", CONTEXT_LENGTH)
    return {
        "vocab": vocab,
        "merges": merges,
        "context_length": int(length) if length < 1e6 else CONTEXT_LENGTH,  # 1e30 there means "not known"
        "pad_token": names["pad_token"],
        "unk_token": names["unk_token"],
        "added": {content: bool(token.get("normalized", False)) for content, token in tokens.items()},
        "special": [content for content, token in tokens.items() if token.get("special")],
    }


def _check(tokenizer: Tokenizer) -> None:
    vocab = tokenizer.vocab
    for token, number in vocab.items():
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < 2**31:
            raise UserError(
                f"token {token!r} of the vocabulary has the id {number!r}; it must be a whole number from 0"
            )
    for token in tokenizer.added:
        if token not in vocab:
            raise UserError(f"the vocabulary has no token {token!r}, which the tokenizer's config names")
    for pair in tokenizer.merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise UserError(f"merge {' '.join(pair)!r} is not of two tokens of the vocabulary to a third")
    if tokenizer.context_length < 3:
        raise UserError(f"context_length is {tokenizer.context_length}; at least 3 are needed: start, a token, end")


def _splitter(tokens: Iterable[str]) -> regex.Pattern:
    """Cuts a text at every token, the longest where several fit, and keeps the tokens."""
    options = "|".join(regex.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return regex.compile(f"({options or '(?!)'})")  # (?!) matches nowhere


def _find(folder: str | Path) -> Path:
    root = weights.find_root(folder)
    for candidate in (root / "tokenizer", root):
        if any((candidate / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            return candidate
    raise UserError(f"no tokenizer in {str(folder)!r}: neither vocab.json with merges.txt nor tokenizer.json is there")


def _read_model(folder: Path) -> tuple[dict[str, int], list[Pair], list[dict]]:
    """Vocabulary, merges and added tokens; `tokenizer.json` goes before the two files, as in transformers."""
    if (folder / "tokenizer.json").is_file():
        table = weights.read_json(folder / "tokenizer.json")
        model = table.get("model", {})
        if model.get("end_of_word_suffix") != WORD_END or not isinstance(model.get("vocab"), dict):
            raise UserError(f"{folder}/tokenizer.json is no CLIP tokenizer: BPE with {WORD_END!r} at word ends")
        lines, vocab, added = model.get("merges", []), model["vocab"], table.get("added_tokens", [])
    else:
        vocab, added = weights.read_json(folder / "vocab.json"), []
        if not (folder / "merges.txt").is_file():
            raise UserError(f"{str(folder / 'merges.txt')!r} does not exist; vocab.json is of no use without it")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        lines = [line for line in lines if line.strip() and not line.startswith("#version")]
    return vocab, [tuple(line.split(" ") if isinstance(line, str) else line) for line in lines], added


def _read_config(folder: Path, listed: list[dict]) -> tuple[dict, list[dict]]:
    """The config with the named tokens, and the added tokens. As in transformers, `added_tokens_decoder`
    settles what is added; without it special_tokens_map.json overrides (the pad token "!" of Stable
    Diffusion 2 stands only there) and added_tokens.json adds."""

    def read(name: str) -> dict:
        return weights.read_json(folder / name) if (folder / name).is_file() else {}

    config = read("tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config, [{"id": int(i)} | token for i, token in config["added_tokens_decoder"].items()]
    config |= read("special_tokens_map.json")
    plain = [{"content": t, "id": i, "normalized": True} for t, i in read("added_tokens.json").items()]
    return config, listed + plain


def _special_tokens(config: dict, listed: list[dict]) -> tuple[dict[str, str], dict[str, dict]]:
    """The four named tokens, and all added tokens with their flags: content -> {normalized, special, ...}.
    Flags come from the list; for a token that is not in it, from the last role that names it."""
    known = {token["content"]: token for token in listed}
    names, tokens = {}, dict(known)
    for key in [*ROLES, "extra_special_tokens", "additional_special_tokens"]:
        value = config.get(key) or ROLES.get(key, [])
        for token in value if isinstance(value, list) else [value]:
            token = token if isinstance(token, dict) else {"content": token, "normalized": False}
            names[key] = token["content"]
            tokens[token["content"]] = known.get(token["content"], token) | {"special": True}
    return names, tokens


def quoted(text: str) -> str:
    """In quotation marks; a long one by its two ends."""
    end = QUOTED // 2
    return repr(text if len(text) <= QUOTED else f"{text[:end]}...{text[-end:]}")
