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
from tiny import same
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

MODELS = ("vae", "unet", "text_encoder")
TEXT1 = TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
SIZES2 = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
TEXT2 = TextConfig(**SIZES2, hidden_act="gelu")


@pytest.mark.parametrize("generation", [1, 2])
def test_both_ways(tmp_path, generation):
    """Here bit for bit; in diffusers the same pictures, from the names and shapes of the original code."""
    pipe, out = tmp_path / "pipe", tmp_path / "new" / "x.safetensors"
    original = stable_diffusion(tmp_path, generation, "DDIMScheduler")
    original.save_pretrained(pipe)
    with pytest.warns(UserWarning, match="ComfyUI.* only .* unet.block_out_channels"):
        save_single_file(out, load_parts(pipe))
    folder, ours = Pipeline.from_pretrained(pipe), Pipeline.from_pretrained(out, tokenizer=pipe)
    assert all(getattr(ours, part).config == getattr(folder, part).config for part in (*MODELS, "schedule"))
    assert all(same(*(getattr(pipe, part).state_dict() for pipe in (folder, ours))) for part in MODELS)
    single = diffusers.StableDiffusionPipeline.from_single_file(str(out), config=str(pipe))
    prompts, z = ["a red circle", "a blue square above a circle"], normal(2, 4, 8, 8)
    a, b = (arrays(x(prompts, num_inference_steps=4, guidance_scale=5.0, latents=z).images) for x in (original, single))
    c = arrays(ours(prompts, steps=4, guidance=5.0, latents=z))
    assert abs(a - b).max() <= 1 and abs(a - c).max() <= 1 and a.std() > 10


