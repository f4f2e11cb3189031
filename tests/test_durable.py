"""A training that is killed, stopped, damaged or out of disk or memory loses nothing that was saved."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_train import CONFIG, lines_of, state_of

from ldm import model_io
from ldm.config import UserError
from ldm.model_io import read_json
from ldm.train.loop import Stopped, train

EVERY = replace(CONFIG, save_every=2, keep=3)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def same_runs(a: Path, b: Path) -> bool:
    return tiny.same(state_of(a, 6), state_of(b, 6)) and lines_of(a) == lines_of(b)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: flip_a_bit(f / "state/first.safetensors"), "state/first.safetensors was changed since"),
        (lambda f: (f / "state/first-optimizer.safetensors").unlink(), "first-optimizer.safetensors is missing"),
        (lambda f: (f / "state/state.json").write_text(""), "state/state.json was changed"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json that can be read"),
        (lambda f: (f / "manifest.json").write_text("{}"), "no manifest.json that can be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, words):
    train(tiny.Toy(), EVERY, tmp_path / "straight", {})
    shutil.copytree(tmp_path / "straight", tmp_path / "damaged")
    damage(tmp_path / "damaged/checkpoints/step-00000006")
    with pytest.warns(UserWarning, match=f"step-00000006' is damaged .*{words}"):
        train(tiny.Toy(), EVERY, tmp_path / "damaged", {})
    assert same_runs(tmp_path / "straight", tmp_path / "damaged")


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_a_run_of_which_every_checkpoint_is_damaged_is_not_started_anew(tmp_path):
    train(tiny.Toy(), EVERY, tmp_path, {})
    for folder in (tmp_path / "checkpoints").iterdir():
        flip_a_bit(folder / "state/first.safetensors")
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        train(tiny.Toy(), EVERY, tmp_path, {})


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_a_checkpoint_outlives_a_newer_one_that_is_damaged(tmp_path):
    """And a folder that a crash has left is removed."""
    train(tiny.Toy(), replace(EVERY, steps=4), tmp_path, {})
    flip_a_bit(tmp_path / "checkpoints/step-00000004/state/first.safetensors")
    (tmp_path / "checkpoints/.step-00000099").mkdir()
    train(tiny.Toy(), replace(EVERY, steps=3, keep=1), tmp_path, {})
    assert checkpoints(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_manifest_lists_every_file_of_a_checkpoint(tmp_path):
    train(tiny.Toy(), CONFIG, tmp_path, {})
    folder = tmp_path / "checkpoints/step-00000006"
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    assert read_json(folder / "manifest.json")["files"].keys() == files and "state/first.safetensors" in files


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("power cut")])
def test_a_save_that_fails_leaves_the_old_checkpoints_and_nothing_else(tmp_path, monkeypatch, error):
    train(tiny.Toy(), replace(EVERY, steps=4), tmp_path, {})
    save, calls = model_io.save_tensors, []

    def fail(path: Path, tensors: dict) -> None:
        calls.append(path)
        if "second-ema" in path.name:
            raise error
        save(path, tensors)

    monkeypatch.setattr(model_io, "save_tensors", fail)
    with pytest.raises(type(error), match=str(error.args[-1])):
        train(tiny.Toy(), replace(EVERY, keep=1), tmp_path, {})
    assert calls and checkpoints(tmp_path) == ["step-00000002", "step-00000004"]


FULL = """
import resource, sys, tiny
from dataclasses import replace
from ldm.commands.cli import run_command
from ldm.train.loop import train
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
run_command(lambda: train(tiny.Toy(), replace(tiny.TRAIN, save_every=1), sys.argv[1], {}))
"""


def run_worker(code: str, *arguments: object, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, **pipes, **options)


def test_a_full_disk_is_one_line(tmp_path):
    """By a limit on the size of a file, which the state of the optimizer exceeds."""
    process = run_worker(FULL, tmp_path, 600, preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    _, error = process.communicate(timeout=300)
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and "ulimit -f" in line and "Traceback" not in error
    assert not list(tmp_path.glob("checkpoints/*"))


class Signalled(tiny.Toy):
    """Sends its own process a signal within one step."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__()
        self.number, self.at = number, step

    def losses(self, modules, batch, step, draws):
        if step == self.at:
            self.at = -1  # once: a second one would end the process
            os.kill(os.getpid(), self.number)
        yield from super().losses(modules, batch, step, draws)


