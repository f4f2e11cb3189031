"""The folder of finished pictures."""

import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from ldm.config import UserError
from ldm.images import read_metadata, save_png


class Pictures:
    """PNGs under `folder`, each with its settings in its text chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, images: Iterable[Image.Image], metadata: Iterable[dict[str, str]]) -> list[str]:
        """Writes each image with its metadata and returns the paths."""
        paths = []
        for image, texts in zip(images, metadata, strict=True):
            words = re.sub("[^a-z0-9]+", "-", f"{texts['prompt'][:40]} {texts['seed']}".lower()).strip("-")
            paths.append(self.folder / f"{words}-{secrets.token_hex(8)}.png")
            save_png(image, paths[-1], texts)
        return [str(path) for path in paths]

    def existing(self, paths: Sequence[str]) -> list[str]:
        """Those of the files, which a browser names, that are in this folder, whatever folder it names."""
        files = [self.folder / Path(path).name for path in paths]
        return [str(file) for file in files if file.is_file()]

    def captioned(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        """(file, prompt) of those that `existing` returns."""
        return [(file, read_metadata(file)["prompt"]) for file in self.existing(paths)]

    def find(self, path: str | None) -> str:
        """The finished picture of this path. Raises UserError where there is none."""
        for file in self.existing([path or ""]):
            return file
        raise UserError("mark a finished picture first")
