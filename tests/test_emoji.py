"""The shipped emoji set, its split, its captions, and the builder on a small package of its own."""

import io
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_shards import open_shards, tar

from ldm.config import UserError
from ldm.data import DataConfig, emoji, emoji_build, open_dataset
from ldm.data.emoji import SHIPPED, Emoji
from ldm.data.splits import SPLITS


@pytest.fixture(scope="module")
def sets() -> dict[str, Emoji]:
    return {split: Emoji(64, split) for split in SPLITS}


def test_the_shipped_copy_has_its_licences_and_the_promised_shares(sets):
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) <= 12e6
    assert all(len(file.read_text()) > 1000 for file in SHIPPED.glob("LICENSE*"))
    assert [len(data) for data in sets.values()] == [6442, 144, 575]
    rows = [line.rsplit(maxsplit=3) for line in (SHIPPED / "split.txt").read_text().splitlines()[1:]]
    for name, *counts in rows:
        key, _, value = name.partition(": ")
        value = "" if value == "no" else value
        chosen = [[r for r in d.records if key == "all" or r[key.replace(" ", "_")] == value] for d in sets.values()]
        assert [len(records) for records in chosen] == list(map(int, counts)), name


def test_a_sample_keeps_the_contract_on_white_ground(sets):
    sample = open_dataset(DataConfig(name="emoji", size=64), "val")[3]
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.uint8
    assert sample["captions"] == sets["val"].captions(3) and sample["key"] == sets["val"].records[3]["key"]
    assert Emoji(32, "val")[3]["image"].shape == (3, 32, 32)
    corners = torch.stack([sample["image"][:, [0, 0, -1, -1], [0, -1, 0, -1]] for sample in sets["val"]])
    assert (corners == 255).float().mean() > 0.9  # flags and buttons reach some corners


def _png(colour: tuple[int, ...], box: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    picture = Image.new("RGBA", size, (255, 0, 0, 0))  # red under full transparency
    picture.paste(colour, box)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """Two packages in the layout of the real ones, of the first 8 emoji of each split: squares of many colours; these
    few are then the shipped set."""
    rng, shipped = np.random.default_rng(0), tmp_path / "shipped"
    files: dict[str, dict[str, bytes]] = {style: {} for style in emoji_build.PACKAGES}
    for split in SPLITS:
        few = Emoji(64, split)
        emoji_build.write_shard(shipped / f"{split}-000000.tar", few.records[:8], few.pictures[:8])
        for record in few.records[:8]:
            left, top, wide, high = (int(v) for v in rng.integers(8, 28, 4))
            level, blue = map(int, rng.integers(0, 200, 2))  # as much red as green, or the hidden red would not show
            picture = _png((level, level, blue, 255), (left, top, left + wide, top + high))
            stem, suffix = emoji_build.PICTURES[record["style"]]
            files[record["style"]][stem + record["key"].partition("-")[2].upper() + suffix] = picture
    for name in ("split.txt", "LICENSES.md", "LICENSE-MIT.txt"):
        (shipped / name).write_text(name)
    folder = tmp_path / "packages"
    folder.mkdir()
    for style, name in emoji_build.PACKAGES.items():
        archive = tar(folder / "archive.tar", files[style].items())
        archive.rename(folder / (name.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"))
    for module in (emoji, emoji_build):
        monkeypatch.setattr(module, "SHIPPED", shipped)
    return folder


def test_builds_are_reproducible_and_keep_the_shipped_captions_and_split(packages, tmp_path):
    assert emoji_build.build(tmp_path / "a", 128, packages) == emoji_build.build(tmp_path / "b", 128, packages) == 24
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes() and not file.name.startswith(".")
    for split in SPLITS:
        ours, shards = Emoji(128, split, tmp_path / "a"), open_shards(tmp_path / "a", 128, split)
        assert ours.records == Emoji(64, split).records and len(shards) == 8
        assert torch.equal(ours[0]["image"], shards[0]["image"]) and ours.captions(0) == shards.captions(0)
        for sample in ours:  # the square, centred on white; red under full transparency would show at its edges
            x = 255 - sample["image"].int()
            drawn = torch.argwhere(x[0] > x[0, 64, 64] // 2).double()
            assert abs(drawn.mean(0) - 63.5).max() <= 1 and not x[:, 0].any() and abs(x[0] - x[1]).max() <= 1
    emoji_build.build(tmp_path / "b", 64, packages)
    assert emoji_build.build(tmp_path / "a", 64, packages, compact=True) == 24  # replaces the other
    names = {f"{split}-000000.tar.gz" for split in SPLITS}
    assert names | {"split.txt", "LICENSES.md", "LICENSE-MIT.txt"} == {file.name for file in (tmp_path / "a").iterdir()}
    compact, exact = (Emoji(64, "train", tmp_path / name) for name in "ab")
    far = [(a["image"].int() - b["image"]).abs().max() for a, b in zip(compact, exact, strict=True)]
    assert len(far) == 8 and 0 < max(far) <= emoji_build.STEP // 2 + 1


def test_mistakes_in_reading_are_named(tmp_path):
    (tmp_path / "test-000000.tar").write_bytes(b"no tar at all")
    for options, message in (
        ({"size": 128}, "--size 128"),
        ({"folder": tmp_path}, "holds no emoji"),
        ({"folder": tmp_path, "split": "test"}, "is broken"),
    ):
        with pytest.raises(UserError, match=message):
            Emoji(**options)


def test_mistakes_in_building_are_named_and_write_nothing(tmp_path, monkeypatch, packages):
    def refused(message: str, *arguments: int | Path) -> None:
        with pytest.raises(UserError, match=message):
            emoji_build.build(tmp_path / "out", *arguments)

    refused("allowed: 64, 128", 96, packages)
    refused("`npm pack @lobehub/fluent-emoji-3d@1.1.0` writes it", 64, tmp_path)
    monkeypatch.setitem(emoji_build.PICTURES, "3D", ("elsewhere/", ".webp"))
    refused("the packages hold no picture 3D-", 64, packages)
    for file in packages.iterdir():
        file.write_bytes(b"cut short")
    refused("is broken", 64, packages)
    monkeypatch.setattr(emoji_build.shutil, "which", lambda name: None)
    refused("npm is not installed", 64)
    monkeypatch.setattr(emoji_build.shutil, "which", lambda name: "npm")
    failed = subprocess.CompletedProcess([], 1, "", "npm error code E404")
    monkeypatch.setattr(emoji_build.subprocess, "run", lambda *args, **kwargs: failed)
    refused("E404", 64)
    assert not (tmp_path / "out").exists()
