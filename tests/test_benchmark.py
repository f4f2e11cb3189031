"""The benchmark's protocol, figures and files; never its times."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_benchmark
import pytest
import torch
import torch.nn.functional as F
from fake_benchmark import ENV, SETTINGS, Workers, case, measured
from torch import nn

from ldm.bench import bench, cases, machine, measure, processes, report, stats, worker, workloads
from ldm.bench.cases import Case, Target
from ldm.bench.measure import Settings
from ldm.bench.sides import WorkerFailed, alternate
from ldm.bench.worker import Job, Worker, count_flops, peak, reset_peak, resident, sampling_job
from ldm.config import UserError

ROOT = Path(__file__).parent.parent


class Here:
    """A worker in this process, whose output is off by so much."""

    def __init__(self, off: float = 0.0):
        self.worker = Worker(lambda case: Job(run=lambda: {"x": torch.full((3,), 2.0) + off}, count=lambda: 1))

    def ask(self, do: str, **arguments) -> dict:
        return getattr(self.worker, do)(**arguments)


@pytest.fixture
def fake(tmp_path):
    with Workers(tmp_path) as workers:
        yield workers


def row(fake: Workers, tested: Case, settings: Settings = SETTINGS) -> dict:
    return measure.measure(tested, fake.sides, fake.start, settings, lambda name: None)


def test_sides_are_timed_in_turns(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "MOST", 1)
    ticks = []
    found = measure.measure(case(), fake.sides, fake.start, SETTINGS, ticks.append)
    calls = (tmp_path / "calls").read_text().split()
    # warm, then four rounds of which every second is turned round
    assert calls == ["ldm", "diffusers"] + ["ldm", "diffusers", "diffusers", "ldm"] * 2
    assert ticks == ["sampling/fake"] * 4
    assert [len(found["sides"][name]["seconds"]) for name in ("ldm", "diffusers")] == [4, 4]
    assert found["sides"]["diffusers"]["about"] == {"side": "diffusers"}
    assert found["sides"]["ldm"]["flops"] == 100 and found["sides"]["ldm"]["bytes"] == 10


def test_alternation():
    assert [alternate("ab", n) for n in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


@pytest.mark.parametrize(("off", "agrees"), [(0.0, True), (1e-4, True), (3e-4, False), (float("nan"), False)])
def test_outputs_that_differ_are_told(off, agrees, monkeypatch):
    monkeypatch.setattr(measure, "MOST", 1)
    monkeypatch.setattr(worker, "measure_rates", lambda: {"flops": 1.0, "bytes": 1.0})
    sides = {"ldm": Here(), "diffusers": Here(off)}  # of values of 2: 1e-4 is 5e-5 of them, 3e-4 is 1.5e-4
    found = measure.measure(case(tolerance=cases.NETWORK), sides, None, SETTINGS, lambda name: None)
    assert found["difference"]["agrees"] is agrees
    complaints = bench.wrong({"rows": [found]})
    assert len(complaints) == (not agrees) and all("sampling/fake" in text for text in complaints)
    assert ("WRONG" in report.terminal([found])) is not agrees


def test_comparison():
    one, two = {"x": torch.tensor([1.0, -4.0])}, {"x": torch.tensor([1.0, -4.1])}
    assert stats.difference(one, two, 1e-4, relative=True)["value"] == pytest.approx(0.1 / 4.1, rel=1e-5)
    assert stats.difference(one, two, 0.2, relative=False) == {
        "value": pytest.approx(0.1, rel=1e-5),
        "tolerance": 0.2,
        "agrees": True,
    }
    for other in ({}, {"y": one["x"]}, {"x": torch.ones(3)}):
        assert not stats.difference(one, other, 1e9, relative=True)["agrees"]


def test_failures_are_one_line_with_the_side(fake):
    with pytest.raises(WorkerFailed, match="^diffusers: ValueError: two lines$"):
        row(fake, case(params={"fails": "diffusers"}))
    with pytest.raises(WorkerFailed, match="^ldm: its process ended with code 3 in 'warm'"):
        row(fake, case(params={"dies": "ldm"}))
    assert row(fake, case())["sides"]["ldm"]["seconds"]  # a new process is started in its place


def test_memory_is_of_a_process_of_its_own(fake):
    found = row(fake, case(memory=True, params={"fills": "ldm"}, targets=(workloads.AT_MOST_THEIRS,)))
    ours, theirs = (found["sides"][name]["memory"] for name in ("ldm", "diffusers"))
    assert ours["grown"] > 190 * 2**20 and theirs["grown"] < 10 * 2**20
    (target,) = found["targets"]
    assert target["value"] == ours["peak"] / theirs["peak"] and target["met"] is False


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system cannot")
def test_the_peak_begins_anew():
    size = len(bytearray(300 * 2**20))
    assert peak() - resident() > size / 2
    reset_peak()
    assert peak() - resident() < size / 2


# --- figures


def test_quartiles_of_a_line():
    assert stats.quartiles(list(range(9))) == (2.0, 6.0)
    assert stats.quartiles([3.0, 1.0]) == (1.5, 2.5)
    assert stats.quantile([7.0], 0.25) == 7.0


def test_ratio_and_its_interval():
    found = stats.ratio([4.0] * 5, [2.0] * 5)
    assert found == {"value": 2.0, "interval": [2.0, 2.0]}
    assert stats.ratio([4.0, 5.0], [2.0, 2.0]) == {"value": 2.25, "interval": None}
    # the bootstrap of the median of three: all draws of 3 of 3, exactly
    theirs = [1.0, 2.0, 3.0]
    low, high = stats.ratio(theirs, [1.0] * 3)["interval"]
    assert (low, high) == (1.0, 3.0)  # each end has a probability of 7/27
    # what both sides share cancels: rounds are drawn as pairs
    shared = stats.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert shared["interval"] == [2.0, 2.0]


def test_interval_covers():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(40):
        x = (torch.randn(2, 15, generator=generator) * 0.1).exp().tolist()
        low, high = stats.ratio(x[0], x[1], seed)["interval"]
        hits += low <= 1.0 <= high
    assert hits >= 34


def test_floor_is_the_larger_of_arithmetic_and_memory():
    rates = {"flops": 10.0, "bytes": 2.0}
    assert stats.floor(100, 4, rates) == {"seconds": 10.0, "by": "arithmetic"}
    assert stats.floor(10, 8, rates) == {"seconds": 4.0, "by": "memory"}


def test_the_floor_of_a_row_is_of_the_side_that_takes_less():
    sides = [{"flops": 100, "bytes": 4}, {"flops": 40, "bytes": 5}]
    assert measure.least(sides, {"flops": 10.0, "bytes": 2.0}) == {"seconds": 4.0, "by": "arithmetic"}
    assert measure.least([{"seconds": []}], {"flops": 1.0, "bytes": 1.0}) is None


def test_flops_have_closed_forms():
    x = torch.randn(2, 5, 7)
    assert count_flops(lambda: nn.Linear(7, 3)(x)) == 2 * (2 * 5) * 7 * 3
    image = torch.randn(2, 4, 9, 9)
    assert count_flops(lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2)(image)) == 2 * 2 * 6 * 25 * 4 * 9
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 6, 8)
    with torch.inference_mode():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * (2 * 2 * 3 * 10 * 6 * 8)
    weight = torch.randn(7, 3, requires_grad=True)
    assert count_flops(lambda: (x.flatten(0, 1) @ weight).sum().backward()) == 2 * (2 * 10 * 7 * 3)


def test_flops_of_sampling_are_counted_on_two_short_runs():
    taken = []

    def sample(steps: int) -> list:
        taken.append(steps)
        for _ in range(steps):
            torch.ones(2, 3) @ torch.ones(3, 4)
        torch.ones(5, 6) @ torch.ones(6, 7)
        return []

    assert sampling_job(sample, 25, 0).count() == 25 * 2 * 24 + 2 * 210
    assert taken == [1, 2]


def test_share_beside_the_model():
    assert measure.beside_the_model({"step": 10.0, "forward": 3.0, "backward": 6.0, "optimizer": 0.5}) == pytest.approx(
        0.1
    )


def test_targets():
    assert Target(figure="ratio", limit=1.5).met(1.5) and not Target(figure="ratio", limit=1.5).met(1.4)
    at_most = Target(figure="slower", limit=1.3, at_least=False)
    assert at_most.met(1.3) and not at_most.met(1.31)
    assert at_most.text == "at most 1.3x the time"


# --- cases


def test_every_case_is_known_and_has_its_own_name():
    from importlib import import_module

    from ldm.bench import ours, theirs

    found = workloads.all_cases(compile=True)
    assert len({c.name for c in found}) == len(found)
    assert {c.workload for c in found} == set(workloads.WORKLOADS)
    for c in found:
        assert bool(c.kind) != bool(c.commands)
        if c.kind:
            module, _, function = ours.BUILDERS[c.kind].partition(":")
            assert callable(getattr(import_module(module), function))
            assert "diffusers" not in c.sides or c.kind in theirs.BUILDERS
        json.dumps(c.params)


def test_choice():
    assert {c.workload for c in workloads.choose("data, features")} == {"data", "features"}
    assert {c.workload for c in workloads.choose(None, quick=True)} == set(workloads.WORKLOADS)
    assert len(workloads.choose("sampling", quick=True)) == 1
    assert any("compiled" in c.name for c in workloads.choose("sampling", compile=True))
    for name in ("nothing", "", "sampling,nothing"):
        with pytest.raises(UserError, match="is unknown; known: import, cold-start"):
            workloads.choose(name)


def test_rounds_of_what_takes_long():
    slow = case(share=0.25)
    assert [slow.rounds(n) for n in (1, 2, 4, 11, 40)] == [1, 2, 3, 3, 10]


# --- all rows


def test_the_same_command_goes_on(tmp_path, monkeypatch):
    first = measured(tmp_path, case("sampling/one"), case("sampling/two", params={"fails": "ldm"}))
    assert [r.get("failed") for r in first["rows"]] == [None, "ldm: ValueError: two lines"]
    assert len(bench.wrong(first)) == 1
    calls = tmp_path / "calls"
    calls.unlink()
    # of two rows the one that failed is taken again, the other kept as it is
    second = measured(tmp_path, case("sampling/one"), case("sampling/two"))
    assert [r["name"] for r in second["rows"]] == ["sampling/one", "sampling/two"]
    assert second["rows"][0] == first["rows"][0] and not bench.wrong(second)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == second
    assert calls.read_text()
    calls.unlink()
    assert measured(tmp_path, case("sampling/one"))["rows"] == second["rows"]
    assert not calls.exists()
    monkeypatch.setattr(machine, "code_hash", lambda: "other code")
    assert measured(tmp_path, case("sampling/one"))["rows"] != second["rows"]


def test_a_stop_keeps_the_rows_before(tmp_path, monkeypatch):
    def stop(tested, *rest):
        if tested.name == "sampling/two":
            raise KeyboardInterrupt
        return real(tested, *rest)

    real = bench.measure
    monkeypatch.setattr(bench, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, case("sampling/one"), case("sampling/two"))
    assert [r["name"] for r in json.loads((tmp_path / "benchmark.json").read_text())["rows"]] == ["sampling/one"]


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "benchmark.json").write_text("{")
    with pytest.raises(UserError, match="is no benchmark of this program"):
        measured(tmp_path, case())


def test_fresh_processes(tmp_path):
    lines = {"ldm": ("-c", "x = bytearray(80 * 2**20)"), "torch": ("-c", "pass")}
    tested = Case(name="import/fake", commands=lines, sides=("ldm", "torch"), tolerance=None)
    found = row(Workers(Path()), tested)
    assert [len(s["seconds"]) for s in found["sides"].values()] == [4, 4]
    assert found["sides"]["ldm"]["memory"]["peak"] - found["sides"]["torch"]["memory"]["peak"] > 70 * 2**20
    with pytest.raises(WorkerFailed, match="ValueError: no"):
        processes.timed(("-c", "raise ValueError('no')"), 1)


def test_pictures_of_fresh_processes_are_compared():
    draw = "import sys, os; from PIL import Image; os.makedirs(sys.argv[1], exist_ok=True);"
    draw += "Image.new('RGB', (2, 2), ({}, 0, 0)).save(sys.argv[1] + '/picture.png')"
    for red, agrees in ((8, True), (9, False)):
        lines = {"ldm": ("-c", draw.format(7)), "diffusers": ("-c", draw.format(red))}
        tested = Case(name="cold-start/fake", commands=lines, tolerance=cases.PICTURE)
        found = row(Workers(Path()), tested, Settings(rounds=1, threads=1, device="cpu", quick=True))
        assert found["difference"] == {"value": red - 7.0, "tolerance": 1.0, "agrees": agrees}


# --- files


def test_report(fake, tmp_path):
    aim = (Target(figure="ratio", limit=1e9),)
    rows = [row(fake, case(targets=aim, note="a | b", items=3))]
    rows += [row(fake, case(f"growth/batch {n}", point=("batch", n))) for n in (1, 2)]
    table = {"settings": bench.settings_table(SETTINGS), "sides": ["ldm"], "rows": rows, "load": {}}
    for number, each in enumerate(rows):
        each["others"] = 1.0 if number == 0 else 0.1
    rows.append({"name": "sampling/other", "workload": "sampling", "failed": "ldm: no"})
    report.write(tmp_path, table, rows)
    text = (tmp_path / "benchmark.md").read_text()
    lines = text.splitlines()
    assert lines[0].count("|") == len(report.HEAD) + 1 and len([n for n in lines if n.startswith("|")]) == 4
    assert "| sampling/other | failed | ldm: no |" in text
    assert "a \\| b" in text and "at least 1000000000.0x: MISSED" in text
    assert "diffusers is not installed" in text
    assert "WARNING: other programs took over 0.15 cores while these were measured: sampling/fake." in text
    page = (tmp_path / "benchmark.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and page.count("<svg") == 1
    assert report.curves(rows) == {
        "batch": {name: [(n, rows[n]["sides"][name]["median"]) for n in (1, 2)] for name in ("ldm", "diffusers")}
    }


def test_units():
    found = [report.seconds(v) for v in (2e-6, 0.0123, 1.234, 1234.5)]
    assert found == ["2 us", "12.3 ms", "1.23 s", "1234 s"]


def test_other_programs_are_seen():
    hertz = os.sysconf("SC_CLK_TCK")
    assert machine.others((0, 0), (3 * hertz, hertz), 2.0) == 1.0
    assert machine.others(None, (0, 0), 1.0) is None
    found = machine.ticks()
    assert found is None or found[0] >= found[1] >= 0


# --- the command


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "scripts/benchmark.py", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=ENV)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "everything"), "workload 'everything' is unknown; known: import, cold-start"),
        (("--rounds", "0"), "--rounds 0 is not allowed: 1 or more"),
        (("--threads", "-1"), "--threads -1 is not allowed"),
        (("--device", "toaster"), "invalid choice: 'toaster'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    out = tmp_path / "out"
    found = command(*arguments, "--out", str(out))
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1
    assert message in found.stderr and not found.stdout and not out.exists()


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("it is there")
    found = command("--device", "cuda", "--out", str(tmp_path / "out"))
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1 and "'cuda' cannot be used" in found.stderr


def test_both_sides_for_real(tmp_path):
    pytest.importorskip("diffusers")
    found = command("--quick", "--rounds", "1", "--threads", "1", "--only", "unet-forward", "--out", str(tmp_path))
    assert found.returncode == 0, found.stderr
    table = json.loads((tmp_path / "benchmark.json").read_text())
    (only,) = table["rows"]
    assert only["name"] == "unet-forward/shapes 8x8" and only["order"] == ["ldm", "diffusers"]
    assert only["difference"]["agrees"] and 0 < only["difference"]["value"] < 1e-4
    ours, theirs = (only["sides"][name] for name in only["order"])
    assert ours["flops"] > 1e8 and theirs["flops"] > 1e8 and ours["seconds"] and theirs["seconds"]
    assert theirs["about"]["layout"] in ("channels-last", "contiguous")
    assert (
        table["settings"]["threads"] == 1 and table["settings"]["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    assert "unet-forward/shapes 8x8" in found.stdout and (tmp_path / "benchmark.html").is_file()


def test_ctrl_c_ends_all(tmp_path):
    line = [sys.executable, fake_benchmark.__file__, "run", str(tmp_path)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True, env=ENV)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        file = tmp_path / "benchmark.json"
        if file.exists() and len(json.loads(file.read_text())["rows"]) == 1:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in complaint
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of its group is left
    assert [r["name"] for r in json.loads((tmp_path / "benchmark.json").read_text())["rows"]] == ["sampling/one"]
