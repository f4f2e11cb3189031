"""A model beside the pictures that it is measured with, and their features."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor

from ldm.evaluate.features import FeatureCache
from ldm.evaluate.pictures import PictureSet, generate
from ldm.evaluate.records import Record
from ldm.metrics.compositional import Case
from ldm.metrics.features import FeatureExtractor
from ldm.metrics.judges import ImageTextModel
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts
from ldm.train.clip import sharing
from ldm.unet import UNet

BLANK = 4  # levels of 255; a picture that spans no more in any channel shows nothing
UNTRAINED = 1.0  # guidance of the untrained model: none


@dataclass(frozen=True, kw_only=True)
class Source:
    """Pictures of one kind: what records call them, and each as uint8 (3, H, W)."""

    of: str
    count: int
    get: Callable[[int], Tensor]
    key: str = ""  # what tells it from others of the same kind

    def batch(self, number: int, size: int) -> Tensor:
        """Batch `number` of those of `size` pictures, uint8 (B, 3, H, W)."""
        start = number * size
        return torch.stack([self.get(i) for i in range(start, min(start + size, self.count))])

    def batches(self, size: int) -> Iterator[Tensor]:
        """All of them in order."""
        return (self.batch(number, size) for number in range(-(-self.count // size)))


@dataclass(kw_only=True)
class Measured:
    """The records, and what comes up on the way that the report shows."""

    results: list[Record] = field(default_factory=list)
    reconstructions: list[tuple[Image.Image, Image.Image]] = field(default_factory=list)
    right: dict[float, list[bool]] = field(default_factory=dict)  # guidance -> whether each case is met
    copies: list[tuple[int, int, float]] = field(default_factory=list)  # sample, its nearest in the bank, distance
    variants: dict[str, PictureSet] = field(default_factory=dict)  # captions in other wording, by its kind
    opened: list[tuple[str, PictureSet, list[str]]] = field(default_factory=list)  # attribute, pictures, what they show


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What everything is measured on."""

    out: Path
    pipe: Pipeline
    dataset: Any  # the held-out split
    indices: list[int]  # of its samples that are used
    train: Any  # the training split; None: there is none
    train_note: str  # why there are not as many training pictures
    bank: list[int]  # of its samples that copies are looked for among; the first are the floor's
    sets: dict[str, PictureSet]  # "pictures", of the held-out captions in the order of `indices`; on shapes "cases"
    cases: list[Case]  # in the order of sets["cases"]
    extractor: FeatureExtractor | None  # None: no distances
    judge: ImageTextModel | None  # None: no alignment
    guidance: tuple[float, ...]
    batch_size: int
    settings: dict[str, Any]
    caches: dict[str, FeatureCache] = field(default_factory=dict)
    seen: dict[tuple, Tensor] = field(default_factory=dict)  # features in this run
    read: dict[str, Tensor] = field(default_factory=dict)  # captions the judge has read
    shared: list[Tensor] = field(default_factory=list)  # what `same` gives, once it is known

    @property
    def about(self) -> Record:
        """What records of samples carry beside the guidance."""
        return {key: self.settings[key] for key in ("guidance_rescale", "steps", "sampler", "seed")}

    @property
    def n(self) -> int:
        """How many pictures are measured."""
        return len(self.indices)

    @property
    def captions(self) -> list[str]:
        """What the model was asked for, one caption of each held-out picture."""
        return self.sets["pictures"].captions

    def real(self) -> Source:
        """The held-out pictures."""
        get = lambda i: self.dataset[self.indices[i]]["image"]  # noqa: E731
        return Source(of="real held-out", count=self.n, get=get)

    def real_train(self, count: int | None = None) -> Source:
        """As many training pictures, or `count` of the bank."""
        get = lambda i: self.train[self.bank[i]]["image"]  # noqa: E731
        return Source(of="real train", count=count or self.n, get=get)

    def samples(self, guidance: float) -> Source:
        """The pictures made for the held-out captions."""
        return source_of(self.sets["pictures"], guidance, "samples")

    def untrained(self) -> Source:
        """Pictures by the same network with random weights, made on the first call."""
        made = self.pictures("untrained", self.captions)
        if made.missing(UNTRAINED):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.settings["seed"])
                unet = UNet(self.pipe.unet.config)
            model = Pipeline(Parts(*self.pipe.parts[:3], unet, self.pipe.schedule)).to(self.pipe.device)
            self.make([made], [UNTRAINED], "generating, untrained", model)
        return source_of(made, UNTRAINED, "untrained")

    def pictures(self, name: str, captions: list[str]) -> PictureSet:
        """A set of pictures of captions, in the folder `name`; makes none."""
        return PictureSet(folder=self.out / name, captions=captions, size=self.settings["size"])

    def make(
        self, sets: list[PictureSet], guidance: list[float], text: str = "generating", pipe: Pipeline | None = None
    ) -> None:
        """Makes what is missing of some sets."""
        generate(pipe or self.pipe, sets, guidance, self.settings, self.batch_size, text)

    def features(self, source: Source, text: str = "") -> Tensor:
        """The extractor's features (N, D) of pictures."""
        return self._seen(self.extractor, source, text)

    def embeddings(self, source: Source, text: str = "") -> Tensor:
        """The judge's embeddings (N, D) of pictures."""
        return self._seen(self.judge, source, text)

    def texts(self, captions: list[str]) -> Tensor:
        """The judge's embeddings (N, D) of captions."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.read]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            self.read.update(zip(part, self.judge.texts(part).cpu(), strict=True))
        return torch.stack([self.read[caption] for caption in captions])

    def same(self) -> Tensor:
        """(N, N) bool: whether two held-out pictures share a caption."""
        if not self.shared:
            self.shared.append(sharing([self.dataset.captions(i) for i in self.indices]))
        return self.shared[0]

    def _seen(self, network: FeatureExtractor | ImageTextModel, source: Source, text: str) -> Tensor:
        if network.name not in self.caches:
            call = network.images if isinstance(network, ImageTextModel) else network
            folder = self.out / "features"
            cache = FeatureCache(folder, network.name, network.sha256, call, self.pipe.device)
            self.caches[network.name] = cache
        place = (network.name, source.of, source.key, source.count)
        if place not in self.seen:
            total, text = -(-source.count // self.batch_size), text or f"{network.name}: {source.of} {source.key}"
            self.seen[place] = self.caches[network.name](lambda n: source.batch(n, self.batch_size), total, text)
        return self.seen[place]


def source_of(made: PictureSet, guidance: float, of: str) -> Source:
    """Generated pictures."""
    get = lambda i: torch.from_numpy(rearrange(made.array(guidance, i), "h w c -> c h w").copy())  # noqa: E731
    return Source(of=of, count=len(made.captions), get=get, key=f"at {guidance:g}")


def blank_record(source: Source, batch_size: int) -> Record:
    """How many pictures are one plain colour: failures, counted in every number all the same."""
    blank = 0
    for pixels in source.batches(batch_size):
        x = pixels.int()
        span = reduce(x, "b c h w -> b c", "max") - reduce(x, "b c h w -> b c", "min")
        blank += int((span.amax(1) <= BLANK).sum())
    return {"metric": "blank_pictures", "of": source.of, "value": blank, "n": source.count}


def left_out(*datasets: Any) -> list[Record]:
    """How many samples of data sets could not be used, with the first reason; nothing where all could."""
    parts = [d.faults for d in datasets if hasattr(d, "faults")]
    found = {name: why for faults in parts for name, why in faults.reasons.items()}
    if not found:
        return []
    total = max(faults.total or 0 for faults in parts)
    return [{"metric": "left_out", "of": "data", "value": len(found), "n": total, "note": next(iter(found.values()))}]


def choose_caption(captions: list[str], seed: int, index: int) -> str:
    """The caption that a held-out picture is asked for by."""
    return random.Random(f"{seed}/{index}").choice(captions)
