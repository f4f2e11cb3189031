"""The shipped emoji set, its split, its captions, and the builder on a small package of its own."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from ldm.config import UserError
from ldm.data import DataConfig, emoji_build, emoji_names, emoji_split, open_dataset
from ldm.data.emoji import SHIPPED, Emoji
from ldm.data.shards import Shards

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"


@pytest.fixture(scope="module")
def sets() -> dict[str, Emoji]:
    return {split: Emoji(64, split) for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def blocks(sets) -> dict[str, torch.Tensor]:
    """Means of 4x4 pixels of every picture, (N, 768)."""
    pool = torch.nn.AvgPool2d(4)
    return {
        split: torch.stack([pool(data[i]["image"].float()).flatten() for i in range(len(data))])
        for split, data in sets.items()
    }


# --- the shipped copy


def test_the_shipped_copy_is_small_whole_and_licensed(sets):
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6
    index = json.loads((SHIPPED / "index.json").read_text())["shards"]
    assert {name: entry["samples"] for name, entry in index.items()} == {
        f"{split}-000000.tar.gz": len(data) for split, data in sets.items()
    }
    for name in emoji_build.LICENCES:
        assert len((SHIPPED / name).read_text()) > 1000
    assert "END OF TERMS AND CONDITIONS" in (SHIPPED / "LICENSE-APACHE-2.0.txt").read_text()


def test_the_split_has_the_promised_shares(sets):
    total = sum(len(data) for data in sets.values())
    assert total > 7000
    assert len(sets["test"]) / total == pytest.approx(0.08, abs=0.005)
    assert len(sets["val"]) / total == pytest.approx(0.02, abs=0.003)
    records = [{**record, "split": split} for split, data in sets.items() for record in data.records]
    assert emoji_split.table(records) + "\n" == (SHIPPED / "split.txt").read_text()


def test_a_sample_keeps_the_contract(sets):
    sample = open_dataset(DataConfig(name="emoji", size=64), "val")[3]
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.uint8
    assert sample["captions"] == sets["val"].captions(3) and len(sample["captions"]) >= 2
    assert sample["key"] == sets["val"].records[3]["key"]
    assert torch.equal(sample["image"], sets["val"][3]["image"])
    assert Emoji(32, "val")[3]["image"].shape == (3, 32, 32)


def test_every_picture_has_a_white_ground_and_several_captions(sets):
    data = sets["test"]
    corners = torch.stack([data[i]["image"][:, [0, 0, -1, -1], [0, -1, 0, -1]] for i in range(len(data))])
    assert (corners == 255).float().mean() > 0.9  # flags and buttons reach some corners
    for split in sets.values():
        for record in split.records:
            assert len(set(record["captions"])) == len(record["captions"]) >= 2
            assert any(record["style"] in caption.split() for caption in record["captions"])
            other = {"3D": "flat", "flat": "3D"}[record["style"]]
            assert not any(caption.endswith(f", {other}") for caption in record["captions"])


# --- the split leaks nothing


def test_no_caption_is_shared_between_splits(sets):
    texts = {s: {c.casefold() for r in data.records for c in r["captions"]} for s, data in sets.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["val"]
    assert not texts["val"] & texts["test"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_concepts_are_trained_on_in_the_other_style_only(sets, split):
    seen = {(r["concept"], r["style"]) for r in sets["train"].records}
    held = [r for r in sets[split].records if r["held_out"] == "concept"]
    for record in held:
        other = {"3D": "flat", "flat": "3D"}[record["style"]]
        assert (record["concept"], record["style"]) not in seen
        assert (record["concept"], other) in seen
    assert len(held) > 0.4 * len(sets[split])


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_combinations_are_trained_on_in_neither_style_but_their_parts_are(sets, split):
    names = ("role", "skin_tone", "gender")
    seen = {tuple(r[name] for name in names) for r in sets["train"].records}
    parts = [{combination[i] for combination in seen} for i in range(3)]
    held = [r for r in sets[split].records if r["held_out"] == "combination"]
    for record in held:
        combination = tuple(record[name] for name in names)
        assert combination not in seen
        assert all(part in known for part, known in zip(combination, parts, strict=True))
    assert len(held) > 0.4 * len(sets[split])
    assert {r["held_out"] for r in sets[split].records} == {"concept", "combination"}
    assert {r["held_out"] for r in sets["train"].records} == {""}


def test_no_picture_is_near_identical_across_splits(sets, blocks):
    # Another distance than the builder's: root mean square of 4x4 blocks' differences. Two same flags have 0.
    for a, b in (("test", "train"), ("val", "train"), ("test", "val")):
        nearest = torch.cdist(blocks[a], blocks[b]).min() / 768**0.5

        assert nearest > 3
    twins = torch.cdist(blocks["train"][:800], blocks["train"][800:]) / 768**0.5
    assert (twins < 1).any()  # they exist, so the line above says something


def test_the_perceptual_hash_finds_twins_and_tells_skin_tones_apart(sets):
    pictures = {r["key"]: i for i, r in enumerate(sets["train"].records)}

    def images(*keys: str) -> list[np.ndarray]:
        return [rearrange(sets["train"][pictures[key]]["image"], "c h w -> h w c").numpy() for key in keys]

    norway, bouvet = "flat-1f1f3-1f1f4", "flat-1f1e7-1f1fb"
    assert emoji_split.near_pairs(images(norway, bouvet)) == [(0, 1)]
    medium_dark, dark = "3D-1f44d-1f3fe", "3D-1f44d-1f3ff"  # thumbs up
    assert emoji_split.near_pairs(images(medium_dark, dark)) == []
    noise = np.random.default_rng(0).integers(-6, 7, (64, 64, 3))
    picture = images(norway)[0]
    noisy = (picture.astype(int) + noise).clip(0, 255).astype(np.uint8)
    assert emoji_split.near_pairs([picture, picture[:, ::-1], noisy]) == [(0, 2)]


def _records(n: int = 120) -> list[dict]:
    tones, styles = ["", "light", "dark", "medium"], ["3D", "flat"]
    return [
        {
            "key": f"{style}-{i}-{tone}",
            "concept": f"woman r{i}",
            "style": style,
            "role": f"r{i}",
            "skin_tone": tone,
            "gender": "woman",
            "group": "People & Body",
            "captions": [f"woman r{i} {tone}", f"woman r{i} {tone}, {style}", f"a {style} r{i} {tone}"],
        }
        for i in range(n // 8)
        for style in styles
        for tone in tones
    ]


def test_the_split_depends_on_content_and_seed_not_on_order():
    first, turned, other = _records(), _records()[::-1], _records()
    emoji_split.assign(first, [])
    emoji_split.assign(turned, [])
    emoji_split.assign(other, [], seed=1)
    a, b, c = ({r["key"]: r["split"] for r in records} for records in (first, turned, other))
    assert a == b != c


def test_groups_with_a_near_identical_picture_outside_stay_in_train():
    records = _records()
    emoji_split.assign(records, [(i, (i + 8) % len(records)) for i in range(len(records))])
    assert {record["split"] for record in records} == {"train"}


def test_captions_that_train_has_are_dropped_from_test_and_none_left_is_an_error():
    records = [
        {"key": "a", "split": "train", "captions": ["A dog", "dog, 3D"]},
        {"key": "b", "split": "test", "captions": ["a dog", "dog, flat", "a flat dog"]},
    ]
    emoji_split.clean_captions(records)
    assert records[1]["captions"] == ["dog, flat", "a flat dog"]
    records[1]["captions"] = ["a dog", "dog, 3d", "dog, flat"]
    with pytest.raises(ValueError, match="too few captions"):
        emoji_split.clean_captions(records)


# --- words


@pytest.fixture(scope="module")
def words(sets) -> dict[str, dict]:
    return {record["key"]: record for data in sets.values() for record in data.records}


@pytest.mark.parametrize(
    ("key", "role", "tone", "gender", "phrase"),
    [
        ("3D-1f468-1f3fb-200d-1f33e", "farmer", "light", "man", "a man farmer with light skin tone"),
        ("flat-1f1ef-1f1f5", "", "", "", "flag of Japan"),
        ("3D-1f1f3-1f1f1", "", "", "", "flag of the Netherlands"),
        ("flat-1f44d-1f3fd", "thumbs up", "medium", "", "thumbs up with medium skin tone"),
        ("flat-1f9d4-1f3fb-200d-2642", "beard", "light", "man", "a man with a beard and light skin tone"),
        ("3D-1f478-1f3fe", "royal", "medium-dark", "woman", "a princess with medium-dark skin tone"),
        ("flat-1f984", "", "", "", "a unicorn"),
        ("3D-1f602", "", "", "", "a face with tears of joy"),
        ("flat-1f35e", "", "", "", "bread"),
    ],
)
def test_attributes_and_phrases(words, key, role, tone, gender, phrase):
    record = words[key]
    assert (record["role"], record["skin_tone"], record["gender"]) == (role, tone, gender)
    style = record["style"]
    assert f"{style} icon of {phrase}" in record["captions"]
    assert f"a {style} emoji of {phrase}" in record["captions"]


def test_captions_come_in_every_wording():
    dog = {"plain": "dog face", "natural": "a dog face", "keywords": "dog face, dog, animal"}
    assert emoji_names.captions_of(dog, "flat") == [
        "dog face",
        "a dog face",
        "dog face, flat",
        "a flat emoji of a dog face",
        "flat icon of a dog face",
        "dog face, dog, animal",
        "dog face, dog, animal, flat",
    ]
    bare = {"plain": "bread", "natural": "bread", "keywords": ""}
    assert len(emoji_names.captions_of(bare, "3D")) == 4


def test_code_points_have_one_spelling():
    assert emoji_names.codes("23-fe0f-20e3") == emoji_names.codes("0023-FE0F-20E3") == "0023-20e3"
    england = "1f3f4-e0067-e0062-e0065-e006e-e0067-e007f"
    assert emoji_names.codes("1f3f4-e0067_e0062_e0065_e006e_e0067") == emoji_names.codes(england) == england


# --- the builder


def _png(colour: tuple[int, ...], box: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    picture = Image.new("RGBA", size, (255, 0, 0, 0))  # red under full transparency
    picture.paste(colour, box)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("size", [64, 32, 128])
def test_pictures_are_centred_on_white_without_fringes(size):
    x = emoji_build.picture(_png((0, 0, 255, 255), (0, 8, 32, 48)), size).astype(int)
    assert x.shape == (size, size, 3)
    drawn = np.argwhere(x[..., 0] < 128)
    assert np.abs(drawn.mean(axis=0) - (size - 1) / 2).max() < 1
    assert tuple(x[0, 0]) == (255, 255, 255) and tuple(x[size // 2, size // 2]) == (0, 0, 255)
    # Between white and blue, red and green are equal; the hidden red would show as red above green.
    assert np.abs(x[..., 0] - x[..., 1]).max() <= 1


def test_tall_pictures_keep_their_shape():
    x = emoji_build.picture(_png((0, 0, 0, 255), (20, 4, 40, 44), (60, 66)), 66)
    rows, columns = np.where(x[..., 0] < 128)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (40, 20)


def test_encoding_is_lossless_and_the_compact_one_near():
    x = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    x[:4] = 255

    def read(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    assert np.array_equal(read(emoji_build.encode(x, False)), x)
    compact = read(emoji_build.encode(x, True)).astype(int)
    assert np.abs(compact - x).max() <= emoji_build.STEP // 2 + 1 and (compact[:4] == 255).all()


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """Two packages in the layout of the real ones: 32 animals, each a square of its own colour and place."""
    folder, rng = tmp_path_factory.mktemp("packages"), np.random.default_rng(0)
    points = [f"{0x1F400 + i:x}" for i in range(32)]
    entries = [
        {"unified": p.upper(), "short_name": f"a{p}", "short_names": [f"a{p}"]}
        | {"category": "Animals & Nature", "subcategory": "animal-mammal"}
        for p in points
    ]
    for style, name in emoji_build.PACKAGES.items():
        stem, suffix = emoji_build.PICTURES[style]
        files = {"package/emoji.json": json.dumps(entries).encode()}
        for p in points:
            left, top, wide, high = (int(v) for v in rng.integers(8, 28, 4))
            colour = (*(int(v) for v in rng.integers(0, 200, 3)), 255)
            files[f"{stem}{p}{suffix}"] = _png(colour, (left, top, left + wide, top + high))
        file = folder / (name.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        with tarfile.open(file, "w:gz") as tar:
            for member, data in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_build_gives_the_same_bytes_twice_and_is_read_as_emoji_and_as_shards(packages, tmp_path):
    pytest.importorskip("emoji")
    records = emoji_build.build(tmp_path / "a", 128, packages)
    emoji_build.build(tmp_path / "b", 128, packages)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert len(records) == 64
    for split in ("train", "val", "test"):
        ours, shards = Emoji(128, split, tmp_path / "a"), Shards(tmp_path / "a", 128, split)
        assert len(ours) == len(shards) == sum(record["split"] == split for record in records) > 0
        sample, same = ours[0], shards[0]
        assert torch.equal(sample["image"], same["image"]) and sample["captions"] == same["captions"]
        assert sample["image"].shape == (3, 128, 128)
    assert not [file for file in (tmp_path / "a").iterdir() if file.name.startswith(".")]


def test_a_compact_build_replaces_an_older_one(packages, tmp_path):
    pytest.importorskip("emoji")
    plain = emoji_build.build(tmp_path, 64, packages)
    assert len(plain) == len(emoji_build.build(tmp_path, 64, packages, compact=True))
    assert not list(tmp_path.glob("*.tar")) and len(list(tmp_path.glob("*.tar.gz"))) == 3
    assert len(Emoji(64, "train", tmp_path)) == sum(record["split"] == "train" for record in plain)


# --- users' mistakes


def test_mistakes_in_reading_are_named(tmp_path):
    with pytest.raises(UserError, match="unknown split 'dev'"):
        Emoji(64, "dev")
    with pytest.raises(UserError, match="--size 128"):
        Emoji(128, "train")
    with pytest.raises(UserError, match="holds no emoji"):
        Emoji(64, "train", tmp_path)
    (tmp_path / "train-000000.tar").write_bytes(b"no tar at all")
    with pytest.raises(UserError, match="is broken"):
        Emoji(64, "train", tmp_path)


def test_mistakes_in_building_are_named_and_write_nothing(tmp_path, monkeypatch, packages):
    pytest.importorskip("emoji")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="allowed: 64, 128"):
        emoji_build.build(out, 96, packages)
    with pytest.raises(UserError, match="`npm pack @lobehub/fluent-emoji-3d@1.1.0` writes it"):
        emoji_build.build(out, 64, tmp_path)
    for name in [file.name for file in packages.iterdir()]:
        (tmp_path / name).write_bytes(b"cut short")
    with pytest.raises(UserError, match="is broken"):
        emoji_build.build(out, 64, tmp_path)
    monkeypatch.setattr(emoji_build.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm is not installed"):
        emoji_build.build(out, 64)
    monkeypatch.setattr(emoji_build.shutil, "which", lambda name: "npm")
    failed = subprocess.CompletedProcess([], 1, "", "npm error code E404")
    monkeypatch.setattr(emoji_build.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match="E404"):
        emoji_build.build(out, 64)
    assert not out.exists()


def test_the_script_has_help_and_exit_code_2(tmp_path):
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)

    assert "--packages" in run("emoji", "--help").stdout
    wrong = run("emoji", "--size", "64", "--out", str(tmp_path / "out"), "--packages", str(tmp_path))
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr
    assert not (tmp_path / "out").exists()
