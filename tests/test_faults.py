"""Samples that cannot be used: counted once, listed, replaced in training by a draw that resuming does not change."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from test_data_folder import bomb, open_folder, picture
from test_data_shards import png, tar

from ldm.config import UserError
from ldm.data import DataConfig, spread
from ldm.data.faults import SampleError, readable
from ldm.data.loader import load
from ldm.data.order import EpochBatches
from ldm.tokenizer import Tokenizer
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from ldm.train.loop import train


def spoil(folder: Path) -> dict[str, str]:
    """Breaks eight pictures, each in its own way. Returns what is to be said of them."""
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:45])  # the header is whole
    (folder / "010.png").write_bytes(bomb())
    (folder / "017.png").write_bytes(b"")
    (folder / "018.png").write_bytes(b"GIF89a" + bytes(40))
    (folder / "025.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "030.txt").write_text(" \n\n")
    (folder / "031.txt").unlink()
    (folder / "059.png").unlink()
    (folder / "059.png").symlink_to(folder / "gone.png")
    texts = {"003": "cannot be read", "010": "pixels", "017": "no image file", "018": "no image file"}
    texts |= {"025": "not UTF-8", "030": "has no caption", "031": "has no caption", "059": "does not exist"}
    return {f"{name}.png": text for name, text in texts.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sixty pictures with captions; all of one split."""
    for i in range(60):
        text, color = f"a red thing number {i}", (4 * i, 37 * i % 256, 255 - 4 * i)
        picture(tmp_path / "pictures", f"train/{i:03d}.png", text, color)
    return tmp_path / "pictures" / "train"


def listed(run: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (run / "left_out.jsonl").read_text().splitlines()]
    assert len({line["sample"] for line in lines}) == len(lines)
    return {line["sample"]: line["why"] for line in lines if not line["sample"].startswith("val/")}


class Numbers:
    """Samples that are their index; those in `broken` cannot be read."""

    def __init__(self, broken):
        self.broken = broken

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index in self.broken:
            raise SampleError(f"{index}", f"{index} is broken")
        return {"n": index}


def read(broken, batch=8, workers=0, **order):
    order = EpochBatches(40, batch, 3, **{"steps": 15} | order)
    return list(load(Numbers(broken), order, workers=workers, pin_memory=False))


def test_a_replacement_depends_on_seed_step_and_position_alone():
    broken = {1, 5, 7, 20, 33}
    whole, ideal = read(broken), read(())
    for (batch, faults), (wish, none) in zip(whole, ideal, strict=True):
        assert not none and {n for n in wish["n"] if n in broken} <= set(map(int, faults)) <= broken
        assert all(a == b or b in broken for a, b in zip(batch["n"], wish["n"], strict=True))
        assert not broken & set(batch["n"]) and all(reason == f"{n} is broken" for n, reason in faults.items())
    assert read(broken, workers=2) == whole and read(broken, start=6) == whole[6:]
    halves = [read(broken, 4, rank=rank, world=2) for rank in range(2)]
    assert [a["n"] + b["n"] for (a, _), (b, _) in zip(*halves, strict=True)] == [batch["n"] for batch, _ in whole]
    taken, wanted = (np.array([batch["n"] for batch, _ in batches]) for batches in (whole, ideal))
    replaced = taken[taken != wanted].tolist()
    assert len(replaced) == 15 and len(set(replaced)) > 8  # another one each time


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_ends_in_one_line(workers):
    with pytest.raises(UserError, match="^no sample can be read; the first: .* is broken$"):
        read(range(40), workers=workers)


def test_trainings_share_the_rest_of_a_spoiled_folder(folder, tmp_path):
    wrong = {f"train/{name}": text for name, text in spoil(folder).items()}
    for i, (mode, size) in enumerate({"I;16": (40, 40), "CMYK": (40, 40), "LA": (1, 1), "P": (1, 9999)}.items(), 40):
        Image.new(mode, size).save(folder / f"{i:03d}.png", "TIFF")  # unusual, but no faults
    (folder / "044.txt").write_text("long " * 2_000 + "a\0b \u202eدائرة حمراء 🟥")
    folder.parent.joinpath("val").symlink_to(folder)
    data = DataConfig(name="folder", path=str(folder.parent), max_broken=0.15)
    vae = replace(tiny.autoencoder(), data=data)
    for steps in (4, 9):  # the second one resumes
        train(AutoencoderTask(vae), replace(tiny.TRAIN, steps=steps, batch_size=8, workers=2), tmp_path / "vae", {})
    without_captions = {f"train/{name}" for name in ("025.png", "030.png", "031.png")}
    assert listed(tmp_path / "vae").keys() == wrong.keys() - without_captions  # an autoencoder needs none
    train(CLIPTask(replace(tiny.clip(), data=data)), replace(tiny.TRAIN, steps=9, batch_size=8), tmp_path / "clip", {})
    reasons = listed(tmp_path / "clip")
    assert reasons.keys() == wrong.keys() and all(text in reasons[name] for name, text in wrong.items())
    few = open_folder(folder.parent, 32, max_broken=0.12)  # seven; the header of the eighth is whole
    with pytest.raises(SampleError, match=r"003\.png.*repair or remove it"):
        few[3]
    with pytest.raises(UserError, match="8 of 60 samples cannot be used; data.max_broken = 0.12"):
        readable(few, range(len(few)))
    assert 3 not in spread(open_folder(folder.parent, 32, max_broken=0.15), 53)
    for name in ("max_broken", "max_pixels", "size"):
        with pytest.raises(UserError, match=f"data.{name}"):
            DataConfig(**{name: -1})


def test_a_tokenizer_is_trained_on_the_captions_that_can_be_read(tmp_path):
    for split in ("train", "val"):
        names = [f"{i:03d}" for i in range(30)]
        files = [((f"{n}.png", png(1)), (f"{n}.txt", b"\xff" if n == "004" else b"a red circle")) for n in names]
        tar(tmp_path / f"{split}-0.tar", [member for pair in files for member in pair])
    config = replace(tiny.clip(), data=DataConfig(name="shards", path=str(tmp_path), max_broken=0.1))
    task = CLIPTask(config)
    assert isinstance(task.tokenizer, Tokenizer) and task.dataset.faults.reasons.keys() == {"004 in train-0.tar"}
