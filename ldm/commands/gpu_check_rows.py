"""The rows of `ldm gpu-check`. Each function returns the largest difference or another figure, and a note."""

import json
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.commands.benchmark import Case, cells, measure
from ldm.commands.benchmark_jobs import PROMPTS
from ldm.commands.gpu_check import Row, Skipped
from ldm.config import load, to_dict
from ldm.model_io import load_tensors
from ldm.pipeline import Pipeline
from ldm.train import autoencoder, clip, diffusion, loop
from ldm.train.config import TrainConfig

MODELS, CONFIGS = ("shapes", "emoji"), Path("configs/shapes")
PARTS = ("VAE encode", "VAE decode", "text encoder", "U-Net", "pictures")
# dtype, TF32, and allowed: the largest difference of a part, relative, and the mean one of pictures, in levels. Half
# precision: three times that on CPUs. TF32 rounds as float16 does.
PRECISIONS = {
    "float32": (torch.float32, False, 1e-4, 0.05),
    "TF32": (torch.float32, True, 6e-3, 0.2),
    "bfloat16": (torch.bfloat16, False, 6e-2, 2.0),
    "float16": (torch.float16, False, 6e-3, 0.2),
}
TRAININGS = {  # by the configs of shapes
    "autoencoder": (autoencoder.AutoencoderConfig, autoencoder.AutoencoderTask, "loss.gan_start=1 statistics=256"),
    "clip": (clip.CLIPConfig, clip.CLIPTask, ""),
    "diffusion": (
        diffusion.DiffusionConfig,
        diffusion.DiffusionTask,
        "vae={0}/autoencoder text_encoder={0}/clip cache={0}/latents.safetensors preview.count=2 preview.steps=2",
    ),
}
CHANGES = "data.length=256 held_out=32 train.batch_size=16 train.log_every=1 train.save_every=0 train.trackers=[]"
CHANGES += " train.precision=bf16 train.optimizer.decay=constant train.steps=4 train.max_skipped=1"


def rows(device: torch.device, work: Path) -> list[Row]:
    """All checks on a device, in order: trainings read what earlier ones wrote into the folder `work`."""
    on_gpu, table = device.type == "cuda", []

    def add(name: str, allowed: float, check: Callable[..., float | tuple[float, str]], *arguments: Any) -> None:
        table.append(Row(name, allowed, partial(check, *arguments)))

    for name, (*_, relative, mean) in PRECISIONS.items():
        for part in PARTS:
            add(f"parity: {part}, {name}", mean if part == "pictures" else relative, parity, part, name, device)
    for kind in TRAININGS:
        add(f"training: {kind}", math.inf, trained, work, kind, kind)
    add("training: pictures of it", 255, trained_pictures, work, device)
    add("training: 2 + 2 steps, not 4", 1e-3 if on_gpu else 0, resumed, work)
    add("compiled: pictures", 2, compiled_pictures, device)
    add("compiled: training", 1e-2, compiled_training, work)
    for kind in ("sampling", *TRAININGS):
        add(f"no syncs: {kind}", math.inf, unsynced, kind, work, device)
    cases = (("sampling", "emoji", 64, 8), ("train-unet", "sd15", 512, 8))
    for case in cases if on_gpu else (("sampling", "tiny", 16, 2), ("train-unet", "tiny", 16, 2)):
        case = Case(*case, compiled=False, device=device.type, dtype="bfloat16")
        add(f"benchmark: {case}", case.allowed, benchmark, case)
    return table


# --- parity with float32 on the CPU


def parity(part: str, precision: str, device: torch.device) -> float:
    """The largest difference over MODELS."""
    dtype, tf32, *_ = PRECISIONS[precision]
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not ampere and (tf32 or dtype == torch.bfloat16 and device.type == "cuda"):
        raise Skipped(f"no {precision} on this device")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    pairs = ((output(part, model, device, dtype), reference(part, model)) for model in MODELS)
    return max(difference(*pair, relative=part != "pictures") for pair in pairs)


opened = cache(Pipeline.from_pretrained)


