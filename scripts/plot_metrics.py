"""Draws the curves of trainings and evaluations, several in one plot, as a page that opens offline.

python scripts/plot_metrics.py runs/a/diffusion runs/b/diffusion outputs/evaluation --out outputs/curves.html

Takes run folders or their metrics.jsonl (every logged number over the steps), evaluations' folders or their
metrics.json (distances and alignment over guidance).
"""

import argparse
from pathlib import Path

from ldm.commands.cli import argument_parser, run_script


def parse_arguments() -> argparse.Namespace:
    """The command line; --help needs no heavy import."""
    parser = argument_parser(__doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="of a run or an evaluation")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    return parser.parse_args()


def main() -> None:
    """Reads, draws, and says what there is."""
    args = parse_arguments()
    from ldm.evaluate.curves import write_curves

    titles = write_curves(args.out, args.paths)
    print(f"{len(titles)} plots in {args.out}: {', '.join(titles)}")


if __name__ == "__main__":
    run_script(main)
