"""The scripts as a user runs them: end to end, and what they say to mistakes."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image, ImageChops

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))

DATA = """
held_out = 8
data.length = 24
[train]
steps = 3
batch_size = 4
save_every = 2
optimizer.warmup = 1
"""
AUTOENCODER = (
    """
statistics = 24
model = { block_out_channels = [8, 16, 16], layers_per_block = 1, norm_num_groups = 4 }
loss = { perceptual_depth = 1, gan_start = 1, gan_ramp = 1, discriminator_channels = 4, discriminator_layers = 2 }
"""
    + DATA
)
TOWER = "hidden_size = 32, intermediate_size = 32, num_hidden_layers = 1, num_attention_heads = 2, projection_dim = 16"
CLIP = f"""
vocab_size = 560
text = {{ {TOWER}, max_position_embeddings = 32 }}
vision = {{ {TOWER}, patch_size = 8 }}
{DATA}"""
DIFFUSION = """
preview = { count = 2, steps = 2 }
[model]
block_out_channels = [16, 32]
down_block_types = ["CrossAttnDownBlock2D", "DownBlock2D"]
up_block_types = ["UpBlock2D", "CrossAttnUpBlock2D"]
layers_per_block = 1
attention_head_dim = 2
norm_num_groups = 4
[schedule]
sampler = "ddim"
timestep_spacing = "trailing"
""" + DATA.replace("held_out = 8\n", "").replace("data.length = 24", "[data]\nlength = 24")


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """A script in a process of its own, on one core and without an accelerator."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny configs, and all three trainings run with them into `vae`, `clip` and `diffusion`."""
    folder = tmp_path_factory.mktemp("scripts")
    for name, text in (("autoencoder", AUTOENCODER), ("clip", CLIP), ("diffusion", DIFFUSION)):
        (folder / f"{name}.toml").write_text(text)
        extra = ['train.precision="bf16"']
        extra += ["grounding.words=1.0", "grounding.picture=1.0"] if name == "clip" else []
        extra += ["vae=autoencoder", "text_encoder=clip"] if name == "diffusion" else []
        done = run(f"train_{name}.py", "--config", f"{name}.toml", "--out", name, *extra, cwd=folder)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert "warning" not in done.stderr.lower(), done.stderr[-3000:]
    return folder


