"""Text <-> token ids with a CLIP vocabulary (byte-level BPE; Radford et al. 2021, section 2.4), trained on captions or
loaded. The ids are those of transformers' CLIPTokenizer, which opens the folders written here."""

import gzip
import json
import textwrap
import warnings
from collections.abc import Iterable
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from ldm import model_io
from ldm.config import UserError
from ldm.single_file import open_part

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
CONTEXT_LENGTH = 77
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """`vocab` maps token -> id, `merges` are in order of rank, `context_length` is L.

    `added` tokens are found in a text before it is split; start, end and padding are always among them.
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
        self._backend = _backend(models.BPE(vocab=vocab, merges=merges, unk_token=END, end_of_word_suffix=WORD_END))
        self._backend.add_tokens(self.added)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int = CONTEXT_LENGTH) -> "Tokenizer":
        """A vocabulary of at most `vocab_size` tokens (fewer where no pair is left that occurs twice), in CLIP's order:
        bytes, bytes that end a word, merges, start, end. Raises UserError below 514 tokens."""
        letters, least = sorted(pre_tokenizers.ByteLevel.alphabet()), len(_vocabulary([]))
        if vocab_size < least:
            raise UserError(f"vocab_size is {vocab_size}; it must be at least {least}: all bytes and the ends")
        # The trainer numbers tokens with a suffix in no fixed order, and breaks ties by number. Hence the last byte of
        # a word is spelled with letters of its own here.
        last = {letter: chr(0x4E00 + i) for i, letter in enumerate(letters)}
        backend = _backend(models.BPE())
        words = (
            word[:-1] + last[word[-1]]
            for text in map(_valid, captions)
            for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        )
        options = {"vocab_size": vocab_size - 2, "min_frequency": 2, "show_progress": False}
        trainer = trainers.BpeTrainer(**options, initial_alphabet=[*letters, *last.values()])
        trained = tokenizers.Tokenizer(models.BPE())
        trained.train_from_iterator(words, trainer)
        spelled = str.maketrans({spelling: letter + WORD_END for letter, spelling in last.items()})
        pairs = json.loads(trained.to_str())["model"]["merges"]
        merges = [(a.translate(spelled), b.translate(spelled)) for a, b in pairs]
        return cls(_vocabulary(merges), merges, context_length)

    def __len__(self) -> int:
        """Rows that an embedding of these tokens needs: the highest id plus one."""
        return max(self.vocab.values()) + 1

    def __call__(self, texts: list[str], warn: bool = True) -> Tensor:
        """Token ids (B, L), int64: start, text, end, padding. A text that is too long is cut before its end token, with
        a warning unless `warn` is False."""
        if isinstance(texts, str):
            raise TypeError("the tokenizer takes a list of texts, not a single string")
        length, rows = self.context_length, []
        for text in texts:
            *ids, end = self.encode(text)
            if warn and len(ids) >= length:
                start, _ = self._backend.encode(_valid(text), add_special_tokens=False).offsets[length - 2]
                cut = textwrap.shorten(text[text.rfind(" ", 0, start + 1) + 1 :], 300, placeholder=" ...")
                warnings.warn(f"prompt too long ({length - 2} tokens at most); ignored: {cut!r}", stacklevel=2)
            ids = [*ids[: length - 1], end]
            rows.append(ids + [self.pad_token_id] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).view(len(texts), length)

    def encode(self, text: str) -> list[int]:
        """Start, the ids of the whole text, end; neither cut nor padded."""
        ids = self._backend.encode(_valid(text), add_special_tokens=False).ids
        return [self.bos_token_id, *ids, self.eos_token_id]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with model_io.atomic_write(folder / "merges.txt") as temporary:  # not `model.save`, which hides a full disk
            temporary.write_text("\n".join(["#version: 0.2", *map(" ".join, self.merges), ""]), encoding="utf-8")
        model_io.write_json(folder / "vocab.json", dict(sorted(self.vocab.items(), key=lambda item: item[1])))
        named = ROLES | {"pad_token": self.pad_token}
        model_io.write_json(folder / "special_tokens_map.json", named)
        added = {self.vocab[t.content]: {key: getattr(t, key) for key in ("content", *FLAGS)} for t in self.added}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length}
        model_io.write_json(folder / "tokenizer_config.json", config | named | {"added_tokens_decoder": added})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer in a folder, or in `tokenizer/` within it: `tokenizer.json`, or `vocab.json` and `merges.txt`.
        A single file's is CLIP's own. Raises UserError where there is none or it is not CLIP's."""
        path = model_io.find_root(folder)
        if path.is_file():
            _, config, _ = open_part(path, "text_encoder")
            with gzip.open(model_io.ASSETS.parent / "clip" / "merges.txt.gz", "rt", encoding="utf-8") as file:
                merges = [tuple(line.split()) for line in file]
            # 2.x pads with "!", the token 0.
            return cls(_vocabulary(merges), merges, pad_token="!" if config["hidden_act"] == "gelu" else END)
        path = path / "tokenizer" if (path / "tokenizer").is_dir() else path
        try:
            return cls(*_read(path))
        except UserError:
            raise
        except Exception as error:  # values of other types raise nearly anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"the files of the tokenizer in {str(path)!r} are missing or broken ({reason})") from None


def _read(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], int, str, list[AddedToken]]:
    """The arguments of `Tokenizer`."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    tables = (model_io.read_json(folder / name) if (folder / name).is_file() else {} for name in names)
    complete, config, special, added = tables
    config |= special
    if complete:
        vocab, merges = complete["model"]["vocab"], complete["model"]["merges"]
        if complete["model"].get("end_of_word_suffix") != WORD_END:
            raise UserError(f"{folder}/tokenizer.json is no CLIP tokenizer: BPE with {WORD_END!r} at word ends")
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]  # strings: older files
    else:
        vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokens = [config.get(role) or default for role, default in ROLES.items()]
    tokens = [(token if isinstance(token, dict) else {"content": token}) | {"special": True} for token in tokens]
    if [token["content"] for token in tokens[:2]] != [START, END]:
        raise UserError(f"the tokenizer in {str(folder)!r} has other ends of a text than CLIP's {START!r} and {END!r}")
    pad, length = tokens[-1]["content"], config.get("model_max_length", CONTEXT_LENGTH)
    tokens += [{"content": token, "id": i, "normalized": True} for token, i in added.items()]
    tokens += complete.get("added_tokens", [])
    tokens += [{"id": int(i)} | token for i, token in config.get("added_tokens_decoder", {}).items()]
    vocab = {token["content"]: token["id"] for token in tokens if "id" in token} | vocab
    length = int(length) if length < 1e6 else CONTEXT_LENGTH  # 1e30 there means "not known"
    listed = [AddedToken(t["content"], **{flag: t[flag] for flag in FLAGS if flag in t}) for t in tokens]
    return vocab, merges, length, pad, listed


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order: bytes, bytes that end a word, merges, start, end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # U+0021 and on, one for each byte
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def _backend(model: models.Model) -> tokenizers.Tokenizer:
    """Splits texts as CLIP does, and `model` splits the words."""
    backend = tokenizers.Tokenizer(model)
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # without lone surrogates, as a broken file name may have
