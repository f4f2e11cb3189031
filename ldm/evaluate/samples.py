"""The held-out and training samples that an evaluation uses, and its feature network and judge by name."""

from typing import Any

import torch

from ldm import model_io
from ldm.config import UserError
from ldm.data import DataConfig
from ldm.data.faults import readable
from ldm.evaluate.config import FEWEST, USUAL, AutoencoderEvaluation, EvaluateConfig
from ldm.metrics.extractor import FeatureExtractor
from ldm.metrics.features import feature_extractor, judged_by
from ldm.metrics.judges import JUDGES


def data_config(model: str, name: str, path: str, size: int) -> DataConfig:
    """The data `name` at `path`, with the length, seed and limits of the model's run where that was on them."""
    root = model_io.find_root(model)
    run = root.parent.parent if root.parent.name == "checkpoints" else root
    config = model_io.read_json(run / "config.json") if (run / "config.json").is_file() else {}
    trained = config.get("data", {})
    keys = [key for key in ("length", "seed", "max_pixels", "max_broken") if trained.get(key) is not None]
    same = trained.get("name") == name
    return DataConfig(name=name, path=path, size=size, **({key: trained[key] for key in keys} if same else {}))


def held_out_indices(dataset: Any, config: EvaluateConfig | AutoencoderEvaluation) -> list[int]:
    """Random samples that can be read. Raises UserError where they are too few."""
    num = config.num or min(USUAL, len(dataset))
    if not FEWEST <= num <= len(dataset):
        size = f"split {config.split!r} of {config.data} has {len(dataset)}"
        raise UserError(f"--num {num} is not possible: {size}, and {FEWEST} or more are needed, best 1000")
    indices = readable(dataset, sample_indices(len(dataset), num, config.seed))
    if len(indices) < FEWEST:
        raise UserError(f"only {len(indices)} of the held-out pictures can be read; {FEWEST} or more are needed")
    return indices


def sample_indices(length: int, n: int, seed: int) -> list[int]:
    """`n` random indices below `length`; fewer are the beginning of more, so that a larger run completes a smaller."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def judge_name(judge: str, data: str) -> str:
    """The judge asked for, else the one that ships for the data, else "none"."""
    return judge or (data if (JUDGES / data).is_dir() else "none")


def open_extractor(features: str, judge: str) -> FeatureExtractor | None:
    """The feature network; "judge" is the image tower of `judge`, "none" is None."""
    name = judged_by(features, judge)
    return None if name == "none" else feature_extractor(name)
