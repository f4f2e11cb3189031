"""The models that the page offers."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldm.config import UserError
from ldm.model_io import ASSETS, find_root
from ldm.pipeline import Pipeline

PASSES = 3000  # of a model that a page samples with, about: 100 pictures
GUIDANCE = 3.0  # to begin with


def usual(pipe: Pipeline) -> dict[str, Any]:
    """Steps and guidance of a model on the page, where nothing else is chosen."""
    return pipe.defaults if pipe.unet.distilled_steps else pipe.defaults | {"guidance": GUIDANCE}


class Models:
    """Pipelines and low-rank adapters by the names under which the page offers them; the last two opened stay open."""

    def __init__(
        self, folders: Mapping[str, str], device: str = "cpu", adapters: Sequence[str] = (), dtype: str = "auto"
    ) -> None:
        self.folders, self.names, self.placement = dict(folders), list(folders), (device, dtype)
        self.adapters = {Path(file).stem: file for file in adapters}
        self._open = lru_cache(maxsize=2)(self._merge)

    def __getitem__(self, name: str) -> Pipeline:
        """Raises UserError unless the page offers `name`: browsers choose names, never folders of this machine."""
        return self.merged(name)

    def merged(self, name: str, adapters: Sequence[str] = (), weight: float = 1.0) -> Pipeline:
        """The model with `weight` times each of the adapters; raises UserError for one that does not fit, too."""
        for kind, asked, known in (("model", [name], self.folders), ("adapter", adapters, self.adapters)):
            for unknown in set(asked) - known.keys():
                raise UserError(f"unknown {kind} {str(unknown)[:80]!r}; known: {', '.join(known)}")
        return self._open(name, tuple(adapters), weight if adapters else 1.0)

    def _merge(self, name: str, adapters: tuple[str, ...], weight: float) -> Pipeline:
        pipe = Pipeline.from_pretrained(self.folders[name], *self.placement)
        for adapter in adapters:
            pipe.load_lora(self.adapters[adapter], weight)
        return pipe.compile(passes=PASSES)

    def defaults(self, name: str) -> dict[str, Any]:
        """Steps and guidance to begin with."""
        return usual(self[name])

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
