"""Tar shards: a round trip, WebDatasets from elsewhere, cuts and bad samples; and the order of reading."""

import gzip
import io
import json
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from test_data_folder import bomb

from ldm.config import UserError
from ldm.data import DataConfig, open_dataset, order, sampling_weights
from ldm.data.emoji_build import write_shard
from ldm.data.faults import readable
from ldm.data.order import EpochBatches
from ldm.data.splits import SPLITS


def open_shards(path, size=8, split="train", **options):
    return open_dataset(DataConfig(name="shards", path=str(path), size=size, **options), split)


def png(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (number, 0, 255 - number)).save(buffer, kind)
    return buffer.getvalue()


def samples(count, first=0):
    for i in range(first, first + count):
        captions = [f"caption {i}", "ein Bild"]
        yield {"key": f"k{i:03d}", "image": png(i), "captions": captions, "n": [i, {"ü": None}]}


def tar(path, members):
    """An archive of names, or prepared headers, and contents."""
    with tarfile.open(path, "w") as archive:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(samples, folder, split, per_shard=100):
    records = list(samples)
    images = [record.pop("image") for record in records]
    for number, i in enumerate(range(0, len(records), per_shard)):
        part = slice(i, i + per_shard)
        write_shard(folder / f"{split}-{number:06d}.tar", records[part], images[part], "png")


def test_round_trip(tmp_path):
    write_shards(samples(40), tmp_path, "train", per_shard=9)
    write_shards(samples(3, 40), tmp_path, "test")
    train, test = open_shards(tmp_path, 8), open_shards(tmp_path, 8, "test")
    assert (len(train), len(test)) == (40, 3) and train.lengths == [9, 9, 9, 9, 4]
    assert [sample["key"] for sample in train] == [f"k{i:03d}" for i in range(40)]
    sample = train[17]
    assert sample["image"].shape == (3, 8, 8) and sample["image"][:, 4, 4].tolist() == [17, 0, 238]
    assert sample["captions"] == train.captions(17) == ["caption 17", "ein Bild"]
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        record = json.loads(archive.extractfile("k001.json").read())
    assert record == {"captions": ["caption 1", "ein Bild"], "n": [1, {"ü": None}]}
    with pytest.raises(IndexError):
        train[40]


def test_webdataset_convention_from_elsewhere(tmp_path):
    members = [
        ("./d/a.JPG", png(1)),
        ("./d/a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\r\n"),
        ("d/a.seg.png", b"another picture of the sample"),
        ("d/b.json", b'{"text": "three", "width": 4}'),
        ("d/b.webp", png(2)),
        ("d/._c.png", b"what a file manager leaves behind"),
        ("c.gif", png(3, "GIF")),
        ("c.json", b'{"url": "x"}'),
        ("c.TXT", "vier, fünf".encode()),
        ("d/long-" + "n" * 150 + ".tif", png(4, "TIFF")),
        ("d/long-" + "n" * 150 + ".txt", b"six"),
    ]
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    file = tar(tmp_path / "train-0.tar", [*members, (link, b"")])
    read = [(s["key"], s["captions"], int(s["image"][0, 0, 0])) for s in open_shards(file, 8)]
    assert read[0] == ("d/a", ["one", "two"], 1) and read[1] == ("d/b", ["three"], 2)
    assert read[2] == ("c", ["vier, fünf"], 3) and read[3][1:] == (["six"], 4) and len(read) == 4


def test_shards_without_a_split_in_their_name_are_split_by_captions(tmp_path):
    for shard in range(2):
        pairs = (((f"{shard}-{i}.png", png(1)), (f"{shard}-{i}.txt", f"{i}".encode())) for i in range(60))
        tar(tmp_path / f"{shard:05d}.tar", [member for pair in pairs for member in pair])
    parts = [open_shards(tmp_path, 8, name) for name in SPLITS]
    assert sum(map(len, parts)) == 120 and all(sum(part.lengths) == len(part) for part in parts)
    captions = [{sample["captions"][0] for sample in part} for part in parts]
    assert sum(map(len, captions)) == 60  # each caption, though in two shards, is in one split only


