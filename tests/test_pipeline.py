"""Prompts to pictures: seeds, batches, guidance, callbacks, and what is refused."""

import copy
import warnings

import numpy as np
import pytest
import torch
from tiny_models import arrays, diffusers_unet, normal, randomize, tiny_parts, unet_config

from ldm import pipeline
from ldm.config import UserError
from ldm.distributed import fast_kernels, find_dtype
from ldm.model_io import DIFFUSERS_FILE
from ldm.pipeline import Pipeline
from ldm.unet import UNet

PROMPTS = ["a red circle", "a blue square", "a red square above a blue circle", "circle"] * 2


def test_a_part_that_is_exchanged_is_used():
    """As in diffusers, where a fine-tuned U-Net or another decoder is set on the pipeline."""
    pipe, parts = Pipeline(tiny_parts()), tiny_parts()
    other = parts._replace(vae=randomize(parts.vae, 8), unet=randomize(parts.unet, 9))
    pipe.vae, pipe.unet = other.vae, other.unet
    assert np.array_equal(arrays(pipe(PROMPTS[0], steps=2)), arrays(Pipeline(other)(PROMPTS[0], steps=2)))


def test_pixels_that_are_not_finite_are_an_error():
    parts = tiny_parts()
    parts.vae.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(UserError, match="NaN or infinite"):
        Pipeline(parts)("circle", steps=1)


def test_compiled_pictures_are_the_same():
    """As one graph each, and not anew for every batch; the compiler itself, a minute a model, is left out."""
    parts = tiny_parts()._replace(unet=randomize(UNet(unet_config((16,)))))
    plain, compiled = Pipeline(parts), Pipeline(copy.deepcopy(parts)).compile(backend="eager")
    for count in (1, 3):
        assert np.array_equal(arrays(compiled(PROMPTS[:count], steps=2)), arrays(plain(PROMPTS[:count], steps=2)))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 4, graphs


def test_callback_sees_every_step_and_decodes_on_demand(pipe):
    seen, decoded = [], []
    original = pipe.decode
    pipe.decode = lambda z: decoded.append(len(z)) or original(z)
    try:
        final = pipe(PROMPTS[:3], steps=3, batch_size=2, callback=seen.append)
        assert decoded == [2, 1], "a preview was decoded that nobody asked for"
        assert [(p.first, p.step, p.steps, len(p.z0)) for p in seen] == [
            (first, step, 3, count) for first, count in ((0, 2), (2, 1)) for step in range(3)
        ]
        assert [p.t for p in seen[:3]] == sorted({p.t for p in seen[:3]}, reverse=True)
        previews = seen[2].decode()
        assert [image.size for image in previews] == [(16, 16)] * 2
        # The last estimate of a sampler that ends at no noise is the picture.
        assert abs(arrays(previews) - arrays(final[:2])).max() <= 1
    finally:
        del pipe.decode


def test_options_reach_the_sampler(pipe):
    plain, guided_all = (arrays(pipe("circle", steps=3, guidance=g)) for g in (1.0, 6.0))
    never = arrays(pipe("circle", steps=3, guidance=6.0, guidance_interval=(0, -1)))
    assert abs(never - plain).max() <= 1 < abs(guided_all - plain).max()
    assert abs(arrays(pipe("circle", steps=3, guidance=6.0, guidance_rescale=0.7)) - guided_all).max() > 1
    ddpm = arrays(pipe("circle", steps=3, sampler="ddim", eta=1.0))
    assert abs(ddpm - arrays(pipe("circle", steps=3, sampler="ddim"))).max() > 1
    with pytest.raises(UserError, match="eta 0.5 is not allowed: .* with ddim alone"):
        pipe("circle", sampler="euler", eta=0.5)


def test_sizes(pipe):
    (image,) = pipe("circle", steps=1, height=24, width=32)
    assert image.size == (32, 24)
    assert pipe.latent_shape() == (4, 8, 8) and pipe.latent_shape(24, 32) == (4, 12, 16)
    assert pipe([]) == []
    for height in (0, -4, 18, 2**40):
        with pytest.raises(UserError, match=f"size {height} px cannot be made: .* multiples of 4 px"):
            pipe("circle", height=height)


