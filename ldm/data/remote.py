"""Files by path or URL, read in parts: with retries, and through a bounded cache of blocks on the local disk.

URLs are those of fsspec, which takes keys and endpoints from the environment, as the storages' own tools do.
"""

import fcntl
import glob
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.registry import registry
from fsspec.spec import AbstractBufferedFile
from tqdm import tqdm

from ldm.config import UserError
from ldm.distributed import map_over_processes, rank_and_world
from ldm.model_io import cache_folder

BLOCK = 8 << 20  # bytes of one request, and of one file in the cache
AHEAD = 8192  # bytes read with each header of a tar: caption and next header are usually among them
THREADS = 16  # requests of one process at once, when indexing
ATTEMPTS, WAIT = 8, 0.5  # seconds before the second attempt; twice as many before each further one
PATIENCE = 60  # seconds for an answer of at most BLOCK bytes
FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError)  # not tried again
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP's errors that are
VERSIONS = ("ETag", "etag", "blob_id", "generation", "Content-MD5", "LastModified", "Last-Modified", "mtime")
Item, Result = TypeVar("Item"), TypeVar("Result")


class MissingFile(UserError):
    """A file that does not exist."""


def is_url(path: str) -> bool:
    """Whether fsspec is to open a path."""
    return "://" in path


