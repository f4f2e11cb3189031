"""The pictures that an evaluation makes and keeps: DIR/<set>/g<guidance>/00000.png, beside a metadata.jsonl."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ldm import model_io as weights
from ldm.config import UserError
from ldm.distributed import processes
from ldm.pipeline import Pipeline

SETTINGS = "settings.json"
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} pictures [{elapsed}<{remaining}, {rate_fmt}]"


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """Captions and where their pictures are kept, for each guidance."""

    folder: Path
    captions: list[str]
    size: int  # pixels a side

    def path(self, guidance: float, index: int) -> Path:
        """The file of one picture."""
        return self.folder / f"g{guidance:g}" / f"{index:05d}.png"

    def missing(self, guidance: float) -> list[int]:
        """Indices of the pictures still to be made."""
        return [i for i in range(len(self.captions)) if not self.path(guidance, i).is_file()]

    def array(self, guidance: float, index: int) -> np.ndarray:
        """One picture, uint8 (size, size, 3); UserError when the file is damaged or of another size."""
        path = self.path(guidance, index)
        way_out = "delete it, and the same command remakes it"
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if image.size != (self.size, self.size):
                    width, height = image.size
                    raise UserError(
                        f"picture {str(path)!r} is {width}x{height} px, not {self.size}x{self.size}; {way_out}"
                    )
                return np.asarray(image.convert("RGB"))
        except (UserError, MemoryError):
            raise
        except Exception:  # decoders given broken bytes raise nearly anything
            raise UserError(f"picture {str(path)!r} cannot be read; {way_out}") from None

    def write_captions(self, guidance: float) -> None:
        """`metadata.jsonl`, a line a picture, so that the folder is a captioned one; a longer one, of a run with more
        captions, is kept. UserError where the pictures there are of other captions."""
        path = self.path(guidance, 0).with_name("metadata.jsonl")
        lines = [json.dumps({"file_name": f"{i:05d}.png", "text": t}) for i, t in enumerate(self.captions)]
        kept = path.read_text(errors="replace").splitlines() if path.is_file() else []
        if any(a != b for a, b in zip(kept, lines, strict=False)):
            raise UserError(
                f"{str(path.parent)!r} has pictures of other captions; delete that folder, or use another --out"
            )
        if len(kept) < len(lines):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".tmp")
            part.write_text("\n".join(lines) + "\n")
            os.replace(part, path)  # a stop leaves no half of it, which would be of other captions


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Notes the settings in a new `out`; UserError, naming the differences, where one has pictures of others."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; --out must be a folder")
    with processes().main_process_first():
        if not (out / SETTINGS).is_file():
            out.mkdir(parents=True, exist_ok=True)
            weights.write_json(out / SETTINGS, settings)
    old = {"guidance_rescale": 0.0} | weights.read_json(out / SETTINGS)  # older ones had none
    # the same weights under another path are the same model
    keys = [key for key in settings if key not in ("model", "parameters") and old.get(key) != settings[key]]
    if keys:
        changes = "; ".join(f"{key} {_short(old.get(key))}, not {_short(settings[key])}" for key in keys)
        raise UserError(f"{str(out)!r} has pictures made with {changes}; use another --out, or delete that folder")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def generate(
    pipe: Pipeline,
    sets: Iterable[PictureSet],
    guidance: Sequence[float],
    settings: dict[str, Any],
    batch_size: int,
    text: str = "generating",
) -> None:
    """Makes the pictures that are not there yet; picture i of a set has the seed `settings["seed"] + i`. Several
    processes make whole batches each, those that one would make."""
    sets, place = list(sets), processes()
    with place.main_process_first():
        for made, g in itertools.product(sets, guidance):
            made.write_captions(g)
    todo = [(made, g, run) for made in sets for g in guidance for run in _runs(made.missing(g), batch_size)]
    place.wait_for_everyone()  # all have seen what is missing before one makes some of it
    todo = todo[place.process_index :: place.num_processes]
    if todo:
        _generate(pipe, todo, settings, batch_size, text)
    place.wait_for_everyone()


def _generate(
    pipe: Pipeline,
    todo: list[tuple[PictureSet, float, list[int]]],
    settings: dict[str, Any],
    batch_size: int,
    text: str,
) -> None:
    """Makes the pictures of each set, guidance and run of indices, one run at a time."""
    total, quiet = sum(len(run) for *_, run in todo), not processes().is_main_process
    with tqdm(total=total, desc=text, bar_format=BAR, disable=quiet) as bar:
        for made, g, run in todo:
            images = pipe(
                [made.captions[i] for i in run],
                guidance=g,
                guidance_rescale=settings["guidance_rescale"],
                steps=settings["steps"],
                sampler=settings["sampler"],
                seed=settings["seed"] + run[0],
                batch_size=batch_size,
                # no more than is left: steps of a picture do not add up to quite 1
                callback=lambda progress: bar.update(min(len(progress.z_t) / progress.steps, bar.total - bar.n)),
            )
            for i, image in zip(run, images, strict=True):
                about = {key: settings[key] for key in ("model", "sampler", "steps", "guidance_rescale")}
                about |= {"prompt": made.captions[i], "guidance": g, "seed": settings["seed"] + i}
                _save(image, made.path(g, i), about)


def _runs(indices: Sequence[int], longest: int) -> Iterator[list[int]]:
    """Cuts rising indices into runs without gaps, as a pipeline's seeds are consecutive."""
    run: list[int] = []
    for i in indices:
        if run and (i != run[-1] + 1 or len(run) == longest):
            yield run
            run = []
        run.append(i)
    if run:
        yield run


def _save(image: Image.Image, path: Path, about: dict[str, Any]) -> None:
    """Renames the finished file into place: a picture that is there is whole."""
    info = PngInfo()
    for key, value in about.items():
        info.add_itxt(key, str(value))
    part = path.with_suffix(".part")
    image.save(part, "PNG", pnginfo=info)
    os.replace(part, path)
