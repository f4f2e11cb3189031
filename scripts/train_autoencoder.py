"""Trains the VAE on images.

python scripts/train_autoencoder.py --config configs/shapes/autoencoder.toml --out runs/shapes/autoencoder
"""

from ldm.cli import run_training
from ldm.tasks.autoencoder import AutoencoderConfig, AutoencoderTask

if __name__ == "__main__":
    run_training(AutoencoderConfig, AutoencoderTask, __doc__)
