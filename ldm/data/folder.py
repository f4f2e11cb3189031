"""A user's folder of captioned pictures."""

import os
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.config import UserError
from ldm.data.captions import captions_of, decode, parse_object
from ldm.data.faults import SHARE, Faults, SampleError, Tolerant
from ldm.data.splits import SPLITS, assign, caption_group
from ldm.images import LIMIT, SUFFIXES, ImageError, read_image

METADATA = "metadata.jsonl"


class Folder(Tolerant):
    """Samples of one split of a folder of pictures, with captions in files, map-style.

    `folder[i]` -> {"image": uint8 (3, size, size), "captions": list[str], "key": str}; the key is the
    picture's name relative to `path`. Captions come from `metadata.jsonl`, a line a picture: {"file_name":
    "a.png", "text": a string or a list of strings} (several lines for one picture add up), else from a
    `.txt` of the same name beside the picture, a caption a line. Sub-folders `train`, `val` and `test`,
    where there are any, are the splits, each with a `metadata.jsonl` or `.txt` files of its own; else
    pictures are split by a hash of their captions (`splits.assign`). Hidden files and folders are passed
    over. Left out and noted in `faults`, up to a share `max_broken`: a picture without caption (unless
    `need_captions` is false: its list is then empty, and its name decides its split), a line of metadata that is
    broken, names a missing file or one outside the folder, and (on reading) a picture that cannot be read or has
    more than `limit` pixels. UserError beyond that share, and for a missing or empty folder or split.
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        split: str = "train",
        seed: int = 0,
        val: float = 0.02,
        test: float = 0.08,
        limit: int = LIMIT,
        need_captions: bool = True,
        max_broken: float = SHARE,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
        self.path, self.size, self.limit = Path(path), size, limit
        if not self.path.is_dir():
            raise UserError(f"image folder {str(path)!r} does not exist")
        named = [name for name in SPLITS if (self.path / name).is_dir()]
        if named and split not in named:
            raise UserError(f"{str(path)!r} has sub-folders {', '.join(named)} but no {split!r}; add it")
        root = self.path / split if named else self.path
        self.faults = Faults(max_broken)
        found = captioned(root, need_captions, self.faults, f"{split}/" if named else "")
        if not named:
            splits = assign([caption_group(captions) or key for key, captions in found.items()], seed, val, test)
            found = {key: found[key] for key, name in zip(found, splits, strict=True) if name == split}
        if not found:
            raise UserError(
                f"split {split!r} of {str(path)!r} is empty; add pictures, raise its share,"
                " or sort them into sub-folders train, val and test"
            )
        self.samples = [((root / key).relative_to(self.path).as_posix(), captions) for key, captions in found.items()]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> dict[str, Any]:
        """Sample `index` itself (SampleError)."""
        key, captions = self.samples[index]
        try:
            image = read_image(self.path / key, self.size, self.limit)
        except ImageError as error:
            raise SampleError(key, f"{error}; repair or remove it") from None
        return {"image": image, "captions": list(captions), "key": key}

    def read_captions(self, index: int) -> list[str]:
        """The captions of picture `index`, without reading it."""
        return list(self.samples[index][1])


def captioned(
    root: Path, need_captions: bool = True, faults: Faults | None = None, prefix: str = ""
) -> dict[str, list[str]]:
    """{name relative to `root`: captions} of every picture under a folder, in order of name.

    Where captions are needed, pictures without one and broken lines of metadata are left out and noted in `faults`
    (without it, none may be) under their name after `prefix`. A line that does not tell its picture is noted with a
    picture that has no caption, where there is one: one mistake counts once. UserError for no pictures, or more faults
    than allowed.
    """
    faults = Faults(share=0) if faults is None else faults
    captions, broken = read_metadata(root / METADATA) if (root / METADATA).is_file() else ({}, {})
    names = sorted(captions.keys() | set(_pictures(root)))
    if not names and not broken:
        raise UserError(f"no pictures in {str(root)!r}; known kinds: {' '.join(SUFFIXES)}")
    without: dict[str, str] = {}
    for name in names:
        try:
            captions[name] = captions.get(name) or _beside(root / name)
            if not captions[name]:
                text = PurePosixPath(name).with_suffix(".txt")
                without[name] = f"picture {str(root / name)!r} has no caption; write {str(text)!r} or add {METADATA}"
        except UserError as error:
            captions[name], without[name] = [], str(error)
    if not need_captions:
        if broken:
            warnings.warn(
                f"{len(broken)} lines of metadata are passed over: {next(iter(broken.values()))}", stacklevel=2
            )
        faults.settle(len(names))
        return {name: captions[name] for name in names}
    unread = list(broken.items())
    for name, why in without.items():
        line = f" ({unread.pop(0)[1]})" if unread else ""
        faults.add(prefix + name, why + line)
    for name, why in unread:
        faults.add(prefix + name, why)
    faults.settle(len(names) + len(unread))
    return {name: captions[name] for name in names if name not in without}


def read_metadata(file: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """{file_name: captions} of a `metadata.jsonl`, and {line: why} of lines that are wrong."""
    found: dict[str, list[str]] = {}
    broken: dict[str, str] = {}
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{str(file)!r} line {number}"
            try:
                if text := decode(line, where).strip():
                    name, captions = _entry(parse_object(text, where), file.parent, where)
                    found[name] = list(dict.fromkeys(found.get(name, []) + captions))
            except UserError as error:
                broken[f"{METADATA} line {number}"] = str(error)
    return found, broken


def _entry(fields: dict[str, Any], folder: Path, where: str) -> tuple[str, list[str]]:
    """The picture that a line is about, and its captions."""
    name = _safe_name(fields.get("file_name"), where)
    if not os.path.isfile(folder / name):  # unlike Path.is_file, never raises
        raise UserError(f"{where} names {name!r}, which does not exist; add the file or drop the line")
    if "text" not in fields:
        raise UserError(f"{where} has no 'text'; give {name!r} a string or a list of strings")
    return name, captions_of(fields["text"], where)


def _safe_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} has no 'file_name'; give the picture's name relative to the folder")
    name = PurePosixPath(value)
    if name.is_absolute() or ".." in name.parts or "\\" in value or "\0" in value:
        raise UserError(f"{where} names {value!r}, outside the folder; only names inside it are read")
    return name.as_posix()


def _pictures(root: Path) -> list[str]:
    paths = [path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in SUFFIXES]
    return [p.as_posix() for p in paths if not any(part.startswith(".") for part in p.parts)]


def _beside(picture: Path) -> list[str]:
    file = picture.with_suffix(".txt")
    lines = decode(file.read_bytes(), repr(str(file))).split("\n") if file.is_file() else []
    return captions_of(lines, str(file)) if any(line.strip() for line in lines) else []
