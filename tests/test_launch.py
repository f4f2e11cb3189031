"""The three trainings in two processes, with DDP and with FSDP, through the real launcher and scripts, against one."""

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.commands.config.config_args import load_config_from_file
from inventory_tools import metrics
from two_processes import moved

from ldm.config import UserError, load, to_dict
from ldm.diffusion import sample_timesteps
from ldm.distributed import Draws, check_launch
from ldm.model_io import load_tensors, read_json
from ldm.train import sharding
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import train

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "configs" / "accelerate"
TWO_CPUS = EXAMPLES / "two-cpus.yaml"
TASKS = {"autoencoder": AutoencoderTask, "clip": CLIPTask, "diffusion": DiffusionTask}
CONFIGS = {"autoencoder": tiny.autoencoder(), "clip": tiny.clip(), "diffusion": tiny.diffusion("vae", "clip")}
FSDP = ("--config_file", str(EXAMPLES / "fsdp.yaml"), "--num_processes", "2")
# Sums over two halves are rounded in another order, by 1e-7 of them per step. AdamW divides by the gradient's own size,
# which would amplify that where a gradient is zero but for rounding: a larger eps keeps such weights where they are.
SETTINGS = ["train.log_every=1", "train.steps=6", "train.optimizer.eps=1e-4", "train.save_every=4"]
MUON = "train.optimizer.muon_lr=3e-3"
OWN = {
    "ddp": {
        "autoencoder": ["data.flip=true"],
        "clip": ["data.flip=true", "grounding.words=1.0", "grounding.picture=1.0"],
        "diffusion": ["cache=latents.safetensors", "caption_dropout=0.3", 'timesteps="logit_normal"'],
    },
    # steps so large that the weights move far beyond the tolerance
    "fsdp": {
        "autoencoder": ["data.flip=true", "train.accumulate=2", "train.optimizer.lr=3e-3"],
        "clip": [MUON, "train.optimizer.lr=3e-3", "data.flip=true", "grounding.words=1.0", "grounding.picture=1.0"],
        "diffusion": [MUON, "train.optimizer.lr=3e-3", "train_text_encoder=true", "caption_dropout=0.3"],
    },
}


def train_here(name: str, given: list[str], out: str, cwd: Path, force: bool = False) -> None:
    """One of the trainings in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        config = load(type(CONFIGS[name]), None, given)
        train(TASKS[name](config), config.train, out, to_dict(config), force)


def launch(script: Path | str, *arguments: object, cwd: Path, options: tuple = ("--config_file", str(TWO_CPUS))):
    """`accelerate launch` with the example file for two processes on CPU cores, or other options; to its end."""
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options]
    command += ["--main_process_port", "0", str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=1800)


def given(kind: str, name: str, batch: int, *more: str) -> list[str]:
    parts = [f"vae=../{kind}/autoencoder", f"text_encoder=../{kind}/clip"] if name == "diffusion" else []
    return [*tiny.overrides(CONFIGS[name]), *SETTINGS, *OWN[kind][name], *parts, f"train.batch_size={batch}", *more]


def launched(kind: str, name: str, *more: str, cwd: Path, out: str = "") -> None:
    """A training run in two processes of batches of 4, to its end."""
    options = {"options": FSDP} if kind == "fsdp" else {}
    arguments = ["--out", out or name, *given(kind, name, 4), *more]
    done = launch(f"scripts/train_{name}.py", *tiny.EMPTY, *arguments, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("launch")


def runs(folder: Path, kind: str, name: str) -> tuple[Path, Path]:
    """The same training in one process and in two, from the same parts; made once."""
    one, two = folder / f"{kind}-one" / name, folder / kind / name
    if not two.exists():
        for other in ("autoencoder", "clip") if name == "diffusion" else ():
            runs(folder, kind, other)
        one.parent.mkdir(exist_ok=True)
        two.parent.mkdir(exist_ok=True)
        train_here(name, given(kind, name, 8), name, one.parent)
        launched(kind, name, cwd=two.parent)
    return one, two


def names(run: Path) -> set[Path]:
    """The files of a run, the shards of one as one."""
    files = (p.relative_to(run) for p in run.rglob("*") if "tensorboard" not in p.parts)
    return {p.with_name(re.sub(r"-\d{5}-of-\d{5}", "", p.name)) for p in files}


def check_same_lines(one: Path, two: Path, count: int, tolerance: float = 1e-4) -> None:
    """Every logged number: losses, gradient norms, the adaptive weight, validation."""
    one, two = metrics(one), metrics(two)
    assert [line.keys() for line in one] == [line.keys() for line in two] and len(one) == count
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"z_std"}:  # a deviation is no mean over samples
            assert math.isclose(a[key], b[key], rel_tol=tolerance, abs_tol=1e-6), (a["step"], key, a[key], b[key])


MATRIX = [(kind, name) for kind in OWN for name in CONFIGS]


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param(*pair, marks=[pytest.mark.slow] * (pair != ("ddp", "clip"))) for pair in MATRIX]
)
def test_two_processes_train_as_one_with_their_batches_together(folder, one_thread, kind, name):
    """All numbers, and every tensor of every file: the model, weights, averages, optimizers, under the same names."""
    one, two = runs(folder, kind, name)
    check_same_lines(one, two, 7)
    files = names(one)
    assert files == names(two)
    tensors = [file for file in files if file.suffix == ".safetensors"]
    assert len(tensors) > 6
    assert len([*two.rglob("*-of-00002.*")]) == (kind == "fsdp") * 2 * len([*one.rglob("state/*.safetensors")])
    for file in tensors:
        shards, expected = sharding.load(two / file.parent, file.stem), load_tensors(one / file)
        torch.testing.assert_close(shards, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_run_goes_on_in_one_or_two_processes_sharded_or_not(folder, one_thread):
    """Two sharded ones, then one, then two, against one all the time."""
    runs(folder, "fsdp", "clip")
    for kind, processes in (("fsdp-one", (1, 1)), ("fsdp", (1, 2))):
        out = Path(shutil.copytree(folder / kind / "clip", folder / kind / "resumed"))
        for count, steps in zip(processes, ("train.steps=9", "train.steps=12"), strict=True):
            if count == 2:
                launched("fsdp", "clip", steps, "--force", cwd=out.parent, out=out.name)
            else:
                train_here("clip", given("fsdp", "clip", 8, steps), out.name, out.parent, force=True)
    check_same_lines(folder / "fsdp-one" / "resumed", folder / "fsdp" / "resumed", 15)


@pytest.mark.slow
def test_bf16_is_autocast_over_float32_weights_with_and_without_fsdp(folder):
    half = [*OWN["fsdp"]["clip"], "train.precision=bf16", "train.steps=2"]
    for kind in OWN:
        (folder / kind).mkdir(exist_ok=True)
        launched(kind, "clip", *half, cwd=folder / kind, out="half")
    check_same_lines(folder / "ddp" / "half", folder / "fsdp" / "half", 3, 1e-2)  # bf16 keeps 3 digits


@pytest.mark.slow
def test_two_processes_hold_about_half_of_every_parameter_each_and_share_muon(tmp_path, one_thread):
    """Except CLIP's scale, which has no dimensions. Muon moves matrices as in one process."""
    done = launch("tests/two_processes.py", tmp_path, cwd=tmp_path, options=FSDP)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (read_json(tmp_path / f"process-{rank}.json") for rank in range(2))
    shares = list(zip(first["sizes"], first["shares"], second["shares"], strict=True))
    assert [size for size, a, b in shares if a is None and b is None] == [1]
    assert all(a + b == size for size, a, b in shares if a is not None)
    assert 0.4 < sum(a or 0 for _, a, _ in shares) / sum(first["sizes"]) < 0.75
    assert all(tiny.same(load_tensors(tmp_path / f"muon-{rank}.safetensors"), moved()) for rank in range(2))


