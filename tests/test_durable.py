"""A training that is killed, stopped, damaged or out of disk loses nothing that was saved."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_train import CONFIG, lines_of, state_of

from ldm.commands.cli import run_script
from ldm.config import UserError
from ldm.model_io import read_json, write_json
from ldm.train import manifest
from ldm.train import state as run_state
from ldm.train.interrupt import Stopped
from ldm.train.loop import Run, train

EVERY = replace(CONFIG, save_every=2, keep=3)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def same_folders(a: Path, b: Path) -> bool:
    """The same tensors in every state file, and the same log but for its order of lines."""
    return tiny.same(state_of(a, 6), state_of(b, 6)) and lines_of(a) == lines_of(b)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: flip_a_bit(f / "state/first.safetensors"), "state/first.safetensors was changed since"),
        (lambda f: (f / "state/first-optimizer.pt").unlink(), "state/first-optimizer.pt is missing"),
        (lambda f: (f / "state/state.json").write_text(""), "state/state.json has 0 bytes"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json that can be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "no manifest.json that can be read"),
        (lambda f: write_json(f / "manifest.json", {"files": {"../x": {"bytes": 1, "sha256": ""}}}), "outside"),
        (lambda f: write_json(f / "manifest.json", {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}), "outside"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, words):
    train(tiny.Toy(), EVERY, tmp_path / "straight", {})
    shutil.copytree(tmp_path / "straight", tmp_path / "damaged")
    damage(tmp_path / "damaged/checkpoints/step-00000006")
    with pytest.warns(UserWarning, match=f"step-00000006' is damaged .*{words}"):
        train(tiny.Toy(), EVERY, tmp_path / "damaged", {})
    assert same_folders(tmp_path / "straight", tmp_path / "damaged")
    assert not manifest.problem(tmp_path / "damaged/checkpoints/step-00000006")


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_a_run_of_which_every_checkpoint_is_damaged_is_not_begun_anew_in_silence(tmp_path):
    train(tiny.Toy(), EVERY, tmp_path, {})
    for folder in run_state.checkpoints(tmp_path):
        flip_a_bit(folder / "state/first.safetensors")
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        train(tiny.Toy(), EVERY, tmp_path, {})


def test_a_manifest_lists_every_file_of_a_checkpoint(tmp_path):
    train(tiny.Toy(), CONFIG, tmp_path, {})
    folder = run_state.checkpoints(tmp_path)[-1]
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"manifest.json"}
    table = read_json(folder / "manifest.json")["files"]
    assert table.keys() == files and "state/first.safetensors" in files
    assert all(table[name]["bytes"] == (folder / name).stat().st_size for name in files)


def test_what_a_crash_left_is_swept_and_old_checkpoints_wait_for_the_new_one(tmp_path, monkeypatch):
    train(tiny.Toy(), replace(EVERY, steps=4), tmp_path, {"train": {"steps": 4}})
    (tmp_path / "checkpoints/.step-00000099").mkdir()
    seal = manifest.seal
    monkeypatch.setattr(manifest, "seal", lambda folder: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"), pytest.warns(UserWarning, match="train.steps"):
        train(tiny.Toy(), replace(EVERY, keep=1), tmp_path, {"train": {"steps": 6}})
    assert [f.name for f in (tmp_path / "checkpoints").iterdir() if f.name.startswith(".")] == []
    assert [f.name for f in run_state.checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    monkeypatch.setattr(manifest, "seal", lambda folder: seal(folder) or flip_a_bit(folder / "state/first.safetensors"))
    with pytest.raises(UserError, match="is the disk failing"):
        train(tiny.Toy(), replace(EVERY, keep=1), tmp_path, {"train": {"steps": 6}})
    assert len(run_state.checkpoints(tmp_path)) == 3  # none was deleted for one that is not whole


FULL = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EFBIG, "File too large")]
FULL += [
    RuntimeError(text) for text in ("No space left", "unexpected pos 640 vs 598", "basic_ios::clear: iostream error")
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_disk_leaves_the_old_checkpoint_whole_and_says_what_is_needed(tmp_path, monkeypatch, error):
    train(tiny.Toy(), replace(EVERY, steps=2), tmp_path, {"train": {"steps": 2}})
    monkeypatch.setattr(run_state, "write_state", lambda *a: (_ for _ in ()).throw(error))
    with (
        pytest.raises(
            UserError, match=r"disk is full.* MiB are free; one took .* MiB before; .*step-00000002 is whole"
        ),
        pytest.warns(UserWarning, match="train.steps"),
    ):
        train(tiny.Toy(), EVERY, tmp_path, {"train": {"steps": 6}})
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert not manifest.problem(tmp_path / "checkpoints/step-00000002")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EDQUOT, "quota"),
        (errno.ENAMETOOLONG, "too long"),
    ],
)
def test_a_full_disk_anywhere_else_is_one_line_too(capsys, monkeypatch, number, words):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # run_script sets it for good
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: (_ for _ in ()).throw(OSError(number, os.strerror(number), "metrics.jsonl")))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error and "metrics.jsonl" in error


def test_a_checkpoint_outlives_a_newer_one_that_is_damaged(tmp_path):
    train(tiny.Toy(), EVERY, tmp_path, {})
    flip_a_bit(tmp_path / "checkpoints/step-00000006/state/first.safetensors")
    with run_state.new_checkpoint(tmp_path, 5, keep=1) as folder:
        (folder / "file").touch()
    assert [f.name for f in run_state.checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]


def test_a_log_that_is_being_shortened_is_never_half_there(tmp_path, monkeypatch):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"st')
    before = metrics.read_text()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        run_state.drop_later_lines(metrics, 1)
    assert metrics.read_text() == before
    monkeypatch.undo()
    run_state.drop_later_lines(metrics, 1)
    assert metrics.read_text() == '{"step": 1}\n'


def test_a_validation_that_is_to_be_done_again_is_taken_out_of_the_log(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}\n', '{"step": 1, "val/loss": 1.0}\n', '{"step": 2}\n', '{"step": 2, "val/loss": 1.0}\n']
    for step, looked, kept in ((2, True, lines), (2, False, lines[:3]), (1, False, lines[:1]), (0, True, [])):
        metrics.write_text("".join(lines))
        run_state.drop_later_lines(metrics, step, looked)
        assert metrics.read_text() == "".join(kept)


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (self.mark.touch, ())


@pytest.mark.parametrize("write", [torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap)), None])
def test_what_is_pickled_in_a_sealed_state_is_not_run(tmp_path, write):
    train(tiny.Toy(), EVERY, tmp_path, {})
    folder = run_state.checkpoints(tmp_path)[-1]
    path = folder / "state/first-optimizer.pt"
    write({"state": Trap(tmp_path / "mark")}, path) if write else path.write_bytes(b"\x80\x02\x00")
    manifest.seal(folder)
    with pytest.raises(UserError, match="is of another model than the config describes"):
        train(tiny.Toy(), replace(EVERY, steps=8), tmp_path, {})
    assert not (tmp_path / "mark").exists()


class Signalled(tiny.Toy):
    """Sends its own process a signal within one step."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__()
        self.number, self.at = number, step

    def losses(self, modules, batch, step):
        if step == self.at:
            self.at = -1  # once: a second one would end the process
            os.kill(os.getpid(), self.number)
        yield from super().losses(modules, batch, step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_signal_ends_the_step_saves_and_resuming_is_exact(tmp_path, number, step):
    config = replace(CONFIG, accumulate=2, log_every=2, validate_every=1, preview_every=0, save_every=0)
    train(tiny.Toy(), config, tmp_path / "straight", {})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"at step {step + 1}, which is saved") as stop:
        train(Signalled(number, step), config, tmp_path / "stopped", {})
    assert stop.value.number == number and signal.getsignal(signal.SIGTERM) == before
    train(tiny.Toy(), config, tmp_path / "stopped", {})
    straight, stopped = lines_of(tmp_path / "straight"), lines_of(tmp_path / "stopped")
    assert straight == stopped
    assert tiny.same(state_of(tmp_path / "straight", 6), state_of(tmp_path / "stopped", 6))


