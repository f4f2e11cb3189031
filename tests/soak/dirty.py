"""A folder and shards in which one sample in a hundred has each kind of mistake: trainings end, counts are exact.

"Exact" is to the name: what is listed as left out is what was spoiled, no more and no less.
"""

import io
import json
import random
import resource
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny
from PIL import Image
from test_data_folder import bomb

from ldm.data import DataConfig
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from soak.common import Child, Row, training

COUNT, EACH = 1500, 15  # samples, and of each mistake: one in a hundred
GROWTH = 200  # MB
Sample = dict[str, bytes]  # the files of one sample, by suffix


def run(folder: Path, seed: int) -> list[Row]:
    """A row each for a folder and for shards."""
    return [_folder(folder / "pictures", seed), _shards(folder / "shards", seed)]


def _clean(number: int, draw: random.Random) -> Sample:
    file = io.BytesIO()
    colour = tuple(draw.randrange(256) for _ in range(3))
    Image.new("RGB", (draw.randrange(20, 90), draw.randrange(20, 90)), colour).save(file, "png")
    return {"png": file.getvalue(), "txt": f"a picture of the colour {number}".encode()}


# What is done to a sample, in a folder and in shards alike; nothing for what is no mistake.
SPOILED: dict[str, Callable[[Sample], Sample]] = {
    "cut short": lambda s: s | {"png": s["png"][:50]},
    "a bomb": lambda s: s | {"png": bomb()},
    "empty": lambda s: s | {"png": b""},
    "not a picture": lambda s: s | {"png": b"GIF89a" + bytes(60)},
    "no caption": lambda s: {"png": s["png"]},
    "an empty caption": lambda s: s | {"txt": b" \n\t\n"},
    "no UTF-8": lambda s: s | {"txt": b"\xff\xfe caf\xe9"},
}
UNUSUAL: dict[str, Callable[[Sample], Sample]] = {
    "16 bits": lambda s: s | {"png": _encoded(Image.new("I;16", (40, 40), 40_000), "PNG")},
    "CMYK": lambda s: s | {"png": _encoded(Image.new("CMYK", (40, 40), (9, 99, 199, 0)), "JPEG")},
    "one pixel": lambda s: s | {"png": _encoded(Image.new("RGB", (1, 1), "red"), "PNG")},
    "1 x 9,999": lambda s: s | {"png": _encoded(Image.new("RGB", (1, 9999), "red"), "PNG")},
    "animated": lambda s: s | {"png": _animated()},
    "a caption of 1 MB": lambda s: s | {"txt": b"long " * 200_000},
    "NUL and right-to-left": lambda s: s | {"txt": "a\0b \u202eدائرة حمراء 🟥".encode()},
}


