"""Trains the text encoder with its image tower, on captioned images.

python scripts/train_clip.py --config configs/shapes/clip.toml --out runs/shapes/clip
"""

from ldm.commands.cli import run_training


def parts() -> tuple[type, type]:
    """The config's class and the task; imported here, so that --help is quick."""
    from ldm.train.clip import CLIPConfig, CLIPTask

    return CLIPConfig, CLIPTask


if __name__ == "__main__":
    run_training(parts, __doc__)
