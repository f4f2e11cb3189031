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
from ldm.data import DataConfig
from ldm.diffusion import ScheduleConfig
from ldm.images import read_metadata
from ldm.lora import FILE, LoRAConfig
from ldm.model_io import find_root
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts, read_schedule
from ldm.samplers import ImageNoise
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import train

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.{name}" for name in ("attn1.to_q", "attn2.to_k", "attn2.to_out.0")]
UNET = [*ATTENTION, "unet.mid_block.attentions.0.proj_in", "unet.up_blocks.0.resnets.0.conv1", "unet.conv_in"]
TEXT = [f"text_encoder.text_model.encoder.layers.0.{x}" for x in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]
HEADER = {f"{part}.r": 3 for part in ("unet", "text_encoder")} | {"unet.lora_alpha": 6, "text_encoder.lora_alpha": 2}
HEADER |= {"unet.target_modules": [name.removeprefix("unet.") for name in UNET]}
HEADER |= {"text_encoder.target_modules": ["0.self_attn.q_proj", "0.self_attn.out_proj", "0.mlp.fc1"]}
HEADER |= {"text_encoder.alpha_pattern": {"fc1": 4}}
WAYS = ("kohya", "peft", "older", "early")


def keys(way: str, name: str) -> list[str]:
    """The names of down, up and perhaps alpha of a layer."""
    (part, layer), suffixes = name.split(".", 1), ("lora_A.weight", "lora_B.weight")
    if way == "kohya":
        name = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + layer.replace(".", "_")
        suffixes = ("lora_down.weight", "lora_up.weight", "alpha")
    elif way == "older":  # transformers 5 has no text_model
        name, kind = name.replace("text_model.", ""), "lora" if part == "unet" else "lora_linear_layer"
        suffixes = (f"{kind}.down.weight", f"{kind}.up.weight")
    elif way == "early":
        stem, _, layer = layer.removesuffix(".0").rpartition(".")
        name, suffixes = f"{stem}.processor", (f"{layer}_lora.down.weight", f"{layer}_lora.up.weight")
    return [f"{name}.{suffix}" for suffix in suffixes]


def write(way: str, path: Path, parts: Parts) -> dict[str, Tensor]:
    """Writes random adapters of rank 3; returns the change of each adapted weight."""
    tensors, changes = {}, {}
    for i, name in enumerate(ATTENTION if way == "early" else UNET + TEXT):
        alpha = {"kohya": 6.0, "peft": 6.0 if name in UNET else 4.0 if "fc1" in name else 2.0}.get(way, 3.0)
        part, layer = name.split(".", 1)
        out, *rest = getattr(parts, part).get_submodule(layer).weight.shape
        up, down = 0.3 * normal(out, 3, *[1] * (len(rest) - 1), seed=i), 0.3 * normal(3, *rest, seed=i + 99)
        tensors |= dict(zip(keys(way, name), (down, up, torch.tensor(alpha)), strict=False))
        changes[f"{name}.weight"] = alpha / 3 * torch.einsum("or,r...->o...", up.flatten(1), down)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(HEADER)} if way == "peft" else {})
    return changes


@pytest.mark.parametrize("way", WAYS)
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
    ("shapes", "message"),
    [
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, "is for Stable Diffusion XL: 1 of its 2 names"),
        ({"unet.a.transformer_blocks.7.attn1.to_q.lora_A.weight": (2, 3)}, "is for Stable Diffusion XL"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (2, 3)}, "is for Flux"),
        ({"lora_unet_joint_blocks_0_context_block_attn_proj.lora_up.weight": (2, 3)}, "such as Stable Diffusion 3"),
        ({"lora_unet_conv_in.hada_w1_a": (2, 3)}, "another kind of adapter .LoHa"),
        (
            {"unet.conv_in.lora_B.bias": (3,)},
            "not fit this model: 1 of its 2 names match no .*: unet.conv_in.lora_B.bias",
        ),
        ({"unet.conv_in.lora_B.weight": (16, 2)}, "not fit this model: 1 of its 2 names match no layer: unet.conv_in"),
        (dict(zip(keys("", "unet.conv_in"), [(3, 4, 3, 3), (16, 2)], strict=True)), "fit this model: .* .16, 4, 3, 3."),
        (
            dict(zip(keys("", ATTENTION[1]), [(1, 1024), (16, 1)], strict=True)),
            "is for Stable Diffusion 2.x: unet.down",
        ),
    ],
)
def test_files_that_do_not_fit_are_named_and_change_nothing(tmp_path, shapes, message):
    pipe, file = Pipeline(tiny_parts()), tmp_path / "a.safetensors"
    shapes |= {"unet.conv_out.lora_A.weight": (2, 16, 3, 3), "unet.conv_out.lora_B.weight": (4, 2, 1, 1)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, file)
    before = tiny.copied(pipe.unet)
    with pytest.raises(UserError, match=message):
        pipe.load_lora(file)
    with pytest.raises(UserError, match="weight nan is not finite"):
        pipe.load_lora(file, float("nan"))
    with pytest.raises(UserError, match="before the models are compiled"):
        pipe.compile("eager").load_lora(file)
    assert tiny.same(before, pipe.unet.state_dict())


