"""The training loop on a toy, and with two processes on the real tasks."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from ldm.config import UserError, build
from ldm.data.latents import open_latents
from ldm.data.shards import Shards, write_shards
from ldm.model_io import load_tensors, read_json
from ldm.train import state as run_state
from ldm.train.clip import CLIPTask
from ldm.train.loop import OptimizerConfig, Run, TrainConfig, train

CONFIG = replace(tiny.TRAIN, steps=6, save_every=3, ema_decay=0.9)


def state_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's training state."""
    folder = run / "checkpoints" / f"step-{step:08d}" / "state"
    state = {f"{file.name}/{k}": v for file in folder.glob("*.safetensors") for k, v in load_tensors(file).items()}
    for file in folder.glob("*.pt"):
        for index, values in torch.load(file, weights_only=True)["state"].items():
            state |= {f"{file.name}/{index}/{k}": v for k, v in values.items()}
    return state


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_learning_rate_warms_up_then_falls_as_a_cosine():
    o = OptimizerConfig(warmup=4, final_lr=0.1)
    assert [o.rate(step, 24) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert o.rate(14, 24) == pytest.approx(0.55)
    assert o.rate(24, 24) == pytest.approx(0.1)
    assert replace(o, decay="constant").rate(20, 24) == 1.0


@pytest.mark.parametrize(
    ("table", "key"),
    [({"steps": 0}, "steps"), ({"keep": 0}, "keep"), ({"ema_decay": 1.0}, "ema_decay"), ({"clip": 0.0}, "clip")]
    + [({"seed": -1}, "seed"), ({"optimizer": {"lr": 0.0}}, "lr"), ({"optimizer": {"betas": [0.9, 1.0]}}, "betas")],
)
def test_config_refuses_values_out_of_range(table, key):
    with pytest.raises(UserError, match=f"{key}' is .*; it must be"):
        build(TrainConfig, table)


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (0, 2)])
def test_resume_is_exact(tmp_path, workers, accumulate):
    config = replace(CONFIG, workers=workers, accumulate=accumulate)
    train(tiny.Toy(), config, tmp_path / "straight", {})
    with pytest.raises(KeyboardInterrupt):
        train(tiny.Toy(stop_at=5), config, tmp_path / "resumed", {})
    assert lines_of(tmp_path / "resumed")[-1]["step"] == 4  # done after the checkpoint, to be done again
    train(tiny.Toy(), config, tmp_path / "resumed", {})
    straight, resumed = state_of(tmp_path / "straight", 6), state_of(tmp_path / "resumed", 6)
    assert tiny.same(straight, resumed)
    files = {f"{part}{kind}" for part in ("first", "second") for kind in (".safetensors", "-ema.safetensors")}
    assert {name.split("/")[0] for name in straight} == files | {"first-optimizer.pt", "second-optimizer.pt"}
    assert not tiny.same(straight, state_of(tmp_path / "straight", 3))
    steps = [line["step"] for line in lines_of(tmp_path / "resumed")]
    assert steps == [line["step"] for line in lines_of(tmp_path / "straight")]


def test_resume_is_exact_with_muon(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.train.muon.NARROW", 1)  # the toy's matrices are small
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, muon_lr=1e-2))
    train(tiny.Toy(), config, tmp_path / "straight", {})
    with pytest.raises(KeyboardInterrupt):
        train(tiny.Toy(stop_at=5), config, tmp_path / "resumed", {})
    train(tiny.Toy(), config, tmp_path / "resumed", {})
    straight, resumed = state_of(tmp_path / "straight", 6), state_of(tmp_path / "resumed", 6)
    assert "first-muon-optimizer.pt/0/momentum" in straight
    assert tiny.same(straight, resumed)
    train(tiny.Toy(), CONFIG, tmp_path / "adamw", {})
    assert not tiny.same(state_of(tmp_path / "adamw", 6), straight)


