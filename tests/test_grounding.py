"""The readers of the text context: closed forms, what they may see, and whom their losses move."""

from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F

from ldm import grounding
from ldm.clip import CLIP, TextConfig, VisionConfig
from ldm.config import UserError
from ldm.data import stack_images
from ldm.grounding import GroundingConfig, PictureReader, WordReader
from ldm.tasks.clip import CLIPTask
from ldm.train import train

END = 6
TEXT = TextConfig(**tiny.TOWER, vocab_size=7, eos_token_id=END, max_position_embeddings=5, projection_dim=16)
VISION = VisionConfig(**tiny.TOWER, image_size=32, patch_size=8, projection_dim=16)
TOKENS = torch.tensor([[5, 0, 1, END, END], [5, 2, END, END, END]])
BOTH = GroundingConfig(words=1.0, picture=10.0, window=3, layers=1)


def task_with_readers(**changes) -> CLIPTask:
    return CLIPTask(replace(tiny.clip(), grounding=replace(BOTH, **changes)))


def test_words_are_the_cross_entropy_of_each_token_and_those_before_it():
    torch.manual_seed(0)
    reader, context = WordReader(TEXT, 3), torch.randn(2, 5, 32)
    maps = reader.distances.weight.view(3, 32, 32)
    found = []
    for k in range(3):
        for row, length in enumerate((4, 3)):  # with the first end token, without the padding
            for at in range(k, length):
                logits = (maps[k] @ context[row, at]) @ reader.words.weight.T
                found.append(F.cross_entropy(logits, TOKENS[row, at - k]))
    total = torch.stack(found).mean()
    torch.testing.assert_close(reader(context, TOKENS), total)
    context[0, 4] = context[1, 3:] = 1e3  # padding, which says nothing
    torch.testing.assert_close(reader(context, TOKENS), total)


def test_words_can_be_told_from_a_context_that_holds_them():
    reader = WordReader(replace(TEXT, hidden_size=21, num_attention_heads=1), 3)
    held = [F.pad(F.one_hot(TOKENS, 7).float(), (0, 0, k, 0))[:, :5] for k in range(3)]  # of k tokens before
    with torch.no_grad():
        reader.words.weight.copy_(30 * torch.eye(7, 21))
        for k, weight in enumerate(reader.distances.weight.view(3, 21, 21)):
            weight.copy_(F.pad(torch.eye(7), (7 * k, 14 - 7 * k, 0, 14)))
    assert reader(torch.cat(held, dim=-1), TOKENS) < 1e-6
    assert reader(torch.cat(held[::-1], dim=-1), TOKENS) > 5


def test_window_longer_than_the_context():
    assert torch.isfinite(WordReader(TEXT, 9)(torch.randn(2, 5, 32), TOKENS))


def test_picture_is_the_squared_error_of_what_is_hidden(monkeypatch):
    torch.manual_seed(0)
    reader, context, x = PictureReader(TEXT, VISION, 1), torch.randn(4, 5, 32), torch.rand(4, 3, 32, 32)
    torch.nn.init.zeros_(reader.paint.weight), torch.nn.init.zeros_(reader.paint.bias)
    monkeypatch.setattr(grounding, "BLIND", 1.0)
    torch.testing.assert_close(reader(context, x), x.square().mean())
    monkeypatch.setattr(grounding, "BLIND", 0.0)
    drawn = [reader(context, torch.ones_like(x)) for _ in range(3)]
    torch.testing.assert_close(torch.stack(drawn), torch.ones(3))  # a mean over hidden patches, however many
    assert reader(context, x) != reader(context, x)  # others are hidden


