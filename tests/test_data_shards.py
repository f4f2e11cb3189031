"""Tar shards: a round trip, WebDatasets from elsewhere, cuts and bad samples; and the order of reading."""

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
from test_data_folder import bomb
from torch.utils.data import DataLoader

from ldm.config import UserError
from ldm.data import order
from ldm.data.faults import readable
from ldm.data.order import EpochBatches
from ldm.data.shards import Shards, write_shards

SPLITS = ("train", "val", "test")


def png(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (number, 0, 255 - number)).save(buffer, kind)
    return buffer.getvalue()


def samples(count, first=0):
    for i in range(first, first + count):
        captions = [f"caption {i}", "ein Bild"]
        yield {"key": f"k{i:03d}", "suffix": "png", "image": png(i), "captions": captions, "n": [i, {"ü": None}]}


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
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        record = json.loads(archive.extractfile("k001.json").read())
    assert record == {"captions": ["caption 1", "ein Bild"], "n": [1, {"ü": None}]}
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
    assert len(Shards(tmp_path, 8)) == 4 and len(Shards(tmp_path, 8, "test")) == 2


def test_bad_samples_are_not_written(tmp_path):
    good = next(samples(1))
    for change, message in (
        ({"key": "../x"}, "sample key '../x' must be"),
        ({"key": "a.b"}, "must be 1 to 90"),
        ({"suffix": "exe"}, "suffix 'exe'; allowed: jpg, jpeg"),
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
        ("./d/a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\r\n"),
        ("d/a.seg.png", b"another picture of the sample"),
        ("d/b.json", b'{"text": "three", "width": 4}'),
        ("d/b.webp", png(2)),
        ("d/._c.png", b"what a file manager leaves behind"),
        ("c.gif", png(3, "GIF")),
        ("c.json", b'{"url": "x"}'),
        ("c.txt", "vier, fünf".encode()),
        ("d/long-" + "n" * 150 + ".tif", png(4, "TIFF")),
        ("d/long-" + "n" * 150 + ".txt", b"six"),
    ]
    found = [
        (s["key"], s["captions"], int(s["image"][0, 0, 0])) for s in Shards(tar(tmp_path / "train-0.tar", members), 8)
    ]
    assert found[0] == ("d/a", ["one", "two"], 1) and found[1] == ("d/b", ["three"], 2)
    assert found[2] == ("c", ["vier, fünf"], 3) and found[3][1:] == (["six"], 4) and len(found) == 4


def test_shards_without_a_split_in_their_name_are_split_by_captions(tmp_path):
    for shard in range(2):
        names = range(shard * 60, shard * 60 + 60)
        tar(
            tmp_path / f"{shard:05d}.tar",
            [m for i in names for m in ((f"{i:03d}.png", png(1)), (f"{i:03d}.txt", f"{i % 60}".encode()))],
        )
    parts = {name: Shards(tmp_path, 8, name) for name in SPLITS}
    assert sorted(sample["key"] for part in parts.values() for sample in part) == [f"{i:03d}" for i in range(120)]
    captions = {name: {sample["captions"][0] for sample in part} for name, part in parts.items()}
    assert sum(map(len, captions.values())) == 60  # each caption, though in two shards, is in one split only
    assert sum(parts["test"].lengths) == len(parts["test"])


def test_names_and_fields_of_others_name_the_split(tmp_path):
    for name, split in (("cc-train-0.tar", "train"), ("validation_00001.tar", "val"), ("eval.0.tar", "test")):
        tar(tmp_path / name, [(f"{split}.png", png(1)), (f"{split}.txt", b"x")])
    assert {split: [s["key"] for s in Shards(tmp_path, 8, split)] for split in SPLITS} == {s: [s] for s in SPLITS}
    for name, message in (
        ("holdout-0.tar", "'holdout' in the name of .* looks like a split"),
        ("train-val-0.tar", "two splits"),
    ):
        file = tar(tmp_path / name, [("x.png", png(1)), ("x.txt", b"x")])
        with pytest.raises(UserError, match=message):
            Shards(tmp_path, 8)
        file.unlink()
    fields = [{"text": f"{i}", "split": ("train", "dev", "testing")[i % 3]} for i in range(6)]
    members = [m for i, f in enumerate(fields) for m in ((f"{i}.png", png(1)), (f"{i}.json", json.dumps(f).encode()))]
    file = tar(tmp_path / "0.tar", members)
    assert [sample["key"] for sample in Shards(file, 8, "val")] == ["1", "4"]
    tar(file, [("0.png", png(1)), ("0.json", b'{"text": "x", "split": "restval"}')])
    with pytest.raises(UserError, match="'restval'"):
        Shards(file, 8)


@pytest.mark.parametrize("cut", [100, 512, 700, 5000, -1, -512, -9000])
def test_cut_shards_are_named(tmp_path, cut):
    write_shards(samples(6), tmp_path, "train")
    file = tmp_path / "train-000000.tar"
    file.write_bytes(file.read_bytes()[:cut])
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


