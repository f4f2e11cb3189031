"""Speed and memory of this project beside diffusers', on the same weights and inputs.

python scripts/benchmark.py --out outputs/benchmark

Each side runs in a process of its own, in alternation. The same command again goes on where it was stopped. Writes
benchmark.json, benchmark.md and benchmark.html. Exit code 1 where outputs disagree or something failed.
"""

import argparse
import sys
from pathlib import Path

from ldm.bench.workloads import WORKLOADS, choose
from ldm.commands.cli import argument_parser, run_script
from ldm.config import UserError
from ldm.distributed import find_device


def parse_arguments() -> argparse.Namespace:
    """The command line; --help needs no heavy import."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", metavar="NAME,...", help=", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, help="default: 11, with --quick 3; fewer for what takes long")
    parser.add_argument("--threads", type=int, default=0, help="of each side; default: the cores there are")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="the smallest cases, and no memory")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile on both sides")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser.parse_args()


def check(args: argparse.Namespace, cores: int) -> None:
    """UserError for what cannot be; fills in what was left out."""
    args.rounds = (3 if args.quick else 11) if args.rounds is None else args.rounds
    args.threads = args.threads or cores
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds} is not allowed: 1 or more")
    if not 1 <= args.threads <= 1024:
        raise UserError(f"--threads {args.threads} is not allowed: 1 or more")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{str(args.out)!r} is a file; --out names a folder, which may be new")
    if args.device != "cpu":
        find_device(args.device)


def main() -> None:
    """Measures, prints the table, writes the files."""
    args = parse_arguments()
    cases = choose(args.only, args.quick, args.compile)
    from ldm.bench import bench, machine, report
    from ldm.bench.measure import Settings

    check(args, machine.describe()["cores"])
    settings = Settings(rounds=args.rounds, threads=args.threads, device=args.device, quick=args.quick)
    table = bench.run(cases, args.out, settings)
    rows = report.in_order(table, [case.name for case in choose(None, False, True)])
    report.write(args.out, table, rows)
    print(report.terminal(rows))
    print("\n".join(report.remarks(table)))
    print(f"written to {args.out}")
    for line in (complaints := bench.wrong(table)):
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    run_script(main)
