"""Builds the emoji set from its sources: npm packages -> pictures on white -> split -> tar shards.

Sources: `@lobehub/fluent-emoji-3d` (Microsoft's Fluent emoji, MIT, 256 px WebP: style "3D") and
`emoji-datasource-google` (Noto, Apache-2.0: style "flat"). The latter has single pictures and sheets of at
most 64 px, so at 128 px the flat style is enlarged (Lanczos) from 64 and holds no finer detail.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.config import UserError
from ldm.data import emoji_names, emoji_split
from ldm.data.emoji import SHIPPED
from ldm.data.shards import write_shards
from ldm.data.splits import SPLITS
from ldm.data.tar import INDEX, read_index

PACKAGES = {"3D": "@lobehub/fluent-emoji-3d@1.1.0", "flat": "emoji-datasource-google@16.0.0"}
PICTURES = {"3D": ("package/assets/", ".webp"), "flat": ("package/img/google/64/", ".png")}
LICENCES = (
    "LICENSES.md",
    "LICENSE-MIT.txt",
    "LICENSE-APACHE-2.0.txt",
    "LICENSE-EMOJI-DATASOURCE.txt",
)
SIZES = (64, 128)
STEP = 12  # levels of 255 between the colours of the compact copy


def build(
    out: str | Path, size: int = 64, packages: str | Path | None = None, compact: bool = False
) -> list[dict[str, Any]]:
    """Writes train-, val- and test- tar shards, `index.json`, `split.txt` and the licences into `out`.

    `packages` holds the two `.tgz` of `npm pack`; without it `npm pack` fetches them. `compact` is how the
    shipped copy was made: colours rounded to STEP and shards gzipped. Gives the records, with their split.
    Raises UserError for another size, missing npm, packages or the `emoji` module.
    """
    if size not in SIZES:
        raise UserError(f"emoji size {size} is not available; allowed: {', '.join(map(str, SIZES))}")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file; name a folder")
    names = _cldr_names()
    with tempfile.TemporaryDirectory() as temporary:
        archives = _find(Path(packages)) if packages else _npm_pack(Path(temporary))
        described = emoji_names.catalogue(_entries(archives["flat"]), names)
        records = [record for style in PACKAGES for record in _records(archives[style], style, described)]
    emoji_split.assign(records, emoji_split.near_pairs(picture(r["source"], 64) for r in records))
    out.mkdir(parents=True, exist_ok=True)
    # Written beside and moved at the end: a build broken off leaves what was there before.
    with tempfile.TemporaryDirectory(dir=out, prefix=".part-") as work:
        _write(records, Path(work), size, compact)
        for old in (*out.glob("*.tar"), *out.glob("*.tar.gz")):
            old.unlink()
        for file in Path(work).iterdir():
            os.replace(file, out / file.name)
    return records


def _write(records: list[dict[str, Any]], out: Path, size: int, compact: bool) -> None:
    for split in SPLITS:
        write_shards(_samples([r for r in records if r["split"] == split], size, compact), out, split)
    if compact:
        _gzip(out)
    for name in LICENCES:
        shutil.copy(SHIPPED / name, out / name)
    (out / "split.txt").write_text(emoji_split.table(records) + "\n")


def picture(data: bytes, size: int) -> np.ndarray:
    """An image file -> uint8 (size, size, 3): what is drawn, centred on a white square, resized (Lanczos).

    Pillow resizes RGBA with premultiplied alpha, so what lies under transparent pixels leaves no fringe.
    """
    source = Image.open(io.BytesIO(data)).convert("RGBA")
    left, top, right, bottom = source.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox() or (
        0,
        0,
        1,
        1,
    )
    side = max(source.size)
    square = Image.new("RGBA", (side, side))
    square.paste(source, ((side - left - right) // 2, (side - top - bottom) // 2))
    if side != size:
        square = square.resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", (size, size), "white")
    return np.asarray(Image.alpha_composite(white, square).convert("RGB"))


def encode(image: np.ndarray, compact: bool) -> bytes:
    """uint8 (H, W, 3) -> lossless WebP; `compact` first rounds colours to multiples of STEP, keeping white
    (about 40 dB PSNR at half the bytes; lossy WebP halves the colour resolution and gives 32 dB)."""
    if compact:
        rounded = (image.astype(np.int32) + STEP // 2) // STEP * STEP
        image = np.where(image >= 254, 255, rounded.clip(0, 255)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "WEBP", lossless=True, quality=90, method=6)
    return stream.getvalue()


def _samples(records: list[dict[str, Any]], size: int, compact: bool) -> Iterator[dict[str, Any]]:
    # Shuffled once: neighbours in the shards are then no relatives.
    for i in np.random.default_rng(0).permutation(len(records)):
        fields = {k: v for k, v in records[i].items() if k not in ("source", "split")}
        yield {**fields, "image": encode(picture(records[i]["source"], size), compact), "suffix": "webp"}


def _gzip(folder: Path) -> None:
    table = {}
    for name, entry in read_index(folder).items():
        packed = gzip.compress((folder / name).read_bytes(), 9, mtime=0)
        (folder / name).unlink()
        (folder / f"{name}.gz").write_bytes(packed)
        digest = hashlib.sha256(packed).hexdigest()
        table[f"{name}.gz"] = {"samples": entry["samples"], "bytes": len(packed), "sha256": digest}
    (folder / INDEX).write_text(json.dumps({"shards": table}, indent=1, sort_keys=True) + "\n")


def _records(archive: Path, style: str, described: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    folder, suffix = PICTURES[style]
    found = _members(archive, folder, suffix)
    for name in sorted(found.keys() & described.keys()):
        entry = described[name]
        fields = {k: entry[k] for k in ("concept", "role", "skin_tone", "gender", "group")}
        captions = emoji_names.captions_of(entry, style)
        yield {
            "key": f"{style}-{name}",
            "style": style,
            **fields,
            "captions": captions,
            "source": found[name],
        }


def _entries(archive: Path) -> list[dict[str, Any]]:
    found = _members(archive, "package/emoji", ".json")
    return json.loads(found["emoji"])


def _members(archive: Path, folder: str, suffix: str) -> dict[str, bytes]:
    """Name without folder and suffix, in `codes` spelling -> content."""
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and member.name.startswith(folder) and member.name.endswith(suffix):
                    found[emoji_names.codes(Path(member.name).stem)] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{archive.name} is broken ({error}); fetch it again with `npm pack`") from None
    if not found:
        raise UserError(f"{archive.name} holds no {folder}*{suffix}; it is not the package expected here")
    return found


def _cldr_names() -> dict[str, dict[str, Any]]:
    try:
        import emoji
    except ImportError:
        raise UserError("building the emoji set needs the package `emoji`; pip install emoji") from None
    return {emoji_names.codes("-".join(f"{ord(c):x}" for c in k)): v for k, v in emoji.EMOJI_DATA.items()}


def _npm_pack(folder: Path) -> dict[str, Path]:
    if shutil.which("npm") is None:
        raise UserError("npm is not installed; install Node.js, or use --packages DIR with the two .tgz")
    command = ["npm", "pack", "--silent", *PACKAGES.values()]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"`{' '.join(command)}` failed ({reason}); check the registry, or use --packages DIR")
    return _find(folder)


def _find(folder: Path) -> dict[str, Path]:
    found = {}
    for style, package in PACKAGES.items():
        name = package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
        if not (folder / name).is_file():
            raise UserError(f"{name} is not in {str(folder)!r}; `npm pack {package}` writes it")
        found[style] = folder / name
    return found
