"""Model folders: found, read strictly, written whole."""

import dataclasses
import errno
import itertools
import json
import resource

import pytest
import safetensors.torch
import torch
from torch import nn

from ldm import model_io as weights
from ldm.config import UserError


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.Conv2d(3, 4, 3))


def save(folder, seed: int = 0, file: str = weights.DIFFUSERS_FILE) -> nn.Module:
    saved = model(seed)
    weights.save_model(folder, saved, {"_class_name": "Thing"}, file)
    return saved


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.parametrize("file", [weights.DIFFUSERS_FILE, weights.TRANSFORMERS_FILE])
def test_weights_round_trip_whatever_their_layout(tmp_path, file):
    saved = model().to(memory_format=torch.channels_last)
    weights.save_model(tmp_path / "new" / "folder", saved, {"_class_name": "Thing"}, file)
    assert equal(saved, weights.load_weights(model(1), tmp_path / "new" / "folder"))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(["config.json", file])


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    weights.save_model(tmp_path, model(), {}, weights.DIFFUSERS_FILE)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_half_precision_loads_as_float32(tmp_path):
    saved = model().half()
    weights.save_model(tmp_path, saved, {}, weights.DIFFUSERS_FILE)
    loaded = weights.load_weights(model(1), tmp_path)
    assert loaded[0].weight.dtype == torch.float32 and equal(saved.float(), loaded)


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (self.mark.touch, ())


@pytest.mark.parametrize("stem", weights.STEMS)
def test_weights_are_found_as_safetensors_variants_and_bin(tmp_path, stem):
    """Each is preferred to those before it."""
    write = {"bin": torch.save, "safetensors": safetensors.torch.save_file}
    for seed, (kind, variant) in enumerate(itertools.product(write, (".fp16", ""))):
        saved = model(seed).half() if variant else model(seed)
        write[kind](saved.state_dict(), tmp_path / f"{stem}{variant}.{kind}")
        assert equal(saved.float(), weights.load_weights(model(9), tmp_path))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_read_by_their_index(tmp_path, kind, variant):
    saved, names = model(), ("0", "1")
    files = {name: f"model{variant}-0000{name}-of-00002.{kind}" for name in names}
    for name in names:
        part = {key: tensor for key, tensor in saved.state_dict().items() if key.startswith(name)}
        (torch.save if kind == "bin" else safetensors.torch.save_file)(part, tmp_path / files[name])
    index = tmp_path / f"model.{kind}.index{variant}.json"
    table = {"weight_map": {key: files[key[0]] for key in saved.state_dict()}}
    weights.write_json(index, {"metadata": {"total_size": 1}} | table)
    assert equal(saved, weights.load_weights(model(1), tmp_path))
    index.rename(tmp_path / f"model{variant}.{kind}.index.json")  # where older libraries put the variant
    assert equal(saved, weights.load_weights(model(1), tmp_path))
    (tmp_path / f"model{variant}.{kind}.index.json").rename(index)
    (tmp_path / files["1"]).unlink()
    with pytest.raises(UserError, match=f"{files['1']}.*missing or damaged"):
        weights.load_weights(model(1), tmp_path)
    for wrong in ({}, *({"weight_map": table} for table in ({}, [], {"a": "../a"}, {"a": "/a"}, {"a": ""}, {"a": []}))):
        weights.write_json(index, wrong)
        with pytest.raises(UserError, match="no weight_map from tensors to files beside it"):
            weights.load_weights(model(1), tmp_path)


