import gzip
import io
import json
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.config import UserError
from ldm.data import order
from ldm.data.order import EpochBatches
from ldm.data.shards import Shards, write_shards
from ldm.data.tar import LARGEST, verify


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (number, 0, 255 - number)).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count, first=0):
    for i in range(first, first + count):
        yield {
            "key": f"k{i:03d}",
            "suffix": "png",
            "image": png(i),
            "captions": [f"caption {i}", "ein Bild"],
            "n": [i, {"ü": None}],
        }


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_round_trip(tmp_path):
    assert write_shards(samples(40), tmp_path, "train", shard_bytes=20_480) == 40
    assert write_shards(samples(3, 40), tmp_path, "test") == 3
    train, test = Shards(tmp_path, 8), Shards(tmp_path, 8, "test")
    assert (len(train), len(test)) == (40, 3) and sum(train.lengths) == 40 and len(train.lengths) > 3
    assert all(file.stat().st_size <= 20_480 for file in tmp_path.glob("train-*.tar"))
    assert [sample["key"] for sample in train] == [f"k{i:03d}" for i in range(40)]
    sample = train[17]
    assert sample["image"].shape == (3, 8, 8) and sample["image"][:, 4, 4].tolist() == [17, 0, 238]
    assert sample["captions"] == train.captions(17) == ["caption 17", "ein Bild"]
    assert train.record(17) == {"key": "k017", "captions": ["caption 17", "ein Bild"], "n": [17, {"ü": None}]}
    assert train[-1]["key"] == "k039" and verify(tmp_path) == len(train.lengths) + 1
    with pytest.raises(IndexError):
        train[40]


