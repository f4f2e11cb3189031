"""A tiny model, networks with known answers, and what an evaluation left in its folder."""

import json
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import text_encoder, unet_config, vae_config
from torch import nn

from ldm.clip import TextEncoder
from ldm.data.shapes import Shapes
from ldm.diffusion import Schedule, ScheduleConfig
from ldm.evaluate.config import EvaluateConfig
from ldm.evaluate.pictures import sample_indices
from ldm.evaluate.records import find
from ldm.metrics import features, judges
from ldm.metrics.extractor import FeatureExtractor
from ldm.metrics.inputs import resized
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import VAE

N, GUIDANCE = 16, (1.0, 2.0)
OPENED = "ldm.evaluate.evaluation.image_text_model"  # opens a judge by name


def tiny_vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE(vae_config((4, 4, 4), norm_num_groups=2, sample_size=32, scaling_factor=0.5))


def tiny_pipeline(seed: int = 0, size: int = 8) -> Pipeline:
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(["a red circle"], 514, context_length=77)
    text = TextEncoder(replace(text_encoder(tokenizer).config, max_position_embeddings=77))
    unet = UNet(unet_config((8, 8), "cp", sample_size=size, attention_head_dim=1, norm_num_groups=2))
    schedule = Schedule(ScheduleConfig(sampler="ddim", steps_offset=1))
    return Pipeline(Parts(tiny_vae(seed), text, tokenizer, unet, schedule))


def stub_extractor(side: int = 2) -> FeatureExtractor:
    """Mean colours of side x side squares: 3 * side**2 features."""
    prepare = resized(32, torch.zeros(3), torch.ones(3))
    network = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
    return FeatureExtractor("stub", network, 32, lambda x: network(prepare(x)), sha256="5" * 64)


def image_text(name: str, images: Any, texts: Any, size: int = 32) -> FeatureExtractor:
    return FeatureExtractor(name, nn.Identity(), size, images, texts)


def thumbnails(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1) - 0.8, dim=1)


def knows_shapes() -> FeatureExtractor:
    """Has seen every held-out picture of shapes: the embedding of a caption is that of its picture."""
    dataset = Shapes(32, "test")
    known = {c: i for i in sample_indices(len(dataset), 40, 0) for c in dataset.captions(i)}
    blank = torch.zeros(3, 32, 32, dtype=torch.uint8)

    def texts(captions: list[str]) -> torch.Tensor:
        return thumbnails(to_x([dataset[known[c]]["image"] if c in known else blank for c in captions]))

    return image_text("knows-shapes", thumbnails, texts)


def to_x(pixels: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([*pixels]) / 127.5 - 1


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)


def kept(folder: Path) -> torch.Tensor:
    """All pictures of a folder (N, 3, H, W) in [-1, 1]."""
    return to_x([read(path) for path in sorted(folder.glob("*.png"))])


def captions(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]


def results(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())["results"]


def one(out: Path, metric: str, of: str, **where: Any) -> dict:
    (record,) = find(results(out), metric, of, **where)
    return record


def report(out: Path) -> str:
    """The text of a report that is whole and loads nothing."""
    text = (out / "report.html").read_text()
    assert not Tags(text).open
    for word in ("http:", "https:", "<script", "<link", "@import", 'href="/', "url(h"):
        assert word not in text
    return text


class Tags(HTMLParser):
    """The elements of a page in order, and those that are left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def fill(folder: Path, count: int, seed: int, size: int = 24, text: str = "") -> Path:
    """A folder of `count` pictures of noise, with captions "TEXT 0", "TEXT 1", ... where `text` is given."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
        if text:
            (folder / f"{i:03d}.txt").write_text(f"{text} {i}")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def networks():
    """The networks "stub" and "knows-shapes" by name; warnings.showwarning, which run_command sets, is restored."""
    known = {"knows-shapes": knows_shapes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(features.EXTRACTORS, "stub", lambda where: stub_extractor())
        patch.setattr(OPENED, lambda name: known.get(name, partial(judges.image_text_model, name))())
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        yield


def config_for(model: Path, out: Path, **changes) -> EvaluateConfig:
    base = {"data": "shapes", "num": N, "guidance": GUIDANCE, "guidance_rescale": 0.5, "steps": (2,), "device": "cpu"}
    base |= {"features": "stub", "judge": "knows-shapes", "train_num": 40, "choose_on": "test", "train_captions": 0}
    return EvaluateConfig(model=str(model), out=out, **base | changes)
