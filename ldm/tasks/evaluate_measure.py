"""What an evaluation measures.

A result is a record that stands alone: {"metric", "of", "value", "n", ...} with all that the value depends on.
A further metric is one function that yields records, called in `measure`, and a section of the report.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data import to_float, to_uint8
from ldm.images import to_pil
from ldm.metrics import GaussianMoments, frechet_distance, psnr, ssim
from ldm.metrics.compositional import Case, breakdown, check, score
from ldm.metrics.features import FeatureExtractor
from ldm.pipeline import Pipeline
from ldm.tasks.evaluate_pictures import PictureSet

KEPT = 12  # reconstructions for the report
BLANK = 4  # levels of 255; a picture that spans no more in any channel shows nothing


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model beside the pictures that it is measured with."""

    pipe: Pipeline
    dataset: Any  # the held-out split
    indices: list[int]  # of its samples that are used
    train: Any  # as many training samples, for the floor; None: there are not as many
    train_note: str  # why there are not
    sets: dict[str, PictureSet]  # "pictures", of the held-out captions in the order of `indices`; on shapes "cases"
    cases: list[Case]  # in the order of sets["cases"]
    extractor: FeatureExtractor | None  # None: no Frechet distances
    guidance: tuple[float, ...]
    batch_size: int
    about: dict[str, Any]  # steps, sampler and seed, which records of samples carry

    def real(self, count: int | None = None) -> Iterator[Tensor]:
        """Batches (B, 3, H, W) in [-1, 1] of the held-out pictures, or of the first `count`."""
        return self._batches(lambda i: self.dataset[self.indices[i]]["image"], count or len(self.indices))

    def real_train(self) -> Iterator[Tensor]:
        """Batches of as many training pictures."""
        return self._batches(lambda i: self.train[i]["image"], len(self.indices))

    def samples(self, guidance: float) -> Iterator[Tensor]:
        """Batches of the pictures made for the held-out captions."""
        made = self.sets["pictures"]
        get = lambda i: torch.from_numpy(rearrange(made.array(guidance, i), "h w c -> c h w").copy())  # noqa: E731
        return self._batches(get, len(self.indices))

    def _batches(self, get: Callable[[int], Tensor], count: int) -> Iterator[Tensor]:
        for start in range(0, count, self.batch_size):
            yield to_float(torch.stack([get(i) for i in range(start, min(start + self.batch_size, count))]))


@dataclass(kw_only=True)
class Measured:
    """The records, and pictures for the report that come up on the way."""

    results: list[dict] = field(default_factory=list)
    reconstructions: list[tuple[Image.Image, Image.Image]] = field(default_factory=list)
    right: dict[float, list[bool]] = field(default_factory=dict)  # guidance -> whether each case is met


def measure(bench: Bench) -> Measured:
    """Every number, each part with a progress bar; UserError for a damaged picture."""
    measured = Measured()
    real = _autoencoder(bench, measured)
    if bench.extractor:
        measured.results.append(_floor(bench, real))
    for g in bench.guidance:
        _samples(bench, measured, g, real)
        if bench.cases:
            _compositional(bench, measured, g)
    return measured


def _autoencoder(bench: Bench, measured: Measured) -> GaussianMoments:
    """The autoencoder alone, through the mean of its latent, on held-out pictures; gives the real features' moments."""
    real, decoded = GaussianMoments(), GaussianMoments()
    quality: dict[str, list[Tensor]] = {"psnr_db": [], "ssim": []}
    arrays: dict[str, list[np.ndarray]] = {"real held-out": [], "reconstructions": []}
    for x in _bar(bench, bench.real(), "autoencoder"):
        y = reconstruct(bench.pipe, x)
        quality["psnr_db"].append(psnr(x, y))
        quality["ssim"].append(ssim(x, y))
        _update(bench, real, x)
        _update(bench, decoded, y)
        if bench.cases:
            arrays["real held-out"] += [np.asarray(image) for image in to_pil(x)]
            arrays["reconstructions"] += [np.asarray(image) for image in to_pil(y)]
        measured.reconstructions += list(zip(to_pil(x), to_pil(y), strict=True))[: KEPT - len(measured.reconstructions)]
    n = len(bench.indices)
    for metric, values in quality.items():
        value = float(torch.cat(values).mean())
        measured.results.append({"metric": metric, "of": "reconstructions", "value": value, "n": n, "latent": "mean"})
    if bench.extractor:
        measured.results.append(_frechet(bench, "reconstructions", decoded, real))
    if bench.cases:
        scenes = [bench.dataset.scene(i) for i in bench.indices]
        for of, images in arrays.items():
            value = breakdown(images, scenes)
            measured.results.append({"metric": "scene_accuracy", "of": of, "value": value, "n": n})
    return real