@pytest.mark.parametrize(
    "number, step", [(signal.SIGINT, 0), (signal.SIGTERM, 2), (signal.SIGTERM, 3), (signal.SIGINT, 5)]
)
def test_a_signal_ends_the_step_saves_and_resuming_is_exact(tmp_path, number, step):
    config = replace(CONFIG, accumulate=2, log_every=2, validate_every=1, preview_every=0, save_every=0)
    train(tiny.Toy(), config, tmp_path / "straight", {})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"at step {step + 1}, which is saved") as stop:
        train(Signalled(number, step), config, tmp_path / "stopped", {})
    assert stop.value.number == number and signal.getsignal(signal.SIGTERM) == before
    for toy in (tiny.Toy(stop_at=step + 2), tiny.Toy()):  # the first one dies without a trace
        with suppress(KeyboardInterrupt):
            train(toy, config, tmp_path / "stopped", {})
    assert same_runs(tmp_path / "straight", tmp_path / "stopped")


SLOW = """
import sys, time, tiny
from dataclasses import replace
from ldm.commands.cli import run_command
from ldm.train.loop import train
class Slow(tiny.Toy):
    def losses(self, *arguments):
        print("step", flush=True)
        time.sleep(0.2)
        yield from super().losses(*arguments)
config = replace(tiny.TRAIN, steps=200, save_every=0, workers=int(sys.argv[2]))
run_command(lambda: train(Slow(), config, sys.argv[1], {}))
"""


def start(out: Path, workers: int = 0) -> subprocess.Popen:
    """A slow training in a process group of its own, once it has taken a step."""
    process = run_worker(SLOW, out, workers, start_new_session=True)
    assert process.stdout.readline() == "step\n"
    return process


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_group_is_saved_and_exits_with_its_code(tmp_path, number, code):
    """As ctrl-C does, which reaches the loading processes as well."""
    process = start(tmp_path, workers=1)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in error, error[-2000:]
    assert "which is saved" in error and len(checkpoints(tmp_path)) == 1


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    process = start(tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and not (tmp_path / "checkpoints").exists()


def test_a_killed_run_is_resumed_and_two_cannot_share_a_folder(tmp_path):
    process = start(tmp_path)
    with pytest.raises(UserError, match=f"in use by another training .process {process.pid}"):
        train(tiny.Toy(), tiny.TRAIN, tmp_path, {})
    process.kill()
    process.communicate(timeout=60)
    train(tiny.Toy(), replace(tiny.TRAIN, steps=2), tmp_path, {})  # the lock went with the process
    assert checkpoints(tmp_path) == ["step-00000002"]


def test_another_config_is_refused_by_name_and_forced_with_a_warning(tmp_path):
    train(tiny.Toy(), replace(CONFIG, steps=3), tmp_path, {"train": {"steps": 3, "seed": 0, "keep": 2}, "lr": 1.0})
    changed = {"train": {"steps": 6, "seed": 1, "keep": 3}, "lr": 2.0, "new": 1}
    with pytest.raises(UserError, match=r"lr \(1.0 before, 2.0 now\). Give --force"):
        train(tiny.Toy(), CONFIG, tmp_path, changed)
    assert read_json(tmp_path / "config.json")["lr"] == 1.0
    with pytest.warns(UserWarning, match="train.steps, train.seed, lr$"):
        train(tiny.Toy(), CONFIG, tmp_path, changed, force=True)
    assert lines_of(tmp_path)[-1]["step"] == 6


def test_every_start_is_noted_with_its_versions(tmp_path):
    train(tiny.Toy(), replace(CONFIG, steps=3), tmp_path, {})
    train(tiny.Toy(), CONFIG, tmp_path, {})
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert first.keys() == {"time", "command", "seed", "python", "packages", "commit"}
    assert torch.__version__.startswith(second["packages"]["torch"]) and second["seed"] == CONFIG.seed
    assert second["time"] >= first["time"]


class Large(tiny.Toy):
    """Runs out of memory in one step, after the first half of it."""

    def __init__(self, error: Exception, step: int) -> None:
        super().__init__(noise=0.0)
        self.error, self.at = error, step

    def losses(self, modules, batch, step, draws):
        losses = super().losses(modules, batch, step, draws)
        yield next(losses)
        if step == self.at:
            raise self.error
        yield from losses


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate"),
    ],
)
def test_out_of_memory_saves_and_half_the_micro_batch_goes_on_with_the_same_batch(tmp_path, error):
    config = replace(CONFIG, save_every=0, log_every=1)
    resolved = {"train": {"batch_size": 4, "accumulate": 1}}
    train(tiny.Toy(noise=0.0), config, tmp_path / "straight", {})
    message = "out of memory in step 4 .*batch_size=4; go on with train.batch_size=2 train.accumulate=2"
    with pytest.raises(UserError, match=message):
        train(Large(error, 3), config, tmp_path / "halved", resolved)
    assert checkpoints(tmp_path / "halved") == ["step-00000003"]
    half = {"train": {"batch_size": 2, "accumulate": 2}}
    with pytest.warns(UserWarning, match="other values than before of: train.batch_size, train.accumulate"):
        train(tiny.Toy(noise=0.0), replace(config, batch_size=2, accumulate=2), tmp_path / "halved", half)
    a, b = state_of(tmp_path / "straight", 6), state_of(tmp_path / "halved", 6)
    for name in a:  # the same samples in every step: the same weights but for rounding
        if name.startswith(("first/", "second/")):
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    uneven = {"train": {"batch_size": 3, "accumulate": 1}}
    with pytest.raises(UserError, match="batch_size .2 before, 3 now.*Give --force"):
        train(tiny.Toy(noise=0.0), replace(config, steps=7, batch_size=3), tmp_path / "halved", uneven)


