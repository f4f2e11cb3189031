"""The training commands: a config from a TOML file and `key.path=value` overrides, trained into a run folder."""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ldm.commands.cli import Parser
from ldm.config import comments, load, to_dict


def autoencoder() -> None:
    """Trains the VAE on images.

    ldm train autoencoder --config configs/shapes/autoencoder.toml --out runs/shapes/autoencoder
    """
    from ldm.train.autoencoder import AutoencoderConfig, AutoencoderTask

    train(AutoencoderConfig, AutoencoderTask, autoencoder)


def clip() -> None:
    """Trains the text encoder together with its image tower on captioned images.

    ldm train clip --config configs/shapes/clip.toml --out runs/shapes/clip
    """
    from ldm.train.clip import CLIPConfig, CLIPTask

    train(CLIPConfig, CLIPTask, clip)


def diffusion() -> None:
    """Trains the U-Net on latents and captions, or with unet=MODEL lora.rank=8 a low-rank adapter of it.

    ldm train diffusion --config configs/shapes/diffusion.toml --out runs/shapes/diffusion
    """
    from ldm.train.diffusion import DiffusionConfig, DiffusionTask

    train(DiffusionConfig, DiffusionTask, diffusion)


def distill() -> None:
    """Distills a model and its guidance into one that samples in a few steps.

    ldm train distill --config configs/shapes/distill.toml --out runs/shapes/turbo
    """
    from ldm.train.distill import DistillConfig, DistillTask

    train(DistillConfig, DistillTask, distill)


def preference() -> None:
    """Trains the U-Net on pairs of pictures of which people, or a scorer, prefer one.

    ldm train preference --config configs/shapes/preference.toml --out runs/shapes/preference
    """
    from ldm.train.preference import PreferenceConfig, PreferenceTask

    train(PreferenceConfig, PreferenceTask, preference)


def train(config_class: type, make_task: Callable[[Any], Any], command: Callable[[], None]) -> None:
    """Reads the command line of `command`, builds the config and the task, trains."""
    keys = "config keys, with their defaults:\n" + "\n".join(_keys(config_class))
    parser = Parser(inspect.getdoc(command), epilog=keys)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file; see configs/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder; the same command resumes")
    parser.add_argument("--force", action="store_true", help="resume although the config has changed")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. train.steps=1000")
    args = parser.parse_intermixed_args()
    config = load(config_class, args.config, args.overrides)
    from ldm.distributed import leave, processes
    from ldm.train.loop import train

    processes()  # refuses an unsupported launch before any work
    try:
        task = make_task(config)
        train(task, task.config.train, args.out, to_dict(task.config), args.force)
    except KeyboardInterrupt:
        print("the same command goes on from the last checkpoint", file=sys.stderr)
        raise
    leave()


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    """One line per key of a nested config: `train.steps = 10000  # help`."""
    texts, hints = comments(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{prefix}{field.name}.")
        else:
            value = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
            yield f"  {prefix}{field.name}{value}  # {texts[field.name]}".rstrip(" #")