WORKER = """
import sys, time, tiny
from dataclasses import replace
from ldm.commands.cli import run_script
from ldm.train.loop import Run, train
class Slow(tiny.Toy):
    def losses(self, modules, batch, step):
        print("step", step, flush=True)
        time.sleep(0.2)
        yield from super().losses(modules, batch, step)
config = replace(tiny.TRAIN, steps=200, save_every=0, workers=int(sys.argv[2]))
run_script(lambda: train(Slow(), config, sys.argv[1], {}))
"""


def start(out: Path, workers: int = 0) -> subprocess.Popen:
    """A slow training in a process group of its own, once it has begun."""
    command = [sys.executable, "-c", WORKER, str(out), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout.readline().startswith("step 0")
    return process


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_whole_group_is_told_to_stop_and_exits_with_its_code(tmp_path, number, code):
    """As ctrl-C does, which reaches the loader's processes as well."""
    process = start(tmp_path, workers=1)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in error, error[-2000:]
    assert "which is saved" in error
    (folder,) = run_state.checkpoints(tmp_path)
    assert not manifest.problem(folder)


def test_a_killed_run_is_taken_up_and_two_cannot_share_a_folder(tmp_path):
    process = start(tmp_path)
    with pytest.raises(UserError, match=f"in use by another training .process {process.pid}"):
        train(tiny.Toy(), tiny.TRAIN, tmp_path, {})
    process.kill()
    process.wait(timeout=60)
    process.stdout.close()
    process.stderr.close()
    train(tiny.Toy(), replace(tiny.TRAIN, steps=2), tmp_path, {})  # the lock went with the process
    assert [f.name for f in run_state.checkpoints(tmp_path)] == ["step-00000002"]


def test_another_config_is_refused_by_name_and_forced_with_a_warning(tmp_path):
    train(tiny.Toy(), replace(CONFIG, steps=3), tmp_path, {"train": {"steps": 3, "seed": 0}, "lr": 1.0})
    changed = {"train": {"steps": 6, "seed": 1}, "lr": 2.0, "new": 1}
    with pytest.raises(UserError, match=r"lr \(1.0 before, 2.0 now\). Give --force"):
        train(tiny.Toy(), CONFIG, tmp_path, changed)
    assert read_json(tmp_path / "config.json")["lr"] == 1.0
    with pytest.warns(UserWarning, match="train.steps, train.seed, lr$"):
        train(tiny.Toy(), CONFIG, tmp_path, changed, force=True)
    assert lines_of(tmp_path)[-1]["step"] == 6


def test_every_start_is_noted_with_what_it_ran_on(tmp_path):
    train(tiny.Toy(), replace(CONFIG, steps=3), tmp_path, {"train": {"steps": 3}})
    with pytest.warns(UserWarning, match="train.steps"):
        train(tiny.Toy(), CONFIG, tmp_path, {"train": {"steps": 6}})
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert first.keys() == {"time", "command", "seed", "python", "packages", "commit"}
    assert second["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert second["time"] >= first["time"] and second["seed"] == CONFIG.seed
    time.strptime(second["time"][:19], "%Y-%m-%dT%H:%M:%S")


class Large(tiny.Toy):
    """Runs out of memory in one step, after the first half of it."""

    def __init__(self, error: Exception, step: int) -> None:
        super().__init__(noise=0.0)
        self.error, self.at = error, step

    def losses(self, modules, batch, step):
        losses = super().losses(modules, batch, step)
        yield next(losses)
        if step == self.at:
            raise self.error
        yield from losses


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_saves_and_half_the_micro_batch_goes_on_with_the_same_batch(tmp_path, error):
    config = replace(CONFIG, save_every=0, log_every=1)
    resolved = {"train": {"batch_size": 4, "accumulate": 1}}
    train(tiny.Toy(noise=0.0), config, tmp_path / "straight", {})
    message = "out of memory in step 4 .*batch_size=4; go on with train.batch_size=2 train.accumulate=2"
    with pytest.raises(UserError, match=message):
        train(Large(error, 3), config, tmp_path / "halved", resolved)
    assert [f.name for f in run_state.checkpoints(tmp_path / "halved")] == ["step-00000003"]
    half = {"train": {"batch_size": 2, "accumulate": 2}}
    with pytest.warns(UserWarning, match="other values than before of: train.batch_size, train.accumulate"):
        train(tiny.Toy(noise=0.0), replace(config, batch_size=2, accumulate=2), tmp_path / "halved", half)
    a, b = state_of(tmp_path / "straight", 6), state_of(tmp_path / "halved", 6)
    for name in a:  # the same samples in every step: the same weights but for rounding
        if name.startswith("first.") or name.startswith("second."):
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    uneven = {"train": {"batch_size": 3, "accumulate": 1}}
    with pytest.raises(UserError, match="batch_size .2 before, 3 now.*Give --force"):
        train(tiny.Toy(noise=0.0), replace(config, steps=7, batch_size=3), tmp_path / "halved", uneven)


def test_out_of_memory_in_the_optimizer_saves_nothing(tmp_path, monkeypatch):
    """Some of the weights may have moved."""
    update = Run.update
    fail = lambda self, step: update(self, step) if step < 3 else (_ for _ in ()).throw(MemoryError())  # noqa: E731
    monkeypatch.setattr(Run, "update", fail)
    with pytest.raises(UserError, match="out of memory in step 4"):
        train(tiny.Toy(), replace(CONFIG, save_every=2), tmp_path, {})
    assert [f.name for f in run_state.checkpoints(tmp_path)] == ["step-00000002"]
    with pytest.raises(UserError, match="smaller pictures or a smaller model"):
        train(Large(MemoryError(), 0), replace(CONFIG, batch_size=1), tmp_path / "one", {})


def test_other_errors_of_a_step_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        train(Large(RuntimeError("a bug"), 3), CONFIG, tmp_path, {})


def test_a_contrast_is_not_told_to_split_its_batch(tmp_path):
    toy = Large(MemoryError(), 0)
    toy.contrasts = True
    with pytest.raises(UserError, match="a smaller train.batch_size with --force .*fewer negatives"):
        train(toy, CONFIG, tmp_path, {})
    assert run_state.checkpoints(tmp_path) == []


class Validated(tiny.Toy):
    """Validates to these numbers, in turn."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = list(values)

    def validate(self, device):
        return {"loss": self.values.pop(0)}


BEST = replace(CONFIG, save_every=2, validate_every=1, keep=1)


@pytest.mark.parametrize("name, at", [("loss", 3), ("-loss", 1)])
def test_the_best_checkpoint_stays_beside_the_newest(tmp_path, capsys, name, at):
    train(Validated(9, 5, 2, 3, 4, 8), replace(BEST, best=name), tmp_path, {})
    steps = [int(folder.name[5:]) for folder in run_state.checkpoints(tmp_path)]
    assert steps == [at, 6] and f"was best at step {at}" in capsys.readouterr().out
    assert not manifest.problem(run_state.checkpoint(tmp_path, at))


def test_the_best_is_known_after_a_resume(tmp_path):
    config = replace(BEST, best="loss")
    train(Validated(9, 2, 5), replace(config, steps=3), tmp_path, {})
    train(Validated(3, 4, 8), config, tmp_path, {})
    assert [int(folder.name[5:]) for folder in run_state.checkpoints(tmp_path)] == [2, 6]


def test_a_best_of_another_value_is_forgotten(tmp_path):
    train(Validated(1, 5, 2), replace(BEST, best="-loss", steps=3), tmp_path, {})
    train(Validated(7, 9, 8), replace(BEST, best="loss"), tmp_path, {})
    assert [int(folder.name[5:]) for folder in run_state.checkpoints(tmp_path)] == [4, 6]


def test_a_best_that_is_not_validated_is_said(tmp_path):
    with pytest.warns(UserWarning, match="train.best is 'psnr', which is not validated; these are: loss"):
        train(Validated(*range(6)), replace(BEST, best="psnr"), tmp_path, {})
    assert [folder.name for folder in run_state.checkpoints(tmp_path)] == ["step-00000006"]
    with pytest.raises(UserError, match="train.best"):
        replace(BEST, best="loss", validate_every=0)


def test_lines_logged_before_a_kill_stand_once(tmp_path):
    """Killed before the first checkpoint, and stopped where a validation is due, then killed before the next one."""
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/metrics.jsonl").write_text('{"step": 2, "lr": 1.0}\n{"step": 4, "lr": 1.0}\n{"step": 5, "l')
    train(tiny.Toy(), CONFIG, tmp_path / "killed", {})
    train(tiny.Toy(), CONFIG, tmp_path / "straight", {})
    assert lines_of(tmp_path / "killed") == lines_of(tmp_path / "straight")
    config = replace(CONFIG, validate_every=2, save_every=0)
    with pytest.raises(Stopped):
        train(Signalled(signal.SIGTERM, 1), config, tmp_path / "stopped", {})
    for toy in (tiny.Toy(stop_at=4), tiny.Toy()):  # the first validates the step again and dies without a trace
        with suppress(KeyboardInterrupt):
            train(toy, config, tmp_path / "stopped", {})
    train(tiny.Toy(), config, tmp_path / "plain", {})
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "plain")