def _encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def _animated() -> bytes:
    file, frames = io.BytesIO(), [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def _samples(seed: int) -> tuple[list[tuple[str, Sample]], set[str]]:
    """All samples by name, and the names of those that are spoiled."""
    draw = random.Random(seed)
    order = draw.sample(range(COUNT), EACH * (len(SPOILED) + len(UNUSUAL)))
    chosen = {order.pop(): change for change in [*SPOILED.values(), *UNUSUAL.values()] for _ in range(EACH)}
    found, wrong = [], set()
    for i in range(COUNT):
        sample = _clean(i, draw)
        found.append((f"{i:05d}", chosen[i](sample) if i in chosen else sample))
        if chosen.get(i) in SPOILED.values():
            wrong.add(f"{i:05d}")
    return found, wrong


def _train(row: Row, data: DataConfig, folder: Path, tower: bool) -> set[str]:
    """Two epochs of a training in a process of its own; the names it left out."""
    row.count += 1
    train = replace(tiny.TRAIN, steps=2 * COUNT // 50, batch_size=50, validate_every=20, workers=int(tower))
    out, peaks = folder / ("clip" if tower else "autoencoder"), folder / "peaks.json"
    size = replace(data, size=32)

    def task() -> object:
        made = (
            CLIPTask(replace(tiny.clip(), data=size))
            if tower
            else AutoencoderTask(replace(tiny.autoencoder(), data=size))
        )
        after, seen = made.after_step, []

        def measured() -> None:
            after()
            seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            peaks.write_text(json.dumps(seen))

        made.after_step = measured
        return made

    child = Child(training(task, train, out), folder / f"{out.name}-log")
    row.expect(child.end() == 0, f"{out.name}: exit code {child.process.exitcode}: {child.error()[-300:]}")
    seen = json.loads(peaks.read_text()) if peaks.is_file() else [0, 0]
    growth = seen[-1] - seen[len(seen) // 4]  # by then every kind of batch was there
    row.expect(growth < GROWTH, f"{out.name}: memory grew by {growth:.0f} MB")
    row.notes.append(f"{out.name}: memory grew by {growth:.0f} MB")
    file = out / "left_out.jsonl"
    return {json.loads(line)["sample"] for line in file.read_text().splitlines()} if file.is_file() else set()


def _judge(row: Row, found: set[str], wanted: set[str], name: str) -> None:
    row.expect(found == wanted, f"{name}: {len(found)} left out, not {len(wanted)}, e.g. {sorted(found ^ wanted)[:3]}")
    row.notes.append(f"{name}: {len(found)} of {COUNT:,} left out, each of them by name")


def _folder(root: Path, seed: int) -> Row:
    row = Row("training on a folder with 1% of each mistake")
    samples, wrong = _samples(seed)
    for split in ("train", "val"):  # by name, so that all that is spoiled is trained on
        (root / split).mkdir(parents=True)
    for name, sample in samples:
        for suffix, content in sample.items():
            (root / "train" / f"{name}.{suffix}").write_bytes(content)
    for name, _ in samples[:40]:
        for suffix, content in _clean(0, random.Random(name)).items():
            (root / "val" / f"{name}.{suffix}").write_bytes(content)
    data = DataConfig(name="folder", path=str(root), max_broken=0.2)
    texts = {f"{n}.png" for n in wrong if not sample_has_words(dict(samples)[n])}
    left = _train(row, data, root.parent / "folder-runs", tower=True)
    _judge(row, {name.removeprefix("train/") for name in left}, {f"{name}.png" for name in wrong}, "clip")
    left = _train(row, data, root.parent / "folder-runs", tower=False)  # needs no captions
    own = {f"{name}.png" for name in wrong} - texts
    _judge(row, {name.removeprefix("train/") for name in left}, own, "autoencoder")
    return row


def sample_has_words(sample: Sample) -> bool:
    """Whether a sample's caption can be read and is not empty."""
    try:
        return bool(sample.get("txt", b"").decode().strip())
    except UnicodeDecodeError:
        return False


def _shards(root: Path, seed: int) -> Row:
    row = Row("training on shards with 1% of each mistake")
    samples, wrong = _samples(seed + 1)
    root.mkdir(parents=True)
    table: dict[str, dict] = {}
    expected: set[str] = set()
    parts = [samples[i : i + 250] for i in range(0, COUNT, 250)]
    for number, part in enumerate(parts):
        name = f"train-{number:06d}.tar"
        members = [(f"{key}.{suffix}", content) for key, sample in part for suffix, content in sample.items()]
        expected |= {f"{key} in {name}" for key, _ in part if key in wrong}
        if number == 1:  # names that lead outside, members twice, a sample that was there before
            members += [(f"../{i}.{s}", b) for i in range(5) for s, b in part[0][1].items()]
            members += [(f"twice{i}.png", part[0][1].get("png", b"x")) for i in range(5) for _ in range(2)]
            again = [key for key, _ in parts[0] if key not in wrong][:5]
            members += [(f"{key}.{s}", b) for key in again for s, b in _clean(0, random.Random(key)).items()]
            expected |= {f"../{i} in {name}" for i in range(5)} | {f"twice{i} in {name}" for i in range(5)}
            expected |= {f"{key} in {name}" for key in again}
        _write(root / name, members)
        keys = {member.rpartition(".")[0] for member, _ in members}
        table[name] = {"samples": len(keys), "bytes": (root / name).stat().st_size, "sha256": ""}
    _write(
        root / "val-000000.tar", [(f"v{i}.{s}", b) for i in range(40) for s, b in _clean(i, random.Random(i)).items()]
    )
    table["val-000000.tar"] = {"samples": 40, "bytes": (root / "val-000000.tar").stat().st_size, "sha256": ""}
    (root / "index.json").write_text(json.dumps({"shards": table}))
    cut = root / f"train-{len(parts) - 1:06d}.tar"
    kept = _cut(cut, 225)
    lost = [key for key, _ in parts[-1][kept:]]
    expected -= {f"{key} in {cut.name}" for key in lost}
    expected |= {f"{cut.name} sample {n + 1}" for n in range(kept, 250)}
    data = DataConfig(name="shards", path=str(root), max_broken=0.25)
    _judge(row, _train(row, data, root.parent / "shards-runs", tower=True), expected, "clip")
    _judge(row, _train(row, data, root.parent / "shards-runs", tower=False), expected, "autoencoder")
    row.notes.append(f"the last shard cut after {kept} of 250")
    return row


def _write(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _cut(file: Path, count: int) -> int:
    """Cuts a shard in the middle of its sample number `count`, from 0; gives the number of those before."""
    with tarfile.open(file) as archive:
        starts: dict[str, int] = {}
        for member in archive:
            starts.setdefault(member.name.rpartition(".")[0], member.offset)
    at = list(starts.values())[count] + 700
    file.write_bytes(file.read_bytes()[:at])
    return count
