"""Pairs of pictures of one prompt, of which people or a scorer prefer one."""

from pathlib import Path
from typing import Any

import torch

from ldm.config import UserError
from ldm.data.config import DataConfig
from ldm.data.faults import Faults, SampleError, read_picture
from ldm.data.splits import select
from ldm.data.text import clean_captions, read_text
from ldm.model_io import parse_object

FILES = ("chosen", "rejected")


class Pairs:
    """Samples of one split of a JSONL file, map-style: a line has "prompt" and the pictures "chosen" and "rejected",
    relative to the file's folder or to the one above, as the page exports them, and perhaps "split".

    `pairs[i]` -> {"image": uint8 (2, 3, size, size), the chosen one first, "captions": [prompt], "key": str}. Left out
    and listed in `faults`, up to the share `max_broken`: lines that are broken, without a prompt or of pictures that
    are gone or equal. Raises UserError beyond that share and for a missing file.
    """

    def __init__(self, config: DataConfig, split: str, need_captions: bool) -> None:
        self.config, self.size, self.faults = config, config.size, Faults(config.max_broken)
        path, samples = Path(config.path), {}
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                name = f"line {number} of {path.name!r}"
                try:
                    samples[name] = read_pair(path, line, name)
                except UserError as error:
                    self.faults.add(name, str(error))
        self.faults.settle(len(samples) + len(self.faults.samples))
        self.samples = [(name, samples[name]) for name in select(samples, split, config.seed, self.faults)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, sample = self.samples[index]
        pictures = [read_picture(file, self.config, f"{file.name} in {name}") for file in sample["files"]]
        return {"image": torch.stack(pictures), "captions": sample["captions"], "key": name}

    def captions(self, index: int) -> list[str]:
        """The prompt of pair `index`, in a list."""
        return self.samples[index][1]["captions"]


def read_pair(path: Path, line: str, name: str) -> dict[str, Any]:
    """The captions, files and perhaps split of a line. Raises UserError for one that is no pair."""
    fields, files = parse_object(line, name), []
    for key in FILES:
        paths = [folder / str(fields.get(key)) for folder in (path.parent, path.parent.parent)]
        files += [file for file in paths if file.is_file()][:1]
    if len(files) < len(FILES):
        raise SampleError(name, f"{name} must name two pictures that exist, as 'chosen' and 'rejected'")
    if files[0].read_bytes() == files[1].read_bytes():
        raise SampleError(name, f"{name} has the same picture twice, which says nothing")
    return {"captions": clean_captions(fields.get("prompt"), name), "files": files, "split": fields.get("split")}
