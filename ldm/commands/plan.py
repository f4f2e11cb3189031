"""Projects a training run of a diffusion model: FLOPs, time and cost, and the bytes to store, read and reduce.

ldm plan --pictures 100e6 --size 256 --gpus 8
ldm plan --measure 10 --family configs/shapes --size 32 --batch 16

FLOPs are counted on the configs of --family. The share of a GPU's peak that training reaches, its utilization, is an
assumption unless measured: --measure N takes N training steps of the U-Net here and prints their rate, for --rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ldm.commands.cli import read_options
from ldm.config import UserError, load

if TYPE_CHECKING:
    from ldm.unet import UNetConfig

NODE = 8  # GPUs that NVLink connects
STATE_BYTES = 4 + 4 + 8 + 4  # per parameter: float32 weight, gradient, AdamW's two moments, average
GRADIENT_BYTES = 4  # DDP sums float32 gradients, also under bf16 autocast
WARM_UP = 2  # steps that are not timed
POSITIVE = ("pictures", "epochs", "size", "gpus", "peak", "storage", "caption_bytes", "rate", "bandwidth")
NOT_NEGATIVE = ("price", "picture_bytes", "measure", "batch", "accumulate")
BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "bytes"))
SECONDS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "s"), (1e-3, "ms"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm plan`."""

    family: Path = Path("configs/sd15")  # folder with autoencoder.toml, clip.toml and diffusion.toml
    pictures: float = 100e6  # number of pictures in the data set
    epochs: float = 1.0  # passes over the data set
    size: int = 256  # picture side in pixels
    gpus: int = 8  # number of GPUs
    peak: float = 989.0  # peak TFLOP/s per GPU, here of an H100 SXM in bf16
    utilization: tuple[float, ...] = (25, 35, 45)  # percentages of --peak to project, separated by commas
    rate: float | None = None  # measured TFLOP/s per GPU, replaces --peak and --utilization
    price: float = 2.5  # price of a GPU hour
    bandwidth: float | None = None  # GB/s per GPU of an all-reduce; default: 300 (NVLink) for up to 8 GPUs, else 50
    storage: float = 10.0  # GB/s that storage delivers to all GPUs together
    caption_bytes: int = 100  # bytes of key and captions per picture
    picture_bytes: int = 0  # bytes per picture file; 0: a quarter byte per pixel
    no_cache: bool = False  # encode pictures in every step instead of caching latents
    measure: int = 0  # run N training steps on this machine and print their rate
    batch: int = 0  # pictures per GPU and micro-batch; 0: the config's
    accumulate: int = 0  # micro-batches per step; 0: the config's


@dataclass(frozen=True, kw_only=True)
class Model:
    """The three parts of a family at one picture size; FLOPs are per picture."""

    unet_flops: int  # forward and backward
    vae_flops: int  # encoder
    text_flops: int
    parameters: int  # of the U-Net
    unet: UNetConfig
    latent: tuple[int, int, int]  # C, h, w
    context: tuple[int, int]  # L, D
    batch: int  # per GPU and micro-batch
    accumulate: int  # micro-batches per step


def main() -> None:
    """Prints the tables."""
    options = read_options(Options, __doc__)
    check(options)
    model = read_model(options)
    if options.measure:
        return print(measured(model, options.measure))
    rates = [options.rate] if options.rate else [share / 100 * options.peak for share in options.utilization]
    data = f"{round(options.pictures):,} pictures of {options.size} px, {options.epochs:g} epochs"
    print(f"{data}, {options.gpus} GPUs, {options.family}")
    for name, value in facts(model, options).items():
        print(f"  {name:52}{value}")
    columns = [projection(model, options, rate * 1e12) for rate in rates]
    print(f"  {'at TFLOP/s a GPU':40}" + "".join(f"{rate:>16,.3g}" for rate in rates))
    for name in columns[0]:
        print(f"  {name:40}" + "".join(f"{column[name]:>16}" for column in columns))


