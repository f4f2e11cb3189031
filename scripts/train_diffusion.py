"""Trains the U-Net on latents and captions.

python scripts/train_diffusion.py --config configs/shapes/diffusion.toml --out runs/shapes/diffusion
"""

from ldm.cli import run_training
from ldm.tasks.diffusion import DiffusionConfig, DiffusionTask

if __name__ == "__main__":
    run_training(DiffusionConfig, DiffusionTask, __doc__)
