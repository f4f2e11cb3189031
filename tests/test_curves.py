"""Curves are of what the files say, and a file that says nothing is refused."""

import json
import re

import pytest
from test_scripts import ROOT, in_process

RESULTS = ROOT / "configs/emoji/results/clipart"


def drawn(page: str, title: str) -> list[list[tuple[float, float]]]:
    """The lines of the plot of that title, in the picture's coordinates."""
    figure = next(part for part in page.split("<figure>")[1:] if part.startswith(f"<p>{title}</p>"))
    lines = re.findall(r'polyline points="([^"]*)"', figure)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]


def test_every_number_of_a_training_is_drawn_over_its_steps(tmp_path, capsys, monkeypatch):
    for name, losses in (("a", [4.0, 2.0, 1.0]), ("b", [3.0, 2.5])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": 10 * (i + 1), "loss": v}) for i, v in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "val/loss": 7}']))
    code, said, error = in_process(
        capsys, monkeypatch, "plot_metrics.py", "a", "b", "--out", "new/c.html", cwd=tmp_path
    )
    assert code == 0 and "2 plots in new/c.html: loss, val/loss" in said, error
    page = (tmp_path / "new/c.html").read_text()
    first, second = drawn(page, "loss")
    assert [x for x, _ in first[:2]] == [x for x, _ in second]  # the same steps, above each other
    high, middle, low = (y for _, y in first)
    assert (middle - high) / (low - middle) == pytest.approx(2, abs=0.02)  # 4, 2, 1, downwards
    assert (second[1][1] - second[0][1]) / (middle - high) == pytest.approx(1 / 4, abs=0.02)
    assert ">a<" in page and ">b<" in page and "src=" not in page and "href=" not in page


def test_curves_of_the_results_that_are_kept(tmp_path, capsys, monkeypatch):
    files = [RESULTS / "autoencoder-adamw.jsonl", RESULTS / "autoencoder-muon.jsonl", RESULTS / "evaluation.json"]
    code, said, error = in_process(capsys, monkeypatch, "plot_metrics.py", *files, "--out", "c.html", cwd=tmp_path)
    assert code == 0, error
    page = (tmp_path / "c.html").read_text()
    assert len(drawn(page, "val/psnr")) == 2 and ">autoencoder-muon<" in page
    results = json.loads(files[2].read_text())["results"]
    values = {r["guidance"]: r["value"] for r in results if r["metric"] == "frechet_distance" and r["of"] == "samples"}
    ((one, three),) = drawn(page, "Frechet distance: evaluation")
    assert len(values) == 2 and (one[1] > three[1]) == (values[1.0] < values[3.0])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("none.jsonl", None, "'none.jsonl' is no .jsonl file of a run"),
        ("a.txt", "", "'a.txt' is no .jsonl file of a run"),
        ("a.jsonl", "", "'a.jsonl' is empty"),
        ("a.jsonl", '{"step": 1, "loss": 2}\nnonsense', "line 2 of 'a.jsonl' is no line of a training's log"),
        ("a.jsonl", "[1]", "line 1 of 'a.jsonl' is no line of a training's log"),
        ("a.json", "{", "'a.json' is not valid JSON"),
        ("a.json", '{"results": 3}', "'a.json' is no metrics.json of an evaluation of a model"),
        ("a.json", '{"results": []}', "'a.json' is no metrics.json of an evaluation of a model"),
        (".", None, "folder '.' has neither metrics.jsonl (of a run) nor metrics.json"),
    ],
)
def test_a_file_with_nothing_to_draw_is_refused(tmp_path, capsys, monkeypatch, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    code, _, error = in_process(capsys, monkeypatch, "plot_metrics.py", name, "--out", "c.html", cwd=tmp_path)
    assert code == 2 and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "c.html").exists()
