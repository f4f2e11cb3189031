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

from ldm.clip import CLIP, ImageEncoder, TextConfig, TextEncoder, VisionConfig
from ldm.config import UserError

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "projection_dim": 12}
TOKENS = torch.tensor([[1, 7, 8, 59, 59, 59], [1, 59, 0, 0, 0, 0], [1, 5, 6, 7, 8, 59]])


def text_config(**changes) -> TextConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 59}
    return TextConfig(
        **{"vocab_size": 60, "num_attention_heads": 3, "max_position_embeddings": 6} | SIZES | ids | changes
    )


def vision_config(**changes) -> VisionConfig:
    return VisionConfig(**{"image_size": 16, "patch_size": 4, "num_attention_heads": 2} | SIZES | changes)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, also those that start at 0 or 1, so that none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def images(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(1)) * 2 - 1


def open_cleanly(cls: type, folder) -> torch.nn.Module:
    """The model in transformers, which must neither miss nor find too many weights."""
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [59, 2, 7])
def test_text_encoder_equals_transformers(tmp_path, hidden_act, eos_token_id):
    from transformers import CLIPTextModel

    encoder = randomize(TextEncoder(text_config(hidden_act=hidden_act, eos_token_id=eos_token_id)))
    encoder.save_pretrained(tmp_path)
    theirs = open_cleanly(CLIPTextModel, tmp_path)
    expected = theirs(TOKENS)
    context = encoder(TOKENS)
    pooled = encoder.text_model.pooled(context, TOKENS)
    torch.testing.assert_close(context, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=0)
    (context.square().mean() + pooled.sum()).backward()
    (expected.last_hidden_state.square().mean() + expected.pooler_output.sum()).backward()
    reference = {"text_model." + name.removeprefix("text_model."): g for name, g in gradients(theirs).items()}
    assert reference.keys() == gradients(encoder).keys()
    for name, gradient in gradients(encoder).items():
        torch.testing.assert_close(gradient, reference[name], atol=1e-4, rtol=1e-4, msg=name)


