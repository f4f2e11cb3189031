"""Diffusers' side of the same work, written as a careful user of it would: its default attention (torch's SDPA),
inference mode, no progress bar, fused AdamW, foreach averages, and whichever memory layout is faster here."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.bench import models
from ldm.bench.worker import Job, sampling_job, size_of, synchronize

Params = dict[str, Any]
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
TRIES = 2  # of a layout


def build(case: dict, home: Path, device: torch.device) -> Job:
    """The job of a case {"kind", "params"}."""
    return BUILDERS[case["kind"]](case["kind"], case["params"], home, device)


def at_best_layout(model: nn.Module, call: Callable[[], Any], known: str | None = None) -> dict[str, Any]:
    """Leaves the model's weights in the layout in which `call` is faster, or the one `known` to be; which it is, and
    the seconds of those tried."""
    seconds = {}
    for name, layout in LAYOUTS.items() if known is None else ():
        model.to(memory_format=layout)
        found = []
        for _ in range(1 + TRIES):  # the first one prepares
            start = perf_counter()
            call()
            synchronize()
            found.append(perf_counter() - start)
        seconds[name] = min(found[1:])
    best = known or min(seconds, key=seconds.__getitem__)
    model.to(memory_format=LAYOUTS[best])
    return {"layout": best, "layouts": seconds}


def unet(kind: str, params: Params, home: Path, device: torch.device) -> Job:
    """One pass; guided: of [z_t, z_t] with both contexts, as its pipeline does."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(models.folder(params["model"], home) / "unet").eval().to(device)
    model.requires_grad_(False)
    z_t, t, context = models.unet_inputs(params, model.config, home, device)

    @torch.inference_mode()
    def run() -> dict:
        both = torch.cat([z_t, z_t]) if params["guided"] else z_t
        return {"prediction": model(both, t, encoder_hidden_states=context, return_dict=False)[0]}

    about = at_best_layout(model, run, params.get("layout"))
    if params.get("compile"):
        model.compile()
    moved = size_of(model) + z_t.nbytes * (1 + len(context) // len(z_t)) + context.nbytes
    return Job(run=run, bytes_moved=moved, about=about)


def sampling(kind: str, params: Params, home: Path, device: torch.device) -> Job:
    """Prompts to pictures through StableDiffusionPipeline, with the DDIM of the folder's own config."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = models.folder(params["model"], home)
    options = {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(folder, **options).to(device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    side, texts = params["side"] * pipe.vae_scale_factor, models.prompts(params["batch"])

    def sample(steps: int) -> list:
        noise = [torch.Generator("cpu").manual_seed(i) for i in range(len(texts))]
        settings = {"num_inference_steps": steps, "guidance_scale": params["guidance"], "generator": noise}
        return pipe(texts, height=side, width=side, **settings).images

    inputs = params | {"guided": True}
    z_t, t, context = models.unet_inputs(inputs, pipe.unet.config, home, device)
    with torch.inference_mode():
        about = at_best_layout(pipe.unet, lambda: pipe.unet(torch.cat([z_t, z_t]), t, context), params.get("layout"))
        decoded = at_best_layout(pipe.vae, lambda: pipe.vae.decode(z_t), params.get("vae_layout"))
    if params.get("compile"):
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    moved = params["steps"] * size_of(pipe.unet) + size_of(pipe.vae.decoder, pipe.text_encoder)
    job = sampling_job(sample, params["steps"], moved)
    job.about = about | {f"vae_{name}": value for name, value in decoded.items()}
    return job


def vae(kind: str, params: Params, home: Path, device: torch.device) -> Job:
    """Pictures to moments, or raw latents to pictures."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(models.folder(params["model"], home) / "vae").eval().to(device)
    model.requires_grad_(False)
    encodes = kind == "vae-encode"
    batch, side = params["batch"], params["size"] // 2 ** (len(model.config.block_out_channels) - 1)
    x = models.pictures(batch, params["size"], device)
    z = models.normal(batch, model.config.latent_channels, side, side).to(device)

    @torch.inference_mode()
    def run() -> dict:
        if encodes:
            posterior = model.encode(x).latent_dist
            return {"mean": posterior.mean, "std": posterior.std}
        return {"x": model.decode(z).sample}

    half = model.encoder if encodes else model.decoder
    about = at_best_layout(model, run, params.get("layout"))
    if params.get("compile"):
        half.compile()
    return Job(run=run, bytes_moved=size_of(half) + x.nbytes + z.nbytes, about=about)


def _open(kind: str, params: Params, home: Path) -> nn.Module:
    folder = models.folder(params.get("model", models.CLIP_NAME), home)
    if kind == "train-clip":
        from transformers import CLIPModel

        return CLIPModel.from_pretrained(folder, attn_implementation="sdpa")
    from diffusers import AutoencoderKL, UNet2DConditionModel

    cls, part = (UNet2DConditionModel, "unet") if kind == "train-unet" else (AutoencoderKL, "vae")
    return cls.from_pretrained(folder / part)


def _loss(kind: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if kind == "train-unet":
        prediction = model(batch["z_t"], batch["t"], batch["context"], return_dict=False)[0]
        return F.mse_loss(prediction, batch["target"])
    if kind == "train-clip":
        return model(input_ids=batch["tokens"], pixel_values=batch["x"], return_loss=True).loss
    torch.manual_seed(0)  # the same latent noise on both sides
    posterior = model.encode(batch["x"]).latent_dist
    x = model.decode(posterior.sample()).sample
    return F.l1_loss(x, batch["x"]) + models.KL * posterior.kl().sum() / posterior.mean.numel()


def train(kind: str, params: Params, home: Path, device: torch.device) -> Job:
    """A step as in diffusers' and transformers' examples: forward, backward, clip, AdamW, EMAModel."""
    from diffusers.training_utils import EMAModel

    model = _open(kind, params, home).train().to(device)
    batch = models.training_batch(kind, params, home, device)
    parameters = list(model.parameters())

    def both_ways() -> None:
        _loss(kind, model, batch).backward()
        model.zero_grad(set_to_none=True)

    about = at_best_layout(model, both_ways, params.get("layout"))
    fixed = {"lr": models.LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = torch.optim.AdamW(parameters, **fixed, fused=True)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
    first: dict[str, Tensor] = {}

    def run() -> dict:
        loss = _loss(kind, model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        if not first:
            first.update(loss=loss.detach().clone(), gradient=models.gradient(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if kind == "train-clip":
            with torch.no_grad():
                model.logit_scale.clamp_(max=4.6052)
        average.step(parameters)
        return first

    moved = models.FORWARDS * size_of(model) + sum(v.nbytes for v in batch.values())
    return Job(run=run, bytes_moved=moved, about=about)


BUILDERS: dict[str, Callable[[str, Params, Path, torch.device], Job]] = {
    "unet": unet,
    "sampling": sampling,
    "vae-encode": vae,
    "vae-decode": vae,
    "train-unet": train,
    "train-clip": train,
    "train-vae": train,
}
