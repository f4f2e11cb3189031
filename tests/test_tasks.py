"""The three trainings on models of a few thousand parameters: what a step moves, what is saved, exact resuming."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from inventory_tools import Scripts, checkpoints, metrics, refuse, succeed
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ldm import model_io
from ldm.clip import MAX_SCALE, TextEncoder
from ldm.config import UserError
from ldm.data import DataConfig, open_dataset, stack
from ldm.images import to_float
from ldm.metrics.alignment import sharing
from ldm.metrics.judges import image_text_model
from ldm.pipeline import Pipeline
from ldm.tokenizer import Tokenizer
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPTask
from ldm.train.config import TrainConfig
from ldm.train.diffusion import DiffusionTask, PreviewConfig, check_normalized
from ldm.train.distill import DistillConfig, DistillTask
from ldm.train.loop import Task, train
from ldm.train.preference import PreferenceConfig, PreferenceTask
from ldm.vae import VAE


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory) -> Path:
    return finished(AutoencoderTask(tiny.autoencoder()), tmp_path_factory.mktemp("autoencoder"), 3)


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory) -> Path:
    return finished(CLIPTask(tiny.clip()), tmp_path_factory.mktemp("clip"), 2)


@pytest.fixture(scope="module")
def unet_task(vae_run, clip_run) -> DiffusionTask:
    """For tests that do not train it."""
    return DiffusionTask(tiny.diffusion(vae_run, clip_run))


def finished(task: Task, out: Path, steps: int, **changes) -> Path:
    train(task, replace(tiny.TRAIN, steps=steps, **changes), out, {"some": "config"})
    return out


def losses_of(task: Task, batch: dict, step: int = 0):
    return task.losses(task.modules, batch, step, tiny.draws(step))


def images_of(dataset, count: int) -> torch.Tensor:
    return to_float(stack([dataset[i] for i in range(count)])["image"])


# Every training


def interrupted(losses, stop: int):
    """A task's `losses` that break off at a step."""

    def changed(modules, batch, step, draws):
        if step == stop:
            raise KeyboardInterrupt
        yield from losses(modules, batch, step, draws)

    return changed


@pytest.mark.parametrize(
    ("name", "muon"),
    [("autoencoder", False), ("clip", True), ("diffusion", True), ("distill", True), ("preference", True)],
)
def test_previews_change_no_bit_and_resuming_is_exact(name, muon, tmp_path, one_thread, vae_run, clip_run):
    """Six steps: with previews, validation and checkpoints at every second step; without; and resumed at steps 1, 3."""
    optimizer = replace(tiny.TRAIN.optimizer, muon_lr=2e-3 if muon else None, weight_decay=0.1)
    config, states = replace(tiny.TRAIN, optimizer=optimizer, steps=6), []
    loss = replace(tiny.LOSS, gan_start=4, gan_ramp=2)  # the discriminator starts between save and resume
    flip = {"data": replace(tiny.DATA, flip=True)}
    pairs = {"pairs": str(tmp_path / "pairs.jsonl"), "scorer": "judge:shapes", "prompts": 64, "candidates": 2}
    pairs |= {"data": DataConfig(length=64), "steps": 1, "held_out": 4, "preview": PreviewConfig(count=2, steps=2)}
    tasks = {
        "autoencoder": lambda: AutoencoderTask(replace(tiny.autoencoder(config, loss), **flip)),
        "clip": lambda: CLIPTask(replace(tiny.clip(config, tiny.READERS), **flip)),
        "diffusion": lambda: DiffusionTask(tiny.diffusion(vae_run, clip_run, config, train_text_encoder=True)),
        "distill": lambda: DistillTask(DistillConfig(teacher="shapes", data=tiny.DATA, train=config, held_out=4)),
        "preference": lambda: PreferenceTask(PreferenceConfig(model="shapes", train=config, **pairs)),
    }
    for case in ("plain", "looked", "resumed"):
        for stop in (1, 3, 6) if case == "resumed" else (6,):
            task, every = tasks[name](), 0 if case == "plain" else 2
            task.losses = interrupted(task.losses, stop)
            changes = {"validate_every": every, "preview_every": every, "save_every": stop}
            with nullcontext() if stop == 6 else pytest.raises(KeyboardInterrupt):
                train(task, replace(config, **changes), tmp_path / case, {})
        states.append(tiny.tensors(tmp_path / case / "checkpoints" / "step-00000006"))
    assert len(states[0]) > 100 and tiny.same(states[0], states[1]) and tiny.same(states[0], states[2])
    assert all(module.training for module in task.modules.values())


