"""Folders that tell whether they are whole: a list of their files with sizes and SHA-256, written last."""

import hashlib
import os
from pathlib import Path, PurePosixPath

from ldm import model_io as weights
from ldm.config import UserError

NAME = "manifest.json"


def seal(folder: Path) -> None:
    """Syncs all files under `folder` to the disk, then writes its manifest and syncs that and the folders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    table = {}
    for path in files:
        sync(path)
        table[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    weights.write_json(folder / NAME, {"files": table})
    sync(folder / NAME)
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)


def problem(folder: Path) -> str:
    """What is wrong with a sealed folder, in words; "" where every file is there, whole and unchanged.

    A flipped bit in tensor data loads in silence from safetensors and from torch's files, hence the hashes.
    """
    try:
        table = weights.read_json(folder / NAME)["files"]
        expected = {name: (about["bytes"], about["sha256"]) for name, about in table.items()}
    except (UserError, KeyError, TypeError, AttributeError):
        return f"it has no {NAME} that can be read"
    for name, (size, sha256) in expected.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            return f"its manifest names {name!r}, outside the folder"
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _sha256(file) != sha256:
            return f"{name} was changed since it was written"
    return ""


def sync(path: Path) -> None:
    """Makes the system put a file's bytes, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
