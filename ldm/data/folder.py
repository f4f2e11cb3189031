"""A user's folder of captioned pictures: whatever lies in it is either used or listed with the reason, once."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.config import UserError
from ldm.data.config import DataConfig
from ldm.data.faults import Faults, read_picture
from ldm.data.splits import Samples, named_split, select
from ldm.data.text import clean_captions, decode, read_text
from ldm.images import LIMIT, SUFFIXES, ImageError, image_size
from ldm.model_io import parse_object

METADATA = "metadata.jsonl"
# Pictures too, though perhaps none that can be read here: they count as samples.
PICTURES = {*SUFFIXES, ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tga", ".ico"}


class Folder:
    """Samples of one split of a folder of pictures, with captions in files, map-style.

    `folder[i]` -> {"image": uint8 (3, size, size), "captions": list[str], "key": str}; the key is the
    picture's name relative to the folder. Captions come from a `metadata.jsonl`, one line per picture: {"file_name":
    "a.png", "text": a string or a list of strings} (several lines for one picture add up), else from a
    `.txt` of the same name beside the picture, one caption per line. Sub-folders named after splits are the splits,
    each with a `metadata.jsonl` or `.txt` files; else the metadata's field `split` decides, else a hash of the
    captions. Linked sub-folders are read as well; hidden files and folders are not.

    Left out and listed in `faults`, up to the share `max_broken`: pictures without caption (unless `need_captions` is
    false: the list is then empty, and the name decides the split), that cannot be read or have more than `max_pixels`,
    as far as their headers tell, and lines of metadata that are broken or name a missing file or one outside the
    folder. Files that are no pictures are listed but not counted. Raises UserError beyond that share, and for a missing
    or empty folder or a missing split.
    """

    def __init__(self, config: DataConfig, split: str, need_captions: bool) -> None:
        self.config, self.size = config, config.size
        self.path, self.faults = Path(config.path), Faults(config.max_broken)
        if not self.path.is_dir():
            raise UserError(f"image folder {config.path!r} does not exist")
        prefix = self._prefix(split)
        samples = find_samples(self.path, prefix, need_captions, self.faults, config.max_pixels)
        names = samples if prefix else select(samples, split, config.seed, self.faults)
        self.samples = [(name, samples[name]["captions"]) for name in names]

    def _prefix(self, split: str) -> str:
        """The name of the sub-folder of a split with a slash, "" where sub-folders are no splits."""
        folders: dict[str, str] = {}
        names = sorted(name for name in os.listdir(self.path) if not name.startswith("."))
        for name in names:
            if (self.path / name).is_dir() and (named := named_split(name, f"sub-folder {str(self.path / name)!r}")):
                if named in folders:
                    raise UserError(f"{folders[named]!r} and {name!r} of {str(self.path)!r} are both {named}; keep one")
                folders[named] = name
        if not folders:
            return ""
        if split not in folders:
            known = ", ".join(folders.values())
            raise UserError(f"{str(self.path)!r} has sub-folders {known} but no {split!r}; add it")
        for name in names:
            if name not in folders.values():
                self.faults.add(name, f"{name!r} lies beside the folders of the splits", counts=False)
        return f"{folders[split]}/"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, captions = self.samples[index]
        return {"image": read_picture(self.path / key, self.config, key), "captions": captions, "key": key}

    def captions(self, index: int) -> list[str]:
        """The captions of picture `index`, without reading it."""
        return self.samples[index][1]

    def identity(self, index: int) -> tuple[str, str]:
        """The key of picture `index`, and its size and modification time."""
        key = self.samples[index][0]
        stat = (self.path / key).stat()
        return key, f"{stat.st_size} {stat.st_mtime_ns}"


def captioned(root: Path) -> dict[str, list[str]]:
    """{name relative to `root`: captions, perhaps none} of every picture under a folder, in order of name.

    Warns of all else in it. Raises UserError if there are no pictures, or the header of one cannot be read.
    """
    faults = Faults(share=0)
    samples = find_samples(root, "", False, faults, LIMIT)
    if reasons := [*faults.reasons.values()]:
        warnings.warn(f"left out of {str(root)!r}: {reasons[0]} ({len(reasons)} in all)", stacklevel=2)
    return {name: sample["captions"] for name, sample in samples.items()}


def find_samples(root: Path, prefix: str, need_captions: bool, faults: Faults, limit: int) -> Samples:
    """The usable pictures in `root / prefix` by name, in order; all other files go into `faults`.

    Raises UserError if there are no pictures, or more faults than allowed.
    """
    files = dict.fromkeys(sorted(list_files(root, prefix, set())))
    metadata = [name for name in files if os.path.basename(name) == METADATA and (root / name).is_file()]
    described, broken = read_metadata(root, metadata, files)
    pictures = [name for name in files if name in described or _suffix(name) in PICTURES and not _is_grid(root / name)]
    if not pictures:
        raise UserError(f"no pictures in {str(root / prefix)!r}; known kinds: {' '.join(SUFFIXES)}")
    for name in {*pictures} - described.keys() - broken.keys():
        try:
            if (text := _text(name)) in files:
                described[name] = {"captions": clean_captions(read_text(root / text).split("\n"), text)}
        except UserError as error:
            broken[name] = str(error)
    if not need_captions:
        described = {name: {"captions": []} for name in pictures} | described
    samples: Samples = {}
    for name in sorted({*pictures, *broken}):
        if name not in described:
            missing = f"picture {str(root / name)!r} has no caption; write {_text(name)!r} or add {METADATA}"
            faults.add(name, broken.get(name, missing), counts=need_captions)
            continue
        try:
            image_size(root / name, limit)
            samples[name] = described[name]
        except ImageError as error:
            faults.add(name, str(error))
    faults.settle(len(samples) + len(faults.samples))
    used = {*pictures, *map(_text, pictures), *metadata}
    for name in files:
        if name not in used:
            group = name if _suffix(name) in (".txt", *PICTURES) else f"{prefix}*{_suffix(name)}"
            reason = f"{name!r} is no picture ({' '.join(SUFFIXES)}), no text of one, or a grid of others"
            faults.add(group, reason, counts=False)
    return samples


def list_files(root: Path, prefix: str, visited: set[str]) -> Iterator[str]:
    """The names relative to `root` of all files in `root / prefix` that are not hidden. Links are followed, each folder
    is read once."""
    real = os.path.realpath(root / prefix)
    if real in visited:
        return
    visited.add(real)
    for entry in sorted(os.scandir(real), key=lambda entry: (entry.is_symlink(), entry.name)):
        if not entry.name.startswith("."):
            if entry.is_dir():
                yield from list_files(root, f"{prefix}{entry.name}/", visited)
            else:
                yield prefix + entry.name


def read_metadata(root: Path, metadata: list[str], files: dict[str, None]) -> tuple[Samples, dict[str, str]]:
    """The pictures that lines describe; and {picture: reason} of broken lines, under the line's name where it names
    no picture, or one that other lines describe."""
    described: Samples = {}
    broken = []
    for file in metadata:
        for number, data in enumerate((root / file).read_bytes().split(b"\n"), start=1):
            name = line = f"{file} line {number}"
            try:
                if text := decode(data, line).strip():
                    fields = parse_object(text, line)
                    name = _picture(fields, PurePosixPath(file).parent, files, line)
                    before, captions = described.get(name, {}), clean_captions(fields["text"], line)
                    captions = [*dict.fromkeys(before.get("captions", []) + captions)]
                    described[name] = {"captions": captions, "split": fields.get("split") or before.get("split")}
            except UserError as error:
                broken.append((line, name, str(error)))
    return described, {line if name in described else name: reason for line, name, reason in broken}


def _picture(fields: dict[str, Any], folder: PurePosixPath, files: dict[str, None], line: str) -> str:
    """The file that a line of metadata in `folder` names."""
    value = fields.get("file_name")
    if not isinstance(value, str) or "text" not in fields:
        raise UserError(f"{line} needs a 'file_name' and a 'text', one string or a list")
    for name in (value, value.replace("\\", "/")):
        if str(folder / name) in files:
            return str(folder / name)
    raise UserError(f"{line} names {value!r}, which does not exist in the folder, or is hidden or linked twice")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _text(picture: str) -> str:
    return os.path.splitext(picture)[0] + ".txt"


def _is_grid(file: Path) -> bool:
    """Whether sample.py wrote a picture as a grid of others: its first text chunk is "grid", or (in older ones) it is
    grid.png beside numbered pictures."""
    if file.suffix.lower() != ".png" or not file.is_file():
        return False
    with file.open("rb") as stream:
        return b"iTXtgrid\0" in stream.read(64) or file.name == "grid.png" and any(file.parent.glob("0000*.png"))
