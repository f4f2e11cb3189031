"""Measures a model on held-out captions and writes metrics.json and a report with pictures.

python scripts/evaluate.py --model shapes --data shapes --split test --num 600 --out outputs/eval-shapes

Pictures are kept in DIR, so that a run that was stopped goes on where it was, and more captions or further
guidances only add what is missing.
"""

import argparse
from pathlib import Path

from ldm.cli import argument_parser, run_script
from ldm.config import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line; --help needs no heavy import."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--model", required=True, help="a shipped model's name, a run folder or a Stable Diffusion folder"
    )
    parser.add_argument("--data", required=True, help="shapes, emoji, folder or shards")
    parser.add_argument("--data-path", default="", metavar="PATH", help="where a folder or shards are")
    parser.add_argument("--split", default="test", help="test or val")
    parser.add_argument("--num", type=int, default=480, help="held-out captions, 16 or more; default: 480")
    parser.add_argument("--guidance", default="1,2,3,5", metavar="LIST", help="with commas; default: 1,2,3,5")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, help="in [0, 1], for every guidance")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--sampler", help="ddpm, ddim, euler, euler_a, heun, dpmpp_2m, unipc or pndm; default: the model's own"
    )
    parser.add_argument("--features", default="effnet-lite0", help="network for Frechet distances, or none")
    parser.add_argument("--seed", type=int, default=0, help="picks the captions; picture i has seed + i")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="", help="default: cuda where there is one, else cpu")
    return parser.parse_args()


def parse_guidance(text: str) -> tuple[float, ...]:
    """ "1,2.5" -> (1.0, 2.5); UserError for what is no list of numbers."""
    try:
        return tuple(float(item) for item in text.split(","))
    except ValueError:
        raise UserError(f"guidance {text!r} is no list of numbers with commas between, e.g. 1,2,3,5") from None


def main() -> None:
    """Generates what is missing, measures, writes the report and says where it is."""
    args = parse_arguments()
    guidance = parse_guidance(args.guidance)
    from ldm.tasks.evaluate import EvaluateConfig, evaluate

    config = EvaluateConfig(
        model=args.model,
        data=args.data,
        data_path=args.data_path,
        split=args.split,
        num=args.num,
        guidance=guidance,
        guidance_rescale=args.guidance_rescale,
        steps=args.steps,
        sampler=args.sampler or "",
        seed=args.seed,
        batch_size=args.batch_size,
        features=args.features,
    )
    for line in evaluate(config, args.out, args.device):
        print(line)
    print(f"numbers in {args.out / 'metrics.json'}, report in {args.out / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
