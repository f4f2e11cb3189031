"""Byte-level byte-pair encoding in CLIP's convention: characters, words and merges (Sennrich et al. 2016)."""

import heapq
import unicodedata
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise

import regex

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# White_Space as Unicode has it: Python's \s also counts the separators U+001C..1F, CLIP's does not.
_SPACE = regex.compile(r"\p{White_Space}+")
_PARTS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+"
_PART = regex.compile(_PARTS)
_WORD = regex.compile(f"{regex.escape(START)}|{regex.escape(END)}|{_PARTS}")

Pair = tuple[str, str]


@cache
def byte_table() -> dict[int, str]:
    """Byte -> a printable character, all 256 distinct, in CLIP's order (GPT-2's table): printable Latin-1
    bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def base_tokens() -> list[str]:
    """The 512 tokens that every vocabulary starts with: each byte, then each byte that ends a word."""
    return [*byte_table().values(), *(c + WORD_END for c in byte_table().values())]


def normalize(text: str) -> str:
    """NFC, every run of white space one space, lower case letter by letter (so no final-sigma rule)."""
    text = _SPACE.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(c.lower() for c in text)


def split_words(text: str) -> list[str]:
    """Normalized text -> words, digits, contractions and runs of punctuation, in the byte table's characters.
    As in transformers, CLIP's pattern cuts first and GPT-2's then takes a spelled-out end token apart."""
    table = byte_table()
    parts = [part for word in _WORD.findall(text) for part in _PART.findall(word)]
    return ["".join(table[b] for b in part.encode("utf-8", errors="replace")) for part in parts]


def spell(word: str) -> list[str]:
    """The symbols of a word before any merge: its characters, the last one marked as the end."""
    return [*word[:-1], word[-1] + WORD_END]


def merge(symbols: list[str], pair: Pair) -> list[str]:
    """`symbols` with each neighbouring `pair`, from the left, made one symbol."""
    merged, i = [], 0
    while i < len(symbols):
        hit = tuple(symbols[i : i + 2]) == pair
        merged.append(symbols[i] + symbols[i + 1] if hit else symbols[i])
        i += 2 if hit else 1
    return merged


def apply_merges(word: str, ranks: dict[Pair, int]) -> list[str]:
    """A word's symbols after all merges that apply, the lowest rank first."""
    symbols = spell(word)
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        symbols = merge(symbols, best)
    return symbols


def learn_merges(words: dict[str, int], count: int) -> list[Pair]:
    """Merges of the most frequent neighbours in `words` (word -> frequency), until they make `count` tokens
    or no pair occurs twice. Ties go to the pair that sorts first, so the result is deterministic."""
    frequencies, spelled = list(words.values()), [spell(word) for word in words]
    totals: Counter[Pair] = Counter()
    places: dict[Pair, set[int]] = defaultdict(set)  # pair -> the words that have (or had) it
    for i, symbols in enumerate(spelled):
        for pair in pairwise(symbols):
            totals[pair] += frequencies[i]
            places[pair].add(i)
    heap = [(-n, pair) for pair, n in totals.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    made: set[str] = set()
    while heap and len(made) < count:
        n, best = heapq.heappop(heap)
        if -n != totals[best]:
            continue  # its count changed since it was pushed; the entry with the new count is in the heap too
        if totals[best] < 2:
            break
        merges.append(best)
        made.add("".join(best))
        changed: set[Pair] = set()
        for i in places.pop(best):
            after = merge(spelled[i], best)
            for pair in pairwise(spelled[i]):
                totals[pair] -= frequencies[i]
                changed.add(pair)
            for pair in pairwise(after):
                totals[pair] += frequencies[i]
                changed.add(pair)
                places[pair].add(i)
            spelled[i] = after
        for pair in changed:
            heapq.heappush(heap, (-totals[pair], pair))
    return merges
