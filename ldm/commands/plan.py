"""Projects a training run of a diffusion model: FLOPs, time and cost, and the bytes to store, read and reduce.

ldm plan --pictures 100e6 --size 256 --gpus 8
ldm plan --measure 10 --family configs/shapes --size 32 --batch 16

FLOPs are counted on the configs of --family. The share of a GPU's peak that training reaches, its utilization, is an
assumption unless measured: --measure N takes N training steps of the U-Net here and prints their rate, for --rate.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ldm.commands.cli import read_options
from ldm.config import UserError, load

NODE = 8  # GPUs that NVLink connects


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


class Model(NamedTuple):
    """A family at one picture size."""

    unet: Any  # on the meta device
    side: int  # latent positions
    tokens: int  # of a context
    train_tflop: float  # per picture: U-Net forward and backward, text encoder forward
    encode_tflop: float  # per picture, by the VAE
    batch: int  # per GPU and micro-batch
    accumulate: int  # micro-batches per step


def main() -> None:
    """Prints the table, a column per rate."""
    o = read_options(Options, __doc__)
    check(o)
    model = read_model(o)
    if o.measure:
        return print(measured(model, o.measure))
    columns = [
        projection(model, o, rate) for rate in ([o.rate] if o.rate else [u / 100 * o.peak for u in o.utilization])
    ]
    print(f"{o.pictures:,.0f} pictures of {o.size} px, {o.epochs:g} epochs, {o.gpus} GPUs, {o.family}")
    for name in columns[0]:
        values = (column[name] for column in columns)
        print(f"  {name:40}" + "".join(f"{x:>16,.0f}" if x >= 100 else f"{x:>16.3g}" for x in values))


def check(o: Options) -> None:
    """Raises UserError if a number is negative, 0 without being the default, or a percentage out of range."""
    for name, value in vars(o).items():
        if isinstance(value, int | float) and not (value > 0 or value == getattr(Options, name)):
            raise UserError(f"--{name.replace('_', '-')} {value} is not allowed; give a number above 0")
    if not o.utilization or not all(0 < share <= 100 for share in o.utilization):
        raise UserError(f"--utilization {o.utilization} is not allowed; give percentages, e.g. 25,35,45")


def read_model(o: Options) -> Model:
    """The configs of --family at --size px, counted on meta tensors. Raises UserError if the folder has none or they
    do not support the size."""
    import torch

    from ldm import VAE, TextEncoder, UNet
    from ldm.commands.benchmark_jobs import unet_inputs
    from ldm.train import autoencoder, clip, diffusion

    config = load(diffusion.DiffusionConfig, o.family / "diffusion.toml")
    text = load(clip.CLIPConfig, o.family / "clip.toml").text
    with torch.device("meta"):
        vae = VAE(load(autoencoder.AutoencoderConfig, o.family / "autoencoder.toml").model)
        multiple = vae.factor * 2 ** (len(config.model.block_out_channels) - 1)
        if o.size % multiple:
            raise UserError(f"--size {o.size} is not possible: {str(o.family)!r} takes multiples of {multiple} px")
        channels, side, tokens = vae.config.latent_channels, o.size // vae.factor, text.max_position_embeddings
        sizes = {"in_channels": channels, "out_channels": channels, "cross_attention_dim": text.hidden_size}
        unet, x = UNet(replace(config.model, **sizes)), torch.empty(1, 3, o.size, o.size)
        step = count_tflop(lambda: unet(*unet_inputs(unet, 1, side, tokens)).sum().backward())
        step += count_tflop(lambda: TextEncoder(text)(torch.empty(1, tokens).long()))
        encode = count_tflop(lambda: vae.encode(x))
    batch, accumulate = o.batch or config.train.batch_size, o.accumulate or config.train.accumulate
    return Model(unet, side, tokens, step, encode, batch, accumulate)


def count_tflop(run: Callable[[], object]) -> float:
    """TFLOP of all matrix products and convolutions of `run`; a multiply-add is two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def projection(model: Model, o: Options, rate: float) -> dict[str, float]:
    """The run at `rate` TFLOP/s per GPU.

    Gradients are summed while the last micro-batch goes backward, two thirds of its computing; what takes longer is
    waited for. Reading goes on beside both, so the slower of the two sets the pace. All GPUs encode the cache. A ring
    sends 2 (n - 1) / n times the gradients (Patarasuk & Yuan 2009), in float32 by DDP also under bf16 autocast.
    """
    batch = model.batch * model.accumulate * o.gpus
    steps = o.pictures * o.epochs / batch
    picture = o.caption_bytes + (o.picture_bytes or o.size**2 // 4)
    latents = o.caption_bytes + 2 * 2 * model.unet.config.in_channels * model.side**2 + 8  # float16 moments, an offset
    tflop, read, cached = model.train_tflop, latents, o.pictures
    if o.no_cache:
        tflop, read, cached = tflop + model.encode_tflop, picture, 0
    encoding = cached * model.encode_tflop / rate / o.gpus
    compute = batch / o.gpus * tflop / rate
    gradients = 4 * sum(p.numel() for p in model.unet.parameters())
    bandwidth = o.bandwidth or (300 if o.gpus <= NODE else 50)
    reduce = 2 * (o.gpus - 1) / o.gpus * gradients / (bandwidth * 1e9)
    waited = max(0.0, reduce - 2 / 3 * compute / model.accumulate)
    reading = batch * read / (o.storage * 1e9)
    step = max(compute + waited, reading)
    training = steps * step
    hours = (encoding + training) / 3600 * o.gpus
    return {
        "TFLOP/s per GPU": rate,
        "TFLOP per picture": tflop,
        "GB of pictures": o.pictures * picture / 1e9,
        "GB of cached latents": cached * latents / 1e9,
        "hours to encode the cache": encoding / 3600,
        "hours to train": training / 3600,
        "GPU hours": hours,
        "cost": hours * o.price,
        "steps": steps,
        "pictures per second": batch / step,
        "ms per step": step * 1e3,
        "ms to compute": compute * 1e3,
        "ms to sum gradients": reduce * 1e3,
        "ms to read": reading * 1e3,
        "MB/s from storage": batch / step * read / 1e6,
    }


def measured(model: Model, steps: int) -> str:
    """Times `steps` training steps of the U-Net on random latents, after one to warm up."""
    import torch

    from ldm.commands.benchmark_jobs import timed, training, unet_inputs
    from ldm.distributed import find_device

    device = find_device("")
    unet = type(model.unet)(model.unet.config).to(device, memory_format=torch.channels_last)
    inputs = unet_inputs(unet, model.batch, model.side, model.tokens)
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    step = training(unet, bf16(partial(unet, *inputs)))
    seconds = median([timed(step)[0] for _ in range(steps + 1)][1:])
    return f"""U-Net's training step, batch {model.batch}, {torch.get_num_threads()} threads: {seconds:.3g} s
{model.batch / seconds:,.3g} pictures/s, {count_tflop(step) / seconds:.3g} TFLOP/s (--rate)"""
