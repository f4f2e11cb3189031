"""Commands end to end, from any folder. Their options, and what each refuses, are in test_inventory.py."""

import re
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


LINES = f"""
import contextlib, runpy, sys

def run(*words):
    sys.argv[1:] = words
    runpy.run_module("ldm", run_name="__main__")

run()
for name in {[name for name in COMMANDS if not name.startswith("train")]}:
    with contextlib.suppress(SystemExit):
        run(*name.split(), "--help")
assert "torch" not in sys.modules  # a training's help lists the config's keys, with the defaults of the models
with contextlib.suppress(SystemExit):
    run("train", "clip", "--help")
run("smaple")
"""


def test_commands_are_listed_and_their_help_comes_before_heavy_imports():
    done = subprocess.run([sys.executable, "-c", LINES], capture_output=True, text=True, cwd=ROOT, timeout=300)
    error = "error: unknown command 'smaple'; known: train autoencoder"
    assert done.returncode == 2 and done.stderr.startswith(error), done.stderr
    _, listed, *helps = re.split("(?m)^usage: ldm ", done.stdout)
    assert all(name in listed for name in COMMANDS) and all(len(text.splitlines()) > 4 for text in helps)
    shown = {text.split(" [-h]")[0] for text in helps}
    assert shown == {name for name in COMMANDS if not name.startswith("train")} | {"train clip"}
    assert "train.steps = " in helps[-1]
