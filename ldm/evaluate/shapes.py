"""What the exact checker sees of pictures of shapes."""

import numpy as np
from einops import rearrange
from torch import Tensor

from ldm.data.shapes import Scene
from ldm.evaluate.bench import Bench, Measured
from ldm.evaluate.records import SHUFFLED, Record
from ldm.metrics.compositional import Case, by_aspect, check, halves, tally
from ldm.metrics.intervals import mean_interval


def compositional(bench: Bench, measured: Measured, g: float) -> None:
    """Whether the pictures of the cases show what their captions say, and what those of other cases say."""
    about = {"guidance": g, **bench.about}
    images = [bench.sets["cases"].array(g, i) for i in range(len(bench.cases))]
    others = bench.cases[1:] + bench.cases[:1]
    measured.right[g] = [check(x, case.required) for x, case in zip(images, bench.cases, strict=True)]
    by_others = [check(x, case.required) for x, case in zip(images, others, strict=True)]
    for of, right, cases in (
        (SHUFFLED, by_others, others),
        ("samples", measured.right[g], bench.cases),
    ):
        measured.results.append(_composed_record(right, cases, of) | about)
    scenes = [case.required for case in bench.cases]
    measured.results.append(scene_record(images, scenes, "samples") | about)


def untrained_cases(bench: Bench) -> Record:
    """What the checker finds of the cases in pictures by the untrained model."""
    (images,) = bench.untrained().batches(bench.n)
    pairs = zip(_arrays(images)[: len(bench.cases)], bench.cases, strict=True)
    return _composed_record([check(x, case.required) for x, case in pairs], bench.cases, "untrained")


def _composed_record(right: list[bool], cases: list[Case], of: str) -> Record:
    """Which cases pictures meet, with intervals; "interval" is that of the mean over all."""
    found = {
        task: {half: mean_interval(oks) for half, oks in row.items()} for task, row in halves(right, cases).items()
    }
    spread = {"interval": found["mean"]["all"], "intervals": found}
    return {"metric": "compositional_score", "of": of, "value": tally(right, cases), "n": len(right)} | spread


def scene_record(images: list[np.ndarray] | Tensor, scenes: list[Scene], of: str) -> Record:
    """How many pictures, uint8 (N, 3, H, W) or N of (H, W, 3), are right in each aspect, with intervals."""
    found = by_aspect(_arrays(images) if isinstance(images, Tensor) else images, scenes)
    value = {aspect: float(np.mean(right)) for aspect, right in found.items()}
    spread = {aspect: mean_interval(right) for aspect, right in found.items()}
    return {"metric": "scene_accuracy", "of": of, "value": value, "interval": spread, "n": len(images)}


def _arrays(pixels: Tensor) -> list[np.ndarray]:
    """uint8 (N, 3, H, W) -> N of (H, W, 3)."""
    return list(rearrange(pixels, "n c h w -> n h w c").numpy())
