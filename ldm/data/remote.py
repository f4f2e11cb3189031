"""Files by path or URL, read in parts: with retries, and through a bounded cache of blocks on the local disk.

URLs are those of fsspec, which takes keys and endpoints from the environment, as the storages' own tools do.
"""

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile

from ldm.config import UserError
from ldm.distributed import map_over_processes
from ldm.model_io import atomic_write, cache_folder, shrink

BLOCK = 8 << 20  # bytes of one request, and of one file in the cache
AHEAD = 8192  # bytes read with each header of a tar: caption and next header are usually among them
THREADS = 16
ATTEMPTS, WAIT = 8, 0.5  # seconds before the second attempt; twice as many before each further one
PATIENCE = 60  # seconds for an answer, and for each BLOCK that is written
FINAL = (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError)  # not tried again
VERSIONS = ("ETag", "etag", "blob_id", "Last-Modified", "mtime")
Item, Result = TypeVar("Item"), TypeVar("Result")
# Never forgotten: where a forked process collected its parent's, it would take the parent's sockets off the parent's
# event loop, whose requests would wait in vain. fsspec opens others in each process.
connections: dict[int, AbstractFileSystem] = {}


class MissingFile(UserError):
    """A file that does not exist."""


def is_url(path: str) -> bool:
    """Whether fsspec is to open a path."""
    return "://" in path


