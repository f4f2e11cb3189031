"""The options of the three kinds of evaluation: of a model, of an autoencoder, of two folders of images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.config import Dtype, UserError

FEATURES = "effnet-lite1"  # network of the distances by default
GUIDANCE = (1.0, 2.0, 3.0, 5.0, 8.0)  # scales by default, of a model that is not distilled
FEWEST = 16  # images; fewer measure nothing
SMALLEST, LARGEST = 11, 4000  # pixels per side: SSIM's window, and the largest image that is read
ALLOWED = (
    ("batch_size", "1 or more", lambda value: value >= 1),
    ("seed", "0 or more, below 2 to the 31st", lambda value: 0 <= value < 2**31),
    ("num", f"0, or {FEWEST} or more, best 1000", lambda value: value == 0 or value >= FEWEST),
    ("size", f"1 to {LARGEST}, or 0", lambda value: 0 <= value <= LARGEST),
    ("train_num", "1 or more", lambda value: value >= 1),
    ("train_captions", "0 or more", lambda value: value >= 0),
    ("steps", "whole numbers of 1 or more, separated by commas", lambda values: min(values, default=0) >= 1),
    ("guidance_rescale", "a number in [0, 1]", lambda value: 0 <= value <= 1),
    (
        "guidance",
        "different numbers of 0 or more, separated by commas",
        lambda values: (
            all(0 <= g < float("inf") for g in values) and 0 < len(values) == len({f"{g:g}" for g in values})
        ),
    ),
)


def check(config: Any) -> None:
    """Raises UserError, naming the option and the allowed values, for a value that no evaluation can use."""
    for name, allowed, valid in ALLOWED:
        value = getattr(config, name, None)
        if value is not None and not valid(value):
            shown = ",".join(f"{x:g}" for x in (value if isinstance(value, tuple) else (value,)))
            raise UserError(f"--{name.replace('_', '-')} {shown} is not allowed; use {allowed}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Of a model, on held-out images and their captions."""

    model: str  # a shipped model's name, a run folder or a Stable Diffusion folder
    data: str  # shapes, emoji, folder or shards
    data_path: str = ""  # where a folder or shards are
    split: Literal["test", "val"] = "test"  # held-out split that is reported
    num: int = 0  # held-out captions, 16 or more; 0: 600, or all of a smaller split
    guidance: tuple[float, ...] | None = None  # scales, of which one is reported; default: 1,2,3,5,8, distilled: 1
    choose_on: Literal["val", "test", "none"] = "val"  # split that chooses it; test: the reported one; none: the first
    guidance_rescale: float = 0.0  # in [0, 1], for every guidance scale
    steps: tuple[int, ...] | None = None  # the first is reported, more make a curve; default: 30, or as distilled
    sampler: str = ""  # see `ldm sample --help`; the first is reported, as of steps; empty: the model's own
    features: str = FEATURES  # or inception[:FILE], clip:FOLDER, dinov2:FOLDER, judge[:FOLDER], none
    judge: str = ""  # emoji, shapes, clip:FOLDER, folder of train_clip (judge=true), none; empty: the data's own
    train_num: int = 10_000  # training images searched for near-duplicates of samples
    train_captions: int = 48  # training captions per kind of image that are sampled too; 0: none
    baseline: str = ""  # folder of another model's evaluation to compare with
    seed: int = 0  # chooses the captions; image i is sampled with seed + i
    batch_size: int = 32  # images per batch
    out: Path  # folder of the report; what it already holds is kept and completed
    device: str = ""  # empty: cuda where available, else cpu
    dtype: Dtype = "float32"  # of the model's weights; see `ldm sample`
    compile: Literal["auto", "always", "never"] = "auto"  # the networks first; auto: by OpenVINO where that saves time

    __post_init__ = check


@dataclass(frozen=True, kw_only=True)
class AutoencoderEvaluation:
    """Of an autoencoder alone, on held-out images."""

    autoencoder: str  # a shipped model's name, a run folder, a Stable Diffusion folder, or a folder of a VAE alone
    data: str  # shapes, emoji, folder or shards
    data_path: str = ""  # where a folder or shards are
    split: Literal["test", "val"] = "test"  # held-out split
    num: int = 0  # held-out images, 16 or more; 0: 600, or all of a smaller split
    size: int = 0  # pixels per side; 0: the autoencoder's own
    features: str = FEATURES  # network of the distances; see --model
    perceptual: str = "effnet-lite0"  # effnet-lite0, lpips-vgg or lpips-alex
    seed: int = 0  # chooses the images
    batch_size: int = 32  # images per batch
    out: Path  # folder of the report; features that it already holds are kept
    device: str = ""  # empty: cuda where available, else cpu
    compile: Literal["auto", "always", "never"] = "auto"  # the networks first; auto: by OpenVINO where that saves time

    __post_init__ = check


@dataclass(frozen=True, kw_only=True)
class FolderEvaluation:
    """Of a folder of images against another, whoever made them."""

    images: Path  # folder of images
    reference: Path  # folder of images that they are compared with
    size: int = 0  # pixels per side to which all are resized; 0: none is, and all must be squares of one size
    features: str = FEATURES  # network of the distances; see --model
    judge: str = ""  # image-text model for CMMD and, where images have captions, alignment; empty: none
    without_frechet: bool = False  # no Frechet distance, which needs more images than features
    seed: int = 0  # order of the images, and bootstrap
    batch_size: int = 32  # images per batch
    out: Path  # folder of the report; features that it already holds are kept
    device: str = ""  # empty: cuda where available, else cpu
    compile: Literal["auto", "always", "never"] = "auto"  # the networks first; auto: by OpenVINO where that saves time

    __post_init__ = check
