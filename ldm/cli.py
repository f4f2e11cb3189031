"""What the scripts share: one line and exit code 2 for a user's mistake, and the training scripts' arguments."""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.config import UserError, load, to_dict


def run_script(main: Callable[[], None]) -> None:
    """Runs `main`; a UserError becomes one line on stderr and exit code 2, ctrl-C exit code 130, a warning a line."""
    warnings.showwarning = lambda message, *rest, **kwargs: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def run_training(config_class: type, make_task: Callable[[Any], Any], description: str) -> None:
    """A training script: parses its arguments, builds the config and the task, trains."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, required=True, help="TOML file; see configs/")
    parser.add_argument("--out", type=Path, required=True, help="run folder; the same command again resumes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. train.steps=1000")
    args = parser.parse_intermixed_args()

    def main() -> None:
        from ldm.train import train  # here, so that --help is quick

        config = load(config_class, args.config, args.overrides)
        try:
            train(make_task(config), config.train, args.out, to_dict(config))
        except KeyboardInterrupt:
            print("the same command goes on from the last checkpoint", file=sys.stderr)
            raise

    run_script(main)
