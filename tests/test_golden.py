"""The losses of 30 steps of each training are those kept in tests/golden/, to 1e-4.

Weights, noise, timesteps and every other draw are given by numpy, so that only the arithmetic of a step is compared.
`python tests/test_golden.py` records them anew.
"""

import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.config import build, to_dict
from ldm.train.autoencoder import AutoencoderConfig, AutoencoderTask
from ldm.train.clip import CLIPConfig, CLIPTask
from ldm.train.diffusion import DiffusionConfig, DiffusionTask
from ldm.train.loop import train

HERE = Path(__file__).parent
GOLDEN, MODEL = HERE / "golden", HERE / "kept" / "model"
DIGITS, TOLERANCE = 9, 1e-4
# A large eps keeps the rounding in gradients that are zero on paper from being blown up
OPTIMIZER = {"lr": 5e-3, "eps": 1e-2, "betas": [0.9, 0.99], "weight_decay": 0.0, "warmup": 5, "decay": "constant"}
EVERY = {"log_every": 1, "validate_every": 0, "preview_every": 0, "save_every": 0}
DATA = {"name": "shapes", "length": 64, "flip": True}
COMMON = {"data": DATA, "train": {"steps": 30, "batch_size": 6, "optimizer": OPTIMIZER} | EVERY, "held_out": 4}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"projection_dim": 16}
LEVELS = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
LOSS = {"gan": 0.5, "gan_start": 10, "gan_ramp": 10, "discriminator_channels": 8, "discriminator_layers": 2}
LOSS |= {"l2": 1.0, "perceptual": 0.5, "perceptual_depth": 2, "kl": 1e-3}
READERS = {"words": 1.0, "picture": 10.0, "window": 3, "layers": 1}
BLOCKS = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 2}
BLOCKS |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}
SCHEDULE = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "sampler": "ddim"}
AUTOENCODER = {"model": LEVELS | {"latent_channels": 3}, "loss": LOSS, "statistics": 8}
CLIP = {"tokenizer": str(MODEL), "text": TOWER | {"max_position_embeddings": 24}, "vision": TOWER | {"patch_size": 8}}
DIFFUSION = {"vae": str(MODEL), "text_encoder": str(MODEL), "model": LEVELS | BLOCKS, "schedule": SCHEDULE}
DIFFUSION |= {"timesteps": "logit_normal", "logit_mean": 0.5, "min_snr_gamma": 5.0, "caption_dropout": 0.3}
CONFIGS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "autoencoder": (AutoencoderConfig, AutoencoderTask, COMMON | AUTOENCODER),
    "clip": (CLIPConfig, CLIPTask, COMMON | CLIP | {"grounding": READERS}),
    "diffusion": (DiffusionConfig, DiffusionTask, COMMON | DIFFUSION | {"preview": {"count": 1, "steps": 1}}),
}


class Draws(TorchFunctionMode):
    """Stands for `ldm.distributed.Draws`: the k-th tensor drawn in step s, of shape S, is numpy's of seed [s, k]."""

    def __init__(self, step: int):
        super().__init__()
        self.step, self.count = step, 0

    def draw(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        """The next draw, standard normal or uniform in [0, 1)."""
        random = np.random.default_rng([self.step, self.count])
        self.count += 1
        values = random.standard_normal(shape, np.float32) if kind == "randn" else random.random(shape, np.float32)
        return torch.from_numpy(np.asarray(values))

    def randn(self, rows: int, *shape: int) -> Tensor:
        return self.draw("randn", (rows, *shape))

    def rand(self, rows: int, *shape: int) -> Tensor:
        return self.draw("rand", (rows, *shape))

    def rows(self, function: Callable[[int, torch.Generator], Tensor], rows: int) -> Tensor:
        with self:
            return function(rows, torch.Generator())

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Within `rows`, the draws of torch."""
        if func in (torch.randn, torch.rand):
            return self.draw(func.__name__, tuple(args[0]) if args and not isinstance(args[0], int) else args)
        return func(*args, **(kwargs or {}))


def injected(losses: Callable) -> Callable:
    """`task.losses`, whose draws are those of `Draws`."""

    def given(modules: dict[str, nn.Module], batch: dict, step: int, draws: Any) -> Iterator:
        yield from losses(modules, batch, step, Draws(step))

    return given


def initialize(modules: dict[str, nn.Module]) -> None:
    """Every parameter by its name alone: matrices and kernels by their fan-in, scales around 1, the rest around 0."""
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            if not parameter.ndim:
                continue  # the temperature of CLIP
            seed = zlib.crc32(f"{module_name}.{name}".encode())
            values = np.random.default_rng(seed).standard_normal(tuple(parameter.shape), np.float32)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            shift = float(parameter.ndim == 1 and name.endswith("weight"))
            parameter.data.copy_(torch.from_numpy(scale * values + shift))


def losses_of(kind: str, out: Path) -> list[dict[str, float]]:
    """What a training logs of each step's losses."""
    config_class, task_class, table = CONFIGS[kind]
    config = build(config_class, table)
    task = task_class(config)
    initialize(task.modules)
    task.losses = injected(task.losses)
    train(task, config.train, out, to_dict(config))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    apart = ("val/", "lr", "skipped")
    kept = [{k: v for k, v in x.items() if not k.startswith(apart) and not k.endswith("_grad_norm")} for x in lines]
    return [{k: float(f"{v:.{DIGITS}g}") for k, v in x.items() if k != "step"} for x in kept if len(x) > 1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_are_those_of_then(kind, tmp_path, one_thread):
    now, then = losses_of(kind, tmp_path), json.loads((GOLDEN / f"{kind}.json").read_text())
    assert len(now) == len(then) == 30
    for step, (a, b) in enumerate(zip(now, then, strict=True)):
        # Mean logits are of the order of 1 and cross 0
        bounds = {key: TOLERANCE * max(abs(value), "logits" in key) for key, value in b.items()}
        assert a.keys() == b.keys(), step
        assert not [(key, a[key], b[key]) for key in b if abs(a[key] - b[key]) > bounds[key]], step


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if sys.argv[1:] else GOLDEN
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as out:
            steps = [json.dumps(step) for step in losses_of(name, Path(out))]
        (folder / f"{name}.json").write_text("[\n" + ",\n".join(steps) + "\n]\n")
