"""What a user can do from a shell: every README command, option, kind of error and exit code, by scripts/ alone.

The tests hold names, values, files and exit codes. Wordings are free: an error must name what is wrong and allowed.
"""

import json
import re
import signal

import pytest
from inventory_tools import ROOT, Scripts, checkpoints, difference, files, flat, metrics, own_images, refuse, succeed
from PIL import Image

CONFIGS = ROOT / "configs"
TOWER = ["hidden_size=32", "intermediate_size=32", "num_hidden_layers=1", "num_attention_heads=2", "projection_dim=16"]
TRAIN = ["train.steps=3", "train.batch_size=4", "train.save_every=2", "train.log_every=1", "train.optimizer.warmup=1"]
SHAPES = ["data.length=24"]
VAE = ["model.block_out_channels=[8,8,16,16]", "model.layers_per_block=1", "model.norm_num_groups=4"]
GAN = ["loss.gan_start=1", "loss.gan_ramp=1", "loss.discriminator_channels=4", "loss.discriminator_layers=2"]
AUTOENCODER = [*VAE, *GAN, "loss.perceptual_depth=1", "statistics=24", "held_out=8", *TRAIN]
CLIP = [f"{part}.{size}" for part in ("text", "vision") for size in TOWER]
CLIP += ["vocab_size=560", "vision.patch_size=8", "held_out=16", *TRAIN]
READERS = ["grounding.words=1.0", "grounding.picture=1.0", "grounding.layers=1", "grounding.window=3"]
UNET = ["model.block_out_channels=[16,32]", 'model.down_block_types=["CrossAttnDownBlock2D","DownBlock2D"]']
UNET += ['model.up_block_types=["UpBlock2D","CrossAttnUpBlock2D"]', "model.layers_per_block=1"]
UNET += ["model.attention_head_dim=2", "model.norm_num_groups=4"]
DIFFUSION = [*UNET, "preview.count=2", "preview.steps=2", "held_out=4", *TRAIN]
PARTS = ["vae=vae", "text_encoder=clip"]
SETTINGS = ["prompt", "negative_prompt", "seed", "sampler", "steps", "guidance", "guidance_rescale", "model"]
SAMPLERS = ["ddpm", "ddim", "euler", "euler_a", "heun", "dpmpp_2m", "unipc", "pndm"]
EVALUATION = ["--data", "shapes", "--num", "16", "--steps", "2", "--train-num", "16", "--features", "none"]


def training(kind: str, out: str, *overrides: str, family: str = "shapes", config: str = "") -> tuple[str, ...]:
    """The command of a training by a shipped config."""
    path = CONFIGS / family / f"{config or kind}.toml"
    return (f"train_{kind}", "--config", str(path), "--out", out, *overrides)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Scripts:
    """Runs scripts in a folder with a tiny autoencoder, text encoder, judge and model, and with pictures."""
    folder = tmp_path_factory.mktemp("inventory")
    scripts = Scripts(folder, tmp_path_factory.mktemp("logs"))
    own_images(folder / "photos")
    Image.new("RGB", (50, 40), "red").save(folder / "red.png")
    Image.new("L", (50, 40), "black").save(folder / "black.png")
    Image.new("L", (40, 50), "black").save(folder / "tall.png")
    (folder / "prompts.txt").write_text("a red circle\n\nzwei Grün\n", encoding="utf-8")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "empty").mkdir()
    succeed(scripts(*training("autoencoder", "vae", *AUTOENCODER, *SHAPES)))
    succeed(scripts(*training("clip", "clip", *CLIP, *READERS, *SHAPES)))
    cache = "cache=latents.safetensors"
    succeed(scripts(*training("diffusion", "model", *DIFFUSION, *PARTS, cache, *SHAPES)))
    return scripts


# --- options ---------------------------------------------------------------------------------------------------------

TRAINING = "config out force"
OPTIONS = {
    "train_autoencoder": TRAINING,
    "train_clip": TRAINING,
    "train_diffusion": TRAINING,
    "train_distill": TRAINING,
    "train_preference": TRAINING,
    "sample": "model prompt prompts out steps guidance guidance-rescale sampler seed negative-prompt image mask"
    " resample strength interpolate seed-to height width batch-size compile precision grid device",
    "evaluate": "model autoencoder images reference data data-path split num guidance choose-on guidance-rescale steps"
    " sampler features judge train-num train-captions baseline size without-frechet perceptual seed batch-size out"
    " device",
    "app": "model port host out device seed",
    "benchmark": "only rounds threads device dtype quick compile out",
    "compare_diffusers": "prompt steps guidance seed",
    "plan_training": "family pictures epochs size gpus peak utilization rate price bandwidth storage caption-bytes"
    " picture-bytes no-cache measure batch accumulate",
    "plot_metrics": "out",
    "prepare_data emoji": "size out packages compact",
    "show_results": "results out",
}


def test_every_script_is_listed():
    assert sorted(key.split()[0] for key in OPTIONS) == sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("script", OPTIONS)
def test_help_names_every_option(run, script):
    out = succeed(run(*script.split(), "--help"))
    assert all(re.search(rf"--{option}\b", out) for option in OPTIONS[script].split()), out


