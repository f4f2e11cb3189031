import errno
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from ldm.config import UserError
from ldm.data.latents import CachedLatents, cache_latents, data_hash
from ldm.model_io import module_hash


class TinyVAE(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Conv2d(3, 8, 4, stride=4)
        self.drop = nn.Dropout(0.5)

    def encode(self, x):
        assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1 and not torch.is_grad_enabled()
        mean, logvar = self.drop(self.net(x)).chunk(2, dim=1)
        return SimpleNamespace(mean=mean, std=torch.exp(0.5 * logvar))


def pictures(count=7, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return [{"image": x, "captions": [f"bild {i}", "ü" * i + "x"], "key": f"k{i}"} for i, x in enumerate(images)]


@pytest.fixture
def made(tmp_path):
    vae, data, path = TinyVAE(), pictures(), tmp_path / "sub" / "latents.safetensors"
    cache_latents(vae, data, path, batch_size=3)
    return vae, data, path


def test_cached_moments_are_the_vaes(made):
    vae, data, path = made
    assert vae.training  # as it was before
    vae.eval()
    cached = CachedLatents(path, module_hash(vae), data_hash(data))
    assert len(cached) == 7 and cached.shape == (7, 4, 4, 4)
    for sample, item in zip(data, cached, strict=True):
        with torch.no_grad():
            moments = vae.encode(sample["image"][None] / 127.5 - 1)
        assert (item["key"], item["captions"]) == (sample["key"], sample["captions"])
        for name in ("mean", "std"):
            want = getattr(moments, name)[0]
            assert item[name].dtype == torch.float32 and item[name].shape == (4, 4, 4)
            torch.testing.assert_close(item[name], want, rtol=2**-10, atol=1e-6)
    assert torch.equal(cached[-1]["mean"], cached[6]["mean"])
    with pytest.raises(IndexError):
        cached[7]


def test_the_file_is_plain_safetensors(made):
    vae, _, path = made
    tensors = load_file(path)
    assert {name: t.dtype for name, t in tensors.items()} == {
        "mean": torch.float16,
        "std": torch.float16,
        "offsets": torch.int64,
        "records": torch.uint8,
    }
    assert torch.equal(tensors["mean"][3].float(), CachedLatents(path, module_hash(vae))[3]["mean"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_batch_size_and_workers_do_not_change_it(made, tmp_path):
    vae, data, path = made
    cache_latents(vae, data, tmp_path / "b", batch_size=7, workers=1)
    first, second = load_file(path), load_file(tmp_path / "b")
    assert torch.equal(first["records"], second["records"]) and torch.equal(first["offsets"], second["offsets"])
    torch.testing.assert_close(first["mean"], second["mean"], rtol=2**-9, atol=1e-5)


def test_caching_leaves_the_random_state_alone(tmp_path):
    vae = TinyVAE()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    cache_latents(vae, pictures(2), tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_another_vae_is_refused(made):
    vae, data, path = made
    with torch.no_grad():
        vae.net.bias[0] += 1e-6
    with pytest.raises(UserError, match="made by another VAE"):
        CachedLatents(path, module_hash(vae))
    CachedLatents(path, module_hash(TinyVAE()), data_hash(data))


def test_another_data_set_or_size_is_refused(made):
    vae, data, path = made
    others = [pictures(seed=1), pictures(size=8), pictures(6), data[::-1]]
    others.append([sample | {"captions": ["other"]} for sample in data])
    for other in others:
        with pytest.raises(UserError, match="another data set, split or picture size"):
            CachedLatents(path, module_hash(vae), data_hash(other))


def test_module_hash_depends_on_every_name_type_and_value():
    vae = TinyVAE()
    known = {module_hash(vae)}
    assert module_hash(TinyVAE()) in known
    renamed = nn.ModuleDict({"other": vae.net})
    for module in (TinyVAE(1), renamed, TinyVAE().double(), TinyVAE().bfloat16(), nn.BatchNorm2d(2)):
        known.add(module_hash(module))
    assert len(known) == 6


def test_broken_and_missing_files(made, tmp_path):
    vae, _, path = made
    with pytest.raises(UserError, match="does not exist"):
        CachedLatents(tmp_path / "gone", module_hash(vae))
    data = path.read_bytes()
    for part in (data[:-1], data[:3000], b"", b"rubbish" * 999):
        path.write_bytes(part)
        with pytest.raises(UserError, match="is damaged"):
            CachedLatents(path, module_hash(vae))
    from safetensors.torch import save_file

    save_file({"mean": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no latent cache of this version"):
        CachedLatents(path, module_hash(vae))


def test_a_failed_write_keeps_the_old_file(made):
    vae, data, path = made
    before = path.read_bytes()

    class Failing(list):
        def __getitem__(self, index):
            if index == 6 and self.probed:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.probed = self.probed or index == 6
            return super().__getitem__(index)

    broken = Failing(data)
    broken.probed = False
    with pytest.raises(UserError, match="cannot write the latent cache .* No space left"):
        cache_latents(vae, broken, path)
    with torch.no_grad():
        vae.net.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        cache_latents(vae, data, path)
    with pytest.raises(UserError, match="no samples"):
        cache_latents(vae, [], path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_worker_processes_and_pickling(made):
    vae, data, path = made
    cached = CachedLatents(path, module_hash(vae))
    cached[0]
    copy = pickle.loads(pickle.dumps(cached))
    assert torch.equal(copy[5]["std"], cached[5]["std"])
    loaded = [item for batch in DataLoader(cached, 3, num_workers=2, collate_fn=list) for item in batch]
    assert [item["key"] for item in loaded] == [sample["key"] for sample in data]
    assert all(torch.equal(item["mean"], cached[i]["mean"]) for i, item in enumerate(loaded))
