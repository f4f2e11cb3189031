"""The images of an evaluation. Those that it makes are kept: OUT/<set>/g<guidance>[-<sampler>-<steps>]/00000.png and
metadata.jsonl."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.data import DataConfig
from ldm.data.faults import readable
from ldm.evaluate.config import FEWEST
from ldm.images import read_image
from ldm.model_io import atomic_write, find_root, read_json

USUAL = 600  # held-out samples where --num is 0, or all of a smaller split
KEPT = ("length", "seed", "max_pixels", "max_broken")  # of the data of a run, where the same data are measured


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Images of one source, which records call `of`; `read(i)` is image i as uint8 (3, H, W)."""

    of: str
    count: int
    read: Callable[[int], Tensor]
    labels: dict[str, Any] = field(default_factory=dict)  # further fields of their records: how they were sampled
    concepts: Sequence[str] = ()  # of each image, where the data set names them

    def rows(self, indices: Sequence[int], **changes: Any) -> "Pictures":
        """Some of the images."""
        concepts = [self.concepts[i] for i in indices] if self.concepts else ()
        part = {"count": len(indices), "read": lambda i: self.read(indices[i]), "concepts": concepts}
        return replace(self, **part | changes)

    def batch(self, start: int, size: int) -> Tensor:
        """Images from `start` on, uint8 (B, 3, H, W), at most `size`."""
        return torch.stack([self.read(i) for i in range(start, min(start + size, self.count))])

    def batches(self, size: int) -> Iterator[Tensor]:
        return (self.batch(start, size) for start in range(0, self.count, size))


def of_files(of: str, paths: Sequence[Path], size: int, **fields: Any) -> Pictures:
    """Images from files, at `size` pixels. Reading raises ImageError for a damaged one."""
    return Pictures(of=of, count=len(paths), read=lambda i: read_image(paths[i], size), **fields)


def of_dataset(of: str, dataset: Any, indices: Sequence[int]) -> Pictures:
    records = getattr(dataset, "records", ())
    concepts = [records[i]["concept"] for i in indices] if records and "concept" in records[0] else ()
    return Pictures(of=of, count=len(indices), read=lambda i: dataset[indices[i]]["image"], concepts=concepts)


def data_config(model: str, name: str, path: str, size: int) -> DataConfig:
    """The data `name` at `path`, with the length, seed and limits of the run that made the model where that was on
    them."""
    trained = training_data(model)
    kept = {key: trained[key] for key in KEPT if trained.get(key) is not None and trained.get("name") == name}
    return DataConfig(name=name, path=path, size=size, **kept)


def training_data(model: str) -> dict[str, Any]:
    """The table `data` in the config of the run that made a model; empty where there is none."""
    root = find_root(model)
    file = (root.parent.parent if root.parent.name == "checkpoints" else root) / "config.json"
    return read_json(file).get("data", {}) if file.is_file() else {}


def held_out_indices(dataset: Any, config: Any) -> list[int]:
    """Random samples that can be read, `config.num` of them. Raises UserError where they are too few."""
    num, size = config.num or min(USUAL, len(dataset)), f"split {config.split!r} of {config.data} has {len(dataset)}"
    if len(dataset) < FEWEST:
        raise UserError(f"{size} of the {FEWEST} or more pictures that are needed, best 1000")
    if num > len(dataset):
        raise UserError(f"--num {num} is not possible: {size}; use that or fewer")
    indices = readable(dataset, sample_indices(len(dataset), num, config.seed))
    if len(indices) < FEWEST:
        raise UserError(f"only {len(indices)} of the held-out pictures can be read; {FEWEST} or more are needed")
    return indices


def sample_indices(length: int, n: int, seed: int) -> list[int]:
    """`n` random indices below `length`; fewer are the beginning of more, so that a larger run completes a smaller."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def write_captions(folder: Path, captions: list[str]) -> None:
    """Writes metadata.jsonl, which makes a captioned folder; a longer one, of a run with more captions, stays. Raises
    UserError where it names others."""
    path = folder / "metadata.jsonl"
    old = path.read_text().splitlines() if path.is_file() else []
    lines = [json.dumps({"file_name": f"{i:05d}.png", "text": text}) for i, text in enumerate(captions)]
    if any(a != b for a, b in zip(old, lines, strict=False)):
        raise UserError(f"{str(folder)!r} has pictures of other captions; use another --out, or delete that folder")
    if len(old) < len(lines):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
