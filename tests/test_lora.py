"""Low-rank adapters: files of every naming against the closed form and diffusers, and those that are trained here."""

import json
from dataclasses import replace
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

PROMPTS = ["a red circle", "a blue square"]
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


def theirs(model: Path, adapter: Path, weight: float, noise: Tensor):
    """The pictures of diffusers with peft."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(adapter, weight_name=FILE)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "cross_attention_kwargs": {"scale": weight}}
    return arrays(pipe(PROMPTS, latents=noise, **options).images)


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
def test_weights_become_the_closed_form_and_pictures_those_of_diffusers_with_peft(tmp_path, way):
    pipe = Pipeline(tiny_parts())
    pipe.save_pretrained(tmp_path)
    models = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    before, changes = tiny.copied(models), write(way, tmp_path / FILE, pipe.parts)
    pipe.load_lora(tmp_path, weight=1.0).load_lora(str(tmp_path / FILE), weight=-0.2)
    for name, weight in models.state_dict().items():
        change = 0.8 * changes.pop(name, torch.zeros(()))
        torch.testing.assert_close(weight, before[name] + change, rtol=0, atol=1e-5)
    assert not changes
    if way != "early":  # which diffusers reads no more
        pytest.importorskip("peft")
        noise = normal(2, *pipe.latent_shape())
        images = arrays(pipe(PROMPTS, steps=4, latents=noise))
        assert abs(images - theirs(tmp_path, tmp_path, 0.8, noise)).max() <= 1


MISFITS = [
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", (), "is for Stable Diffusion XL: 1 of its 3 names"),
    ("unet.a.transformer_blocks.7.attn1.to_q.lora_A.weight", (2, 3), "is for Stable Diffusion XL"),
    ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (2, 3), "is for Flux"),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (2, 3), "such as Stable Diffusion 3"),
    ("lora_unet_conv_in.hada_w1_a", (2, 3), "is for another kind of adapter .LoHa"),
    ("unet.conv_out.lora_B.bias", (4,), "not fit this model: 1 of its 3 names match no layer: unet.conv_out.lora_B"),
    ("unet.conv_out.lora_A.weight", (), "not fit this model: unet.conv_out is .4, 2, 1, 1. by .., its layer"),
    ("unet.conv_out.alpha", (2,), "not fit this model: unet.conv_out is"),
    ("unet.conv_in.lora_B.weight", (16, 2), "not fit this model: 1 of its 3 names match no layer: unet.conv_in"),
    ("unet.conv_out.lora_A.weight", (3, 16, 3, 3), "not fit this model: unet.conv_out .* its layer .4, 16, 3, 3"),
    (f"{ATTENTION[1]}.lora_A.weight", (2, 1024), "is for Stable Diffusion 2.x: unet.down"),
]


@pytest.mark.parametrize(("name", "shape", "message"), MISFITS)
def test_files_that_do_not_fit_are_named_and_change_nothing(tmp_path, name, shape, message):
    pipe = Pipeline(tiny_parts())
    shapes = dict(zip(keys("peft", "unet.conv_out"), [(2, 16, 3, 3), (4, 2, 1, 1)], strict=True))
    shapes |= dict(zip(keys("peft", ATTENTION[1]), [(2, 24), (16, 2)], strict=True)) | {name: shape}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / FILE)
    before = tiny.copied(pipe.unet)
    with pytest.raises(UserError, match=message):
        pipe.load_lora(tmp_path)
    with pytest.raises(UserError, match="weight nan is not finite"):
        pipe.load_lora(tmp_path, float("nan"))
    with pytest.raises(UserError, match="before the models are compiled"):
        pipe.compile("eager").load_lora(tmp_path)
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
    assert all(p.grad is None for p in task.modules["unet"].base().parameters())
    assert tiny.same(merged.unet.state_dict(), other.unet.state_dict())
    for part, adapters in task.modules.items():
        adapters.load_state_dict({k.split("/")[1]: x for k, x in states[0].items() if k.startswith(f"{part}-ema/")})
    fresh, noise = task_of(LoRAConfig(rank=2)), normal(2, *base.latent_shape())
    pipes = [base, merged, *(Pipeline(task.parts(task.modules)) for task in (fresh, task))]
    plain, images, first, last = (arrays(pipe(PROMPTS, steps=4, latents=noise)) for pipe in pipes)
    assert (first == plain).all() and abs(images - last).max() <= 1 < 8 < abs(images - plain).max()
    line = ["sample.py", "--prompt", PROMPTS[0], "--steps", 4, "--out", "o", "--lora", "run:0.5"]
    line += ["--lora", f"resumed/{FILE}:0.5", "--model"]
    assert in_process(capsys, monkeypatch, *line, "shapes", cwd=tmp_path)[0] == 0
    with Image.open("o/0000-a-red-circle.png") as image:
        assert image.text["lora"] == f"run:0.5, resumed/{FILE}:0.5"
        assert abs(arrays([image]) - arrays(merged(PROMPTS[0], steps=4))).max() <= 1
    error = in_process(capsys, monkeypatch, *line, "run", cwd=tmp_path)[2]
    assert "it is an adapter: --lora run --model MODEL" in error
    pytest.importorskip("peft")
    base.save_pretrained("base")
    assert all(abs(images - theirs("base", out, 1.0, noise)).max() <= 1 for out in ("run", "resumed"))


def test_training_that_makes_no_adapter_is_refused():
    for changes, message in (
        ({"unet": ""}, "'unet' is ''; it must be the model to adapt"),
        ({"frozen": ("*",)}, "'frozen' is .* left out where lora.rank is set"),
        ({"schedule": tiny.diffusion("", "").schedule}, "trained with .*; train its adapters with the same"),
        ({}, "'lora.targets' is .* e.g. 'conv_in'"),
    ):
        with pytest.raises(UserError, match=message):
            task_of(LoRAConfig(rank=2, targets=("attn",)), **changes)
