"""What one step of each training does, on models of a few thousand parameters."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from einops import rearrange

from ldm import model_io as weights
from ldm.clip import MAX_SCALE, TextEncoder
from ldm.config import UserError, load
from ldm.data import open_dataset, spread, stack_images
from ldm.data.shapes import Shapes
from ldm.diffusion import ScheduleConfig
from ldm.images import to_float
from ldm.metrics.judges import image_text_model
from ldm.pipeline import Pipeline
from ldm.samplers import SAMPLERS
from ldm.tokenizer import Tokenizer
from ldm.train.autoencoder import AutoencoderTask
from ldm.train.clip import CLIPConfig, CLIPTask, Joined, sharing
from ldm.train.diffusion import DiffusionTask, check_normalized, drop_captions
from ldm.train.loop import train
from ldm.train.task import freeze
from ldm.unet import UNet
from ldm.vae import VAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory) -> Path:
    """A finished training of the autoencoder, with previews."""
    out = tmp_path_factory.mktemp("autoencoder")
    train(AutoencoderTask(tiny.autoencoder()), replace(tiny.TRAIN, steps=3), out, {"some": "config"})
    return out


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory) -> Path:
    """A finished training of the text encoder."""
    out = tmp_path_factory.mktemp("clip")
    train(CLIPTask(tiny.clip()), replace(tiny.TRAIN, steps=2), out, {"some": "config"})
    return out


@pytest.fixture(scope="module")
def unet_task(vae_run, clip_run) -> DiffusionTask:
    """For tests that do not train it."""
    return DiffusionTask(tiny.diffusion(vae_run, clip_run))


def gradients(module: torch.nn.Module) -> list[bool]:
    return [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()]


def test_generator_and_discriminator_steps_leave_each_other_alone():
    task = AutoencoderTask(tiny.autoencoder())
    vae, discriminator = task.modules["vae"], task.modules["discriminator"]
    steps = task.losses(task.modules, stack_images(tiny.samples(4)), step=1)
    name, loss, values = next(steps)
    loss.backward()
    assert name == "vae" and float(values["gan_weight"]) > 0
    assert all(gradients(vae)) and not any(gradients(discriminator))
    assert all(p.requires_grad for p in discriminator.parameters())
    vae.zero_grad()
    name, loss, values = next(steps)
    loss.backward()
    assert name == "discriminator" and {"logits_real", "logits_fake"} == values.keys()
    # The last bias moves real and fake logits alike: within the margin its two gradients of 1/2 cancel to rounding.
    assert all(gradients(discriminator)[:-1]) and not any(gradients(vae))
    assert discriminator.net[-1].bias.grad is not None
    assert next(steps, None) is None


def test_discriminator_is_idle_then_learns_then_counts():
    task = AutoencoderTask(tiny.autoencoder(replace(tiny.TRAIN, steps=8), replace(tiny.LOSS, gan_start=4, gan_ramp=2)))
    batch = stack_images(tiny.samples(2))
    seen = [[(name, "gan_weight" in v) for name, _, v in task.losses(task.modules, batch, step)] for step in (1, 2, 4)]
    assert seen == [
        [("vae", False)],
        [("vae", False), ("discriminator", False)],
        [("vae", True), ("discriminator", False)],
    ]


def test_the_discriminator_has_an_optimizer_of_its_own_where_asked_for(tmp_path):
    train = replace(tiny.TRAIN, optimizer=replace(tiny.TRAIN.optimizer, muon_lr=1e-2, betas=(0.8, 0.99)))
    loss = replace(tiny.LOSS, discriminator_channels=16)
    for lr, names in ((3e-3, {"vae", "vae-muon", "discriminator"}), (None, {"discriminator-muon"})):
        task = AutoencoderTask(tiny.autoencoder(train, replace(loss, discriminator_lr=lr)))
        optimizers = tiny.steps(task, train, tmp_path / str(lr), count=1).trained.optimizers
        assert names <= set(optimizers) and ("discriminator-muon" in optimizers) == (lr is None)
        (group,), (of_vae,) = optimizers["discriminator"].param_groups, optimizers["vae"].param_groups
        rate = train.optimizer.rate(0, train.steps)
        assert group["lr"] == pytest.approx(rate * (lr or train.optimizer.lr))
        assert group["betas"] == ((0.5, 0.9) if lr else (0.8, 0.99)) and of_vae["betas"] == (0.8, 0.99)
    with pytest.raises(UserError, match="discriminator_lr"):
        replace(loss, discriminator_lr=0.0)


@pytest.mark.parametrize(("gan_start", "gan", "warned"), [(4, 0.5, True), (3, 0.5, False), (4, 0.0, False)])
def test_a_discriminator_that_would_never_count_is_said(recwarn, gan_start, gan, warned):
    AutoencoderTask(tiny.autoencoder(loss=replace(tiny.LOSS, gan_start=gan_start, gan=gan)))  # of 4 steps
    assert [("never counts" in str(w.message)) for w in recwarn] == [True] * warned


def test_autoencoder_starts_from_other_weights(vae_run):
    there = VAE.from_pretrained(vae_run)
    model = replace(there.config, block_out_channels=(4, 4), norm_num_groups=4)
    config = replace(tiny.autoencoder(), vae=str(vae_run), model=model, data=replace(tiny.DATA, size=64))
    task = AutoencoderTask(config)
    vae = task.modules["vae"]
    assert tiny.same(vae.state_dict(), there.state_dict())
    assert vae.config == replace(there.config, sample_size=64)
    batch = stack_images([task.dataset[i] for i in range(2)])
    _, loss, _ = next(task.losses(task.modules, batch, step=0))
    loss.backward()
    assert all(gradients(vae))
    with pytest.raises(UserError, match="unknown model 'nowhere'"):
        AutoencoderTask(replace(config, vae="nowhere"))


def test_clip_starts_from_another_text_encoder(clip_run):
    there = TextEncoder.from_pretrained(clip_run)
    config = replace(tiny.clip(), text_encoder=str(clip_run), vocab_size=300)
    config = replace(config, text=replace(config.text, hidden_size=64, projection_dim=24))
    config = replace(config, vision=replace(config.vision, projection_dim=24))
    task = CLIPTask(config)
    clip = task.modules["clip"]
    assert tiny.same(clip.text_encoder().state_dict(), there.state_dict())
    tokens = task.tokenizer(["a small red circle"])
    torch.testing.assert_close(tokens, Tokenizer.from_pretrained(clip_run)(["a small red circle"]))
    assert clip.encode_text(tokens).shape == (1, 24)
    assert losses_on_one_batch(task, "clip", 3e-3, 2)[1] > 0
    with pytest.raises(UserError, match="unknown model 'nowhere'"):
        CLIPTask(replace(config, text_encoder="nowhere"))
    with pytest.raises(UserError, match="comes with its own tokenizer"):
        replace(config, tokenizer="shapes")
    with pytest.raises(UserError, match="a judge must not begin as what conditions a U-Net"):
        replace(config, judge=True)


def test_an_image_tower_trained_alone_leaves_the_text_encoder_as_it_was(clip_run, tmp_path):
    task = CLIPTask(replace(tiny.clip(), text_encoder=str(clip_run), frozen=("text_model.*",)))
    before = tiny.copied(task.modules["clip"])
    tiny.steps(task, replace(tiny.TRAIN, steps=2), tmp_path)
    task.export(tmp_path / "run", CPU, final=True)
    moved = {k for k, value in task.modules["clip"].state_dict().items() if not torch.equal(value, before[k])}
    assert {k.split(".")[0] for k in moved} == {"vision_model", "visual_projection", "text_projection", "logit_scale"}
    there = TextEncoder.from_pretrained(clip_run).state_dict()
    assert tiny.same(TextEncoder.from_pretrained(tmp_path / "run").state_dict(), there)


def test_perceptual_gradient_reaches_the_decoder_and_not_its_own_network():
    task = AutoencoderTask(tiny.autoencoder())
    _, _, values = next(task.losses(task.modules, stack_images(tiny.samples(2)), step=0))
    values["perceptual"].backward()
    assert all(gradients(task.modules["vae"].decoder))
    assert all(p.grad is None for p in task.perceptual.parameters())


def losses_on_one_batch(task, name: str, lr: float, count: int, step: int = 0) -> tuple[float, float]:
    """First and last loss of `name` over `count` Adam steps on the same batch with the same random numbers."""
    module = task.modules[name].train()
    optimizer = torch.optim.Adam(module.parameters(), lr)
    batch = task.collate([task.dataset[i] for i in range(8)])
    seen = []
    for _ in range(count):
        torch.manual_seed(0)
        found, loss, _ = next(task.losses(task.modules, batch, step))
        assert found == name
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach().item())
    return seen[0], seen[-1]


def test_autoencoder_overfits_a_batch():
    task = AutoencoderTask(tiny.autoencoder(loss=replace(tiny.LOSS, gan=0.0, perceptual=0.1)))
    first, last = losses_on_one_batch(task, "vae", 1e-2, 40)
    assert last < 0.5 * first


def test_clip_overfits_a_batch():
    first, last = losses_on_one_batch(CLIPTask(tiny.clip()), "clip", 3e-3, 40)
    assert last < 0.2 * first


def test_unet_overfits_a_batch(vae_run, clip_run):
    task = DiffusionTask(
        tiny.diffusion(
            vae_run, clip_run, schedule=ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing")
        )
    )
    first, last = losses_on_one_batch(task, "unet", 5e-3, 60)
    assert last < 0.5 * first


def test_autoencoder_resumes_exactly_with_its_discriminator(tmp_path):
    config = replace(tiny.TRAIN, steps=3, save_every=2)
    train(AutoencoderTask(tiny.autoencoder()), config, tmp_path / "a", {})
    broken = AutoencoderTask(tiny.autoencoder())
    steps = broken.losses
    broken.losses = lambda modules, batch, step: steps(modules, batch, step if step < 2 else None)
    with pytest.raises(TypeError):
        train(broken, config, tmp_path / "b", {})
    train(AutoencoderTask(tiny.autoencoder()), config, tmp_path / "b", {})
    states = [tmp_path / name / "checkpoints" / "step-00000003" / "state" for name in "ab"]
    for part in ("vae", "vae-ema", "discriminator", "discriminator-ema"):
        assert tiny.same(*(weights.load_tensors(state / f"{part}.safetensors") for state in states)), part
    for part in ("vae", "discriminator"):
        a, b = (torch.load(state / f"{part}-optimizer.pt", weights_only=True)["state"] for state in states)
        assert all(tiny.same(a[i], b[i]) for i in a)


def test_latents_are_normalized_after_training_and_decode_as_before(vae_run):
    vae = VAE.from_pretrained(vae_run)
    images = open_dataset(tiny.DATA, "train")
    x = to_float(stack_images([images[i] for i in range(len(images))])["image"])
    with torch.no_grad():
        posterior = vae.encode(x)
        torch.manual_seed(0)
        z = vae.normalize(torch.cat([posterior.sample() for _ in range(8)]))
        raw = VAE(vae.config)
        raw.load_state_dict(weights.load_tensors(vae_run / "checkpoints/step-00000003/state/vae-ema.safetensors"))
        torch.testing.assert_close(vae.decode(posterior.mean), raw.decode_raw(raw.encode(x).mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.02)
    assert vae.config.scaling_factor == 1.0 and vae.config.sample_size == 32


def test_autoencoder_measures_and_shows_held_out_pictures(vae_run):
    lines = (vae_run / "metrics.jsonl").read_text()
    assert all(f'"val/{name}"' in lines for name in ("psnr", "ssim", "perceptual"))
    assert len(list((vae_run / "previews").glob("*.png"))) == 1


@pytest.mark.parametrize(("held_out", "shown"), [(1, (1, 1)), (5, (5, 1)), (11, (8, 1)), (16, (8, 2)), (20, (8, 2))])
def test_a_preview_shows_what_there_is_up_to_two_rows(held_out, shown):
    """Each picture above its reconstruction, whole rows alone, whatever a small folder holds out."""
    task = AutoencoderTask(tiny.autoencoder())
    task.held_out = tiny.samples(held_out)
    task.reconstruct = lambda x: 0 * x
    columns, rows = shown
    picture = np.asarray(task.preview(CPU))[::4, ::4]  # shown four times as large
    assert picture.shape == (64 * rows, 32 * columns, 3)
    halves = rearrange(picture, "(r p h) w c -> r p h w c", r=rows, p=2)
    assert (halves[:, 1] == 128).all() and all((row != 128).any() for row in halves[:, 0])
    first = rearrange(task.held_out[0]["image"].numpy(), "c h w -> h w c")
    assert (halves[0, 0, :, :32] == first).all()


def test_diffusion_refuses_latents_that_are_not_normalized(vae_run, clip_run, tmp_path):
    vae = VAE.from_pretrained(vae_run)
    vae.config = replace(vae.config, scaling_factor=0.1)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="standard deviation 0.10, not about 0 and 1"):
        DiffusionTask(tiny.diffusion(tmp_path, clip_run))
    check_normalized(torch.randn(4, 4, 8, 8))
    with pytest.raises(UserError, match="mean (1.9|2.0)"):
        check_normalized(torch.randn(4, 4, 8, 8) + 2)


def test_unet_training_moves_only_the_unet_and_its_folder_makes_pictures(vae_run, clip_run, tmp_path):
    cache = tmp_path / "latents.safetensors"
    task = DiffusionTask(tiny.diffusion(vae_run, clip_run, cache=str(cache)))
    parts = (task.vae, task.text_encoder, task.modules["unet"])
    before = [tiny.copied(part) for part in parts]
    train(task, replace(tiny.TRAIN, steps=2, save_every=1), tmp_path / "run", {"some": "config"})
    assert [tiny.same(old, part.state_dict()) for old, part in zip(before, parts, strict=True)] == [True, True, False]
    assert cache.is_file() and len(list((tmp_path / "run" / "previews").glob("*.png"))) == 1
    saved = VAE.from_pretrained(tmp_path / "run"), TextEncoder.from_pretrained(tmp_path / "run")
    assert all(map(tiny.same, before, (part.state_dict() for part in saved)))
    finished = Pipeline.from_pretrained(tmp_path / "run")("a red circle", steps=2)[0]
    for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler"):  # as it is before the end
        for file in (tmp_path / "run" / part).iterdir():
            file.unlink()
        (tmp_path / "run" / part).rmdir()
    (tmp_path / "run" / "model_index.json").unlink()
    unfinished = Pipeline.from_pretrained(tmp_path / "run")("a red circle", steps=2)[0]
    assert finished.size == (32, 32) and finished.tobytes() == unfinished.tobytes()


def test_text_encoder_is_trained_along_only_when_asked_to(vae_run, clip_run, tmp_path):
    task = DiffusionTask(tiny.diffusion(vae_run, clip_run, train_text_encoder=True))
    before, vae = tiny.copied(task.text_encoder), tiny.copied(task.vae)
    run = tiny.steps(task, replace(tiny.TRAIN, steps=1), tmp_path)
    assert not tiny.same(before, task.text_encoder.state_dict()) and tiny.same(vae, task.vae.state_dict())
    with run.averaged():
        task.export(tmp_path, CPU, final=True)
    assert not tiny.same(before, TextEncoder.from_pretrained(tmp_path).state_dict())


def test_unfinished_runs_open_by_their_newest_checkpoint(tmp_path):
    for name, task in (("vae", AutoencoderTask(tiny.autoencoder())), ("clip", CLIPTask(tiny.clip()))):
        task.after_step = iter([None, None]).__next__  # a third step ends it
        with pytest.raises(StopIteration):
            train(task, replace(tiny.TRAIN, save_every=1), tmp_path / name, {"some": "config"})
    newest = tmp_path / "vae" / "checkpoints" / "step-00000002" / "vae"
    assert tiny.same(VAE.from_pretrained(tmp_path / "vae").state_dict(), VAE.from_pretrained(newest).state_dict())
    assert TextEncoder.from_pretrained(tmp_path / "clip").config.hidden_size == 32
    assert Tokenizer.from_pretrained(tmp_path / "clip").context_length == 32


def test_dropped_captions_are_empty_at_the_right_rate(unet_task, monkeypatch):
    torch.manual_seed(0)
    dropped = drop_captions(["a red circle"] * 4000, 0.1)
    assert set(dropped) == {"", "a red circle"}
    assert dropped.count("") == pytest.approx(400, abs=4 * math.sqrt(360))
    seen = []
    monkeypatch.setattr(unet_task, "config", replace(unet_task.config, caption_dropout=1.0))
    context = unet_task.context
    monkeypatch.setattr(
        unet_task,
        "context",
        lambda modules, captions, device: seen.extend(captions) or context(modules, captions, device),
    )
    next(unet_task.losses(unet_task.modules, stack_images(tiny.samples(3)), step=0))
    assert seen == ["", "", ""]
    null = Pipeline(unet_task.parts()).encode_prompt([""])
    assert torch.equal(context(unet_task.modules, [""], CPU), null)


def test_loss_of_a_batch_is_the_mean_of_its_halves(unet_task):
    torch.manual_seed(0)
    z0, eps = torch.randn(2, 4, 4, 8, 8)
    t, captions = torch.tensor([10, 300, 600, 900]), ["a red circle", "", "a blue star", "two green squares"]
    modules, parameters = unet_task.modules, list(unet_task.modules["unet"].parameters())
    whole = torch.autograd.grad(unet_task.loss(modules, z0, captions, t, eps), parameters)
    halves = [
        torch.autograd.grad(unet_task.loss(modules, z0[h], captions[h], t[h], eps[h]) / 2, parameters)
        for h in (slice(0, 2), slice(2, 4))
    ]
    for one, first, second in zip(whole, *halves, strict=True):
        torch.testing.assert_close(one, first + second, rtol=1e-3, atol=1e-6)


def test_cached_and_fresh_latents_have_the_same_moments(unet_task, vae_run, clip_run, tmp_path):
    cached = DiffusionTask(tiny.diffusion(vae_run, clip_run, cache=str(tmp_path / "c.safetensors")))
    means = []
    for task in (unet_task, cached):
        batch = task.collate([task.dataset[i] for i in range(4)])
        means.append(torch.stack([task.latents(batch) for _ in range(64)]))
    torch.testing.assert_close(means[0].mean((0, 3, 4)), means[1].mean((0, 3, 4)), rtol=0, atol=0.05)
    assert not torch.equal(means[1][0], means[1][1])  # sampled anew


def test_frozen_parameters_stay_and_patterns_must_match(vae_run, clip_run, tmp_path):
    task = DiffusionTask(tiny.diffusion(vae_run, clip_run, frozen=("down_blocks.*", "conv_in.*")))
    before = tiny.copied(task.modules["unet"])
    tiny.steps(task, replace(tiny.TRAIN, steps=1), tmp_path)
    moved = {name for name, value in task.modules["unet"].state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith(("down_blocks.", "conv_in.")) for name in moved)
    with pytest.raises(UserError, match="'donw_blocks.*' matches no parameter"):
        freeze(task.modules["unet"], ("donw_blocks.*",))
    with pytest.raises(UserError, match="leaves no parameter"):
        freeze(task.modules["unet"], ("*",))


def test_a_decoder_trained_alone_leaves_the_latents_as_they_were(vae_run, tmp_path):
    config = replace(tiny.autoencoder(), vae=str(vae_run), frozen=("encoder.*", "quant_conv.*"))
    task = AutoencoderTask(config)
    tiny.steps(task, replace(tiny.TRAIN, steps=2), tmp_path)
    task.export(tmp_path / "run", CPU, final=True)
    before, after = VAE.from_pretrained(vae_run), VAE.from_pretrained(tmp_path / "run")
    x = to_float(stack_images([task.dataset[i] for i in range(4)])["image"])
    with torch.no_grad():
        z = before.encode(x).mean
        assert torch.equal(after.encode(x).mean, z) and after.config == before.config
        assert not torch.allclose(after.decode_raw(z), before.decode_raw(z))


def test_fine_tuning_starts_from_the_given_unet(unet_task, vae_run, clip_run, tmp_path):
    unet_task.modules["unet"].save_pretrained(tmp_path / "unet")
    tuned = DiffusionTask(replace(tiny.diffusion(vae_run, clip_run), unet=str(tmp_path)))
    assert tiny.same(tiny.copied(tuned.modules["unet"]), tiny.copied(unet_task.modules["unet"]))
    unet_task.export(tmp_path / "run", CPU, final=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiffusionTask(tiny.diffusion(vae_run, clip_run, unet=str(tmp_path / "run")))
    other = ScheduleConfig(prediction_type="v_prediction", sampler="ddim")
    with pytest.warns(UserWarning, match="trained with schedule.prediction_type 'epsilon', here 'v_prediction'$"):
        DiffusionTask(tiny.diffusion(vae_run, clip_run, unet=str(tmp_path / "run"), schedule=other))
    UNet(replace(tuned.modules["unet"].config, cross_attention_dim=16)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="cross_attention_dim 16, VAE and text encoder need 32"):
        DiffusionTask(replace(tiny.diffusion(vae_run, clip_run), unet=str(tmp_path / "other")))


def test_parts_that_diffusers_and_transformers_saved_are_trained_on(vae_run, clip_run, tmp_path):
    """As most will begin: a Stable Diffusion VAE and U-Net, and a whole CLIP as OpenAI's is published."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTokenizer

    AutoencoderKL.from_pretrained(vae_run / "vae").save_pretrained(tmp_path / "sd" / "vae")
    CLIPModel.from_pretrained(clip_run / "clip").save_pretrained(tmp_path / "openai")
    CLIPTokenizer.from_pretrained(clip_run / "tokenizer").save_pretrained(tmp_path / "openai")
    DiffusionTask(tiny.diffusion(vae_run, clip_run)).modules["unet"].save_pretrained(tmp_path / "ours")
    start = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    start.save_pretrained(tmp_path / "sd" / "unet")
    config = tiny.diffusion(tmp_path / "sd", tmp_path / "openai", unet=str(tmp_path / "sd"), frozen=("mid_block.*",))
    train(DiffusionTask(config), replace(tiny.TRAIN, steps=1), tmp_path / "run", {})
    made = StableDiffusionPipeline.from_pretrained(tmp_path / "run")
    trained, before = made.unet.state_dict(), start.state_dict()
    still = {name for name in before if torch.equal(trained[name], before[name])}
    assert {name for name in before if name.startswith("mid_block.")} <= still < before.keys()
    assert tiny.same(made.vae.state_dict(), AutoencoderKL.from_pretrained(vae_run / "vae").state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": ""}, "'vae' is empty"),
        ({"vae": "no-such-model"}, "unknown model 'no-such-model'"),
        ({"caption_dropout": 1.5}, r"'caption_dropout' is 1.5; it must be in \[0, 1\]"),
        ({"cache": "c", "data": replace(tiny.DATA, flip=True)}, "holds no mirrored pictures"),
        ({"schedule": ScheduleConfig(sampler="plms")}, f"'plms' is unknown; allowed: {', '.join(SAMPLERS)}"),
        ({"data": replace(tiny.DATA, size=36)}, "data.size 36 must be a multiple of 8"),
        ({"data": replace(tiny.DATA, name="shape")}, "unknown data set 'shape'"),
    ],
)
def test_diffusion_config_mistakes(vae_run, clip_run, changes, message):
    with pytest.raises(UserError, match=message):
        DiffusionTask(tiny.diffusion(**{"vae": vae_run, "text_encoder": clip_run} | changes))


