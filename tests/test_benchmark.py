"""The benchmark's comparison, figures and files; never its times."""

import json

import numpy as np
from test_scripts import in_process

from ldm.commands import benchmark


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