class NoWaiting(TorchDispatchMode):
    """Refuses to read a number from a tensor, for which a host waits for its GPU, between `armed` and the end of a
    step."""

    armed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not (self.armed and func is torch.ops.aten._local_scalar_dense.default), "a step reads a number"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["autoencoder", "clip", "diffusion", "distill"])
def test_a_step_waits_for_no_number_of_the_device(name, tmp_path, monkeypatch, vae_run, clip_run):
    config = replace(tiny.TRAIN, optimizer=replace(tiny.TRAIN.optimizer, muon_lr=2e-3), accumulate=2, steps=2)
    flip, mode, due = {"data": replace(tiny.DATA, flip=True)}, NoWaiting(), TrainConfig.due
    if name == "autoencoder":
        task = AutoencoderTask(replace(tiny.autoencoder(config), **flip))
    elif name == "clip":
        task = CLIPTask(replace(tiny.clip(config, tiny.READERS), **flip))
    elif name == "diffusion":
        task = DiffusionTask(tiny.diffusion(vae_run, clip_run, config, min_snr_gamma=5.0))
    else:
        task = DistillTask(DistillConfig(teacher="shapes", data=tiny.DATA, train=config, held_out=4))

    def losses(*arguments):
        mode.armed = True
        yield from type(task).losses(task, *arguments)

    def disarm(*arguments):
        mode.armed = False
        return due(*arguments)

    monkeypatch.setattr(task, "losses", losses)
    monkeypatch.setattr(TrainConfig, "due", disarm)
    with mode:
        train(task, replace(config, log_every=1), tmp_path, {})
    assert len(metrics(tmp_path)) >= 2


@pytest.mark.parametrize("name", ["autoencoder", "clip", "diffusion"])
def test_recomputed_blocks_give_the_same_weights(name, tmp_path, one_thread, vae_run, clip_run):
    states = []
    for checkpointing in (False, True):
        config = replace(tiny.TRAIN, checkpointing=checkpointing, steps=2)
        if name == "diffusion":
            task = DiffusionTask(tiny.diffusion(vae_run, clip_run, config))
        else:
            task = {"autoencoder": AutoencoderTask, "clip": CLIPTask}[name](getattr(tiny, name)(config))
        train(task, config, tmp_path / str(checkpointing), {})
        states.append(tiny.tensors(tmp_path / str(checkpointing)))
    assert tiny.same(*states)


def test_frozen_parts_run_in_the_precision_of_the_run(vae_run, clip_run):
    task, seen = DiffusionTask(tiny.diffusion(vae_run, clip_run, replace(tiny.TRAIN, precision="bf16"))), set()
    for layer in (task.vae.encoder.conv_in, task.text_encoder.text_model.encoder.layers[0].mlp.fc1):
        layer.register_forward_hook(lambda module, inputs, output: seen.add((type(module), output.dtype)))
    task.loss = lambda modules, z0, *rest: seen.add(z0.dtype) or DiffusionTask.loss(task, modules, z0, *rest)
    next(losses_of(task, stack(tiny.samples(4))))
    assert seen == {(torch.nn.Conv2d, torch.bfloat16), (torch.nn.Linear, torch.bfloat16), torch.float32}


# Autoencoder