@pytest.mark.parametrize("cut", [600, 5000, 15_000, -3000])
def test_an_index_tells_how_much_a_cut_shard_has_lost(tmp_path, cut):
    write_shards(samples(40), tmp_path, "train", shard_bytes=20_480)
    file = tmp_path / "train-000001.tar"
    whole = Shards(tmp_path, 8)
    file.write_bytes(file.read_bytes()[:cut])
    data = Shards(tmp_path, 8, max_broken=0.9)
    lost = len(whole) - len(data)
    assert 0 < lost == len(data.faults.reasons) and data.faults.total == 40
    assert all("train-000001.tar' has" in why and "index.json says" in why for why in data.faults.reasons.values())
    assert len({data[i]["key"] for i in range(len(data))}) == len(data)
    with pytest.raises(UserError, match=f"{lost} of 40 samples"):
        Shards(tmp_path, 8)


def test_index_disagrees(tmp_path):
    write_shards(samples(6), tmp_path, "train")
    index, name = tmp_path / "index.json", "train-000000.tar"
    entry = json.loads(index.read_text())["shards"][name]
    for shards, message in (
        ({name: entry | {"samples": 7}}, "'train-000000.tar' has 6 samples but index.json says 7"),
        ({name: entry | {"bytes": "many"}}, "is no index of shards"),
        ({name: entry | {"samples": 10**12}}, "is no index of shards"),
        ({name: entry, "train-000009.tar": entry}, "'train-000009.tar'.* is missing"),
        ({name: entry, f"../{name}": entry}, "'../train-000000.tar'.* is missing"),
    ):
        index.write_text(json.dumps({"shards": shards}))
        with pytest.raises(UserError, match=message):
            Shards(tmp_path, 8)
    index.write_text("{")
    with pytest.raises(UserError, match="index.json' is not valid JSON"):
        Shards(tmp_path, 8)
    index.write_text(json.dumps({"shards": {name: entry}}))
    tar(tmp_path / "train-000001.tar", [("x.png", png(1)), ("x.txt", b"x")])
    with pytest.raises(UserError, match="'train-000001.tar' is not in index.json"):
        Shards(tmp_path, 8)


PICTURE, TEXT = ("a.png", png(1)), ("a.txt", b"a")
BAD_MEMBERS = {
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


def test_links_are_never_followed_and_oversized_members_not_read(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
        for name, data in (PICTURE, TEXT):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert [sample["key"] for sample in Shards(tmp_path, 8)] == ["a"]
    monkeypatch.setitem(LARGEST, "image", 10)
    with pytest.raises(UserError, match="'a.png' of shard 'train-0.tar' has .* bytes; at most 10"):
        Shards(tmp_path, 8)


BAD = {
    "../up": [("../up.png", png(1)), ("../up.txt", b"x")],
    "twice": [("twice.png", png(1)), ("twice.png", png(1)), ("twice.txt", b"x")],
    "bare": [("bare.png", png(1))],
    "blind": [("blind.txt", b"x")],
    "k005": [("k005.png", png(1)), ("k005.txt", b"again")],
    "latin": [("latin.png", png(1)), ("latin.txt", b"\xe9")],
    "blank": [("blank.png", png(1)), ("blank.json", b'{"text": ""}')],
    "torn": [("torn.png", png(1)[:50]), ("torn.txt", b"x")],
    "bomb": [("bomb.png", bomb()), ("bomb.txt", b"x")],
}


@pytest.mark.parametrize("name", ["train-000009.tar", "more.tar"])
def test_bad_samples_are_left_out(tmp_path, name):
    """In a shard of one split and in one of all, whose captions are read at once; that one also comes first."""
    write_shards(samples(40), tmp_path, "train", shard_bytes=20_480)
    (tmp_path / "index.json").unlink()
    tar(tmp_path / name, [member for members in BAD.values() for member in members])
    data = Shards(tmp_path, 8, max_broken=0.5)
    late = {f"{key} in {name}" for key in ("torn", "bomb")}  # seen when read, where they are in the training split
    twice = "k005 in " + (name if name.startswith("train") else "train-000000.tar")
    keys = {data[i]["key"] for i in readable(data, range(len(data)))}
    assert keys | {"k005"} == {f"k{i:03d}" for i in range(40)}
    assert data.faults.reasons.keys() | late == {f"{key} in {name}" for key in BAD if key != "k005"} | {twice}


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
    with pytest.raises(UserError, match="no samples"):
        EpochBatches(0, 4, 0)


def test_shuffle_is_fair():
    places = np.array([EpochBatches(10, 1, 0).permutation(epoch) for epoch in range(4000)])
    counts = np.array([np.bincount(places[:, i], minlength=10) for i in range(10)])
    assert abs(counts - 400).max() < 100  # 5 standard deviations


def test_blocks_keep_reading_local(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 3)
    mixed = EpochBatches(240, 1, 0, blocks=[20] * 12).permutation(0) // 20
    for first in range(0, 240, 60):
        window = mixed[first : first + 60]
        assert len(set(window)) == 3 and len(set(window[:20])) > 1
    assert sorted(set(mixed[:60])) != [0, 1, 2]
