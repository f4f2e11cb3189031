"""Prompts of any length with weights, (more) [less] (word:1.3), as A1111 and lpw_stable_diffusion take them."""

import re

import torch
from torch import Tensor

from ldm.clip import TextEncoder
from ldm.tokenizer import Tokenizer

MARK = re.compile(
    r"\\(?P<literal>[()\[\]\\]?)|(?P<opened>[(\[])|:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[)\]]|[^\\()[\]:]+|:"
)
FACTORS = {"(": 1.1, "[": 1 / 1.1}
CLOSED = {")": "(", "]": "["}


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """The pieces of a prompt with their weights. A backslash makes a bracket part of the text; a bracket that is not
    closed reaches to the end."""
    pieces: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the first piece within each

    def weigh(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] *= factor

    for mark in MARK.finditer(prompt):
        text, bracket = mark[0], CLOSED.get(mark[0][-1], "")
        if mark["opened"]:
            opened[text].append(len(pieces))
        elif mark["literal"] is None and bracket and opened[bracket]:
            weigh(bracket, float(mark["weight"]) if mark["weight"] else FACTORS[bracket])
        else:
            pieces.append(text if mark["literal"] is None else mark["literal"])
            weights.append(1.0)
    for bracket, factor in FACTORS.items():
        while opened[bracket]:
            weigh(bracket, factor)
    return list(zip(pieces, weights, strict=True))


@torch.no_grad()
def encode_weighted(tokenizer: Tokenizer, encoder: TextEncoder, *prompts: list[str]) -> list[Tensor]:
    """Lists of prompts -> a context (B, N * L, D) each, all of the N chunks that the longest prompt needs.

    Each chunk is encoded on its own, between a start and an end. The context of a token is multiplied by its weight,
    and the whole of a prompt scaled back to the mean that it had.
    """
    room = tokenizer.context_length - 2
    tokens = [[_tokens(tokenizer, text) for text in texts] for texts in prompts]
    count = max(-(-len(ids) // room) for rows in tokens for ids, _ in rows) or 1
    contexts = []
    for rows in tokens:
        chunks, scales = [], []
        for ids, weights in rows:
            for start in range(0, count * room, room):
                part = [tokenizer.bos_token_id, *ids[start : start + room], tokenizer.eos_token_id]
                chunks.append(part + [tokenizer.pad_token_id] * (room + 2 - len(part)))
                scales += ([1.0, *weights[start : start + room]] + [1.0] * room)[: room + 1] + [1.0]
        z = encoder(torch.tensor(chunks, device=next(encoder.parameters()).device))
        z = z.reshape(len(rows), count * (room + 2), -1)
        weighted = z * torch.tensor(scales).to(z).view(*z.shape[:2], 1)
        contexts.append(weighted * (z.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True)))
    return contexts


def _tokens(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], list[float]]:
    pieces = [(tokenizer.encode(text)[1:-1], weight) for text, weight in parse_weights(prompt)]
    return [i for ids, _ in pieces for i in ids], [weight for ids, weight in pieces for _ in ids]