def test_generator_and_discriminator_steps_leave_each_other_alone():
    def moved(module: torch.nn.Module) -> list[bool]:
        return [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()]

    task = AutoencoderTask(tiny.autoencoder())
    vae, discriminator = task.modules["vae"], task.modules["discriminator"]
    steps = losses_of(task, stack(tiny.samples(4)), step=1)
    name, loss, values = next(steps)
    loss.backward()
    assert name == "vae" and float(values["gan_weight"]) > 0
    assert all(moved(vae)) and not any(moved(discriminator)) and not any(moved(task.perceptual))
    assert all(p.requires_grad for p in discriminator.parameters())
    vae.zero_grad()
    name, loss, values = next(steps)
    loss.backward()
    assert name == "discriminator" and {"logits_real", "logits_fake"} == values.keys()
    # The last bias moves real and fake logits alike: within the margin its two gradients of 1/2 cancel to rounding.
    assert all(moved(discriminator)[:-1]) and not any(moved(vae)) and next(steps, None) is None


@pytest.mark.parametrize("lr", [3e-3, None])
def test_the_discriminator_has_an_adamw_of_its_own_where_asked_for(lr, tmp_path):
    """In a run whose other modules Muon moves; the rate by its first step, which is the learning rate."""
    config = replace(tiny.TRAIN, optimizer=replace(tiny.TRAIN.optimizer, muon_lr=1e-2, eps=1e-12), steps=1)
    loss = replace(tiny.LOSS, discriminator_channels=16, discriminator_lr=lr)
    task = AutoencoderTask(tiny.autoencoder(config, loss))
    before = tiny.copied(task.modules["discriminator"])
    train(task, config, tmp_path, {})
    assert any(tmp_path.rglob("discriminator-muon-optimizer.safetensors")) == (lr is None)
    moved = (task.modules["discriminator"].state_dict()["net.0.weight"] - before["net.0.weight"]).abs().max()
    assert float(moved) == pytest.approx(lr or config.optimizer.lr, rel=1e-2)


