"""The smallest configs of the three trainings, and scripts in two processes through `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.config import load, to_dict
from ldm.train.autoencoder import AutoencoderConfig, AutoencoderTask
from ldm.train.clip import CLIPConfig, CLIPTask
from ldm.train.diffusion import DiffusionConfig, DiffusionTask
from ldm.train.loop import train

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "configs" / "accelerate"
TWO_CPUS = EXAMPLES / "two-cpus.yaml"
DATA = "held_out = 8\ndata = { length = 24 }\n[train]\nbatch_size = 4\noptimizer = { warmup = 1 }\n"
TOWER = "hidden_size = 32, intermediate_size = 32, num_hidden_layers = 1, num_attention_heads = 2, projection_dim = 16"
CONFIGS = {
    "autoencoder": "statistics = 24\n"
    "model = { block_out_channels = [8, 16, 16], layers_per_block = 1, norm_num_groups = 4 }\n"
    "loss = { perceptual_depth = 1, gan_start = 1, gan_ramp = 1, discriminator_channels = 4,"
    " discriminator_layers = 2 }\n" + DATA,
    "clip": f"vocab_size = 560\ntext = {{ {TOWER}, max_position_embeddings = 32 }}\n"
    f"vision = {{ {TOWER}, patch_size = 8 }}\n{DATA}",
    "diffusion": "preview = { count = 2, steps = 2 }\n"
    'schedule = { sampler = "ddim", timestep_spacing = "trailing" }\n'
    "model = { block_out_channels = [16, 32], layers_per_block = 1, attention_head_dim = 2, norm_num_groups = 4,"
    ' down_block_types = ["CrossAttnDownBlock2D", "DownBlock2D"],'
    ' up_block_types = ["UpBlock2D", "CrossAttnUpBlock2D"] }\n' + DATA,
}
TASKS = {
    "autoencoder": (AutoencoderConfig, AutoencoderTask),
    "clip": (CLIPConfig, CLIPTask),
    "diffusion": (DiffusionConfig, DiffusionTask),
}


def train_here(name: str, overrides: list[str], out: str, cwd: Path, force: bool = False) -> None:
    """One of the trainings in this process."""
    config_class, task = TASKS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        config = load(config_class, cwd.parent / f"{name}.toml", overrides)
        train(task(config), config.train, out, to_dict(config), force)


def launch(script: Path | str, *arguments: object, cwd: Path, options: tuple = ("--config_file", str(TWO_CPUS))):
    """`accelerate launch` with the example file for two processes on CPU cores, or other options; to its end."""
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    command += ["--main_process_port", "0", str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=1800)
