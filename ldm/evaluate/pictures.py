"""The images of an evaluation. Those that it makes are kept: OUT/<set>/g<guidance>/00000.png and metadata.jsonl."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config import UserError
from ldm.distributed import processes
from ldm.images import read_image, save_png
from ldm.model_io import atomic_write, read_json, write_json
from ldm.pipeline import Pipeline

SAMPLING = ("guidance_rescale", "steps", "sampler", "seed")  # settings that every record of samples carries


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Images of one source, which records call `of`; `read(i)` is image i as uint8 (3, H, W)."""

    of: str
    count: int
    read: Callable[[int], Tensor]
    sampling: dict[str, Any] = field(default_factory=dict)  # the settings they were sampled with

    @property
    def labels(self) -> dict[str, Any]:
        """The fields that every record of these images carries."""
        return {"of": self.of, **self.sampling}

    def batch(self, start: int, size: int) -> Tensor:
        """Images from `start` on, uint8 (B, 3, H, W), at most `size`."""
        return torch.stack([self.read(i) for i in range(start, min(start + size, self.count))])

    def batches(self, size: int) -> Iterator[Tensor]:
        return (self.batch(start, size) for start in range(0, self.count, size))


def of_files(of: str, paths: Sequence[Path], size: int, **sampling: Any) -> Pictures:
    """Images from files, at `size` pixels. Reading raises ImageError for a damaged one."""
    return Pictures(of=of, count=len(paths), read=lambda i: read_image(paths[i], size), sampling=sampling)


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings into a new `out`. Raises UserError, naming the differences, where it was made with others."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{str(out)!r} is a file; --out must be a folder")
    path = out / "settings.json"
    with processes().main_process_first():
        if not path.is_file():
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
    old = {"guidance_rescale": 0.0} | read_json(path)  # older ones had none
    # the same weights under another path are the same model
    keys = [key for key in settings if key not in ("model", "parameters") and old.get(key) != settings[key]]
    if keys:
        changes = "; ".join(f"{key} {str(old.get(key))[:16]}, not {str(settings[key])[:16]}" for key in keys)
        raise UserError(f"{str(out)!r} has pictures made with {changes}; use another --out, or delete that folder")


def sample(
    pipe: Pipeline,
    folder: Path,
    captions: list[str],
    guidance: Sequence[float],
    settings: dict[str, Any],
    batch_size: int,
    of: str = "samples",
) -> dict[float, Pictures]:
    """One image per caption, by guidance; those that `folder` lacks are sampled, image i with `settings["seed"] + i`.

    A batch is made where one of its images is missing; several processes share the batches.
    """
    group, sampling = processes(), {key: settings[key] for key in SAMPLING}
    paths = {g: [folder / f"g{g:g}" / f"{i:05d}.png" for i in range(len(captions))] for g in guidance}
    starts = [(g, start) for g in guidance for start in range(0, len(captions), batch_size)]
    missing = [(g, i) for g, i in starts if not all(path.is_file() for path in paths[g][i : i + batch_size])]
    group.wait_for_everyone()  # all processes have seen what is missing before one of them makes it
    if group.is_main_process:
        for g in guidance:
            _write_captions(folder / f"g{g:g}", captions)
    group.wait_for_everyone()
    batches = missing[group.process_index :: group.num_processes]
    quiet = not (batches and group.is_main_process)
    for g, start in tqdm(batches, desc=f"sampling, {of}", unit="batch", disable=quiet):
        options, seed = sampling | {"guidance": g}, settings["seed"] + start
        prompts = captions[start : start + batch_size]
        images = pipe(prompts, batch_size=batch_size, **options | {"seed": seed})
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            path, metadata = paths[g][start + i], {"model": settings["model"], "prompt": prompt, **options}
            if not path.is_file():
                with atomic_write(path) as temporary:
                    save_png(image, temporary, {k: str(v) for k, v in (metadata | {"seed": seed + i}).items()})
    group.wait_for_everyone()
    return {g: of_files(of, paths[g], settings["size"], guidance=g, **sampling) for g in guidance}


def _write_captions(folder: Path, captions: list[str]) -> None:
    """Writes metadata.jsonl, which makes a captioned folder; a longer one, of a run with more captions, stays."""
    path = folder / "metadata.jsonl"
    if not path.is_file() or len(path.read_text().splitlines()) < len(captions):
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"file_name": f"{i:05d}.png", "text": text}) for i, text in enumerate(captions)]
        with atomic_write(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
