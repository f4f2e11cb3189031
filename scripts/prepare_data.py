"""Prepares data sets: `prepare_data.py emoji --size 64 --out DIR`."""

import argparse
from pathlib import Path

from ldm.commands.cli import argument_parser, run_script


def main() -> None:
    """Reads the command line and runs its subcommand; `--help` lists them."""
    parser = argument_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_emoji(commands)
    options = parser.parse_args()
    options.run(options)


def _add_emoji(commands: argparse._SubParsersAction) -> None:
    text = "about 7,000 captioned emoji (Fluent 3D and Noto flat), split by content, as tar shards"
    emoji = commands.add_parser("emoji", help=text, description=f"Build {text}.")
    emoji.add_argument("--size", type=int, default=64, help="side in pixels: 64 or 128 (default 64)")
    emoji.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    packages = "folder with the two .tgz of `npm pack`; without it npm fetches them"
    emoji.add_argument("--packages", type=Path, metavar="DIR", help=packages)
    compact = "round colours and gzip the shards, as in the copy that ships"
    emoji.add_argument("--compact", action="store_true", help=compact)
    emoji.set_defaults(run=_emoji)


def _emoji(options: argparse.Namespace) -> None:
    from ldm.data.emoji_build import build  # here, so that --help is quick

    count = build(options.out, options.size, options.packages, options.compact)
    print((options.out / "split.txt").read_text(), end="")
    print(f"{count} pictures of {options.size} px are in {options.out}")


if __name__ == "__main__":
    run_script(main)
