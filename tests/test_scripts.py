"""Commands end to end, from any folder. Their options, and what each refuses, are in test_inventory.py."""

import json
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.__main__ import COMMANDS
from ldm.commands import benchmark
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
for name in {[name for name in COMMANDS if not name.startswith(("train", "gpu"))]}:
    with contextlib.suppress(SystemExit):
        run(*name.split(), "--help")
assert "torch" not in sys.modules  # others' help names defaults of models, or is read beside a GPU
with contextlib.suppress(SystemExit):
    run("train", "clip", "--help")
run("smaple")
"""


def test_commands_are_listed_and_their_help_comes_before_heavy_imports():
    done = subprocess.run([sys.executable, "-c", LINES], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown command 'smaple'; known: train"), done.stderr
    _, listed, *helps = re.split("(?m)^usage: ldm ", done.stdout)
    assert all(name in listed for name in COMMANDS) and all(len(text.splitlines()) > 4 for text in helps)
    shown = {text.split(" [-h]")[0] for text in helps}
    assert shown == {name for name in COMMANDS if not name.startswith(("train", "gpu"))} | {"train clip"}
    assert "train.steps = " in helps[-1]


def test_the_interval_of_a_ratio():
    assert benchmark.ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]) == (2, 2, 2)  # rounds are drawn in pairs
    rng = np.random.default_rng(0)
    intervals = [benchmark.ratio(*np.exp(rng.normal(0, 0.1, (2, 15))).tolist()) for _ in range(40)]
    assert sum(low <= 1 <= high for _, low, high in intervals) >= 34


def test_the_command_compares_and_writes_tables(capsys, monkeypatch, tmp_path):
    """A case that agrees, one that does not, and one that fails: exit code 1, and the failure names its side."""
    monkeypatch.setitem(benchmark.WORKLOADS, "vae", (1e-12, (("emoji", 64, 1),)))
    monkeypatch.setitem(benchmark.WORKLOADS, "nothing", (1.0, (("shapes", 32, 1),)))
    line = ["--only", "unet-forward,vae,nothing", "--quick", "--rounds", "2", "--threads", "1", "--out", "b"]
    code, out, _ = in_process(capsys, monkeypatch, "benchmark.py", *line, cwd=tmp_path)
    row, wrong, failed = json.loads((tmp_path / "b/benchmark.json").read_text())["rows"]
    assert row["name"] == "unet-forward: shapes 32 px, batch 1" and 0 < row["difference"] < 1e-4
    assert [len(seconds) for seconds in row["seconds"].values()] == [2, 2] and min(row["peaks"]) > 2**26
    assert row["name"] in out and all((tmp_path / "b" / f"benchmark.{x}").is_file() for x in ("md", "html"))
    assert "outputs differ by" in wrong["problem"] and "WRONG" in out and "allowed 1e-12" in code
    assert failed["problem"] == "ldm: KeyError: 'nothing'" and failed["problem"] in code
