"""CLIP against transformers on copied random weights, and its folders opened by both sides."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import assert_same_gradients, open_cleanly, randomize

from ldm.clip import CLIP, TextConfig, TextEncoder, VisionConfig
from ldm.config import UserError

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "projection_dim": 12}
TOKENS = torch.tensor([[1, 7, 8, 59, 59, 59], [1, 59, 0, 0, 0, 0], [1, 5, 6, 7, 8, 59]])


def text_config(**changes) -> TextConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 59}
    sizes = SIZES | {"vocab_size": 60, "num_attention_heads": 3, "max_position_embeddings": 6}
    return TextConfig(**sizes | ids | changes)


def vision_config(**changes) -> VisionConfig:
    return VisionConfig(**{"image_size": 16, "patch_size": 4, "num_attention_heads": 2} | SIZES | changes)


def images(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [59, 2, 7])
def test_text_encoder_equals_transformers(tmp_path, hidden_act, eos_token_id):
    from transformers import CLIPTextModel

    encoder = randomize(TextEncoder(text_config(hidden_act=hidden_act, eos_token_id=eos_token_id)))
    encoder.save_pretrained(tmp_path)
    theirs = open_cleanly(CLIPTextModel, tmp_path)
    expected, context = theirs(TOKENS), encoder(TOKENS)
    pooled = encoder.text_model.pooled(context, TOKENS)
    close(context, expected.last_hidden_state)
    close(pooled, expected.pooler_output)
    (context.square().mean() + pooled.square().sum()).backward()
    (expected.last_hidden_state.square().mean() + expected.pooler_output.square().sum()).backward()
    assert_same_gradients(encoder.text_model, getattr(theirs, "text_model", theirs))


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(tmp_path, hidden_act):
    from transformers import CLIPModel

    clip = randomize(CLIP(text_config(), vision_config(hidden_size=16, hidden_act=hidden_act)))
    clip.save_pretrained(tmp_path)
    theirs = open_cleanly(CLIPModel, tmp_path)
    expected = theirs(input_ids=TOKENS, pixel_values=images())
    image, text, scale, context = clip(images(), TOKENS)
    close(image, expected.image_embeds)
    close(text, expected.text_embeds)
    close(context, expected.text_model_output.last_hidden_state)
    close(scale * image @ text.T, expected.logits_per_image)
    F.cross_entropy(scale * image @ text.T, torch.arange(3)).backward()
    F.cross_entropy(expected.logits_per_image, torch.arange(3)).backward()
    assert_same_gradients(clip, theirs)


def test_a_broken_processor_config_is_one_line(tmp_path):
    CLIP(text_config(), vision_config()).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": ["a", "b", "c"]}')
    with pytest.raises(UserError, match="image_mean.* is 'a'; it must be float"):
        CLIP.from_pretrained(tmp_path)


def test_folder_written_by_transformers_opens_here(tmp_path):
    from transformers import CLIPConfig as TheirConfig
    from transformers import CLIPImageProcessor, CLIPModel

    sizes = {"text_config": asdict(text_config(projection_dim=5)), "vision_config": asdict(vision_config())}
    theirs = randomize(CLIPModel(TheirConfig(**sizes, projection_dim=20))).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="preprocessor_config.json"):
        CLIP.from_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)  # OpenAI's mean and deviation
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    values = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    clip = CLIP.from_pretrained(tmp_path)
    image = clip.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
    expected = theirs(input_ids=TOKENS, pixel_values=values)
    close(image, expected.image_embeds)
    close(clip.encode_text(TOKENS), expected.text_embeds)
    close(TextEncoder.from_pretrained(tmp_path)(TOKENS), expected.text_model_output.last_hidden_state)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_folders_of_every_age(tmp_path, prefix):
    encoder = randomize(TextEncoder(text_config()))
    encoder.save_pretrained(tmp_path)
    tensors = {prefix + name.removeprefix("text_model."): t for name, t in encoder.state_dict().items()}
    tensors[prefix + "embeddings.position_ids"] = torch.arange(6)[None]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(TextEncoder.from_pretrained(tmp_path)(TOKENS), encoder(TOKENS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act.*relu.*quick_gelu"),
        ({"num_hidden_layers": 3}, "do not fit its config"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be 1 or more"),
        ({"num_attention_heads": 5}, "multiple of num_attention_heads 5"),
        ({"hidden_size": "24"}, "hidden_size.*int"),
        ({"model_type": "t5"}, "'t5' model"),
        ({"model_type": "clip", "text_config": None}, "TextConfig is None"),
    ],
)
def test_config_values_that_are_not_supported_are_named(tmp_path, change, message):
    TextEncoder(text_config()).save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | change))
    with pytest.raises(UserError, match=message):
        TextEncoder.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="projection_dim is 12 for text and 8 for images"):
        CLIP(text_config(), vision_config(projection_dim=8))


def test_configs_of_transformers_are_read_whole():
    from transformers import CLIPTextConfig, CLIPVisionConfig

    for ours, theirs in ((TextConfig(), CLIPTextConfig()), (VisionConfig(), CLIPVisionConfig())):
        assert {name: value for name, value in theirs.to_dict().items() if hasattr(ours, name)} == asdict(ours)


def test_initialization_is_clips():
    torch.manual_seed(0)
    config = text_config(hidden_size=96, intermediate_size=384, num_hidden_layers=4)
    clip = CLIP(config, vision_config())
    layer = clip.text_model.encoder.layers[1]
    for weight, std in (
        (layer.self_attn.q_proj.weight, 96**-0.5),
        (layer.self_attn.out_proj.weight, (96 * 2 * 4) ** -0.5),
        (layer.mlp.fc1.weight, (2 * 96) ** -0.5),
        (layer.mlp.fc2.weight, (96 * 2 * 4) ** -0.5),
        (clip.text_model.embeddings.token_embedding.weight, 0.02),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