def test_resume_without_the_optimizer_of_the_checkpoint_is_refused(tmp_path, monkeypatch):
    train(tiny.Toy(), replace(CONFIG, steps=3), tmp_path, {})
    monkeypatch.setattr("ldm.train.muon.NARROW", 1)
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, muon_lr=1e-2))
    with pytest.raises(UserError, match="of another model than the config"):
        train(tiny.Toy(), config, tmp_path, {})


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
    """Infinity is added as a constant: the gradient stays finite, and the step is left out all the same."""
    run = tiny.steps(tiny.Toy(wrong={1: wrong}), CONFIG, tmp_path, count=1)
    before = [tiny.copied(m) for m in run.task.modules.values()]
    averages = [{k: v.clone() for k, v in a.shadow.items()} for a in run.trained.averages.values()]
    run.step(run.batches(1), 1)
    assert all(map(tiny.same, before, (m.state_dict() for m in run.task.modules.values())))
    assert all(map(tiny.same, averages, (a.shadow for a in run.trained.averages.values())))
    run.log.means(2)
    line = lines_of(tmp_path)[-1]
    assert line["skipped"] == 1 and all(math.isfinite(value) for value in line.values())
    run.step(run.batches(2), 2)
    assert run.skipped == 0 and not tiny.same(before[0], run.task.modules["first"].state_dict())


def test_gives_up_after_many_non_finite_steps_with_the_last_good_checkpoint(tmp_path):
    toy = tiny.Toy(wrong=dict.fromkeys(range(4, 99), math.nan))
    with pytest.raises(UserError, match="3 steps in a row had a non-finite loss"):
        train(toy, replace(CONFIG, steps=20, max_skipped=3), tmp_path, {})
    assert all(value.isfinite().all() for value in state_of(tmp_path, 6).values())
    assert read_json(tmp_path / "checkpoints" / "step-00000006" / "state" / "state.json")["skipped"] == 2
    (kept,) = tmp_path.glob("non-finite-step-*.pt")
    (batch,) = torch.load(kept, weights_only=True)
    assert kept.name == "non-finite-step-00000006-process-0.pt" and len(batch["x"]) == CONFIG.batch_size


def test_accumulating_halves_is_one_whole_batch(tmp_path):
    config = replace(tiny.PLAIN, steps=3)
    whole = tiny.steps(tiny.Toy(noise=0.0), replace(config, batch_size=8), tmp_path / "a")
    halves = tiny.steps(tiny.Toy(noise=0.0), replace(config, batch_size=4, accumulate=2), tmp_path / "b")
    for name, module in whole.task.modules.items():
        torch.testing.assert_close(module.state_dict(), dict(halves.task.modules[name].state_dict()))


