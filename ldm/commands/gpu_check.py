"""Checks on a GPU, in at most 3 minutes and without a network, that this project computes there what it does on a CPU.

ldm gpu-check > table.md

Exit code 1 if a row is wrong. On a CPU it is a dry run, without the rows of TF32 and of syncs.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch

from ldm.commands import benchmark
from ldm.commands.benchmark_jobs import PROMPTS
from ldm.commands.cli import markdown_table, read_options
from ldm.config import UserError, load, to_dict
from ldm.distributed import find_device
from ldm.pipeline import Pipeline
from ldm.train import autoencoder, clip, diffusion, loop

PRECISIONS = {  # dtype, TF32, and allowed: three times the difference on CPUs, where TF32 rounds as float16 does
    "float32": (torch.float32, False, 1e-4, 0.05),
    "TF32": (torch.float32, True, 6e-3, 0.2),
    "bfloat16": (torch.bfloat16, False, 6e-2, 2.0),
    "float16": (torch.float16, False, 6e-3, 0.2),
}
PARTS = {  # of images x (2, 3, H, W) and latents z (2, C, h, w)
    "VAE encode": lambda pipe, x, z: pipe.vae.encode(x).mean,
    "VAE decode": lambda pipe, x, z: pipe.vae.decode(z),
    "text encoder": lambda pipe, x, z: pipe.encode_prompt(PROMPTS[:2]),
    "U-Net": lambda pipe, x, z: pipe.unet(z, torch.tensor([100, 800]).to(z.device), pipe.encode_prompt(PROMPTS[:2])),
}
SMALL = "data.length=256 held_out=32 train.batch_size=16 train.steps=4 train.log_every=2 train.max_skipped=1"
SMALL += " train.precision=bf16 train.optimizer.warmup=0 train.optimizer.decay=constant train.trackers=[]"
CHAIN = "vae={0}/autoencoder text_encoder={0}/clip cache={0}/latents.safetensors preview.count=2 preview.steps=2"
TRAININGS = {  # of configs/shapes, with changes
    "autoencoder": (autoencoder.AutoencoderConfig, autoencoder.AutoencoderTask, "loss.gan_start=1 statistics=256"),
    "clip": (clip.CLIPConfig, clip.CLIPTask, ""),
    "diffusion": (diffusion.DiffusionConfig, diffusion.DiffusionTask, CHAIN),
}
CPU, opened = torch.device("cpu"), cache(Pipeline.from_pretrained)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm gpu-check`."""

    device: Literal["cuda", "cpu"] = "cuda"  # cpu: a dry run
    only: str = ""  # runs only the rows whose names begin with one of these words, separated by commas


def main() -> None:
    """Runs the rows, prints the table."""
    o = read_options(Options, __doc__)
    os.environ |= {"HF_HUB_OFFLINE": "1"} | ({"ACCELERATE_USE_CPU": "true"} if o.device == "cpu" else {})
    if o.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no GPU here; --device cpu is a dry run")
    device, start = find_device(o.device), perf_counter()
    with TemporaryDirectory() as work, redirect_stdout(sys.stderr):
        chosen = [row for row in rows(device, Path(work)) if row[0].startswith(tuple(o.only.split(",")))]
        if not chosen:
            raise UserError(f"no row begins with {o.only!r}; known: parity, training, compiled, no syncs, benchmark")
        lines = [result(*row) for row in chosen]
    print(markdown_table(("check", "figure", "allowed", "result", "seconds"), *lines))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {perf_counter() - start:.0f} s")
    sys.exit(any(line[3].startswith("WRONG") for line in lines))


def result(name: str, allowed: float, check: Callable[[], Any]) -> list[str]:
    """The cells of a row, whose check returns its figure, or that and a note. An error is wrong, as is NaN."""
    print(name)
    start = perf_counter()
    if torch.cuda.is_initialized():
        torch.cuda.set_sync_debug_mode("default")  # if a row has failed within a step
    try:
        value = check()
        figure, note = value if isinstance(value, tuple) else (value, "")
    except Exception as error:
        traceback.print_exc()
        figure, note = math.nan, " ".join(f"{type(error).__name__}: {error}".split())[:300]
    verdict = f"{'ok' if figure <= allowed else 'WRONG'} {note}".strip()
    return [name, f"{figure:.2g}", f"{allowed:g}", verdict, f"{perf_counter() - start:.1f}"]