def task_of(
    kohya: bool = False, targets: tuple[str, ...] = ("*attn*", "*conv1", "conv_in"), **changes
) -> DiffusionTask:
    lora = LoRAConfig(rank=2, targets=targets, kohya=kohya)
    train = replace(tiny.TRAIN, save_every=2, optimizer=replace(tiny.TRAIN.optimizer, lr=2e-2))
    schedule = read_schedule(find_root("shapes") / "scheduler")
    options = {"unet": "shapes", "train_text_encoder": True, "data": DataConfig(length=10), "schedule": schedule}
    return DiffusionTask(tiny.diffusion("shapes", "shapes", train, lora=lora, **options | changes))


def test_trained_on_ten_pictures_resumed_merged_and_opened_elsewhere(tmp_path, one_thread, capsys, monkeypatch):
    """The run that is not interrupted exports diffusers' names, the other kohya's."""
    monkeypatch.chdir(tmp_path)
    for out, steps in (("run", 4), ("resumed", 2), ("resumed", 4)):
        task = task_of(kohya=out == "resumed")
        train(task, replace(task.config.train, steps=steps), out, {"train": {"steps": steps}})
    states = [tiny.tensors(tmp_path / out / "checkpoints/step-00000004/state") for out in ("run", "resumed")]
    assert tiny.same(*states) and sum(x.numel() for x in states[0].values()) < 300_000
    base, merged, other = (Pipeline.from_pretrained("shapes") for _ in range(3))
    assert tiny.same(base.unet.state_dict(), task.modules["unet"].base().state_dict())
    merged.load_lora("run"), other.load_lora("resumed")
    assert all(
        tiny.same(getattr(merged, part).state_dict(), getattr(other, part).state_dict()) for part in task.modules
    )
    for part, adapters in task.modules.items():
        adapters.load_state_dict({k.split("/")[1]: x for k, x in states[0].items() if k.startswith(f"{part}-ema/")})
    prompts, pipes = ["a red circle", "a blue square"], (base, merged, Pipeline(task.parts(task.modules)))
    plain, expected, live = (arrays(pipe(prompts, steps=4)) for pipe in pipes)
    assert abs(live - expected).max() <= 1 < 8 < abs(live - plain).max()
    line = ("sample.py", "--prompt", prompts[0], "--steps", 4, "--out", "o", "--model")
    loras = ("--lora", "run:0.5", "--lora", f"resumed/{FILE}:0.5")
    code, _, err = in_process(capsys, monkeypatch, *line, "shapes", *loras, cwd=tmp_path)
    assert code == 0, err
    assert read_metadata(tmp_path / "o/0000-a-red-circle.png")["lora"] == f"run:0.5, resumed/{FILE}:0.5"
    assert abs(arrays([Image.open("o/0000-a-red-circle.png")]) - live[:1]).max() <= 1
    code, _, err = in_process(capsys, monkeypatch, *line, "run", cwd=tmp_path)
    assert code == 2 and "it is an adapter: --lora run --model MODEL" in err
    pytest.importorskip("peft")
    noise = {"latents": ImageNoise(range(2), base.latent_shape())()}
    for out in ("run", "resumed"):
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(find_root("shapes"))
        theirs.load_lora_weights(out, weight_name=FILE)
        images = arrays(theirs(prompts, num_inference_steps=4, guidance_scale=5.0, **noise).images)
        assert abs(images - live).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": ""}, "'unet' is ''; it must be the model to adapt"),
        ({"frozen": ("*",)}, "'frozen' is .* left out where lora.rank is set"),
        ({"targets": ("attn",)}, "'lora.targets' is .* e.g. 'conv_in'"),
        ({"schedule": ScheduleConfig()}, "trained with .*; train its adapters with the same"),
    ],
)
def test_training_that_makes_no_adapter_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        task_of(**changes)
