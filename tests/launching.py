"""The smallest trainings as overrides of their configs, and scripts in two processes through `accelerate launch`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from inventory_tools import flat

from ldm.config import load, to_dict
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import train

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "configs" / "accelerate"
TWO_CPUS = EXAMPLES / "two-cpus.yaml"
EMPTY = ("--config", os.devnull)
TASKS = {"autoencoder": AutoencoderTask, "clip": CLIPTask, "diffusion": DiffusionTask}
CONFIGS = {"autoencoder": tiny.autoencoder(), "clip": tiny.clip(), "diffusion": tiny.diffusion("vae", "clip")}


def overrides(config: Any) -> list[str]:
    """Every value of a config as `key=value`."""
    return [f"{key}={json.dumps(value)}" for key, value in flat(to_dict(config)).items() if value is not None]


def train_here(name: str, given: list[str], out: str, cwd: Path, force: bool = False) -> None:
    """One of the trainings in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        config = load(type(CONFIGS[name]), None, given)
        train(TASKS[name](config), config.train, out, to_dict(config), force)


def launch(script: Path | str, *arguments: object, cwd: Path, options: tuple = ("--config_file", str(TWO_CPUS))):
    """`accelerate launch` with the example file for two processes on CPU cores, or other options; to its end."""
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    command += ["--main_process_port", "0", str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=1800)
