"""The projection of a training run against closed forms."""

from dataclasses import replace

import pytest
from test_scripts import ROOT
from torch import nn

from ldm.commands import plan
from ldm.commands.plan import Model, Options
from ldm.unet import UNetConfig

UNET = nn.Linear(5, 5, device="meta")  # 30 parameters
UNET.config = UNetConfig(in_channels=4)
MODEL = Model(UNET, side=8, tokens=77, train_tflop=600, encode_tflop=100, batch=2, accumulate=3)
RUN = Options(pictures=4800, gpus=4, bandwidth=1e-3, storage=1.0, price=3.0, size=64)


def test_stable_diffusion_has_its_published_size():
    """860 million parameters; 401 billion multiply-adds forward at 512 px, and three times that with the way back. A
    layer of the text encoder has 4 projections, 2 of four times the width, and the two products of attention."""
    model = plan.read_model(Options(family=ROOT / "configs" / "sd15", size=512))
    assert sum(p.numel() for p in model.unet.parameters()) == 859_520_964
    assert (model.side, model.tokens, model.unet.config.cross_attention_dim) == (64, 77, 768)
    text = 12 * (2 * 77 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 2 * 77 * 77 * 768) / 1e12
    assert (model.train_tflop - text) / 3 == pytest.approx(0.803, rel=2e-3)


def test_time_is_work_over_rate_and_cost_is_time_of_all_gpus():
    rows = plan.projection(MODEL, RUN, 1200.0)
    assert rows["ms per step"] == rows["ms to compute"] == 3000 and rows["pictures per second"] == 8
    assert rows["hours to encode the cache"] == pytest.approx(100 / 3600)
    assert rows["hours to train"] == pytest.approx(600 / 3600) and rows["cost"] == pytest.approx(4 * 700 / 3600 * 3)
    assert rows["MB/s from storage"] == pytest.approx(8 * (100 + 4 * 256 + 8) / 1e6)
    assert rows["ms to sum gradients"] == pytest.approx(2 * 3 / 4 * 4 * 30 / 1e6 * 1e3)
    online = plan.projection(MODEL, replace(RUN, no_cache=True), 1200.0)
    assert online["ms to compute"] == 3500 and online["hours to encode the cache"] == 0


def test_the_slowest_part_sets_the_pace():
    rows = plan.projection(MODEL, replace(RUN, bandwidth=30e-9), 1200.0)
    assert rows["ms to sum gradients"] == pytest.approx(6000)
    assert rows["ms per step"] == pytest.approx(3000 + 6000 - 2000 / 3)
    rows = plan.projection(MODEL, replace(RUN, storage=1e-7), 1200.0)
    assert rows["ms per step"] == rows["ms to read"] > 3000 and rows["MB/s from storage"] == pytest.approx(100 / 1e6)
