"""The auxiliary heads on the text context: a closed form, and whom their losses move. Values: test_golden.py."""

from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F

from ldm.clip import TextConfig
from ldm.data import stack
from ldm.train.auxiliary import WordHead
from ldm.train.clip import CLIPTask

END, PAD = 6, 0
TEXT = TextConfig(**tiny.TOWER, vocab_size=7, eos_token_id=END, max_position_embeddings=5, projection_dim=16)
TOKENS = torch.tensor([[5, 0, 1, END, END], [5, 2, END, PAD, PAD]])


def loss(sums: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mean, of the sum of the terms and their number."""
    return sums[0] / sums[1]


@pytest.mark.parametrize("window", [3, 9])
def test_words_are_the_cross_entropy_of_each_token_and_those_before_it(window):
    head, context = WordHead(TEXT, window), torch.randn(2, 5, 32)
    maps, expected = head.distances.weight.view(window, 32, 32), []
    for row, length in enumerate((4, 3)):  # with the first end token, without the padding
        for at in range(length):
            for k in range(min(window, at + 1)):
                logits = (maps[k] @ context[row, at]) @ head.vocabulary.T
                expected.append(F.cross_entropy(logits, TOKENS[row, at - k]))
    torch.testing.assert_close(loss(head(context, TOKENS)), torch.stack(expected).mean())
    context[0, 4] = context[1, 3:] = 1e3  # padding
    torch.testing.assert_close(loss(head(context, TOKENS)), torch.stack(expected).mean())


@pytest.mark.parametrize("name", ["words", "picture"])
def test_heads_move_the_text_tower_alone_and_are_not_exported(name, tmp_path):
    weights = {"words": 0.0, "picture": 0.0} | {name: 3.0}
    task = CLIPTask(tiny.clip(grounding=replace(tiny.READERS, **weights)))
    _, total, values = next(task.losses(task.modules, stack(tiny.samples(4)), 0, tiny.draws()))
    assert values.keys() == {"scale", "contrastive", name}
    torch.testing.assert_close(total, values["contrastive"] + 3 * values[name])
    values[name].backward()
    clip = task.modules["clip"]
    assert all(p.grad is not None for p in clip.text_model.parameters())
    others = (clip.vision_model, clip.visual_projection, clip.text_projection)
    assert all(p.grad is None for module in others for p in module.parameters())
    assert all(p.grad is not None for p in task.modules["grounding"].parameters())
    with torch.no_grad():
        validated = task.validate(task.modules)
    assert validated.keys() & weights.keys() == {name} and 0 < validated[name] < 9
    task.export(task.modules, tmp_path, final=True)
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "text_encoder", "tokenizer"}
