"""Our side's work: each builder makes a case ready."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.bench import models
from ldm.bench.worker import Job, sampling_job, size_of
from ldm.pipeline import Pipeline
from ldm.unet import UNet
from ldm.vae import VAE

Params = dict[str, Any]


def build(case: dict, home: Path, device: torch.device) -> Job:
    """The job of a case {"kind", "params"}."""
    module, _, function = BUILDERS[case["kind"]].partition(":")
    return getattr(import_module(module), function)(case["kind"], case["params"], home, device)


def _ready(model: nn.Module, params: Params, device: torch.device) -> nn.Module:
    model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    if params.get("compile"):
        model.compile()
    return model


def unet(kind: str, params: Params, home: Path, device: torch.device) -> Job:
    """One pass: guided, of latents (B) with what was prepared of 2B contexts, as in sampling; else of B and B."""
    model = _ready(UNet.from_pretrained(models.folder(params["model"], home) / "unet"), params, device)
    z_t, t, context = models.unet_inputs(params, model.config, home, device)
    z_t = z_t.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> dict:
        return {"prediction": model(z_t, t, given)}

    with torch.inference_mode():
        given = model.prepare(context) if params["guided"] else context
    moved = size_of(model) + z_t.nbytes * (1 + len(context) // len(z_t)) + context.nbytes
    return Job(run=run, bytes_moved=moved)


def sampling(kind: str, params: Params, home: Path, device: torch.device) -> Job:
    """Prompts to pictures through the pipeline."""
    pipe = Pipeline.from_pretrained(models.folder(params["model"], home), device)
    if params.get("compile"):
        pipe.compile()
    side = params["side"] * pipe.vae.factor
    fixed = {"guidance": params["guidance"], "sampler": "ddim", "seed": 0, "height": side, "width": side}

    def sample(steps: int) -> list:
        return pipe(models.prompts(params["batch"]), steps=steps, **fixed)

    moved = params["steps"] * size_of(pipe.unet) + size_of(pipe.vae.decoder, pipe.text_encoder)
    return sampling_job(sample, params["steps"], moved)


def vae(kind: str, params: Params, home: Path, device: torch.device) -> Job:
    """Pictures to moments, or raw latents to pictures."""
    model = VAE.from_pretrained(models.folder(params["model"], home) / "vae")
    model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    encodes = kind == "vae-encode"
    half = model.encoder if encodes else model.decoder
    if params.get("compile"):
        half.compile()
    batch, side = params["batch"], params["size"] // model.factor
    x = models.pictures(batch, params["size"], device).contiguous(memory_format=torch.channels_last)
    z = models.normal(batch, model.config.latent_channels, side, side).to(device)
    z = z.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> dict:
        if encodes:
            posterior = model.encode(x)
            return {"mean": posterior.mean, "std": posterior.std}
        return {"x": model.decode_raw(z)}

    return Job(run=run, bytes_moved=size_of(half) + x.nbytes + z.nbytes)


# The function of a kind, imported when used: a process holds only what its case needs.
BUILDERS = {
    "unet": "ldm.bench.ours:unet",
    "sampling": "ldm.bench.ours:sampling",
    "vae-encode": "ldm.bench.ours:vae",
    "vae-decode": "ldm.bench.ours:vae",
    "train-unet": "ldm.bench.training:train",
    "train-clip": "ldm.bench.training:train",
    "train-vae": "ldm.bench.training:train",
    "step-share": "ldm.bench.training:step_share",
    "data": "ldm.bench.feeding:data",
    "features": "ldm.bench.feeding:features",
}
