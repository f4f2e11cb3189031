"""The training loop on a toy: what it writes, exact resuming, and that wrong numbers never reach the weights."""

import math
import multiprocessing
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from inventory_tools import metrics

from ldm.config import UserError
from ldm.model_io import read_json
from ldm.train import loop
from ldm.train.config import OptimizerConfig, TrainConfig
from ldm.train.loop import Late, train

CONFIG = replace(tiny.TRAIN, steps=6, save_every=3, log_every=1, ema_decay=0.9)


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's training state."""
    return tiny.tensors(run / "checkpoints" / f"step-{step:08d}" / "state")


def test_learning_rate_warms_up_then_falls_as_a_cosine():
    o = OptimizerConfig(warmup=4, final_lr=0.1)
    assert [o.rate(step, 24) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert o.rate(14, 24) == pytest.approx(0.55) and o.rate(24, 24) == pytest.approx(0.1)
    assert replace(o, decay="constant").rate(20, 24) == 1.0


@pytest.mark.parametrize(("workers", "accumulate", "muon"), [(2, 1, False), (0, 2, True)])
def test_resume_is_exact(tmp_path, monkeypatch, workers, accumulate, muon):
    monkeypatch.setattr("ldm.train.optim.NARROW", 1)  # the toy's matrices are small
    config = replace(CONFIG, workers=workers, accumulate=accumulate)
    config = replace(config, optimizer=replace(CONFIG.optimizer, muon_lr=1e-2 if muon else None))
    train(tiny.Toy(), config, tmp_path / "straight", {})
    with pytest.raises(KeyboardInterrupt):
        train(tiny.Toy(events={5: partial(tiny.fail, KeyboardInterrupt())}), config, tmp_path / "resumed", {})
    assert metrics(tmp_path / "resumed")[-1]["step"] == 5  # done after the checkpoint, to be done again
    with (tmp_path / "resumed/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "l')  # as a kill leaves it
    train(tiny.Toy(), config, tmp_path / "resumed", {})
    straight = state_of(tmp_path / "straight", 6)
    assert tiny.same(straight, state_of(tmp_path / "resumed", 6))
    assert not tiny.same(straight, state_of(tmp_path / "straight", 3))
    files = {f"{part}{kind}" for part in ("first", "second") for kind in ("", "-ema", "-optimizer")}
    files |= {"first-muon-optimizer", "second-muon-optimizer"} if muon else set()
    assert {name.split("/")[0] for name in straight} == files
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")


@pytest.mark.parametrize(
    ("where", "wrong", "late"),
    [("loss", math.nan, True), ("loss", math.inf, False), ("gradient", math.nan, False), ("gradient", math.nan, True)],
)
def test_a_non_finite_step_never_reaches_weights_averages_or_log(tmp_path, monkeypatch, where, wrong, late):
    """Infinity is added to the loss as a constant: the gradient stays finite, and the step is skipped all the same; and
    the other way around. After three in a row the run gives up, with the last good checkpoint and the batch; so it does
    where the host learns of each step `late`, as with a GPU. Muon moves a matrix."""
    if late:
        monkeypatch.setattr(loop, "Late", lambda device: Late(torch.device("cuda")))
        monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr("ldm.train.optim.NARROW", 1)
    config, at, steps = replace(CONFIG, steps=20, save_every=1, keep=9, max_skipped=3), (1, 2, 5, 6, 7), count()
    config = replace(config, optimizer=replace(config.optimizer, muon_lr=1e-2))
    toy = tiny.Toy(wrong=dict.fromkeys(at, wrong) if where == "loss" else {})
    if where == "gradient":
        toy.modules["first"].weight.register_hook(lambda gradient: gradient * (wrong if next(steps) in at else 1))
    with pytest.raises(UserError, match="3 steps in a row had a non-finite loss or gradient"):
        train(toy, config, tmp_path, {})
    states = [state_of(tmp_path, step) for step in range(1, 8)]
    assert [tiny.same(a, b) for a, b in pairwise(states)] == [True, True, False, False, True, True]
    lines = metrics(tmp_path)[:7]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 0, 0, 1, 1]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    (batch,) = torch.load(tmp_path / "non-finite-step-00000007-process-0.pt", weights_only=True)
    assert len(batch["x"]) == CONFIG.batch_size


def test_accumulating_halves_is_one_whole_batch(tmp_path):
    optimizer = replace(tiny.TRAIN.optimizer, eps=1e-2)  # keeps noise in gradients that are zero on paper small
    config, full, halves = replace(tiny.TRAIN, steps=3, optimizer=optimizer), tiny.Toy(noise=0.0), tiny.Toy(noise=0.0)
    train(full, replace(config, batch_size=8), tmp_path / "a", {})
    train(halves, replace(config, batch_size=4, accumulate=2), tmp_path / "b", {})
    for name, module in full.modules.items():
        torch.testing.assert_close(module.state_dict(), dict(halves.modules[name].state_dict()))


def test_a_run_logs_means_since_the_line_before_and_keeps_previews_and_the_newest_checkpoints(tmp_path):
    train(tiny.Toy(), replace(CONFIG, log_every=2, validate_every=3, preview_every=3, save_every=1), tmp_path, {})
    names = {folder: sorted(p.stem for p in (tmp_path / folder).iterdir()) for folder in ("previews", "checkpoints")}
    assert names["previews"] == ["step-00000003", "step-00000006"]
    assert names["checkpoints"] == ["step-00000005", "step-00000006"]
    lines = metrics(tmp_path)
    names = {"step", "lr", "skipped", "noted", "first_loss", "second_loss", "first_grad_norm", "second_grad_norm"}
    assert lines[0].keys() == names and lines[1].keys() == {"step", "val/noise"}
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert lines[0]["noted"] == 0.5 and lines[2]["noted"] == 2.5
    assert lines[0]["lr"] == pytest.approx(CONFIG.optimizer.lr)


def test_a_finished_run_is_left_alone_unless_its_export_is_missing(tmp_path, capsys):
    train(tiny.Toy(), CONFIG, tmp_path, {})
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    again = tiny.Toy()
    train(again, CONFIG, tmp_path, {})
    assert "is finished at step 6" in capsys.readouterr().out
    assert again.exports == 0 and before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    (tmp_path / "first" / "config.json").unlink()
    train(tiny.Toy(), CONFIG, tmp_path, {})
    assert read_json(tmp_path / "first" / "config.json") == {"final": True}


def test_refuses_the_state_of_another_model_or_optimizer(tmp_path, monkeypatch):
    train(tiny.Toy(), CONFIG, tmp_path / "run", {})
    changed = tiny.Toy()
    for modules in ({"first": torch.nn.Linear(3, 5)}, {"third": torch.nn.Linear(1, 1)}):
        changed.modules = modules
        with pytest.raises(UserError, match="of another model than the config describes"):
            train(changed, CONFIG, tmp_path / "run", {})
    monkeypatch.setattr("ldm.train.optim.NARROW", 1)
    muon = replace(CONFIG, optimizer=replace(CONFIG.optimizer, muon_lr=1e-2))
    with pytest.raises(UserError, match="of another model than the config describes"):
        train(tiny.Toy(), muon, tmp_path / "run", {})


@pytest.mark.parametrize(("capability", "auto"), [((8, 0), "bf16"), ((7, 5), "no")])
def test_the_precision_is_that_of_the_device_and_no_other(monkeypatch, capability, auto):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    cpu, gpu, config = torch.device("cpu"), torch.device("cuda"), TrainConfig()
    assert config.on(cpu).precision == "no" and config.on(gpu).precision == auto
    with nullcontext() if auto == "bf16" else pytest.raises(UserError, match="bfloat16 .* T4"):
        assert replace(config, precision="bf16").on(gpu).precision == "bf16"


class Failing(list):
    """Samples of which none can be read, for a reason that may pass."""

    def __getitem__(self, index):
        raise UserError("picture 'a.png' cannot be read; repair or remove it")


def test_loading_processes_end_with_an_error_of_theirs_or_of_a_step(tmp_path):
    toy = tiny.Toy(events={0: partial(tiny.fail, RuntimeError("out of luck"))})
    with pytest.raises(RuntimeError, match="out of luck"):
        train(toy, replace(CONFIG, workers=1), tmp_path, {})
    assert not multiprocessing.active_children()
    toy.dataset = Failing(toy.dataset)
    with pytest.raises(UserError) as caught:
        train(toy, replace(CONFIG, workers=1), tmp_path, {})
    assert str(caught.value) == "picture 'a.png' cannot be read; repair or remove it"
    assert not multiprocessing.active_children()  # though `caught` still refers to the frames of the training


def test_trackers_are_those_of_accelerate(tmp_path):
    for name, message in (("abacus", "Unsupported logging capability: abacus"), ("aim", "aim is not installed")):
        with pytest.raises(UserError, match=f"^train.trackers.*{message}"):
            train(tiny.Toy(), replace(CONFIG, trackers=(name,)), tmp_path / name, {})
    train(tiny.Toy(), replace(CONFIG, trackers=()), tmp_path / "none", {})
    assert not (tmp_path / "none" / "tensorboard").exists()


def test_settings_of_a_launch_are_named_or_have_no_effect(tmp_path, monkeypatch):
    """accelerate would divide each loss by the number of its own accumulation steps."""
    train(tiny.Toy(), CONFIG, tmp_path / "plain", {})
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.warns(UserWarning, match="mixed precision bf16 is not used; set train.precision"):
        train(tiny.Toy(), CONFIG, tmp_path / "launched", {})
    assert tiny.same(state_of(tmp_path / "plain", 6), state_of(tmp_path / "launched", 6))
