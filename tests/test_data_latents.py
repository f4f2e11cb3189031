"""The latent cache: the VAE's moments, captions of the data set, and whatever has changed encoded again."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_data_folder import open_folder, picture
from torch import nn

from ldm.config import UserError
from ldm.data.faults import SampleError
from ldm.data.latents import open_latents
from ldm.data.shapes import Shapes
from ldm.images import to_float

CPU = torch.device("cpu")


class TinyVAE(nn.Module):
    """Counts what it has encoded."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Conv2d(3, 8, 4, stride=4)
        self.drop = nn.Dropout(0.5)
        self.count = 0

    def encode(self, x):
        assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1 and not torch.is_grad_enabled()
        self.count += len(x)
        mean, logvar = self.drop(self.net(x)).chunk(2, dim=1)
        return SimpleNamespace(mean=mean, std=torch.exp(0.5 * logvar))


@pytest.fixture
def root(tmp_path) -> Path:
    """A training split of 12 captioned pictures."""
    for i in range(12):
        picture(tmp_path, f"photos/train/{i:02d}.png", f"caption {i}", color=(20 * i, 0, 0))
    return tmp_path / "photos"


def encoded(cached) -> list:
    return [cached[i]["mean"] for i in range(len(cached))]


def test_cached_moments_are_the_vaes(root, tmp_path):
    vae, data, path = TinyVAE(), open_folder(root, 16), tmp_path / "sub" / "latents.safetensors"
    torch.manual_seed(1)
    before = torch.get_rng_state()
    cached = open_latents(path, vae, data, 5, CPU)
    assert not vae.training and torch.equal(torch.get_rng_state(), before) and len(cached) == 12
    for i, sample in enumerate(data):
        item = cached[i]
        with torch.no_grad():
            moments = vae.encode(to_float(sample["image"][None]))
        assert item["captions"] == sample["captions"]
        for name in ("mean", "std"):
            assert item[name].dtype == torch.float32 and item[name].shape == (4, 4, 4)
            torch.testing.assert_close(item[name], getattr(moments, name)[0], rtol=2**-10, atol=1e-6)
    assert torch.equal(cached[-1]["mean"], cached[11]["mean"])
    with pytest.raises(IndexError):
        cached[12]
    (root / "train" / "03.png").unlink()
    assert cached[3]["mean"].shape == (4, 4, 4)  # a picture is not looked at again
    assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {
        "moments": (12, 2, 4, 4, 4),
        "identities": (12, 16),
    }
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_changed_is_encoded_again_and_captions_are_todays(root, tmp_path):
    vae, path = TinyVAE(), tmp_path / "cache"
    first = encoded(open_latents(path, vae, open_folder(root, 16), 4, CPU))
    written = path.read_bytes()
    for i in range(12):
        (root / "train" / f"{i:02d}.txt").write_text(f"corrected {i}")
    vae.count = 0
    cached = open_latents(path, vae, open_folder(root, 16), 4, CPU)
    assert vae.count == 0 and path.read_bytes() == written
    assert [cached[i]["captions"] for i in range(12)] == [[f"corrected {i}"] for i in range(12)]
    picture(root, "train/03.png", color=(0, 255, 0))  # under the same name
    picture(root, "train/99.png", "new", color=(0, 0, 255))
    (root / "train" / "05.png").unlink()
    (root / "train" / "05.txt").unlink()
    data = open_folder(root, 16)
    cached = open_latents(path, vae, data, 4, CPU)
    assert vae.count == 3  # the two, and one that tells the shape
    again = dict(zip((key for key, _ in data.samples), encoded(cached), strict=True))
    assert len(again) == 12 and "train/05.png" not in again
    same = [torch.equal(again[f"train/{i:02d}.png"], first[i]) for i in range(12) if i != 5]
    assert same == [i != 3 for i in range(12) if i != 5]
    fresh = encoded(open_latents(tmp_path / "fresh", vae, data, 4, CPU))
    assert all(torch.allclose(a, b, rtol=2**-9, atol=1e-5) for a, b in zip(again.values(), fresh, strict=True))


def test_an_unreadable_picture_stays_one(root, tmp_path):
    file = root / "train" / "04.png"
    whole, stat = file.read_bytes(), file.stat()
    file.write_bytes(whole[:45].ljust(len(whole)))  # its header is whole
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    data = open_folder(root, 16, max_broken=0.2)
    for _ in range(2):
        cached = open_latents(tmp_path / "cache", TinyVAE(), data, 4, CPU)
        with pytest.raises(SampleError, match=r"04\.png"):
            cached[4]
        assert cached[5]["mean"].isfinite().all()
    assert data.faults.reasons.keys() == {"train/04.png"}
    file.write_bytes(whole)  # repaired from a copy of the same size and time
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="lacks a picture that is readable by now; delete it"):
        open_latents(tmp_path / "cache", TinyVAE(), open_folder(root, 16), 4, CPU)[4]


def test_another_vae_other_data_and_older_caches_are_refused(root, tmp_path):
    vae, path = TinyVAE(), tmp_path / "cache"
    open_latents(path, vae, open_folder(root, 16), 4, CPU)
    before = path.read_bytes()
    with pytest.raises(UserError, match="made by another VAE; delete it"):
        open_latents(path, TinyVAE(1), open_folder(root, 16), 4, CPU)
    for data in (open_folder(root, 8), Shapes(32, "val")):
        with pytest.raises(UserError, match="another data set, split or picture size"):
            open_latents(path, vae, data, 4, CPU)
    assert path.read_bytes() == before
    save_file({"mean": torch.zeros(1)}, path, {"format": "ldm-latents-1", "vae": "x", "data": "y"})
    with pytest.raises(UserError, match="is of another version; delete it"):
        open_latents(path, vae, open_folder(root, 16), 4, CPU)
    for part in (before[:-1], before[:500], b"", b"rubbish" * 999):
        path.write_bytes(part)
        with pytest.raises(UserError, match="is damaged"):
            open_latents(path, vae, open_folder(root, 16), 4, CPU)


def test_a_failed_write_keeps_the_old_file(root, tmp_path, monkeypatch):
    vae, path = TinyVAE(), tmp_path / "cache" / "file"
    open_latents(path, vae, open_folder(root, 16), 4, CPU)
    before = path.read_bytes()
    picture(root, "train/99.png", "new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UserError, match="cannot write the latent cache .* No space left"):
            open_latents(path, vae, open_folder(root, 16), 4, CPU)
    nan = torch.full((13, 4, 4, 4), torch.nan)
    vae.encode = lambda x: SimpleNamespace(mean=nan[: len(x)], std=nan[: len(x)])
    with pytest.raises(UserError, match="not finite"):
        open_latents(path, vae, open_folder(root, 16), 4, CPU)
    with pytest.raises(UserError, match="no samples"):
        open_latents(tmp_path / "new", vae, [], 4, CPU)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_cache_that_another_run_replaced(root, tmp_path):
    vae = TinyVAE()
    cached = open_latents(tmp_path / "cache", vae, open_folder(root, 16), 4, CPU)
    picture(root, "train/00.png", color=(9, 9, 9))
    open_latents(tmp_path / "cache", vae, open_folder(root, 16), 4, CPU)
    with pytest.raises(UserError, match="replaced by another run"):
        cached[3]