@pytest.mark.parametrize(("table", "text"), [(SD15, TEXT1), (SD21, TEXT2)], ids=["1.5", "2.1"])
def test_stable_diffusion_sizes(table, text):
    """Every name and shape is one that diffusers' converters know, and tells the published sizes."""
    config = build(UNetConfig, {key: table[key] for key in UNetConfig.__dataclass_fields__ if key in table})
    with torch.device("meta"):
        models = {"unet": UNet(config), "vae": VAE(VAEConfig()), "text_encoder": TextEncoder(text)}
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=text.hidden_size))
    files = {part: encode(part, vars(model.config), model.state_dict()) for part, model in models.items()}
    assert [len(files[part]) for part in models] == [686, 248, 196 if text is TEXT1 else 280]
    assert files["vae"]["encoder.mid.attn_1.q.weight"].ndim == 4 and "output_blocks.5.2.conv.bias" in files["unet"]
    unet = {f"model.diffusion_model.{name}": tensor for name, tensor in files["unet"].items()}
    converted = {"unet": theirs.convert_ldm_unet_checkpoint(unet, table)}
    converted["vae"] = theirs.convert_ldm_vae_checkpoint(dict(files["vae"]), table)
    if text is TEXT2:
        converted["text_encoder"] = theirs.convert_open_clip_checkpoint(clip, files["text_encoder"], "")
        for name in [name for name in files["text_encoder"] if ".22." in name]:  # the last layer, which is not used
            files["text_encoder"][name.replace(".22.", ".23.")] = files["text_encoder"][name]
    for part, model in models.items():
        config, tensors = decode(part, files[part])
        assert build(type(model.config), config) == model.config
        for read in (tensors, converted.get(part, tensors)):
            sizes = {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in read.items()}
            assert sizes == {name.removeprefix("text_model."): shape for name, shape in shapes(model).items()}


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def others(request, tmp_path_factory) -> tuple[Parts, Path]:
    """A model of each generation's conventions, and a checkpoint of it as trainings and merges leave them."""
    folder, second = tmp_path_factory.mktemp("others"), request.param == "gelu"
    text = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "hidden_act": request.param}
    sizes = {"cross_attention_dim": 64, "norm_num_groups": 32, "sample_size": 96 if second else 64}
    sizes |= {"use_linear_projection": True, "attention_head_dim": (1, 2)} if second else {"attention_head_dim": 8}
    vae = vae_config((32, 64), norm_num_groups=32, scaling_factor=0.18215, sample_size=512)
    models = VAE(vae), UNet(unet_config((64, 128), "cp", layers_per_block=2, **sizes)), TextEncoder(TextConfig(**text))
    parts = tiny_parts()._replace(**{part: randomize(x).half().float() for part, x in zip(MODELS, models, strict=True)})
    with pytest.warns(UserWarning, match="ComfyUI"):
        save_single_file(folder / "own.safetensors", parts, half=True)
    tensors = load_file(folder / "own.safetensors")
    unet = {name.replace(".", "")[len("model") :]: x for name, x in tensors.items() if name.startswith("model.")}
    tensors |= {f"model_ema.{name}": 2 * tensor for name, tensor in unet.items()}
    tensors = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {"first_stage_model.loss.x": torch.zeros(1), "cond_stage_model.model.logit_scale": torch.ones(1)}
    tensors["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)
    tensors["first_stage_model.encoder.mid.attn_1.q.weight"].squeeze_()
    torch.save({"state_dict": tensors, "global_step": 7}, folder / "others.ckpt")
    return parts, folder / "others.ckpt"


def test_a_checkpoint_of_others(others):
    parts, file = others
    second, new = parts.unet.config.use_linear_projection, file.with_name("new.safetensors")
    with pytest.warns(UserWarning, match="v_prediction is assumed") if second else nullcontext():
        pipe = Pipeline.from_pretrained(file)
    assert pipe.schedule.config.prediction_type == ("v_prediction" if second else "epsilon")
    assert (len(pipe.tokenizer), pipe.tokenizer.pad_token_id) == (49408, 0 if second else 49407)
    for part, model in ((getattr(pipe, name), getattr(parts, name)) for name in MODELS):
        assert same(part.state_dict(), model.state_dict()) and part.config == model.config
    pipe = Pipeline.from_pretrained(file, prediction="v_prediction", zero_snr=True, ema=True)
    assert same(pipe.unet.state_dict(), {name: 2 * tensor for name, tensor in parts.unet.state_dict().items()})
    assert pipe.schedule.config.rescale_betas_zero_snr and same(pipe.vae.state_dict(), parts.vae.state_dict())
    tensors = torch.load(file)["state_dict"]
    for named, prediction in (("v", "v_prediction"), ("epsilon", "epsilon")):
        save_file(tensors, new, metadata={"modelspec.prediction_type": named})
        assert Pipeline.from_pretrained(new).schedule.config.prediction_type == prediction
    save_file({n.split(".", 1)[1]: tensor for n, tensor in tensors.items() if n.startswith("first_stage")}, new)
    assert same(VAE.from_pretrained(new).state_dict(), parts.vae.state_dict())
    with pytest.raises(UserError, match="no SD 1.x or 2.x unet .*missing: all of it"):
        Pipeline.from_pretrained(new)


def test_clip_vocabulary(others, tmp_path):
    """Ids that OpenAI publish, and those of transformers on texts of every kind."""
    tokenizer = Tokenizer.from_pretrained(others[1])
    assert tokenizer.encode("A photo of a cat") == [49406, 320, 1125, 539, 320, 2368, 49407]
    tokenizer.save_pretrained(tmp_path)
    assert_same(tokenizer, CLIPTokenizer.from_pretrained(tmp_path), TEXTS)


def test_commands(tmp_path, monkeypatch):
    def run(main, words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["ldm", *words.split()])
        main()

    monkeypatch.chdir(tmp_path)
    given = "--prompt red --steps 2 --compile never --out"
    with pytest.warns(UserWarning, match="unet.block_out_channels.*vae.scaling_factor.*unet.attention_head_dim"):
        run(export.main, "shapes --single-file new/x.safetensors --half")
    assert {tensor.dtype for tensor in load_file("new/x.safetensors").values()} == {torch.float16}
    run(sample.main, f"--model shapes {given} a")
    run(sample.main, f"--model new/x.safetensors --tokenizer shapes --vae shapes {given} b")
    a, b = (arrays([Image.open(f"{folder}/0000-red.png")]) for folder in "ab")
    assert abs(a - b).max() <= 4 and a.std() > 10
    for main, words, message in (
        (sample.main, f"--model new/x.safetensors {given} c", "49408 tokens.*does not fit the text encoder"),
        (sample.main, f"--model new/x.safetensors --tokenizer shapes --ema {given} c", "missing: 'model_ema.diffusion"),
        (sample.main, f"--model shapes --zero-snr {given} c", "are for single files"),
        (export.main, "shapes --single-file x.ckpt", "must name a .safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            run(main, words)
    assert not Path("c").exists() and not Path("x.ckpt").exists()


def test_other_architectures_are_named(tmp_path):
    names = {"lora_unet_x.lora_up.weight": "a LoRA", "unet.x.to_q.lora_A.weight": "a LoRA", "double_blocks.0.x": "Flux"}
    names |= {"conditioner.embedders.1.model.ln_final.bias": "Stable Diffusion XL"}
    names |= {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.bias": "Stable Diffusion 3"}
    names |= {"encoder.down_blocks.0.resnets.0.norm1.bias": "a part in diffusers' layout.*folder"}
    for name, architecture in names.items():
        save_file({name: torch.zeros(1)}, tmp_path / "x.safetensors")
        for cls in (Pipeline, VAE, UNet, TextEncoder, Tokenizer):
            with pytest.raises(UserError, match=f"x.safetensors' is {architecture}"):
                cls.from_pretrained(tmp_path / "x.safetensors")
