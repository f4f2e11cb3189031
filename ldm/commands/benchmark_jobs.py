"""The work of both sides of the benchmark, a function per workload. Diffusers gets its default attention and the faster
memory layout."""

import itertools
import resource
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.commands.benchmark import Case
from ldm.commands.plan import count_tflop
from ldm.data import DataConfig, batches, open_dataset
from ldm.model_io import find_root
from ldm.pipeline import Pipeline
from ldm.samplers import ImageNoise
from ldm.unet import UNet, UNetConfig

PROMPTS = ["a red circle above a blue square", "a green star", "a 3D emoji of a red apple", "a flat emoji of a dog"]
SIDE = 8192  # of the matrices that measure the rate of products
Run = Callable[[], Any]  # one run; returns a tensor, or a list of tensors or images


@cache
def build(case: Case) -> Run:
    """The workload of that name, ready to run."""
    return globals()[case.workload.replace("-", "_")](case)


def measured(case: Case) -> tuple[float, np.ndarray, int, tuple[float, ...]]:
    """Seconds per run of a case, the outputs of the last, the peak bytes, and on a GPU the `cost`."""
    seconds, outputs = timed(build(case), least=0.2)
    outputs = np.asarray(outputs.cpu() if isinstance(outputs, Tensor) else outputs, dtype=float)
    on_gpu, peak = case.device == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, outputs, torch.cuda.max_memory_allocated() if on_gpu else peak, cost(case) if on_gpu else ()


@cache
def cost(case: Case) -> tuple[float, ...]:
    """Seconds of a run at the FLOPs per second of a large matrix product in its precision, and with a kernel running;
    what is missing are those in which the GPU waits for launches."""
    run, x = build(case), torch.randn(SIDE, SIDE, device=case.device, dtype=getattr(torch, case.dtype))
    product = min(timed(lambda: x @ x, least=0.2)[0] for _ in range(2))
    with torch.compiler.set_stance("force_eager"):
        products = count_tflop(run) / (2e-12 * SIDE**3)
    with torch.profiler.profile() as profiler:
        timed(run)
    kernels = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    torch.cuda.reset_peak_memory_stats()  # of this and of the first round, which prepares
    return products * product, 1e-6 * sum(kernel.self_device_time_total for kernel in kernels)


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


def open_diffusers(model: str, **models: nn.Module) -> Any:
    """The pipeline of diffusers on a model that ours opens too but for `models`."""
    from diffusers import StableDiffusionPipeline

    options = {"safety_checker": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(find_root(model), **options, **models)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_pipeline(case: Case) -> Any:
    """The pipeline of a side, whose parts have the same names; random inputs are the same from here on."""
    dtype = getattr(torch, case.dtype if case.workload != "train-unet" else "float32")  # trained under autocast
    name, random = ("emoji", {"unet": random_unet(case).to(dtype)}) if case.model == "sd15" else (case.model, {})
    if case.ours:
        pipe = Pipeline(Pipeline.from_pretrained(name, case.device, dtype).parts._replace(**random))
    else:
        pipe = open_diffusers(name.removesuffix("-turbo"), **random).to(case.device, dtype)
    if case.workload != "train-unet":  # where diffusers is faster in the layout that it opens in
        for model in (pipe.unet, pipe.vae):
            model.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    return pipe


def random_unet(case: Case) -> nn.Module:
    """A U-Net of Stable Diffusion 1.5's sizes among the other parts of emoji; both sides have the same weights."""
    torch.manual_seed(0)
    with torch.device(case.device):
        unet = UNet(UNetConfig(in_channels=16, out_channels=16, cross_attention_dim=192))
        if case.ours:
            return unet.to(memory_format=torch.channels_last)  # as `Pipeline.from_pretrained` does
        from diffusers import UNet2DConditionModel

        theirs = UNet2DConditionModel(**asdict(unet.config))
        theirs.load_state_dict(unet.state_dict())
        return theirs


def unet_inputs(unet: nn.Module, batch: int, side: int, length: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents of `side` positions, timesteps, and contexts of `length` tokens, where and as the weights are."""
    c, weight = unet.config, next(unet.parameters())
    with weight.device:
        z_t, context = torch.randn(batch, c.in_channels, side, side), torch.randn(batch, length, c.cross_attention_dim)
        return z_t.to(weight.dtype), torch.linspace(0, 999, batch).long(), context.to(weight.dtype)


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
    latent = pipe.unet.config.in_channels, *(case.size // pipe.vae_scale_factor,) * 2

    def run() -> list[Any]:
        noise = ImageNoise(range(case.batch), latent, case.device)().to(pipe.unet.dtype)  # as ours, drawn in float32
        return pipe(prompts, latents=noise, num_inference_steps=25, guidance_scale=5.0, **shape).images

    return run


def train_unet(case: Case) -> Run:
    """A training step of the U-Net."""
    model, predict = open_unet(case, case.batch)
    if case.compiled:
        model.compile()
    autocast = torch.autocast(case.device, getattr(torch, case.dtype), enabled=case.dtype != "float32")
    return training(model, autocast(predict))


def training(model: nn.Module, predict: Callable[[], Tensor]) -> Run:
    """A step: forward, mean squared prediction, backward, clipping, AdamW. Returns the loss and gradient norm."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # 0: all steps return the same

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = predict().float().square().mean()
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