# --- trainings -------------------------------------------------------------------------------------------------------

DATA_KEYS = "data.name data.path data.size data.length data.seed data.flip data.max_pixels data.max_broken"
TRAIN_KEYS = (
    "steps batch_size accumulate seed precision clip workers ema_decay ema_power log_every validate_every preview_every"
    " save_every keep best max_skipped optimizer.lr optimizer.muon_lr optimizer.betas optimizer.eps"
    " optimizer.weight_decay optimizer.warmup optimizer.decay optimizer.final_lr"
)
SHARED_KEYS = [*DATA_KEYS.split(), *(f"train.{key}" for key in TRAIN_KEYS.split()), "frozen", "held_out"]
KEYS = {
    "vae": "vae statistics model.in_channels model.out_channels model.block_out_channels model.layers_per_block"
    " model.latent_channels model.norm_num_groups model.sample_size model.scaling_factor model.shift_factor"
    " model.mid_block_add_attention loss.l2 loss.perceptual loss.perceptual_net loss.perceptual_path"
    " loss.perceptual_depth loss.kl loss.gan loss.gan_start loss.gan_ramp loss.gan_maximum loss.discriminator_lr"
    " loss.discriminator_channels loss.discriminator_layers",
    "clip": "vocab_size tokenizer text_encoder judge text.hidden_size text.intermediate_size text.num_hidden_layers"
    " text.num_attention_heads text.max_position_embeddings text.hidden_act text.layer_norm_eps text.projection_dim"
    " vision.patch_size vision.num_channels vision.hidden_size vision.intermediate_size vision.num_hidden_layers"
    " vision.num_attention_heads vision.hidden_act vision.layer_norm_eps vision.projection_dim grounding.words"
    " grounding.picture grounding.window grounding.layers",
    "model": "vae text_encoder unet cache caption_dropout timesteps logit_mean logit_std min_snr_gamma"
    " train_text_encoder model.block_out_channels model.down_block_types model.up_block_types model.layers_per_block"
    " model.transformer_layers_per_block model.attention_head_dim model.norm_num_groups model.norm_eps"
    " model.use_linear_projection schedule.beta_schedule schedule.beta_start schedule.beta_end"
    " schedule.num_train_timesteps schedule.rescale_betas_zero_snr schedule.prediction_type schedule.timestep_spacing"
    " schedule.steps_offset schedule.set_alpha_to_one schedule.sampler preview.prompts preview.count preview.steps"
    " preview.guidance preview.seed",
}
LOGGED = {
    "vae": "vae_loss l1 perceptual kl gan_weight discriminator_loss logits_real logits_fake val/psnr val/ssim"
    " val/perceptual",
    "clip": "clip_loss contrastive words picture scale val/image_to_text@1 val/text_to_image@1 val/one_word_wrong",
    "model": "unet_loss z_std val/loss",
}
EXPORTED = {
    "vae": "vae/config.json vae/diffusion_pytorch_model.safetensors previews/step-00000003.png",
    "clip": "clip/config.json clip/model.safetensors clip/vocab.json clip/preprocessor_config.json"
    " text_encoder/config.json text_encoder/model.safetensors tokenizer/vocab.json tokenizer/merges.txt"
    " tokenizer/tokenizer_config.json",
    "model": "model_index.json vae/config.json unet/config.json unet/diffusion_pytorch_model.safetensors"
    " text_encoder/config.json tokenizer/vocab.json scheduler/scheduler_config.json previews/step-00000003.png",
}


@pytest.mark.parametrize("name", KEYS)
def test_a_run_folder_holds_config_log_checkpoints_and_model(run, name):
    folder = run.cwd / name
    assert files(folder) >= {"config.json", "metrics.jsonl", "starts.jsonl", *EXPORTED[name].split()}
    assert checkpoints(folder) == ["step-00000002", "step-00000003"] and list((folder / "tensorboard").iterdir())
    config = flat(json.loads((folder / "config.json").read_text()))
    assert config.keys() >= {*KEYS[name].split(), *SHARED_KEYS} - {"frozen"} and config["train.steps"] == 3
    lines = metrics(folder)
    assert {line["step"] for line in lines} == {1, 2, 3}
    logged = {key for line in lines for key in line}
    assert logged >= {*LOGGED[name].split(), "lr", "skipped"} and any(key.endswith("_grad_norm") for key in logged)
    start = json.loads((folder / "starts.jsonl").read_text().splitlines()[0])
    assert start["packages"]["torch"] and "train.steps=3" in start["command"] and "commit" in start


def test_every_key_can_be_given_on_the_command_line(run):
    """Every value of a resolved config, given back as `key=value`, makes the same config."""
    for name, kind in (("vae", "autoencoder"), ("clip", "clip"), ("model", "diffusion")):
        config = flat(json.loads((run.cwd / name / "config.json").read_text()))
        given = [f"{key}={json.dumps(value)}" for key, value in config.items() if value is not None]
        succeed(run(f"train_{kind}", "--config", "blank.txt", "--out", f"same-{name}", *given))
        assert config == flat(json.loads((run.cwd / f"same-{name}" / "config.json").read_text()))