def test_names_and_fields_of_others_name_the_split(tmp_path):
    for name, split in (("cc-train-0.tar", "train"), ("validation_00001.tar", "val"), ("eval.0.tar", "test")):
        tar(tmp_path / name, [(f"{split}.png", png(1)), (f"{split}.txt", b"x")])
    assert {split: [s["key"] for s in open_shards(tmp_path, 8, split)] for split in SPLITS} == {s: [s] for s in SPLITS}
    fields = [{"text": f"{i}", "split": ("train", "dev", "testing")[i % 3]} for i in range(6)]
    members = [m for i, f in enumerate(fields) for m in ((f"{i}.png", png(1)), (f"{i}.json", json.dumps(f).encode()))]
    assert [sample["key"] for sample in open_shards(tar(tmp_path / "0.tar", members), 8, "val")] == ["1", "4"]
    other = b'{"text": "x", "split": "restval"}'
    for name, message in (("holdout-0", "looks like a split"), ("train-val-0", "two splits"), ("1", "'restval'")):
        with pytest.raises(UserError, match=message):
            open_shards(tar(tmp_path / f"{name}.tar", [("x.png", png(1)), ("x.json", other)]), 8)


def test_cut_and_damaged_shards_are_named(tmp_path):
    members = [("a.png", png(1)), ("a.txt", b"a"), ("b.png", png(2)), ("b.txt", b"b")]
    file = tar(tmp_path / "train-0.tar", members)
    data, opened = file.read_bytes(), open_shards(tmp_path, 8)
    for end in (100, 700, *range(512, 9 * 512, 512)):  # each member here is a header and one block
        file.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"train-0\.tar' .*is cut short"):
            open_shards(tmp_path, 8)
    file.write_bytes(data[:700])
    with pytest.raises(UserError, match="cut short") as caught:
        opened[1]
    assert type(caught.value) is UserError  # no fault of one sample
    file.write_bytes(data[:1024] + b"\1" + data[1025:])  # the second header does not match its checksum
    with pytest.raises(UserError, match="damaged after 1024 bytes"):
        open_shards(tmp_path, 8)


BAD = {  # sample: its members, what is wrong with it
    "bare": ([("bare.png", png(1))], "'bare' of shard .* has no caption"),
    "blind": ([("blind.txt", b"x")], "has no picture"),
    "twice": ([("twice.png", png(1)), ("twice.jpg", png(1)), ("twice.txt", b"x")], "two members of a kind"),
    "../up": ([("../up.png", png(1)), ("../up.txt", b"x")], "unsafe name"),
    "/up": ([("/up.png", png(1)), ("/up.txt", b"x")], "unsafe name"),
    "latin": ([("latin.png", png(1)), ("latin.txt", b"\xff\xfe")], "not UTF-8"),
    "blank": ([("blank.png", png(1)), ("blank.txt", b" \n")], "has no caption"),
    "json": ([("json.png", png(1)), ("json.json", b"{")], "not valid JSON"),
    "empty": ([("empty.png", png(1)), ("empty.json", b"{}")], "has no caption"),
    "three": ([("three.png", png(1)), ("three.json", b'{"text": 3}')], "must be a string or a list"),
    "torn": ([("torn.png", png(1)[:40]), ("torn.txt", b"x")], "is no image file"),
    "bomb": ([("bomb.png", bomb()), ("bomb.txt", b"x")], "900000000|30000x30000"),
}


@pytest.mark.parametrize("name", ["train-000009.tar", "more.tar"])
def test_bad_samples_are_left_out(tmp_path, name):
    """In a shard of one split and in one of all, whose captions are read at once."""
    write_shards(samples(40), tmp_path, "train", per_shard=9)
    tar(tmp_path / name, [member for members, _ in BAD.values() for member in members])
    data = open_shards(tmp_path, 8, max_broken=0.5)
    assert {data[i]["key"] for i in readable(data, range(len(data)))} == {f"k{i:03d}" for i in range(40)}
    reasons = {key: data.faults.reasons.get(f"{key} in {name}") for key in BAD}
    assert len(data.faults.reasons) == len(list(filter(None, reasons.values())))
    for key, reason in reasons.items():
        if reason or key not in ("torn", "bomb"):  # only seen where they are in the training split
            assert re.search(BAD[key][1], reason) and name in reason and "\n" not in reason
    with pytest.raises(UserError, match="samples cannot be used; data.max_broken = 0.01"):
        open_shards(tmp_path, 8)


