"""A model, the images that it is measured with, the networks that look at them, and the results."""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.data import DataConfig, open_dataset
from ldm.data.faults import readable
from ldm.data.latents import data_hash
from ldm.distributed import find_device
from ldm.evaluate.config import SMALLEST, EvaluateConfig
from ldm.evaluate.features import Features
from ldm.evaluate.pictures import SAMPLING, Pictures, PictureSet, generate
from ldm.evaluate.records import Record, sharing
from ldm.evaluate.report import Row
from ldm.evaluate.samples import data_config, held_out_indices, judge_name, open_extractor, sample_indices
from ldm.images import to_float, to_uint8
from ldm.metrics.compositional import TASKS, Case, cases
from ldm.metrics.extractor import FeatureExtractor
from ldm.metrics.judges import image_text_model
from ldm.model_io import module_hash
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts
from ldm.samplers import make_grid
from ldm.unet import UNet

UNTRAINED = 1.0  # guidance of the untrained model


class Evaluation:
    """Opens and checks everything, and writes nothing. Raises UserError for settings that cannot be measured."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.results: list[Record] = []
        self.galleries: dict[str, list[Row]] = defaultdict(list)
        self.pipe = pipe = Pipeline.from_pretrained(config.model, find_device(config.device))
        sampler = config.sampler or pipe.schedule.config.sampler
        make_grid(pipe.schedule, sampler, config.steps)  # refuses an unknown sampler or a wrong number of steps
        self.size = pipe.unet.config.sample_size * pipe.vae.factor
        if self.size < SMALLEST:
            raise UserError(f"the model makes {self.size} px pictures; they can be measured from {SMALLEST} px on")
        data = data_config(config.model, config.data, config.data_path, self.size)
        self.dataset = open_dataset(data, config.split)
        self.indices = held_out_indices(self.dataset, config)
        self.train, self.bank, self.train_note = self._training(data)
        judge = judge_name(config.judge, config.data)
        extractor, self.judge = open_extractor(config.features, judge), _open_judge(judge, config, pipe)
        self.features, self.embeddings = (
            network and Features(config.out / "features", network, pipe.device, config.batch_size)
            for network in (extractor, self.judge)
        )
        self.settings = {
            "model": config.model,
            "model_sha256": _model_hash(pipe),
            "parameters": {
                p: sum(x.numel() for x in getattr(pipe, p).parameters()) for p in ("vae", "text_encoder", "unet")
            },
            "data": config.data,
            "data_sha256": data_hash(self.dataset),
            "split": config.split,
            "size": self.size,
            "guidance_rescale": config.guidance_rescale,
            "steps": config.steps,
            "sampler": sampler,
            "seed": config.seed,
        }
        self.known_texts: dict[str, Tensor] = {}

    def _training(self, data: DataConfig) -> tuple[Any, list[int], str]:
        """The training split, and its samples that are used; without enough of them None, none, and the reason."""
        n = len(self.indices)
        try:
            train = open_dataset(data, "train")
        except UserError as error:
            return None, [], str(error)
        if len(train) < n:
            return None, [], f"the training split has only {len(train)} pictures"
        tried = min(max(self.config.train_num, n), len(train))
        bank = readable(train, sample_indices(len(train), tried, self.config.seed))
        if len(bank) < n:
            return None, [], f"only {len(bank)} of {tried} training pictures can be read"
        return train, bank, ""

    def add(self, records: Iterable[Record], **fields: Any) -> None:
        """Adds records, each with further fields."""
        self.results += [record | fields for record in records]

    def show(self, gallery: str, row: Row) -> None:
        """Adds a row of images to the report."""
        self.galleries[gallery].append(row)

    def about(self, guidance: float) -> Record:
        """The fields of every record of samples."""
        return {"guidance": guidance} | {key: self.settings[key] for key in SAMPLING}

    def sources(self, guidance: float) -> list[tuple[Pictures, Record]]:
        """Real images and samples, with the fields of their records."""
        return [(self.real, {}), (self.samples[guidance], self.about(guidance))]

    @cached_property
    def captions(self) -> list[str]:
        """One caption per held-out image, for which the model samples one."""
        seed = self.config.seed
        return [random.Random(f"{seed}/{i}").choice(self.dataset.captions(i)) for i in self.indices]

    @cached_property
    def same(self) -> Tensor:
        """(N, N) bool: whether two held-out images share a caption."""
        return sharing([self.dataset.captions(i) for i in self.indices])

    @cached_property
    def cases(self) -> list[Case]:
        """On shapes, cases for the exact checker."""
        return pose_cases(len(self.indices), self.config.seed) if self.config.data == "shapes" else []

    @cached_property
    def real(self) -> Pictures:
        return _of_dataset("real held-out", self.dataset, self.indices)

    @cached_property
    def real_train(self) -> Pictures:
        return _of_dataset("real train", self.train, self.bank[: len(self.indices)])

    @cached_property
    def searched(self) -> Pictures:
        """The training images searched for near-duplicates of samples."""
        return _of_dataset("training set", self.train, self.bank)

    @cached_property
    def samples(self) -> dict[float, Pictures]:
        """By guidance, one image per held-out caption."""
        return {g: self.picture_set("pictures", self.captions).at(g, "samples") for g in self.config.guidance}

    @cached_property
    def case_samples(self) -> dict[float, Pictures]:
        """By guidance, one image per case."""
        pictures = self.picture_set("cases", [case.caption for case in self.cases])
        return {g: pictures.at(g, "samples") for g in self.config.guidance}

    @cached_property
    def untrained(self) -> Pictures:
        """Images of the same network with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            unet = UNet(self.pipe.unet.config)
        model = Pipeline(Parts(*self.pipe.parts[:3], unet, self.pipe.schedule)).to(self.pipe.device)
        return self.sample("untrained", self.captions, UNTRAINED, "untrained", model)

    @cached_property
    def reconstructions(self) -> Pictures:
        """Held-out images decoded from the means of their latents."""
        batches = (reconstruct(self.pipe, to_float(x)) for x in self.real.batches(self.config.batch_size))
        pixels = torch.cat([to_uint8(x) for x in batches])
        return Pictures(of="reconstructions", count=len(pixels), read=pixels.__getitem__)

    def picture_set(self, name: str, captions: list[str]) -> PictureSet:
        return PictureSet(folder=self.config.out / name, captions=captions, size=self.size)

    def make(self, pictures: PictureSet, guidance: Sequence[float], text: str, pipe: Pipeline | None = None) -> None:
        """Samples the missing images of a set."""
        generate(pipe or self.pipe, pictures, guidance, self.settings, self.config.batch_size, text)

    def sample(
        self, name: str, captions: list[str], guidance: float, of: str, pipe: Pipeline | None = None
    ) -> Pictures:
        """Images of captions, kept in the folder `name`."""
        pictures = self.picture_set(name, captions)
        self.make(pictures, [guidance], f"sampling, {of}", pipe)
        return pictures.at(guidance, of)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """The judge's embeddings (N, D) of captions."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known_texts]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            self.known_texts.update(zip(part, self.judge.texts(part).cpu(), strict=True))
        return torch.stack([self.known_texts[caption] for caption in captions])


@torch.no_grad()
def reconstruct(pipe: Pipeline, x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> decoded from the mean of its latent, in 256 levels as a file has."""
    y = pipe.vae.decode(pipe.vae.normalize(pipe.vae.encode(x.to(pipe.device)).mean))
    return to_float(to_uint8(y)).cpu()


