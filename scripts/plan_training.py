"""Says what training a diffusion model takes: FLOPs, time and cost, and what must be stored, read and reduced.

python scripts/plan_training.py --pictures 100e6 --size 256 --gpus 8
python scripts/plan_training.py --measure 10 --family configs/shapes --size 32 --batch 16

FLOPs are counted on the configs of --family. Of a GPU's peak a training reaches some share, the utilization, which is
an assumption unless it was measured: --measure N takes N steps of the U-Net's training on this machine, and prints the
rate that it had, for --rate.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.commands.cli import argument_parser, run_script
from ldm.config import UserError

if TYPE_CHECKING:
    from ldm.commands.plan import Model, Plan, Setting

NODE = 8  # GPUs
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "bytes"))


def parse_arguments() -> argparse.Namespace:
    """The command line; --help needs no heavy import."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--family", type=Path, default=Path("configs/sd15"), metavar="DIR", help="default: configs/sd15"
    )
    parser.add_argument("--pictures", type=float, default=100e6, help="in the data set; default: 100e6")
    parser.add_argument("--epochs", type=float, default=1.0, help="times that each is seen; default: 1")
    parser.add_argument("--size", type=int, default=256, help="pixels a side; default: 256")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a GPU; default: 989, an H100 SXM in bf16")
    parser.add_argument("--utilization", default="25,35,45", metavar="LIST", help="per cent of it; default: 25,35,45")
    parser.add_argument("--rate", type=float, help="measured TFLOP/s of a GPU, in place of --peak and --utilization")
    parser.add_argument("--price", type=float, default=2.5, help="of a GPU hour; default: 2.5")
    links = "GB/s a GPU in an all-reduce; default: 300 (NVLink) for up to 8 GPUs, else 50 (a 400 Gbit/s card each)"
    parser.add_argument("--bandwidth", type=float, help=links)
    parser.add_argument("--storage", type=float, default=10.0, help="GB/s for all GPUs together; default: 10")
    parser.add_argument("--caption-bytes", type=int, default=100, help="of key and captions; default: 100")
    parser.add_argument("--picture-bytes", type=int, default=0, help="of a file; default: a quarter a pixel")
    parser.add_argument("--no-cache", action="store_true", help="encode pictures in every step")
    parser.add_argument("--measure", type=int, default=0, metavar="N", help="take N training steps on this machine")
    parser.add_argument("--batch", type=int, default=0, help="of a GPU and micro-batch; default: the config's")
    parser.add_argument("--accumulate", type=int, default=0, help="micro-batches a step; default: the config's")
    return parser.parse_args()


def check(args: argparse.Namespace) -> list[float]:
    """The rates in FLOP/s that are looked at (UserError for values that cannot be)."""
    positive = ["pictures", "epochs", "size", "gpus", "peak", "storage", "caption_bytes"]
    for name in positive + [name for name in ("rate", "bandwidth") if getattr(args, name) is not None]:
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name):g} is not allowed; give more than 0")
    for name in ("price", "picture_bytes", "measure", "batch", "accumulate"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name):g} is not allowed; give 0 or more")
    if args.rate is not None:
        return [args.rate * 1e12]
    try:
        shares = [float(share) for share in args.utilization.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 100 for share in shares):
        raise UserError(f"--utilization {args.utilization!r} is not allowed; give per cents with commas, e.g. 25,35,45")
    return [share / 100 * args.peak * 1e12 for share in shares]


def size_of(count: float) -> str:
    """Bytes in words: 1.6 TB."""
    unit, name = next((unit, name) for unit, name in UNITS if count >= unit or unit == 1)
    return f"{count / unit:,.3g} {name}" if count < 1000 * unit else f"{count / unit:,.0f} {name}"


def span(seconds: float) -> str:
    """Seconds in words."""
    for least, unit, name in ((2 * 86400, 86400, "days"), (7200, 3600, "hours"), (120, 60, "minutes"), (1, 1, "s")):
        if seconds >= least:
            return f"{seconds / unit:,.1f} {name}"
    return f"{1000 * seconds:,.3g} ms" if seconds else "none"


