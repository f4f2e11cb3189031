"""What a training takes: counted FLOPs, and from them and a rate the time, the cost and what must be moved."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm import losses
from ldm.clip import TextEncoder
from ldm.config import UserError, load
from ldm.data.latents import cache_bytes
from ldm.distributed import processes
from ldm.train.autoencoder import AutoencoderConfig
from ldm.train.clip import CLIPConfig
from ldm.train.diffusion import DiffusionConfig
from ldm.train.loop import Run
from ldm.train.task import training_layout
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE

STATE_BYTES = 4 + 4 + 8 + 4  # a parameter's float32 weight, gradient, two moments of AdamW, average
GRADIENT_BYTES = 4  # DDP sums float32 gradients, also under bf16 autocast


@dataclass(frozen=True, kw_only=True)
class Model:
    """The three parts of a family at one picture size, counted for one picture."""

    unet_flops: int  # forward and backward
    vae_flops: int  # encoder
    text_flops: int
    parameters: int  # of the U-Net
    unet: UNetConfig
    latent: tuple[int, int, int]
    context: tuple[int, int]
    batch: int  # of one process and micro-batch, and
    accumulate: int  # micro-batches a step, as the config has them


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained on what; rates are of one GPU."""

    pictures: int
    epochs: float = 1.0
    gpus: int = 8
    peak: float = 989e12  # FLOP/s; bf16 of an H100 SXM without sparsity, by its data sheet
    price: float = 2.5  # of a GPU hour
    bandwidth: float = 50e9  # bytes/s of an all-reduce; a network card of 400 Gbit/s a GPU
    storage: float = 10e9  # bytes/s that the storage gives all of them together
    caption_bytes: int = 100
    picture_bytes: int = 0  # of a file; 0: a quarter of a byte a pixel
    cached: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Seconds are of the whole training, rates of all GPUs together."""

    flops: float
    encode_seconds: float  # of the cache
    train_seconds: float
    gpu_hours: float
    cost: float
    pictures_per_second: float
    step_seconds: float
    reduce_seconds: float  # of a step's gradients
    waited_seconds: float  # of these, not hidden behind computing
    read_rate: float  # bytes/s that training reads
    limit: str  # what takes longest in a step


def count(run: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products and convolutions that `run` does; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


WARM_UP, PRODUCT = 2, 2048


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one process of this machine does."""

    batch: int
    threads: int
    seconds: float  # of a training step, the median
    rate: float  # FLOP/s of these steps, of the counted operations
    product: float  # FLOP/s of a matrix product in the same precision


class Steps:
    """The U-Net on noise: a task for the training loop's own step, without data."""

    def __init__(self, model: Model, batch: int):
        self.modules: dict[str, nn.Module] = {"unet": UNet(model.unet).to(memory_format=training_layout())}
        self.model, self.batch, self.dataset = model, batch, []

    def losses(self, modules: dict[str, nn.Module], batch: dict, step: int) -> Iterator[tuple[str, Tensor, dict]]:
        """The squared error of random latents, timesteps and contexts."""
        device = processes().device
        z_t = torch.randn(self.batch, *self.model.latent, device=device).contiguous(memory_format=training_layout())
        t = torch.randint(1000, (self.batch,), device=device)
        context = torch.randn(self.batch, *self.model.context, device=device)
        yield "unet", losses.diffusion(modules["unet"](z_t, t, context), torch.randn_like(z_t)), {}

    def after_step(self) -> None:
        """Nothing to hold."""