def test_the_same_command_resumes_and_changed_keys_need_force(run):
    args = [*CLIP, *SHAPES, "train.keep=3", "train.best=-image_to_text@1", "train.validate_every=1"]
    succeed(run(*training("clip", "again", *args, "train.steps=2")))
    steps = [line["step"] for line in metrics(run.cwd / "again")]
    succeed(run(*training("clip", "again", *args, "train.steps=2")))  # finished: nothing is done
    assert [line["step"] for line in metrics(run.cwd / "again")] == steps
    changed = run(*training("clip", "again", *args, "train.optimizer.lr=0.5"))
    refuse(changed, "train.optimizer.lr", "0.002", "0.5", "--force")
    succeed(run(*training("clip", "again", *args)))
    succeed(run(*training("clip", "again", *args, "train.steps=4", "train.optimizer.lr=0.5"), "--force"))
    assert max(line["step"] for line in metrics(run.cwd / "again")) == 4
    assert 3 <= len(checkpoints(run.cwd / "again")) <= 4 and checkpoints(run.cwd / "again")[-1] == "step-00000004"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_the_command_goes_on(run, number, code):
    name = f"stopped-{code}"
    args = training("clip", name, *CLIP, *SHAPES, "train.save_every=0")
    outcome = run(*args, "train.steps=100000", signal=number, when=f"{name}/metrics.jsonl")
    assert outcome.code == code and "Traceback" not in outcome.err, outcome.err[-3000:]
    done = int(checkpoints(run.cwd / name)[-1].removeprefix("step-"))
    succeed(run(*args, f"train.steps={done + 1}"))
    assert [line["step"] for line in metrics(run.cwd / name) if "lr" in line] == [*range(1, done + 2)]


def test_trainings_on_own_images(run):
    """The README's three commands with the emoji configs, tiny; a broken picture is listed, not fatal."""
    data = ["data.name=folder", "data.path=photos", "data.size=32", "train.workers=1"]
    emoji = {"family": "emoji"}
    succeed(run(*training("autoencoder", "mine/vae", *AUTOENCODER, *data, "data.flip=true", **emoji)))
    (line,) = map(json.loads, (run.cwd / "mine/vae/left_out.jsonl").read_text().splitlines())
    assert any("0.jpg" in str(value) for value in line.values())
    succeed(run(*training("clip", "mine/clip", *CLIP, *READERS, *data, **emoji)))
    parts = ["vae=mine/vae", "text_encoder=mine/clip", "cache=mine/latents.safetensors", "train.workers=0"]
    succeed(run(*training("diffusion", "mine/model", *DIFFUSION, *data, *parts, **emoji)))
    sample(run, "mine/out", "--prompt", "colour", "--steps", 2, model="mine/model")
    succeed(run(*training("clip", "mine/judge", *CLIP, *data, config="judge", **emoji)))
    assert "judge/config.json" in files(run.cwd / "mine/judge") and not (run.cwd / "mine/judge/text_encoder").exists()
    own = ["--model", "mine/model", "--data", "folder", "--data-path", "photos", "--judge", "mine/judge", *NEW]
    refuse(run("evaluate", *own), "mine/judge", "16")  # it has not learned enough to judge


def test_trainings_from_shards_and_shipped_weights(run):
    shards = ["data.name=shards", "data.path=shards.tar", "data.size=32"]
    frozen = ["vae=shapes", 'frozen=["encoder.*","quant_conv.*"]', "loss.gan=0", "train.accumulate=2"]
    succeed(run(*training("autoencoder", "tuned/vae", *AUTOENCODER, *shards, *frozen)))
    few = [*TRAIN, *shards, "train.steps=1", "held_out=2"]
    succeed(run(*training("clip", "tuned/clip", *few, "text_encoder=shapes", *CLIP, "train.steps=1")))
    parts = ["vae=tuned/vae", "text_encoder=shapes", "unet=shapes", "cache=", 'frozen=["down_blocks.*"]']
    more = ["preview.count=1", "preview.steps=1", "train_text_encoder=true", "min_snr_gamma=5"]
    succeed(run(*training("diffusion", "tuned/model", *few, *parts, *more, "timesteps=stratified")))
    config = json.loads((run.cwd / "tuned/model/unet/config.json").read_text())
    assert config == json.loads((ROOT / "ldm/assets/models/shapes/unet/config.json").read_text())


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_is_accepted(run, path):
    """Its keys and values are checked before the unknown data set is refused."""
    kind = re.match("autoencoder|diffusion|distill|preference|", path.stem)[0] or "clip"
    parts = ["vae=shapes", "text_encoder=shapes", "data.size=32", *UNET] if kind == "diffusion" else []
    parts += ["scorer=judge:shapes"] * (kind == "preference")  # which asks captions of the data
    refuse(run(f"train_{kind}", "--config", path, "--out", "new", "data.name=cats", *parts), "cats", "shards")


# --- sampling --------------------------------------------------------------------------------------------------------


def sample(run: Scripts, out: str, *options: object, model: str = "model") -> list[Image.Image]:
    """The pictures, in order, that scripts/sample.py wrote into the folder `out`."""
    succeed(run("sample", "--model", model, "--out", out, *options))
    paths = sorted(path for path in (run.cwd / out).glob("*.png") if path.name[0].isdigit())
    images = [Image.open(path) for path in paths]
    for image in images:
        image.load()
    return images


