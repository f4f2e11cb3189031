"""Measures, on held-out pictures and captions, and writes metrics.json and report.html, with pictures, into DIR.

    a model         evaluate.py --model shapes --data shapes --split test --out outputs/eval-shapes
    an autoencoder  evaluate.py --autoencoder runs/mine/autoencoder --data folder --data-path photos --out DIR
    two folders     evaluate.py --images DIR --reference DIR --out DIR

What was made and seen is kept in DIR, so that a run that was stopped goes on where it was, and more captions or further
guidances only add what is missing. `accelerate launch scripts/evaluate.py ...` shares the work between processes.
"""

import argparse
from pathlib import Path

from ldm.commands.cli import argument_parser, run_script
from ldm.config import UserError

# Which modes use an option, where not all do.
USED = dict.fromkeys(("data", "data_path", "split", "num"), ("model", "autoencoder"))
USED |= dict.fromkeys(("guidance", "guidance_rescale", "steps", "sampler", "train_num", "baseline"), ("model",))
USED |= {"judge": ("model", "images"), "size": ("autoencoder", "images"), "perceptual": ("autoencoder",)}
USED |= dict.fromkeys(("reference", "without_frechet"), ("images",))


def build_parser() -> argparse.ArgumentParser:
    """The command line; --help needs no heavy import."""
    parser = argument_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a shipped model's name, a run folder or a Stable Diffusion folder")
    what.add_argument("--autoencoder", help="the same; or a folder of a VAE alone")
    what.add_argument("--images", type=Path, metavar="DIR", help="pictures, whoever made them")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="pictures that --images are held against")
    parser.add_argument("--data", help="shapes, emoji, folder or shards")
    parser.add_argument("--data-path", default="", metavar="PATH", help="where a folder or shards are")
    parser.add_argument("--split", default="test", help="test or val")
    parser.add_argument("--num", type=int, default=0, help="held-out pictures, 16 or more; default: 480, or all")
    parser.add_argument("--guidance", default="1,2,3,5,8", metavar="LIST", help="with commas; default: 1,2,3,5,8")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, help="in [0, 1], for every guidance")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--sampler", help="ddpm, ddim, euler, euler_a, heun, dpmpp_2m, unipc or pndm; default: the model's own"
    )
    parser.add_argument(
        "--features",
        default="effnet-lite0",
        metavar="NAME",
        help="network of distances: effnet-lite0 (default), inception[:FILE], clip:FOLDER, dinov2:FOLDER,"
        " judge (the evaluation's own), judge:FOLDER, or none",
    )
    parser.add_argument(
        "--judge",
        default="",
        metavar="NAME",
        help="who says whether captions are met: one that ships (emoji, shapes), a folder of train_clip with"
        " judge=true, clip:FOLDER, or none; default: the one that ships for the data, else none",
    )
    parser.add_argument("--train-num", type=int, default=10_000, help="training pictures to look for copies among")
    parser.add_argument("--baseline", default="", metavar="DIR", help="an evaluation of another model to compare with")
    parser.add_argument(
        "--size", type=int, help="side in pixels that pictures are resized to, with --images or --autoencoder"
    )
    parser.add_argument("--without-frechet", action="store_true", help="where there are too few --images for it")
    parser.add_argument("--perceptual", default="effnet-lite0", help="effnet-lite0, lpips-vgg or lpips-alex, for VAEs")
    parser.add_argument("--seed", type=int, default=0, help="picks the captions; picture i has seed + i")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="", help="default: cuda where there is one, else cpu")
    return parser


def refuse_unused(args: argparse.Namespace, mode: str) -> None:
    """UserError for an option, given another value than its default, that means nothing with --`mode`."""
    for name, value in vars(args).items():
        if name in USED and mode not in USED[name] and value != build_parser().get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no meaning with --{mode}; leave it out")


def parse_guidance(text: str) -> tuple[float, ...]:
    """ "1,2.5" -> (1.0, 2.5); UserError for what is no list of numbers."""
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise UserError(f"guidance {text!r} is no list of numbers with commas between, e.g. 1,2,3,5") from None


def model(args: argparse.Namespace) -> list[str]:
    """Evaluates a model."""
    from ldm.evaluate.model import EvaluateConfig, evaluate

    config = EvaluateConfig(
        model=args.model,
        data=args.data,
        data_path=args.data_path,
        split=args.split,
        num=args.num,
        guidance=parse_guidance(args.guidance),
        guidance_rescale=args.guidance_rescale,
        steps=args.steps,
        sampler=args.sampler or "",
        seed=args.seed,
        batch_size=args.batch_size,
        features=args.features,
        judge=args.judge,
        train_num=args.train_num,
        baseline=args.baseline,
    )
    return evaluate(config, args.out, args.device)


def autoencoder(args: argparse.Namespace) -> list[str]:
    """Evaluates an autoencoder."""
    from ldm.evaluate.autoencoder import AutoencoderEvaluation, evaluate_autoencoder

    config = AutoencoderEvaluation(
        autoencoder=args.autoencoder,
        data=args.data,
        data_path=args.data_path,
        split=args.split,
        num=args.num,
        seed=args.seed,
        batch_size=args.batch_size,
        size=args.size or 0,
        features=args.features,
        perceptual=args.perceptual,
    )
    return evaluate_autoencoder(config, args.out, args.device)


def folders(args: argparse.Namespace) -> list[str]:
    """Evaluates a folder of pictures against another."""
    from ldm.evaluate.folders import FolderEvaluation, evaluate_folders

    config = FolderEvaluation(
        images=args.images,
        reference=args.reference,
        size=args.size,
        features=args.features,
        judge=args.judge,
        without_frechet=args.without_frechet,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    return evaluate_folders(config, args.out, args.device)


def main() -> None:
    """Measures, writes the report and says where it is."""
    args = build_parser().parse_args()
    mode = "model" if args.model is not None else "autoencoder" if args.autoencoder is not None else "images"
    refuse_unused(args, mode)
    if args.images and not args.reference:
        raise UserError("--images needs --reference DIR: pictures to hold them against")
    if not args.images and not args.data:
        raise UserError("--data is needed: shapes, emoji, folder or shards, whose held-out pictures are used")
    lines = {"model": model, "autoencoder": autoencoder, "images": folders}[mode](args)
    from ldm.distributed import processes

    if processes().is_main_process:
        for line in lines:
            print(line)
        print(f"numbers in {args.out / 'metrics.json'}, report in {args.out / 'report.html'}")
    processes().destroy_process_group()


if __name__ == "__main__":
    run_script(main)
