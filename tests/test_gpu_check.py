"""`ldm gpu-check` as a dry run on a CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from ldm.__main__ import main
from ldm.unet import UNet
from ldm.vae import VAE


def check(monkeypatch, folder: Path, *arguments: str) -> tuple[int, dict[str, dict]]:
    """The exit code, and the rows by name."""
    monkeypatch.chdir(Path(__file__).parents[1])
    for name in ("ACCELERATE_USE_CPU", "HF_HUB_OFFLINE", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "1")  # so that they are restored
    monkeypatch.setattr(sys, "argv", ["ldm", "gpu-check", "--out", str(folder), *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    file = folder / "gpu-check.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return stop.value.code, {row["name"]: row for row in rows}


def test_a_wrong_part_and_a_failure_are_told_from_the_rest(monkeypatch, capsys, tmp_path):
    forward, decode = UNet.forward, VAE.decode
    rows = ("--device", "cpu", "--only", "parity: U-Net,parity: VAE decode,no syncs: sampling")
    code, right = check(monkeypatch, tmp_path, *rows)
    assert code == 0 and right["parity: U-Net, float32"]["figure"] == 0 < right["parity: U-Net, bfloat16"]["figure"]
    assert right["no syncs: sampling"]["result"].startswith("skipped")

    def shifted(*inputs):
        return forward(*inputs) + torch.is_autocast_enabled("cpu")

    def failing(*inputs):
        return torch.empty(2**60) if torch.is_autocast_enabled("cpu") else decode(*inputs)

    monkeypatch.setattr(UNet, "forward", shifted)
    monkeypatch.setattr(VAE, "decode", failing)
    code, wrong = check(monkeypatch, tmp_path, *rows)
    result = {name: row["result"] for name, row in wrong.items()}
    assert code == 1 and result["parity: U-Net, float32"] == result["parity: VAE decode, float32"] == "ok"
    assert result["parity: U-Net, bfloat16"] == "WRONG" and wrong["parity: U-Net, bfloat16"]["figure"] > 0.06
    failure = result["parity: VAE decode, bfloat16"]
    assert failure.startswith("WRONG: RuntimeError") and "\n" not in failure and failure in capsys.readouterr().out


@pytest.mark.parametrize("line", [["--device", "cuda"], ["--device", "cpu", "--only", "nothing"]])
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, line):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check(monkeypatch, tmp_path / "new", *line) == (2, {}) and not (tmp_path / "new").exists()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
