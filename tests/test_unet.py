"""The U-Net against diffusers' UNet2DConditionModel on copied random weights, and its folders opened by both."""

from pathlib import Path

import pytest
import torch
from tiny_models import assert_same_gradients, diffusers_unet, normal, randomize, shapes, unet_config

from ldm import model_io
from ldm.config import UserError, load
from ldm.train.diffusion import DiffusionConfig
from ldm.unet import SUPPORTED, UNet, UNetConfig

CONFIGS = Path(__file__).parent.parent / "configs"
CASES = {
    "one level": unet_config((16,)),
    "two levels": unet_config(),
    "linear, heads a level": unet_config((16, 24, 32), use_linear_projection=True, attention_head_dim=(1, 3, 4)),
    "four levels, the last without attention": unet_config((8, 16, 16, 24), "cccp", layers_per_block=2),
    "no attention above the middle": unet_config((8, 16), "pp"),
    "two transformer layers": unet_config(transformer_layers_per_block=2),
    "transformer layers a level": unet_config((8, 16, 24), "pcc", transformer_layers_per_block=(1, 2, 3)),
    "other timesteps and norms": unet_config(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-3),
}
# What the published folders of Stable Diffusion 1.5 and 2.1 say, beside diffusers' defaults.
SD15 = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "sample_size": 64}
SD15 |= {"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2}
SD15 |= {"attention_head_dim": 8, "cross_attention_dim": 768, "center_input_sample": False, "downsample_padding": 1}
SD15 |= {"flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32}
SD15 |= {"down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"]}
SD15 |= {"up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3]}
SD21 = SD15 | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
SD21 |= {"dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False, "sample_size": 96}
SD21 |= {"upcast_attention": True}


def inputs(config: UNetConfig, size: tuple[int, int] = (8, 16)) -> tuple[torch.Tensor, ...]:
    z_t = normal(2, config.in_channels, *size)
    return z_t, torch.tensor([17, 980]), normal(2, 5, config.cross_attention_dim, seed=2)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_equals_diffusers(config):
    ours, theirs = randomize(UNet(config)), diffusers_unet(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    z_t, t, context = inputs(config)
    prediction, expected = ours(z_t, t, context), theirs(z_t, t, context).sample
    torch.testing.assert_close(prediction, expected, atol=1e-4, rtol=0)
    assert prediction.std() > 0.1
    (prediction * z_t).sum().backward()
    (expected * z_t).sum().backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("table", [SD15, SD21], ids=["1.5", "2.1"])
def test_stable_diffusion_sizes(tmp_path, table):
    from diffusers import UNet2DConditionModel

    config = model_io.read_config(tmp_path, table, UNetConfig, "UNet2DConditionModel", SUPPORTED)
    with torch.device("meta"):
        assert shapes(UNet(config)) == shapes(UNet2DConditionModel.from_config(table))
    if table is SD15:
        assert config == UNetConfig() == load(DiffusionConfig, CONFIGS / "sd15" / "diffusion.toml").model


def test_an_odd_size_is_refused():
    unet = UNet(unet_config())
    with pytest.raises(UserError, match="multiple of 2"):
        unet(*inputs(unet.config, (8, 7)))