def test_picture_reader_sees_what_is_shown_and_the_context_but_nothing_hidden(monkeypatch):
    torch.manual_seed(0)
    reader, context, x = PictureReader(TEXT, VISION, 1), torch.randn(1, 5, 32), torch.rand(1, 3, 32, 32)
    painted, shown = [], torch.zeros(1, 16)
    shown[0, 0] = 1  # the upper left patch
    reader.paint.register_forward_hook(lambda module, inputs, output: painted.append(output))
    monkeypatch.setattr(grounding, "BLIND", 0.0)
    monkeypatch.setattr("ldm.grounding.torch.rand", lambda *shape: 1 - shown if shape == ((1, 16),) else shown[:, :1])
    for picture, words in ((x, context), (x.clone(), context), (x.clone(), context), (x, -context)):
        if len(painted) == 1:
            picture[..., 8:, :] = 0  # hidden
        if len(painted) == 2:
            picture[..., :8, :8] = 0  # shown
        reader(words, picture)
    assert torch.equal(painted[0], painted[1])
    assert not torch.allclose(painted[0], painted[2], atol=1e-4)
    assert not torch.allclose(painted[0], painted[3], atol=1e-4)


@pytest.mark.parametrize("name", ["words", "picture"])
def test_readers_move_the_text_tower_alone(name):
    task = task_with_readers(**{"words": 0.0, "picture": 0.0} | {name: 1.0})
    batch = stack_images(tiny.samples(4))
    torch.manual_seed(0)
    _, loss, values = next(task.losses(task.modules, batch, step=0))
    assert values.keys() == {"scale", "contrastive", name}
    torch.testing.assert_close(loss, values["contrastive"] + values[name])
    values[name].backward()
    clip: CLIP = task.modules["clip"]
    assert all(p.grad is not None for p in clip.text_model.parameters())
    others = (clip.vision_model, clip.visual_projection, clip.text_projection)
    assert all(p.grad is None for module in others for p in module.parameters())
    assert all(p.grad is not None for p in task.modules["grounding"].parameters())


def test_weights_scale_the_losses():
    losses = []
    for words, picture in ((1.0, 10.0), (3.0, 40.0)):
        task = task_with_readers(words=words, picture=picture)
        torch.manual_seed(0)
        _, loss, values = next(task.losses(task.modules, stack_images(tiny.samples(4)), step=0))
        torch.testing.assert_close(loss, values["contrastive"] + words * values["words"] + picture * values["picture"])
        losses.append(loss)
    assert losses[0] < losses[1]


def test_readers_overfit_a_batch_and_are_not_in_the_folder(tmp_path):
    torch.manual_seed(0)
    task = task_with_readers()
    first = None
    batch = stack_images([s | {"captions": s["captions"][:1]} for s in tiny.samples(4)])
    modules = list(task.modules.values())
    optimizer = torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=3e-3)
    for step in range(60):
        _, loss, values = next(task.losses(task.modules, batch, step))
        first = first or {name: values[name].item() for name in ("words", "picture")}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values["words"] < 0.2 * first["words"]
    assert values["picture"] < 0.5 * first["picture"]
    task.export(tmp_path, torch.device("cpu"), final=True)
    assert CLIP.from_pretrained(tmp_path).text_config == task.modules["clip"].text_config  # strict: nothing more


def test_resumed_run_has_the_readers_too(tmp_path):
    config = replace(tiny.TRAIN, steps=4, save_every=2)
    whole, parts = task_with_readers(), task_with_readers()
    train(whole, config, tmp_path / "whole", {})
    parts.after_step = iter([None, None]).__next__  # a third step ends it
    with pytest.raises(StopIteration):
        train(parts, config, tmp_path / "parts", {})
    again = task_with_readers()
    train(again, config, tmp_path / "parts", {})
    for name in ("clip", "grounding"):
        assert tiny.same(whole.modules[name].state_dict(), again.modules[name].state_dict())


@pytest.mark.parametrize("values", [{"words": -1.0}, {"picture": -0.1}, {"window": 0}, {"layers": 0}])
def test_bad_values_are_named(values):
    (name,) = values
    with pytest.raises(UserError, match=f"grounding.{name}"):
        GroundingConfig(**values)
