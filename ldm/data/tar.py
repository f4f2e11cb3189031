"""Plain tar files of samples: where each member lies, and the index of counts and hashes beside them."""

import hashlib
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ldm.config import UserError
from ldm.data.captions import decode, parse_object
from ldm.data.faults import Faults

IMAGES = ("jpg", "jpeg", "png", "webp")
KINDS = {**dict.fromkeys(IMAGES, "image"), "txt": "txt", "json": "json"}
LARGEST = {"image": 2**28, "txt": 2**24, "json": 2**24}  # bytes of one member; checked before it is read
BLOCK = tarfile.BLOCKSIZE
INDEX = "index.json"


class Span(NamedTuple):
    """Where the bytes of a member lie in its shard; size -1 where the sample has no such member."""

    offset: int = 0
    size: int = -1


def find_shards(path: str | Path) -> list[Path]:
    """The `*.tar` of a folder in order of name, or one `.tar` itself; UserError when there is none."""
    path = Path(path)
    files = [path] if path.is_file() and path.suffix == ".tar" else sorted(path.glob("*.tar"))
    if not path.exists():
        raise UserError(f"shard folder {str(path)!r} does not exist")
    if not files:
        raise UserError(f"no *.tar shards in {str(path)!r}; scripts/prepare_data.py writes them")
    return files


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """`index.json` of a folder of shards: {name: {"samples", "bytes", "sha256"}}; {} where there is none.

    Raises UserError when it is broken, or lists a shard that is not in the folder.
    """
    file = folder / INDEX
    if not file.is_file():
        return {}
    table = parse_object(decode(file.read_bytes(), str(file)), str(file)).get("shards")
    if not isinstance(table, dict) or not all(_is_entry(entry) for entry in table.values()):
        raise UserError(f"{str(file)!r} is no index of shards; delete it, or write the shards again")
    for name in table:
        if PurePosixPath(name).name != name or not (folder / name).is_file():
            raise UserError(f"shard {name!r}, listed in {str(file)!r}, is missing; write the shards again")
    return table


def verify(path: str | Path) -> int:
    """Compares the SHA-256 of every shard with `index.json`; their number, or UserError at a difference."""
    files = find_shards(path)
    index = read_index(files[0].parent)
    for file in files:
        if changed := check_bytes(file, index):
            raise UserError(changed)
        if not index or sha256(file) != index[file.name]["sha256"]:
            raise UserError(f"shard {file.name!r} does not have the SHA-256 of {INDEX}; write the shards again")
    return len(files)


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_samples(
    file: Path, index: dict[str, dict[str, Any]], faults: Faults
) -> tuple[dict[str, dict[str, Span]], int]:
    """Where the members of each usable sample of a shard lie, and how many samples it should have.

    Samples that are not usable, and those missing of a shard shorter than the index says, are noted in `faults`.
    UserError for a shard that is not in the index, has changed otherwise, or is cut short with no index to tell.
    """
    changed = check_bytes(file, index)
    samples, broken = scan(file, faults)
    have = len(samples)
    want = index[file.name]["samples"] if index else have
    text = changed or broken or f"shard {file.name!r} has {have} samples but {INDEX} says {want}; write it again"
    if have > want or have == want and (changed or broken):
        raise UserError(text)
    for number in range(have, want):
        faults.add(f"{file.name} sample {number + 1}", text)
    return {key: spans for key, spans in samples.items() if f"{key} in {file.name}" not in faults.reasons}, want


def scan(file: Path, faults: Faults) -> tuple[dict[str, dict[str, Span]], str]:
    """Where the members of each sample of a shard lie, from its headers: {key: {"image"|"txt"|"json": Span}}, and in
    words where it ends before its end, "" for a whole one.

    Noted in `faults` as "<key> in <shard>": an unsafe name, a member given twice or beyond the bounds of LARGEST, a
    picture without a caption or the other way round.
    """
    samples: dict[str, dict[str, Span]] = {}
    end, size = 0, file.stat().st_size
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                archive.members = []  # tarfile would keep every header
                if end <= size and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    _add(samples, member, file, faults)
    except (tarfile.TarError, OSError, ValueError) as error:
        broken = f"shard {str(file)!r} is cut short or no plain tar: {error}"
    else:  # tarfile stops at a broken header without a word
        cut = end + BLOCK > size or read_span(file, Span(end, BLOCK)) != bytes(BLOCK)
        broken = f"shard {str(file)!r} is cut short or damaged after {end} bytes; write it again" if cut else ""
    if broken and samples and not _complete(samples[next(reversed(samples))]):
        samples.popitem()  # the cut went through it
    _check_complete(samples, file, faults)
    return samples, broken


class ShardError(UserError):
    """A shard that has become shorter, is gone or cannot be read now: no mistake of one sample."""


def read_span(file: Path, span: Span) -> bytes:
    """The bytes of a member (ShardError)."""
    try:
        with file.open("rb") as stream:
            stream.seek(span.offset)
            data = stream.read(span.size)
    except OSError as error:
        raise ShardError(f"shard {str(file)!r} cannot be read: {error.strerror}") from None
    if len(data) != span.size:
        raise ShardError(f"shard {str(file)!r} is cut short at {span.offset + len(data)} bytes; write it again")
    return data


def _add(samples: dict[str, dict[str, Span]], member: tarfile.TarInfo, file: Path, faults: Faults) -> None:
    name = PurePosixPath(member.name)
    stem, _, suffix = name.name.partition(".")
    kind = KINDS.get(suffix.lower())
    if kind is None or not stem:
        return
    key = str(name.with_name(stem))
    spans = samples.setdefault(key, {})
    wrong = ""
    if name.is_absolute() or ".." in name.parts or len(member.name) > 255:
        wrong = f"shard {file.name!r} has a member with the unsafe name {member.name[:80]!r}; rename it"
    elif member.size > LARGEST[kind]:
        wrong = f"member {member.name!r} of shard {file.name!r} has {member.size} bytes; at most {LARGEST[kind]}"
    elif kind in spans:
        wrong = f"shard {file.name!r} has two members for the {kind} of {member.name!r}; keep one"
    if wrong:
        faults.add(f"{key} in {file.name}", wrong)
    spans[kind] = Span(member.offset_data, member.size)


def _complete(spans: dict[str, Span]) -> bool:
    return "image" in spans and len(spans) > 1


def _check_complete(samples: dict[str, dict[str, Span]], file: Path, faults: Faults) -> None:
    for key, spans in samples.items():
        if not _complete(spans):
            what = "no caption (.txt or .json)" if "image" in spans else "no picture"
            faults.add(f"{key} in {file.name}", f"shard {file.name!r}: sample {key!r} has {what}")


def check_bytes(file: Path, index: dict[str, dict[str, Any]]) -> str:
    """How a shard's size is not the index's, in words; "" where it is, or where there is no index. UserError when the
    index does not name the shard."""
    if not index:
        return ""
    if file.name not in index:
        raise UserError(f"shard {file.name!r} is not in {INDEX} beside it; remove one of the two")
    want, have = index[file.name]["bytes"], file.stat().st_size
    return "" if have == want else f"shard {file.name!r} has {have} bytes but {INDEX} says {want}; write it again"


def _is_entry(entry: Any) -> bool:
    kinds = {"samples": int, "bytes": int, "sha256": str}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        return False
    return 0 <= entry["samples"] <= entry["bytes"] // (2 * BLOCK)  # a member is a header and a block or more