def test_prompts_become_pngs_that_say_how_they_were_made(run):
    prompts = ["--prompt", "a red circle", "--prompt", "zwei Grün"]
    images = sample(run, "out", *prompts, "--steps", 2, "--seed", 7, "--guidance", 3, "--negative-prompt", "blue")
    assert files(run.cwd / "out") == {"0000-a-red-circle.png", "0001-zwei-gr-n.png", "grid.png"}
    said = ["zwei Grün", "blue", "8", "ddim", "2", "3.0", "0.0", "model"]
    text = images[1].text
    others = {"device", "dtype", "parameters"}  # later additions: for the record, and for other programs
    assert {name: text[name] for name in text.keys() - others} == dict(zip(SETTINGS, said, strict=True))
    assert [image.size for image in images] == [(32, 32)] * 2


def test_a_picture_does_not_depend_on_its_batch(run):
    prompts = ["--prompt", "a", "--prompt", "b", "--prompt", "c", "--steps", 3, "--sampler", "euler_a", "--seed", 5]
    batches = [sample(run, f"batch-{size}", *prompts, "--batch-size", size) for size in (1, 3)]
    assert all(difference(a, b) <= 1 for a, b in zip(*batches, strict=True))
    (alone,) = sample(run, "alone", "--prompt", "c", "--steps", 3, "--sampler", "euler_a", "--seed", 7)
    assert difference(alone, batches[0][2]) <= 1 and difference(alone, batches[0][1]) > 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler(run, name):
    (image,) = sample(run, f"by-{name}", "--prompt", "a", "--steps", 3, "--sampler", name)
    assert image.text["sampler"] == name


def test_the_demo(run):
    """The two commands of `make demo`, with fewer steps."""
    demo = ["--guidance", 3, "--guidance-rescale", 0.7, "--grid", "grids/demo.png"]
    for model in ("shapes", "emoji"):
        images = sample(run, model, "--prompts", CONFIGS / model / "demo.txt", "--steps", 2, *demo, model=model)
        assert len(images) >= 4 and images[0].text["guidance_rescale"] == "0.7" and images[0].text["model"] == model
    assert (run.cwd / "grids/demo.png").is_file() and not (run.cwd / "shapes/grid.png").exists()


def test_from_a_picture_with_a_mask(run):
    edit = ["--image", "red.png", "--steps", 4, "--strength", 0.5, "--device", "cpu"]
    (image,) = sample(run, "edited", *edit, "--prompt", "a", "--height", 64, "--width", 64)
    assert image.size == (64, 64) and image.text["image"] == "red.png" and image.text["strength"] == "0.5"
    (kept,) = sample(run, "kept", *edit, "--prompt", "a", "--mask", "black.png", "--resample", 2)
    (other,) = sample(run, "kept-too", *edit, "--prompt", "b", "--mask", "black.png", "--sampler", "euler")
    assert difference(kept, other) <= 1  # under a black mask everything stays, whatever is asked for
    assert kept.text["mask"] == "black.png" and kept.text["resample"] == "2"


def test_from_one_prompt_to_another(run):
    ends = ["--prompt", "a red circle", "--prompt", "a blue star", "--seed", 3, "--steps", 2]
    first, last = sample(run, "ends", *ends)
    path = sample(run, "path", *ends, "--interpolate", 4, "--seed-to", 4)
    assert len(path) == 4 and difference(first, path[0]) <= 1 and difference(last, path[3]) <= 1
    assert path[3].text["seed_to"] == "4" and path[3].text["share"] == "1"
    with Image.open(run.cwd / "path/path.gif") as gif:
        assert gif.n_frames == 4


def test_the_same_commands_give_the_same_bytes(run):
    """In processes of their own; the log of starts has times in it."""
    succeed(run(*training("autoencoder", "vae-again", *AUTOENCODER, *SHAPES)))
    for out in ("once", "twice"):
        sample(run, out, "--prompt", "a red circle", "--steps", 2)
    for one, two in (("vae", "vae-again"), ("once", "twice")):
        one, two = run.cwd / one, run.cwd / two
        names = {name for name in files(one) if not name.startswith(("tensorboard", "starts.jsonl", ".lock"))}
        assert len(names) > 1 and all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_a_cut_prompt_is_a_warning(run):
    outcome = run("sample", "--model", "model", "--prompt", "a red circle " * 15 + "end", "--steps", 1, "--out", "cut")
    assert outcome.code == 0 and any(x.startswith("warning: ") and "end" in x for x in outcome.err.splitlines())


# --- evaluations and the other scripts --------------------------------------------------------------------------------


def evaluation(run: Scripts, out: str, *options: object) -> tuple[dict, dict[tuple[str, str], dict]]:
    """The settings of an evaluation, and its records by metric and by what was measured."""
    succeed(run("evaluate", "--out", out, *options))
    page = (run.cwd / out / "report.html").read_text()
    assert "<html" in page and not re.search(r"<(script|link|img)[^>]+(src|href)=.?https?:", page)
    found = json.loads((run.cwd / out / "metrics.json").read_text())
    assert isinstance(found["format"], str)
    return found["settings"], {(record["metric"], record["of"]): record for record in found["results"]}