def pose_cases(num: int, seed: int) -> list[Case]:
    """About `num` compositional cases, equally many of each kind in turn: fewer are the beginning of more."""
    kinds = 2 * len(TASKS)
    each = num // kinds or 1
    posed = cases(each, seed)
    return [posed[kind * each + i] for i in range(each) for kind in range(kinds)]


def _of_dataset(of: str, dataset: Any, indices: list[int]) -> Pictures:
    return Pictures(of=of, count=len(indices), read=lambda i: dataset[indices[i]]["image"])


def _open_judge(name: str, config: EvaluateConfig, pipe: Pipeline) -> FeatureExtractor | None:
    """Raises UserError for a judge that learned from the held-out split, or that is the model's own text encoder."""
    if name == "none":
        return None
    judge = image_text_model(name)
    if judge.learned_val and config.split == "val":
        way_out = "take --split test, --judge none or a clip:FOLDER"
        raise UserError(f"judge {name!r} learned from the validation split, and cannot judge it; {way_out}")
    tower = getattr(judge.network, "text_model", None)
    if tower is not None and module_hash(tower) == module_hash(pipe.text_encoder.text_model):
        way_out = "train another with judge=true (configs/*/judge.toml)"
        raise UserError(f"judge {name!r} is the text encoder of {config.model!r}, which would judge itself; {way_out}")
    return judge


def _model_hash(pipe: Pipeline) -> str:
    """SHA-256 over all that an image is made from: weights, vocabulary and schedule."""
    digest = hashlib.sha256()
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        digest.update(module_hash(part).encode())
    digest.update(json.dumps([pipe.tokenizer.vocab, asdict(pipe.schedule.config)], sort_keys=True).encode())
    return digest.hexdigest()
