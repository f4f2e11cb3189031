"""Stable Diffusion's single files: through here and back, against diffusers, as others write them, and refused."""

import sys
from contextlib import nullcontext
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from PIL import Image
from safetensors.torch import load_file, save_file
from test_stable_diffusion import stable_diffusion
from test_tokenizer import TEXTS, assert_same
from test_unet import SD15, SD21
from tiny_models import arrays, normal, randomize, shapes, tiny_parts, unet_config, vae_config
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm import VAE, Pipeline, TextEncoder, UNet
from ldm.clip import TextConfig
from ldm.commands import export, sample
from ldm.config import UserError, build
from ldm.pipeline_io import Parts, load_parts, save_single_file
from ldm.single_file import decode, encode
from ldm.tokenizer import Tokenizer
from ldm.unet import UNetConfig
from ldm.vae import VAEConfig

SIZE = {"height": 16, "width": 24}
MODELS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}
TEXT1 = TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
TEXT2 = TextConfig(
    hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23, hidden_act="gelu"
)


def same(a: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    state = a.state_dict()
    return state.keys() == tensors.keys() and all(state[name].equal(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("generation", [1, 2])
def test_both_ways(tmp_path, generation):
    """Here bit for bit; in diffusers the same pictures, from the names and shapes of the original code."""
    original, out = (
        stable_diffusion(tmp_path / "parts", generation, "DDIMScheduler"),
        tmp_path / "new" / "one.safetensors",
    )
    original.save_pretrained(tmp_path / "pipe")
    with pytest.warns(UserWarning, match="ComfyUI.* only .* unet.block_out_channels"):
        save_single_file(out, load_parts(tmp_path / "pipe"))
    ours, folder = (
        Pipeline.from_pretrained(out, tokenizer=tmp_path / "pipe"),
        Pipeline.from_pretrained(tmp_path / "pipe"),
    )
    assert all(getattr(ours, part).config == getattr(folder, part).config for part in (*MODELS, "schedule"))
    ours.save_pretrained(tmp_path / "back")
    for part, file in MODELS.items():
        assert same(getattr(folder, part), load_file(tmp_path / "back" / part / f"{file}.safetensors"))
    single = diffusers.StableDiffusionPipeline.from_single_file(str(out), config=str(tmp_path / "pipe"))
    single.set_progress_bar_config(disable=True)
    prompts, noise = ["a red circle", "a blue square above a circle"], normal(2, 4, 8, 12)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "latents": noise}
    a, b = (arrays(pipe(prompts, **options, **SIZE).images) for pipe in (original, single))
    assert abs(a - b).max() <= 1 and a.std() > 10
    assert abs(arrays(ours(prompts, steps=4, guidance=5.0, latents=noise, **SIZE)) - a).max() <= 1


@pytest.mark.parametrize(("table", "text"), [(SD15, TEXT1), (SD21, TEXT2)], ids=["1.5", "2.1"])
def test_stable_diffusion_sizes(table, text):
    """Every name and shape is one that diffusers' converters know, and tells the published sizes."""
    config = build(UNetConfig, {key: table[key] for key in UNetConfig.__dataclass_fields__ if key in table})
    with torch.device("meta"):
        models = {"unet": UNet(config), "vae": VAE(VAEConfig()), "text_encoder": TextEncoder(text)}
    files = {part: encode(part, vars(model.config), model.state_dict()) for part, model in models.items()}
    assert [len(files[part]) for part in models] == [686, 248, 196 if text is TEXT1 else 280]
    linear = files["unet"]["output_blocks.11.1.proj_out.weight"].ndim == 2
    assert linear == (text is TEXT2) and files["vae"]["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert files["unet"]["output_blocks.5.2.conv.weight"].shape == (1280, 1280, 3, 3)
    assert files["vae"]["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    names = {f"model.diffusion_model.{name}": tensor for name, tensor in files["unet"].items()}
    converted = {"unet": theirs.convert_ldm_unet_checkpoint(names, table)}
    levels = {f"{way}_block_types": [""] * 4 for way in ("down", "up")}
    converted["vae"] = theirs.convert_ldm_vae_checkpoint(dict(files["vae"]), levels)
    if text is TEXT2:
        with torch.device("meta"):
            clip = CLIPTextModel(CLIPTextConfig(hidden_size=1024))
        converted["text_encoder"] = theirs.convert_open_clip_checkpoint(clip, files["text_encoder"], "")
    for part, tensors in converted.items():
        expected = {name.removeprefix("text_model."): t.shape for name, t in models[part].state_dict().items()}
        assert {name.removeprefix("text_model."): t.shape for name, t in tensors.items()} == expected
    if text is TEXT2:  # the published files hold the layer that is left out
        last = {name.replace(".22.", ".23."): t for name, t in files["text_encoder"].items() if ".22." in name}
        files["text_encoder"] |= last
    for part, model in models.items():
        config, tensors = decode(part, files[part])
        assert build(type(model.config), config) == model.config
        assert {name: t.shape for name, t in tensors.items()} == shapes(model)


@pytest.fixture(scope="module", params=[1, 2])
def others(request, tmp_path_factory) -> tuple[Parts, Path]:
    """A model of each generation's conventions, and a checkpoint of it as trainings and merges leave them."""
    folder, second = tmp_path_factory.mktemp("others"), request.param == 2
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    sizes = {"cross_attention_dim": 64, "norm_num_groups": 32, "sample_size": 96 if second else 64}
    sizes |= {"use_linear_projection": True, "attention_head_dim": (1, 2)} if second else {"attention_head_dim": 8}
    vae = VAE(vae_config((32, 64), norm_num_groups=32, scaling_factor=0.18215, sample_size=512))
    unet = UNet(unet_config((64, 128), "cp", layers_per_block=2, **sizes))
    encoder = TextEncoder(TextConfig(**text, hidden_act="gelu" if second else "quick_gelu"))
    models = [randomize(model, i).half().float() for i, model in enumerate((vae, encoder, unet))]
    parts = tiny_parts()._replace(**dict(zip(("vae", "text_encoder", "unet"), models, strict=True)))
    with pytest.warns(UserWarning, match="ComfyUI"):
        save_single_file(folder / "own.safetensors", parts, half=True)
    tensors = load_file(folder / "own.safetensors")
    names = [name for name in tensors if name.startswith("model.diffusion_model.")]
    tensors |= {"model_ema." + name[len("model.") :].replace(".", ""): 2 * tensors[name] for name in names}
    tensors = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {"first_stage_model.loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    if second:
        tensors["cond_stage_model.model.text_projection"] = torch.zeros(2, 2)
        tensors["first_stage_model.encoder.mid.attn_1.q.weight"].squeeze_()
    else:
        tensors["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)
    torch.save({"state_dict": tensors, "global_step": 7}, folder / "others.ckpt")
    return parts, folder / "others.ckpt"


def test_a_checkpoint_of_others(others):
    parts, file = others
    second = parts.unet.config.use_linear_projection
    with pytest.warns(UserWarning, match="v_prediction is assumed") if second else nullcontext():
        pipe = Pipeline.from_pretrained(file)
    assert pipe.schedule.config.prediction_type == ("v_prediction" if second else "epsilon")
    assert (len(pipe.tokenizer), pipe.tokenizer.pad_token_id) == (49408, 0 if second else 49407)
    for part in MODELS:
        model = getattr(parts, part)
        assert same(getattr(pipe, part), model.state_dict()) and getattr(pipe, part).config == model.config
    pipe = Pipeline.from_pretrained(file, prediction="v_prediction", zero_snr=True, ema=True)
    assert same(pipe.unet, {name: 2 * tensor for name, tensor in parts.unet.state_dict().items()})
    assert pipe.schedule.config.rescale_betas_zero_snr and same(pipe.vae, parts.vae.state_dict())
    tensors, alone = torch.load(file)["state_dict"], file.with_name("vae.safetensors")
    save_file({n.split(".", 1)[1]: tensor for n, tensor in tensors.items() if n.startswith("first_stage")}, alone)
    assert same(VAE.from_pretrained(alone), parts.vae.state_dict())
    with pytest.raises(UserError, match="no SD 1.x or 2.x unet .*missing: all of it"):
        Pipeline.from_pretrained(alone)


def test_clip_vocabulary(others, tmp_path):
    """Ids that OpenAI publish, and those of transformers on texts of every kind."""
    tokenizer = Tokenizer.from_pretrained(others[1])
    assert tokenizer.encode("A photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    tokenizer.save_pretrained(tmp_path)
    assert_same(tokenizer, CLIPTokenizer.from_pretrained(tmp_path), TEXTS)


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(main, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["ldm", *words])
        main()

    with pytest.warns(UserWarning, match="vae.scaling_factor.*unet.attention_head_dim"):
        run(export.main, "shapes", "--single-file", "new/one.safetensors", "--half")
    half = UNet.from_pretrained("shapes").half().float()
    assert same(UNet.from_pretrained("new/one.safetensors"), half.state_dict())
    given = ("--prompt", "a red circle", "--steps", "2", "--compile", "never", "--out")
    run(sample.main, "--model", "shapes", *given, "a")
    run(sample.main, "--model", "new/one.safetensors", "--tokenizer", "shapes", "--vae", "shapes", *given, "b")
    a, b = (arrays([Image.open(next(Path(folder).glob("0000-*")))]) for folder in "ab")
    assert abs(a - b).max() <= 4 and a.std() > 10
    for words, message in (
        (("--model", "new/one.safetensors"), "49408 tokens.*does not fit the text encoder"),
        (("--model", "new/one.safetensors", "--tokenizer", "shapes", "--ema"), "missing: .model_ema.diffusion_model"),
        (("--model", "shapes", "--zero-snr"), "are for single files"),
    ):
        with pytest.raises(UserError, match=message):
            run(sample.main, *words, *given, "c")
    with pytest.raises(UserError, match="must name a .safetensors file"):
        run(export.main, "shapes", "--single-file", "one.ckpt")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("conditioner.embedders.1.model.ln_final.bias", "Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("control_model.input_hint_block.0.bias", "a ControlNet"),
        ("encoder.down_blocks.0.resnets.0.norm1.bias", "a part in diffusers' layout.*folder"),
    ],
)
def test_other_architectures_are_named(tmp_path, name, architecture):
    save_file({name: torch.zeros(1)}, tmp_path / "x.safetensors")
    for cls in (Pipeline, VAE, UNet, TextEncoder, Tokenizer):
        with pytest.raises(UserError, match=f"x.safetensors' is {architecture}"):
            cls.from_pretrained(tmp_path / "x.safetensors")
