"""Low-rank adapters: files of every naming against the closed form and diffusers, and those that are trained here."""

import json
from dataclasses import replace
from pathlib import Path

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
from ldm.images import read_metadata
from ldm.lora import FILE, LoRAConfig
from ldm.model_io import find_root
from ldm.pipeline import Pipeline
from ldm.samplers import ImageNoise
from ldm.train.diffusion import DiffusionTask
from ldm.train.loop import train

RANK, ALPHA, WEIGHT = 3, 6.0, 0.8
BLOCK, LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.", "text_model.encoder.layers.0."
LINEAR = [f"{BLOCK}attn1.to_q", f"{BLOCK}attn2.to_k", f"{BLOCK}attn2.to_out.0"]
UNET = [*LINEAR, f"{BLOCK}ff.net.0.proj", "mid_block.attentions.0.proj_in", "up_blocks.0.resnets.0.conv1", "conv_in"]
TEXT = [f"{LAYER}self_attn.q_proj", f"{LAYER}self_attn.out_proj", f"{LAYER}mlp.fc1"]
ADAPTED = {"unet": UNET, "text_encoder": TEXT}


def factors(model: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """down and up of the layers, random."""
    pairs = {}
    for i, name in enumerate(names):
        out, *rest = model.get_submodule(name).weight.shape
        down, up = normal(RANK, *rest, seed=i), 0.3 * normal(out, RANK, *[1] * (len(rest) - 1), seed=i + 99)
        pairs[name] = (down / down[0].numel() ** 0.5, up)
    return pairs


def kohya(part: str, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    name = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + name.replace(".", "_")
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}


def named(down_name: str, up_name: str):
    def write(part: str, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        return {f"{part}.{name}.{down_name}.weight": down, f"{part}.{name}.{up_name}.weight": up}

    return write


def early(part: str, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """diffusers' attention processors."""
    stem, _, layer = name.removesuffix(".0").rpartition(".")
    return {f"{stem}.processor.{layer}_lora.{k}.weight": x for k, x in (("down", down), ("up", up))}


def flat(part: str, name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """As transformers names the text encoder's layers since version 5, in half precision."""
    return named("lora_A", "lora_B")(part, name.removeprefix("text_model."), down.half().float(), up.half().float())


PEFT = {
    "unet": {"r": RANK, "lora_alpha": ALPHA, "target_modules": UNET},
    "text_encoder": {"r": RANK, "lora_alpha": 1.0, "target_modules": TEXT, "alpha_pattern": {"q_proj": 2.0}},
}
HEADER = json.dumps({f"{part}.{key}": value for part, table in PEFT.items() for key, value in table.items()})
WAYS = {  # how a file is written, the layers in it, its header
    "kohya": (kohya, ADAPTED, {}),
    "peft": (named("lora_A", "lora_B"), ADAPTED, {"lora_adapter_metadata": HEADER}),
    "lora.down": (named("lora.down", "lora.up"), {"unet": UNET}, {}),
    "flat": (flat, ADAPTED, {}),
    "early": (early, {"unet": LINEAR}, {}),
}


def scale(way: str, part: str, name: str) -> float:
    """alpha / rank."""
    by_header = ALPHA if part == "unet" else 2.0 if "q_proj" in name else 1.0
    return {"kohya": ALPHA, "peft": by_header}.get(way, RANK) / RANK


def write(way: str, path: Path, parts) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Writes random adapters of `parts`; returns their factors by part and layer."""
    function, adapted, header = WAYS[way]
    pairs = {(p, n): x for p, names in adapted.items() for n, x in factors(getattr(parts, p), names).items()}
    tensors = [function(*key, *pair) for key, pair in pairs.items()]
    save_file({name: x.contiguous() for table in tensors for name, x in table.items()}, path, header)
    return pairs


@pytest.mark.parametrize("way", WAYS)
def test_weights_become_the_closed_form_and_files_add_up(tmp_path, way):
    parts, file = tiny_parts(), tmp_path / "a.safetensors"
    pairs, before = write(way, file, parts), {part: tiny.copied(getattr(parts, part)) for part in ADAPTED}
    Pipeline(parts).load_lora(file, weight=WEIGHT).load_lora(str(file), weight=-0.2)
    for part, state in before.items():
        for name, w in getattr(parts, part).state_dict().items():
            change = torch.zeros_like(w)
            if (key := (part, name.removesuffix(".weight"))) in pairs:
                down, up = pairs[key]
                change = (WEIGHT - 0.2) * scale(way, *key) * torch.einsum("or,r...->o...", up.flatten(1), down)
                assert float(change.abs().max()) > 0.01
            torch.testing.assert_close(w, state[name] + change, rtol=0, atol=2e-4 if way == "flat" else 1e-6)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "early"])  # diffusers reads that no more
def test_pictures_are_those_of_diffusers_with_peft(tmp_path, way):
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    folder, prompts = tmp_path / "model", ["a red circle", "a blue square"]
    Pipeline(tiny_parts()).save_pretrained(folder)
    theirs, ours = StableDiffusionPipeline.from_pretrained(folder), Pipeline.from_pretrained(folder)
    write(way, tmp_path / "a.safetensors", ours.parts)
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    noise = normal(2, *ours.latent_shape())
    options = {"num_inference_steps": 5, "guidance_scale": 5.0, "cross_attention_kwargs": {"scale": WEIGHT}}
    expected = arrays(theirs(prompts, latents=noise, **options).images)
    plain = arrays(ours(prompts, steps=5, latents=noise))
    images = arrays(ours.load_lora(tmp_path / "a.safetensors", WEIGHT)(prompts, steps=5, latents=noise))
    assert abs(images - expected).max() <= 1 < 20 < abs(images - plain).max()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": ()}, "is for Stable Diffusion XL: 1 of its 1 names"),
        ({"unet.mid_block.attentions.0.transformer_blocks.7.attn1.to_q.lora_A.weight": (2, 3)}, "Stable Diffusion XL"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (2, 3)}, "is for Flux"),
        ({"lora_unet_joint_blocks_0_context_block_attn_proj.lora_up.weight": (2, 3)}, "such as Stable Diffusion 3"),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (2, 3)}, "another kind of adapter .LoHa"),
        ({"unet.conv_in.lora_B.bias": (3,)}, "does not fit this model: 1 of its 1 names .*: unet.conv_in.lora_B.bias"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, "does not fit this model: 1 of its 1 names"),
        ({"unet.conv_in.lora_A.weight": (3, 4, 3, 3), "unet.conv_in.lora_B.weight": (16, 2)}, "for a weight .16, 4, 3"),
        (
            {f"unet.{LINEAR[1]}.lora_{k}.weight": x for k, x in (("A", (1, 1024)), ("B", (16, 1)))},
            "Diffusion 2.x: unet",
        ),
        ({}, "0 of its 0 names"),
    ],
)
def test_files_that_do_not_fit_are_named_and_change_nothing(tmp_path, tensors, message):
    pipe, file, good = Pipeline(tiny_parts()), tmp_path / "a.safetensors", ("unet", "conv_out", normal(2, 16, 3, 3))
    tables = named("lora_A", "lora_B")(*good, normal(4, 2, 1, 1)) if len(tensors) == 2 else {}
    save_file(tables | {name: torch.ones(shape) for name, shape in tensors.items()}, file)
    before = tiny.copied(pipe.unet)
    with pytest.raises(UserError, match=message):
        pipe.load_lora(file)
    assert tiny.same(before, pipe.unet.state_dict())


def test_values_that_are_not_finite_and_compiled_models_are_refused(tmp_path):
    pipe, file = Pipeline(tiny_parts()), tmp_path / "a.safetensors"
    pairs = write("kohya", file, pipe.parts)
    with pytest.raises(UserError, match="weight nan is not finite"):
        pipe.load_lora(file, float("nan"))
    save_file(
        kohya("unet", "conv_in", *pairs["unet", "conv_in"]) | {"lora_unet_conv_in.alpha": torch.tensor(torch.inf)}, file
    )
    with pytest.raises(UserError, match="is not finite"):
        pipe.load_lora(file)
    with pytest.raises(UserError, match="before the models are compiled"):
        pipe.compile("eager").load_lora(file)


@pytest.mark.parametrize("kohya_names", [False, True])
def test_training_on_ten_pictures(tmp_path, one_thread, capsys, monkeypatch, kohya_names):
    """The base stays as it is, a resumed run is the same to the bit, and merged adapters give the run's own pictures,
    here and in diffusers."""
    config = replace(tiny.TRAIN, steps=4, save_every=2, optimizer=replace(tiny.TRAIN.optimizer, lr=2e-2))
    lora = LoRAConfig(rank=2, targets=("*attn*", "*conv1", "conv_in", "*downsamplers*"), kohya=kohya_names)
    options = {"unet": "shapes", "lora": lora, "train_text_encoder": True, "data": DataConfig(length=10)}

    def run(out: str, steps: int) -> DiffusionTask:
        task = DiffusionTask(tiny.diffusion("shapes", "shapes", config, **options))
        train(task, replace(config, steps=steps), tmp_path / out, {"train": {"steps": steps}})
        return task

    task = run("straight", 4)
    run("resumed", 2)
    run("resumed", 4)
    states = [tiny.tensors(tmp_path / out / "checkpoints/step-00000004") for out in ("straight", "resumed")]
    assert tiny.same(*states) and sum(x.numel() for x in states[0].values()) < 600_000
    base, tuned = (
        Pipeline.from_pretrained("shapes"),
        Pipeline.from_pretrained("shapes").load_lora(tmp_path / "straight"),
    )
    assert tiny.same(base.unet.state_dict(), task.modules["unet"].base().state_dict())
    averaged = {}
    for part, adapters in task.modules.items():
        file = tmp_path / f"straight/checkpoints/step-00000004/state/{part}-ema.safetensors"
        adapters.load_state_dict(tiny.load_tensors(file))
        averaged[part] = adapters
    prompts = ["a red circle", "a blue square above a red circle"]
    plain, merged, live = (arrays(pipe(prompts, steps=4)) for pipe in (base, tuned, Pipeline(task.parts(averaged))))
    assert abs(merged - live).max() <= 1 < 8 < abs(merged - plain).max()
    line = ("--model", "shapes", "--lora", "straight:0.5", "--lora", f"straight/{FILE}:0.5", "--prompt", prompts[0])
    code, _, err = in_process(capsys, monkeypatch, "sample.py", *line, "--steps", 4, "--out", "o", cwd=tmp_path)
    assert code == 0, err
    path = tmp_path / "o/0000-a-red-circle.png"
    assert read_metadata(path)["lora"] == f"straight:0.5, straight/{FILE}:0.5"
    assert abs(arrays([Image.open(path)]) - merged[:1]).max() <= 1
    code, _, err = in_process(
        capsys, monkeypatch, "sample.py", "--model", "straight", *line[-2:], "--out", "o", cwd=tmp_path
    )
    assert code == 2 and "it is an adapter: --lora straight --model MODEL" in err
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(find_root("shapes"))
    theirs.load_lora_weights(tmp_path / "straight")
    noise = ImageNoise(range(2), base.latent_shape())()
    expected = theirs(prompts, latents=noise, num_inference_steps=4, guidance_scale=5.0).images
    assert abs(merged - arrays(expected)).max() <= 1


def test_training_without_a_base_or_layers_is_refused():
    for lora, changes, message in (
        (LoRAConfig(rank=2), {}, "'unet' is ''; it must be the model to adapt"),
        (LoRAConfig(rank=2), {"unet": "shapes", "frozen": ("*",)}, "'frozen' is .* left out where lora.rank is set"),
        (LoRAConfig(rank=2, targets=("attn",)), {"unet": "shapes"}, "'lora.targets' is .* e.g. 'conv_in'"),
    ):
        with pytest.raises(UserError, match=message):
            DiffusionTask(tiny.diffusion("shapes", "shapes", lora=lora, **changes))