def test_a_bin_runs_nothing(tmp_path):
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "mark"
    for content, message in (
        ({"0.bias": Trap(mark)}, "more than tensors"),
        ([torch.zeros(1)], "no table of named tensors"),
        ({"0.bias": 3}, "no table of named tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as error:
            weights.load_weights(model(), tmp_path)
        assert "\n" not in str(error.value)
    torch.save(model().state_dict(), path)
    for broken in (path.read_bytes()[:100], b"", b"\x80\x02}q\x00(", b"\x80\x02X\x05\x00\x00\x00\xff\xff\xff\xff\xff."):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="missing or damaged"):
            weights.load_weights(model(), tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, "missing: 0.bias$"),
        ({"0.bias": None, "0.weight": None}, "missing: 0.bias and 1 more"),
        ({"extra": torch.zeros(1)}, "unexpected: extra"),
        ({"0.weight": torch.zeros(3, 5)}, r"of another shape: 0.weight is \(3, 5\), not \(3, 2\)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    tensors = {name: t for name, t in (model().state_dict() | change).items() if t is not None}
    weights.save_tensors(tmp_path / weights.DIFFUSERS_FILE, tensors)
    untouched = model(1)
    with pytest.raises(UserError, match=message):
        weights.load_weights(untouched, tmp_path)
    assert equal(untouched, model(1))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="no weights in"):
        weights.load_weights(model(), tmp_path)
    save(tmp_path)
    path = tmp_path / weights.DIFFUSERS_FILE
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="missing or damaged"):
        weights.load_weights(model(), tmp_path)
    for text, message in (
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ("[1]", "holds a JSON list"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            weights.read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="is .* a model folder"):
        weights.read_json(tmp_path / "none" / "config.json")


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    weights.write_json(path, {"a": "größer"})
    with pytest.raises(TypeError):
        weights.write_json(path, {"a": object()})
    assert weights.read_json(path) == {"a": "größer"}


def test_parts_are_found_in_models_runs_and_checkpoints(tmp_path):
    save(tmp_path / "whole" / "vae")
    assert weights.find_part(tmp_path / "whole", "vae") == tmp_path / "whole" / "vae"
    assert weights.find_part(tmp_path / "whole" / "vae", "vae") == tmp_path / "whole" / "vae"

    run = tmp_path / "run"
    for name in ("step-00000100", "step-00000200", "step-00000300.tmp"):
        save(run / "checkpoints" / name / "vae")
    weights.write_json(run / "config.json", {"train": {}})
    assert weights.find_part(run, "vae") == run / "checkpoints" / "step-00000200" / "vae"
    save(run / "vae")
    assert weights.find_part(run, "vae") == run / "vae"


def test_nothing_is_taken_for_a_part(tmp_path):
    (tmp_path / "vae").mkdir()
    for folder in (tmp_path, tmp_path / "vae"):
        weights.write_json(folder / "config.json", {"train": {"steps": 3}})  # what a training run has
    with pytest.raises(UserError, match="no vae in"):
        weights.find_part(tmp_path, "vae")
    with pytest.raises(UserError, match="unknown model 'nowhere': neither a folder nor a shipped one"):
        weights.find_part("nowhere", "vae")


def test_shipped_names(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ASSETS", tmp_path / "assets")
    save(tmp_path / "assets" / "shapes" / "vae")
    assert weights.find_part("shapes", "vae") == tmp_path / "assets" / "shapes" / "vae"
    with pytest.raises(UserError, match=r"unknown model 'shape': .*\(shapes\)"):
        weights.find_root("shape")
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "shapes" / "vae")
    assert weights.find_root("shapes").resolve() == tmp_path / "shapes"


def test_supported_values():
    supported, path = {"act": ("silu", None), "size": (1,)}, weights.Path("x/config.json")
    for key, value in (("act", "silu"), ("act", ["silu", "silu"]), ("size", 1.0), ("other", None), ("other", [])):
        weights.check_supported(key, value, supported, path)
    for key, value in (("act", "mish"), ("act", ["silu", "mish"]), ("size", True), ("other", 0), ("other", "")):
        with pytest.raises(UserError, match=f"x/config.json: {key} = .* is not supported"):
            weights.check_supported(key, value, supported, path)


def test_files_are_plain_safetensors_and_json(tmp_path):
    saved = save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"_class_name": "Thing"}
    tensors = safetensors.torch.load_file(tmp_path / weights.DIFFUSERS_FILE)
    assert tensors.keys() == saved.state_dict().keys()


def test_a_file_that_may_not_become_so_large_is_an_error_of_the_system_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save_tensors(path, {"a": torch.ones(2)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="a.safetensors") as caught:
            weights.save_tensors(path, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and len(weights.load_tensors(path)["a"]) == 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a chain of linear layers."""

    width: int = 2
    layers: int = 1

    def make(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(self.layers)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(3), "of another shape"),
        (Sizes(2**20), "of another shape"),  # 4 TB
        (Sizes(2**40), "'width' is 1099511627776; it must be at most 1048576"),
        (Sizes(-5), "describes no model that can be built"),
        (Sizes(2, 2**20), "far more weights than the folder has"),
    ],
)
def test_a_config_of_any_size_takes_no_memory_before_its_weights_fit(tmp_path, sizes, message):
    tensors = Sizes().make().state_dict()
    assert torch.equal(weights.load_model(Sizes().make, tmp_path, tensors, Sizes())[0].weight, tensors["0.weight"])
    with pytest.raises(UserError, match=message):
        weights.load_model(sizes.make, tmp_path, tensors, sizes)
    assert not nn.modules.module._global_parameter_registration_hooks
