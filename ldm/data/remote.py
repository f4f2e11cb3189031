"""Files by path or URL, read in parts: with retries, and through a bounded cache of blocks on the local disk.

URLs are those of fsspec, which takes keys and endpoints from the environment, as the storages' own tools do.
"""

import fcntl
import glob
import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile
from tqdm import tqdm

from ldm.config import UserError
from ldm.distributed import map_over_processes, rank_and_world
from ldm.model_io import cache_folder

BLOCK = 8 << 20  # bytes of one request, and of one file in the cache
AHEAD = 8192  # bytes read with each header of a tar: caption and next header are usually among them
ATTEMPTS, WAIT = 8, 0.5  # seconds before the second attempt; twice as many before each further one
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP's errors that a later attempt may not meet
THREADS = 16  # requests of one process at once, when indexing
VERSIONS = ("ETag", "etag", "blob_id", "generation", "Content-MD5", "LastModified", "Last-Modified", "mtime")
LACKING = (FileNotFoundError, PermissionError, ImportError, ValueError, NotImplementedError)  # for good
Item, Result = TypeVar("Item"), TypeVar("Result")


class MissingFile(UserError):
    """A file that does not exist."""


def is_url(path: str) -> bool:
    """Whether a path is fsspec's to open."""
    return "://" in path


