"""Features of images by one network, and the numbers made of them. Features are kept under the hash of the pixels: no
set is computed twice, in any run."""

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.compilation import WhereItSaves, compiled
from ldm.config import UserError
from ldm.distributed import map_over_processes, processes
from ldm.evaluate.pictures import Pictures
from ldm.evaluate.records import Record, mean_record, record, resampled_record
from ldm.images import to_float
from ldm.metrics.alignment import chance, cosine, retrieval_hits
from ldm.metrics.distances import cmmd, frechet_distance, frechet_distance_infinite, kernel_distance
from ldm.metrics.diversity import inception_score, neighbourhoods
from ldm.metrics.extractor import FeatureExtractor
from ldm.metrics.intervals import kernel_interval, mean_interval
from ldm.model_io import load_tensors, save_tensors

NEIGHBOURS = 5
SUBSET = 1000  # images per subset of the kernel distance; half of the images where there are fewer than twice as many


class Features:
    """Features of images by one network, a file per set of images in `out/features/`, and all numbers that are made of
    them: records with the network's `metadata`."""

    def __init__(self, network: FeatureExtractor, config: Any, device: torch.device):
        self.network, self.config, self.device = network.to(device), config, device
        self.embed = compiled(network, network.forward) if config.compile == "always" else network.forward
        if config.compile == "auto":
            self.embed = WhereItSaves(network, network.forward, 0)
        self.name, self.metadata = network.name, network.metadata
        folder = re.sub(r"[^\w-]", "-", self.name) + f"-{network.sha256[:8]}"
        self.folder = config.out / "features" / folder
        self.rows: dict[Pictures, Tensor] = {}
        self.known_texts: dict[str, Tensor] = {}

    def __call__(self, pictures: Pictures) -> Tensor:
        """Features (N, D) of the images, float32 on the CPU. Several processes compute a batch each."""
        if pictures not in self.rows:
            digest = hashlib.sha256()
            for x in map(pictures.read, range(pictures.count)):
                digest.update(f"{tuple(x.shape)}".encode() + x.numpy().tobytes())
            path = self.folder / f"{digest.hexdigest()[:32]}.safetensors"
            try:
                self.rows[pictures] = load_tensors(path)["features"]
            except (UserError, KeyError):  # a missing or damaged file is computed again
                self.rows[pictures] = self._compute(pictures)
                if processes().is_main_process:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    save_tensors(path, {"features": self.rows[pictures]})
        return self.rows[pictures]

    def _compute(self, pictures: Pictures) -> Tensor:
        size = self.config.batch_size

        def batch(start: int) -> Tensor:
            x = to_float(pictures.batch(start, size)).to(self.device)
            return self.embed(x).float().cpu()

        if isinstance(self.embed, WhereItSaves):
            self.embed.left = -(-pictures.count // size)
        starts = range(0, pictures.count, size)
        return torch.cat(map_over_processes(batch, starts, f"{self.name}: {pictures.of}"))

    def texts(self, captions: list[str]) -> Tensor:
        """An image-text model's embeddings (N, D) of captions, on the CPU."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known_texts]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            self.known_texts |= zip(part, self.network.texts(part).cpu(), strict=True)
        return torch.stack([self.known_texts[caption] for caption in captions])

    def mean(self, metric: str, values: Any, source: Pictures, **fields: Any) -> Record:
        return mean_record(metric, values, source, **fields, **self.metadata)

    def distances(self, source: Pictures, real: Pictures, frechet: bool = True, **fields: Any) -> Iterator[Record]:
        """All numbers of images against real ones; the intervals of precision, recall, density and coverage keep the
        neighbourhoods as they are."""
        if frechet:
            yield from self.frechet(source, real, **fields)
        x, y, seed = self(source), self(real), self.config.seed
        n = min(len(x), len(y))
        fields, subset = fields | {"against": real.of, "n": n, **self.metadata}, min(SUBSET, n // 2)
        value, deviation = kernel_distance(x, y, subset_size=subset, seed=seed)
        interval = kernel_interval(x[:n], y[:n], "kid", value, seed, source.concepts[:n])
        yield record("kernel_distance", value, source, interval, deviation=deviation, subset_size=subset, **fields)
        for metric, values in neighbourhoods(y, x, NEIGHBOURS).items():
            of_real = metric in ("recall", "coverage")
            interval = mean_interval(values, groups=(real if of_real else source).concepts)
            yield record(metric, float(values.mean()), source, interval, k=NEIGHBOURS, **fields)
        yield from self.classes(source)

    def frechet(self, source: Pictures, real: Pictures, prefix: str = "", **fields: Any) -> Iterator[Record]:
        """The Frechet distance of the features (N, D) from those of real images, and extrapolated to N -> infinity.

        With no more images than dimensions the covariance is singular and the distance `biased` up: it compares only at
        the same N, and its `note` says how many images it needs. With fewer images than twice the dimensions there is
        no extrapolation, but a `note`.
        """
        sets, metric, seed = (self(source), self(real)), f"{prefix}frechet_distance", self.config.seed
        n, dimensions = min(map(len, sets)), sets[0].shape[1]
        options = {"seed": seed, "groups": (source.concepts, real.concepts)}
        fields |= {"against": real.of, "n": n, **self.metadata}
        size = {"dimensions": dimensions, "biased": n <= dimensions}
        if n <= dimensions:
            size["note"] = f"needs {dimensions + 1} pictures on both sides, one more than features, for less bias"
        yield resampled_record(metric, frechet_distance, sets, source, options | {"least": 0.0}, **fields, **size)
        metric = f"{metric}_infinite"
        if n >= 2 * max(dimensions, 2):
            extrapolated = partial(frechet_distance_infinite, seed=seed)
            yield resampled_record(metric, extrapolated, sets, source, options | {"few": True}, **fields)
        else:
            yield record(metric, None, source, **fields, note=f"needs {2 * dimensions} pictures, twice the features")

    def classes(self, source: Pictures) -> Iterator[Record]:
        """The Inception Score of images, where the network has classes."""
        probabilities = self.network.probabilities(self(source).to(self.device))
        if probabilities is not None:
            score = lambda rows: inception_score(rows)[0]  # noqa: E731
            fields = {"deviation": inception_score(probabilities)[1], "splits": 10, **self.metadata}
            options = {"seed": self.config.seed, "groups": (source.concepts,)}
            yield resampled_record("inception_score", score, (probabilities,), source, options, **fields)

    def cmmd(self, source: Pictures, real: Pictures) -> Record:
        """CMMD of the embeddings of images and of real ones, with an interval of as many images on both sides."""
        x, y = self(source), self(real)
        value, n = cmmd(x, y), min(len(x), len(y))
        low, high = kernel_interval(x[:n], y[:n], "cmmd", value, self.config.seed, source.concepts[:n])
        return record("cmmd", value, source, (max(low, 0.0), max(high, 0.0)), **self.metadata, against=real.of, n=n)

    def alignment(self, source: Pictures, captions: list[str], same: Tensor, **fields: Any) -> Iterator[Record]:
        """Cosines of images with their captions, `each` of them too, and retrieval both ways; `same` (N, N) marks the
        pairs that share a caption."""
        images, texts = self(source), self.texts(captions)
        cosines = cosine(images, texts)
        yield self.mean("clip_cosine", cosines, source, each=[round(x, 6) for x in cosines.tolist()], **fields)
        for metric, weight in (("clip_score_100", 100), ("clip_score", 2.5)):
            yield self.mean(metric, weight * cosines.clamp_min(0), source, weight=weight, **fields)
        for metric, hits in retrieval_hits(images, texts, (1, 5), same).items():
            yield self.mean(metric, hits, source, chance=chance(same, int(metric[-1])), **fields)
