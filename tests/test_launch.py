"""All three trainings and the evaluation in two processes, through the real launcher and scripts, against one."""

import json
import math
import shutil
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from launching import EXAMPLES, free_port, launch, start
from PIL import Image
from test_scripts import AUTOENCODER, CLIP, DIFFUSION, in_process

CONFIGS = {"autoencoder": AUTOENCODER, "clip": CLIP, "diffusion": DIFFUSION}
# Sums over two halves are rounded in another order, by 1e-7 of them a step. AdamW divides by the gradient's own size,
# which would blow that up where a gradient is zero but for rounding: a larger eps keeps such weights where they are.
SETTINGS = ["train.log_every=1", "train.steps=6", "train.optimizer.eps=1e-4", "train.save_every=4"]
OWN = {
    "autoencoder": ["data.flip=true"],
    "clip": ["data.flip=true", "grounding.words=1.0", "grounding.picture=1.0"],
    "diffusion": ["vae=autoencoder", "text_encoder=clip", "cache=latents.safetensors", "caption_dropout=0.3"]
    + ['timesteps="logit_normal"'],
}
TOLERANCE = 1e-4
MEASURED = ["--guidance", "1,2", "--steps", 2, "--num", 16, "--train-num", 40, "--batch-size", 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`two/`: the three trainings, each in two processes."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "two").mkdir()
    for name, text in CONFIGS.items():
        (folder / f"{name}.toml").write_text(text)
        done = launch(f"scripts/train_{name}.py", *given(name, batch=4), cwd=folder / "two")
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def given(name: str, batch: int) -> list[str]:
    return ["--config", f"../{name}.toml", "--out", name, *SETTINGS, *OWN[name], f"train.batch_size={batch}"]


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_have_the_loss_curve_of_one_at_the_same_global_batch(folder, capsys, monkeypatch, name):
    """Every logged number: losses, gradient norms, the adaptive weight, validation. Each begins with the same parts."""
    (folder / "one").mkdir(exist_ok=True)
    arguments = given(name, batch=8)
    if name == "diffusion":
        arguments += ["vae=../two/autoencoder", "text_encoder=../two/clip"]
    code, _, error = in_process(capsys, monkeypatch, f"train_{name}.py", *arguments, cwd=folder / "one")
    assert code == 0, error
    check_alike(folder / "one" / name, folder / "two" / name, lines=7)


def test_a_run_of_two_processes_goes_on_in_one(folder, capsys, monkeypatch):
    """As an undisturbed one of twice the batch, with another number of steps from the same one on."""
    shutil.copytree(folder / "two" / "clip", folder / "two" / "resumed")
    for out, more in (("resumed", ["--force"]), ("straight", [])):
        if out == "straight":
            first = (*given("clip", batch=8), "--out", out)
            assert in_process(capsys, monkeypatch, "train_clip.py", *first, cwd=folder / "two")[0] == 0
        arguments = (*given("clip", batch=8), "--out", out, *more, "train.steps=9")
        code, _, error = in_process(capsys, monkeypatch, "train_clip.py", *arguments, cwd=folder / "two")
        assert code == 0, error
    check_alike(folder / "two" / "straight", folder / "two" / "resumed", lines=11)


def check_alike(one: Path, two: Path, lines: int) -> None:
    """Asserts that all logged numbers of two runs agree."""
    one, two = logged(one), logged(two)
    assert [line.keys() for line in one] == [line.keys() for line in two] and len(one) == lines
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"z_std"}:  # a deviation is no mean over samples
            assert math.isclose(a[key], b[key], rel_tol=TOLERANCE, abs_tol=1e-6), (a["step"], key, a[key], b[key])


def test_two_machines_do_what_two_processes_of_one_do(folder):
    """Two launches that find each other by address, by the example file for several machines."""
    network = ("--num_machines", "2", "--num_processes", "2", "--main_process_port", str(free_port()))
    options = ("--config_file", str(EXAMPLES / "multi-node.yaml"), *network)
    arguments = (*given("clip", batch=4), "--out", "machines")
    both = [
        start("scripts/train_clip.py", *arguments, cwd=folder / "two", options=(*options, "--machine_rank", str(rank)))
        for rank in range(2)
    ]
    for launched in both:
        _, error = launched.communicate(timeout=1800)
        assert launched.returncode == 0, error[-3000:]
    assert logged(folder / "two" / "machines") == logged(folder / "two" / "clip")


@pytest.mark.parametrize(
    ("file", "nodes", "each"), [("one-node-8-gpus", 1, 8), ("multi-node", 4, 8), ("two-cpus", 1, 2)]
)
def test_accelerate_reads_the_example_files_as_they_are_meant(file, nodes, each, monkeypatch):
    """By its own loader, which refuses unknown keys, and its own translation for torch's launcher."""
    path = EXAMPLES / f"{file}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes) == (nodes, nodes * each)
    args = launch_command_parser().parse_args(["--config_file", str(path), "scripts/train_clip.py"])
    args, _, _ = _validate_launch_command(args)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    environment = prepare_multi_gpu_env(args)
    assert args.multi_gpu and not args.use_fsdp and not args.use_deepspeed and int(args.nproc_per_node) == each
    assert int(getattr(args, "nnodes", None) or 1) == nodes
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no" and "ACCELERATE_USE_FSDP" not in environment


def test_two_processes_measure_what_one_measures(folder, capsys, monkeypatch, one_thread):
    """The same pictures to the bit, and all numbers but time and memory."""
    arguments = ["--model", "two/diffusion", "--data", "shapes", *MEASURED]
    done = launch("scripts/evaluate.py", *arguments, "--out", "both", cwd=folder)
    assert done.returncode == 0 and done.stdout.count("best guidance") == 1, done.stderr[-3000:]
    code, said, error = in_process(capsys, monkeypatch, "evaluate.py", *arguments, "--out", "alone", cwd=folder)
    assert code == 0, error
    assert done.stdout == said.replace("alone", "both")
    tables = [json.loads((folder / out / "metrics.json").read_text()) for out in ("alone", "both")]
    alone, both = ([r for r in table.pop("results") if "device" not in r] for table in tables)
    assert tables[0] == tables[1] and len(alone) == len(both) > 60
    assert all(a == b for a, b in zip(alone, both, strict=True))
    pictures = sorted(p.relative_to(folder / "alone") for p in (folder / "alone").rglob("*.png"))
    assert len(pictures) > 100
    for name in pictures:
        with Image.open(folder / "alone" / name) as a, Image.open(folder / "both" / name) as b:
            assert a.tobytes() == b.tobytes() and a.text == b.text


def test_a_launch_that_would_start_one_process_for_two_is_refused_in_one_line(folder):
    """What accelerate does without a GPU and --multi_gpu."""
    arguments, options = given("clip", batch=4), ("--num_processes", "2")
    done = launch("scripts/train_clip.py", *arguments, "--out", "new", cwd=folder / "two", options=options)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert done.returncode != 0 and "started one" in line and "add --multi_gpu" in line
    assert not (folder / "two" / "new").exists()


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_splits_the_model_otherwise_is_refused_in_one_line(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    (tmp_path / "clip.toml").write_text(CLIP)
    arguments = ("--config", "clip.toml", "--out", "clip")
    code, _, error = in_process(capsys, monkeypatch, "train_clip.py", *arguments, cwd=tmp_path)
    assert (
        code == 2
        and error.count("\n") == 1
        and "is not supported. Launch with --config_file configs/accelerate/" in error
    )
    assert not (tmp_path / "clip").exists()
