"""The tokenizer against transformers' CLIPTokenizer: trained, saved and loaded, on texts of every kind."""

import json
import random
import shutil
import warnings
from collections import Counter
from itertools import pairwise

import pytest

from ldm.config import UserError
from ldm.tokenizer import END, START, Tokenizer

WORDS = ["a", "small", "large", "red", "green", "blue", "circle", "square", "triangle"]
WORDS += ["above", "below", "left", "of", "the", "two", "three", "it's", "don't"]
TEXTS = [
    "",
    " ",
    "a small red circle above the blue square",
    "Two LARGE triangles, it's 3D; don't, we've, 12345 I'LL",
    "naïve café, na\u0131\u0307ve cafe\u0301 ﬁ ß ẞ ǅ ΑΣ ΣΑΣ İstanbul",
    "日本語のテキスト 한국어 中文",
    "مرحبا بالعالم שלום",
    "😀 👨‍👩‍👧‍👦 🇩🇪 👍🏽",
    "\0 a\0b \x1c \x7f \u200b",
    "tabs\tand\r\nlines\u3000and\u00a0spaces\u0085end",
    "!!! ?! a!b don''t 's's",
    "<|endoftext|> x <|startoftext|>y <|ENDOFTEXT|>!! !<|startoftext|>!",
    "</w> a</w>b ½ ² ٣ Ⅷ",
    "unseenwordsarespelledout " * 3,
]


def captions() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=8)) for _ in range(400)] + TEXTS[:-1] * 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(captions(), vocab_size=640, context_length=32)


def assert_same(ours: Tokenizer, theirs, texts: list[str]) -> None:
    """Equal ids for each text: whole, and cut or padded."""
    for text in texts:
        assert ours.encode(text) == theirs(text).input_ids, repr(text)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=ours.context_length)
    assert ours(texts, warn=False).tolist() == expected.input_ids


def test_equals_transformers(tokenizer, tmp_path):
    """On captions, texts of every kind and random strings of many scripts."""
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(tokenizer) == 640 and theirs.model_max_length == 32
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.vocab == tokenizer.vocab and again.merges == tokenizer.merges
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(tokenizer, name) == getattr(theirs, name)
    rng = random.Random(1)
    blocks = [range(0x250), range(0x370, 0x500), range(0x5D0, 0x5EB), range(0x3041, 0x3097), range(0x1F600, 0x1F640)]
    pool = [chr(c) for block in blocks for c in block if chr(c).isprintable() or c < 0xA1]
    pool += ["<|endoftext|>", "<|STARTOFTEXT|>", "'s", "'ll", " ", "circle"] * 20
    texts = ["".join(rng.choices(pool, k=rng.randrange(20))) for _ in range(500)]
    assert_same(tokenizer, theirs, TEXTS + captions()[:50] + texts)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a?b")  # a lone surrogate, as in a broken file name


