"""Trains the VAE on images.

python scripts/train_autoencoder.py --config configs/shapes/autoencoder.toml --out runs/shapes/autoencoder
"""

from ldm.commands.cli import run_training


def parts() -> tuple[type, type]:
    """The config's class and the task; imported here, so that --help is quick."""
    from ldm.train.autoencoder import AutoencoderConfig, AutoencoderTask

    return AutoencoderConfig, AutoencoderTask


if __name__ == "__main__":
    run_training(parts, __doc__)