def test_same_samples_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards(samples(20), tmp_path / name, "train", shard_bytes=20_480)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir()) and "index.json" in names
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_writing_again_replaces_one_split_and_failing_changes_nothing(tmp_path):
    write_shards(samples(40), tmp_path, "train", shard_bytes=20_480)
    write_shards(samples(2), tmp_path, "test")

    def failing():
        yield from samples(5)
        raise RuntimeError("no more")

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError):
        write_shards(failing(), tmp_path, "train")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_shards(samples(4), tmp_path, "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "test-000000.tar", "train-000000.tar"]
    assert len(Shards(tmp_path, 8)) == 4 and len(Shards(tmp_path, 8, "test")) == 2 and verify(tmp_path) == 2


def test_bad_samples_are_not_written(tmp_path):
    good = next(samples(1))
    for change, message in (
        ({"key": "../x"}, "sample key '../x' must be"),
        ({"key": "a.b"}, "must be 1 to 90"),
        ({"suffix": "exe"}, "suffix 'exe'; allowed: jpg, jpeg, png, webp"),
        ({"captions": []}, "has no caption"),
    ):
        with pytest.raises(UserError, match=message):
            write_shards([good | change], tmp_path, "train")
    with pytest.raises(UserError, match="two samples have the key 'k000'"):
        write_shards([good, good], tmp_path, "train")
    with pytest.raises(UserError, match="no samples"):
        write_shards([], tmp_path, "train")
    assert not list(tmp_path.iterdir())


def test_webdataset_convention_from_elsewhere(tmp_path):
    members = [
        ("./d/a.JPG", png(1)),
        ("./d/a.txt", b"one\n\ntwo\n"),
        ("d/a.seg.png", b"another picture of the sample"),
        ("d/b.json", b'{"text": "three", "width": 4}'),
        ("d/b.webp", png(2)),
        ("d/._c.png", b"what a file manager leaves behind"),
        ("c.png", png(3)),
        ("c.json", b'{"url": "x"}'),
        ("c.txt", "vier, fünf".encode()),
        ("d/long-" + "n" * 150 + ".png", png(4)),
        ("d/long-" + "n" * 150 + ".txt", b"six"),
    ]
    shards = Shards(tar(tmp_path / "train-0.tar", members), 8)
    found = [(sample["key"], sample["captions"], int(sample["image"][0, 0, 0])) for sample in shards]
    assert found[0] == ("d/a", ["one", "two"], 1) and found[1] == ("d/b", ["three"], 2)
    assert found[2] == ("c", ["vier, fünf"], 3) and found[3][1:] == (["six"], 4)
    assert shards.record(1)["width"] == 4 and shards.record(2)["url"] == "x" and len(shards) == 4


def test_shards_without_a_split_in_their_name_are_split_by_captions(tmp_path):
    for shard in range(2):
        numbers = range(shard * 30, shard * 30 + 30)
        members = [(f"{i:03d}.png", png(i)) for i in numbers] + [
            (f"{i:03d}.txt", f"caption {i % 30}".encode()) for i in numbers
        ]
        tar(tmp_path / f"{shard:05d}.tar", members)
    parts = {name: Shards(tmp_path, 8, name, val=0.2, test=0.3) for name in ("train", "val", "test")}
    keys = [sample["key"] for part in parts.values() for sample in part]
    assert sorted(keys) == [f"{i:03d}" for i in range(60)]
    captions = {name: {sample["captions"][0] for sample in part} for name, part in parts.items()}
    assert sum(map(len, captions.values())) == 30  # each caption, though in two shards, is in one split only
    assert sum(parts["test"].lengths) == len(parts["test"])


@pytest.mark.parametrize("cut", [100, 512, 700, 5000, -1, -512, -9000])
def test_cut_shards_are_named(tmp_path, cut):
    write_shards(samples(6), tmp_path, "train")
    file = tmp_path / "train-000000.tar"
    data = file.read_bytes()
    file.write_bytes(data[:cut])
    with pytest.raises(UserError, match="'train-000000.tar' has .* bytes but index.json says"):
        Shards(tmp_path, 8)
    (tmp_path / "index.json").unlink()
    if 0 < cut < 6 * 2048:
        with pytest.raises(UserError, match="train-000000.tar' is cut short"):
            Shards(tmp_path, 8)


def test_a_shard_cut_between_members_is_noticed_without_an_index(tmp_path):
    file = tar(tmp_path / "train-0.tar", [("a.png", png(1)), ("a.txt", b"a"), ("b.png", png(2)), ("b.txt", b"b")])
    data = file.read_bytes()
    for blocks in range(1, 8):  # each member here is a header and one block
        file.write_bytes(data[: blocks * 512])
        with pytest.raises(UserError, match=r"train-0\.tar' is cut short"):
            Shards(tmp_path, 8)
    file.write_bytes(data[:1024] + b"\1" + data[1025:])  # the second header does not match its checksum
    with pytest.raises(UserError, match="cut short or damaged after 1024 bytes"):
        Shards(tmp_path, 8)


def test_index_disagrees(tmp_path):
    write_shards(samples(6), tmp_path, "train")
    index = tmp_path / "index.json"
    table = json.loads(index.read_text())

    def refused(message, **entry):
        index.write_text(json.dumps({"shards": {"train-000000.tar": table["shards"]["train-000000.tar"] | entry}}))
        with pytest.raises(UserError, match=message):
            Shards(tmp_path, 8)

    refused("'train-000000.tar' has 6 samples but index.json says 7", samples=7)
    refused("is no index of shards", bytes="many")
    index.write_text("{")
    with pytest.raises(UserError, match="index.json is not valid JSON"):
        Shards(tmp_path, 8)
    for name in ("train-000009.tar", "../train-000000.tar"):
        index.write_text(json.dumps({"shards": table["shards"] | {name: table["shards"]["train-000000.tar"]}}))
        with pytest.raises(UserError, match=f"'{name}'.* is missing"):
            Shards(tmp_path, 8)
    index.write_text(json.dumps(table))
    tar(tmp_path / "train-000001.tar", [("x.png", png(1)), ("x.txt", b"x")])
    with pytest.raises(UserError, match="'train-000001.tar' is not in index.json"):
        Shards(tmp_path, 8)


def test_changed_byte_is_found_by_verify(tmp_path):
    write_shards(samples(6), tmp_path, "train")
    file = tmp_path / "train-000000.tar"
    data = bytearray(file.read_bytes())
    data[600] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="'train-000000.tar' does not have the SHA-256"):
        verify(tmp_path)