def test_folders_give_the_same_pictures(pipe, tmp_path):
    """Half as large and nearly the same with float16, which is refused where it cannot hold the weights."""
    pictures = arrays(pipe("circle", steps=2))
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "half", half=True)
    assert np.abs(arrays(Pipeline.from_pretrained(tmp_path / "whole")("circle", steps=2)) - pictures).max() <= 1
    half = Pipeline.from_pretrained(tmp_path / "half")
    assert next(half.unet.parameters()).dtype == torch.float32
    assert np.abs(arrays(half("circle", steps=2)) - pictures).max() <= 2
    sizes = [(tmp_path / kind / "unet" / DIFFUSERS_FILE).stat().st_size for kind in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    half.unet.conv_in.bias.data[0] = 1e5
    with pytest.raises(UserError, match="unet.conv_in.bias has values above 65504, which float16 cannot hold"):
        half.save_pretrained(tmp_path / "large", half=True)
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(("dtype", "vae", "far"), [("bfloat16", torch.bfloat16, 8), ("float16", torch.float32, 2)])
def test_half_precision_is_near(pipe, tmp_path, dtype, vae, far):
    """Also of an edit and with embeddings in float32; latents stay in float32."""
    pipe.save_pretrained(tmp_path)
    half, seen = Pipeline.from_pretrained(tmp_path, dtype=dtype).compile(passes=100), []
    assert half.dtype == half.text_encoder.text_model.final_layer_norm.weight.dtype == getattr(torch, dtype)
    assert half.vae.quant_conv.weight.dtype == vae and half.device.type == "cpu"
    image, embeds = pipe("circle", steps=1)[0], pipe.encode_prompt(["circle"])
    for options in {"prompt": PROMPTS[0]}, {"prompt_embeds": embeds}, {"prompt": "circle", "image": image}:
        options |= {"steps": 5, "seed": 2, "callback": seen.append}
        assert abs(arrays(half(**options)) - arrays(pipe(**options))).max() <= far
    assert {x.dtype for step in seen for x in (step.z_t, step.z0)} == {torch.float32} and not half.compiled


@pytest.mark.parametrize(("dtype", "error", "least"), [("bfloat16", 0.015, 44), ("float16", 0.002, 58)])
def test_half_precision_of_shipped_models(dtype, error, least):
    """A pass as far from float32 as diffusers' own is, and dB between pictures."""
    for name, prompt in ("shapes", "three green stars"), ("emoji", "a 3D emoji of a red apple"):
        full, half = (Pipeline.from_pretrained(name, "cpu", kind) for kind in ("float32", dtype))
        inputs = normal(2, *full.latent_shape()), torch.tensor(500.0), full.encode_prompt([prompt] * 2)
        theirs = diffusers_unet(full.unet.config).to(half.dtype)
        theirs.load_state_dict(half.unet.state_dict())
        cast = [x.to(half.dtype) for x in inputs]
        with torch.no_grad():
            outputs = half.unet(*cast).float(), theirs(*cast).sample.float()
            (ours, other), expected = outputs, full.unet(*inputs)
        for a, b in (ours, expected), (other, expected), (ours, other):
            assert (a - b).norm() <= error * b.norm()
        images = (arrays(pipe(prompt, steps=8, guidance=3.0)) for pipe in (full, half))
        assert 20 * np.log10(255 / np.std(np.subtract(*images))) >= least


def test_the_precision_is_one_that_the_device_is_fast_in(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert find_dtype("auto", torch.device("cpu")) == Pipeline.from_pretrained("shapes").dtype == torch.float32
    for capability, best in ((8, 0), torch.bfloat16), ((7, 5), torch.float16):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, now=capability: now)
        assert find_dtype("auto", gpu) == best
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    with pytest.raises(UserError, match="dtype bfloat16 is too new for the GPU T4; use float16"):
        find_dtype(torch.bfloat16, gpu)
    with pytest.raises(UserError, match="dtype int8 is not allowed: float32, bfloat16, float16 or auto"):
        Pipeline.from_pretrained("shapes", "cpu", "int8")


def test_kernels_are_fast_within_alone():
    """In torch's older settings, which it reads itself; the program's newer ones stay."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        return cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision

    before, gpu = settings(), torch.device("cuda")
    for tf32, product in (True, "tf32"), (False, "ieee"):
        with warnings.catch_warnings(action="error"), fast_kernels(gpu, tf32):
            assert settings() == (True, "tf32", product) and matmul.allow_tf32 == tf32
        assert settings()[:2] == before[:2] and not matmul.allow_tf32
    matmul.fp32_precision = "tf32"
    with fast_kernels(gpu):
        assert settings() == (*before[:2], "tf32")
    matmul.fp32_precision = "ieee"


def test_large_pictures_are_decoded_few_at_a_time(pipe, monkeypatch):
    whole, sizes, decode = arrays(pipe(PROMPTS[:3], steps=2)), [], pipe.vae.decode
    monkeypatch.setattr(pipeline, "PIXELS", 2 * 16 * 16 + 1)
    monkeypatch.setattr(pipe.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
    assert abs(arrays(pipe(PROMPTS[:3], steps=2)) - whole).max() <= 1 and sizes == [2, 1]