def test_latents_are_normalized_after_training_and_decode_as_before(vae_run):
    vae, x = VAE.from_pretrained(vae_run), images_of(open_dataset(tiny.DATA, "train"), tiny.DATA.length)
    with torch.no_grad():
        posterior = vae.encode(x)
        draws = [posterior.mean + posterior.std * torch.randn_like(posterior.mean) for _ in range(8)]
        z = vae.normalize(torch.cat(draws))
        raw = VAE(vae.config)
        raw.load_state_dict(model_io.load_tensors(vae_run / "checkpoints/step-00000003/state/vae-ema.safetensors"))
        torch.testing.assert_close(vae.decode(posterior.mean), raw.decode_raw(raw.encode(x).mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.02)
    assert vae.config.scaling_factor == 1.0 and vae.config.sample_size == 32


def test_a_decoder_trained_alone_leaves_the_latents_as_they_were(vae_run, tmp_path):
    task = AutoencoderTask(replace(tiny.autoencoder(), vae=str(vae_run), frozen=("encoder.*", "quant_conv.*")))
    finished(task, tmp_path / "run", 2)
    before, after, x = VAE.from_pretrained(vae_run), VAE.from_pretrained(tmp_path / "run"), images_of(task.dataset, 4)
    with torch.no_grad():
        z = before.encode(x).mean
        assert torch.equal(after.encode(x).mean, z) and after.config == before.config
        assert not torch.allclose(after.decode_raw(z), before.decode_raw(z))


# CLIP


@pytest.mark.parametrize("name", ["words", "picture"])
def test_heads_move_the_text_tower_alone_and_are_not_exported(name, tmp_path):
    weights = {"words": 0.0, "picture": 0.0} | {name: 3.0}
    task = CLIPTask(tiny.clip(grounding=replace(tiny.READERS, **weights)))
    _, total, values = next(task.losses(task.modules, stack(tiny.samples(4)), 0, tiny.draws()))
    assert values.keys() == {"scale", "contrastive", name}
    torch.testing.assert_close(total, values["contrastive"] + 3 * values[name])
    values[name].backward()
    clip = task.modules["clip"]
    assert all(p.grad is not None for p in clip.text_model.parameters())
    others = (clip.vision_model, clip.visual_projection, clip.text_projection)
    assert all(p.grad is None for module in others for p in module.parameters())
    assert all(p.grad is not None for p in task.modules["grounding"].parameters())
    with torch.no_grad():
        validated = task.validate(task.modules)
    assert validated.keys() & weights.keys() == {name} and 0 < validated[name] < 9
    task.export(task.modules, tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "text_encoder", "tokenizer"}


def test_clip_starts_from_another_text_encoder(clip_run):
    start = TextEncoder.from_pretrained(clip_run)
    config = replace(tiny.clip(), text_encoder=str(clip_run), vocab_size=300)
    config = replace(config, text=replace(config.text, hidden_size=64, projection_dim=24))
    task = CLIPTask(replace(config, vision=replace(config.vision, projection_dim=24)))
    clip = task.modules["clip"]
    assert tiny.same(clip.text_encoder().state_dict(), start.state_dict())
    tokens = task.tokenizer(["a small red circle"])
    torch.testing.assert_close(tokens, Tokenizer.from_pretrained(clip_run)(["a small red circle"]))
    assert clip.encode_text(tokens).shape == (1, 24)


def test_images_share_a_caption_of_all_that_they_have():
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = True
    assert torch.equal(sharing([["a", "b"], ["c"], ["b", "d"], ["c", "e"]]), expected)


def test_clip_scale_is_clamped_after_a_step(tmp_path):
    task = CLIPTask(tiny.clip())
    torch.nn.init.constant_(task.modules["clip"].logit_scale, 6.0)
    finished(task, tmp_path, 1)
    assert task.modules["clip"].logit_scale.detach().exp().item() == pytest.approx(MAX_SCALE)


def test_a_judge_learns_from_validation_too_and_cannot_condition(tmp_path, vae_run):
    task = CLIPTask(replace(tiny.clip(), judge=True))
    parts = [open_dataset(tiny.DATA, split) for split in ("train", "val")]
    n, total = len(parts[0]), len(parts[0]) + len(parts[1])
    samples = [part[i] for part in parts for i in (0, len(part) - 1)]
    for index, sample in zip((0, n - 1, n, total - 1), samples, strict=True):
        assert task.dataset[index]["key"] == sample["key"] and task.dataset.captions(index) == sample["captions"]
    task.export(task.modules, tmp_path / "run", None)
    assert len(task.dataset) == total and image_text_model(str(tmp_path / "run")).size == tiny.DATA.size
    with pytest.raises(UserError, match="text_encoder|tokenizer"):
        DiffusionTask(tiny.diffusion(vae_run, tmp_path / "run"))


def test_a_run_whose_captions_have_changed_keeps_its_vocabulary_or_is_refused(tmp_path):
    """By the script. Other words of the same length make another vocabulary of the same size."""
    scripts, run = Scripts(tmp_path, tmp_path), tmp_path / "run"
    clip = ["train_clip", *tiny.EMPTY, "--out", "run", *tiny.overrides(tiny.clip())]
    clip += ["data.name=folder", "data.path=pictures"]
    for folder in (tmp_path / "pictures/train", tmp_path / "pictures/val"):
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "a.png")
        (folder / "a.txt").write_text("red apple\nred apple")
    succeed(scripts(*clip, "train.steps=1"))
    (tmp_path / "pictures/train/a.txt").write_text("odd lemon\nodd lemon")
    refuse(scripts(*clip, "train.steps=2"), "captions", "vocabulary", "--force", "tokenizer=")
    vocabulary = (run / "tokenizer/vocab.json").read_bytes()
    shutil.copytree(run / "tokenizer", tmp_path / "copy")
    succeed(scripts(*clip, "train.steps=2", "tokenizer=copy", "--force"))
    assert (run / "tokenizer/vocab.json").read_bytes() == vocabulary and len(checkpoints(run)) == 2


