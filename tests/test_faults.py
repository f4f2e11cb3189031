"""Data with mistakes in it: what cannot be used is passed over, counted exactly and listed."""

import errno
import json
import shutil
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_data_shards import png, samples, tar
from torch.utils.data import DataLoader

from ldm.config import UserError
from ldm.data import DataConfig, open_dataset
from ldm.data.faults import Faults, SampleError, readable
from ldm.data.folder import Folder
from ldm.data.latents import CachedLatents, cache_latents, data_hash
from ldm.data.order import EpochBatches
from ldm.data.shards import Shards, write_shards
from ldm.model_io import module_hash
from ldm.tokenizer import Tokenizer
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import train
from ldm.train.state import LeftOut
from ldm.vae import VAE


def bomb() -> bytes:
    """A PNG whose header claims 30,000 x 30,000 pixels."""
    head = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(bytes(1000))
    chunks = [(head, 13), (b"IDAT" + body, len(body)), (b"IEND", 0)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        n.to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c, n in chunks
    )


def spoil(folder: Path) -> dict[str, str]:
    """Breaks eight of a folder's pictures, each in its own way; gives their names and what is to be said of them."""
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:60])
    (folder / "010.png").write_bytes(bomb())
    (folder / "017.png").write_bytes(b"")
    (folder / "018.png").write_bytes(b"GIF89a" + bytes(40))
    (folder / "025.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "030.txt").write_text(" \n\n")
    (folder / "031.txt").unlink()
    (folder / "059.png").unlink()
    (folder / "059.png").symlink_to(folder / "gone.png")
    texts = {"003": "cannot be read", "010": "far more pixels than the limit of 16 million"}
    texts |= {"017": "no image file", "018": "no image file", "025": "not UTF-8", "030": "has no caption"}
    texts |= {"031": "has no caption", "059": "does not exist"}
    return {f"{name}.png": text for name, text in texts.items()}


AT_OPENING = {"025.png", "030.png", "031.png"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sixty pictures of noise, 32 px, with captions."""
    root = tmp_path / "pictures"
    root.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / f"{i:03d}.png")
        (root / f"{i:03d}.txt").write_text(f"a red thing number {i}")
    return root


def config_of(folder: Path, **changes) -> DataConfig:
    return DataConfig(**{"name": "folder", "path": str(folder), "max_broken": 0.2} | changes)


def test_every_kind_of_mistake_is_left_out_and_said(folder):
    wrong = spoil(folder)
    data = Folder(folder, 32, val=0, test=0, max_broken=0.2)
    assert data.faults.reasons.keys() == AT_OPENING and data.faults.total == 60 and len(data) == 57
    found = [data[i] for i in range(len(data))]
    assert data.faults.reasons.keys() == wrong.keys()
    assert all(
        text in data.faults.reasons[name] and "\n" not in data.faults.reasons[name] for name, text in wrong.items()
    )
    names = [key for key, _ in data.samples]
    for i, sample in enumerate(found):
        at = i
        while names[at] in wrong:
            at = (at + 1) % len(names)
        assert sample["key"] == names[at] and sample["captions"] == [f"a red thing number {int(names[at][:3])}"]
        assert sample.get("faults", {}).keys() == {n for n in names[i:at]} or names[i] == "059.png"
    assert readable(data, list(range(57))) == [i for i, name in enumerate(names) if name not in wrong]
    assert readable([1, 2, 3], [0, 2]) == [0, 2]


def test_one_mistake_counts_once_and_splits_have_names_of_their_own(folder):
    lines = [{"file_name": f"{i:03d}.png", "text": "x"} for i in range(60)]
    for file in folder.glob("*.txt"):
        file.unlink()
    texts = [json.dumps(line) for line in lines]
    texts[5], texts[9] = '{"file_name": "005', '{"file_name": "gone.png", "text": "x"}'
    (folder / "metadata.jsonl").write_text("\n".join(texts))
    data = Folder(folder, 32, val=0, test=0, max_broken=0.2)
    assert data.faults.reasons.keys() == {"005.png", "009.png"} and data.faults.total == 60
    assert "line 6 is not valid JSON" in data.faults.reasons["005.png"]
    with pytest.warns(UserWarning, match="2 lines of metadata are passed over: .*line 6"):
        bare = Folder(folder, 32, val=0, test=0, max_broken=0, need_captions=False)
    assert len(bare) == 60 and not bare.faults.reasons
    for split in ("train", "val"):
        (folder / split).mkdir()
        for name in ("000.png", "001.png"):
            shutil.copy(folder / name, folder / split / name)
        (folder / split / "001.txt").write_text("x")
        assert Folder(folder, 32, split, max_broken=1).faults.reasons.keys() == {f"{split}/000.png"}


def test_whoever_reads_gets_the_same(folder):
    spoil(folder)
    batches = EpochBatches(57, 8, 0, steps=9)
    read = []
    for workers in (0, 2):
        data = Folder(folder, 32, val=0, test=0, max_broken=0.2)
        read.append(
            [s for b in DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=list) for s in b]
        )
    for a, b in zip(*read, strict=True):
        assert torch.equal(a.pop("image"), b.pop("image")) and a == b


def test_too_many_stop_it_with_the_first_of_them(folder):
    spoil(folder)
    with pytest.raises(
        UserError, match=r"025.txt' is not UTF-8.* \(3 of 60 samples cannot be used; data.max_broken = 0.04"
    ):
        Folder(folder, 32, val=0, test=0, max_broken=0.04)
    data = Folder(folder, 32, val=0, test=0, max_broken=0.1)  # six
    with pytest.raises(UserError, match="7 of 60 samples"):
        [data[i] for i in range(len(data))]
    for name in ("max_broken", "max_pixels"):
        with pytest.raises(UserError, match=f"data.{name}"):
            DataConfig(**{name: -1})
    strict = open_dataset(config_of(folder, max_pixels=1000, max_broken=1.0), "train")
    with pytest.raises(UserError, match="no sample can be read; the first: .*limit of 0.001 million"):
        strict[0]


def test_each_is_counted_once_and_travels_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(SampleError("a", "why")))
    assert error.name == "a" and str(error) == "why"
    faults = Faults(0.5, 2)
    for _ in range(3):
        faults.add("a", "why")
    with pytest.raises(UserError, match="^why .2 of 2"):
        faults.add("b", "other")


def test_a_disk_that_fails_spoils_no_sample(folder, monkeypatch):
    data = Folder(folder, 32, val=0, test=0)
    for error in (
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EMFILE, "Too many open files"),
        MemoryError(),
    ):
        monkeypatch.setattr(Image, "open", lambda *a, error=error, **k: (_ for _ in ()).throw(error))
        with pytest.raises((UserError, MemoryError), match="cannot be read now|^$"):
            data[0]
    assert not data.faults.reasons


def test_a_list_that_a_crash_left_half_written_is_mended(tmp_path):
    left = LeftOut(tmp_path, [])
    left.file.write_text('{"sample": "a", "why": "x"}\n{"sample": "b", "w')
    assert left.write({"a": "x", "b": "y"}) == 2 and listed(tmp_path) == {"a": "x", "b": "y"}


def listed(run: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (run / "left_out.jsonl").read_text().splitlines()]
    assert len({line["sample"] for line in lines}) == len(lines)
    return {line["sample"]: line["why"] for line in lines}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_on_a_spoiled_folder_ends_and_lists_what_it_left_out(folder, tmp_path, workers):
    wrong = spoil(folder)
    config = replace(tiny.autoencoder(), data=config_of(folder))
    steps = replace(tiny.TRAIN, steps=16, batch_size=8, workers=workers)
    for upto in (9, 16):  # the second one resumes
        task = AutoencoderTask(config)
        task.dataset.samples = task.dataset.samples + task.held_out.samples
        train(task, replace(steps, steps=upto), tmp_path / "run", {})
    assert listed(tmp_path / "run").keys() == wrong.keys() - AT_OPENING  # an autoencoder needs no captions


def test_the_three_trainings_share_what_a_spoiled_folder_has_left(folder, tmp_path):
    wrong = spoil(folder)
    clip = replace(tiny.clip(), data=config_of(folder))
    train(CLIPTask(clip), replace(tiny.TRAIN, steps=12, batch_size=8), tmp_path / "clip", {})
    train(AutoencoderTask(tiny.autoencoder()), tiny.TRAIN, tmp_path / "vae", {})
    data = open_dataset(config_of(folder), "train")
    names = {name for name in wrong if name in AT_OPENING or name in dict(data.samples)}
    judged = CLIPTask(replace(clip, judge=True))
    assert judged.dataset.faults.reasons.keys() == AT_OPENING and judged.dataset.faults.total == 60
    task = DiffusionTask(
        tiny.diffusion(tmp_path / "vae", tmp_path / "clip", data=config_of(folder), cache=str(tmp_path / "cache"))
    )
    assert task.dataset.faults.reasons.keys() == names
    train(task, tiny.TRAIN, tmp_path / "unet", {})
    assert listed(tmp_path / "unet").keys() >= names and listed(tmp_path / "clip").keys() >= names


def test_a_cache_holds_what_the_data_set_gives(folder, tmp_path):
    spoil(folder)
    data = Folder(folder, 32, val=0, test=0, max_broken=0.2)
    torch.manual_seed(0)
    vae = VAE(tiny.autoencoder().model)
    cache_latents(vae, data, tmp_path / "cache", workers=2)
    assert len(data.faults.reasons) == 8  # found by the loading processes
    cached = CachedLatents(tmp_path / "cache", module_hash(vae), data_hash(data), data.faults)
    again = Folder(folder, 32, val=0, test=0, max_broken=0.2)
    CachedLatents(tmp_path / "cache", module_hash(vae), data_hash(again), again.faults)
    assert again.faults.reasons == data.faults.reasons  # from the list beside the cache
    assert [cached[i]["key"] for i in range(len(cached))] == [data[i]["key"] for i in range(len(data))]
    assert all(
        value.isfinite().all() for name, value in load_file(tmp_path / "cache").items() if name in ("mean", "std")
    )


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
    keys = [data[i]["key"] for i in range(len(data))]
    assert len(set(keys)) == len(keys) == len(data) and len(data.faults.reasons) == lost
    with pytest.raises(UserError, match=f"{lost} of 40 samples"):
        Shards(tmp_path, 8)


BAD = {
    "../up": [("../up.png", png(1)), ("../up.txt", b"x")],
    "/etc/up": [("/etc/up.png", png(1)), ("/etc/up.txt", b"x")],
    "twice": [("twice.png", png(1)), ("twice.png", png(1)), ("twice.txt", b"x")],
    "bare": [("bare.png", png(1))],
    "blind": [("blind.txt", b"x")],
    "k005": [("k005.png", png(1)), ("k005.txt", b"again")],
    "torn": [("torn.png", png(1)[:50]), ("torn.txt", b"x")],
    "latin": [("latin.png", png(1)), ("latin.txt", b"\xe9")],
    "blank": [("blank.png", png(1)), ("blank.json", b'{"text": ""}')],
    "json": [("json.png", png(1)), ("json.json", b"{")],
    "bomb": [("bomb.png", bomb()), ("bomb.txt", b"x")],
}


@pytest.mark.parametrize("name", ["train-000009.tar", "more.tar"])
def test_bad_samples_of_shards_are_left_out(tmp_path, name):
    """In a shard of one split and in one of all, whose captions are read at once; that one also comes first."""
    write_shards(samples(40), tmp_path, "train", shard_bytes=20_480)
    (tmp_path / "index.json").unlink()
    tar(tmp_path / name, [member for members in BAD.values() for member in members])
    data = Shards(tmp_path, 8, max_broken=0.5)
    twice = next(found for found in data.faults.reasons if found.startswith("k005"))
    assert twice == ("k005 in train-000009.tar" if name.startswith("train") else "k005 in train-000000.tar")
    assert all(data.captions(i) for i in range(len(data)))
    keys = {data[i]["key"] for i in range(len(data))}
    assert keys | {"k005"} == {f"k{i:03d}" for i in range(40)}
    late = {f"{key} in {name}" for key in ("torn", "bomb")}  # seen when read, where they are in the training split
    assert data.faults.reasons.keys() | late == {f"{key} in {name}" for key in BAD if key != "k005"} | {twice}


def test_a_tokenizer_is_trained_on_the_captions_that_can_be_read(tmp_path):
    members = [(f"{i:03d}.png", png(i)) for i in range(30)] + [
        (f"{i:03d}.txt", b"\xff" if i == 4 else b"a red circle") for i in range(30)
    ]
    for split in ("train", "val"):
        tar(tmp_path / f"{split}-0.tar", [m for i in range(30) for m in (members[i], members[30 + i])])
    config = replace(tiny.clip(), data=DataConfig(name="shards", path=str(tmp_path), max_broken=0.1))
    task = CLIPTask(config)
    assert isinstance(task.tokenizer, Tokenizer) and task.dataset.faults.reasons.keys() == {"004 in train-0.tar"}


def test_links_in_a_shard_are_never_followed(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("a.png")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    with pytest.raises(UserError, match="is empty"):
        Shards(tmp_path, 8)
