"""Commands end to end, from any folder. Their options, and what each refuses, are in test_inventory.py."""

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

from ldm.__main__ import COMMANDS
from ldm.images import read_metadata

ROOT = Path(__file__).parents[1]
SAMPLE = ("--model", "shapes", "--steps", "2", "--out", "out")


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    """`ldm COMMAND ...` in a process of its own, on one core and without an accelerator."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "ldm", *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=environment, timeout=600)


def in_process(capsys, monkeypatch, script: str, *arguments: object, cwd: Path) -> tuple[int, str, str]:
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


@pytest.mark.parametrize(
    "data", [b"a red circle\na star", b"\xef\xbb\xbfa red circle\r\n\r\na star\r\n", b"a red circle\n a star \n"]
)
def test_a_file_of_prompts(capsys, monkeypatch, tmp_path, data):
    """With and without a byte order mark, CRLF and a final newline; from a camera's picture, which lies on its side as
    its EXIF data say, with a mask drawn over it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.jpg", exif=exif)
    Image.new("L", (30, 40), "white").save(tmp_path / "mask.png")
    (tmp_path / "prompts.txt").write_bytes(data)
    line = (*SAMPLE, "--prompts", "prompts.txt", "--grid", "g/g.png", "--image", "image.jpg", "--mask", "mask.png")
    code, _, err = in_process(capsys, monkeypatch, "sample.py", *line, cwd=tmp_path)
    assert code == 0, err
    names = ["0000-a-red-circle.png", "0001-a-star.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert [read_metadata(tmp_path / "out" / name)["prompt"] for name in names] == ["a red circle", "a star"]
    with Image.open(tmp_path / "g/g.png") as grid:
        assert grid.text == {"grid": "2 pictures"}


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("train")])
def test_help_comes_before_heavy_imports(name):
    """That of a training lists the config's keys, whose defaults are those of the models."""
    code = f"import sys; sys.argv[1:] = {[*name.split(), '--help']!r}\n"
    code += "from ldm.__main__ import main\n"
    code += "try: main()\nexcept SystemExit as stop: sys.exit(stop.code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and len(done.stdout.splitlines()) > 4


def test_the_list_of_commands(tmp_path):
    listed = run(cwd=tmp_path).stdout
    assert all(name in listed for name in COMMANDS)
    done = run("smaple", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown command 'smaple'; known: train autoencoder")
    done = run("train", "clip", "--help", cwd=tmp_path)
    assert "train.steps = " in done.stdout and "usage: ldm train clip" in done.stdout
