"""The work of both sides of the benchmark, a function per workload. Diffusers gets its default attention and the faster
memory layout."""

import itertools
import resource
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.commands.benchmark import Case
from ldm.data import DataConfig, batches, open_dataset
from ldm.model_io import find_root
from ldm.pipeline import Pipeline

PROMPTS = ["a red circle above a blue square", "a green star", "a 3D emoji of a red apple", "a flat emoji of a dog"]
Run = Callable[[], Any]  # one run; returns a tensor, or a list of tensors or images


@cache
def build(case: Case) -> Run:
    """The workload of that name, ready to run."""
    return globals()[case.workload.replace("-", "_")](case)


def measured(case: Case) -> tuple[float, np.ndarray, int]:
    """Seconds per run of a case, the outputs of the last, and the peak bytes so far."""
    seconds, outputs = timed(build(case), least=0.2)
    outputs = np.asarray(outputs.cpu() if isinstance(outputs, Tensor) else outputs, dtype=float)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, outputs, torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak


def timed(run: Run, least: float = 0.0) -> tuple[float, Any]:
    """Seconds per run, of one run and more until `least` seconds are over, and the outputs of the last."""
    start = time.perf_counter()
    for runs in itertools.count(1):
        outputs = run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if seconds >= least:
            return seconds / runs, outputs


def open_diffusers(model: str) -> Any:
    """The pipeline of diffusers on a model that ours opens too."""
    from diffusers import StableDiffusionPipeline

    options = {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(find_root(model), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_pipeline(case: Case) -> Any:
    """The pipeline of a side, whose parts have the same names; random inputs are the same from here on."""
    model = case.model if case.ours else case.model.removesuffix("-turbo")
    pipe = (Pipeline.from_pretrained(model, "cpu") if case.ours else open_diffusers(model)).to(case.device)
    if case.workload != "train-unet":  # where diffusers is faster in the layout that it opens in
        for model in (pipe.unet, pipe.vae):
            model.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    return pipe


def unet_inputs(unet: nn.Module, batch: int, side: int, length: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents of `side` positions, timesteps, and contexts of `length` tokens, on the U-Net's device."""
    c = unet.config
    with next(unet.parameters()).device:
        z_t, context = torch.randn(batch, c.in_channels, side, side), torch.randn(batch, length, c.cross_attention_dim)
        return z_t, torch.linspace(0, 999, batch).long(), context


def open_unet(case: Case, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The U-Net, and a function that returns its prediction."""
    pipe = open_pipeline(case)
    inputs = unet_inputs(pipe.unet, batch, case.size // 2 ** (len(pipe.vae.config.block_out_channels) - 1))
    return pipe.unet, lambda: pipe.unet(*inputs) if case.ours else pipe.unet(*inputs).sample


# --- workloads


def unet_forward(case: Case) -> Run:
    """A pass of the U-Net with guidance: twice the batch."""
    return torch.inference_mode()(open_unet(case, 2 * case.batch)[1])


def vae(case: Case) -> Run:
    """Pictures to mean latents and back."""
    model, zero = open_pipeline(case).vae, torch.zeros((), device=case.device)
    x = torch.rand(case.batch, 3, case.size, case.size, device=case.device) * 2 - 1
    return torch.inference_mode()(lambda: model(x, zero)[0] if case.ours else model(x).sample)


def sampling(case: Case) -> Run:
    """Prompts to pictures by 25 steps of DDIM, which is diffusers' scheduler here, with guidance 5; by a turbo model as
    it was distilled."""
    pipe, prompts = open_pipeline(case), (PROMPTS * 2)[: case.batch]
    shape = {"height": case.size, "width": case.size}
    if case.ours:
        if case.compiled:
            pipe.compile()
        options = {} if pipe.unet.distilled_steps else {"steps": 25, "guidance": 5.0, "sampler": "ddim"}
        return lambda: pipe(prompts, seed=0, **options, **shape)
    if case.compiled and case.device == "cuda":  # on a CPU that takes minutes, and what users have is not compiled
        pipe.unet.compile()
        pipe.vae.decoder.compile()

    def run() -> list[Any]:
        noise = [torch.Generator().manual_seed(i) for i in range(case.batch)]
        return pipe(prompts, generator=noise, num_inference_steps=25, guidance_scale=5.0, **shape).images

    return run


def train_unet(case: Case) -> Run:
    """A training step of the U-Net."""
    return training(*open_unet(case, case.batch))


def training(model: nn.Module, predict: Callable[[], Tensor]) -> Run:
    """A step: forward, mean squared prediction, backward, clipping, AdamW. Returns the loss and gradient norm."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # 0: all steps return the same

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = predict().square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return torch.stack([loss.detach(), norm])

    return step


def data(case: Case) -> Run:
    """The next batch."""
    dataset = open_dataset(DataConfig(name=case.model, size=case.size), "train")
    passes = (batches(dataset, range(len(dataset)), case.batch) for _ in itertools.count())
    samples = itertools.chain.from_iterable(passes)
    return lambda: next(samples)["image"]