PICTURE, TEXT = ("a.png", png(1)), ("a.txt", b"a")
BAD_MEMBERS = {
    "has no caption": [PICTURE, TEXT, ("b.png", png(1)), ("c.png", png(1))],
    "'b' has no caption.*2 of 3 samples cannot": [PICTURE, TEXT, ("b.png", png(1)), ("c.png", png(1))],
    "has no picture": [PICTURE, TEXT, ("b.txt", b"b")],
    "two members for the image of 'a.png'": [PICTURE, PICTURE, TEXT],
    "two members for the image of 'a.jpg'": [PICTURE, ("a.jpg", png(1)), TEXT],
    "unsafe name '../a.png'": [("../a.png", png(1)), ("../a.txt", b"a")],
    "unsafe name '/a.png'": [("/a.png", png(1)), ("/a.txt", b"a")],
    "not UTF-8": [PICTURE, ("a.txt", b"\xff\xfe")],
    "a.txt in shard .* has no caption": [PICTURE, ("a.txt", b" \n")],
    "not valid JSON": [PICTURE, ("a.json", b"{")],
    "no 'captions' or 'text'": [PICTURE, ("a.json", b"{}")],
    "must be a string or a list": [PICTURE, ("a.json", b'{"text": 3}')],
    "a in shard train-0.tar' is no image file": [("a.png", png(1)[:40]), TEXT],
}


@pytest.mark.parametrize("message", BAD_MEMBERS)
def test_bad_members(tmp_path, message):
    tar(tmp_path / "train-0.tar", BAD_MEMBERS[message])
    with pytest.raises(UserError, match=message) as caught:
        Shards(tmp_path, 8)[0]
    assert "train-0.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_links_devices_and_oversized_members(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, data in (PICTURE, TEXT):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert [sample["key"] for sample in Shards(tmp_path, 8)] == ["a"]
    monkeypatch.setitem(LARGEST, "image", 10)
    with pytest.raises(UserError, match="'a.png' of shard 'train-0.tar' has .* bytes; at most 10"):
        Shards(tmp_path, 8)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Shards(tmp_path / "gone", 8)
    with pytest.raises(UserError, match=r"no \*.tar shards"):
        Shards(tmp_path, 8)
    with pytest.raises(UserError, match="unknown split 'dev'"):
        Shards(tmp_path, 8, "dev")
    (tmp_path / "train-0.tar").write_bytes(gzip.compress(b"x" * 5000))
    with pytest.raises(UserError, match="cut short or no plain tar"):
        Shards(tmp_path, 8)
    tar(tmp_path / "train-0.tar", [PICTURE, TEXT])
    with pytest.raises(UserError, match="split 'test' of .* is empty"):
        Shards(tmp_path, 8, "test")
    tar(tmp_path / "train-1.tar", [PICTURE, TEXT])
    with pytest.raises(UserError, match="'a' is in shard 'train-0.tar' and again in 'train-1.tar'"):
        Shards(tmp_path, 8)


def test_worker_processes_read_what_one_process_reads(tmp_path):
    write_shards(samples(12), tmp_path, "train", shard_bytes=20_480)
    shards = Shards(tmp_path, 8)
    shards[0]
    batches = EpochBatches(12, 4, seed=0, steps=3, blocks=shards.lengths)
    copy = pickle.loads(pickle.dumps(shards))  # as a spawned worker gets it
    loader = DataLoader(copy, batch_sampler=batches, num_workers=2, collate_fn=list)
    for batch, indices in zip(loader, batches, strict=True):
        assert [sample["key"] for sample in batch] == [shards[i]["key"] for i in indices]
        assert all(torch.equal(sample["image"], shards[i]["image"]) for sample, i in zip(batch, indices, strict=True))


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
    assert len(EpochBatches(37, 6, 1, start=23, steps=40)) == 17
    endless = iter(EpochBatches(37, 6, 1))
    assert [next(endless) for _ in range(40)] == whole


def test_shuffle_is_fair():
    places = np.array([EpochBatches(10, 1, 0).permutation(epoch) for epoch in range(4000)])
    counts = np.array([np.bincount(places[:, i], minlength=10) for i in range(10)])
    assert abs(counts - 400).max() < 100  # 5 standard deviations


def test_blocks_keep_reading_local(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 3)
    blocks = [20] * 12
    mixed = EpochBatches(240, 1, 0, blocks=blocks).permutation(0) // 20
    for first in range(0, 240, 60):
        window = mixed[first : first + 60]
        assert len(set(window)) == 3 and len(set(window[:20])) > 1
    assert sorted(set(mixed[:60])) != [0, 1, 2]


def test_bad_orders():
    with pytest.raises(UserError, match="no samples"):
        EpochBatches(0, 4, 0)
    with pytest.raises(UserError, match="batch_size is 0"):
        EpochBatches(4, 0, 0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        EpochBatches(4, 1, 0, rank=2, world=2)
    with pytest.raises(ValueError, match="blocks hold 3"):
        EpochBatches(4, 1, 0, blocks=[3])
