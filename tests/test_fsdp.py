"""All three trainings sharded between two processes (accelerate's FSDP, version 2), against one process: through the
real launcher, scripts and example file, with accelerate made to take FSDP on CPUs (tests/fsdp_on_cpus.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import EXAMPLES, launch
from safetensors.torch import load_file
from test_launch import CONFIGS, check_alike
from test_scripts import CLIP, in_process

from ldm import Pipeline

FSDP = ("--config_file", str(EXAMPLES / "fsdp.yaml"), "--num_processes", "2")
# With steps so large that the weights move far beyond the tolerance; for the larger eps see tests/test_launch.py.
SETTINGS = ["train.log_every=1", "train.steps=6", "train.save_every=4", "train.optimizer.eps=1e-4"]
SETTINGS += ["train.optimizer.lr=3e-3", "train.optimizer.warmup=0"]
MUON = "train.optimizer.muon_lr=3e-3"
OWN = {
    "autoencoder": ["data.flip=true", "train.accumulate=2"],
    "clip": [MUON, "data.flip=true", "grounding.words=1.0", "grounding.picture=1.0"],
    "diffusion": [MUON, "vae=../two/autoencoder", "text_encoder=../two/clip", "train_text_encoder=true"]
    + ["caption_dropout=0.3"],
}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`two/`: the three trainings, each sharded between two processes."""
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    for name, text in CONFIGS.items():
        (folder / f"{name}.toml").write_text(text)
        sharded(name, cwd=folder / "two")
    return folder


def given(name: str, batch: int, *more: str, out: str = "") -> list[str]:
    out = out or name
    return ["--config", f"../{name}.toml", "--out", out, *SETTINGS, *OWN[name], f"train.batch_size={batch}", *more]


def sharded(name: str, *more: str, cwd: Path, out: str = "", options: tuple = FSDP) -> None:
    """A training in two processes of batches of 4, to its end."""
    arguments = given(name, 4, *more, out=out)
    done = launch(
        "tests/fsdp_on_cpus.py", f"{EXAMPLES.parents[1]}/scripts/train_{name}.py", *arguments, cwd=cwd, options=options
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_that_share_all_weights_train_as_one_that_has_them(folder, capsys, monkeypatch, name):
    """Every logged number (clipped gradients' norms, the GAN's weight and logits, validation of the average) and every
    tensor of every file: the model, weights, averages, both optimizers' states, under the same names."""
    for task in ("autoencoder", "diffusion"):  # noise is drawn in another order in another layout
        monkeypatch.setattr(f"ldm.train.{task}.training_layout", lambda: torch.channels_last)
    code, _, error = in_process(capsys, monkeypatch, f"train_{name}.py", *given(name, 8), cwd=folder / "one")
    assert code == 0, error
    one, two = folder / "one" / name, folder / "two" / name
    check_alike(one, two, lines=7)
    check_same_files(one, two)
    for part in (one / "checkpoints/step-00000006/state").glob("*-ema.safetensors"):
        trained = load_file(part.with_name(part.name.replace("-ema", "")))
        assert max(float((average - trained[key]).abs().max()) for key, average in load_file(part).items()) > 1e-4


def check_same_files(one: Path, two: Path) -> None:
    """Asserts that two run folders have the same files, those with tensors the same ones."""
    files = {path.relative_to(one) for path in one.rglob("*") if "tensorboard" not in path.parts}
    assert files == {path.relative_to(two) for path in two.rglob("*") if "tensorboard" not in path.parts}
    tensors = [file for file in files if file.suffix in (".safetensors", ".pt")]
    assert len(tensors) > 6
    for file in tensors:
        load = load_file if file.suffix == ".safetensors" else lambda path: torch.load(path, weights_only=True)
        a, b = load(one / file), load(two / file)
        assert a.get("param_groups") == b.get("param_groups")
        a, b = (x["state"] if "param_groups" in x else {"": x} for x in (a, b))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_process_holds_a_share_of_every_parameter(folder, name):
    """All but CLIP's scale, which has no dimensions, and is the same in both. Layers are gathered one by one."""
    first, second = (json.loads((folder / "two" / f"{name}-{rank}.json").read_text()) for rank in range(2))
    assert all(count >= 2 for part, count in first["layers"].items() if part not in ("discriminator", "grounding"))
    for part in first["held"]:
        pairs = list(zip(first["held"][part], second["held"][part], strict=True))
        whole = [(a, b) for a, b in pairs if a["share"] is None]
        assert all(a == b and a["size"] == 1 for a, b in whole) and len(whole) == (part == "clip")
        assert all(a["share"] + b["share"] == a["size"] for a, b in pairs if (a, b) not in whole)
        shares = [sum(x["share"] or 0 for x in held["held"][part]) for held in (first, second)]
        assert 0.4 < shares[0] / sum(shares) < 0.75  # rows are dealt out, the odd one to the first


def test_the_folder_opens_as_usual(folder):
    """And draws the picture of the one that a single process saved."""
    pictures = [
        Pipeline.from_pretrained(folder / n / "diffusion")(["a red circle"], steps=2)[0] for n in ("one", "two")
    ]
    one, two = (np.asarray(picture).astype(int) for picture in pictures)
    assert np.abs(one - two).max() <= 1 and one.std() > 1


def test_a_run_goes_on_sharded_or_not(folder, capsys, monkeypatch):
    """Two processes after two, one after two, and two after one, as one after one."""
    more = ("train.steps=9", "--force")
    for before, after in (("one", "one"), ("two", "one"), ("two", "two"), ("one", "two")):
        out = folder / "two" / f"{before}-{after}"
        shutil.copytree(folder / before / "clip", out)
        if after == "two":
            sharded("clip", *more, cwd=folder / "two", out=out.name)
        else:
            arguments = given("clip", 8, *more, out=out.name)
            code, _, error = in_process(capsys, monkeypatch, "train_clip.py", *arguments, cwd=folder / "two")
            assert code == 0, error
        check_alike(folder / "two" / "one-one", out, lines=11)


def test_bf16_is_autocast_over_float32_weights_as_without_fsdp(folder):
    """The same numbers as two processes that hold all weights (DDP)."""
    more = ("train.precision=bf16", "train.steps=3")
    sharded("clip", *more, cwd=folder / "two", out="half-fsdp")
    done = launch("scripts/train_clip.py", *given("clip", 4, *more, out="half-ddp"), cwd=folder / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    check_alike(folder / "two" / "half-ddp", folder / "two" / "half-fsdp", lines=4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"VERSION": "1"}, "fsdp_version is 1; supported is 2"),
        ({}, "fsdp_version is 1; supported is 2"),
        ({"VERSION": "2", "OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is true; supported is false"),
        ({"VERSION": "2", "ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing is true"),
        ({"VERSION": "2"}, "accelerate has FSDP on GPUs only"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys, monkeypatch, settings, said):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for key, value in settings.items():
        monkeypatch.setenv(f"FSDP_{key}", value)
    (tmp_path / "clip.toml").write_text(CLIP)
    arguments = ("--config", "clip.toml", "--out", "clip")
    code, _, error = in_process(capsys, monkeypatch, "train_clip.py", *arguments, cwd=tmp_path)
    assert code == 2 and error.count("\n") == 1 and said in error and "configs/accelerate/" in error
    assert not (tmp_path / "clip").exists()