def share(work: Callable[[Item], Result], items: Sequence[Item], name: str) -> list[Result]:
    """`work` of each item, in threads of all processes, which all call this; raises its first UserError in all."""
    rank, world = rank_and_world()

    def run(some: Sequence[Item]) -> list[Result] | UserError:
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                return [*tqdm(pool.map(work, some), name, len(some), leave=False, disable=rank > 0 or None)]
        except UserError as error:  # raised here, it would leave the other processes waiting
            return error

    bounds = [len(items) * i // world for i in range(world + 1)]
    parts = map_over_processes(run, [items[bounds[i] : bounds[i + 1]] for i in range(world)])
    for error in (part for part in parts if isinstance(part, UserError)):
        raise error
    return [result for part in parts for result in part]


def insist(url: str, work: Callable[[AbstractFileSystem, str, int], Result]) -> Result:
    """`work(file system, path, attempt)`, again where network or server fail. Raises UserError, MissingFile for a file
    that does not exist."""
    for attempt in range(ATTEMPTS):
        try:
            return work(*url_to_fs(url), attempt)
        except Exception as error:  # every library has its own
            kind, reason = type(error).__name__, " ".join(str(error).split())[:300]
            status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
            final = isinstance(error, FINAL) or "Credential" in kind or status and status not in PASSING
            if final or attempt + 1 == ATTEMPTS:
                way = "pip install 'ldm[remote]'" if kind == "ImportError" else "check address, keys and network"
                text = f"{url!r} cannot be reached: {kind}: {reason}; {way}"
                raise (MissingFile if isinstance(error, FileNotFoundError) else UserError)(text) from None
        time.sleep(WAIT * 2**attempt)
    raise AssertionError


def close_connections() -> None:
    """Before a fork, which shares the event loop's list of sockets: the child would remove ours."""
    for kind in registry.values():
        kind.clear_instance_cache()


@dataclass(frozen=True)
class File:
    """A file at a path or URL; `version` is another where the file is: its time or tag."""

    url: str
    size: int
    version: int | str
    cache: int = 0  # bytes of the local disk for blocks of all files; 0: only what is asked for is fetched

    def read(self, offset: int, size: int) -> bytes:
        """A part of the file. Raises UserError where the file is gone, out of reach or too short."""
        data = b""
        while len(data) < size:
            read = self._from_block if self.cache and is_url(self.url) else self._from_file
            if not (more := read(offset + len(data), size - len(data))):
                raise UserError(f"{self.url!r} is cut short; write it again")
            data += more
        return data

    def read_spans(self, spans: Sequence[Sequence[int]]) -> list[bytes]:
        """The parts at (offset, size), some of size 0; in one request where they lie together."""
        used = [span for span in spans if span[1]]
        first, end = min(offset for offset, _ in used), max(offset + size for offset, size in used)
        if end - first > AHEAD + sum(size for _, size in used):
            return [self.read(*span) for span in spans]
        data = self.read(first, end - first)
        return [data[max(offset - first, 0) :][:size] for offset, size in spans]

    def open(self) -> Any:
        """The file as a stream, of which little more is fetched than is read, past the cache."""
        if is_url(self.url):
            return _Stream(replace(self, cache=0), self.url, block_size=AHEAD, cache_type="readahead", size=self.size)
        return open(self.url, "rb")

    def _from_file(self, offset: int, size: int) -> bytes:
        """The first bytes of a part, up to all. What follows those that came is asked for again, not they."""

        def fetch(fs: AbstractFileSystem, path: str, attempt: int) -> bytes:
            end = offset + min(size, self.size - offset, BLOCK >> attempt)  # the less, the more often it fails
            data = fs.cat_file(path, start=offset, end=end, **{"timeout": PATIENCE} if fs.async_impl else {})
            if len(data) > end - offset:
                raise ValueError("the server sends whole files only")
            if not data:
                raise OSError("the answer is empty")
            return data

        if offset >= self.size:
            return b""
        if is_url(self.url):
            return insist(self.url, fetch)
        try:
            return np.fromfile(self.url, np.uint8, size, offset=offset).tobytes()
        except OSError as error:
            raise UserError(f"{self.url!r} cannot be read: {error.strerror}") from None

    def _from_block(self, offset: int, size: int) -> bytes:
        """The same from the cache, whose block one process fetches while others that need it wait."""
        first = offset // BLOCK * BLOCK
        key = hashlib.sha256(f"{self.url} {self.size} {self.version} {BLOCK} {first}".encode()).hexdigest()
        path = cache_folder() / "blocks" / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                with suppress(FileNotFoundError):  # another process may remove it
                    os.utime(path)
                    return np.fromfile(path, np.uint8, size, offset=offset - first).tobytes()
                with suppress(FileNotFoundError), open(f"{path}.part", "ab") as part:
                    fcntl.flock(part, fcntl.LOCK_EX)
                    if not path.exists():
                        part.truncate(0)
                        part.write(replace(self, cache=0).read(first, min(BLOCK, self.size - first)))
                        part.flush()
                        os.fsync(part.fileno())
                        os.replace(part.name, path)
                        if int(key[:8], 16) % (1 + self.cache // (2000 * BLOCK)) == 0:  # rarely where listing is long
                            shrink(path.parent, self.cache * 15 // 16)
        except OSError as error:
            way = "lower data.cache_gb, or set LDM_CACHE to a folder on another disk"
            raise UserError(f"cannot keep {self.url!r} in {str(path.parent)!r}: {error.strerror}; {way}") from None


class _Stream(AbstractBufferedFile):
    """Of a File, its first argument."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.read(start, end - start)


def shrink(folder: Path, limit: int) -> None:
    """Removes the files of a folder that were not used for the longest time, down to `limit` bytes."""
    with suppress(FileNotFoundError):  # another process does so too
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in folder.iterdir())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total > limit:
                path.unlink()
                total -= size


def open_file(path: str, cache: int = 0) -> File:
    """The file at a path or URL. Raises MissingFile, or UserError for one that cannot be read."""

    def info(fs: AbstractFileSystem, name: str, _: int) -> dict[str, Any]:
        with suppress(FileNotFoundError):  # which HTTP's says of any error
            return fs.info(name)
        fs.cat_file(name, start=0, end=1)
        return fs.info(name)

    if is_url(path):
        known = insist(path, info)
        if known.get("size") is None:
            raise UserError(f"the server of {path!r} does not tell its size, without which it cannot be read in parts")
        return File(path, known["size"], next((str(known[key]) for key in VERSIONS if known.get(key)), ""), cache)
    try:
        stat = os.stat(path)
    except OSError as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"{path!r} cannot be read: {error.strerror}") from None
    return File(path, stat.st_size, stat.st_mtime_ns)


def find_tars(path: str) -> list[str]:
    """The `*.tar` that `path` names, sorted: a file, a folder, or several of both with blanks between, also URLs. They
    may have `{0000..0099}`, `{a,b}` and, where the storage lists its files, `*`."""
    found: set[str] = set()
    for name in (name for word in ([path] if Path(path).exists() else path.split()) for name in _expand(word)):
        if Path(name).is_dir():
            found |= {*map(str, Path(name).glob("*.tar"))}
        elif is_url(name) and not re.search(r"\.tar(\?|$)", name) or "*" in name:
            pattern = name if name.endswith(".tar") else f"{name.rstrip('/')}/*.tar"
            found |= {*(insist(pattern, _list) if is_url(name) else glob.glob(name))}
        else:
            found.add(name)
    return sorted(found)


def _list(fs: AbstractFileSystem, pattern: str, _: int) -> list[str]:
    return [fs.unstrip_protocol(name) for name in fs.glob(pattern)]


def _expand(name: str) -> list[str]:
    """`name` with its braces written out."""
    if not (brace := re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*)\}", name)):
        return [name]
    first, last, words = brace.groups()
    words = words.split(",") if first is None else [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return [each for word in words for each in _expand(name[: brace.start()] + word + name[brace.end() :])]
