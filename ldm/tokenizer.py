"""Text <-> token ids with a CLIP vocabulary (byte-level BPE; Radford et al. 2021, section 2.4), trained on captions or
loaded. The ids are those of transformers' CLIPTokenizer, which opens the folders written here."""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from ldm import model_io
from ldm.config import UserError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
CONTEXT_LENGTH = 77
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """`vocab` maps token -> id, `merges` are in order of rank, `context_length` is L.

    `added` tokens are found in a text before it is split. Special ones (always start, end and padding) are left
    out by `decode`.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        context_length: int = CONTEXT_LENGTH,
        pad_token: str = END,
        added: Iterable[AddedToken] = (),
    ):
        named = {token: AddedToken(token, special=True) for token in (START, END, pad_token)}
        self.added = list((named | {token.content: token for token in added}).values())
        for token in self.added:
            if token.content not in vocab:
                raise UserError(f"the vocabulary has no token {token.content!r}, which the tokenizer's config names")
        if context_length < 3:
            raise UserError(f"context_length is {context_length}; at least 3 are needed: start, a token, end")
        self.vocab, self.merges, self.context_length = vocab, merges, context_length
        self.pad_token, self.pad_token_id = pad_token, vocab[pad_token]
        self.bos_token_id, self.eos_token_id = vocab[START], vocab[END]
        model = models.BPE(vocab=vocab, merges=merges, unk_token=END, end_of_word_suffix=WORD_END)
        self._backend = tokenizers.Tokenizer(model)
        self._backend.normalizer, self._backend.pre_tokenizer = _normalizer(), _pre_tokenizer()
        self._backend.decoder = decoders.ByteLevel()
        self._backend.add_tokens(self.added)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int = CONTEXT_LENGTH) -> "Tokenizer":
        """A vocabulary of at most `vocab_size` tokens (fewer where no pair is left that occurs twice), in CLIP's order:
        bytes, bytes that end a word, merges, start, end. Raises UserError below 514 tokens."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # U+0021 and on, one for each byte
        base = [*letters, *(letter + WORD_END for letter in letters)]
        if vocab_size < len(base) + 2:
            raise UserError(f"vocab_size is {vocab_size}; it must be at least {len(base) + 2}: all bytes and the ends")
        # The trainer numbers tokens with a suffix in no fixed order, and breaks ties by number. Hence the last byte of
        # a word is spelled with letters of its own here.
        last = {letter: chr(0x4E00 + i) for i, letter in enumerate(letters)}
        normalizer, pre_tokenizer = _normalizer(), _pre_tokenizer()
        words = (
            word[:-1] + last[word[-1]]
            for caption in captions
            for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(_valid(caption)))
        )
        backend, alphabet = tokenizers.Tokenizer(models.BPE()), [*letters, *last.values()]
        options = {"vocab_size": vocab_size - 2, "min_frequency": 2, "show_progress": False}
        backend.train_from_iterator(words, trainers.BpeTrainer(**options, initial_alphabet=alphabet))
        spelled = str.maketrans({spelling: letter + WORD_END for letter, spelling in last.items()})
        pairs = json.loads(backend.to_str())["model"]["merges"]
        merges = [(a.translate(spelled), b.translate(spelled)) for a, b in pairs]
        tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges), START, END])
        return cls({token: i for i, token in enumerate(tokens)}, merges, context_length)

    def __len__(self) -> int:
        """Rows that an embedding of these tokens needs: the highest id plus one."""
        return max(self.vocab.values()) + 1

    def __call__(self, texts: list[str], warn: bool = True) -> Tensor:
        """Token ids (B, L), int64: start, text, end, padding. A text that is too long is cut before its end token, with
        a warning unless `warn` is False."""
        if isinstance(texts, str):
            raise TypeError("the tokenizer takes a list of texts, not a single string")
        length = self.context_length
        rows = torch.full((len(texts), length), self.pad_token_id, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > length:
                if warn:
                    cut = self.decode(ids[length - 1 :])[-100:]
                    message = f"the text {text[:100]!r} has more than {length - 2} tokens; this was cut off: {cut!r}"
                    warnings.warn(message, stacklevel=2)
                ids = [*ids[: length - 1], self.eos_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        """Start, the ids of the whole text, end; neither cut nor padded."""
        ids = self._backend.encode(_valid(text), add_special_tokens=False).ids
        return [self.bos_token_id, *ids, self.eos_token_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, in lower case, with single spaces between words and without special tokens."""
        return self._backend.decode([int(i) for i in ids]).replace(WORD_END, " ").strip()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = ROLES | {"pad_token": self.pad_token}
        added = {
            str(self.vocab[token.content]): {"content": token.content} | {flag: getattr(token, flag) for flag in FLAGS}
            for token in self.added
        }
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length}
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        with model_io.atomic_write(folder / "merges.txt") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        model_io.write_json(folder / "vocab.json", dict(sorted(self.vocab.items(), key=lambda item: item[1])))
        model_io.write_json(folder / "special_tokens_map.json", named)
        model_io.write_json(folder / "tokenizer_config.json", config | named | {"added_tokens_decoder": added})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer in a folder, or in `tokenizer/` within it: `tokenizer.json`, or `vocab.json` and `merges.txt`.
        Raises UserError where there is none or it is not CLIP's."""
        root = model_io.find_root(folder)
        for path in (root / "tokenizer", root):
            if (path / "vocab.json").is_file() or (path / "tokenizer.json").is_file():
                break
        else:
            raise UserError(f"no tokenizer in {str(folder)!r}: neither vocab.json nor tokenizer.json is there")
        try:
            return cls(**_read(path))
        except UserError:
            raise
        except Exception as error:  # values of other types raise nearly anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"the files of the tokenizer in {str(path)!r} are broken ({reason})") from None


def _read(folder: Path) -> dict[str, Any]:
    """The arguments of `Tokenizer`, by transformers' rules: `tokenizer.json` precedes the two files, and where the
    config has no `added_tokens_decoder`, `special_tokens_map.json` and `added_tokens.json` complete it."""

    def read(name: str) -> dict:
        return model_io.read_json(folder / name) if (folder / name).is_file() else {}

    config, table = read("tokenizer_config.json"), read("tokenizer.json")
    if table:
        model = table["model"]
        if model.get("end_of_word_suffix") != WORD_END:
            raise UserError(f"{folder}/tokenizer.json is no CLIP tokenizer: BPE with {WORD_END!r} at word ends")
        vocab, lines, listed = model["vocab"], model["merges"], table.get("added_tokens", [])
    else:
        if not (folder / "merges.txt").is_file():
            raise UserError(f"{str(folder / 'merges.txt')!r} does not exist; vocab.json is incomplete without it")
        text = (folder / "merges.txt").read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]
        vocab, listed = model_io.read_json(folder / "vocab.json"), []
    if "added_tokens_decoder" in config:
        listed = [{"id": int(i)} | token for i, token in config["added_tokens_decoder"].items()]
    else:
        config |= read("special_tokens_map.json")
        listed += [{"content": t, "id": i, "normalized": True} for t, i in read("added_tokens.json").items()]
    known = {token["content"]: token for token in listed}
    tokens = dict(known)
    for role, default in ROLES.items():
        token = config.get(role) or default
        token = token if isinstance(token, dict) else {"content": token, "normalized": False}
        content = token["content"]  # in the end that of the last role, padding
        tokens[content] = known.get(content, token) | {"special": True}
        if role in ("bos_token", "eos_token") and content != default:
            raise UserError(f"{folder}: {role} {content!r} is not supported; CLIP's is {default!r}")
    length = config.get("model_max_length", CONTEXT_LENGTH)
    return {
        "vocab": {token["content"]: token["id"] for token in tokens.values() if "id" in token} | vocab,
        "merges": [tuple(line.split() if isinstance(line, str) else line) for line in lines],
        "context_length": int(length) if length < 1e6 else CONTEXT_LENGTH,  # 1e30 there means "not known"
        "pad_token": content,
        "added": [AddedToken(t, **{f: flags[f] for f in FLAGS if f in flags}) for t, flags in tokens.items()],
    }


def _normalizer() -> normalizers.Normalizer:
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    return normalizers.Sequence(steps)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # without lone surrogates, as a broken file name may have