def test_text_encoder_is_causal():
    encoder = randomize(TextEncoder(text_config()))
    changed = TOKENS.clone()
    changed[:, 3:] = 20
    before, after = encoder(TOKENS), encoder(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().max() > 1e-2


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_image_encoder_equals_transformers(hidden_act):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    encoder = randomize(ImageEncoder(vision_config(hidden_act=hidden_act)))
    theirs = CLIPVisionModel(CLIPVisionConfig(**encoder.config.to_dict())).eval()
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    pooled, expected = encoder(images()), theirs(images()).pooler_output
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)
    pooled.square().sum().backward()
    expected.square().sum().backward()
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(encoder)[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_clip_opens_whole_in_transformers(tmp_path):
    from transformers import CLIPModel

    clip = randomize(CLIP(text_config(), vision_config(hidden_size=16)))
    clip.save_pretrained(tmp_path)
    theirs = open_cleanly(CLIPModel, tmp_path)
    expected = theirs(input_ids=TOKENS, pixel_values=images())
    image, text, scale, context = clip(images(), TOKENS)
    torch.testing.assert_close(image, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, expected.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(context, expected.text_model_output.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(scale * image @ text.T, expected.logits_per_image, atol=1e-4, rtol=0)
    F.cross_entropy(scale * image @ text.T, torch.arange(3)).backward()
    F.cross_entropy(expected.logits_per_image, torch.arange(3)).backward()
    assert gradients(clip).keys() == gradients(theirs).keys()
    for name, gradient in gradients(theirs).items():
        torch.testing.assert_close(gradients(clip)[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_processor_config_gives_our_input(tmp_path):
    from transformers import CLIPImageProcessor

    CLIP(text_config(), vision_config()).save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    x = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(x, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, atol=1e-5, rtol=0)
    wide = processor(Image.new("RGB", (50, 20)), return_tensors="pt").pixel_values
    assert wide.shape == (1, 3, 16, 16)


def test_folder_written_by_transformers_opens_here(tmp_path):
    from transformers import CLIPConfig as TheirConfig
    from transformers import CLIPImageProcessor, CLIPModel

    sizes = {
        "text_config": text_config(projection_dim=5).to_dict(),
        "vision_config": vision_config().to_dict(),
    }
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
    torch.testing.assert_close(image, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.encode_text(TOKENS), expected.text_embeds, atol=1e-5, rtol=0)
    context = TextEncoder.from_pretrained(tmp_path)(TOKENS)
    torch.testing.assert_close(context, expected.text_model_output.last_hidden_state, atol=1e-5, rtol=0)


def test_save_and_load_are_exact(tmp_path):
    clip = randomize(CLIP(text_config(), vision_config()))
    clip.save_pretrained(tmp_path / "clip")
    clip.text_encoder().save_pretrained(tmp_path / "text_encoder")
    again = CLIP.from_pretrained(tmp_path)
    assert (again.text_config, again.vision_config) == (clip.text_config, clip.vision_config)
    assert again.state_dict().keys() == clip.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in clip.state_dict().items())
    encoder = TextEncoder.from_pretrained(tmp_path)
    assert torch.equal(encoder(TOKENS), clip.text_model(TOKENS))
    assert encoder.config == clip.text_config


@pytest.mark.parametrize("prefix", ["text_model.", ""])
@pytest.mark.parametrize("position_ids", [True, False])
def test_text_folders_of_every_age(tmp_path, prefix, position_ids):
    encoder = randomize(TextEncoder(text_config()))
    encoder.save_pretrained(tmp_path)
    tensors = {prefix + name.removeprefix("text_model."): t for name, t in encoder.state_dict().items()}
    if position_ids:
        tensors[prefix + "embeddings.position_ids"] = torch.arange(6)[None]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(TextEncoder.from_pretrained(tmp_path)(TOKENS), encoder(TOKENS))


def test_loading_is_strict(tmp_path):
    encoder = TextEncoder(text_config())
    encoder.save_pretrained(tmp_path)
    tensors = encoder.state_dict()
    name = "text_model.final_layer_norm.bias"
    for broken in (
        {k: t for k, t in tensors.items() if k != name},
        tensors | {"text_model.extra": torch.zeros(1)},
        tensors | {name: torch.zeros(25)},
    ):
        safetensors.torch.save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="do not fit"):
            TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act.*relu.*quick_gelu"),
        ({"num_hidden_layers": 3}, "do not fit its config.json"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be 1 or more"),
        ({"num_attention_heads": 5}, "multiple of num_attention_heads 5"),
        ({"hidden_size": "24"}, "hidden_size.*int"),
        ({"model_type": "t5"}, "'t5' model"),
    ],
)
def test_config_values_that_are_not_supported_are_named(tmp_path, change, message):
    TextEncoder(text_config()).save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(table | change))
    with pytest.raises(UserError, match=message):
        TextEncoder.from_pretrained(tmp_path)


def test_configs_of_transformers_are_read_whole():
    from transformers import CLIPTextConfig, CLIPVisionConfig

    for ours, theirs in ((TextConfig(), CLIPTextConfig()), (VisionConfig(), CLIPVisionConfig())):
        assert {name: value for name, value in theirs.to_dict().items() if hasattr(ours, name)} == asdict(ours)


def test_stable_diffusion_text_encoders_have_transformers_keys():
    from transformers import CLIPTextConfig, CLIPTextModel

    wide = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
    }
    for sizes in (
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        wide | {"hidden_act": "gelu"},
    ):
        with torch.device("meta"):
            ours, theirs = TextEncoder(TextConfig(**sizes)), CLIPTextModel(CLIPTextConfig(**sizes))
        shapes = {"text_model." + n.removeprefix("text_model."): p.shape for n, p in theirs.state_dict().items()}
        assert {name: p.shape for name, p in ours.state_dict().items()} == shapes


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


def test_scale_is_clamped():
    clip = CLIP(text_config(), vision_config())
    clip.clamp_scale()
    assert clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    torch.nn.init.constant_(clip.logit_scale, 9.0)
    clip.clamp_scale()
    assert clip.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-5)


def test_wrong_sizes_are_refused():
    clip = CLIP(text_config(), vision_config())
    with pytest.raises(UserError, match="16x16"):
        clip.encode_image(images(size=32))
    with pytest.raises(UserError, match="7 tokens"):
        clip.encode_text(torch.zeros((1, 7), dtype=torch.long))
    with pytest.raises(UserError, match="projection_dim"):
        CLIP(text_config(), vision_config(projection_dim=8))
