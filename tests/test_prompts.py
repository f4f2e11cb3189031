"""Prompts with weights, against the rules of A1111 and diffusers' lpw_stable_diffusion, and longer than the context."""

import pytest
import torch
from tiny_models import tiny_parts

from ldm.prompts import encode_weighted, parse_weights

PARSED = {
    "an (important) [small] word": {"an ": 1, "important": 1.1, " ": 1, "small": 1 / 1.1, " word": 1},
    "((a)(b:1.5)) c": {"a": 1.1**2, "b": 1.5 * 1.1, " c": 1},
    r"\(a\] \\ b\c": {"(a] \\ bc": 1},
    "a) b] c: (d:e) (f :.5": {"a) b] c: ": 1, "d:e": 1.1, " ": 1, "f :.5": 1.1},
    "[(a] b)": {"a": 1, " b": 1.1},
    "(a [b": {"a ": 1.1, "b": 1},
    "": {},
}


@pytest.mark.parametrize("prompt", PARSED)
def test_brackets_are_read_as_a1111_reads_them(prompt):
    letters = [(letter, weight) for text, weight in parse_weights(prompt) for letter in text]
    expected = [(letter, weight) for text, weight in PARSED[prompt].items() for letter in text]
    assert [letter for letter, _ in letters] == [letter for letter, _ in expected]
    assert [weight for _, weight in letters] == pytest.approx([weight for _, weight in expected])


@torch.no_grad()
def test_contexts():
    parts = tiny_parts()
    tokenizer, encoder = parts.tokenizer, parts.text_encoder
    length = tokenizer.context_length

    def encode(*texts):
        return encoder(tokenizer(list(texts)))

    plain, weighted = encode_weighted(tokenizer, encoder, ["a red circle", ""], ["a (red:1.5) circle"])
    assert torch.allclose(plain, encode("a red circle", ""), atol=1e-6)
    # the word's tokens are multiplied, and all scaled to the same mean
    start, end = (len(tokenizer.encode(text)) - 1 for text in ("a", "a red"))
    scaled = plain[:1].clone()
    scaled[:, start:end] *= 1.5
    assert torch.allclose(weighted, scaled * plain[0].mean() / scaled.mean(), atol=1e-5)
    # a long prompt in chunks, each between a start and an end, and its negative as long
    words = "red circle " * length
    ids, room = tokenizer.encode(words)[1:-1], length - 2
    long, negative = encode_weighted(tokenizer, encoder, [words], ["blue"])
    count = -(-len(ids) // room)
    assert long.shape[1] == negative.shape[1] == count * length and count > 1
    chunk = torch.tensor([[tokenizer.bos_token_id, *ids[room : 2 * room], tokenizer.eos_token_id]])
    assert torch.allclose(long[:, length : 2 * length], encoder(chunk), atol=1e-5)
    assert torch.allclose(negative[:, length : 2 * length], encode(""), atol=1e-5)