# Diffusion


def test_diffusion_leaves_its_parts_alone_and_its_folder_opens_finished_or_not(vae_run, clip_run, tmp_path):
    cache = tmp_path / "latents.safetensors"
    task = DiffusionTask(tiny.diffusion(vae_run, clip_run, cache=str(cache)))
    before = [tiny.copied(part) for part in (task.vae, task.text_encoder, task.modules["unet"])]
    out = finished(task, tmp_path / "run", 2, save_every=1)
    assert cache.is_file() and len(list((out / "previews").glob("*.png"))) == 1
    saved = VAE.from_pretrained(out), TextEncoder.from_pretrained(out), task.modules["unet"]
    assert [tiny.same(old, part.state_dict()) for old, part in zip(before, saved, strict=True)] == [True, True, False]
    picture = Pipeline.from_pretrained(out)("a red circle", steps=2)[0]
    (out / "model_index.json").unlink()  # as before the end
    unfinished = Pipeline.from_pretrained(out)("a red circle", steps=2)[0]
    assert picture.size == (32, 32) and picture.tobytes() == unfinished.tobytes()


def test_dropped_captions_are_empty_at_the_right_rate(unet_task, monkeypatch):
    seen, batch = [], {"mean": torch.zeros(4000, 1), "std": torch.ones(4000, 1), "captions": [["a red circle"]] * 4000}
    monkeypatch.setattr(unet_task, "loss", lambda modules, z0, captions, t, eps: seen.extend(captions))
    next(losses_of(unet_task, batch))
    assert set(seen) == {"", "a red circle"} and 320 < seen.count("") < 480
    monkeypatch.setattr(unet_task, "config", replace(unet_task.config, caption_dropout=1.0))
    seen.clear()
    next(losses_of(unet_task, batch))
    assert set(seen) == {""}


def test_latents_far_from_unit_variance_are_refused():
    check_normalized(torch.randn(4, 4, 8, 8))
    for z in (3 * torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8) + 2, torch.full((4, 4, 8, 8), torch.nan)):
        with pytest.raises(UserError, match="scaling_factor does not fit these images"):
            check_normalized(z)


def test_parts_that_diffusers_and_transformers_saved_are_trained_on(vae_run, clip_run, tmp_path):
    """As most will begin: a Stable Diffusion VAE and U-Net, and both towers of a CLIP as OpenAI's is published."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTokenizer

    AutoencoderKL.from_pretrained(vae_run / "vae").save_pretrained(tmp_path / "sd" / "vae")
    CLIPModel.from_pretrained(clip_run / "clip").save_pretrained(tmp_path / "openai")
    CLIPTokenizer.from_pretrained(clip_run / "tokenizer").save_pretrained(tmp_path / "openai")
    DiffusionTask(tiny.diffusion(vae_run, clip_run)).modules["unet"].save_pretrained(tmp_path / "ours")
    start = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    start.save_pretrained(tmp_path / "sd" / "unet")
    options = {"unet": str(tmp_path / "sd"), "frozen": ("mid_block.*",), "train_text_encoder": True}
    config = tiny.diffusion(tmp_path / "sd", tmp_path / "openai", **options)
    made = StableDiffusionPipeline.from_pretrained(finished(DiffusionTask(config), tmp_path / "run", 1))
    trained, before = made.unet.state_dict(), start.state_dict()
    still = {name for name in before if torch.equal(trained[name], before[name])}
    assert {name for name in before if name.startswith("mid_block.")} <= still < before.keys()
    assert tiny.same(made.vae.state_dict(), AutoencoderKL.from_pretrained(vae_run / "vae").state_dict())
    text_encoders = TextEncoder.from_pretrained(tmp_path / "run"), TextEncoder.from_pretrained(clip_run)
    assert not tiny.same(*(text_encoder.state_dict() for text_encoder in text_encoders))  # trained along
