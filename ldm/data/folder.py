"""A user's folder of captioned pictures: whatever lies in it is either used or listed with the reason, once."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldm.config import UserError
from ldm.data.faults import SHARE, Faults, SampleError
from ldm.data.splits import SPLITS, check_split, named_split, select
from ldm.data.text import clean_captions, decode, parse_object, read_text
from ldm.images import LIMIT, SUFFIXES, ImageError, image_size, read_image

METADATA = "metadata.jsonl"
# Pictures too, though perhaps none that can be read here: they count as samples.
PICTURES = {*SUFFIXES, ".avif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tga", ".ico"}


class Entry(NamedTuple):
    """Captions of a picture, and the field `split` of its metadata."""

    captions: list[str]
    split: Any = None


class Folder:
    """Samples of one split of a folder of pictures, with captions in files, map-style.

    `folder[i]` -> {"image": uint8 (3, size, size), "captions": list[str], "key": str}; the key is the
    picture's name relative to `path`. Captions come from a `metadata.jsonl`, one line per picture: {"file_name":
    "a.png", "text": a string or a list of strings} (several lines for one picture add up), else from a
    `.txt` of the same name beside the picture, one caption per line. Sub-folders named after splits are the splits,
    each with a `metadata.jsonl` or `.txt` files; else the metadata's field `split` decides, else a hash of the
    captions. Linked sub-folders are read as well; hidden files and folders are not.

    Left out and listed in `faults`, up to a share `max_broken`: pictures without caption (unless `need_captions` is
    false: the list is then empty, and the name decides the split), that cannot be read or have more than `limit`
    pixels, as far as their headers tell, and lines of metadata that are broken or name a missing file or one outside
    the folder. Files that are no pictures are listed but not counted. Raises UserError beyond that share, and for a
    missing or empty folder or split.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        split: str = "train",
        seed: int = 0,
        limit: int = LIMIT,
        need_captions: bool = True,
        max_broken: float = SHARE,
    ) -> None:
        check_split(split)
        self.path, self.size, self.limit, self.faults = Path(path), size, limit, Faults(max_broken)
        if not self.path.is_dir():
            raise UserError(f"image folder {str(path)!r} does not exist")
        prefix = self._prefix(split)
        entries = find_pictures(self.path, prefix, need_captions, self.faults, limit)
        samples = [(name, *entry) for name, entry in entries.items()]
        if not prefix:
            samples = [samples[i] for i in select(samples, split, seed, self.faults)]
        if not samples:
            raise UserError(f"split {split!r} of {str(path)!r} is empty; add pictures to it")
        self.samples = [(name, captions) for name, captions, _ in samples]

    def _prefix(self, split: str) -> str:
        """The name of the sub-folder of a split with a slash, "" where sub-folders are no splits."""
        folders: dict[str, str] = {}
        names = sorted(name for name in os.listdir(self.path) if not name.startswith("."))
        for name in names:
            is_folder = (self.path / name).is_dir()
            named = named_split(name, f"sub-folder {name!r} of {str(self.path)!r}") if is_folder else ""
            if named and folders.setdefault(named, name) != name:
                raise UserError(f"{folders[named]!r} and {name!r} of {str(self.path)!r} are both {named}; keep one")
        if not folders:
            return ""
        if split not in folders:
            known = ", ".join(folders[name] for name in SPLITS if name in folders)
            raise UserError(f"{str(self.path)!r} has sub-folders {known} but no {split!r}; add it")
        for name in names:
            if name not in folders.values():
                self.faults.add(name, f"{name!r} lies beside the folders of the splits", counts=False)
        return f"{folders[split]}/"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, captions = self.samples[index]
        try:
            image = read_image(self.path / key, self.size, self.limit)
        except ImageError as error:
            raise SampleError(key, f"{error}; repair or remove it") from None
        return {"image": image, "captions": list(captions), "key": key}

    def captions(self, index: int) -> list[str]:
        """The captions of picture `index`, without reading it."""
        return list(self.samples[index][1])

    def identity(self, index: int) -> tuple[str, str]:
        """The key of picture `index`, and its size and modification time."""
        key = self.samples[index][0]
        stat = (self.path / key).stat()
        return key, f"{stat.st_size} {stat.st_mtime_ns}"


def captioned(root: Path) -> dict[str, list[str]]:
    """{name relative to `root`: captions, perhaps none} of every picture under a folder, in order of name.

    Raises UserError for no pictures, or one that cannot be read as far as its header tells.
    """
    return {name: entry.captions for name, entry in find_pictures(root, "", False, Faults(share=0), LIMIT).items()}