STUCK = "has made no progress for 6 s (LDM_TIMEOUT)"


@pytest.mark.parametrize(
    ("fault", "said"), [pytest.param("sleep", STUCK, marks=pytest.mark.slow), ("kill", "has ended")]
)
def test_a_process_that_hangs_or_dies_is_named_and_ends_the_others(tmp_path, fault, said):
    """Without a launcher, which would end them itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    environment = os.environ | address | {"LDM_TIMEOUT": "6", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "two_processes.py", tmp_path / "run", fault]
    started = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    error, _ = (process.communicate(timeout=120)[1] for process in started)
    assert [process.returncode for process in started] == [2, 2 if fault == "sleep" else -signal.SIGKILL]
    assert f"error: rank 1 of 2 processes {said}: see its own output" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("file", "nodes", "each"), [("one-node-8-gpus", 1, 8), ("multi-node", 4, 8), ("two-cpus", 1, 2)]
)
def test_accelerate_reads_the_example_files_as_they_are_meant(file, nodes, each):
    """By its own loader, which refuses unknown keys."""
    config = load_config_from_file(str(EXAMPLES / f"{file}.yaml"))
    assert (config.num_machines, config.num_processes) == (nodes, nodes * each)
    assert config.mixed_precision == "no" and not config.fsdp_config and not config.deepspeed_config


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED is true; it must be false"),
        (SHARDED | {"FSDP_VERSION": "1"}, "FSDP_VERSION is 1; it must be 2"),
        (SHARDED | {"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS is true"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "localhost"}, "started one.*add --multi_gpu"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no launcher has started this process"),
        ({"WORLD_SIZE": "many"}, "no launcher has started this process"),
    ],
)
def test_an_unsupported_launch_is_refused(monkeypatch, environment, said):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=said):
        check_launch()


WORLD, ROWS = 3, 4
KINDS = {
    "rand": lambda draws, rows: draws.rand(rows, 7),
    "randn": lambda draws, rows: draws.randn(rows, 3, 2),
    "stratified": lambda draws, rows: draws.rows(lambda n, g: sample_timesteps(n, 99, "stratified", generator=g), rows),
}


@pytest.mark.parametrize("kind", KINDS)
def test_processes_draw_what_one_draws_for_all_their_samples(kind):
    """Twice in turn, so that they are at the same position of the stream afterwards."""
    draw, one = KINDS[kind], Draws(7, 3)
    both = [draw(one, WORLD * ROWS) for _ in range(2)]
    many = [Draws(7, 3, rank, WORLD) for rank in range(WORLD)]
    for expected in both:
        assert torch.equal(torch.cat([draw(draws, ROWS) for draws in many]), expected)
    assert not torch.equal(*both)
