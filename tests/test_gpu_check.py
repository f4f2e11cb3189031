"""`ldm gpu-check` as a dry run on a CPU, and what `ldm benchmark` does on a GPU alone."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_tasks import NoWaiting

from ldm.__main__ import main
from ldm.commands import benchmark_jobs, gpu_check
from ldm.commands.benchmark import Case
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE

ROOT = Path(__file__).parents[1]


def check(monkeypatch, capsys, *arguments: str) -> tuple[int, dict[str, list[str]]]:
    """The exit code, and of the rows by name figure, allowed and result."""
    monkeypatch.chdir(ROOT)
    for name in ("ACCELERATE_USE_CPU", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")  # so that they are restored
    gpu_check.output.cache_clear()
    monkeypatch.setattr(sys, "argv", ["ldm", "gpu-check", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    return stop.value.code, {row[1]: row[2:5] for row in rows if len(row) > 5}


def test_a_wrong_part_and_a_failure_are_told_from_the_rest(monkeypatch, capsys):
    forward, encode, decode = UNet.forward, VAE.encode, VAE.decode
    rows = ("--device", "cpu", "--only", "parity: U-Net,parity: VAE")
    code, right = check(monkeypatch, capsys, *rows)
    assert code == 0 and {result for *_, result in right.values()} == {"ok"}
    assert float(right["parity: U-Net, float32"][0]) == 0 < float(right["parity: U-Net, bfloat16"][0])

    def shifted(*inputs):
        return forward(*inputs) + torch.is_autocast_enabled("cpu")

    def failing(*inputs):
        return torch.empty(2**60) if torch.is_autocast_enabled("cpu") else decode(*inputs)

    def overflowing(vae, x):
        posterior = encode(vae, x)
        posterior.mean[0] += torch.nan if torch.is_autocast_enabled("cpu") and vae.config.latent_channels == 16 else 0
        return posterior

    monkeypatch.setattr(UNet, "forward", shifted)
    monkeypatch.setattr(VAE, "encode", overflowing)
    monkeypatch.setattr(VAE, "decode", failing)
    code, wrong = check(monkeypatch, capsys, *rows)
    assert code == 1 and all(wrong[name][2] == "ok" for name in wrong if "float32" in name)
    figure, allowed, result = wrong["parity: U-Net, bfloat16"]
    assert result == "WRONG" and float(figure) > float(allowed) == 0.06
    assert wrong["parity: VAE encode, bfloat16"] == ["nan", "0.06", "WRONG"]
    assert wrong["parity: VAE decode, bfloat16"][2].startswith("WRONG RuntimeError")


@pytest.mark.parametrize("line", [["--device", "cuda"], ["--device", "cpu", "--only", "nothing"]])
def test_bad_input_is_one_line(monkeypatch, capsys, line):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["ldm", "gpu-check", *line])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_armed_step_is_a_whole_one_that_reads_no_number(monkeypatch, tmp_path):
    mode, steps = NoWaiting(), []

    def arm(step: int) -> None:
        steps.append(step)
        mode.armed = step == 2

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gpu_check, "arm", arm)
    AcceleratorState._reset_state()  # other tests train in float32
    with mode:
        gpu_check.trained(tmp_path, "clip", armed=True)
    AcceleratorState._reset_state()
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("workload", ["sampling", "train-unet"])
def test_a_random_unet_is_that_of_diffusers(monkeypatch, workload):
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    tiny = partial(UNetConfig, block_out_channels=(32,), layers_per_block=1, **kinds)
    monkeypatch.setattr(benchmark_jobs, "UNetConfig", tiny)
    monkeypatch.setattr(benchmark_jobs, "SIDE", 64)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    case = Case(workload, "sd15", 64, 1, compiled=False, device="cpu", dtype="float32")
    (_, theirs, *_), (_, ours, *_) = (benchmark_jobs.measured(case._replace(ours=side)) for side in (False, True))
    assert np.abs(ours - theirs).max() <= {"sampling": 1, "train-unet": 1e-5}[workload] and ours.std() > 0
    assert benchmark_jobs.cost(case)[0] > 0
