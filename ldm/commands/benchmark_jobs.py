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
from ldm.diffusion import Schedule, ScheduleConfig
from ldm.model_io import find_root
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts
from ldm.samplers import ImageNoise
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

RANDOM = {  # models with random weights: Stable Diffusion 1.5's sizes, and one to try the same code on a CPU
    "sd15": (UNetConfig(), VAEConfig()),
    "tiny": (
        UNetConfig(
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            cross_attention_dim=32,
        ),
        VAEConfig(block_out_channels=(32, 32), layers_per_block=1),
    ),
}
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


def utilization(case: Case, seconds: float) -> tuple[float, float]:
    """Of a case that takes `seconds`: its FLOPs per second as a share of those of a large matrix product in the same
    precision, and the share of the time in which no kernel runs, as where the GPU waits for launches."""
    step, on_gpu = build(case), case.device == "cuda"
    size, kind = (8192, "CUDA") if on_gpu else (512, "CPU")
    x = torch.randn(size, size, device=case.device, dtype=getattr(torch, case.dtype))
    rate = max(2e-12 * size**3 / timed(lambda: x @ x, least=0.2)[0] for _ in range(2))
    with torch.compiler.set_stance("force_eager"):
        tflop = count_tflop(step)
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profiler:
        timed(step)
    events = [event for event in profiler.key_averages() if event.device_type.name == kind]
    busy = sum(event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events) / 1e6
    return tflop / seconds / rate, max(0.0, 1 - busy / seconds)


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
    """The pipeline of a side, whose parts have the same names; random inputs are the same from here on. A U-Net that is
    trained has float32 weights."""
    dtype = torch.float32 if case.workload == "train-unet" else getattr(torch, case.dtype)
    if case.model in RANDOM:
        pipe = open_random(case, dtype)
    elif case.ours:
        pipe = Pipeline.from_pretrained(case.model, case.device, dtype)
    else:
        pipe = open_diffusers(case.model.removesuffix("-turbo")).to(case.device, dtype)
    if case.workload != "train-unet":  # where diffusers is faster in the layout that it opens in
        for model in (pipe.unet, pipe.vae):
            model.to(memory_format=torch.channels_last)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    return pipe


def open_random(case: Case, dtype: torch.dtype) -> Any:
    """A pipeline of RANDOM without a text encoder, whose weights diffusers draws for both sides."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    configs, schedule = RANDOM[case.model], ScheduleConfig(sampler="ddim")
    levels = len(configs[1].block_out_channels)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    torch.manual_seed(0)
    with torch.device(case.device):
        unet, vae = UNet2DConditionModel(**asdict(configs[0])).to(dtype), AutoencoderKL(**asdict(configs[1]), **kinds)
    if case.ours:
        with torch.device("meta"):
            ours = UNet(configs[0]).eval(), VAE(configs[1]).eval()
        for model, theirs in zip(ours, (unet, vae.to(dtype)), strict=True):
            model.load_state_dict(theirs.state_dict(), assign=True)
        return Pipeline(Parts(ours[1], None, None, ours[0], Schedule(schedule)))
    betas = {name: value for name, value in asdict(schedule).items() if name not in ("sampler", "sigmas")}
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(**betas, clip_sample=False)
    pipe = StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, **absent, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(case.device, dtype)


def unet_inputs(unet: nn.Module, batch: int, side: int, length: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents of `side` positions, timesteps, and contexts of `length` tokens, on the U-Net's device and in its
    precision."""
    c, weight = unet.config, next(unet.parameters())
    with weight.device:
        z_t, context = torch.randn(batch, c.in_channels, side, side), torch.randn(batch, length, c.cross_attention_dim)
        return z_t.to(weight.dtype), torch.linspace(0, 999, batch).long(), context.to(weight.dtype)


def open_unet(case: Case, batch: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The U-Net, and a function that returns its prediction."""
    pipe = open_pipeline(case)
    side = case.size // 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    inputs = unet_inputs(pipe.unet, batch, side, 77 if case.model in RANDOM else 32)
    return pipe.unet, lambda: pipe.unet(*inputs) if case.ours else pipe.unet(*inputs).sample


# --- workloads


def unet_forward(case: Case) -> Run:
    """A pass of the U-Net with guidance: twice the batch."""
    return torch.inference_mode()(open_unet(case, 2 * case.batch)[1])


def vae(case: Case) -> Run:
    """Pictures to mean latents and back."""
    model, zero = open_pipeline(case).vae, torch.zeros((), device=case.device)
    x = torch.rand(case.batch, 3, case.size, case.size, device=case.device) * 2 - 1
    x = x.to(next(model.parameters()))
    return torch.inference_mode()(lambda: model(x, zero)[0] if case.ours else model(x).sample)


def sampling(case: Case) -> Run:
    """Prompts to pictures by 25 steps of DDIM, which is diffusers' scheduler here, with guidance 5; by a turbo model as
    it was distilled. A model without a text encoder takes random contexts."""
    pipe, inputs = open_pipeline(case), {"prompt": (PROMPTS * 2)[: case.batch]}
    inputs |= {"height": case.size, "width": case.size}
    if case.model in RANDOM:
        contexts = torch.randn(2, case.batch, 77, pipe.unet.config.cross_attention_dim).to(case.device)
        inputs |= {"prompt": None, "prompt_embeds": contexts[0], "negative_prompt_embeds": contexts[1]}
    if case.ours:
        if case.compiled:
            pipe.compile()
        options = {} if pipe.unet.distilled_steps else {"steps": 25, "guidance": 5.0, "sampler": "ddim"}
        return lambda: pipe(**inputs, seed=0, **options)
    if case.compiled and case.device == "cuda":  # on a CPU that takes minutes, and what users have is not compiled
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    shape = pipe.unet.config.in_channels, *(case.size // pipe.vae_scale_factor,) * 2

    def run() -> list[Any]:
        noise = ImageNoise(range(case.batch), shape, case.device)()
        return pipe(**inputs, latents=noise.to(pipe.unet.dtype), num_inference_steps=25, guidance_scale=5.0).images

    return run


def train_unet(case: Case) -> Run:
    """A training step of the U-Net."""
    model, predict = open_unet(case, case.batch)
    if case.compiled:
        model.compile()
    dtype = getattr(torch, case.dtype)
    return training(model, torch.autocast(case.device, dtype, enabled=dtype != torch.float32)(predict))


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