def test_evaluation_of_a_model(run):
    options = ["--model", "model", *EVALUATION, "--features", "judge", "--sampler", "euler", "--seed", 3]
    settings, found = evaluation(run, "eval", *options, "--guidance", "1,3", "--guidance-rescale", 0.5)
    assert settings.items() >= {"model": "model", "split": "test", "num": 16, "steps": 2, "sampler": "euler"}.items()
    assert len(files(run.cwd / "eval/pictures")) >= 17 <= len(files(run.cwd / "eval/validation/pictures")) // 2
    for metric in ("clip_cosine", "clip_score", "image_to_text@1", "text_to_image@1", "cmmd"):
        record = found[metric, "samples"]
        assert record["n"] > 0 and len(record["interval"]) == 2 and record["guidance"] in (1, 3), record
    assert len(found["clip_cosine", "samples"]["each"]) == 16
    wanted = "compositional_score scene_accuracy seconds_per_picture parameters kernel_distance precision"
    assert not {(metric, "samples") for metric in [*wanted.split(), "blank_pictures"]} - set(found)
    others = ["real held-out", "reconstructions", "untrained", "samples, shuffled captions"]
    assert not {("clip_cosine", other) for other in others} - set(found)
    assert not {("psnr_db", "reconstructions"), ("clip_cosine_change", "typos")} - set(found)
    before = {path: path.stat().st_mtime_ns for path in (run.cwd / "eval/pictures").rglob("*.png")}
    evaluation(run, "eval", *options, "--guidance", "1,3", "--guidance-rescale", 0.5)  # what was made is kept
    assert before == {path: path.stat().st_mtime_ns for path in (run.cwd / "eval/pictures").rglob("*.png")}
    rescaled = ["--guidance", "1", "--guidance-rescale", 0.5, "--baseline", "eval"]
    evaluation(run, "eval-other", *options, *rescaled, "--judge", "shapes", "--device", "cpu")
    refuse(run("evaluate", "--out", "eval", *options), "eval", "--out")
    refuse(run("evaluate", "--out", "eval-new", *options, *rescaled, "--seed", 4), "eval", "seed")


