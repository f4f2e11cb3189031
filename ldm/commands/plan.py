"""Projects a training run of a diffusion model: FLOPs, time and cost, and the bytes to store, read and reduce.

ldm plan --pictures 100e6 --size 256 --gpus 8
ldm plan --measure 10 --family configs/shapes --size 32 --batch 16

FLOPs are counted on the configs of --family. The share of a GPU's peak that training reaches, its utilization, is an
assumption unless measured: --measure N takes N training steps of the U-Net here and prints their rate, for --rate.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ldm.commands.cli import read_options
from ldm.config import UserError, load

NODE = 8  # GPUs that NVLink connects
GRADIENT_BYTES = 4  # DDP sums float32 gradients, also under bf16 autocast


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
    """A family at one picture size, on the meta device."""

    unet: Any
    z_t: Any  # a latent (1, C, h, w)
    context: Any  # (1, L, D)
    train_tflop: float  # per picture: U-Net forward and backward, text encoder forward
    encode_tflop: float  # per picture, by the VAE
    batch: int  # per GPU and micro-batch
    accumulate: int  # micro-batches per step


def main() -> None:
    """Prints the table, a column per rate."""
    options = read_options(Options, __doc__)
    check(options)
    model = read_model(options)
    if options.measure:
        return print(measured(model, options.measure))
    rates = [options.rate] if options.rate else [share / 100 * options.peak for share in options.utilization]
    columns = [projection(model, options, rate) for rate in rates]
    data = f"{options.pictures:,.0f} pictures of {options.size} px, {options.epochs:g} epochs"
    print(f"{data}, {options.gpus} GPUs, {options.family}")
    for name in columns[0]:
        values = [column[name] for column in columns]
        print(f"  {name:40}" + "".join(f"{x:>16,.0f}" if x >= 100 else f"{x:>16.3g}" for x in values))


def check(options: Options) -> None:
    """Raises UserError if a number is negative, 0 without being the default, or a percentage out of range."""
    for name, value in vars(options).items():
        if isinstance(value, int | float) and not (value > 0 or value == getattr(Options, name)):
            raise UserError(f"--{name.replace('_', '-')} {value} is not allowed; give a number above 0")
    if not 0 < min(options.utilization, default=0) <= max(options.utilization) <= 100:
        raise UserError(f"--utilization {options.utilization} is not allowed; give percentages, e.g. 25,35,45")


def read_model(o: Options) -> Model:
    """The configs of --family at --size px, counted on meta tensors. Raises UserError if the folder has none or they
    do not support the size."""
    import torch

    from ldm import VAE, TextEncoder, UNet
    from ldm.train.autoencoder import AutoencoderConfig
    from ldm.train.clip import CLIPConfig
    from ldm.train.diffusion import DiffusionConfig

    diffusion = load(DiffusionConfig, o.family / "diffusion.toml")
    with torch.device("meta"):
        vae = VAE(load(AutoencoderConfig, o.family / "autoencoder.toml").model).requires_grad_(False)
        text = TextEncoder(load(CLIPConfig, o.family / "clip.toml").text).requires_grad_(False)
        multiple = vae.factor * 2 ** (len(diffusion.model.block_out_channels) - 1)
        if o.size % multiple:
            raise UserError(f"--size {o.size} is not possible: {str(o.family)!r} takes multiples of {multiple} px")
        x, t = torch.empty(1, 3, o.size, o.size), torch.zeros(1).long()
        tokens = torch.zeros(1, text.config.max_position_embeddings).long()
        z_t, context = vae.encode(x).mean, text(tokens)
        sizes = {"in_channels": z_t.shape[1], "out_channels": z_t.shape[1], "cross_attention_dim": context.shape[2]}
        unet = UNet(replace(diffusion.model, **sizes))
        train = count_tflop(lambda: unet(z_t, t, text(tokens)).sum().backward())
        encode = count_tflop(lambda: vae.encode(x))
    batch, accumulate = o.batch or diffusion.train.batch_size, o.accumulate or diffusion.train.accumulate
    return Model(unet, z_t, context, train, encode, batch, accumulate)


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
    sends 2 (n - 1) / n times the gradients (Patarasuk & Yuan 2009).
    """
    batch = model.batch * model.accumulate * o.gpus
    steps = o.pictures * o.epochs / batch
    picture = o.caption_bytes + (o.picture_bytes or o.size**2 // 4)
    latents = o.caption_bytes + 2 * 2 * model.z_t.numel() + 8  # float16 moments, an offset
    tflop, read, encoding = model.train_tflop, latents, o.pictures * model.encode_tflop / rate / o.gpus
    if o.no_cache:
        tflop, read, encoding = tflop + model.encode_tflop, picture, 0
    compute = batch / o.gpus * tflop / rate
    gradients = GRADIENT_BYTES * sum(p.numel() for p in model.unet.parameters())
    bandwidth = o.bandwidth or (300 if o.gpus <= NODE else 50)
    reduce = 2 * (o.gpus - 1) / o.gpus * gradients / (bandwidth * 1e9)
    waited = max(0.0, reduce - 2 / 3 * compute / model.accumulate)
    reading = batch * read / (o.storage * 1e9)
    step = max(compute + waited, reading)
    hours = (encoding + steps * step) / 3600 * o.gpus
    return {
        "TFLOP/s per GPU": rate,
        "TFLOP per picture": tflop,
        "GB of pictures": o.pictures * picture / 1e9,
        "GB of cached latents": 0 if o.no_cache else o.pictures * latents / 1e9,
        "hours to encode the cache": encoding / 3600,
        "hours to train": steps * step / 3600,
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

    from ldm.commands.benchmark_jobs import timed, training
    from ldm.distributed import find_device

    device = find_device("")
    with device:
        unet, t = type(model.unet)(model.unet.config), torch.randint(1000, (model.batch,))
        z_t, context = (torch.randn(model.batch, *x.shape[1:]) for x in (model.z_t, model.context))

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return (unet(z_t, t, context) - z_t).square().mean()

    step = training(unet, loss)
    seconds = median([timed(step) for _ in range(steps + 1)][1:])
    return f"""U-Net's training step, batch {model.batch}, {torch.get_num_threads()} threads: {seconds:.3g} s
{model.batch / seconds:,.3g} pictures/s, {count_tflop(step) / seconds:.3g} TFLOP/s (--rate)"""
