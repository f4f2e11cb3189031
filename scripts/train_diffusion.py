"""Trains the U-Net on latents and captions.

python scripts/train_diffusion.py --config configs/shapes/diffusion.toml --out runs/shapes/diffusion
"""

from ldm.commands.cli import run_training


def parts() -> tuple[type, type]:
    """The config's class and the task; imported here, so that --help is quick."""
    from ldm.train.diffusion import DiffusionConfig, DiffusionTask

    return DiffusionConfig, DiffusionTask


if __name__ == "__main__":
    run_training(parts, __doc__)