def test_evaluation_of_folders(run):
    for name, seed in (("a", 0), ("b", 100)):
        sample(run, name, *(("--prompt", "a") * 16), "--steps", 1, "--seed", seed, "--grid", f"{name}.png")
        lines = [{"file_name": path.name, "text": "a red circle"} for path in (run.cwd / name).glob("*.png")]
        (run.cwd / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--images", "a", "--reference", "b", "--judge", "shapes", "--without-frechet", "--size", 64]
    _, found = evaluation(run, "eval-folders", *options)
    wanted = "kernel_distance precision recall density coverage inception_score cmmd clip_cosine clip_score"
    assert not set(wanted.split()) - {metric for metric, _ in found}
    refuse(run("evaluate", "--images", "a", "--reference", "b", "--out", "new"), "16", "1281", "--without-frechet")
    judge = ["--features", "judge:shapes", "--judge", "none", "--without-frechet"]
    evaluation(run, "eval-judge", "--images", "a", "--reference", "b", *judge)


def test_evaluation_of_an_autoencoder(run):
    options = ["--num", 16, "--features", "none", "--perceptual", "effnet-lite0"]
    settings, found = evaluation(run, "eval-vae", "--autoencoder", "vae", "--data", "shapes", *options)
    assert settings["autoencoder"] == "vae" and found["psnr_db", "reconstructions"]["n"] == 16
    wanted = "ssim sharpness perceptual_distance bits_per_dimension latent_channels rate_distortion linear_probe"
    assert not {*wanted.split(), "v_measure"} - {metric for metric, _ in found}
    own = ["--data", "folder", "--data-path", "photos", "--size", 64]
    settings, _ = evaluation(run, "eval-own", "--autoencoder", "vae", *own, *options)
    assert settings["size"] == 64


def test_the_other_scripts(run):
    out = succeed(run("compare_diffusers", "model", "--prompt", "a", "--steps", 3, "--guidance", "1,3", "--seed", 3))
    numbers = [[float(value) for value in line.split()[-2:]] for line in out.splitlines()[1:]]
    assert len(numbers) == 9 and all(found <= 1e-4 * max(largest, 1) or largest > 200 for found, largest in numbers)
    assert all(found <= 1 for found, _ in numbers)
    plan = "--pictures 1e6 --epochs 2 --size 256 --gpus 16 --peak 500 --utilization 25,35 --price 2 --bandwidth 50"
    more = "--storage 5 --caption-bytes 90 --picture-bytes 9000 --no-cache --batch 8 --accumulate 2"
    out = succeed(run("plan_training", "--family", CONFIGS / "sd15", *plan.split(), *more.split()))
    assert "125" in out and "175" in out  # TFLOP/s of a GPU
    assert "42" in succeed(run("plan_training", "--family", CONFIGS / "sd15", "--rate", "42"))
    succeed(run("plan_training", *f"--measure 1 --family {CONFIGS}/shapes --size 32 --batch 2".split()))
    succeed(run("show_results", "--results", CONFIGS / "emoji/results", "--out", "curves/results.svg"))
    assert (run.cwd / "curves/results.svg").read_text().startswith("<svg")
    succeed(run("plot_metrics", "vae", "model/metrics.jsonl", CONFIGS / "emoji/results/clip.jsonl", "--out", "p.html"))
    assert all(name in (run.cwd / "p.html").read_text() for name in ("vae_loss", "unet_loss", "val/psnr"))


def test_benchmark(run):
    options = "--only data --quick --rounds 1 --threads 1 --device cpu --out bench"
    succeed(run("benchmark", *options.split()))
    assert files(run.cwd / "bench") >= {"benchmark.json", "benchmark.md", "benchmark.html"}
    assert isinstance(json.loads((run.cwd / "bench/benchmark.json").read_text()), dict)


# --- mistakes ---------------------------------------------------------------------------------------------------------

NEW = ["--out", "new"]
MODEL = ["sample", *NEW, "--model", "model"]
CIRCLE = [*MODEL, "--prompt", "a red circle"]
IMAGE = [*CIRCLE, "--image", "red.png"]
EVALUATE = ["evaluate", *NEW, "--model", "model", *EVALUATION]
CODES = ["evaluate", *NEW, "--autoencoder", "vae", "--data", "shapes"]
FOLDERS = ["evaluate", *NEW, "--images", "photos/test", "--reference", "photos/train"]
COMPARE = ["compare_diffusers", "model"]
PLAN = ["plan_training", "--family", str(CONFIGS / "sd15")]
OWN = ["data.name=folder"]
ODD = ["model.block_out_channels=[15,30]", "model.norm_num_groups=5", "model.attention_head_dim=3"]
ZERO_SNR = ["schedule.prediction_type=epsilon", "schedule.rescale_betas_zero_snr=true"]


def wrong(kind: str, *overrides: str) -> list[str]:
    """A tiny training with a mistake in it."""
    sizes = {"autoencoder": AUTOENCODER, "clip": CLIP, "diffusion": [*DIFFUSION, *PARTS, "cache="]}[kind]
    return [*training(kind, "new", *sizes, *SHAPES, *overrides)]


MISTAKES = [
    (wrong("clip", "train.step=3"), "train.step", "steps"),
    (wrong("autoencoder", "loss.lpips=1"), "loss.lpips"),
    (wrong("diffusion", 'train.steps="many"'), "train.steps", "many", "int"),
    (wrong("autoencoder", "train.batch_size=0"), "train.batch_size", "0", "1"),
    (wrong("autoencoder", "loss.gan=-1"), "loss.gan", "-1", "0"),
    (wrong("clip", "train.precision=fp16"), "train.precision", "fp16", "bf16"),
    (wrong("clip", "train=3"), "train", "3"),
    (wrong("clip", "steps"), "steps", "key.path=value"),
    (["train_clip", *NEW], "--config"),
    (["train_clip", *NEW, "--config", "missing.toml"], "missing.toml"),
    (["train_clip", *NEW, "--config", "prompts.txt"], "prompts.txt", "TOML"),
    (wrong("clip", "--out", "blank.txt"), "blank.txt", "--out"),
    (wrong("autoencoder", "data.name=cats"), "cats", "shapes", "emoji", "folder", "shards"),
    (wrong("autoencoder", "loss.perceptual_net=vgg"), "vgg", "effnet-lite0", "lpips-vgg", "lpips-alex"),
    (wrong("clip", *OWN), "path", "data.path"),
    (wrong("clip", *OWN, "data.path=nowhere"), "nowhere"),
    (wrong("autoencoder", *OWN, "data.path=empty"), "empty"),
    (wrong("clip", *OWN, "data.path=a-bare"), "red.png", "red.txt"),
    (wrong("autoencoder", *OWN, "data.path=photos", "data.max_broken=0", "--out", "broken"), "0.jpg"),
    (wrong("autoencoder", "data.size=36"), "data.size", "36", "8"),
    (wrong("diffusion", "data.size=40"), "data.size", "40", "16"),
    (wrong("clip", "data.size=36"), "36", "patch_size", "8"),
    (wrong("diffusion", "vae=nothing"), "nothing", "emoji", "shapes"),
    (wrong("diffusion", "vae=empty"), "empty", "vae"),
    (wrong("diffusion", "vae="), "vae"),
    (wrong("diffusion", 'frozen=["nothing.*"]'), "nothing.*"),
    (wrong("diffusion", "schedule.sampler=plms"), "plms", *SAMPLERS),
    (wrong("diffusion", "cache=x.safetensors", "data.flip=true"), "cache", "data.flip"),
    (wrong("diffusion", "timesteps=even"), "timesteps", "even", "uniform", "stratified", "logit_normal"),
    (wrong("autoencoder", "loss.perceptual_depth=9"), "depth", "9"),
    (wrong("autoencoder", "loss.perceptual_net=lpips-vgg", "loss.perceptual_path=none.pth"), "none.pth"),
    (wrong("autoencoder", "loss.discriminator_layers=4"), "48"),
    (wrong("autoencoder", "loss.discriminator_channels=6"), "6"),
    (wrong("clip", 'frozen=["*"]'), "parameter"),
    (wrong("clip", *READERS, "grounding.window=0"), "grounding.window", "0"),
    (wrong("clip", "train.optimizer.betas=[0.9,1.0]"), "optimizer.betas", "1.0"),
    (wrong("clip", "text_encoder=clip", "tokenizer=clip"), "tokenizer"),
    (wrong("clip", "text_encoder=clip", "judge=true"), "judge"),
    (wrong("diffusion", "caption_dropout=1.5"), "caption_dropout", "1.5"),
    (wrong("diffusion", "unet=emoji"), "16", "3"),
    (wrong("diffusion", "model.attention_head_dim=3"), "16", "3", "heads"),
    (wrong("diffusion", "model.attention_head_dim=[2,2,2]"), "attention_head_dim", "3"),
    (wrong("diffusion", "model.transformer_layers_per_block=[1]"), "transformer_layers_per_block"),
    (wrong("diffusion", "model.norm_num_groups=5"), "norm_num_groups", "5"),
    (wrong("diffusion", 'model.down_block_types=["DownBlock2D"]'), "down_block_types"),
    (wrong("diffusion", *ODD), "15", "even"),
    (wrong("diffusion", "schedule.beta_start=0.02"), "beta_start"),
    (wrong("diffusion", "schedule.beta_end=1.0"), "beta_end"),
    (wrong("diffusion", "schedule.num_train_timesteps=1"), "num_train_timesteps"),
    (wrong("diffusion", *ZERO_SNR), "epsilon", "rescale_betas_zero_snr", "v_prediction"),
    ([*training("clip", "vae", *CLIP, *SHAPES)], "vae", "clip", "--out"),
    (["sample", *NEW, "--model", "emoij", "--prompt", "a"], "emoij", "emoji", "shapes"),
    (["sample", *NEW, "--model", "emoij", "--prompt", "a", "--compile", "always"], "emoij"),
    (
        ["sample", *NEW, "--model", "shapes", "--prompt", "a", "--compile", "never", "--precision", "bfloat16"],
        "--precision",
    ),
    (["sample", *NEW, "--model", "vae", "--prompt", "a"], "vae", "text"),
    ([*CIRCLE, "--sampler", "plms"], "plms", *SAMPLERS),
    ([*CIRCLE, "--height", "40"], "40", "16"),
    ([*CIRCLE, "--steps", "0"], "0", "1", "1000"),
    ([*CIRCLE, "--steps", "ten"], "--steps", "ten"),
    ([*CIRCLE, "--guidance", "-1"], "-1", "0"),
    ([*CIRCLE, "--guidance", "nan"], "nan"),
    ([*CIRCLE, "--guidance-rescale", "2"], "2", "[0, 1]"),
    ([*CIRCLE, "--batch-size", "0"], "0", "1"),
    ([*CIRCLE, "--device", "gpu"], "gpu", "--device"),
    ([*CIRCLE, "--seed", "-1"], "-1", "0"),
    ([*CIRCLE, "--seed", str(2**64)], str(2**64)),
    ([*CIRCLE, "--seed-to", "1"], "--seed-to", "--interpolate"),
    ([*CIRCLE, "--interpolate", "4"], "--interpolate", "4", "1"),
    ([*CIRCLE, "--mask", "red.png"], "mask", "image"),
    ([*CIRCLE, "--image", "none.png"], "none.png"),
    ([*CIRCLE, "--image", "blank.txt"], "blank.txt"),
    ([*CIRCLE, "--wrong"], "--wrong"),
    ([*IMAGE, "--strength", "2"], "2", "strength"),
    ([*IMAGE, "--strength", "nan"], "nan", "strength"),
    ([*IMAGE, "--height", "1000000", "--width", "1000000"], "1000000", "16384"),
    ([*IMAGE, "--height", "32"], "--height", "--width"),
    ([*IMAGE, "--mask", "tall.png"], "40x50", "50x40"),
    ([*IMAGE, "--mask", "black.png", "--resample", "0"], "resample", "0"),
    ([*MODEL, "--prompt", "a\udcff"], "UTF-8"),
    ([*MODEL, "--prompts", "blank.txt"], "blank.txt"),
    ([*MODEL, "--prompts", "none.txt"], "none.txt"),
    (MODEL, "--prompt", "--prompts"),
    (["sample", "--model", "model", "--prompt", "a", "--out", "blank.txt"], "blank.txt"),
    (["evaluate", *NEW], "--model", "--autoencoder", "--images"),
    (["evaluate", *NEW, "--model", "model"], "--data"),
    ([*EVALUATE, "--split", "train"], "train", "test", "val"),
    ([*EVALUATE, "--num", "3"], "3", "16"),
    ([*EVALUATE, "--num", "3000"], "has 2000"),
    ([*EVALUATE, "--size", "64"], "--model", "--size"),
    ([*EVALUATE, "--steps", "0"], "steps", "0"),
    ([*EVALUATE, "--device", "magic"], "--device", "magic"),
    ([*EVALUATE, "--guidance", "1,-1"], "-1", "0 or more"),
    ([*EVALUATE, "--guidance", "nan"], "nan", "0 or more"),
    ([*EVALUATE, "--model", "nowhere"], "nowhere", "emoji"),
    ([*EVALUATE, "--data", "folder", "--data-path", "nowhere"], "nowhere"),
    ([*EVALUATE, "--guidance", "1,a"], "1,a"),
    ([*EVALUATE, "--guidance", "1,1"], "1,1"),
    ([*EVALUATE, "--guidance-rescale", "2"], "2", "[0, 1]"),
    ([*EVALUATE, "--sampler", "plms"], "plms", *SAMPLERS),
    ([*EVALUATE, "--train-num", "0"], "--train-num", "0"),
    ([*EVALUATE, "--batch-size", "0"], "--batch-size", "0"),
    ([*EVALUATE, "--seed", "-1"], "--seed", "-1"),
    ([*EVALUATE, "--features", "vgg"], "vgg", "effnet-lite0", "inception", "clip", "dinov2"),
    ([*EVALUATE, "--features", "clip:/nowhere"], "/nowhere"),
    ([*EVALUATE, "--judge", "nobody"], "nobody", "emoji", "shapes"),
    ([*EVALUATE, "--judge", "clip"], "clip"),
    ([*EVALUATE, "--baseline", "empty"], "empty"),
    ([*EVALUATE, "--without-frechet"], "--without-frechet", "--model"),
    ([*EVALUATE, "--data", "folder"], "folder", "--data-path"),
    ([*CODES, "--size", "36"], "--size", "36", "8"),
    ([*CODES, "--size", "5000"], "--size", "5000", "4000"),
    ([*CODES, "--judge", "shapes"], "--judge", "--autoencoder"),
    ([*CODES, "--perceptual", "magic"], "magic", "lpips-vgg"),
    ([*CODES, "--autoencoder", "nowhere"], "nowhere"),
    (["evaluate", *NEW, "--images", "photos/test"], "--reference"),
    ([*FOLDERS, "--features", "none"], "--features", "--judge"),
    ([*FOLDERS, "--reference", "empty"], "empty"),
    ([*FOLDERS, "--reference", "nowhere"], "nowhere"),
    ([*FOLDERS, "--without-frechet", "--size", "32"], "0.jpg"),
    ([*FOLDERS, "--size", "-5"], "--size", "-5"),
    ([*FOLDERS, "--size", "100000"], "--size", "100000", "4000"),
    ([*FOLDERS, "--reference", "photos/val"], "photos/val", "4", "16"),
    ([*FOLDERS, "--reference", "photos/test", "--without-frechet"], "40x36", "--size"),
    ([*COMPARE, "--guidance", "a"], "a", "1,7.5"),
    ([*COMPARE, "--guidance", "0.5"], "0.5", "1"),
    ([*COMPARE, "--steps", "0"], "0", "1"),
    (["compare_diffusers", "nowhere"], "nowhere", "emoji", "shapes"),
    (["plan_training", "--family", "empty"], "empty"),
    ([*PLAN, "--gpus", "0"], "--gpus", "0"),
    ([*PLAN, "--utilization", "120"], "--utilization", "120"),
    ([*PLAN, "--price", "-1"], "--price", "-1"),
    (["plot_metrics", "empty", "--out", "new"], "empty"),
    (["plot_metrics", "vae"], "--out"),
    (["show_results", "--results", "empty", "--out", "new"], "decoder.jsonl"),
    (["prepare_data"], "COMMAND"),
    (["prepare_data", "emoji", *NEW, "--size", "65"], "65", "64", "128"),
    (["prepare_data", "emoji", "--out", "new-data", "--compact", "--packages", "empty"], "empty", ".tgz"),
    (["benchmark", *NEW, "--only", "nothing", "--compile"], "nothing", "sampling", "train-unet"),
    (["benchmark", *NEW, "--rounds", "0"], "--rounds", "0", "1"),
    (["benchmark", *NEW, "--threads", "-1"], "--threads", "-1", "1"),
    (["benchmark", *NEW, "--device", "tpu"], "--device", "tpu", "cpu", "cuda"),
    (["benchmark", "--out", "blank.txt"], "blank.txt", "--out"),
    (["app", *NEW, "--port", "0"], "--port", "0", "65535"),
    (["app", *NEW, "--host", "no.such.host.invalid", "--port", "7999"], "no.such.host.invalid", "--host"),
    (["app", "--out", "blank.txt"], "blank.txt", "--out"),
    (["app", *NEW, "--model", "nowhere", "--device", "cpu", "--seed", "1"], "nowhere", "emoji", "shapes"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda row: f"{row[0][0]} {' '.join(row[1:])}"[:80])
def test_a_mistake_is_one_line_and_exit_code_2(run, mistake):
    command, *words = mistake
    if "data.path=a-bare" in command:
        (run.cwd / "a-bare").mkdir()
        Image.new("RGB", (32, 32)).save(run.cwd / "a-bare/red.png")
    refuse(run(*command), *words)
    assert not (run.cwd / "new").exists()
