"""The models that the page offers."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.config import UserError
from ldm.model_io import ASSETS, find_root
from ldm.pipeline import Pipeline


class Models:
    """Pipelines by the name under which the page offers them; the last two stay open."""

    def __init__(self, folders: Mapping[str, str], device: Any = "cpu") -> None:
        self.folders, self.names = dict(folders), list(folders)
        self._open = lru_cache(maxsize=2)(lambda name: Pipeline.from_pretrained(self.folders[name], device))

    def __getitem__(self, name: str) -> Pipeline:
        """Raises UserError unless the page offers `name`: browsers choose names, never folders of this machine."""
        if name not in self.folders:
            raise UserError(f"unknown model {str(name)[:80]!r}; known: {', '.join(self.names)}")
        return self._open(name)

    def examples(self, name: str) -> list[list[str]]:
        """The prompts in a model's `examples.txt`, a line each; rows of one column."""
        file = find_root(self.folders[name]) / "examples.txt"
        return [[line] for line in file.read_text("utf-8").splitlines()] if file.is_file() else []


def find_models(given: Sequence[str] = ()) -> dict[str, str]:
    """{name: shipped name or folder} of the given models, by default the shipped ones and finished runs in runs/.
    A folder outside of the working directory is called by its last part, where no other is."""
    shipped = sorted(folder.name for folder in ASSETS.iterdir() if folder.is_dir())
    runs = sorted(str(f.parent) for pattern in ("*", "*/*") for f in Path("runs").glob(f"{pattern}/model_index.json"))
    models: dict[str, str] = {}
    for folder in given or [*shipped, *runs]:
        path = Path(folder)
        name = path.resolve().name if path.is_absolute() or ".." in path.parts else folder
        models[folder if name in models else name] = folder
    return models
