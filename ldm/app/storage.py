"""The folder of finished pictures."""

import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm.config import UserError
from ldm.images import save_png

NAME = re.compile(r"[a-z0-9-]{1,60}-[0-9a-f]{16}\.png")


class Pictures:
    """PNGs under `folder`, each with its settings in its text chunks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, images: Sequence[Image.Image], metadata: Sequence[dict[str, str]]) -> list[str]:
        """Writes each image with its metadata and returns the paths."""
        paths = []
        for image, texts in zip(images, metadata, strict=True):
            words = re.sub("[^a-z0-9]+", "-", f"{texts['prompt'][:40]} {texts['seed']}".lower()).strip("-")
            paths.append(self.folder / f"{words}-{secrets.token_hex(8)}.png")
            save_png(image, paths[-1], texts)
        return [str(path) for path in paths]

    def existing(self, paths: object) -> list[str]:
        """The paths of those files, which a browser names, that are pictures of this folder."""
        names = [Path(path).name for path in paths if isinstance(path, str)] if isinstance(paths, list) else []
        return [str(self.folder / name) for name in names if NAME.fullmatch(name) and (self.folder / name).is_file()]

    def find(self, path: str | None) -> str:
        """The finished picture that the page shows under this path. Raises UserError for a preview."""
        if not (paths := self.existing([path])):
            raise UserError("that is a preview, or it was deleted; choose a finished picture")
        return paths[0]