def test_bad_folders(tmp_path):
    for folder, split, message in (
        ("gone", "train", "cannot be read: No such file"),
        ("", "train", r"has no \*.tar"),
        ("", "dev", "unknown split 'dev'"),
    ):
        with pytest.raises(UserError, match=message):
            open_shards(tmp_path / folder, 8, split)
    (tmp_path / "train-0.tar").write_bytes(gzip.compress(b"x" * 5000))
    with pytest.raises(UserError, match="cut short or no plain tar"):
        open_shards(tmp_path, 8)
    tar(tmp_path / "train-0.tar", [("a.png", png(1)), ("a.txt", b"a")])
    with pytest.raises(UserError, match="split 'test' of .* is empty"):
        open_shards(tmp_path, 8, "test")
    (tmp_path / "train-1.tar").symlink_to("gone")
    with pytest.raises(UserError, match=r"train-1\.tar' cannot be read.*No such file"):
        open_shards(tmp_path, 8)


@pytest.mark.parametrize("blocks", [None, [7, 1, 12, 5, 9, 3]])
@pytest.mark.parametrize(("batch", "world"), [(4, 1), (3, 4), (50, 2), (37, 1)])
def test_ranks_together_cover_each_epoch_once(batch, world, blocks):
    length, steps = 37, 37 * 4
    ranks = [list(EpochBatches(length, batch, 5, rank, world, steps=steps, blocks=blocks)) for rank in range(world)]
    assert all(len(indices) == batch for rank in ranks for indices in rank)
    stream = [i for step in zip(*ranks, strict=True) for indices in step for i in indices]
    epochs = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    assert len(epochs) == steps * batch * world // length
    assert all(Counter(epoch) == Counter(range(length)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(length))


def test_resume_and_world_size_do_not_change_the_order():
    whole = list(EpochBatches(37, 6, 1, steps=40))
    assert list(EpochBatches(37, 6, 1, start=23, steps=40)) == whole[23:]
    halves = [list(EpochBatches(37, 3, 1, rank, 2, steps=40)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert list(EpochBatches(37, 6, 2, steps=40)) != whole


def test_blocks_keep_reading_local(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 3)
    mixed = EpochBatches(240, 1, 0, blocks=[20] * 12).permutation(0) // 20
    for first in range(0, 240, 60):
        window = mixed[first : first + 60]
        assert len(set(window)) == 3 and len(set(window[:20])) > 1
    assert sorted(set(mixed[:60])) != [0, 1, 2]


def test_concepts_are_drawn_alike_and_the_order_stays_a_function_of_the_step():
    groups = [*"aaaaaaaaaaaaaaaa", *"bbbb", "c"]
    for balance, expected in (("concept", {"a": 7, "b": 7, "c": 7}), ("root", {"a": 12, "b": 6, "c": 3})):

        class Data:
            __len__ = lambda self: len(groups)  # noqa: E731
            captions = lambda self, i: [groups[i], "another"]  # noqa: E731

        weights = sampling_weights(Data(), balance)
        order = EpochBatches(21, 3, 1, steps=7 * 100, weights=weights)
        drawn = [groups[i] for batch in order for i in batch]
        assert {group: drawn.count(group) for group in "abc"} == pytest.approx(
            {group: 100 * count for group, count in expected.items()}, abs=30
        )
        assert [*EpochBatches(21, 3, 1, start=23, steps=40, weights=weights)] == [*order][23:40]
        for epoch in range(100):  # no sample comes more often than its share, rounded up
            counts = np.bincount(order.permutation(epoch), minlength=21)
            assert (abs(counts - 21 * weights / weights.sum()) < 1).all()
    assert sampling_weights(Data(), "picture") is None
