"""A training run that is killed, stopped, damaged or out of disk or memory loses nothing that was saved."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from inventory_tools import checkpoints, metrics
from test_train import CONFIG, state_of

from ldm import model_io
from ldm.config import UserError
from ldm.train.loop import train
from ldm.train.state import MANIFEST

EVERY = replace(CONFIG, save_every=2, keep=3)


def flip_a_bit(checkpoint: Path, name: Path | str = "state/first.safetensors") -> None:
    data = bytearray((checkpoint / name).read_bytes())
    data[-5] ^= 1
    (checkpoint / name).write_bytes(data)


def name_in_manifest(checkpoint: Path, name: str) -> None:
    table = model_io.read_json(checkpoint / MANIFEST)
    table["files"][name] = "0"
    model_io.write_json(checkpoint / MANIFEST, table)


def same_runs(a: Path, b: Path) -> bool:
    return tiny.same(state_of(a, 6), state_of(b, 6)) and metrics(a) == metrics(b)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    train(tiny.Toy(), EVERY, tmp_path / "straight", {})
    last = Path("checkpoints/step-00000006")
    names = [p.relative_to(tmp_path / "straight" / last) for p in (tmp_path / "straight" / last).rglob("*.*")]
    damages = [(partial(flip_a_bit, name=name), f"{name} was changed since") for name in names if name.name != MANIFEST]
    damages += [
        (lambda f: (f / "state/first-optimizer.safetensors").unlink(), "No such file.*first-optimizer.safetensors"),
        (lambda f: (f / MANIFEST).write_text("{}"), "files"),
        (lambda f: name_in_manifest(f, "../../../../outside"), "outside"),
    ]
    assert len(names) > 8
    for number, (damage, words) in enumerate(damages):
        out = Path(shutil.copytree(tmp_path / "straight", tmp_path / str(number)))
        damage(out / last)
        with pytest.warns(UserWarning, match=f"step-00000006' is damaged .*{words}"):
            train(tiny.Toy(), EVERY, out, {})
        assert same_runs(tmp_path / "straight", out)


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_whole_checkpoints_outlive_damaged_ones_and_without_any_no_run_starts_anew(tmp_path):
    train(tiny.Toy(), replace(EVERY, steps=4), tmp_path, {})
    flip_a_bit(tmp_path / "checkpoints/step-00000004")
    (tmp_path / "checkpoints/.step-00000099").mkdir()  # as a crash leaves it
    train(tiny.Toy(), replace(EVERY, steps=3, keep=1), tmp_path, {})
    assert checkpoints(tmp_path) == ["step-00000003", "step-00000004"]
    flip_a_bit(tmp_path / "checkpoints/step-00000003")
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        train(tiny.Toy(), EVERY, tmp_path, {})


def test_a_save_that_fails_leaves_the_old_checkpoints_and_the_next_removes_its_files(tmp_path, monkeypatch):
    train(tiny.Toy(), replace(EVERY, steps=4), tmp_path, {})
    with monkeypatch.context() as patch:
        patch.setattr(model_io, "save_tensors", lambda path, tensors: tiny.fail(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            train(tiny.Toy(), replace(EVERY, keep=1), tmp_path, {})
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000004"]
    assert (tmp_path / "checkpoints/.step-00000006").exists()
    train(tiny.Toy(), replace(EVERY, keep=1), tmp_path, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


WORKER = """
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
    """A slow run in a process group of its own, once it has taken a step."""
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-c", WORKER, str(out), str(workers)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, **pipes)
    assert process.stdout.readline() == "step\n"
    return process


def test_ctrl_c_reaches_the_loading_processes_too_and_the_run_is_saved(tmp_path):
    process = start(tmp_path, workers=1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in error, error[-2000:]
    assert "which is saved" in error and len(checkpoints(tmp_path)) == 1


def test_two_runs_cannot_share_a_folder_and_a_second_signal_ends_a_run_at_once(tmp_path):
    process = start(tmp_path)
    for name, words in ((".", "in use by another run"), ("caf\udce9", "is not UTF-8")):
        with pytest.raises(UserError, match=words):
            train(tiny.Toy(), tiny.TRAIN, tmp_path / name, {})
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM and not (tmp_path / "checkpoints").exists()
    train(tiny.Toy(), replace(tiny.TRAIN, steps=2), tmp_path, {})  # the lock went with the process
    assert checkpoints(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")]
)
def test_out_of_memory_is_one_line_and_leaves_the_last_checkpoint(tmp_path, error):
    with pytest.raises(UserError, match="out of memory with train.batch_size=4"):
        train(tiny.Toy(events={4: partial(tiny.fail, error)}), EVERY, tmp_path, {})
    assert checkpoints(tmp_path)[-1] == "step-00000004"


class Validated(tiny.Toy):
    """Validates to these numbers, in turn."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = list(values)

    def validate(self, modules):
        return {"loss": self.values.pop(0)}


@pytest.mark.parametrize("first, kept", [("loss", 2), ("-loss", 4)])
def test_the_best_checkpoint_stays_beside_the_newest_unless_it_is_of_another_value(tmp_path, capsys, first, kept):
    config = replace(CONFIG, save_every=2, validate_every=1, keep=1)
    train(Validated(9, 2, 5), replace(config, best=first, steps=3), tmp_path, {})
    assert checkpoints(tmp_path) == [f"step-0000000{2 if first == 'loss' else 1}", "step-00000003"]
    assert capsys.readouterr().out.count(f"{first} is the best so far") == (2 if first == "loss" else 1)
    train(Validated(3, 4, 8), replace(config, best="loss"), tmp_path, {})
    assert checkpoints(tmp_path) == [f"step-0000000{kept}", "step-00000006"]
    with pytest.warns(UserWarning, match="train.best is 'psnr', which is not validated; these are: loss"):
        train(Validated(1, 2), replace(config, best="psnr", steps=7), tmp_path, {})