def ask(url: str, method: str, *arguments: Any, size: int = 0, **options: Any) -> Any:
    """The answer of a method of the file system behind `url`, which moves up to `size` bytes; asked again where that or
    the network fails or is slow. Raises UserError, MissingFile for a file that does not exist."""
    for attempt in range(ATTEMPTS):
        time.sleep(WAIT * 2**attempt if attempt else 0)
        try:
            fs, path = url_to_fs(url)
            connections[id(fs)] = fs
            limit = {"timeout": PATIENCE * (1 + size // BLOCK)} if fs.async_impl else {}
            return getattr(fs, method)(path, *arguments, **options, **limit)
        except Exception as error:  # every library has its own
            # HTTP's `info` says of any error that the file does not exist
            cause = url.startswith("http") and error.__cause__ or error
            status = getattr(cause, "status", None) or getattr(getattr(cause, "response", None), "status_code", 0)
            failed, missing = cause, status == 404 or isinstance(cause, FileNotFoundError)
            if isinstance(cause, FINAL) or 400 <= status < 500 and status not in (408, 425, 429):
                break
    reason = f"{type(failed).__name__}: {' '.join(str(failed).split())[:300]}"
    way = "pip install 'ldm[remote]'" if isinstance(failed, ImportError) else "check address, keys and network"
    raise (MissingFile if missing else UserError)(f"{url!r} cannot be reached: {reason}; {way}")


@dataclass(frozen=True)
class File:
    """A file at a path or URL; `version` is another where the file is: its time or tag."""

    url: str
    size: int
    version: int | str
    cache: int = 0  # bytes of the local disk for blocks of all files by URL; 0: only what is asked for is fetched

    @classmethod
    def find(cls, path: str, cache: int = 0) -> "File":
        """Raises MissingFile, or UserError for a file that cannot be read."""
        if is_url(path):
            known = ask(path, "info")
            if known.get("size") is None:
                raise UserError(f"the server of {path!r} does not tell its size, so it cannot be read in parts")
            return cls(path, known["size"], next((str(known[key]) for key in VERSIONS if known.get(key)), ""), cache)
        try:
            stat = os.stat(path)
        except OSError as error:
            kind = MissingFile if isinstance(error, FileNotFoundError) else UserError
            raise kind(f"{path!r} cannot be read: {error.strerror}") from None
        return cls(path, stat.st_size, stat.st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        """A part of the file. Raises UserError where the file is gone, out of reach or too short."""
        data, end = b"", offset + size
        if end > self.size:
            raise UserError(f"{self.url!r} is cut short; write it again")
        while (start := offset + len(data)) < end:
            first = start // BLOCK * BLOCK
            stop = min(end, first + BLOCK)  # what has come is not asked for again
            if self.cache:
                key = f"{self.url} {self.size} {self.version} {BLOCK} {first}"
                block = keep("blocks", key, lambda at=first: self.fetch(at, min(at + BLOCK, self.size)), self.cache)
                data += bytes(block[start - first : stop - first])
            else:
                data += self.fetch(start, stop)
        return data

    def fetch(self, start: int, stop: int) -> bytes:
        """The same past the cache, in one request."""
        try:
            if is_url(self.url):
                data = ask(self.url, "cat_file", start=start, end=stop)
            else:
                data = np.fromfile(self.url, np.uint8, stop - start, offset=start).tobytes()
        except OSError as error:
            raise UserError(f"{self.url!r} cannot be read: {error.strerror}") from None
        if len(data) != stop - start:
            reason = "is cut short; write it again" if len(data) < stop - start else "comes as a whole, not in parts"
            raise UserError(f"{self.url!r} {reason}")
        return data


class Stream(AbstractBufferedFile):
    """A File as what `tarfile` reads from; little more is fetched than is read, past the cache."""

    def __init__(self, file: File) -> None:
        super().__init__(file, file.url, block_size=AHEAD, cache_type="readahead", size=file.size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.fetch(start, end)


def keep(kind: str, key: str, make: Callable[[], bytes], limit: int = 0) -> bytes | np.memmap:
    """The bytes in the cache for `key`, which `make()` gives where they are missing. Of a kind those used last stay, up
    to `limit` bytes (0: all). Files appear as a whole and stay readable for who has them: processes need no locks.
    Raises UserError for a full disk."""
    path = cache_folder() / kind / hashlib.sha256(key.encode()).hexdigest()
    with suppress(FileNotFoundError):  # perhaps because another process has just removed it
        os.utime(path)
        return np.memmap(path, np.uint8, "r")
    data = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache_folder()) as folder:
            write_file(f"{folder}/{path.name}", data)
            os.replace(f"{folder}/{path.name}", path)
        if limit and int(path.name[:8], 16) % (1 + limit // (2000 * BLOCK)) == 0:  # rarely where listing is long
            shrink(path.parent.iterdir(), limit * 15 / 16)
    except OSError as error:
        way = "lower data.cache_gb, or set LDM_CACHE to a folder on another disk"
        raise UserError(f"cannot write to {str(path.parent)!r}: {error.strerror}; {way}") from None
    return data


def write_file(path: str, data: bytes) -> None:
    """Writes a file at a path or URL, as a whole or not at all."""
    if is_url(path):
        return ask(path, "pipe_file", data, size=len(data))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(path)) as new, open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def share(work: Callable[[Item], Result], items: Sequence[Item], name: str) -> list[Result]:
    """`work` of each item, in threads of all processes, which must all call this; `name` is of the progress bar."""
    chunks = [items[i : i + THREADS] for i in range(0, len(items), THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        parts = map_over_processes(lambda chunk: [*pool.map(work, chunk)], chunks, name * sys.stderr.isatty())
    return [result for part in parts for result in part]


def find_tars(path: str) -> list[str]:
    """The `*.tar` that `path` names, sorted: a file, a folder, or several of both with blanks between, also URLs. They
    may have `{0000..0099}`, `{a,b}` and, where the storage lists its files, `*`."""
    found: set[str] = set()
    for name in [path] if Path(path).exists() else [name for word in path.split() for name in expand(word)]:
        if Path(name).is_dir():
            found |= {*map(str, Path(name).glob("*.tar"))}
        elif is_url(name) and ("*" in name or not re.search(r"\.tar(\?|$)", name)):
            pattern = name if "*" in name else f"{name.rstrip('/')}/*.tar"
            found |= {*map(url_to_fs(pattern)[0].unstrip_protocol, ask(pattern, "glob"))}
        else:
            found.add(name)
    return sorted(found)


def expand(name: str) -> list[str]:
    """`name` with its braces written out."""
    if not (brace := re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*)\}", name)):
        return [name]
    first, last, words = brace.groups()
    words = words.split(",") if first is None else [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return [each for word in words for each in expand(name[: brace.start()] + word + name[brace.end() :])]