def check(options: Options) -> None:
    """Raises UserError for values out of range."""
    for name in POSITIVE + NOT_NEGATIVE:
        value, least = getattr(options, name), "more than 0" if name in POSITIVE else "0 or more"
        if value is not None and not (0 <= value < float("inf") and (value > 0 or name in NOT_NEGATIVE)):
            raise UserError(f"--{name.replace('_', '-')} {value:g} is not allowed; give {least}")
    if not options.utilization or not all(0 < share <= 100 for share in options.utilization):
        shown = ",".join(f"{share:g}" for share in options.utilization)
        raise UserError(f"--utilization {shown!r} is not allowed; give percentages with commas, e.g. 25,35,45")


def read_model(o: Options) -> Model:
    """The configs of --family at --size px, counted on meta tensors. Raises UserError for a folder without them or a
    size they do not take."""
    import torch

    from ldm.clip import TextEncoder
    from ldm.train.autoencoder import AutoencoderConfig
    from ldm.train.clip import CLIPConfig
    from ldm.train.diffusion import DiffusionConfig
    from ldm.unet import UNet
    from ldm.vae import VAE

    vae_config = load(AutoencoderConfig, o.family / "autoencoder.toml").model
    text_config = load(CLIPConfig, o.family / "clip.toml").text
    diffusion = load(DiffusionConfig, o.family / "diffusion.toml")
    channels, factor = vae_config.latent_channels, 2 ** (len(vae_config.block_out_channels) - 1)
    multiple = factor * 2 ** (len(diffusion.model.block_out_channels) - 1)
    if o.size % multiple:
        raise UserError(f"--size {o.size} is not possible: {str(o.family)!r} takes multiples of {multiple} px")
    side, width, length = o.size // factor, text_config.hidden_size, text_config.max_position_embeddings
    sizes = {"in_channels": channels, "out_channels": channels, "sample_size": side, "cross_attention_dim": width}
    unet_config = replace(diffusion.model, **sizes)
    with torch.device("meta"):
        unet, vae, text = UNet(unet_config), VAE(vae_config), TextEncoder(text_config)
        z, t, context = torch.empty(1, channels, side, side), torch.zeros(1).long(), torch.empty(1, length, width)
        x, tokens = torch.empty(1, 3, o.size, o.size), torch.zeros(1, length).long()
    return Model(
        unet_flops=count_flops(lambda: unet(z, t, context).sum().backward()),
        vae_flops=count_flops(torch.no_grad()(lambda: vae.encode(x))),
        text_flops=count_flops(torch.no_grad()(lambda: text(tokens))),
        parameters=sum(p.numel() for p in unet.parameters()),
        unet=unet_config,
        latent=(channels, side, side),
        context=(length, width),
        batch=o.batch or diffusion.train.batch_size,
        accumulate=o.accumulate or diffusion.train.accumulate,
    )


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of all matrix products and convolutions of `run`; a multiply-add is two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def facts(model: Model, o: Options) -> dict[str, str]:
    """The rows that do not depend on a GPU's rate."""
    flops = " + ".join(f"{n / 1e12:.3g}" for n in (model.unet_flops, model.text_flops, model.vae_flops))
    batch, state = model.batch * model.accumulate * o.gpus, quantity(BYTES, STATE_BYTES * model.parameters)
    steps = f"{round(o.pictures) * o.epochs / batch:,.0f} steps"
    return {
        "a picture: U-Net there and back, text, VAE encoder": f"{flops} TFLOP",
        "U-Net": f"{model.parameters / 1e6:,.0f}M parameters, {state} on each GPU",
        "batch": f"{batch:,} ({model.batch} x {model.accumulate} a GPU), {steps}",
        "pictures on disk": quantity(BYTES, o.pictures * sample_bytes(model, o, cached=False)),
        "cache of latents on disk": quantity(
            BYTES, 0 if o.no_cache else o.pictures * sample_bytes(model, o, cached=True)
        ),
        "all-reduce a step and GPU": quantity(BYTES, all_reduce_bytes(model.parameters, o.gpus)),
    }


