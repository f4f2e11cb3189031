"""What a training takes, against closed forms, and what its script says."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_scripts import in_process
from torch import nn

from ldm.commands import plan
from ldm.commands.plan import Model, Setting
from ldm.data import open_dataset
from ldm.data.latents import cache_bytes, open_latents
from ldm.unet import UNetConfig

SD15 = Path(__file__).parents[1] / "configs" / "sd15"
MODEL = Model(
    unet_flops=600,
    vae_flops=100,
    text_flops=0,
    parameters=30,
    unet=UNetConfig(),
    latent=(4, 8, 8),
    context=(7, 16),
    batch=2,
    accumulate=3,
)
SETTING = Setting(pictures=4800, gpus=4, bandwidth=1e6, storage=1e9, price=3.0)


def test_counts_the_multiply_adds_of_known_layers():
    """2 out in of a linear layer for each row, 2 out in k k of a convolution for each position; twice that backward,
    once where the input needs no gradient; attention's two products."""
    with torch.device("meta"):
        linear, convolution = nn.Linear(5, 7), nn.Conv2d(3, 8, 3, padding=1)
        x, y = torch.empty(11, 5), torch.empty(2, 3, 6, 4)
        q = torch.empty(1, 2, 9, 16)
        assert plan.count(lambda: linear(x)) == 2 * 11 * 5 * 7
        assert plan.count(lambda: linear(x).sum().backward()) == 2 * 2 * 11 * 5 * 7
        assert plan.count(lambda: convolution(y)) == 2 * 2 * 6 * 4 * 8 * 3 * 9
        assert plan.count(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 9 * 9 * 16


def test_stable_diffusions_size_is_as_published():
    """860 million parameters; 0.8 TFLOP, 401 billion multiply-adds, forward at 512 px, and three times that with the
    way back but for the first layer's input."""
    model = plan.read_model(SD15, 512)
    assert model.parameters == 859_520_964 and model.latent == (4, 64, 64) and model.context == (77, 768)
    assert model.unet_flops / 3 == pytest.approx(0.803e12, rel=2e-3)
    # 12 layers of 4 d^2 + 2 d m weights for each of 77 tokens, and attention
    assert model.text_flops == 12 * (2 * 77 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 2 * 77 * 77 * 768)
    assert (model.batch, model.accumulate) == (16, 4)


def test_a_cache_has_the_bytes_that_were_foreseen(tmp_path):
    samples = open_dataset(replace(tiny.DATA, length=5), "train")
    vae = tiny.encoder()
    cached = open_latents(tmp_path / "cache", vae, samples, 2, torch.device("cpu"))
    assert cache_bytes(5, cached[0]["mean"].shape) == (tmp_path / "cache").stat().st_size
    assert plan.sample_bytes(MODEL, SETTING, 64) == 2 * 2 * 4 * 8 * 8 + 16 + 100
    assert plan.sample_bytes(MODEL, replace(SETTING, cached=False), 64) == 64 * 64 / 4 + 100


@pytest.mark.parametrize("gpus", [1, 2, 8, 256])
def test_a_ring_passes_twice_the_gradients_but_for_ones_own_part(gpus):
    """n - 1 rounds that add up and n - 1 that hand out, each of a n-th."""
    rounds = [4 * 1000 / gpus] * (gpus - 1) * 2
    assert plan.all_reduce_bytes(1000, gpus) == pytest.approx(sum(rounds))


def test_time_is_work_over_rate_and_cost_is_time_of_all_gpus():
    found = plan.plan(MODEL, SETTING, 64, 1200.0)
    assert found.flops == 4800 * 700
    assert found.encode_seconds == 4800 * 100 / 1200 / 4
    assert found.reduce_seconds == 2 * 3 / 4 * 4 * 30 / 1e6 and found.waited_seconds == 0  # 2 s of backward hide it
    assert found.step_seconds == 6 * 600 / 1200 and found.limit == "computing"
    assert found.train_seconds == 4800 * 600 / 1200 / 4
    assert found.pictures_per_second == 24 / 3 and found.read_rate == 8 * 1140
    assert found.gpu_hours == pytest.approx(4800 * 700 / 1200 / 3600) and found.cost == found.gpu_hours * 3


def test_the_slowest_part_sets_the_pace():
    slow_links = plan.plan(MODEL, replace(SETTING, bandwidth=30.0), 64, 1200.0)
    assert slow_links.reduce_seconds == 6.0 and slow_links.waited_seconds == pytest.approx(6 - 2 / 3)
    assert slow_links.step_seconds == pytest.approx(3 + 6 - 2 / 3) and slow_links.limit == "all-reduce"
    slow_disk = plan.plan(MODEL, replace(SETTING, storage=100.0), 64, 1200.0)
    assert slow_disk.step_seconds == 24 * 1140 / 100 and slow_disk.limit == "storage"
    assert slow_disk.read_rate == pytest.approx(100)
    uncached = plan.plan(MODEL, replace(SETTING, cached=False), 64, 1200.0)
    assert uncached.encode_seconds == 0 and uncached.step_seconds == 6 * 700 / 1200


def test_measures_steps_of_this_machine():
    found = plan.measure(SD15.parent / "shapes", 32, steps=2, batch=2)
    model = plan.read_model(SD15.parent / "shapes", 32)
    assert found.batch == 2 and found.rate == pytest.approx(2 * model.unet_flops / found.seconds)
    assert 0 < found.rate < 1e13 and 0 < found.product < 1e15


def test_the_script_prints_a_column_for_each_rate(capsys, monkeypatch):
    arguments = ["--family", "configs/shapes", "--size", "32", "--pictures", "40000", "--epochs", "4", "--gpus", "2"]
    given = [*arguments, "--utilization", "10,50", "--peak", "0.1"]
    code, out, _ = in_process(capsys, monkeypatch, "plan_training.py", *given, cwd=SD15.parents[1])
    rows = {line[:42].strip(): line[42:].split("  ") for line in out.splitlines()[1:]}
    assert code == 0 and out.startswith("40,000 pictures of 32 px, 4 epochs, 2 GPUs")
    assert [cell.strip() for cell in rows["at TFLOP/s a GPU"] if cell.strip()] == ["0.01", "0.05"]
    hours = [float(cell) for cell in rows["pictures/s"] if cell.strip()]
    assert hours[1] == pytest.approx(5 * hours[0], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pictures", "0"], "--pictures 0 is not allowed; give more than 0"),
        (["--gpus", "-1"], "--gpus -1 is not allowed"),
        (["--size", "100"], "--size 100 is not possible: 'configs/sd15' takes multiples of 64 px"),
        (["--utilization", "30,x"], "--utilization '30,x' is not allowed"),
        (["--utilization", "120"], "--utilization '120' is not allowed"),
        (["--rate", "nan"], "--rate nan is not allowed"),
        (["--price", "-2"], "--price -2 is not allowed; give 0 or more"),
        (["--family", "nowhere"], "config file 'nowhere/autoencoder.toml' does not exist"),
        (["--gpus", "many"], "invalid int value: 'many'"),
    ],
)
def test_refuses_what_cannot_be_in_one_line(capsys, monkeypatch, arguments, says):
    code, out, error = in_process(capsys, monkeypatch, "plan_training.py", *arguments, cwd=SD15.parents[1])
    assert code == 2 and not out and error.startswith("error: ") and error.count("\n") == 1 and says in error
