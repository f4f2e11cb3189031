"""The benchmark's comparison, figures and files; never its times."""

import json

import numpy as np
from test_scripts import ROOT, in_process

from ldm.commands import benchmark, benchmark_jobs
from ldm.commands.benchmark import WORKLOADS, Options, Workload


def test_differences_are_found():
    ones = np.ones(3)
    assert benchmark.largest_difference({"x": ones}, {"x": ones * 4}) == 0.75
    for other in ({}, {"y": ones}, {"x": np.ones(4)}, {"x": ones * np.nan}):
        assert benchmark.largest_difference({"x": ones}, other) == float("inf")


def test_the_interval_of_a_ratio():
    assert benchmark.ratio([4.0] * 5, [2.0] * 5) == (2, 2, 2)
    assert benchmark.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2, 2, 2)  # rounds are drawn in pairs
    rng = np.random.default_rng(0)
    intervals = [benchmark.ratio(*np.exp(rng.normal(0, 0.1, (2, 15))).tolist()) for _ in range(40)]
    assert sum(low <= 1 <= high for _, low, high in intervals) >= 34


def test_the_command_compares_and_writes_tables(capsys, monkeypatch, tmp_path):
    line = ["--only", "unet-forward", "--quick", "--rounds", "2", "--threads", "1", "--out", "b"]
    code, out, err = in_process(capsys, monkeypatch, "benchmark.py", *line, cwd=tmp_path)
    assert code == 0, err
    (row,) = json.loads((tmp_path / "b/benchmark.json").read_text())["rows"]
    assert row["name"] == "unet-forward: shapes 32 px, batch 1" and 0 < row["difference"] < 1e-4
    assert [len(seconds) for seconds in row["seconds"].values()] == [2, 2] and min(row["peaks"]) > 2**26
    assert row["name"] in out and all((tmp_path / "b" / f"benchmark.{x}").is_file() for x in ("md", "html"))


def test_a_failure_names_its_side_and_is_exit_code_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(WORKLOADS, "data", Workload(job="nothing", cases={"a": {}}))
    line = ["--only", "data", "--threads", "1", "--out", "b"]
    code, out, err = in_process(capsys, monkeypatch, "benchmark.py", *line, cwd=tmp_path)
    assert code == 1 and "error: data: a: ldm: KeyError: 'nothing'" in err and "failed" in out


def test_every_case_has_a_job():
    assert all(callable(getattr(benchmark_jobs, workload.job)) for workload in WORKLOADS.values())
    names = benchmark.choose(Options(out=ROOT, quick=True, compile=True))
    assert {name.split(":")[0] for name in names} == set(WORKLOADS)
    assert "sampling: shapes 32 px, batch 1, compiled" in names
