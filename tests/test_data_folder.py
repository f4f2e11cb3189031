"""A user's folder: captions, splits, and every file in it used or listed with its reason, once."""

import errno
import json
import os
import zlib

import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from ldm.config import UserError
from ldm.data import DataConfig, open_dataset
from ldm.data.folder import captioned
from ldm.data.latents import data_hash
from ldm.data.splits import SPLITS, assign


def open_folder(path, size=8, split="train", **options):
    return open_dataset(DataConfig(name="folder", path=str(path), size=size, **options), split)


def picture(folder, name, text=None, color=(255, 0, 0)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jfif": "JPEG", ".jpe": "JPEG"}.get(path.suffix)
    Image.new("RGB", (8, 8), color).save(path, kind)
    if text is not None:
        path.with_suffix(".txt").write_text(text)
    return path


def bomb():
    """A PNG whose header claims 30,000 x 30,000 pixels."""
    head = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(bytes(1000))
    chunks = [(head, 13), (b"IDAT" + body, len(body)), (b"IEND", 0)]
    parts = (n.to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c, n in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def captions_of(*datasets):
    return {data[i]["key"]: data[i]["captions"] for data in datasets for i in range(len(data))}


def test_metadata_and_text_files_in_any_form_of_utf_8(tmp_path):
    root = tmp_path / "train"
    for name in ("a.png", "sub/b.jpg", "c.png", "deep/d.png", ".hidden/e.png"):
        picture(root, name)
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "sub\\b.jpg", "text": [" two ", "", "три"]}]
    lines.append({"file_name": "a.png", "text": ["one", "u\0no"]})
    text = "\r\n\r\n".join(json.dumps(line) for line in lines)  # no final newline
    (root / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (root / "deep" / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "four"}\n')
    (root / "c.txt").write_bytes(b"\xef\xbb\xbfthree\r\n\r\n  drei \r\n")
    folder = open_folder(tmp_path, 8)
    assert captions_of(folder) == {
        "train/a.png": ["one", "u no"],
        "train/c.png": ["three", "drei"],
        "train/deep/d.png": ["four"],
        "train/sub/b.jpg": ["two", "три"],
    }
    assert not folder.faults.reasons and folder.captions(1) == ["three", "drei"]


def test_names_with_back_slashes_or_of_other_bytes_are_read_and_each_fault_is_listed_once(tmp_path):
    names = [os.fsdecode(name) for name in (b"caf\xe9.png", b"a\\b.png", b"sub/c.png", b"wordless.png", b"bad\xe9.png")]
    for name in names:
        picture(tmp_path / "train", name)
    (tmp_path / "train" / names[4]).with_suffix(".txt").write_bytes(b"\xff")
    lines = [json.dumps({"file_name": name, "text": "x"}).encode() for name in (*names[:2], "sub\\c.png")]
    lines += [b'{"file_name": "wordless.png", "text": ""}', b'{"file_name": "caf\xe9.png", "text": "y"}']
    (tmp_path / "train" / "metadata.jsonl").write_bytes(b"\n".join(lines))
    data = open_folder(tmp_path, 8, max_broken=0.5)
    assert captions_of(data) == {f"train/{name}": ["x"] for name in names[:3]}
    assert data.faults.reasons.keys() == {"train/wordless.png", f"train/{names[4]}", "train/metadata.jsonl line 5"}
    assert data.faults.total == 6 and all(reason.isprintable() for reason in data.faults.reasons.values())


@pytest.mark.parametrize("names", [SPLITS, ("training", "validation", "testing"), ("train", "dev", "eval")])
def test_sub_folders_are_the_splits_under_others_names_too(tmp_path, names):
    for name in names:
        picture(tmp_path, f"{name}/a.png", f"of {name}")
    picture(tmp_path, "other/b.png", "b")
    for name, split in zip(names, SPLITS, strict=True):
        folder = open_folder(tmp_path, 8, split)
        assert captions_of(folder) == {f"{name}/a.png": [f"of {name}"]}
        assert folder.faults.reasons.keys() == {"other"}
    picture(tmp_path, "valid/a.png", "x")
    with pytest.raises(UserError, match="are both val"):
        open_folder(tmp_path, 8)


def test_folders_that_look_like_a_split_are_refused_and_others_are_not(tmp_path):
    for name in ("holdout", "train2017", "test-images", "Trainset", "trainval", "val_set", "held out"):
        picture(tmp_path / f"refused {name}", f"{name}/a.png", "x")
        with pytest.raises(UserError, match="looks like a split"):
            open_folder(tmp_path / f"refused {name}", 8)
    for i, name in enumerate(("trains", "valley", "test tubes", "crash test", "devices")):
        picture(tmp_path / "read", f"{name}/a.png", f"caption {i}")
    assert sum(len(open_folder(tmp_path / "read", 8, split)) for split in SPLITS) == 5


def test_the_split_field_of_metadata(tmp_path):
    names = ("train", "validation", "test")
    lines = [{"file_name": f"{i}.png", "text": f"{i}", "split": names[i % 3]} for i in range(9)]
    for i in range(10):
        picture(tmp_path, f"{i}.png")
    lines.append({"file_name": "9.png", "text": "no split"})
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    for number, split in enumerate(SPLITS):
        folder = open_folder(tmp_path, 8, split, max_broken=0.2)
        assert list(captions_of(folder)) == [f"{i}.png" for i in range(number, 9, 3)]
        assert "no 'split'" in folder.faults.reasons["9.png"]
    for name in ("restval", "extra"):
        file.write_text(json.dumps(lines[0] | {"split": name}))
        with pytest.raises(UserError, match="split"):
            open_folder(tmp_path, 8, max_broken=1)


def test_hash_split_is_disjoint_stable_and_leaks_no_caption(tmp_path):
    for i in range(120):
        picture(tmp_path, f"{i:03d}.png", f"Caption  {i // 2}\nshared" if i % 2 else f"shared\ncaption {i // 2}")
    parts = [open_folder(tmp_path, 8, name, seed=3) for name in SPLITS]
    keys = [{key for key, _ in part.samples} for part in parts]
    assert sum(map(len, keys)) == 120 == len(set.union(*keys)) and all(keys)
    numbers = [{int(key[:3]) // 2 for key in part} for part in keys]
    assert sum(map(len, numbers)) == 60
    assert open_folder(tmp_path, 8, "test", seed=3).samples == parts[2].samples
    assert open_folder(tmp_path, 8, "test", seed=4).samples != parts[2].samples
    groups = [f"key {i}" for i in range(20_000)]
    splits = [*assign({*groups}, 0).values()]
    assert abs(splits.count("test") / 20_000 - 0.08) < 0.008 and abs(splits.count("val") / 20_000 - 0.02) < 0.004
    assert assign({*groups[:5000]}, 0).items() <= assign({*groups}, 0).items()
    for count in range(3, 9):
        assert all({*assign({*groups[:count]}, seed).values()} == set(SPLITS) for seed in range(20))


def test_linked_folders_are_followed_once_and_loops_end(tmp_path):
    root = tmp_path / "photos"
    picture(root, "dogs/a.png", "a")
    picture(tmp_path, "store/cats/b.png", "b")
    (root / "cats").symlink_to(tmp_path / "store" / "cats")
    (root / "again").symlink_to(root / "dogs")
    (root / "dogs" / "loop").symlink_to(root)
    (tmp_path / "store" / "cats" / "back").symlink_to(tmp_path / "photos")
    assert captioned(root) == {"cats/b.png": ["b"], "dogs/a.png": ["a"]}


def test_whatever_lies_in_a_folder_is_used_or_listed(tmp_path):
    root = tmp_path / "train"
    used = ["a.jfif", "b.jpe", "c.JPG", "d.tiff", "e.gif", "f.bmp", "g.webp"] + ["h.avif"] * features.check("avif")
    for name in used:
        picture(root, name, "caption")
    for name in ("photo.heic", "photo.jxl"):
        (root / name).write_bytes(b"of a phone")
        (root / name).with_suffix(".txt").write_text("of a phone")
    for name in ("README.txt", "notes.md", "more.md", "video.mp4"):
        (root / name).write_text("no picture")
    (root / "metadata.jsonl").symlink_to("gone")
    (root / "big.png").write_bytes(bomb())
    (root / "big.txt").write_text("big")
    data = open_folder(tmp_path, 8, max_broken=0.5)
    assert {key for key, _ in data.samples} == {f"train/{name}" for name in used}
    samples = {"train/photo.heic", "train/photo.jxl", "train/big.png"}
    assert data.faults.reasons.keys() == samples | {
        f"train/{name}" for name in ("README.txt", "*.md", "*.mp4", "*.jsonl")
    }
    with pytest.raises(UserError, match=f"3 of {len(used) + 3} samples cannot be used"):
        open_folder(tmp_path, 8)


def test_grids_are_no_pictures(tmp_path):
    for i in range(3):
        picture(tmp_path, f"{i:04d}-a-red-circle.png")
    picture(tmp_path, "grid.png")
    info = PngInfo()
    info.add_itxt("grid", "3 pictures")
    Image.new("RGB", (30, 8)).save(tmp_path / "overview.png", pnginfo=info)
    with pytest.warns(UserWarning, match=r"left out of .*: 'grid.png' is no picture .* \(2 in all\)"):
        assert len(captioned(tmp_path)) == 3
    for name in (f"{i:04d}-a-red-circle.png" for i in range(3)):
        (tmp_path / name).unlink()
    assert list(captioned(tmp_path)) == ["grid.png"]  # somebody's picture


LINES = {
    "missing file": ('{"file_name": "gone.png", "text": "x"}', "line 2 names 'gone.png', which does not exist"),
    "broken json": ('{"file_name": ', "line 2 is not valid JSON"),
    "deep json": ("[" * 100_000, "line 2 is not valid JSON"),
    "no object": ("[1]", "line 2 must be a JSON object"),
    "back slash": ('{"file_name": "..\\\\good.png", "text": "x"}', "which does not exist in the folder"),
    "absolute": ('{"file_name": "/etc/passwd", "text": "x"}', "which does not exist in the folder"),
    "nul": ('{"file_name": "good.png\\u0000", "text": "x"}', "does not exist"),
    "no name": ('{"text": "x"}', "line 2 needs a 'file_name'"),
    "no text": ('{"file_name": "good.png"}', "line 2 needs a 'file_name' and a 'text'"),
    "empty text": ('{"file_name": "good.png", "text": [" "]}', "line 2 has no caption"),
    "text type": ('{"file_name": "good.png", "text": 3}', "must be a string or a list of strings"),
    "latin": (b'{"file_name": "good.png", "text": "\xe9"}', "line 2 is not UTF-8"),
}


@pytest.mark.parametrize("name", LINES)
def test_bad_metadata(tmp_path, name):
    picture(tmp_path, "good.png")
    line, message = LINES[name]
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "good.png", "text": "x"}\n' + line)
    with pytest.raises(UserError) as caught:
        open_folder(tmp_path, 8)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    data = open_folder(tmp_path, 8, max_broken=1)
    assert captions_of(data) == {"good.png": ["x"]} and list(data.faults.reasons) == ["metadata.jsonl line 2"]


def test_bad_folders(tmp_path):
    def refused(message, *options):
        with pytest.raises(UserError, match=message):
            open_folder(tmp_path, 8, *options)

    refused("unknown split 'dev'; known: train, val, test", "dev")
    for name, text in (("a.png", "a"), ("b.png", " \n"), ("c.png", None)):
        picture(tmp_path, name, text)
    refused("b.txt has no caption; write at least one .*2 of 3 samples cannot")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    refused(r"b.txt' is not UTF-8")
    picture(tmp_path, "train/a.png", "x")
    refused("sub-folders train but no 'test'", "test")


def test_faults_of_metadata_are_listed_where_captions_are_not_needed(tmp_path):
    for i in range(40):
        picture(tmp_path, f"{i}.png", color=(6 * i, 0, 0))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "a"}\n')
    config = DataConfig(name="folder", path=str(tmp_path), size=8)
    (reason,) = open_dataset(config, "train", need_captions=False).faults.reasons.values()
    assert "names 'gone.png', which does not exist" in reason


def test_a_disk_that_fails_is_no_fault_of_a_picture(tmp_path, monkeypatch):
    picture(tmp_path, "train/a.png", "a")
    data = open_folder(tmp_path, 8)
    error = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(Image, "open", lambda *a, **k: (_ for _ in ()).throw(error))
    for work in (lambda: data[0], lambda: open_folder(tmp_path, 8, max_broken=1)):
        with pytest.raises(UserError, match="cannot be read now"):
            work()
    assert not data.faults.reasons


def test_the_hash_of_a_data_set_sees_any_changed_caption_or_picture(tmp_path):
    for i in range(20):
        picture(tmp_path, f"train/{i:02d}.png", f"caption {i}")
    known = {data_hash(open_folder(tmp_path, 8)), data_hash(open_folder(tmp_path, 8))}
    assert len(known) == 1
    (tmp_path / "train" / "07.txt").write_text("corrected")
    known.add(data_hash(open_folder(tmp_path, 8)))
    file = picture(tmp_path, "train/07.png", color=(0, 0, 255))
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    known |= {data_hash(open_folder(tmp_path, 8)), data_hash(open_folder(tmp_path, 4))}
    file.unlink()
    known.add(data_hash(open_folder(tmp_path, 8, max_broken=1)))
    assert len(known) == 5