def measure(family: Path, size: int, steps: int, batch: int = 0) -> Measured:
    """Takes `steps` steps of the U-Net's training, with clipping, optimizer and average, of `batch` pictures (0: as the
    config has it), in its precision (on a CPU float32), after some to warm up."""
    model, config = read_model(family, size), load(DiffusionConfig, family / "diffusion.toml").train
    device, batch = processes().device, batch or model.batch
    config = replace(config, precision=config.precision if device.type == "cuda" else "no", accumulate=1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Steps(model, batch), config, Path(folder))
        step = itertools.count()
        batches = itertools.repeat(({}, {}))
        times = [seconds(lambda: run.step(batches, next(step)), device) for _ in range(WARM_UP + steps)]
    middle = statistics.median(times[WARM_UP:])
    a = torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.bfloat16 if config.precision == "bf16" else None)
    fastest = min(seconds(lambda: a @ a, device) for _ in range(10))
    rate, product = batch * model.unet_flops / middle, 2 * PRODUCT**3 / fastest
    return Measured(batch=batch, threads=torch.get_num_threads(), seconds=middle, rate=rate, product=product)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long something takes, until the device has done it."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def read_model(family: Path, size: int) -> Model:
    """The configs of a folder such as configs/sd15, at `size` px; nothing is computed or held in memory. UserError for
    a folder without them or a size they cannot take."""
    vae_config = load(AutoencoderConfig, family / "autoencoder.toml").model
    text_config = load(CLIPConfig, family / "clip.toml").text
    diffusion = load(DiffusionConfig, family / "diffusion.toml")
    channels, factor = vae_config.latent_channels, 2 ** (len(vae_config.block_out_channels) - 1)
    multiple = factor * 2 ** (len(diffusion.model.block_out_channels) - 1)
    if size < multiple or size % multiple:
        raise UserError(f"--size {size} is not possible: {str(family)!r} takes multiples of {multiple} px")
    side, width, length = size // factor, text_config.hidden_size, text_config.max_position_embeddings
    sizes = {"in_channels": channels, "out_channels": channels, "sample_size": side, "cross_attention_dim": width}
    unet_config = replace(diffusion.model, **sizes)
    with torch.device("meta"):
        unet, vae, text = UNet(unet_config), VAE(vae_config), TextEncoder(text_config)
        z, t, context = torch.empty(1, channels, side, side), torch.zeros(1).long(), torch.empty(1, length, width)
        x, tokens = torch.empty(1, 3, size, size), torch.zeros(1, length).long()
    return Model(
        unet_flops=count(lambda: unet(z, t, context).sum().backward()),
        vae_flops=count(torch.no_grad()(lambda: vae.encode(x))),
        text_flops=count(torch.no_grad()(lambda: text(tokens))),
        parameters=parameters(unet),
        unet=unet_config,
        latent=(channels, side, side),
        context=(length, width),
        batch=diffusion.train.batch_size,
        accumulate=diffusion.train.accumulate,
    )


def parameters(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def all_reduce_bytes(parameters: int, gpus: int) -> float:
    """Bytes that each GPU sends, and receives, for a step's gradients in a ring: 2 (n - 1) / n times their size
    (Patarasuk & Yuan 2009)."""
    return 2 * (gpus - 1) / gpus * GRADIENT_BYTES * parameters


def sample_bytes(model: Model, s: Setting, size: int) -> float:
    """Bytes read for one sample of a training: its part of the cache, or its picture and caption."""
    if s.cached:
        return cache_bytes(1, model.latent) - cache_bytes(0, model.latent) + s.caption_bytes
    return (s.picture_bytes or size**2 // 4) + s.caption_bytes


def plan(model: Model, s: Setting, size: int, flops_per_second: float) -> Plan:
    """The training at a GPU's rate of `flops_per_second`.

    Gradients are summed while the last micro-batch goes backward, two thirds of its computing; what takes longer is
    waited for. Reading goes on beside both, so the slower of the two sets the pace. All GPUs encode the cache.
    """
    per_sample = model.unet_flops + model.text_flops + (0 if s.cached else model.vae_flops)
    samples, own = s.pictures * s.epochs, model.batch * model.accumulate
    compute = own * per_sample / flops_per_second
    reduce = all_reduce_bytes(model.parameters, s.gpus) / s.bandwidth
    waited = max(0.0, reduce - 2 / 3 * compute / model.accumulate)
    reading = own * s.gpus * sample_bytes(model, s, size) / s.storage
    step = max(compute + waited, reading)
    parts = {"computing": compute, "all-reduce": waited, "storage": reading}
    encode_flops = s.pictures * model.vae_flops if s.cached else 0.0
    train_seconds, encode_seconds = samples / (own * s.gpus) * step, encode_flops / flops_per_second / s.gpus
    hours = (train_seconds + encode_seconds) * s.gpus / 3600
    return Plan(
        flops=samples * per_sample + encode_flops,
        encode_seconds=encode_seconds,
        train_seconds=train_seconds,
        gpu_hours=hours,
        cost=hours * s.price,
        pictures_per_second=own * s.gpus / step,
        step_seconds=step,
        reduce_seconds=reduce,
        waited_seconds=waited,
        read_rate=own * s.gpus / step * sample_bytes(model, s, size),
        limit=max(parts, key=parts.__getitem__),
    )
