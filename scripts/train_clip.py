"""Trains the text encoder with its image tower, on captioned images.

python scripts/train_clip.py --config configs/shapes/clip.toml --out runs/shapes/clip
"""

from ldm.cli import run_training
from ldm.tasks.clip import CLIPConfig, CLIPTask

if __name__ == "__main__":
    run_training(CLIPConfig, CLIPTask, __doc__)