def facts(model: "Model", s: "Setting", size: int) -> list[tuple[str, str]]:
    """What does not depend on a GPU's rate."""
    from ldm.commands.plan import STATE_BYTES, all_reduce_bytes, cache_bytes

    batch = model.batch * model.accumulate * s.gpus
    yield_of = f"{model.unet_flops / 1e12:.3g} + {model.text_flops / 1e12:.3g} + {model.vae_flops / 1e12:.3g} TFLOP"
    cache = cache_bytes(s.pictures, model.latent)
    return [
        ("a picture: U-Net there and back, text, VAE encoder", yield_of),
        ("U-Net", f"{model.parameters / 1e6:,.0f}M parameters, {size_of(STATE_BYTES * model.parameters)} on each GPU"),
        ("batch", f"{batch:,} ({model.batch} x {model.accumulate} a GPU), {s.pictures * s.epochs / batch:,.0f} steps"),
        ("pictures on disk", size_of(s.pictures * ((s.picture_bytes or size**2 // 4) + s.caption_bytes))),
        ("cache of latents on disk", size_of(cache) if s.cached else "none"),
        ("all-reduce a step and GPU", size_of(all_reduce_bytes(model.parameters, s.gpus))),
    ]


def columns(p: "Plan") -> list[tuple[str, str]]:
    """What does."""
    return [
        ("FLOP in all", f"{p.flops:.3g}"),
        ("encoding the cache", span(p.encode_seconds)),
        ("training", span(p.train_seconds)),
        ("GPU hours", f"{p.gpu_hours:,.0f}"),
        ("cost", f"{p.cost:,.0f}"),
        ("pictures/s", f"{p.pictures_per_second:,.0f}"),
        ("a step", span(p.step_seconds)),
        ("all-reduce of a step", span(p.reduce_seconds)),
        ("of it not hidden behind computing", span(p.waited_seconds)),
        ("read from storage", f"{size_of(p.read_rate)}/s"),
        ("what takes longest", p.limit),
    ]


def main() -> None:
    """Prints the tables."""
    args = parse_arguments()
    rates = check(args)
    from ldm.commands import plan

    if args.measure:
        measured = plan.measure(args.family, args.size, args.measure, args.batch)
        print(f"U-Net's training step, batch {measured.batch}, {measured.threads} threads: {span(measured.seconds)}")
        print(f"{measured.batch / measured.seconds:,.3g} pictures/s, {measured.rate / 1e12:.3g} TFLOP/s (--rate)")
        share = measured.rate / measured.product
        print(f"matrix product: {measured.product / 1e12:.3g} TFLOP/s, of which the step has {share:.0%}")
        return
    model = plan.read_model(args.family, args.size)
    model = replace(model, batch=args.batch or model.batch, accumulate=args.accumulate or model.accumulate)
    s = plan.Setting(
        pictures=round(args.pictures),
        epochs=args.epochs,
        gpus=args.gpus,
        price=args.price,
        bandwidth=(args.bandwidth or (300 if args.gpus <= NODE else 50)) * 1e9,
        storage=args.storage * 1e9,
        caption_bytes=args.caption_bytes,
        picture_bytes=args.picture_bytes,
        cached=not args.no_cache,
    )
    print(f"{s.pictures:,} pictures of {args.size} px, {args.epochs:g} epochs, {args.gpus} GPUs, {args.family}")
    for name, value in facts(model, s, args.size):
        print(f"  {name:52}{value}")
    rows = zip(*(columns(plan.plan(model, s, args.size, rate)) for rate in rates), strict=True)
    print(f"  {'at TFLOP/s a GPU':40}" + "".join(f"{rate / 1e12:>16,.3g}" for rate in rates))
    for cells in rows:
        print(f"  {cells[0][0]:40}" + "".join(f"{value:>16}" for _, value in cells))


if __name__ == "__main__":
    run_script(main)
