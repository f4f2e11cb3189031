"""The training loop on a toy: what it writes, that resuming is exact, and that looking at a run leaves it alone."""

import json
import math
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from ldm.config import UserError, build, load
from ldm.model_io import load_tensors, read_json, write_json
from ldm.train.config import OptimizerConfig, TrainConfig
from ldm.train.loop import train
from ldm.train.state import seal

CONFIG = replace(tiny.TRAIN, steps=6, save_every=3, ema_decay=0.9)


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's training state."""
    folder = run / "checkpoints" / f"step-{step:08d}" / "state"
    return {f"{file.stem}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_tensors(file).items()}


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_learning_rate_warms_up_then_falls_as_a_cosine():
    o = OptimizerConfig(warmup=4, final_lr=0.1)
    assert [o.rate(step, 24) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert o.rate(14, 24) == pytest.approx(0.55) and o.rate(24, 24) == pytest.approx(0.1)
    assert replace(o, decay="constant").rate(20, 24) == 1.0


@pytest.mark.parametrize(
    ("table", "key"),
    [({"steps": 0}, "steps"), ({"keep": 0}, "keep"), ({"ema_decay": 1.0}, "ema_decay"), ({"clip": 0.0}, "clip")]
    + [({"seed": -1}, "seed"), ({"optimizer": {"lr": 0.0}}, "lr"), ({"optimizer": {"betas": [0.9, 1.0]}}, "betas")]
    + [({"best": "loss", "validate_every": 0}, "best")],
)
def test_config_refuses_values_out_of_range(table, key):
    with pytest.raises(UserError, match=f"{key}' is .*; it must be"):
        build(TrainConfig, table)


def test_muon_is_switched_off_from_the_command_line(tmp_path):
    (tmp_path / "c.toml").write_text("optimizer.muon_lr = 1e-2")
    assert load(TrainConfig, tmp_path / "c.toml", ["optimizer.muon_lr=none"]).optimizer.muon_lr is None


@pytest.mark.parametrize(("workers", "accumulate", "muon"), [(0, 1, False), (2, 1, False), (0, 2, True)])
def test_resume_is_exact(tmp_path, monkeypatch, workers, accumulate, muon):
    monkeypatch.setattr("ldm.train.optim.NARROW", 1)  # the toy's matrices are small
    config = replace(CONFIG, workers=workers, accumulate=accumulate)
    config = replace(config, optimizer=replace(CONFIG.optimizer, muon_lr=1e-2 if muon else None))
    train(tiny.Toy(), config, tmp_path / "straight", {})
    with pytest.raises(KeyboardInterrupt):
        train(tiny.Toy(stop_at=5), config, tmp_path / "resumed", {})
    assert lines_of(tmp_path / "resumed")[-1]["step"] == 4  # done after the checkpoint, to be done again
    train(tiny.Toy(), config, tmp_path / "resumed", {})
    straight = state_of(tmp_path / "straight", 6)
    assert tiny.same(straight, state_of(tmp_path / "resumed", 6))
    assert not tiny.same(straight, state_of(tmp_path / "straight", 3))
    files = {f"{part}{kind}" for part in ("first", "second") for kind in ("", "-ema", "-optimizer")}
    files |= {"first-muon-optimizer", "second-muon-optimizer"} if muon else set()
    assert {name.split("/")[0] for name in straight} == files
    assert lines_of(tmp_path / "resumed") == lines_of(tmp_path / "straight")


def test_validation_and_previews_leave_the_training_alone(tmp_path):
    train(tiny.Toy(), CONFIG, tmp_path / "a", {})
    train(tiny.Toy(), replace(CONFIG, validate_every=1, preview_every=2), tmp_path / "b", {})
    assert tiny.same(state_of(tmp_path / "a", 6), state_of(tmp_path / "b", 6))


def test_average_moves_is_not_the_weights_and_is_what_gets_exported(tmp_path):
    toy = tiny.Toy()
    start = tiny.copied(toy.modules["first"])
    train(toy, CONFIG, tmp_path, {})
    state = tmp_path / "checkpoints" / "step-00000006" / "state"
    average, now = (load_tensors(state / f"first{kind}.safetensors") for kind in ("-ema", ""))
    assert tiny.same(now, toy.modules["first"].state_dict())
    assert not tiny.same(average, now) and not tiny.same(average, start)
    assert tiny.same(load_tensors(tmp_path / "first" / "model.safetensors"), average)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_non_finite_loss_never_reaches_weights_averages_or_log(tmp_path, wrong):
    """Infinity is added as a constant: the gradient stays finite, and the step is skipped all the same."""
    config = replace(CONFIG, save_every=1, log_every=1, keep=9)
    train(tiny.Toy(wrong={1: wrong, 2: wrong}), config, tmp_path, {})
    states = [state_of(tmp_path, step) for step in range(1, 7)]
    assert tiny.same(states[0], states[1]) and tiny.same(states[0], states[2])
    assert not tiny.same(states[2], states[3])
    lines = lines_of(tmp_path)
    assert [line.get("skipped") for line in lines if "skipped" in line] == [0, 1, 1, 0, 0, 0]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_gives_up_after_many_non_finite_steps_with_the_last_good_checkpoint(tmp_path):
    toy = tiny.Toy(wrong=dict.fromkeys(range(4, 99), math.nan))
    with pytest.raises(UserError, match="3 steps in a row had a non-finite loss"):
        train(toy, replace(CONFIG, steps=20, max_skipped=3), tmp_path, {})
    assert all(value.isfinite().all() for value in state_of(tmp_path, 6).values())
    assert read_json(tmp_path / "checkpoints/step-00000006/state/state.json")["skipped"] == 2
    (kept,) = tmp_path.glob("non-finite-step-*.pt")
    (batch,) = torch.load(kept, weights_only=True)
    assert kept.name == "non-finite-step-00000006-process-0.pt" and len(batch["x"]) == CONFIG.batch_size


def test_accumulating_halves_is_one_whole_batch(tmp_path):
    config = replace(tiny.PLAIN, steps=3)
    full = tiny.steps(tiny.Toy(noise=0.0), replace(config, batch_size=8), tmp_path / "a")
    halves = tiny.steps(tiny.Toy(noise=0.0), replace(config, batch_size=4, accumulate=2), tmp_path / "b")
    for name, module in full.modules.items():
        torch.testing.assert_close(module.state_dict(), dict(halves.modules[name].state_dict()))


def test_run_folder_holds_log_previews_config_and_the_newest_checkpoints(tmp_path):
    config = replace(CONFIG, validate_every=3, preview_every=3, save_every=1, keep=2)
    train(tiny.Toy(), config, tmp_path, {"train": {"steps": 6}})
    assert read_json(tmp_path / "config.json") == {"train": {"steps": 6}}
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    names = {"step", "lr", "skipped", "noted", "first_loss", "second_loss", "first_grad_norm", "second_grad_norm"}
    assert lines[0].keys() == names and lines[1].keys() == {"step", "val/noise"}
    assert lines[0]["noted"] == 0.5 and lines[2]["noted"] == 2.5  # means over the steps since the line before
    assert lines[0]["lr"] == pytest.approx(CONFIG.optimizer.lr)


def test_the_same_command_again_says_that_the_run_is_finished(tmp_path, capsys):
    train(tiny.Toy(), CONFIG, tmp_path, {})
    files = [file for file in tmp_path.rglob("*") if file.name != ".lock"]
    before = {file: file.stat().st_mtime_ns for file in files}
    again = tiny.Toy()
    train(again, CONFIG, tmp_path, {})
    assert "is finished at step 6" in capsys.readouterr().out
    assert again.exports == 0 and before == {file: file.stat().st_mtime_ns for file in files}


def test_a_run_stopped_before_its_export_is_exported(tmp_path):
    train(tiny.Toy(), CONFIG, tmp_path, {})
    (tmp_path / "first" / "config.json").unlink()
    train(tiny.Toy(), CONFIG, tmp_path, {})
    assert read_json(tmp_path / "first" / "config.json") == {"final": True}


def test_more_steps_go_on_and_name_what_changed(tmp_path):
    train(tiny.Toy(), CONFIG, tmp_path, {"train": {"steps": 6}, "same": 1})
    with pytest.warns(UserWarning, match=r"other values than before of: train\.steps$"):
        train(tiny.Toy(), replace(CONFIG, steps=8), tmp_path, {"train": {"steps": 8}, "same": 1})
    assert lines_of(tmp_path)[-1]["step"] == 8


def test_refuses_the_state_of_another_model_optimizer_or_version_and_a_file_as_folder(tmp_path, monkeypatch):
    train(tiny.Toy(), CONFIG, tmp_path / "run", {})
    changed = tiny.Toy()
    changed.modules["first"] = torch.nn.Linear(3, 5)
    with pytest.raises(UserError, match="of another model than the config describes.*size mismatch"):
        train(changed, CONFIG, tmp_path / "run", {})
    changed.modules = {"third": torch.nn.Linear(1, 1)}
    with pytest.raises(UserError, match="of another model than the config describes.*third"):
        train(changed, CONFIG, tmp_path / "run", {})
    monkeypatch.setattr("ldm.train.optim.NARROW", 1)
    muon = replace(CONFIG, optimizer=replace(CONFIG.optimizer, muon_lr=1e-2))
    with pytest.raises(UserError, match="of another model than the config describes"):
        train(tiny.Toy(), muon, tmp_path / "run", {})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        train(tiny.Toy(), CONFIG, tmp_path / "file", {})


class Unreadable(list):
    """A data set whose pictures cannot be read."""

    def __getitem__(self, index: int) -> dict:
        raise UserError("picture 'a.png' cannot be read; repair or remove it")


def test_a_loading_process_passes_on_an_error_in_one_line_and_ends(tmp_path):
    toy = tiny.Toy()
    toy.dataset = Unreadable(range(8))
    with pytest.raises(UserError) as caught:
        train(toy, replace(CONFIG, workers=1), tmp_path, {})
    assert str(caught.value) == "picture 'a.png' cannot be read; repair or remove it"
    assert not multiprocessing.active_children()  # though `caught` still refers to the frames of the training


def test_loading_processes_end_with_a_step_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.Toy, "losses", lambda *a: (_ for _ in ()).throw(RuntimeError("out of luck")))
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        train(tiny.Toy(), replace(CONFIG, workers=2), tmp_path, {})
    assert caught and not multiprocessing.active_children()


def test_an_unfinished_run_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    worker = "import sys, tiny; from ldm.commands.cli import run_command; from ldm.train.loop import train\n"
    worker += "from dataclasses import replace\n"
    worker += "run_command(lambda: train(tiny.Toy(), replace(tiny.TRAIN, steps=9), sys.argv[1], {}))"
    train(tiny.Toy(), CONFIG, tmp_path, {})
    for folder in (tmp_path / "checkpoints").iterdir():
        state = folder / "state" / "state.json"
        write_json(state, {k: v for k, v in read_json(state).items() if k != "format"})
        (folder / "manifest.json").unlink()
        seal(folder)
    command = [sys.executable, "-c", worker, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "written by an earlier version of this code and cannot be resumed" in line