def find_pictures(root: Path, prefix: str, need_captions: bool, faults: Faults, limit: int) -> dict[str, Entry]:
    """The usable pictures in `root / prefix`, by name relative to `root`; all other files go into `faults`.

    Raises UserError for no pictures, or more faults than allowed.
    """
    files = sorted(os.path.relpath(file, root) for file in list_files(str(root / prefix), set()))
    metadata = [file for file in files if os.path.basename(file) == METADATA]
    described, broken = read_metadata(root, metadata)
    for name in sorted(described.keys() - {*files}):
        broken[name] = f"metadata names {name!r}, which is hidden or linked twice; name a visible file"
    names = [name for name in files if name in described or _suffix(name) in PICTURES and not _is_grid(root / name)]
    if not names and not broken:
        raise UserError(f"no pictures in {str(root / prefix)!r}; known kinds: {' '.join(SUFFIXES)}")
    for line, reason in broken.items():
        faults.add(line, reason, counts=need_captions)
    entries = {}
    for name in names:
        try:
            entry = described.get(name) or Entry(_captions_beside(root / name, need_captions))
            image_size(root / name, limit)
            entries[name] = entry
        except (SampleError, ImageError) as error:
            faults.add(name, str(error))
    faults.settle(len(names) + len(broken) * need_captions)
    texts = {os.path.splitext(name)[0] + ".txt" for name in names}
    for name in sorted({*files}.difference(names, metadata, texts)):
        suffix = _suffix(name)
        group, reason = name, "belongs to no picture" if suffix == ".txt" else "is a grid of other pictures"
        if suffix not in {".txt", *PICTURES}:
            group, reason = f"{prefix}*{suffix}", f"is of a kind that is not read; known kinds: {' '.join(SUFFIXES)}"
        faults.add(group, f"{name!r} {reason}", counts=False)
    return entries


def list_files(folder: str, visited: set[str]) -> Iterator[str]:
    """All files under a folder that are not hidden. Links are followed, each folder is read once."""
    real = os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    for entry in sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name)):
        if not entry.name.startswith("."):
            if entry.is_dir():
                yield from list_files(entry.path, visited)
            else:
                yield entry.path


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def read_metadata(root: Path, files: list[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The pictures that metadata files under `root` describe, and {line: reason} of lines that are wrong."""
    entries: dict[str, Entry] = {}
    broken: dict[str, str] = {}
    for file in files:
        for number, line in enumerate((root / file).read_bytes().split(b"\n"), start=1):
            where = f"{file} line {number}"
            try:
                if text := decode(line, where).strip():
                    name, entry = _parse_line(parse_object(text, where), root, PurePosixPath(file).parent, where)
                    known = entries.get(name, Entry([]))
                    captions = [*dict.fromkeys(known.captions + entry.captions)]
                    entries[name] = Entry(captions, entry.split or known.split)
            except UserError as error:
                broken[where] = str(error)
    return entries, broken


def _parse_line(fields: dict[str, Any], root: Path, folder: PurePosixPath, where: str) -> tuple[str, Entry]:
    """The picture that a line of metadata in `root / folder` describes."""
    value = fields.get("file_name")
    if not isinstance(value, str) or "text" not in fields:
        raise UserError(f"{where} needs a 'file_name' and a 'text', one string or a list")
    name = PurePosixPath(value.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise UserError(f"{where} names {value!r}, outside the folder; only names inside it are read")
    if not os.path.isfile(root / folder / name):  # unlike Path.is_file, never raises
        raise UserError(f"{where} names {value!r}, which does not exist; add the file or drop the line")
    return (folder / name).as_posix(), Entry(clean_captions(fields["text"], where), fields.get("split"))


def _captions_beside(picture: Path, needed: bool) -> list[str]:
    file = picture.with_suffix(".txt")
    try:
        if file.is_file() and (text := read_text(file)).strip():
            return clean_captions(text.split("\n"), str(file))
        raise UserError(f"picture {str(picture)!r} has no caption; write {file.name!r} or add {METADATA}")
    except UserError as error:
        if needed:
            raise SampleError(picture.name, str(error)) from None
        return []


def _is_grid(file: Path) -> bool:
    """Whether sample.py wrote a picture as a grid of others: its first text chunk is "grid", or (in older ones) it is
    grid.png beside numbered pictures."""
    if file.suffix.lower() != ".png" or not file.is_file():
        return False
    with file.open("rb") as stream:
        return b"iTXtgrid\0" in stream.read(64) or file.name == "grid.png" and any(file.parent.glob("0000*.png"))
