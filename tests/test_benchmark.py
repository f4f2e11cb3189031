"""The benchmark's comparison, figures and files; never its times."""

import json

import numpy as np
import pytest
from test_scripts import ROOT, in_process

from ldm.commands import benchmark
from ldm.commands.benchmark import Options, Workload


@pytest.fixture
def one_case(monkeypatch, tmp_path):
    """A benchmark of one case, of random numbers; `spoil` changes the output of diffusers' side."""

    def measured(job: str = "features", **changes) -> dict:
        workload = Workload(**{"job": job, "cases": {}, "sides": ("ldm", "diffusers")} | changes)
        return benchmark.measure(workload, {"batch": 1}, Options(out=tmp_path, rounds=2, threads=1), str(tmp_path))

    return measured


def test_differences_are_found():
    ones = np.ones(3)
    largest = benchmark.largest_difference
    assert largest({"x": ones}, {"x": ones * 4}, relative=True) == 0.75
    assert largest({"x": ones}, {"x": ones * 4}, relative=False) == 3
    for other in ({}, {"y": ones}, {"x": np.ones(4)}, {"x": ones * np.nan}):
        assert largest({"x": ones}, other, relative=True) == float("inf")


def test_the_interval_of_a_ratio():
    assert benchmark.ratio([4.0] * 5, [2.0] * 5) == (2, 2, 2)
    assert benchmark.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2, 2, 2)  # rounds are drawn in pairs
    rng = np.random.default_rng(0)
    intervals = [benchmark.ratio(*np.exp(rng.normal(0, 0.1, (2, 15))).tolist()) for _ in range(40)]
    assert sum(low <= 1 <= high for _, low, high in intervals) >= 34


def test_rounds_alternate_and_a_failure_names_its_side(one_case):
    row = one_case()
    assert [len(seconds) for seconds in row["seconds"].values()] == [2, 2] and not row["problem"]
    assert row["difference"] == 0 and min(row["peaks"]) > 2**26
    assert one_case("nothing")["problem"].startswith("ldm: KeyError: 'nothing'")


def test_the_command_writes_a_table_and_goes_on(capsys, monkeypatch, tmp_path):
    line = ["--only", "unet-forward", "--quick", "--rounds", "1", "--threads", "1", "--out", "b"]
    code, out, err = in_process(capsys, monkeypatch, "benchmark.py", *line, cwd=tmp_path)
    assert code == 0, err
    table = json.loads((tmp_path / "b/benchmark.json").read_text())
    (row,) = table["rows"]
    assert row["name"] == "unet-forward: shapes 8x8, batch 1" and 0 < row["difference"] < 1e-4
    assert row["name"] in out and all((tmp_path / "b" / f"benchmark.{x}").is_file() for x in ("md", "html"))
    code, _, err = in_process(capsys, monkeypatch, "benchmark.py", *line, cwd=tmp_path)
    assert code == 0 and "measuring" not in err
    row |= {"difference": 0.5, "problem": "outputs differ by 0.5, allowed 0.0001"}
    (tmp_path / "b/benchmark.json").write_text(json.dumps(table))
    code, out, err = in_process(capsys, monkeypatch, "benchmark.py", *line, cwd=tmp_path)
    assert code == 1 and "WRONG: 5.0e-01" in out and "outputs differ by 0.5" in err


def test_every_case_has_a_job():
    from ldm.commands import benchmark_jobs

    for workload in benchmark.WORKLOADS.values():
        assert callable(getattr(benchmark_jobs, workload.job)) and json.dumps(workload.cases)
    names = benchmark.choose(Options(out=ROOT, quick=True, compile=True))
    assert {name.split(":")[0] for name in names} == set(benchmark.WORKLOADS)
    assert "sampling: shapes 8x8, batch 1, compiled" in names
