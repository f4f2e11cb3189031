"""Tar shards with members that lead outside, and folders of pictures whose metadata does."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from ldm.data import DataConfig, open_dataset

MEMBERS = ("../../escape.png", "/tmp/ldm-soak-escape.png", "a/../../../escape.png", "..\\escape.png", "./../escape.png")
KINDS = {
    "symlink": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "pipe": tarfile.FIFOTYPE,
    "folder": tarfile.DIRTYPE,
}


def cases(fence: Path, outside: Path) -> Iterator[tuple[str, Callable[[], None], tuple[int, ...]]]:
    """What each case is, in words, what opens and reads it all, and the exit codes that are right."""
    secret = outside / "toy" / "secret.png"
    secret.write_bytes(_png("white"))
    for name in MEMBERS:
        yield f"member {name!r}", _shards(fence, [(_file(name, len(_png())), _png()), *_caption(name)]), (0, 2)
    for what, kind in KINDS.items():
        for target in (str(secret), "../../toy/secret.png", "/etc/passwd", "good-0.png"):
            info = tarfile.TarInfo("bad.png")
            info.type, info.linkname = kind, target
            yield f"{what} to {target[-20:]}", _shards(fence, [(info, b""), *_caption("bad.png")]), (0, 2)
    for name in (
        "../toy/secret.png",
        "../../toy/secret.png",
        str(secret),
        "/etc/passwd",
        "good.png/../../x",
        "a\x00b.png",
    ):
        yield f"metadata names {name[-20:]!r}", _folder(fence, name), (0, 2)
    for name in ("toy/../../outside.tar", "/etc/passwd", "../escape.tar"):
        work = _shards(fence, [])
        index = {"shards": {name: {"samples": 1, "bytes": 1, "sha256": "0"}}}
        (fence / "shards" / "index.json").write_text(json.dumps(index))
        yield f"index names {name!r}", work, (2,)


def _png(colour: str = "black") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(file, "png")
    return file.getvalue()


def _file(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def _caption(name: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(_file(name.rsplit(".", 1)[0] + ".txt", 5), b"a dog")]


def _shards(fence: Path, bad: list[tuple[tarfile.TarInfo, bytes]]) -> Callable[[], None]:
    """Forty good samples and the bad members in one shard; reads everything, half of it may be left out."""
    (fence / "shards").mkdir(parents=True, exist_ok=True)
    with tarfile.open(fence / "shards" / "train-0.tar", "w") as archive:
        for member, data in [*_good(), *bad]:
            archive.addfile(member, io.BytesIO(data))
    config = DataConfig(name="shards", path=str(fence / "shards"), max_broken=0.5)
    return lambda: _read(config, {f"good-{i}" for i in range(40)})


def _good() -> list[tuple[tarfile.TarInfo, bytes]]:
    found = []
    for i in range(40):
        found += [(_file(f"good-{i}.png", len(_png())), _png()), *_caption(f"good-{i}.png")]
    return found


def _folder(fence: Path, name: str) -> Callable[[], None]:
    folder = fence / "pictures" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "good.png").write_bytes(_png())
    lines = [{"file_name": n, "text": "a cat"} for n in ("good.png", name)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lambda: _read(DataConfig(name="folder", path=str(folder.parent), max_broken=0.5), {"train/good.png"})


def _read(config: DataConfig, good: set[str]) -> None:
    """Reads every sample; AssertionError where one is from outside."""
    dataset = open_dataset(config, "train")
    for i in range(len(dataset)):
        sample = dataset[i]
        assert sample["key"] in good, f"{sample['key']} was read"
        assert not sample["image"].any(), f"{sample['key']} shows what lies outside"