def test_out_of_memory_within_an_update_is_not_saved_and_other_errors_stay(tmp_path, monkeypatch):
    step, count = torch.optim.AdamW.step, iter(range(99))
    fail = lambda self: step(self) if next(count) != 7 else (_ for _ in ()).throw(MemoryError())  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(UserError, match="out of memory in step 4"):  # the second of two optimizers
        train(tiny.Toy(), replace(CONFIG, save_every=2), tmp_path / "update", {})
    assert checkpoints(tmp_path / "update") == ["step-00000002"]
    toy = Large(MemoryError(), 0)
    toy.contrasts = True
    with pytest.raises(UserError, match="a smaller train.batch_size with --force .*fewer negatives"):
        train(toy, CONFIG, tmp_path / "contrast", {})
    with pytest.raises(RuntimeError, match="a bug"):
        train(Large(RuntimeError("a bug"), 3), CONFIG, tmp_path / "bug", {})


class Validated(tiny.Toy):
    """Validates to these numbers, in turn."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = list(values)

    def validate(self, modules):
        return {"loss": self.values.pop(0)}


BEST = replace(CONFIG, save_every=2, validate_every=1, keep=1)


@pytest.mark.parametrize("name, at", [("loss", 3), ("-loss", 1)])
def test_the_best_checkpoint_stays_beside_the_newest(tmp_path, capsys, name, at):
    train(Validated(9, 5, 2, 3, 4, 8), replace(BEST, best=name), tmp_path, {})
    assert checkpoints(tmp_path) == [f"step-0000000{at}", "step-00000006"]
    assert f"was best at step {at}" in capsys.readouterr().out


@pytest.mark.parametrize("first, kept", [("loss", 2), ("-loss", 4)])
def test_the_best_is_known_after_a_resume_unless_it_is_of_another_value(tmp_path, first, kept):
    train(Validated(9, 2, 5), replace(BEST, best=first, steps=3), tmp_path, {})
    train(Validated(3, 4, 8), replace(BEST, best="loss"), tmp_path, {})
    assert checkpoints(tmp_path) == [f"step-0000000{kept}", "step-00000006"]


def test_a_best_that_is_not_validated_is_said(tmp_path):
    with pytest.warns(UserWarning, match="train.best is 'psnr', which is not validated; these are: loss"):
        train(Validated(*range(6)), replace(BEST, best="psnr"), tmp_path, {})
    assert checkpoints(tmp_path) == ["step-00000006"]


def test_lines_logged_before_a_kill_stand_once(tmp_path):
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/metrics.jsonl").write_text('{"step": 2, "lr": 1.0}\n{"step": 4, "lr": 1.0}\n{"step": 5, "l')
    train(tiny.Toy(), CONFIG, tmp_path / "killed", {})
    train(tiny.Toy(), CONFIG, tmp_path / "straight", {})
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "straight")