def test_run_folder_holds_log_previews_config_and_the_newest_checkpoints(tmp_path):
    config = replace(CONFIG, validate_every=3, preview_every=3, save_every=1, keep=2)
    train(tiny.Toy(), config, tmp_path, {"train": {"steps": 6}})
    assert read_json(tmp_path / "config.json") == {"train": {"steps": 6}}
    assert sorted(p.name for p in (tmp_path / "previews").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000006"]
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    names = {"step", "lr", "skipped", "noted", "first_loss", "second_loss", "first_grad_norm", "second_grad_norm"}
    assert lines[0].keys() == names and lines[1].keys() == {"step", "val/noise"}
    assert lines[0]["noted"] == 0.5 and lines[2]["noted"] == 2.5  # means over the steps since the line before
    assert lines[0]["lr"] == pytest.approx(CONFIG.optimizer.lr)


def test_a_checkpoint_that_was_broken_off_is_never_seen(tmp_path):
    with pytest.raises(OSError), run_state.new_checkpoint(tmp_path, 5, 2) as folder:
        (folder / "half").touch()
        raise OSError
    assert run_state.checkpoints(tmp_path) == [] and not list((tmp_path / "checkpoints").glob("step-*"))


def test_the_same_command_again_says_that_the_run_is_finished(tmp_path, capsys):
    train(tiny.Toy(), CONFIG, tmp_path, {})
    files = [file for file in tmp_path.rglob("*") if file.name != ".lock"]
    before = {file: file.stat().st_mtime_ns for file in files}
    again = tiny.Toy()
    train(again, CONFIG, tmp_path, {})
    assert "is finished at step 6" in capsys.readouterr().out
    assert again.exports == 0 and before == {file: file.stat().st_mtime_ns for file in files}
    assert len(list(tmp_path.rglob("*"))) == len(files) + 1


def test_more_steps_go_on_and_name_what_changed(tmp_path):
    train(tiny.Toy(), CONFIG, tmp_path, {"train": {"steps": 6}, "same": 1})
    with pytest.warns(UserWarning, match=r"other values than before of: train\.steps$"):
        train(tiny.Toy(), replace(CONFIG, steps=8), tmp_path, {"train": {"steps": 8}, "same": 1})
    assert lines_of(tmp_path)[-1]["step"] == 8


def test_refuses_the_checkpoint_of_another_model_and_a_file_as_folder(tmp_path):
    train(tiny.Toy(), CONFIG, tmp_path / "run", {})
    toy = tiny.Toy()
    toy.modules["first"] = torch.nn.Linear(3, 5)
    with pytest.raises(UserError, match="of another model than the config describes.*size mismatch"):
        Run(toy, CONFIG, tmp_path / "run").resume()
    toy.modules = {"third": torch.nn.Linear(1, 1)}
    with pytest.raises(UserError, match="it has no third"):
        Run(toy, CONFIG, tmp_path / "run").resume()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        train(tiny.Toy(), CONFIG, tmp_path / "file", {})


class Unreadable:
    """A data set whose pictures cannot be read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        raise UserError("picture 'a.png' cannot be read; repair or remove it")


def test_a_loading_process_passes_on_a_mistake_as_it_is(tmp_path):
    toy = tiny.Toy()
    toy.dataset = Unreadable()
    with pytest.raises(UserError) as caught:
        train(toy, replace(CONFIG, workers=1), tmp_path, {})
    assert str(caught.value) == "picture 'a.png' cannot be read; repair or remove it"
    assert not multiprocessing.active_children()  # though `caught` still refers to the frames of the training


def test_loading_processes_end_with_a_step_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny.Toy, "losses", lambda *a: (_ for _ in ()).throw(RuntimeError("out of luck")))
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        train(tiny.Toy(), replace(CONFIG, workers=2), tmp_path, {})
    assert caught and not multiprocessing.active_children()


def test_a_loading_process_outlives_a_sigterm_but_not_for_ever():
    code = "import os, signal, time; from ldm.data import loader; loader.GRACE = 1"
    code += "; loader.ignore_signals(0); os.kill(os.getpid(), signal.SIGINT)"
    code += "; os.kill(os.getpid(), signal.SIGTERM); print('alive', flush=True); time.sleep(600)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGALRM and done.stdout == "alive\n"


def test_two_processes_stay_alike_and_equal_one_with_their_batches_together(tmp_path, one_thread):
    """Also with a discriminator, whose parameters are idle in the generator's step."""
    worker = Path(__file__).with_name("two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch.append(str(tmp_path))
    write_shards(tiny.files(23), tmp_path / "shards", "train", shard_bytes=30_000)
    done = subprocess.run(launch, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    clip = CLIPTask(tiny.clip())
    clip.dataset = tiny.samples(16, captions=1)
    for name, task, config in (("toy", tiny.Toy(noise=0.0), tiny.TRAIN), ("clip", clip, tiny.PLAIN)):
        run = tiny.steps(task, replace(config, batch_size=2 * config.batch_size), tmp_path / f"one-{name}")
        state = {k: v.contiguous() for k, v in next(iter(run.task.modules.values())).state_dict().items()}
        torch.testing.assert_close(load_tensors(tmp_path / f"{name}.safetensors"), state, rtol=1e-4, atol=1e-5)
        assert [line["step"] for line in lines_of(tmp_path / name)] == [2, 4, 4]  # one process writes
    assert (tmp_path / "autoencoder" / "vae" / "config.json").is_file()
    check_data(tmp_path)


def check_data(folder: Path) -> None:
    """Two processes have written the cache that one writes, and have read every sample once an epoch."""
    shards = Shards(folder / "shards", 32)
    assert len(shards) == 23 and len(shards.lengths) == 3
    open_latents(folder / "one.safetensors", tiny.encoder(), shards, 4, torch.device("cpu"))
    assert (folder / "one.safetensors").read_bytes() == (folder / "latents.safetensors").read_bytes()
    both = [read_json(folder / f"names-{rank}.json") for rank in range(2)]
    for name in ("shards", "cache"):
        first, second = (names[name] for names in both)
        assert len(first) == len(second) == 12
        seen = [key for a, b in zip(first, second, strict=True) for key in a + b]
        for epoch in range(3):
            assert sorted(seen[23 * epoch : 23 * (epoch + 1)]) == sorted(sample["key"] for sample in shards), name