@torch.no_grad()
def reconstruct(pipe: Pipeline, x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> decoded from the mean of its latent, rounded to 256 levels as a file would be."""
    vae = pipe.vae
    y = vae.decode(vae.normalize(vae.encode(x.to(pipe.device)).mean))
    return to_float(to_uint8(y)).cpu()


def _floor(bench: Bench, real: GaussianMoments) -> dict:
    """The distance between real pictures and real pictures at the same N: what a perfect model would get."""
    if bench.train is None:
        return _frechet_about(bench) | {"of": "real train", "value": None, "n": 0, "note": bench.train_note}
    train = GaussianMoments()
    for x in _bar(bench, bench.real_train(), "floor"):
        _update(bench, train, x)
    return _frechet(bench, "real train", train, real)


def _samples(bench: Bench, measured: Measured, g: float, real: GaussianMoments) -> None:
    about, moments, blank = {"guidance": g, **bench.about}, GaussianMoments(), 0
    for x in _bar(bench, bench.samples(g), f"guidance {g:g}"):
        _update(bench, moments, x)
        span = reduce(x, "b c h w -> b c", "max") - reduce(x, "b c h w -> b c", "min")
        blank += int((span.amax(1) <= BLANK / 127.5).sum())
    n = len(bench.indices)
    measured.results.append({"metric": "blank_pictures", "of": "samples", "value": blank, "n": n, **about})
    if bench.extractor:
        measured.results.append(_frechet(bench, "samples", moments, real) | about)


def _compositional(bench: Bench, measured: Measured, g: float) -> None:
    about, n = {"guidance": g, **bench.about}, len(bench.cases)
    images = [bench.sets["cases"].array(g, i) for i in range(n)]
    required = [case.required for case in bench.cases]
    measured.right[g] = [check(image, scene) for image, scene in zip(images, required, strict=True)]
    for metric, value in (
        ("compositional_score", score(images, bench.cases)),
        ("scene_accuracy", breakdown(images, required)),
    ):
        measured.results.append({"metric": metric, "of": "samples", "value": value, "n": n, **about})


def _frechet(bench: Bench, of: str, moments: GaussianMoments, real: GaussianMoments) -> dict:
    """One record. `biased`: with no more pictures than features the covariance is singular, and the distance far
    too large; only against the floor of the same N does it say anything."""
    value, n, dimensions = frechet_distance(moments, real), moments.count, len(moments.mean)
    size = {"value": value, "n": n, "dimensions": dimensions, "biased": n <= dimensions}
    return _frechet_about(bench) | {"of": of} | size


def _frechet_about(bench: Bench) -> dict:
    net = bench.extractor
    about = {"extractor": net.name, "extractor_sha256": net.sha256, "resize": f"{net.size} px, {net.resize}"}
    return {"metric": "frechet_distance", "of": "", "against": "real held-out", **about}


def _update(bench: Bench, moments: GaussianMoments, x: Tensor) -> None:
    if bench.extractor:
        moments.update(bench.extractor(x.to(bench.pipe.device)).cpu())


def _bar(bench: Bench, batches: Iterator[Tensor], text: str) -> Iterator[Tensor]:
    total = -(-len(bench.indices) // bench.batch_size)
    return tqdm(batches, desc=f"measuring {text}", total=total, unit="batch")