def in_process(capsys, monkeypatch, script: str, *arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script run inside this process, which spares the imports."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    code = 0
    with warnings.catch_warnings():
        try:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    return code, *capsys.readouterr()


def test_trainings_then_sampling_end_to_end(folder):
    done = run(
        "sample.py",
        *("--model", "diffusion", "--prompt", "a red circle", "--prompt", "zwei Grün", "--negative-prompt", "blue"),
        *("--steps", "2", "--seed", "7", "--guidance", "3", "--out", "out"),
        cwd=folder,
    )
    assert done.returncode == 0 and "2 pictures in out" in done.stdout, done.stderr
    names = ["0000-a-red-circle.png", "0001-zwei-gr-n.png", "grid.png"]
    assert sorted(p.name for p in (folder / "out").iterdir()) == names
    with Image.open(folder / "out" / names[1]) as image:
        assert image.size == (32, 32)
        assert image.text == {
            "prompt": "zwei Grün",
            "negative_prompt": "blue",
            "seed": "8",
            "sampler": "ddim",
            "steps": "2",
            "guidance": "3.0",
            "guidance_rescale": "0.0",
            "model": "diffusion",
        }


def test_the_same_commands_give_the_same_bytes(folder):
    """Two processes each: a training from nothing, and its pictures; the log of starts has times in it."""
    for name in ("one", "two"):
        out = folder / "twice" / name
        done = run("train_autoencoder.py", "--config", "autoencoder.toml", "--out", out, "train.steps=3", cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        arguments = ("--model", "diffusion", "--prompt", "a red circle", "--steps", "2", "--out", out / "pictures")
        done = run("sample.py", *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (folder / "twice" / name for name in ("one", "two"))
    files = [file.relative_to(one) for file in sorted(one.rglob("*")) if file.is_file()]
    files = [file for file in files if file.name not in ("starts.jsonl", ".lock") and "tensorboard" not in file.parts]
    assert len(files) > 15 and all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_the_same_command_is_finished_and_more_steps_resume(folder):
    """In processes of their own, as one can have one precision only."""
    arguments = ("--config", "clip.toml", "--out", "clip", 'train.precision="bf16"')
    arguments += ("grounding.words=1.0", "grounding.picture=1.0")
    done = run("train_clip.py", *arguments, cwd=folder)
    assert done.returncode == 0 and "clip is finished at step 3" in done.stdout
    done = run("train_clip.py", *arguments, "train.steps=4", cwd=folder)
    assert done.returncode == 0 and "resuming clip at step 3 of 4" in done.stdout
    assert "warning: resuming with other values than before of: train.steps" in done.stderr
    done = run("train_clip.py", *arguments, "train.steps=5", "train.optimizer.lr=0.5", cwd=folder)
    assert done.returncode == 2 and "train.optimizer.lr (0.0001 before, 0.5 now). Give --force" in done.stderr


def test_a_list_of_prompts_and_what_is_cut_from_a_long_one(folder, capsys, monkeypatch):
    (folder / "prompts.txt").write_text("a red circle\n\n" + "a red circle " * 15 + "and a blue star\n")
    arguments = (
        "--model",
        "diffusion",
        "--prompts",
        "prompts.txt",
        "--steps",
        "1",
        "--out",
        "two",
    )
    code, _, err = in_process(capsys, monkeypatch, "sample.py", *arguments, "--grid", "g/g.png", cwd=folder)
    assert code == 0 and (folder / "g" / "g.png").is_file() and len(list((folder / "two").iterdir())) == 2
    warned = [line for line in err.splitlines() if line.startswith("warning:")]
    assert len(warned) == 1 and "was cut off: '" in warned[0] and warned[0].endswith("and a blue star'")


def test_from_a_picture_with_a_mask(folder, capsys, monkeypatch):
    Image.new("RGB", (50, 40), "red").save(folder / "red.png")
    Image.new("L", (50, 40), "black").save(folder / "black.png")
    options = ("--model", "diffusion", "--prompt", "a", "--image", "red.png", "--steps", "4", "--strength", "0.5")
    for out, extra in (("edited", ()), ("kept", ("--mask", "black.png"))):
        code, _, err = in_process(capsys, monkeypatch, "sample.py", *options, *extra, "--out", out, cwd=folder)
        assert code == 0, err
        with Image.open(folder / out / "0000-a.png") as image:
            assert image.size == (32, 32) and image.text["image"] == "red.png" and image.text["strength"] == "0.5"


def test_from_one_prompt_to_another(folder, capsys, monkeypatch):
    ends = ("--prompt", "a red circle", "--prompt", "a blue star", "--seed", "3")
    options = ("--model", "diffusion", *ends, "--steps", "2")
    for out, extra in (("ends", ()), ("path", ("--interpolate", "4", "--seed-to", "4"))):
        code, _, err = in_process(capsys, monkeypatch, "sample.py", *options, *extra, "--out", out, cwd=folder)
        assert code == 0, err
    with Image.open(folder / "path" / "path.gif") as gif:
        assert gif.n_frames == 4
    ends, path = (sorted(p for p in (folder / out).glob("0*.png")) for out in ("ends", "path"))
    assert len(path) == 4
    for whole, part in ((ends[0], path[0]), (ends[1], path[3])):
        with Image.open(whole) as a, Image.open(part) as b:
            assert max(high for _, high in ImageChops.difference(a, b).getextrema()) <= 1


def test_comparison_with_diffusers(folder, capsys, monkeypatch):
    options = ("--prompt", "a red circle", "--steps", "3")
    code, out, err = in_process(capsys, monkeypatch, "compare_diffusers.py", "diffusion", *options, cwd=folder)
    assert code == 0, err
    rows = [line.rsplit(maxsplit=2) for line in out.splitlines()[1:]]
    found = {name.strip(): float(difference) for name, difference, _ in rows}
    assert [*found] == [
        *("tokens", "text context", "VAE moments", "VAE decoded", "U-Net at t 10", "U-Net at t 500", "U-Net at t 990"),
        *("pictures, guidance 1", "pictures, guidance 7.5"),
    ]
    assert all(value <= (1 if name.startswith("pictures") else 1e-4) for name, value in found.items()), found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_there_before_anything_heavy_is_imported(script):
    code = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: sys.exit(stop.code or ('torch' in sys.modules and 'torch was imported'))\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.argv = [{str(script)!r}]\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:") and len(done.stdout.splitlines()) > 4


def train(name: str, *overrides: str) -> tuple[str, ...]:
    return (f"train_{name}.py", "--config", f"{name}.toml", "--out", "new", *overrides)


def sample(*arguments: str) -> tuple[str, ...]:
    return ("sample.py", "--out", "new", *arguments)


PARTS = ("vae=autoencoder", "text_encoder=clip")
MODEL = ("--model", "diffusion", "--prompt", "a red circle")
MISTAKES = {
    "unknown key": (train("clip", "train.step=3"), "unknown config key 'train.step'; did you mean 'steps'"),
    "unknown key of the VAE": (train("autoencoder", "loss.lpips=1"), "unknown config key 'loss.lpips'"),
    "wrong type": (train("diffusion", *PARTS, 'train.steps="many"'), "'train.steps' is 'many' (str); it must be int"),
    "out of range": (train("autoencoder", "train.batch_size=0"), "'train.batch_size' is 0; it must be 1 or more"),
    "no override": (train("clip", "steps"), "override 'steps' is not of the form key.path=value"),
    "no config": (("train_clip.py", "--out", "new"), "the following arguments are required: --config; see --help"),
    "missing config": (("train_clip.py", "--config", "c.toml", "--out", "new"), "config file 'c.toml' does not exist"),
    "unknown data set": (train("autoencoder", "data.name=cats"), "unknown data set 'cats'; known: shapes, emoji"),
    "unknown perceptual": (train("autoencoder", "loss.perceptual_net=vgg"), "unknown perceptual network 'vgg'; known:"),
    "missing folder": (train("clip", "data.name=folder", "data.path=nowhere"), "image folder 'nowhere' does not exist"),
    "empty folder": (train("autoencoder", "data.name=folder", "data.path=empty"), "no pictures in 'empty'"),
    "no caption": (train("clip", "data.name=folder", "data.path=bare"), "a.png' has no caption; write 'a.txt'"),
    "size of the VAE": (train("autoencoder", "data.size=30"), "data.size 30 must be a multiple of 4"),
    "size of the U-Net": (train("diffusion", *PARTS, "data.size=36"), "data.size 36 must be a multiple of 8"),
    "missing model": (train("diffusion", "vae=nothing", "text_encoder=clip"), "unknown model 'nothing'"),
    "no VAE in it": (train("diffusion", "vae=empty", "text_encoder=clip"), "no vae in 'empty'"),
    "model not named": (train("diffusion"), "config key 'vae' is empty"),
    "unknown sampler": (train("diffusion", *PARTS, "schedule.sampler=plms"), "sampler 'plms' is unknown; allowed: "),
    "undefined schedule": (
        train("diffusion", *PARTS, "schedule.rescale_betas_zero_snr=true"),
        "prediction 'epsilon' cannot go with rescale_betas_zero_snr",
    ),
    "another run": (
        ("train_clip.py", "--config", "clip.toml", "--out", "autoencoder"),
        "is of another model than the config describes (it has no clip); use another --out",
    ),
    "sample: unknown model": (
        sample("--model", "emoij", "--prompt", "a"),
        "unknown model 'emoij': neither",
    ),
    "sample: half a model": (
        sample("--model", "autoencoder", "--prompt", "a"),
        "is not a whole pipeline: text",
    ),
    "sample: unknown sampler": (sample(*MODEL, "--sampler", "plms"), "sampler 'plms' is unknown; allowed: ddpm"),
    "sample: size": (sample(*MODEL, "--height", "30"), "size 30 px cannot be made: height and width must be multiples"),
    "sample: steps": (sample(*MODEL, "--steps", "0"), "steps 0 is out of range; allowed: 1 to 1000"),
    "sample: steps in words": (
        sample(*MODEL, "--steps", "ten"),
        "--steps: invalid int value: 'ten'; see --help",
    ),
    "sample: batch": (sample(*MODEL, "--batch-size", "0"), "batch size 0 is not allowed"),
    "sample: device": (sample(*MODEL, "--device", "gpu"), "device 'gpu' cannot be used"),
    "sample: no prompts": (sample("--model", "diffusion", "--prompts", "blank.txt"), "'blank.txt' holds no prompt"),
    "sample: no file": (sample("--model", "diffusion", "--prompts", "none.txt"), "'none.txt' cannot be read"),
    "sample: nothing": (sample("--model", "diffusion"), "one of the arguments --prompt --prompts is required"),
    "sample: file as folder": (("sample.py", *MODEL, "--out", "blank.txt"), "'blank.txt' is there and is no folder"),
    "sample: no image": (sample(*MODEL, "--image", "none.png"), "image 'none.png' does not exist"),
    "sample: mask alone": (sample(*MODEL, "--mask", "bare/a.png"), "a mask needs an image"),
    "sample: strength": (sample(*MODEL, "--image", "bare/a.png", "--strength", "2"), "strength 2.0 is not allowed"),
    "sample: no square": (sample(*MODEL, "--image", "bare/a.png", "--height", "32"), "must be equal"),
    "sample: mask of another size": (
        sample(*MODEL, "--image", "bare/a.png", "--mask", "wide.png"),
        "the mask is 40x32, the image 32x32",
    ),
    "sample: other bytes": (sample("--model", "diffusion", "--prompt", "a\udcff"), "'a\\udcff' is not valid UTF-8"),
    "sample: long name": (sample("--model", "diffusion" * 999, "--prompt", "a"), "File name too long"),
    "sample: seed": (sample(*MODEL, "--seed", "-1"), "seed -1 is not allowed"),
    "sample: seed to": (sample(*MODEL, "--seed-to", "1"), "--seed-to is where --interpolate ends"),
    "sample: one prompt": (sample(*MODEL, "--interpolate", "4"), "--interpolate 4 with 1 prompts"),
    "compare: guidance": (("compare_diffusers.py", "diffusion", "--guidance", "a"), "is no list of numbers"),
    "compare: guidance of none": (("compare_diffusers.py", "diffusion", "--guidance", "0.5"), "1 or more"),
    "compare: steps": (("compare_diffusers.py", "diffusion", "--steps", "0"), "steps 0 is out of range"),
    "compare: seed": (("compare_diffusers.py", "diffusion", "--seed", "-1"), "seed -1 is not allowed"),
    "compare: no model": (("compare_diffusers.py", "nowhere"), "unknown model 'nowhere'"),
    "prepare: size": (("prepare_data.py", "emoji", "--size", "65", "--out", "new"), "emoji size 65 is not available"),
}


def check_refused(code: int, out: str, err: str, message: str, folder: Path) -> None:
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err
    assert not (folder / "new").exists()


def times(folder: Path) -> dict[Path, int]:
    """When each file was changed, but for the locks, which say who holds a run."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(folder, capsys, monkeypatch, mistake):
    (script, *arguments), message = MISTAKES[mistake]
    for name in ("empty", "bare"):
        (folder / name).mkdir(exist_ok=True)
    Image.new("RGB", (32, 32)).save(folder / "bare" / "a.png")
    Image.new("L", (40, 32)).save(folder / "wide.png")
    (folder / "blank.txt").write_text("\n \n")
    files = times(folder)
    check_refused(*in_process(capsys, monkeypatch, script, *arguments, cwd=folder), message, folder)
    assert files == times(folder)


@pytest.mark.parametrize("mistake", ["unknown data set", "undefined schedule", "sample: size"])
def test_a_mistake_in_a_process_of_its_own(folder, mistake):
    (script, *arguments), message = MISTAKES[mistake]
    done = run(script, *arguments, cwd=folder)
    check_refused(done.returncode, done.stdout, done.stderr, message, folder)


def test_an_unreadable_picture_is_one_line_of_error(folder, capsys, monkeypatch):
    pictures = folder / "pictures" / "train"
    pictures.mkdir(parents=True)
    (folder / "pictures" / "val").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "pictures" / "val" / "b.png")
    (pictures / "a.png").write_bytes(b"no picture")  # neither has a caption: an autoencoder needs none
    script, *arguments = train("autoencoder", "data.name=folder", "data.path=pictures", "train.workers=1")
    code, _, err = in_process(capsys, monkeypatch, script, *arguments, cwd=folder)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and "a.png" in errors[0] and "Traceback" not in err