def test_sizes_that_cannot_be_trained_are_refused():
    autoencoder, clip = tiny.autoencoder(), tiny.clip()
    with pytest.raises(UserError, match="data.size 30 must be a multiple of 4"):
        AutoencoderTask(replace(autoencoder, data=replace(tiny.DATA, size=30)))
    with pytest.raises(UserError, match="too small for loss.discriminator_layers 4"):
        AutoencoderTask(tiny.autoencoder(loss=replace(tiny.LOSS, discriminator_layers=4)))
    with pytest.raises(UserError, match="data.size 28 must be a multiple of vision.patch_size 8"):
        CLIPTask(replace(clip, data=replace(tiny.DATA, size=28)))
    with pytest.raises(UserError, match="'loss.kl' is -1"):
        replace(tiny.LOSS, kl=-1)


def test_pictures_that_share_a_caption_are_not_negatives(monkeypatch):
    captions = [["a", "b"], ["c"], ["b", "d"], ["c", "e"]]
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 2] = expected[2, 0] = expected[1, 3] = expected[3, 1] = True
    assert torch.equal(sharing(captions), expected)
    task = CLIPTask(tiny.clip())
    batch = stack_images(tiny.samples(3))
    batch["captions"] = [["a red circle", "one red circle"], ["a red circle", "the red circle"], ["a blue star"]]
    found = []
    monkeypatch.setattr(
        "ldm.train.clip.losses.contrastive", lambda images, texts, scale, same: found.append(same) or images.sum()
    )
    next(task.losses(task.modules, batch, step=0))
    assert found[0].tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_captions_of_shapes_fit_the_context_of_their_config():
    config = load(CLIPConfig, Path(__file__).parent.parent / "configs" / "shapes" / "clip.toml")
    data = Shapes(32, "train", 1000)
    captions = [caption for i in range(len(data)) for caption in data.captions(i)]
    tokenizer = Tokenizer.train(captions, config.vocab_size, 40)
    words = (tokenizer(captions, warn=False) != tokenizer.eos_token_id).sum(1)
    assert int(words.max()) + 1 <= config.text.max_position_embeddings


