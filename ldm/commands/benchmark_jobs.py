"""The work of both sides of the benchmark, a function per workload. Diffusers gets its default attention and the faster
memory layout."""

import itertools
import resource
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm import losses
from ldm.commands.benchmark import Case
from ldm.data import DataConfig, open_dataset, stack
from ldm.model_io import find_root
from ldm.pipeline import Pipeline
from ldm.unet import UNet
from ldm.vae import VAE

PROMPTS = ["a red circle above a blue square", "a green star", "a 3D emoji of a red apple", "a flat emoji of a dog"]
FACTOR = {"shapes": 4, "emoji": 8}  # pixels of a side per latent pixel
Run = Callable[[], Any]  # one run; returns a list of tensors, or of lists of images


def build(case: Case) -> Run:
    """The workload of that name, ready to run."""
    return globals()[case.workload.replace("-", "_")](case)


def timed(run: Run, least: float = 0.0) -> float:
    """Seconds per run, of one run and more until `least` seconds are over."""
    start = time.perf_counter()
    for runs in itertools.count(1):
        run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds >= least:
            return seconds / runs


def outcome(run: Run) -> tuple[list[np.ndarray], int]:
    """The outputs of one more run, and the peak bytes so far."""
    arrays = [np.asarray(x.cpu() if isinstance(x, Tensor) else x, dtype=float) for x in run()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return arrays, torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak


def fastest_layout(model: nn.Module, run: Run) -> None:
    """Leaves the model in the memory layout in which `run` is faster, the same effort for both sides."""
    seconds = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        seconds[layout] = min([timed(run) for _ in range(3)][1:])
    model.to(memory_format=min(seconds, key=seconds.__getitem__))


# --- models and inputs, the same for both sides


def normal(case: Case, *shape: int, seed: int = 0) -> Tensor:
    """Standard normals that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(case.device)


def open_diffusers(model: str) -> Any:
    """The pipeline of diffusers on a model that ours opens too."""
    from diffusers import StableDiffusionPipeline

    options = {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(find_root(model), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_part(case: Case, part: str) -> nn.Module:
    """The "unet" or the "vae" of a shipped model."""
    if case.ours:
        network = {"unet": UNet, "vae": VAE}[part]
    else:
        network = getattr(import_module("diffusers"), {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[part])
    return network.from_pretrained(find_root(case.model) / part).to(case.device)


def open_unet(case: Case, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The U-Net, and a function that returns its prediction on fixed latents and contexts of 32 tokens."""
    unet, side = open_part(case, "unet"), case.size // FACTOR[case.model]
    z_t = normal(case, batch, unet.config.in_channels, side, side)
    context = normal(case, batch, 32, unet.config.cross_attention_dim, seed=1)
    t = torch.arange(batch, device=case.device) * 999 // max(batch - 1, 1)
    return unet, lambda: unet(z_t, t, context) if case.ours else unet(z_t, t, context).sample


# --- inference


def ready(model: nn.Module, run: Run) -> Run:
    """`run` in inference mode, with the model in its faster layout."""
    run = torch.inference_mode()(run)
    model.eval().requires_grad_(False)
    fastest_layout(model, run)
    return run


def unet_forward(case: Case) -> Run:
    """A pass of the U-Net with guidance: twice the batch."""
    unet, predict = open_unet(case, 2 * case.batch)
    return ready(unet, lambda: [predict()])


def vae(case: Case) -> Run:
    """Pictures to moments, and their mean to pictures."""
    model, small = open_part(case, "vae"), normal(case, case.batch, 3, case.size // 8, case.size // 8)
    x = F.interpolate(small, scale_factor=8, mode="bilinear").tanh()

    def run() -> list[Tensor]:
        posterior = model.encode(x) if case.ours else model.encode(x).latent_dist
        decoded = model.decode_raw(posterior.mean) if case.ours else model.decode(posterior.mean).sample
        return [posterior.mean, posterior.std, decoded]

    return ready(model, run)


def sampling(case: Case) -> Run:
    """Prompts to pictures by 25 steps of DDIM with guidance 5."""
    prompts, shape = (PROMPTS * 2)[: case.batch], {"height": case.size, "width": case.size}
    if case.ours:
        pipe = Pipeline.from_pretrained(case.model, case.device)
        if case.compiled:
            pipe.compile()
        return lambda: [pipe(prompts, steps=25, guidance=5.0, sampler="ddim", seed=0, **shape)]
    pipe = open_diffusers(case.model).to(case.device)  # its scheduler is DDIM

    def run(steps: int = 25) -> list[list[Image.Image]]:
        noise = [torch.Generator().manual_seed(i) for i in range(case.batch)]
        return [pipe(prompts, generator=noise, num_inference_steps=steps, guidance_scale=5.0, **shape).images]

    for model in (pipe.unet, pipe.vae):
        fastest_layout(model, lambda: run(2))
    if case.compiled and case.device == "cuda":  # on a CPU that takes minutes, and what users have is not compiled
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    return run


# --- training steps: forward and loss of each side, the same optimizer for both


def training(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    """A step: forward, backward, clipping, AdamW. Returns the loss and gradient norm before the first step."""

    def backward() -> list[Tensor]:
        model.zero_grad()
        value = loss()
        value.backward()
        return [value.detach(), nn.utils.clip_grad_norm_(model.parameters(), 1.0)]

    model.train()
    first = backward()
    fastest_layout(model, backward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> list[Tensor]:
        backward()
        optimizer.step()
        return first

    return step


def train_unet(case: Case) -> Run:
    """The squared error of the prediction."""
    unet, predict = open_unet(case, case.batch)
    zero, criterion = torch.zeros_like(predict()), losses.diffusion if case.ours else F.mse_loss
    return training(unet, lambda: criterion(predict(), zero))


# --- our data sets


def data(case: Case) -> Run:
    """The next batch of a loader."""
    dataset = open_dataset(DataConfig(name=case.model, size=case.size), "train")
    loader = torch.utils.data.DataLoader(dataset, case.batch, collate_fn=stack)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: [next(batches)["image"]]