def named(pad_token: str) -> dict:
    """The named tokens as the Stable Diffusion folders have them."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {"bos_token": flags | {"content": START}, "eos_token": flags | {"content": END}}
    return tokens | {"unk_token": flags | {"content": END}, "pad_token": pad_token}


@pytest.mark.parametrize("pad_token", [END, "!"])
def test_stable_diffusion_folders(tokenizer, tmp_path, pad_token):
    """SD 1.x pads with the end token, SD 2.x with "!", which only special_tokens_map.json says; the files here, theirs
    of today (tokenizer.json), with and without a config."""
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = {k: {"__type": "AddedToken"} | v for k, v in named(END).items() if isinstance(v, dict)}
    config |= {"pad_token": END, "model_max_length": 32, "do_lower_case": True, "errors": "replace"}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer/special_tokens_map.json").write_text(json.dumps(named(pad_token)))
    Tokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    CLIPTokenizer.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "theirs")
    shutil.copytree(tmp_path / "theirs", tmp_path / "alone")
    (tmp_path / "alone" / "tokenizer_config.json").unlink()
    shutil.copytree(tmp_path / "theirs", tmp_path / "older")
    table = json.loads((tmp_path / "older" / "tokenizer.json").read_text())
    table["model"]["merges"] = [" ".join(pair) for pair in table["model"]["merges"]]  # before tokenizers 0.20
    (tmp_path / "older" / "tokenizer.json").write_text(json.dumps(table))
    assert not (tmp_path / "theirs" / "vocab.json").exists()
    for name in ("tokenizer", "again", "theirs", "alone", "older"):
        ours, theirs = Tokenizer.from_pretrained(tmp_path / name), CLIPTokenizer.from_pretrained(tmp_path / name)
        assert (ours.context_length, ours.pad_token) == ((77, END) if name == "alone" else (32, pad_token))
        assert_same(ours, theirs, TEXTS)


def test_added_tokens(tokenizer, tmp_path):
    """Tokens that textual inversion adds are found in the text."""
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 640}))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert 640 in ours.encode("a <Cat-Toy> circle") and len(ours) == 641
    assert_same(ours, CLIPTokenizer.from_pretrained(tmp_path), ["a <cat-toy> circle", "<CAT-TOY>!"])
    merges = tmp_path / "merges.txt"  # with line ends as on Windows
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_pretrained(tmp_path).merges == ours.merges


def test_what_is_cut_is_named(tokenizer):
    text = "circle " * 30 + "Green square"
    with pytest.warns(UserWarning, match="too long \\(30 tokens at most\\); ignored: 'Green square'"):
        tokens = tokenizer([text])
    assert tokens[0, 0] == tokenizer.bos_token_id and tokens[0, -1] == tokenizer.eos_token_id
    assert tokens[0].tolist() == tokenizer.encode("circle " * 30)
    with pytest.warns(UserWarning, match="ignored: 'greensquare'$"):  # a whole word, of which a part was read
        tokenizer(["circle " * 29 + "greensquare"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([text], warn=False)
        tokenizer(["circle " * 30])  # fits exactly


def test_training_is_byte_pair_encoding():
    rng = random.Random(0)
    words = ["".join(rng.choices("abc", k=rng.randrange(1, 9))) for _ in range(400)] + ["aaaa"] * 7 + ["aaaaaaa"] * 3
    merges = Tokenizer.train(words, 560).merges
    pairs = Counter(pair for word in words for pair in pairwise([*word[:-1], word[-1] + "</w>"]))
    assert len(merges) == 46 and pairs[merges[0]] == max(pairs.values())
    again = Tokenizer.train(words[::-1], 560)  # the library alone numbers suffixed tokens in an order that varies
    assert again.merges == merges and again.vocab == Tokenizer.train(words, 560).vocab


def test_small_vocabularies():
    assert len(Tokenizer.train(["ab cd"], vocab_size=4000)) == 514  # nothing occurs twice
    assert len(Tokenizer.train(["circle"] * 5, vocab_size=516)) == 516
    with pytest.raises(UserError, match="vocab_size is 513; it must be at least 514"):
        Tokenizer.train(["ab"], vocab_size=513)
    with pytest.raises(UserError, match="context_length is 2"):
        Tokenizer.train(["ab"], vocab_size=514, context_length=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", None, "missing or broken .*vocab & merges"),
        ("merges.txt", None, "missing or broken .*vocab & merges"),
        ("vocab.json", "{}", "broken|has no token"),
        ("merges.txt", "#version: 0.2\nnever seen\n", "broken .*out of vocabulary"),
        ("tokenizer.json", '{"model": {"vocab": {}, "merges": 5}}', "broken"),
        ("tokenizer.json", '{"model": {"vocab": {}, "merges": [], "end_of_word_suffix": null}}', "no CLIP tokenizer"),
        ("special_tokens_map.json", '{"bos_token": "<s>"}', "other ends of a text"),
        ("tokenizer_config.json", '{"model_max_length": [3], "added_tokens_decoder": {}}', "broken"),
        ("tokenizer_config.json", '{"model_max_length": 2}', "context_length is 2"),
    ],
)
def test_broken_folders_are_explained(tokenizer, tmp_path, name, content, message):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