def test_clip_scale_is_clamped_after_a_step(tmp_path):
    task = CLIPTask(tiny.clip())
    with torch.no_grad():
        task.modules["clip"].logit_scale.fill_(6.0)
    tiny.steps(task, replace(tiny.TRAIN, steps=1), tmp_path)
    assert task.modules["clip"].logit_scale.detach().exp().item() == pytest.approx(MAX_SCALE)


def test_retrieval_is_logged_beside_chance(clip_run):
    lines = (clip_run / "metrics.jsonl").read_text()
    told = json.loads(next(line for line in lines.splitlines() if '"val/' in line))
    names = ("image_to_text@1", "image_to_text@5", "text_to_image@1", "text_to_image@5", "chance@1", "chance@5")
    for name in (*names, "one_word_wrong"):
        assert f"val/{name}" in told
    held_out = open_dataset(tiny.DATA, "val")
    captions = [set(held_out.captions(i)) for i in spread(held_out, 16)]
    right = sum(bool(a & b) for a in captions for b in captions)  # two pictures may share a caption
    assert told["val/chance@1"] == pytest.approx(right / 16**2)


def test_a_judge_learns_from_validation_too_and_cannot_condition(tmp_path, vae_run):
    task = CLIPTask(replace(tiny.clip(), judge=True))
    train_split, val = open_dataset(tiny.DATA, "train"), open_dataset(tiny.DATA, "val")
    assert len(task.dataset) == len(train_split) + len(val)
    for place, sample in ((0, train_split[0]), (len(train_split) - 1, train_split[len(train_split) - 1])):
        assert task.dataset[place]["key"] == sample["key"] and task.dataset.captions(place) == sample["captions"]
    for place in (0, len(val) - 1):
        assert task.dataset[len(train_split) + place]["key"] == val[place]["key"]
        assert task.dataset.captions(len(train_split) + place) == val[place]["captions"]
    train(task, replace(tiny.TRAIN, steps=1), tmp_path / "run", {})
    assert image_text_model(str(tmp_path / "run")).size == tiny.DATA.size
    assert not (tmp_path / "run/clip").exists() and not (tmp_path / "run/text_encoder").exists()
    train(task, replace(tiny.TRAIN, steps=1), tmp_path / "run", {})  # finished: nothing more is done
    with pytest.raises(UserError, match="text_encoder|tokenizer"):
        DiffusionTask(tiny.diffusion(vae_run, tmp_path / "run"))


def layout(tensor: torch.Tensor) -> list[int]:
    """Strides of the axes that have any."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def test_weights_gradients_and_moments_lie_alike_in_memory(unet_task, tmp_path):
    """torch's fused AdamW on a CPU takes them for that, without a look (2.15); after a resume, too."""
    tasks = (AutoencoderTask(tiny.autoencoder()), CLIPTask(tiny.clip()), unet_task)
    for i, task in enumerate(tasks):
        run = tiny.steps(task, tiny.TRAIN, tmp_path / f"{i}", count=1)
        run.save(1)
        run.resume()
        run.gradients(run.batches(1), 1)
        optimizers = run.trained.optimizers.values()
        assert all(optimizer.defaults["fused"] for optimizer in optimizers)
        for optimizer in optimizers:
            for weight, moments in optimizer.state.items():
                for other in (weight.grad, moments["exp_avg"], moments["exp_avg_sq"]):
                    assert other is None or layout(other) == layout(weight)


def test_joined_data_sets_keep_shards_together():
    class Part(list):
        pass

    shards, plain = Part(range(5)), Part(range(3))
    shards.lengths = [2, 3]
    assert Joined([shards, plain]).lengths == [2, 3, 3]
    assert not hasattr(Joined([plain, plain]), "lengths")