@torch.inference_mode()
def output(part: str, model: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a part computes from fixed inputs, in float32 on the CPU: a model under autocast, as in training; a pipeline
    of that precision."""
    if part == "pictures":
        return pictures(opened(model, device, dtype))
    pipe, generator = opened(model, device, torch.float32), torch.Generator().manual_seed(0)
    z, x = (torch.randn(2, *shape, generator=generator).to(device) for shape in (pipe.latent_shape(), (3, 64, 64)))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if part == "VAE encode":
            y = pipe.vae.encode(x.clamp(-1, 1)).mean
        elif part == "VAE decode":
            y = pipe.vae.decode(z)
        else:
            y = pipe.encode_prompt(PROMPTS[:2])
        if part == "U-Net":
            y = pipe.unet(z, torch.tensor([100, 800], device=device), y)
    return y.float().cpu()


@cache
def reference(part: str, model: str) -> Tensor:
    """The same in float32 on the CPU."""
    return output(part, model, torch.device("cpu"), torch.float32)


def pictures(pipe: Pipeline) -> Tensor:
    """Two pictures (2, H, W, 3) with levels in [0, 255]."""
    return torch.from_numpy(np.stack(pipe(PROMPTS[:2], steps=10, guidance=3.0))).float()


def difference(a: Tensor, b: Tensor, relative: bool = False) -> float:
    """The mean absolute difference, or the largest one relative to the largest value of b."""
    gap = (a - b).abs()
    return float(gap.max() / b.abs().max() if relative else gap.mean())


# --- trainings, in small


def trained(work: Path, kind: str, out: str, *overrides: str, watch: Callable | None = None) -> float:
    """The loss of the last step of a training into `work/out`, which raises an error where a loss is not finite.
    `watch` wraps the losses of the task."""
    torch.use_deterministic_algorithms(not watch, warn_only=True)
    config_class, make_task, changes = TRAININGS[kind]
    changes = f"{CHANGES} {changes.format(work)}".split()
    config = load(config_class, CONFIGS / f"{kind}.toml", [*changes, *overrides])
    task = make_task(config)
    task.losses = watch(task.losses) if watch else task.losses
    loop.train(task, config.train, work / out, to_dict(config))
    lines = [json.loads(line) for line in (work / out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "skipped" in line][-1][f"{next(iter(task.modules))}_loss"]


def trained_pictures(work: Path, device: torch.device) -> float:
    """The standard deviation of the levels of pictures from the trained parts."""
    return float(pictures(opened(work / "diffusion", device, torch.float32)).std())


def resumed(work: Path) -> float:
    """The difference of the U-Net's weights after 2 steps and 2 more from those after 4."""
    for steps in (2, 4):
        trained(work, "diffusion", "resumed", f"train.steps={steps}")
    folders = (work / name / "checkpoints/step-00000004/state" for name in ("resumed", "diffusion"))
    a, b = (torch.cat([x.flatten() for x in load_tensors(f / "unet.safetensors").values()]) for f in folders)
    return difference(a, b, relative=True)


# --- compilation, and host syncs


def compiled_pictures(device: torch.device) -> float:
    """The mean difference of compiled and eager pictures, in levels of 255."""
    pipe = Pipeline.from_pretrained("shapes", device)
    eager = pictures(pipe)
    return difference(pictures(pipe.compile()), eager)


def compiled_training(work: Path) -> float:
    """The relative difference of the loss of a compiled training."""
    if not hasattr(TrainConfig, "compile"):
        raise Skipped("train.compile is no option")
    eager, compiled = (trained(work, "diffusion", x, f"train.compile={x}") for x in ("false", "true"))
    return abs(compiled - eager) / eager


def unsynced(kind: str, work: Path, device: torch.device) -> float:
    """Raises an error where the host waits for the GPU between the first and the last step of sampling, or in the
    losses or backward passes of a training after the first step."""
    if device.type != "cuda":
        raise Skipped("only a GPU can tell")
    mode = torch.cuda.set_sync_debug_mode

    def watch(losses: Callable) -> Callable:
        def watched(modules: Any, batch: Any, step: int, draws: Any) -> Iterator:
            mode("error" if step else "default")
            yield from losses(modules, batch, step, draws)
            mode("default")

        return watched

    try:
        if kind != "sampling":
            return trained(work, kind, f"unsynced-{kind}", watch=watch)
        pipe, steps = opened("emoji", device, None), 4
        pipe(PROMPTS, steps=steps, callback=lambda p: mode("error" if p.step + 1 < steps else "default"))
        return 0.0
    finally:
        mode("default")


def benchmark(case: Case) -> tuple[float, str]:
    """A case of `ldm benchmark`: the difference from diffusers; times, ratio, memory and shares in the note."""
    row = {"name": str(case)} | measure(case, 3)
    _, ours, theirs, ratio, memory, _, rate, idle = cells(row)
    note = f"{ours} / {theirs} ms, {ratio}, {memory} MB, {rate} of matmul rate, {idle} idle"
    return row.get("difference", math.nan), row["problem"] or note
