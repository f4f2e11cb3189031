"""The projection of a training run against closed forms."""

from dataclasses import replace

import pytest
import torch
from test_scripts import ROOT, in_process
from torch import nn

from ldm.commands import plan
from ldm.commands.plan import Model, Options
from ldm.unet import UNetConfig

SHARED = {"unet": UNetConfig(), "latent": (4, 8, 8), "context": (7, 16), "parameters": 30}
MODEL = Model(unet_flops=600, vae_flops=100, text_flops=0, batch=2, accumulate=3, **SHARED)
RUN = Options(pictures=4800, gpus=4, bandwidth=1e-3, storage=1.0, price=3.0, size=64)


def test_counts_multiply_adds():
    """2 out in per row of a linear layer, 2 out in k k per position of a convolution; twice that backward, once where
    the input needs no gradient; the two products of attention."""
    with torch.device("meta"):
        linear, convolution = nn.Linear(5, 7), nn.Conv2d(3, 8, 3, padding=1)
        x, y, q = torch.empty(11, 5), torch.empty(2, 3, 6, 4), torch.empty(1, 2, 9, 16)
        assert plan.count_flops(lambda: linear(x).sum().backward()) == 2 * 2 * 11 * 5 * 7
        assert plan.count_flops(lambda: convolution(y)) == 2 * 2 * 6 * 4 * 8 * 3 * 9
        attention = nn.functional.scaled_dot_product_attention
        assert plan.count_flops(lambda: attention(q, q, q)) == 2 * 2 * 2 * 9 * 9 * 16


def test_stable_diffusion_has_its_published_size():
    """860 million parameters; 401 billion multiply-adds forward at 512 px, and three times that with the way back."""
    model = plan.read_model(Options(family=ROOT / "configs" / "sd15", size=512))
    assert model.parameters == 859_520_964 and model.latent == (4, 64, 64) and model.context == (77, 768)
    assert model.unet_flops / 3 == pytest.approx(0.803e12, rel=2e-3)
    assert model.text_flops == 12 * (2 * 77 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 2 * 77 * 77 * 768)


def test_time_is_work_over_rate_and_cost_is_time_of_all_gpus():
    rows = plan.projection(MODEL, RUN, 1200.0)
    assert rows["FLOP in all"] == f"{4800 * 700:.3g}" and rows["encoding the cache"] == "1.67 minutes"
    assert rows["a step"] == "3 s" and rows["pictures/s"] == "8"
    assert rows["of it not hidden behind computing"] == "none" and rows["what takes longest"] == "computing"
    assert rows["training"] == "10 minutes" and rows["read from storage"] == "9.06 KB/s"
    assert plan.all_reduce_bytes(1000, 8) == 2 * 7 / 8 * 4 * 1000


def test_the_slowest_part_sets_the_pace():
    rows = plan.projection(MODEL, replace(RUN, bandwidth=30e-9), 1200.0)
    assert rows["all-reduce of a step"] == "6 s" and rows["a step"] == "8.33 s"  # 2/3 s is hidden
    assert rows["what takes longest"] == "all-reduce"
    rows = plan.projection(MODEL, replace(RUN, storage=1e-7), 1200.0)
    assert rows["what takes longest"] == "storage" and rows["read from storage"] == "100 bytes/s"


def test_the_command_has_a_column_per_rate(capsys, monkeypatch):
    line = "--family configs/shapes --size 32 --pictures 40000 --epochs 4 --gpus 2 --utilization 10,50 --peak 0.1"
    code, out, _ = in_process(capsys, monkeypatch, "plan_training.py", *line.split(), cwd=ROOT)
    rows = {line[:42].strip(): line[42:].split("  ") for line in out.splitlines()[1:]}
    assert code == 0 and out.startswith("40,000 pictures of 32 px, 4 epochs, 2 GPUs")
    assert [cell.strip() for cell in rows["at TFLOP/s a GPU"] if cell.strip()] == ["0.01", "0.05"]
    slow, fast = (float(cell) for cell in rows["pictures/s"] if cell.strip())
    assert fast == pytest.approx(5 * slow, rel=0.02)
