"""The committed curves are those of the committed numbers, and mistakes are said in one line."""

import json
import runpy
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "configs" / "emoji" / "results"
KEPT = ("decoder.jsonl", "clip.jsonl", "diffusion.jsonl", "evaluation.json")
SVG = "{http://www.w3.org/2000/svg}"


def show(monkeypatch, capsys, results: Path, out: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["show_results.py", "--results", str(results), "--out", str(out)])
    code = 0
    try:
        runpy.run_path(str(ROOT / "scripts" / "show_results.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_curves_in_the_model_card_are_those_of_the_kept_numbers(monkeypatch, capsys, tmp_path):
    assert show(monkeypatch, capsys, RESULTS, tmp_path / "new" / "curves.svg")[0] == 0
    made = (tmp_path / "new" / "curves.svg").read_text()
    assert made == (ROOT / ".github" / "emoji-curves.svg").read_text()
    drawing = ElementTree.fromstring(made)
    steps = [
        line
        for name in ("decoder", "clip", "diffusion")
        for line in (RESULTS / f"{name}.jsonl").open()
        if '"val/' in line
    ]
    losses = [line for line in (RESULTS / "diffusion.jsonl").open() if '"unet_loss"' in line]
    points = [len(line.get("points").split()) for line in drawing.iter(f"{SVG}polyline")]
    assert points == [20, 20, 16, 16, len(losses), 39, 5, 5] and len(steps) == 75
    assert "var(" not in made


def test_the_table_has_each_arm_with_its_intervals(monkeypatch, capsys, tmp_path):
    for name in KEPT:
        (tmp_path / name).write_text((RESULTS / name).read_text())
    (tmp_path / "ablation").mkdir()
    psnr = {"metric": "psnr_db", "of": "reconstructions", "value": 27.486, "interval": [27.1893, 27.7607]}
    distance = {"metric": "frechet_distance", "of": "reconstructions", "value": 62.25, "interval": [58.7, 65.3]}
    perceptual = {"metric": "perceptual_distance", "of": "reconstructions", "value": 0.1114, "interval": [0.1, 0.125]}
    other = psnr | {"of": "latents", "value": 1.0}
    for name, records in (("full", [other, psnr, distance]), ("no-gan", [perceptual])):
        (tmp_path / "ablation" / f"{name}.json").write_text(json.dumps({"results": records}))
    code, out, _ = show(monkeypatch, capsys, tmp_path, tmp_path / "curves.svg")
    assert code == 0
    assert out.splitlines()[2:4] == [
        "| full | 27.49 [27.19, 27.76] | - | 62.2 [58.7, 65.3] |",
        "| no-gan | - | 111.4 [100.0, 125.0] | - |",
    ]
    (tmp_path / "ablation").rename(tmp_path / "gan")
    assert show(monkeypatch, capsys, tmp_path, tmp_path / "curves.svg")[1] == out


@pytest.mark.parametrize("broken", [*KEPT, "ablation/arm.json"])
def test_results_that_are_none_are_named(monkeypatch, capsys, tmp_path, broken):
    (tmp_path / "ablation").mkdir()
    for name in KEPT:
        (tmp_path / name).write_text((RESULTS / name).read_text())
    (tmp_path / broken).write_text("{")
    code, out, err = show(monkeypatch, capsys, tmp_path, tmp_path / "curves.svg")
    assert code == 2 and err.count("\n") == 1 and f"{broken}' holds no results" in err and not out
    assert not (tmp_path / "curves.svg").exists()
