"""Model folders: found, read strictly, written whole."""

import dataclasses
import itertools
import json
import time

import pytest
import safetensors.torch
import torch
from tiny import same
from tiny_models import unet_config
from torch import nn

from ldm import model_io
from ldm.config import UserError
from ldm.unet import UNet


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a chain of linear layers."""

    width: int = 2
    layers: int = 2

    def make(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(self.layers)))


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Sizes().make()


def load(folder) -> nn.Module:
    return model_io.load_model(Sizes().make, folder, model_io.read_tensors(folder), Sizes())


def save(folder, saved: nn.Module | None = None) -> None:
    model_io.save_model(folder, saved or model(), {"_class_name": "Thing"}, model_io.DIFFUSERS_FILE)


def test_weights_round_trip(tmp_path):
    """In files that whoever may read the one may read the other, too; loaded as float32, in evaluation mode."""
    saved, folder = model().half(), tmp_path / "new" / "folder"
    save(folder, saved)
    loaded = load(folder)
    assert same(saved.float().state_dict(), loaded.state_dict()) and loaded[0].weight.dtype == torch.float32
    assert loaded[0].weight.requires_grad and not loaded.training
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert json.loads((folder / "config.json").read_text()) == {"_class_name": "Thing"}


@pytest.mark.parametrize("stem", model_io.STEMS)
def test_weights_are_found_as_safetensors_variants_and_bin(tmp_path, stem):
    """Each is preferred to those before it."""
    write = {"bin": torch.save, "safetensors": safetensors.torch.save_file}
    for seed, (kind, variant) in enumerate(itertools.product(write, (".fp16", ""))):
        saved = model(seed).half() if variant else model(seed)
        write[kind](saved.state_dict(), tmp_path / f"{stem}{variant}.{kind}")
        assert same(saved.float().state_dict(), load(tmp_path).state_dict())


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (self.mark.touch, ())


def refused(folder, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_bin_runs_nothing(tmp_path):
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "mark"
    contents = ({"0.bias": Trap(mark)}, [torch.zeros(1)], {"0.bias": 3})
    for content, zipped in itertools.product(contents, (True, False)):  # torch's old format is a plain pickle
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        refused(tmp_path, "more than tensors")
        assert not mark.exists()
    torch.save(model().state_dict(), path)
    for broken in (path.read_bytes()[:100], b"", b"\x80\x02}q\x00(", b"\x80\x02X\x05\x00\x00\x00\xff\xff\xff\xff\xff."):
        path.write_bytes(broken)
        refused(tmp_path, "missing or damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, "do not fit its config: .*Missing key.*0.bias"),
        ({"extra": torch.zeros(1)}, "Unexpected key.*extra"),
        ({"0.weight": torch.zeros(3, 5)}, r"size mismatch for 0.weight: .*\[3, 5\].*\[2, 2\]"),
        ({"1.bias": torch.tensor([0.0, float("nan")])}, r"not finite \(NaN or infinite\): 1.bias"),
        ({"0.bias": torch.tensor([float("inf"), 0.0])}, r"not finite \(NaN or infinite\): 0.bias"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    tensors = {name: t for name, t in (model().state_dict() | change).items() if t is not None}
    model_io.save_tensors(tmp_path / model_io.DIFFUSERS_FILE, tensors)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(2**20), "size mismatch"),  # 4 TB
        (Sizes(-5), "do not fit its config: .*negative dimension"),
        (Sizes(2, 2**20), "'layers' is 1048576; it must be at most 4 in"),
    ],
)
def test_a_config_of_any_size_takes_no_memory_before_its_weights_fit(tmp_path, sizes, message):
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        model_io.load_model(sizes.make, tmp_path, model().state_dict(), sizes)
    assert time.monotonic() - start < 10


def test_missing_and_damaged_files(tmp_path):
    folder = tmp_path / "model"
    refused(folder, "no weights in")
    model_io.save_tensors(tmp_path / "elsewhere.safetensors", model().state_dict())
    folder.mkdir()
    for files, message in (
        ([], "no weight_map from tensors to files"),
        ({}, "at most 0"),
        ({"a": "model-1.safetensors"}, "model-1.safetensors.*missing or damaged"),
        ({"0.bias": "../elsewhere.safetensors"}, "missing or damaged"),
    ):
        model_io.write_json(folder / "model.safetensors.index.json", {"weight_map": files})
        refused(folder, message)
    config = folder / "config.json"
    with pytest.raises(UserError, match="is .* a model folder"):
        model_io.read_json(config)
    for text, message in (("{", "not valid JSON"), ("[" * 200_000, "not valid"), ("[1]", "a JSON list")):
        config.write_text(text)
        with pytest.raises(UserError, match=message):
            model_io.read_json(config)
    config.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')  # a byte order mark, as Windows writes it
    assert model_io.read_json(config) == {"a": 1}


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    model_io.write_json(tmp_path / "a", {"old": 1})
    with pytest.raises(OSError), model_io.atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise OSError
    assert model_io.read_json(tmp_path / "a") == {"old": 1} and len(list(tmp_path.iterdir())) == 1


def test_parts_are_found_in_models_runs_checkpoints_and_by_shipped_names(tmp_path, monkeypatch):
    """A folder in the working directory takes a shipped model's name only where it holds a model."""
    save(tmp_path / "whole" / "vae")
    for folder in (tmp_path / "whole", tmp_path / "whole" / "vae"):
        assert model_io.find_part(folder, "vae") == tmp_path / "whole" / "vae"
    run = tmp_path / "run"
    for name in ("step-00000100", "step-00000200", "step-00000300.tmp"):
        save(run / "checkpoints" / name / "vae")
    model_io.write_json(run / "config.json", {"train": {}})
    assert model_io.find_part(run, "vae") == run / "checkpoints" / "step-00000200" / "vae"
    save(run / "vae")
    assert model_io.find_part(run, "vae") == run / "vae"
    with pytest.raises(UserError, match="no unet in"):
        model_io.find_part(run, "unet")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes" / "pictures").mkdir(parents=True)
    shipped = model_io.find_root("shapes")
    assert shipped.parent == model_io.ASSETS and model_io.find_part("shapes", "vae") == shipped / "vae"
    save(tmp_path / "shapes" / "vae")
    assert model_io.find_root("shapes").resolve() == tmp_path / "shapes"


def test_configs_as_others_write_them(tmp_path):
    """Settings of diffusers' EMA (`unet_ema`), a square `sample_size` as a list, and the first U-Nets' of 32."""
    UNet(unet_config()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, size in (
        ({"decay": 0.9999, "inv_gamma": 1.0, "optimization_step": 7, "use_ema_warmup": True}, 8),
        ({"sample_size": [24, 24]}, 24),
        ({"sample_size": None}, 64),
        ({"sample_size": 32, "_diffusers_version": "0.6.0"}, 64),
        ({"sample_size": 32, "_diffusers_version": "0.10.2"}, 32),
    ):
        model_io.write_json(path, config | change)
        assert UNet.from_pretrained(tmp_path).config.sample_size == size
    changes = {"act_fn": "mish", "brand_new": 3, "sample_size": [8, 16], "attention_head_dim": 0}
    changes |= {"class_embed_type": "timestep", "up_block_types": ["UpBlock2D", "Attn"], "cross_attention_dim": "wide"}
    for change in ({key: value} for key, value in changes.items()):
        model_io.write_json(path, config | change)
        with pytest.raises(UserError, match=next(iter(change))):
            UNet.from_pretrained(tmp_path)
