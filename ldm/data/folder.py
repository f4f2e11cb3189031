"""A user's folder of captioned pictures."""

import os
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.config import UserError
from ldm.data.captions import captions_of, decode, parse_object
from ldm.data.images import LIMIT, SUFFIXES, ImageError, read_image
from ldm.data.splits import SPLITS, assign, caption_group

METADATA = "metadata.jsonl"


class Folder:
    """Samples of one split of a folder of pictures, with captions in files, map-style.

    `folder[i]` -> {"image": uint8 (3, size, size), "captions": list[str], "key": str}; the key is the
    picture's name relative to `path`. Captions come from `metadata.jsonl`, a line a picture: {"file_name":
    "a.png", "text": a string or a list of strings} (several lines for one picture add up), else from a
    `.txt` of the same name beside the picture, a caption a line. Sub-folders `train`, `val` and `test`,
    where there are any, are the splits, each with a `metadata.jsonl` or `.txt` files of its own; else
    pictures are split by a hash of their captions (`splits.assign`). Hidden files and folders are passed
    over. Raises UserError for a missing or empty folder or split, a picture without caption (unless
    `need_captions` is false: its list is then empty, and its name decides its split), metadata that is broken,
    names a missing file or one outside the folder, and (on reading) for a picture that cannot be read.
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
        found = captioned(root, need_captions)
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        key, captions = self.samples[index]
        try:
            image = read_image(self.path / key, self.size, self.limit)
        except ImageError as error:
            raise UserError(f"{error}; repair or remove it") from None
        return {"image": image, "captions": list(captions), "key": key}

    def captions(self, index: int) -> list[str]:
        """The captions of picture `index`, without reading it."""
        return list(self.samples[index][1])


def captioned(root: Path, need_captions: bool = True) -> dict[str, list[str]]:
    """{name relative to `root`: captions} of every picture under a folder, in order of name.

    UserError for no pictures, broken metadata, or, where captions are needed, a picture without one.
    """
    captions = read_metadata(root / METADATA) if (root / METADATA).is_file() else {}
    names = sorted(captions.keys() | set(_pictures(root)))
    if not names:
        raise UserError(f"no pictures in {str(root)!r}; known kinds: {' '.join(SUFFIXES)}")
    missing = []
    for name in names:
        if name not in captions and not (found := _beside(root / name)):
            missing.append(name)
        elif name not in captions:
            captions[name] = found
    if missing and need_captions:
        count = f"{len(missing)} of {len(names)} pictures in {str(root)!r} have no caption"
        text = PurePosixPath(missing[0]).with_suffix(".txt")
        raise UserError(f"{count}, the first is {missing[0]!r}; write {str(text)!r} or add it to {METADATA}")
    return {name: captions.get(name, []) for name in names}


def read_metadata(file: Path) -> dict[str, list[str]]:
    """{file_name: captions} of a `metadata.jsonl`; UserError, with the line's number, for whatever is wrong."""
    found: dict[str, list[str]] = {}
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{str(file)!r} line {number}"
            text = decode(line, where).strip()
            if not text:
                continue
            fields = parse_object(text, where)
            name = _safe_name(fields.get("file_name"), where)
            if not os.path.isfile(file.parent / name):  # unlike Path.is_file, never raises
                raise UserError(f"{where} names {name!r}, which does not exist; add the file or drop the line")
            if "text" not in fields:
                raise UserError(f"{where} has no 'text'; give {name!r} a string or a list of strings")
            found[name] = list(dict.fromkeys(found.get(name, []) + captions_of(fields["text"], where)))
    return found


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
