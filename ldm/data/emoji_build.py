"""Draws the emoji set at another size: pictures of two npm packages -> on white -> tar shards.

Sources: `@lobehub/fluent-emoji-3d` (Microsoft's Fluent emoji, MIT, 256 px WebP: style "3D") and
`emoji-datasource-google` (Noto, Apache-2.0: style "flat"), of which the largest pictures have 64 px, so at 128 px the
flat style is enlarged (Lanczos). Captions, attributes and split are those of the shipped set, a table in its shards.
"""

import gzip
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.config import UserError
from ldm.data.emoji import SHIPPED, Emoji
from ldm.data.splits import SPLITS
from ldm.images import upright_rgb
from ldm.model_io import atomic_write

PACKAGES = {"3D": "@lobehub/fluent-emoji-3d@1.1.0", "flat": "emoji-datasource-google@16.0.0"}
PICTURES = {"3D": ("package/assets/", ".webp"), "flat": ("package/img/google/64/", ".png")}
SIZES = (64, 128)
STEP = 12  # levels of 255 between the colours of the compact copy


def build(out: str | Path, size: int = 64, packages: str | Path | None = None, compact: bool = False) -> int:
    """Writes train-, val- and test- tar shards, `split.txt` and the licences into `out`.

    `packages` holds the two `.tgz` of `npm pack`; without it `npm pack` fetches them. `compact` is how the shipped copy
    was made: colours rounded to STEP and shards gzipped. Returns the number of pictures. Raises UserError for another
    size, missing npm or packages; nothing is written then.
    """
    if size not in SIZES:
        raise UserError(f"emoji size {size} is not available; allowed: {', '.join(map(str, SIZES))}")
    with tempfile.TemporaryDirectory() as temporary:
        if packages is None:
            npm_pack(temporary)
        folder = Path(packages or temporary)
        sources = read_package(folder, "3D") | read_package(folder, "flat")
    splits = {split: Emoji(split=split).records for split in SPLITS}
    missing = [record["key"] for records in splits.values() for record in records if record["key"] not in sources]
    if missing:
        raise UserError(f"the packages hold no picture {missing[0]}; fetch {' and '.join(PACKAGES.values())}")
    for split, records in splits.items():
        images = (encode(picture(sources[record["key"]], size), compact) for record in records)
        file = Path(out, f"{split}-000000.tar{'.gz' * compact}")
        write_shard(file, records, images)
        for old in {*file.parent.glob(f"{split}-*.tar*")} - {file}:
            old.unlink()
    for text in SHIPPED.glob("*.[mt][dx]*"):
        shutil.copy(text, out)
    return sum(map(len, splits.values()))


def write_shard(file: Path, records: Iterable[dict[str, Any]], images: Iterable[bytes], suffix: str = "webp") -> None:
    """Writes a tar, gzipped where `file` ends in .gz, as a whole or not at all; the same samples give the same bytes.

    A record has a `key` without dots, under which `images`, the bytes of image files, and its other fields as `.json`
    are members.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for record, image in zip(records, images, strict=True):
            fields = {name: value for name, value in record.items() if name != "key"}
            text = json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()
            for ending, data in ((suffix, image), ("json", text)):
                info = tarfile.TarInfo(f"{record['key']}.{ending}")  # of no time or owner, so that bytes are the same
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    data = stream.getvalue()
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as new:
        new.write_bytes(gzip.compress(data, 9, mtime=0) if file.suffix == ".gz" else data)


def picture(data: bytes, size: int) -> np.ndarray:
    """An image file -> uint8 (size, size, 3): the drawing, centred on a white square, resized (Lanczos).

    Pillow resizes RGBA with premultiplied alpha, so the colour of transparent pixels leaves no fringe.
    """
    source = Image.open(io.BytesIO(data)).convert("RGBA")
    box = source.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    left, top, right, bottom = box or (0, 0, 1, 1)
    side = max(source.size)
    x, y = (side - left - right) // 2, (side - top - bottom) // 2
    square = source.crop((-x, -y, side - x, side - y)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(upright_rgb(square))


def encode(image: np.ndarray, compact: bool) -> bytes:
    """uint8 (H, W, 3) -> lossless WebP; `compact` first rounds colours to multiples of STEP, keeping white
    (about 40 dB PSNR at half the bytes; lossy WebP halves the colour resolution and gives 32 dB)."""
    if compact:
        rounded = (image.astype(np.int32) + STEP // 2) // STEP * STEP
        image = np.where(image >= 254, 255, rounded.clip(0, 255)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "WEBP", lossless=True, quality=90, method=6)
    return stream.getvalue()


def codes(name: str) -> str:
    """A canonical spelling of a file's code points: "23-FE0F-20E3" -> "0023-20e3"."""
    parts = [p.zfill(4) for p in re.split(r"[-_]", name.lower()) if p != "fe0f"]
    if len(parts) > 2 and parts[0] == "1f3f4" and parts[1].startswith("e00") and parts[-1] != "e007f":
        parts.append("e007f")  # the end tag of England's flag, which some packages drop
    return "-".join(parts)


def read_package(folder: Path, style: str) -> dict[str, bytes]:
    """The files of the pictures in a package of `npm pack`, by key. Raises UserError where it is missing or broken."""
    package, (prefix, suffix) = PACKAGES[style], PICTURES[style]
    archive = folder / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    try:
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.isfile() and m.name.startswith(prefix) and m.name.endswith(suffix)]
            return {f"{style}-{codes(Path(m.name).stem)}": tar.extractfile(m).read() for m in members}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{str(archive)!r} is missing or is broken ({error}); `npm pack {package}` writes it") from None


def npm_pack(folder: str) -> None:
    """Fetches the packages. Raises UserError when that fails."""
    if shutil.which("npm") is None:
        raise UserError("npm is not installed; install Node.js, or use --packages DIR with the two .tgz")
    command = ["npm", "pack", "--silent", *PACKAGES.values()]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"`{' '.join(command)}` failed ({reason}); check the registry, or use --packages DIR")