def share(work: Callable[[Item], Result], items: Sequence[Item], name: str) -> list[Result]:
    """`work` of each item, in threads of all processes, which all call this; raises its first UserError in all."""
    rank, world = rank_and_world()

    def run(some: Sequence[Item]) -> list[Result] | UserError:
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                return [*tqdm(pool.map(work, some), name, len(some), leave=False, disable=rank > 0 or None)]
            except UserError as error:  # raised here, it would leave the other processes waiting
                return error

    bounds = [len(items) * i // world for i in range(world + 1)]
    parts = map_over_processes(run, [items[bounds[i] : bounds[i + 1]] for i in range(world)])
    for error in (part for part in parts if isinstance(part, UserError)):
        raise error
    return [result for part in parts for result in part]


def insist(url: str, work: Callable[[AbstractFileSystem, str, int], Result]) -> Result:
    """`work(file system, path, attempt)`, again where network or server fail. Raises UserError, for a file that does
    not exist MissingFile."""
    for attempt in range(ATTEMPTS):
        try:
            return work(*url_to_fs(url), attempt)
        except UserError:
            raise
        except Exception as error:  # every library has its own
            response = getattr(error, "response", None)
            status = getattr(error, "status", None) or getattr(response, "status_code", None)
            reason = " ".join((str(error) or type(error).__name__).split())[:300]
            if isinstance(error, FileNotFoundError):
                raise MissingFile(f"{url!r} does not exist") from None
            if isinstance(error, ImportError):
                raise UserError(
                    f"{url!r} needs a library: {reason} (pip install 'ldm[remote]' has the usual)"
                ) from None
            if isinstance(error, LACKING) or status and status not in PASSING or "Credential" in type(error).__name__:
                raise UserError(f"{url!r} is refused: {reason}; check the address, and the keys it needs") from None
            if attempt + 1 == ATTEMPTS:
                text = f"{url!r} cannot be reached in {ATTEMPTS} attempts: {reason}"
                raise UserError(f"{text}; check address and network, then give the same command again") from None
            if attempt == 2:
                warnings.warn(f"{url!r}: {reason}; trying on", stacklevel=2)
            time.sleep(WAIT * 2**attempt)
    raise AssertionError


@dataclass(frozen=True)
class File:
    """A file at a path or URL. `stamp` is its size, and its time or version: another where the file is."""

    url: str
    stamp: tuple[int, int | str]
    cache: int = 0  # bytes of the local disk for all blocks; 0: only what is asked for is fetched

    @property
    def size(self) -> int:
        return self.stamp[0]

    def read(self, offset: int, size: int) -> bytes:
        """A part of the file. Raises UserError where the file is gone, out of reach or too short."""
        cut = UserError(f"{self.url!r} is cut short; write it again")
        if offset + size > self.size:
            raise cut
        if is_url(self.url):
            return self._from_blocks(offset, size) if self.cache else self.fetch(offset, size)
        try:
            data = np.fromfile(self.url, np.uint8, size, offset=offset).tobytes()
        except OSError as error:
            raise UserError(f"{self.url!r} cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise cut
        return data

    def read_spans(self, spans: Sequence[Sequence[int]]) -> list[bytes]:
        """The parts at (offset, size), in one read where they lie together; b"" for those of size 0."""
        used = [(offset, offset + size) for offset, size in spans if size]
        first, last = min(start for start, _ in used), max(end for _, end in used)
        if last - first > AHEAD + sum(end - start for start, end in used):
            return [self.read(*span) if span[1] else b"" for span in spans]
        data = self.read(first, last - first)
        return [data[offset - first : offset - first + size] if size else b"" for offset, size in spans]

    def fetch(self, offset: int, size: int) -> bytes:
        """A part of the file behind the URL. After a failure a smaller piece is asked for, and the rest from there."""
        data = b""
        while len(data) < size:
            data += insist(self.url, partial(_piece, offset + len(data), size - len(data)))
        return data

    def open(self) -> Any:
        """The file as a stream, of which little more is fetched than is read. The cache is not used."""
        if is_url(self.url):
            return _Stream(self, self.url, block_size=AHEAD, cache_type="readahead", size=self.size)
        return open(self.url, "rb")

    def _from_blocks(self, offset: int, size: int) -> bytes:
        end, data = offset + size, b""
        while offset < end:
            number, start = divmod(offset, BLOCK)
            data += self._block(number, start, min(end - offset, BLOCK - start))
            offset = (number + 1) * BLOCK
        return data

    def _block(self, number: int, start: int, size: int) -> bytes:
        """A part of a block from the cache. One process fetches the block while others that need it wait."""
        key = hashlib.sha256(f"{self.url} {self.stamp} {BLOCK} {number}".encode()).hexdigest()
        path = cache_folder() / "blocks" / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:  # another process may remove it
                with suppress(FileNotFoundError):
                    os.utime(path)
                    return np.fromfile(path, np.uint8, size, offset=start).tobytes()
                with suppress(FileNotFoundError), open(f"{path}.part", "ab") as part:
                    fcntl.flock(part, fcntl.LOCK_EX)
                    if not path.exists():
                        part.truncate(0)
                        part.write(self.fetch(number * BLOCK, min(BLOCK, self.size - number * BLOCK)))
                        part.flush()
                        os.fsync(part.fileno())
                        os.replace(part.name, path)
                        # Listing many files takes long: the larger the cache, the less often.
                        if int(key[:8], 16) % (1 + self.cache // (2000 * BLOCK)) == 0:
                            shrink(path.parent, self.cache)
        except OSError as error:
            way = "lower data.cache_gb, or set LDM_CACHE to a folder on another disk"
            raise UserError(f"cannot keep {self.url!r} in {str(path.parent)!r}: {error.strerror}; {way}") from None


class _Stream(AbstractBufferedFile):
    """Its first argument is a File."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.fetch(start, end - start)


def _piece(offset: int, size: int, fs: AbstractFileSystem, path: str, attempt: int) -> bytes:
    size = min(size, BLOCK >> attempt)
    data = fs.cat_file(path, start=offset, end=offset + size)
    if len(data) > size:
        raise UserError(f"the server of {path!r} sends whole files only; a copy on another one, or here, can be read")
    if len(data) < size:
        raise OSError(f"{len(data)} bytes came instead of {size}")
    return data


def shrink(folder: Path, limit: int) -> None:
    """Removes the files of a folder that were not used for the longest time, down to 15/16 of `limit` bytes."""
    files = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total > limit * 15 // 16:
            Path(path).unlink(missing_ok=True)
            total -= size


def open_file(path: str, cache: int = 0) -> File:
    """The file at a path or URL. Raises MissingFile, or UserError for one that cannot be read."""
    if is_url(path):
        info = insist(path, _info)
        if info.get("size") is None:
            raise UserError(f"the server of {path!r} does not say its size, without which it cannot be read in parts")
        return File(path, (info["size"], next((str(info[name]) for name in VERSIONS if info.get(name)), "")), cache)
    try:
        stat = os.stat(path)
    except OSError as error:
        kind = MissingFile if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"{path!r} cannot be read: {error.strerror}") from None
    return File(path, (stat.st_size, stat.st_mtime_ns))


def _info(fs: AbstractFileSystem, path: str, _: int) -> dict[str, Any]:
    try:
        return fs.info(path)
    except FileNotFoundError:  # which HTTP's says of any error
        fs.cat_file(path, start=0, end=1)
        return fs.info(path)


def put(source: Path, url: str) -> None:
    """Writes a file to a URL."""
    insist(url, lambda fs, path, _: fs.put_file(str(source), path))


def find_files(path: str, kind: str) -> list[str]:
    """The files `*.KIND` that `path` names, sorted: a file, a folder, or several with blanks between, which may have
    `{0000..0099}`, `{a,b}` and, where the storage lists its files, `*`; folders too behind URLs."""
    found: set[str] = set()
    for word in [path] if Path(path).exists() else path.split():
        for name in _expand(word):
            if not re.search(rf"\.{kind}(\?|$)", name) and not Path(name).is_file():
                name = f"{name.rstrip('/')}/*.{kind}"
            if "*" not in name:
                found.add(name)
            elif is_url(name):
                found |= {*insist(name, lambda fs, path, _: [fs.unstrip_protocol(each) for each in fs.glob(path)])}
            else:
                found |= {*glob.glob(name)}
    return sorted(found)


def _expand(name: str) -> Iterator[str]:
    """`name` with all braces written out."""
    if not (brace := re.search(r"\{([^{}]*)\}", name)):
        yield name
        return
    words = brace[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", brace[1]):
        words = [f"{i:0{len(numbers[1])}}" for i in range(int(numbers[1]), int(numbers[2]) + 1)]
    for word in words:
        yield from _expand(name[: brace.start()] + word + name[brace.end() :])
