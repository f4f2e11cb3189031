"""Curves show the numbers of the files, and a file without numbers is refused."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from test_scripts import ROOT, in_process

from ldm.commands import plot

RESULTS = ROOT / "configs" / "emoji" / "results"
KEPT = ("decoder.jsonl", "clip.jsonl", "diffusion.jsonl", "evaluation.json")


def test_runs_share_a_plot_per_number(tmp_path, capsys, monkeypatch):
    for name, losses in (("a", [4.0, 2.0, 1.0]), ("b", [3.0, 2.5])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": 10 * (i + 1), "loss": v}) for i, v in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "val/loss": 7}']))
    code, out, err = in_process(capsys, monkeypatch, "plot_metrics.py", "a", "b", "--out", "new/c.html", cwd=tmp_path)
    assert code == 0 and "2 plots in new/c.html: loss, val/loss" in out, err
    page = (tmp_path / "new/c.html").read_text()
    assert ">a<" in page and ">b<" in page and "src=" not in page and "<link" not in page
    assert plot.curves(tmp_path / "a/metrics.jsonl")["loss"][""] == [(10, 4.0), (20, 2.0), (30, 1.0)]


def test_an_evaluation_is_drawn_over_guidance():
    curves = plot.curves(RESULTS / "evaluation.json")
    assert [x for x, _ in curves["Frechet distance"]["samples"]] == [1, 2, 3, 5, 8]
    hits = curves["Right caption found first, %"]
    assert [round(y, 1) for _, y in hits["samples"]] == [53.8, 61.5, 64.0, 62.1, 56.2]
    (first, y), (last, same) = hits["real held-out"]
    assert (first, last) == (1, 8) and y == same > 64


def test_the_model_cards_curves_and_tables(capsys, monkeypatch, tmp_path):
    line = ("--results", RESULTS, "--out", "n/c.svg")
    code, out, _ = in_process(capsys, monkeypatch, "show_results.py", *line, cwd=tmp_path)
    assert code == 0 and "| full | 27.49 [27.19, 27.76] | 0.859 [0.853, 0.866] | 111.4 [106.8, 115.9] |" in out
    for file in (tmp_path / "n/c.svg", ROOT / ".github" / "emoji-curves.svg"):
        drawing = ElementTree.parse(file)
        assert len([g for g in drawing.iter("{http://www.w3.org/2000/svg}g") if "axes_" in g.get("id", "")]) == 6


@pytest.mark.parametrize("broken", [*KEPT, "ablation/arm.json"])
def test_broken_results_are_named(capsys, monkeypatch, tmp_path, broken):
    (tmp_path / "ablation").mkdir()
    for name in KEPT:
        (tmp_path / name).write_text((RESULTS / name).read_text())
    (tmp_path / broken).write_text("{")
    line = ("--results", ".", "--out", "c.svg")
    code, out, err = in_process(capsys, monkeypatch, "show_results.py", *line, cwd=tmp_path)
    assert code == 2 and err.count("\n") == 1 and f"{broken}' holds no results" in err and not out
    assert not (tmp_path / "c.svg").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "'none.jsonl' is no .jsonl file of a run"),
        ("a.txt", "", "'a.txt' is no .jsonl file of a run"),
        ("a.jsonl", "", "'a.jsonl' is empty"),
        ("a.jsonl", '{"step": 1, "loss": 2}\nnonsense', "'a.jsonl' holds no results"),
        ("a.jsonl", "[1]", "'a.jsonl' holds no results"),
        ("a.json", '{"results": 3}', "'a.json' holds no results"),
        (".", None, "'.' is no .jsonl file of a run, .json file of an evaluation, or folder with metrics.jsonl"),
    ],
)
def test_a_file_without_numbers_is_refused(tmp_path, capsys, monkeypatch, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    code, _, err = in_process(capsys, monkeypatch, "plot_metrics.py", name, "--out", "c.html", cwd=tmp_path)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "c.html").exists()
