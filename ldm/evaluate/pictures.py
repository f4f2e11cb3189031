"""The images of an evaluation. Those that it makes are kept: OUT/<set>/g<guidance>/00000.png and metadata.jsonl."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from tqdm import tqdm

from ldm import model_io
from ldm.config import UserError
from ldm.distributed import processes
from ldm.images import ImageError, read_image, save_png
from ldm.pipeline import Pipeline

SAMPLING = ("guidance_rescale", "steps", "sampler", "seed")  # settings that every record of samples carries
BLANK = 4  # levels of 255; an image that spans no more in any channel is of one plain colour


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images of one source, which records call `of`; `read(i)` is image i as uint8 (3, H, W)."""

    of: str
    count: int
    read: Callable[[int], Tensor]

    def batch(self, number: int, size: int) -> Tensor:
        """Batch `number` of batches of `size` images, uint8 (B, 3, H, W)."""
        return torch.stack([self.read(i) for i in range(number * size, min((number + 1) * size, self.count))])

    def batches(self, size: int) -> Iterator[Tensor]:
        return (self.batch(number, size) for number in range(math.ceil(self.count / size)))

    def blank_record(self, batch_size: int) -> dict[str, Any]:
        """How many images are of one plain colour: failures, which count in every other number all the same."""
        spans = [
            reduce(x.int(), "b c h w -> b c", "max") - reduce(x, "b c h w -> b c", "min")
            for x in self.batches(batch_size)
        ]
        blank = int((torch.cat(spans).amax(1) <= BLANK).sum())
        return {"metric": "blank_pictures", "of": self.of, "value": blank, "n": self.count}


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """Captions, and where the images sampled for them are kept at each guidance."""

    folder: Path
    captions: list[str]
    size: int  # pixels per side

    def path(self, guidance: float, index: int) -> Path:
        return self.folder / f"g{guidance:g}" / f"{index:05d}.png"

    def missing(self, guidance: float) -> list[int]:
        """Indices of the images still to be sampled."""
        return [i for i in range(len(self.captions)) if not self.path(guidance, i).is_file()]

    def at(self, guidance: float, of: str) -> Pictures:
        way_out = "delete it, and the same command makes it again"
        return Pictures(
            of=of, count=len(self.captions), read=lambda i: read(self.path(guidance, i), self.size, way_out)
        )

    def write_captions(self, guidance: float) -> None:
        """Writes metadata.jsonl, which makes a captioned folder; a longer one, of a run with more captions, stays.
        Raises UserError where the images there have other captions."""
        path = self.path(guidance, 0).with_name("metadata.jsonl")
        lines = [json.dumps({"file_name": f"{i:05d}.png", "text": text}) for i, text in enumerate(self.captions)]
        kept = path.read_text(errors="replace").splitlines() if path.is_file() else []
        if any(a != b for a, b in zip(kept, lines, strict=False)):
            folder = str(path.parent)
            raise UserError(f"{folder!r} has pictures of other captions; delete that folder, or use another --out")
        if len(kept) < len(lines):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text("\n".join(lines) + "\n")
            os.replace(part, path)


def read(path: Path, size: int, way_out: str) -> Tensor:
    """uint8 (3, size, size). Raises UserError, with the way out, where the file is damaged."""
    try:
        return read_image(path, size)
    except ImageError as error:
        raise UserError(f"{error}; {way_out}") from None


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings into a new `out`. Raises UserError, naming the differences, where it was made with others."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; --out must be a folder")
    path = out / "settings.json"
    with processes().main_process_first():
        if not path.is_file():
            out.mkdir(parents=True, exist_ok=True)
            model_io.write_json(path, settings)
    old = {"guidance_rescale": 0.0} | model_io.read_json(path)  # older ones had none
    # the same weights under another path are the same model
    keys = [key for key in settings if key not in ("model", "parameters") and old.get(key) != settings[key]]
    if keys:
        changes = "; ".join(f"{key} {str(old.get(key))[:16]}, not {str(settings[key])[:16]}" for key in keys)
        raise UserError(f"{str(out)!r} has pictures made with {changes}; use another --out, or delete that folder")


def generate(
    pipe: Pipeline,
    pictures: PictureSet,
    guidance: Sequence[float],
    settings: dict[str, Any],
    batch_size: int,
    text: str,
) -> None:
    """Samples the missing images of a set; image i has the seed `settings["seed"] + i`. Several processes share the
    batches that one process would make."""
    group = processes()
    with group.main_process_first():
        for g in guidance:
            pictures.write_captions(g)
    runs = [(g, run) for g in guidance for run in _runs(pictures.missing(g), batch_size)]
    group.wait_for_everyone()  # all processes have seen what is missing before one of them makes it
    runs = runs[group.process_index :: group.num_processes]
    total, first = sum(len(run) for _, run in runs), settings["seed"]
    with tqdm(total=total, desc=text, unit="picture", disable=not (runs and group.is_main_process)) as bar:
        for g, run in runs:
            prompts, options = [pictures.captions[i] for i in run], {key: settings[key] for key in SAMPLING}
            options |= {"guidance": g, "batch_size": batch_size, "seed": first + run[0]}
            for i, prompt, image in zip(run, prompts, pipe(prompts, **options), strict=True):
                metadata = {key: settings[key] for key in ("model", *SAMPLING)}
                metadata |= {"prompt": prompt, "guidance": g, "seed": first + i}
                part = pictures.path(g, i).with_suffix(".part")
                save_png(image, part, {key: str(value) for key, value in metadata.items()})
                os.replace(part, pictures.path(g, i))
            bar.update(len(run))
    group.wait_for_everyone()


def _runs(indices: Sequence[int], longest: int) -> Iterator[list[int]]:
    """Cuts rising indices into consecutive runs, as the seeds of a call of the pipeline are consecutive."""
    for _, group in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        yield from (run[start : start + longest] for start in range(0, len(run), longest))
