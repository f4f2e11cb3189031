"""The commands as a user runs them: end to end, from any folder, and the doors of `ldm sample`. The mistakes that are
refused are in test_inventory.py."""

import os
import runpy
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from ldm.__main__ import COMMANDS
from ldm.commands.cli import positional, read_options
from ldm.config import UserError

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


@pytest.mark.parametrize(
    "data", [b"a red circle\na star", b"\xef\xbb\xbfa red circle\r\n\r\na star\r\n", b"a red circle\n a star \n"]
)
def test_a_file_of_prompts(folder, capsys, monkeypatch, tmp_path, data):
    """With and without a byte order mark, CRLF and a final newline."""
    (tmp_path / "prompts.txt").write_bytes(data)
    options = ("--model", folder / "diffusion", "--prompts", "prompts.txt", "--steps", "1", "--out", "o")
    code, _, err = in_process(capsys, monkeypatch, "sample.py", *options, "--grid", "g/g.png", cwd=tmp_path)
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["0000-a-red-circle.png", "0001-a-star.png"]
    with Image.open(tmp_path / "o/0000-a-red-circle.png") as image:
        assert image.text["prompt"] == "a red circle" and (tmp_path / "g/g.png").is_file()


def test_an_image_and_its_mask_are_compared_upright(folder, capsys, monkeypatch, tmp_path):
    """A camera's picture lies on its side, as its EXIF data say; a mask drawn over it stands upright."""
    exif, camera = Image.Exif(), Image.new("RGB", (40, 30), "red")
    exif[0x0112] = 6  # turned by a quarter
    camera.save(tmp_path / "image.jpg", exif=exif)
    Image.new("L", (30, 40), "white").save(tmp_path / "mask.png")
    options = ("--model", folder / "diffusion", "--prompt", "a", "--steps", "2", "--image", "image.jpg")
    options += ("--mask", "mask.png", "--out", "out")
    code, _, err = in_process(capsys, monkeypatch, "sample.py", *options, cwd=tmp_path)
    assert code == 0, err


def test_prompts_are_given_in_one_way(folder, capsys, monkeypatch, tmp_path):
    for prompts in ((), ("--prompt", "a", "--prompts", "p.txt")):
        options = ("--model", folder / "diffusion", "--out", "o", *prompts)
        code, _, err = in_process(capsys, monkeypatch, "sample.py", *options, cwd=tmp_path)
        assert code == 2 and "exactly one of --prompt and --prompts is required" in err and err.count("\n") == 1


# --- the command line


@dataclass(frozen=True, kw_only=True)
class Options:
    paths: tuple[Path, ...] = positional()  # files
    out: Path  # 50% of them
    name: str | None = None
    text: str = ""  # as typed
    sizes: tuple[float, ...] = (1, 2.5)  # some
    words: tuple[str, ...] = ()  # may be repeated
    count: int = 3  # of them
    quick: bool = False  # faster


def test_options_of_a_dataclass(capsys):
    line = [
        "a",
        "b",
        "--out",
        "7",
        "--name",
        "none",
        "--text",
        '"x"',
        "--sizes",
        "3,4",
        "--words",
        "1",
        "--words",
        "b",
        "--count",
        "-1",
        "--quick",
    ]
    given = Options(
        paths=(Path("a"), Path("b")), out=Path("7"), text='"x"', sizes=(3, 4), words=("1", "b"), count=-1, quick=True
    )
    assert read_options(Options, "Says.", line) == given
    assert read_options(Options, "Says.", ["a", "--out", "o"]) == Options(paths=(Path("a"),), out=Path("o"))
    with pytest.raises(SystemExit):
        read_options(Options, "Says.", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Says." in shown and "50% of them" in shown and "some; default: 1,2.5" in shown and "--out PATH" in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--out o", "the following arguments are required: PATHS; see --help"),
        ("a", "required: --out"),
        ("a --out o --count x", "--count is 'x'"),
        ("a --out o --sizes x", "numbers with commas, e.g. 1,7.5"),
        ("a --out o --wrong", "unrecognized arguments: --wrong"),
    ],
)
def test_wrong_options(line, message):
    with pytest.raises(UserError, match=message):
        read_options(Options, "Says.", line.split())


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("train")])
def test_help_comes_before_heavy_imports(name):
    """That of a training lists the config's keys, whose defaults are those of the models."""
    code = f"import sys; sys.argv[1:] = {[*name.split(), '--help']!r}\n"
    code += "from ldm.__main__ import main\n"
    code += "try: main()\nexcept SystemExit as stop: sys.exit(stop.code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and len(done.stdout.splitlines()) > 4


def test_ldm_from_any_folder(tmp_path):
    def ldm(*line: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ldm", *line]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )

    assert all(name in ldm().stdout for name in COMMANDS)
    done = ldm("smaple")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown command 'smaple'; known: train autoencoder")
    done = ldm("sample", "--model", "shapes", "--prompt", "a red circle", "--steps", "2", "--out", "out")
    assert done.returncode == 0 and (tmp_path / "out/0000-a-red-circle.png").is_file(), done.stderr
    done = ldm("train", "clip", "--help")
    assert "train.steps = " in done.stdout and "usage: ldm train clip" in done.stdout
