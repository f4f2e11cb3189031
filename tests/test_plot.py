"""Curves show the numbers of the files, and a file without numbers is refused."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
from test_scripts import ROOT, in_process

from ldm.commands import plot

RESULTS = ROOT / "configs" / "emoji" / "results"


def test_runs_share_a_plot_per_number(tmp_path, capsys, monkeypatch):
    for name, losses in (("a", [4.0, 2.0, 1.0]), ("b", [3.0, 2.5])):
        (tmp_path / name / "unet").mkdir(parents=True)
        lines = [json.dumps({"step": 10 * (i + 1), "loss": v}) for i, v in enumerate(losses)]
        (tmp_path / name / "unet/metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "val/loss": 7}']))
    line = ("a/unet", "b/unet", "--out", "new/c.html")
    code, out, err = in_process(capsys, monkeypatch, "plot_metrics.py", *line, cwd=tmp_path)
    assert code == 0 and "2 plots in new/c.html: loss, val/loss" in out, err
    page = (tmp_path / "new/c.html").read_text()
    assert ">a/unet<" in page and ">b/unet<" in page and "src=" not in page and "<link" not in page
    points = [xy for name, line, *xy in plot.read_points(tmp_path / "a/unet/metrics.jsonl") if name == "loss"]
    assert points == [[10, 4.0], [20, 2.0], [30, 1.0]]


def test_an_evaluation_is_drawn_over_guidance():
    points = [p for p in plot.read_points(RESULTS / "evaluation.json") if p[0] == "image_to_text@1 over guidance"]
    samples = [(x, round(100 * y)) for _, line, x, y in points if line == "samples"]
    assert samples == [(1, 54), (2, 61), (3, 64), (5, 62), (8, 56)]
    assert [xy for _, line, *xy in points if line == "real held-out"] == [[None, 0.7]]


def test_the_model_cards_curves_and_tables(capsys, monkeypatch, tmp_path):
    line = ("--results", RESULTS, "--out", "n/c.svg")
    code, out, _ = in_process(capsys, monkeypatch, "show_results.py", *line, cwd=tmp_path)
    assert code == 0 and "| full | 27.49 [27.19, 27.76] | - | 0.1114 [0.1068, 0.1159] |" in re.sub(" +", " ", out)
    for file in (tmp_path / "n/c.svg", ROOT / ".github" / "emoji-curves.svg"):
        drawing = ElementTree.parse(file)
        assert len([g for g in drawing.iter("{http://www.w3.org/2000/svg}g") if "axes_" in g.get("id", "")]) == 6


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "'none.jsonl' holds no results"),
        ("a.txt", "", "'a.txt' holds no results"),
        ("a.jsonl", '{"step": 1, "loss": 2}\nnonsense', "'a.jsonl' holds no results"),
        ("a.jsonl", "[1]", "'a.jsonl' holds no results"),
        ("a.json", '{"results": 3}', "'a.json' holds no results"),
        ("a.json", '{"results": [{"of": "samples"}]}', "'a.json' holds no results"),
        ("a.json", '{"results": [{"metric": "ssim", "of": "reconstructions", "value": 0.9}]}', "there are no curves"),
        (".", None, "'.' holds no results"),
        ("clip.jsonl", "{", "clip.jsonl' holds no results"),
        ("evaluation.json", "{", "evaluation.json' holds no results"),
        ("ablation/full.json", "{", "ablation/full.json' holds no results"),
    ],
)
def test_a_file_without_numbers_is_refused(tmp_path, capsys, monkeypatch, name, text, message):
    line = ["plot_metrics.py", name]
    if name in ("clip.jsonl", "evaluation.json", "ablation/full.json"):
        shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True)
        line = ["show_results.py", "--results", "."]
    if text is not None:
        (tmp_path / name).write_text(text)
    code, out, err = in_process(capsys, monkeypatch, *line, "--out", "c.html", cwd=tmp_path)
    assert code == 2 and message in err and err.count("\n") == 1 and not out, err
    assert not (tmp_path / "c.html").exists()
