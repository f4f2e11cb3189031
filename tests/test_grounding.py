"""The readers of the text context: closed forms, what they may see, and whom their losses move."""

from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F

from ldm.clip import CLIP, TextConfig, VisionConfig
from ldm.config import UserError
from ldm.data import stack_images
from ldm.train import readers as grounding
from ldm.train.clip import CLIPTask
from ldm.train.loop import train
from ldm.train.readers import GroundingConfig, PictureReader, WordReader

END, PAD = 6, 0
TEXT = TextConfig(**tiny.TOWER, vocab_size=7, eos_token_id=END, max_position_embeddings=5, projection_dim=16)
VISION = VisionConfig(**tiny.TOWER, image_size=32, patch_size=8, projection_dim=16)
TOKENS = torch.tensor([[5, 0, 1, END, END], [5, 2, END, PAD, PAD]])


def task_with_readers(**changes) -> CLIPTask:
    return CLIPTask(tiny.clip(grounding=replace(tiny.READERS, **changes)))


@pytest.mark.parametrize("window", [3, 9])
def test_words_are_the_cross_entropy_of_each_token_and_those_before_it(window):
    torch.manual_seed(0)
    reader, context = WordReader(TEXT, window), torch.randn(2, 5, 32)
    maps = reader.distances.weight.view(window, 32, 32)
    found = []
    for row, length in enumerate((4, 3)):  # with the first end token, without the padding
        for at in range(length):
            for k in range(min(window, at + 1)):
                logits = (maps[k] @ context[row, at]) @ reader.vocabulary.T
                found.append(F.cross_entropy(logits, TOKENS[row, at - k]))
    torch.testing.assert_close(reader(context, TOKENS), torch.stack(found).mean())
    context[0, 4] = context[1, 3:] = 1e3  # padding, which says nothing
    torch.testing.assert_close(reader(context, TOKENS), torch.stack(found).mean())


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
    painted, chances = [], torch.ones(1, 16)
    chances[0, 0] = 0  # the upper left patch is shown
    reader.paint.register_forward_hook(lambda module, inputs, output: painted.append(output))
    monkeypatch.setattr(grounding, "BLIND", 0.0)
    monkeypatch.setattr("ldm.train.readers.torch.rand", lambda *s: chances if s == ((1, 16),) else torch.ones(1, 1))
    without_hidden, without_shown = x.clone(), x.clone()
    without_hidden[..., 8:, :] = 0
    without_shown[..., :8, :8] = 0
    for words, picture in ((context, x), (context, without_hidden), (context, without_shown), (-context, x)):
        reader(words, picture)
    assert torch.equal(painted[0], painted[1])
    assert not torch.allclose(painted[0], painted[2], atol=1e-4)
    assert not torch.allclose(painted[0], painted[3], atol=1e-4)


@pytest.mark.parametrize("name", ["words", "picture"])
def test_readers_move_the_text_tower_alone(name):
    task = task_with_readers(**{"words": 0.0, "picture": 0.0} | {name: 3.0})
    torch.manual_seed(0)
    _, loss, values = next(task.losses(task.modules, stack_images(tiny.samples(4)), step=0))
    assert values.keys() == {"scale", "contrastive", name}
    torch.testing.assert_close(loss, values["contrastive"] + 3 * values[name])
    values[name].backward()
    clip: CLIP = task.modules["clip"]
    assert all(p.grad is not None for p in clip.text_model.parameters())
    others = (clip.vision_model, clip.visual_projection, clip.text_projection)
    assert all(p.grad is None for module in others for p in module.parameters())
    assert all(p.grad is not None for p in task.modules["grounding"].parameters())


def test_readers_overfit_a_batch_by_its_captions_and_are_not_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(grounding, "BLIND", 1.0)
    torch.manual_seed(0)
    task, batch = task_with_readers(), stack_images(tiny.samples(4, captions=1))
    tokens = task.tokenizer([c[0] for c in batch["captions"]], warn=False)
    x = batch["image"] / 127.5 - 1
    optimizer = torch.optim.AdamW([p for m in task.modules.values() for p in m.parameters()], lr=3e-3)
    for step in range(100):
        _, loss, values = next(task.losses(task.modules, batch, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values["words"] < 0.3
    with torch.no_grad():
        context = task.modules["clip"].text_model(tokens)
        right, exchanged = (task.modules["grounding"].picture(c, x) for c in (context, context.roll(1, 0)))
    assert right < 0.5 * exchanged
    task.export(tmp_path, torch.device("cpu"), final=True)
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "text_encoder", "tokenizer"}


def test_resumed_run_has_the_readers_too(tmp_path):
    config = replace(tiny.TRAIN, steps=4, save_every=2, validate_every=4)
    whole, parts = task_with_readers(), task_with_readers()
    train(whole, config, tmp_path / "whole", {})
    parts.after_step = iter([None, None]).__next__  # a third step ends it
    with pytest.raises(StopIteration):
        train(parts, config, tmp_path / "parts", {})
    again = task_with_readers()
    train(again, config, tmp_path / "parts", {})
    for name in ("clip", "grounding"):
        assert tiny.same(whole.modules[name].state_dict(), again.modules[name].state_dict())
    logged = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert '"val/words"' in logged and '"val/picture"' in logged and '"skipped": 0' in logged


@pytest.mark.parametrize("values", [{"words": -1.0}, {"picture": -0.1}, {"window": 0}, {"layers": 0}])
def test_bad_values_are_named(values):
    (name,) = values
    with pytest.raises(UserError, match=f"grounding.{name}"):
        GroundingConfig(**values)
