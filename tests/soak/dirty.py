"""A folder and shards in which one sample in a hundred has each kind of fault: runs end, and left_out.jsonl names
exactly the faulty samples."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tiny
from PIL import Image
from test_data_folder import bomb
from test_data_shards import tar

from ldm.data import DataConfig
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from soak.common import Row, encoded, finish

COUNT, EACH, SHARD = 1000, 10, 250  # samples, those of each kind of fault, and samples per shard
Sample = dict[str, bytes]  # the files of one sample by suffix


RED = Image.new("RGB", (32, 32), "red")
UNREADABLE: dict[str, Callable[[Sample], Sample]] = {
    "cut short": lambda s: s | {"png": s["png"][:50]},
    "a bomb": lambda s: s | {"png": bomb()},
    "empty": lambda s: s | {"png": b""},
    "not a picture": lambda s: s | {"png": b"GIF89a" + bytes(60)},
}
WORDLESS: dict[str, Callable[[Sample], Sample]] = {
    "no caption": lambda s: {"png": s["png"]},
    "an empty caption": lambda s: s | {"txt": b" \n\t\n"},
    "no UTF-8": lambda s: s | {"txt": b"\xff\xfe caf\xe9"},
}
UNUSUAL: dict[str, Callable[[Sample], Sample]] = {
    "16 bits": lambda s: s | {"png": encoded(Image.new("I;16", (40, 40), 40_000))},
    "CMYK": lambda s: s | {"png": encoded(Image.new("CMYK", (40, 40), (9, 99, 199, 0)), "JPEG")},
    "one pixel": lambda s: s | {"png": encoded(Image.new("RGB", (1, 1), "red"))},
    "1 x 9,999": lambda s: s | {"png": encoded(Image.new("RGB", (1, 9999), "red"))},
    "animated": lambda s: s | {"png": encoded(RED, "GIF", save_all=True, append_images=[RED])},
    "a caption of 1 MB": lambda s: s | {"txt": b"long " * 200_000},
    "NUL and right-to-left": lambda s: s | {"txt": "a\0b \u202eدائرة حمراء 🟥".encode()},
}
FAULTS = UNREADABLE | WORDLESS | UNUSUAL
Samples = dict[str, tuple[str, Sample]]  # name -> kind of fault, files


def run(folder: Path, seed: int) -> list[Row]:
    """A row for a folder and one for shards, each with both trainings that read pictures."""
    rows, train = [], replace(tiny.TRAIN, steps=2 * COUNT // 50, batch_size=50, validate_every=20, workers=1)
    for source, write in (("folder", _write_folder), ("shards", _write_shards)):
        row, root = Row(f"training on data of the kind {source!r} with 1% of each fault"), folder / source
        root.mkdir()
        faults = write(root, _samples(random.Random(seed)))
        data = DataConfig(name=source, path=str(root), max_broken=0.25, size=32)
        clip, autoencoder = replace(tiny.clip(), data=data), replace(tiny.autoencoder(), data=data)
        left_out = {"shard", *UNREADABLE, *WORDLESS}
        cases = {"clip": (CLIPTask, clip, left_out)}
        cases["autoencoder"] = (AutoencoderTask, autoencoder, left_out if source == "shards" else {*UNREADABLE})
        for name, (task, config, kinds) in cases.items():
            out = folder / f"{source}-{name}"
            finish(row, lambda task=task, config=config: task(config), train, out, folder / f"{out.name}-log")
            log = out / "left_out.jsonl"
            listed = {json.loads(line)["sample"] for line in log.read_text().splitlines()} if log.is_file() else set()
            wrong = listed ^ {sample for sample, kind in faults.items() if kind in kinds}
            row.expect(not wrong, f"{name}: {len(listed)} are left out, of which {sorted(wrong)[:3]} wrongly or not")
            row.notes.append(f"{name}: {len(listed)} of {COUNT:,} left out, each by name")
            row.count += 1
        rows.append(row)
    return rows


def _samples(draw: random.Random) -> Samples:
    kinds = [kind for kind in FAULTS for _ in range(EACH)]
    kinds += [""] * (COUNT - len(kinds))
    draw.shuffle(kinds)
    samples = {}
    for i, kind in enumerate(kinds):
        size, colour = (draw.randrange(20, 90), draw.randrange(20, 90)), tuple(draw.randbytes(3))
        clean = {"png": encoded(Image.new("RGB", size, colour)), "txt": f"a picture of the colour {i}".encode()}
        samples[f"{i:05d}"] = (kind, FAULTS[kind](clean) if kind else clean)
    return samples


def _write_folder(root: Path, samples: Samples) -> dict[str, str]:
    """Folders `train` and `val`; sample -> kind of fault."""
    for split, part in (("train", samples), ("val", dict(list(samples.items())[:400]))):
        (root / split).mkdir()
        for name, (kind, files) in part.items():
            for suffix, content in files.items() if split == "train" or not kind else ():
                (root / split / f"{name}.{suffix}").write_bytes(content)
    return {f"train/{name}.png": kind for name, (kind, _) in samples.items()}


def _write_shards(root: Path, samples: Samples) -> dict[str, str]:
    """Shards, the second with members that lead outside or are there twice; sample -> kind of fault."""
    names, faults = list(samples), {}
    for number in range(0, COUNT, SHARD):
        part, shard = names[number : number + SHARD], f"train-{number // SHARD:06d}.tar"
        members = [(f"{name}.{suffix}", content) for name in part for suffix, content in samples[name][1].items()]
        faults |= {f"{name} in {shard}": samples[name][0] for name in part}
        for i in range(5) if number == SHARD else ():
            members += [(f"../{i}.png", encoded(RED)), (f"../{i}.txt", b"a")]
            members += [(f"twice{i}.png", encoded(RED))] * 2
            faults |= {f"{name}{i} in {shard}": "shard" for name in ("../", "twice")}
        tar(root / shard, members)
    clean = [name for name in names if not samples[name][0]][:40]
    tar(root / "val-000000.tar", [(f"v{n}.{s}", content) for n in clean for s, content in samples[n][1].items()])
    return faults
