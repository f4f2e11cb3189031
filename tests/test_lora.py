"""Low-rank adapters: files of every naming against the closed form and diffusers, and those that are trained here."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from test_scripts import in_process
from tiny_models import arrays, normal, tiny_parts
from torch import Tensor, nn

from ldm.config import UserError
from ldm.lora import FILE, LoRAConfig
from ldm.model_io import load_tensors
from ldm.pipeline import Pipeline
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import train

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.{name}" for name in ("attn1.to_q", "attn2.to_k", "attn2.to_out.0")]
UNET = [*ATTENTION, "unet.mid_block.attentions.0.proj_in", "unet.up_blocks.0.resnets.0.conv1", "unet.conv_in"]
TEXT = [f"text_encoder.text_model.encoder.layers.0.{x}" for x in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]
HEADER = {"unet.r": 3, "unet.lora_alpha": 6, "unet.target_modules": [name.removeprefix("unet.") for name in UNET]}
HEADER |= {"text_encoder.r": 3, "text_encoder.lora_alpha": 2, "text_encoder.alpha_pattern": {"fc1": 4}}
HEADER |= {"text_encoder.target_modules": ["q_proj", "out_proj", "fc1"], "text_encoder.use_rslora": True}


def keys(way: str, name: str) -> list[str]:
    """The names of down, up and perhaps alpha of a layer."""
    part, layer = name.split(".", 1)
    stem, _, last = layer.removesuffix(".0").rpartition(".")
    prefix, kind = {"unet": ("lora_unet", "lora"), "text_encoder": ("lora_te", "lora_linear_layer")}[part]
    flat, brief = layer.replace(".", "_"), name.replace("text_model.", "")  # which transformers 5 leaves out
    return {
        "kohya": [f"{prefix}_{flat}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")],
        "peft": [f"{name}.lora_{x}.weight" for x in "AB"],
        "older": [f"{brief}.{kind}.{x}.weight" for x in ("down", "up")],
        "early": [f"{stem}.processor.{last}_lora.{x}.weight" for x in ("down", "up")],
    }[way]


def write(way: str, path: Path, parts: tuple) -> dict[str, Tensor]:
    """Writes random adapters of rank 3; returns the change of each adapted weight."""
    tensors, changes = {}, {}
    for i, name in enumerate(ATTENTION if way == "early" else UNET + TEXT):
        peft = 6.0 if name in UNET else 3**0.5 * (4.0 if "fc1" in name else 2.0)
        alpha = {"kohya": 6.0, "peft": peft}.get(way, 3.0)
        part, layer = name.split(".", 1)
        out, *rest = getattr(parts, part).get_submodule(layer).weight.shape
        up, down = 0.3 * normal(out, 3, *[1] * (len(rest) - 1), seed=i), 0.3 * normal(3, *rest, seed=i + 99)
        tensors |= dict(zip(keys(way, name), (down, up, torch.tensor(alpha)), strict=False))
        changes[f"{name}.weight"] = alpha / 3 * torch.einsum("or,r...->o...", up.flatten(1), down)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(HEADER)} if way == "peft" else {})
    return changes


@pytest.mark.parametrize("way", ["kohya", "peft", "older", "early"])
def test_weights_become_the_closed_form_and_files_add_up(tmp_path, way):
    pipe, file = Pipeline(tiny_parts()), tmp_path / "a.safetensors"
    changes = write(way, file, pipe.parts)
    models = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    before = tiny.copied(models)
    pipe.load_lora(file, weight=0.8).load_lora(str(file), weight=-0.2)
    for name, weight in models.state_dict().items():
        change = 0.6 * changes.pop(name, torch.zeros(()))
        torch.testing.assert_close(weight, before[name] + change, rtol=0, atol=1e-5)
    assert not changes


@pytest.mark.parametrize("way", ["kohya", "peft", "older"])  # diffusers no longer reads the early names
def test_pictures_are_those_of_diffusers_with_peft(tmp_path, way):
    pytest.importorskip("peft")
    Pipeline(tiny_parts()).save_pretrained(tmp_path)
    theirs, ours = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path), Pipeline.from_pretrained(tmp_path)
    write(way, tmp_path / FILE, ours.parts)
    theirs.load_lora_weights(tmp_path)
    noise, prompts = {"latents": normal(2, *ours.latent_shape())}, ["a red circle", "a blue square"]
    options = {"num_inference_steps": 5, "guidance_scale": 5.0, "cross_attention_kwargs": {"scale": 0.8}}
    expected, plain = arrays(theirs(prompts, **noise, **options).images), arrays(ours(prompts, steps=5, **noise))
    images = arrays(ours.load_lora(tmp_path, 0.8)(prompts, steps=5, **noise))
    assert abs(images - expected).max() <= 1 < 20 < abs(images - plain).max()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", (), "is for Stable Diffusion XL: 1 of its 3 names"),
        ("unet.a.transformer_blocks.7.attn1.to_q.lora_A.weight", (2, 3), "is for Stable Diffusion XL"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (2, 3), "is for Flux"),
        ("lora_unet_joint_blocks_0_context_block_attn_proj.lora_up.weight", (2, 3), "such as Stable Diffusion 3"),
        ("lora_unet_conv_in.hada_w1_a", (2, 3), "is for another kind of adapter .LoHa"),
        (
            "unet.conv_out.lora_B.bias",
            (4,),
            "not fit this model: 1 of its 3 names match no layer: unet.conv_out.lora_B",
        ),
        ("unet.conv_in.lora_B.weight", (16, 2), "not fit this model: 1 of its 3 names match no layer: unet.conv_in"),
        ("unet.conv_out.lora_A.weight", (3, 16, 3, 3), "not fit this model: unet.conv_out .* a weight .4, 16, 3, 3"),
        (f"{ATTENTION[1]}.lora_A.weight", (2, 1024), "is for Stable Diffusion 2.x: unet.down"),
    ],
)
def test_files_that_do_not_fit_are_named_and_change_nothing(tmp_path, name, shape, message):
    pipe, file = Pipeline(tiny_parts()), tmp_path / "a.safetensors"
    shapes = dict(zip(keys("peft", "unet.conv_out"), [(2, 16, 3, 3), (4, 2, 1, 1)], strict=True))
    shapes |= dict(zip(keys("peft", ATTENTION[1]), [(2, 24), (16, 2)], strict=True)) | {name: shape}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, file)
    before = tiny.copied(pipe.unet)
    with pytest.raises(UserError, match=message):
        pipe.load_lora(file)
    with pytest.raises(UserError, match="weight nan is not finite"):
        pipe.load_lora(file, float("nan"))
    with pytest.raises(UserError, match="before the models are compiled"):
        pipe.compile("eager").load_lora(file)
    assert tiny.same(before, pipe.unet.state_dict())


def task_of(lora: LoRAConfig, **changes) -> DiffusionTask:
    train = replace(tiny.TRAIN, save_every=2, optimizer=replace(tiny.TRAIN.optimizer, lr=2e-2))
    options = {"schedule": Pipeline.from_pretrained("shapes").schedule.config, "data": replace(tiny.DATA, length=10)}
    options |= {"unet": "shapes", "train_text_encoder": True, "lora": lora}
    return DiffusionTask(tiny.diffusion("shapes", "shapes", train, **options | changes))


def test_trained_on_ten_pictures_resumed_merged_and_opened_elsewhere(tmp_path, one_thread, capsys, monkeypatch):
    """The run that is not interrupted exports diffusers' names, the other kohya's."""
    monkeypatch.chdir(tmp_path)
    for out, steps in (("run", 4), ("resumed", 2), ("resumed", 4)):
        task = task_of(LoRAConfig(rank=2, targets=("*attn*", "*conv1", "conv_in"), kohya=out == "resumed"))
        train(task, replace(task.config.train, steps=steps), out, {"train": {"steps": steps}})
    states = [tiny.tensors(tmp_path / out / "checkpoints/step-00000004/state") for out in ("run", "resumed")]
    assert tiny.same(*states) and sum(x.numel() for x in states[0].values()) < 300_000
    base, merged, other = (Pipeline.from_pretrained("shapes") for _ in range(3))
    for pipe, out, prefix in ((merged, "run", "unet."), (other, "resumed", "lora_unet_")):
        pipe.load_lora(out)
        assert any(key.startswith(prefix) for key in load_tensors(Path(out) / FILE))
    assert tiny.same(base.unet.state_dict(), task.modules["unet"].base().state_dict())
    assert tiny.same(merged.unet.state_dict(), other.unet.state_dict())
    for part, adapters in task.modules.items():
        adapters.load_state_dict({k.split("/")[1]: x for k, x in states[0].items() if k.startswith(f"{part}-ema/")})
    live = Pipeline(task.parts(task.modules))
    prompts, options = ["a red circle", "a blue square"], {"latents": normal(2, *live.latent_shape())}
    plain, images, expected = (arrays(pipe(prompts, steps=4, **options)) for pipe in (base, merged, live))
    assert abs(images - expected).max() <= 1 < 8 < abs(images - plain).max()
    line = ("sample.py", "--prompt", prompts[0], "--steps", 4, "--out", "o", "--lora", "run:0.5")
    command = partial(in_process, capsys, monkeypatch, *line, "--lora", f"resumed/{FILE}:0.5", cwd=tmp_path)
    code, _, err = command("--model", "shapes")
    assert code == 0, err
    with Image.open("o/0000-a-red-circle.png") as image:
        assert image.text["lora"] == f"run:0.5, resumed/{FILE}:0.5"
        assert abs(arrays([image]) - arrays(merged(prompts[0], steps=4))).max() <= 1
    code, _, err = command("--model", "run")
    assert code == 2 and "it is an adapter: --lora run --model MODEL" in err
    pytest.importorskip("peft")
    base.save_pretrained("base")
    for out in ("run", "resumed"):
        theirs = diffusers.StableDiffusionPipeline.from_pretrained("base")
        theirs.load_lora_weights(out, weight_name=FILE)
        expected = theirs(prompts, num_inference_steps=4, guidance_scale=5.0, **options).images
        assert abs(images - arrays(expected)).max() <= 1


def test_training_that_makes_no_adapter_is_refused():
    for changes, message in (
        ({"unet": ""}, "'unet' is ''; it must be the model to adapt"),
        ({"frozen": ("*",)}, "'frozen' is .* left out where lora.rank is set"),
        ({"schedule": tiny.diffusion("", "").schedule}, "trained with .*; train its adapters with the same"),
        ({}, "'lora.targets' is .* e.g. 'conv_in'"),
    ):
        with pytest.raises(UserError, match=message):
            task_of(LoRAConfig(rank=2, targets=("attn",)), **changes)