def rows(device: torch.device, work: Path) -> Iterator[tuple[str, float, Callable[[], Any]]]:
    """Names, allowed figures and functions; those of trainings read what earlier ones wrote into the folder `work`."""
    on_gpu, run = device.type == "cuda", partial(trained, work)
    for precision, (_, tf32, relative, levels) in PRECISIONS.items():
        for part in (*PARTS, "pictures") if on_gpu or not tf32 else ():
            allowed = levels if part == "pictures" else relative
            yield f"parity: {part}, {precision}", allowed, partial(parity, part, precision, device)
    for kind in TRAININGS:
        yield f"training: {kind}", 1e4, partial(run, kind)
    yield "training: pictures of it", 128, lambda: float(pictures(opened(work / "diffusion", device)).std())
    yield "training: 2 + 2 steps, not 4", 1e-3, partial(changed, run, "train.steps=2", "train.steps=4")
    yield "compiled: training", 1e-2, partial(changed, run, "train.compile=true")
    yield "compiled: pictures", 2, partial(parity, "pictures", "bfloat16" if on_gpu else "float32", device, True)
    if on_gpu:
        yield "no syncs: sampling", 4, lambda: len(opened("emoji")(PROMPTS, steps=4, callback=lambda p: arm(p.step)))
    for kind in TRAININGS if on_gpu else ():
        yield f"no syncs: {kind}", 1e4, partial(run, kind, out=f"unsynced-{kind}", armed=True)
    models = (("emoji", 64, 8), ("sd15", 512, 8)) if on_gpu else (("shapes", 32, 2),) * 2
    for workload, model, allowed in zip(("sampling", "train-unet"), models, (0.25, 0.05), strict=True):
        case = benchmark.Case(workload, *model, compiled=False, device=device.type, dtype="bfloat16")
        yield f"benchmark: {case}", allowed, partial(compared, case)


def parity(part: str, precision: str, device: torch.device, compiled: bool = False) -> float:
    """The difference from float32 on the CPU: the mean of pictures, in levels, or a part's largest, relative to it."""
    models = ("shapes",) if compiled else ("shapes", "emoji")
    pairs = [(output(part, m, precision, device, compiled), output(part, m, "float32", CPU)) for m in models]
    gaps = [(a - b).abs().mean() if part == "pictures" else (a - b).abs().max() / b.abs().max() for a, b in pairs]
    return float(torch.stack(gaps).max())  # NaN where one is


@cache
@torch.inference_mode()
def output(part: str, model: str, precision: str, device: torch.device, compiled: bool = False) -> torch.Tensor:
    """A part's output for fixed inputs, under autocast as in training, or pictures by a pipeline of that precision."""
    dtype, tf32, *_ = PRECISIONS[precision]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if part == "pictures":
        pipe = Pipeline.from_pretrained(model, device, dtype)
        return pictures(pipe.compile() if compiled else pipe)
    pipe, generator = opened(model, device, torch.float32), torch.Generator().manual_seed(0)
    z, x = (torch.randn(2, *shape, generator=generator).to(device) for shape in (pipe.latent_shape(), (3, 64, 64)))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return PARTS[part](pipe, x.clamp(-1, 1), z).float().cpu()


def pictures(pipe: Pipeline) -> torch.Tensor:
    """Two pictures (2, H, W, 3) with levels in [0, 255]."""
    return torch.from_numpy(np.stack(pipe(PROMPTS[:2], steps=10, guidance=3.0))).float()


def trained(work: Path, kind: str, *changes: str, out: str = "", armed: bool = False) -> float:
    """The last loss of a training into `work/out`, of which the steps are `armed`."""
    config_class, task_class, own = TRAININGS[kind]
    config = load(config_class, Path(f"configs/shapes/{kind}.toml"), f"{SMALL} {own}".format(work).split() + [*changes])
    task, out = task_class(config), work / (out or kind)
    task.losses = lambda *inputs: (armed and arm(inputs[2])) or task_class.losses(task, *inputs)
    loop.train(task, config.train, out, to_dict(config))
    lines = [line for line in (out / "metrics.jsonl").read_text().splitlines() if "skipped" in line]
    return json.loads(lines[-1])[f"{next(iter(task.modules))}_loss"]


def changed(run: Callable[..., float], *changes: str) -> float:
    """The relative difference of the last loss of the U-Net's training with each of the changes in turn."""
    *_, loss = (run("diffusion", change, out=changes[0]) for change in changes)
    return abs(loss / run("diffusion") - 1)


def arm(step: int) -> None:
    """Makes waiting for the GPU an error within step 2, of which trainings log nothing."""
    torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")


def compared(case: benchmark.Case) -> tuple[float, str]:
    """The difference from diffusers, and the row of `ldm benchmark`."""
    row = {"name": ""} | benchmark.measure(case, 3)
    note = "; ".join(map(" ".join, zip(benchmark.HEAD[1:], benchmark.cells(row)[1:], strict=True)))
    return row.get("difference", math.nan), row["problem"] or note
