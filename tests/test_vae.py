"""The VAE against diffusers' AutoencoderKL on copied random weights, and its folders opened by both sides."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import assert_same_gradients, diffusers_vae, normal, randomize, shapes, vae_config

from ldm import model_io as weights
from ldm.config import UserError, load
from ldm.train.autoencoder import AutoencoderConfig
from ldm.vae import VAE, VAEConfig

CONFIGS = Path(__file__).parent.parent / "configs"
CASES = {
    "one level": vae_config((8,)),
    "two levels": vae_config(),
    "three levels, two blocks": vae_config((8, 16, 12), layers_per_block=2, latent_channels=3),
    "four levels, no attention": vae_config((4, 8, 8, 16), mid_block_add_attention=False),
}


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_equals_diffusers(config):
    ours, theirs = randomize(VAE(config)), diffusers_vae(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, eps = normal(2, 3, 16, 24), normal(2, config.latent_channels, 16 // ours.factor, 24 // ours.factor, seed=2)
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    draws = (torch.Generator().manual_seed(3) for _ in range(2))
    close(posterior.sample(next(draws)), expected.sample(next(draws)))
    close(posterior.mean, expected.mean)
    close(posterior.std, expected.std)
    y = ours.decode_raw(posterior.mean + posterior.std * eps)
    y_expected = theirs.decode(expected.mean + expected.std * eps).sample
    assert y.shape == x.shape
    close(y, y_expected)
    (y * x).sum().backward()
    (y_expected * x).sum().backward()
    assert_same_gradients(ours, theirs)


@torch.no_grad()
def test_statistics_fold_exactly():
    vae, x = randomize(VAE(vae_config(scaling_factor=0.4, shift_factor=-0.2))), normal(4, 3, 16, 16)
    mean, std = torch.tensor([1.0, -2.0, 0.3, 0.0]), torch.tensor([0.5, 2.0, 1.0, 3.0])
    before, folded = {k: v.clone() for k, v in vae.state_dict().items()}, vae.with_statistics(mean, std)
    raw, normalized = vae.encode(x), folded.encode(x)
    wide = [v[:, None, None] for v in (mean, std)]
    close(normalized.mean, (raw.mean - wide[0]) / wide[1], 1e-5)
    close(normalized.std, raw.std / wide[1], 1e-5)
    close(vae.normalize(raw.mean), (raw.mean + 0.2) * 0.4, 1e-6)
    close(vae.decode(vae.normalize(raw.mean)), vae.decode_raw(raw.mean), 1e-5)
    close(folded.normalize(normalized.mean), normalized.mean, 0)
    close(folded.decode(normalized.mean), vae.decode_raw(raw.mean), 1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())


def test_names_of_the_attention_from_before_diffusers_0_17(tmp_path):
    vae = randomize(VAE(CASES["three levels, two blocks"]))
    vae.save_pretrained(tmp_path)
    old, tensors = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}, {}
    for name, tensor in vae.state_dict().items():
        tensors[re.sub("|".join(old), lambda match: old[match[0]], name)] = tensor
    assert tensors.keys() != vae.state_dict().keys()
    weights.save_tensors(tmp_path / weights.DIFFUSERS_FILE, tensors)
    again = VAE.from_pretrained(tmp_path)
    assert again.config == vae.config and not again.training
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("config", [VAEConfig(), load(AutoencoderConfig, CONFIGS / "sd15" / "autoencoder.toml").model])
def test_stable_diffusion_sizes(config):
    published = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    with torch.device("meta"):
        ours, theirs = shapes(VAE(config)), shapes(diffusers_vae(VAEConfig(**published)))
    assert ours == theirs
    assert config == VAEConfig(**published)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="width 10 must be a multiple of norm_num_groups 4"):
        vae_config((10,))
    vae = VAE(vae_config())
    with pytest.raises(UserError, match="multiple of 2 px"):
        vae.encode(torch.zeros(1, 3, 15, 16))
    vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"act_fn": "mish"}, "act_fn = 'mish' is not supported"),
        ({"latents_mean": [0.1]}, "latents_mean"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            VAE.from_pretrained(tmp_path)