def projection(model: Model, o: Options, rate: float) -> dict[str, str]:
    """The run at `rate` FLOP/s per GPU.

    Gradients are summed while the last micro-batch goes backward, two thirds of its computing; what takes longer is
    waited for. Reading goes on beside both, so the slower of the two sets the pace. All GPUs encode the cache.
    """
    pictures, samples = round(o.pictures), model.batch * model.accumulate
    per_sample = model.unet_flops + model.text_flops + (model.vae_flops if o.no_cache else 0)
    bandwidth = (o.bandwidth or (300 if o.gpus <= NODE else 50)) * 1e9
    compute = samples * per_sample / rate
    reduce = all_reduce_bytes(model.parameters, o.gpus) / bandwidth
    waited = max(0.0, reduce - 2 / 3 * compute / model.accumulate)
    read = sample_bytes(model, o, not o.no_cache)
    reading = samples * o.gpus * read / (o.storage * 1e9)
    step = max(compute + waited, reading)
    per_second = samples * o.gpus / step
    encode_flops = 0 if o.no_cache else pictures * model.vae_flops
    encoding, training = encode_flops / rate / o.gpus, pictures * o.epochs / per_second
    hours = (encoding + training) * o.gpus / 3600
    return {
        "FLOP in all": f"{pictures * o.epochs * per_sample + encode_flops:.3g}",
        "encoding the cache": quantity(SECONDS, encoding),
        "training": quantity(SECONDS, training),
        "GPU hours": f"{hours:,.0f}",
        "cost": f"{hours * o.price:,.0f}",
        "pictures/s": f"{per_second:,.0f}",
        "a step": quantity(SECONDS, step),
        "all-reduce of a step": quantity(SECONDS, reduce),
        "of it not hidden behind computing": quantity(SECONDS, waited),
        "read from storage": f"{quantity(BYTES, per_second * read)}/s",
        "what takes longest": max((compute, "computing"), (waited, "all-reduce"), (reading, "storage"))[1],
    }


def all_reduce_bytes(parameters: int, gpus: int) -> float:
    """Bytes that each GPU sends, and receives, for a step's gradients in a ring: 2 (n - 1) / n times their size
    (Patarasuk & Yuan 2009)."""
    return 2 * (gpus - 1) / gpus * GRADIENT_BYTES * parameters


def sample_bytes(model: Model, o: Options, cached: bool) -> int:
    """Bytes per sample: float16 moments with an offset, or a picture; and the caption."""
    return o.caption_bytes + (2 * 2 * prod(model.latent) + 8 if cached else o.picture_bytes or o.size**2 // 4)


def measured(model: Model, steps: int) -> str:
    """Times `steps` training steps of the U-Net on random latents, after some to warm up."""
    import torch

    from ldm.commands.benchmark_jobs import timed, training
    from ldm.distributed import find_device
    from ldm.unet import UNet

    device = find_device("")
    with device:
        unet = UNet(model.unet)
        z_t, context = torch.randn(model.batch, *model.latent), torch.randn(model.batch, *model.context)
        t = torch.randint(1000, (model.batch,))

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return (unet(z_t, t, context) - z_t).square().mean()

    step = training(unet, loss)
    seconds = median([timed(step) for _ in range(WARM_UP + steps)][WARM_UP:])
    per_second, threads = model.batch / seconds, torch.get_num_threads()
    return f"""U-Net's training step, batch {model.batch}, {threads} threads: {quantity(SECONDS, seconds)}
{per_second:,.3g} pictures/s, {per_second * model.unet_flops / 1e12:.3g} TFLOP/s (--rate)"""


def quantity(units: tuple[tuple[float, str], ...], value: float) -> str:
    """A value in the largest unit of which there is one or more: 1.6 TB, 3.8 hours; "none" for 0."""
    size, unit = next((row for row in units if value >= row[0]), units[-1])
    number = f"{value / size:,.0f}" if value >= 1000 * size else f"{value / size:.3g}"
    return f"{number} {unit}" if value else "none"
