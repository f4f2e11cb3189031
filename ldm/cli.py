"""What the scripts share: one line and exit code 2 for a user's mistake, and the training scripts' arguments."""

import argparse
import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ldm.config import UserError, load, to_dict

if TYPE_CHECKING:
    import torch

UNUSABLE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP, errno.EROFS)  # a name that was given
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not become so large here (ulimit -f)",
}


def run_script(main: Callable[[], None]) -> None:
    """Runs `main`; a UserError becomes one line on stderr and exit code 2, a warning a line. Told to stop by a signal:
    exit code 128 and the signal's number, 130 for ctrl-C and 143 for SIGTERM."""
    warnings.showwarning = _show_warning
    try:
        main()
    except (UserError, PermissionError, FileExistsError, NotADirectoryError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in UNUSABLE:
            print(f"error: {_one_line(error)}", file=sys.stderr)
            sys.exit(2)
        if error.errno not in FULL:
            raise
        print(
            f"error: {FULL[error.errno]} ({_one_line(error)}); with more room the same command goes on", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose complaints are UserErrors, one line each; to be used within `run_script`."""
    return _Parser(description=description.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)


def find_device(name: str) -> "torch.device":
    """The device of that name, or the best one there is for an empty name (UserError)."""
    import torch

    if not name and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from ldm.task import processes

        return processes().device  # each process has one of its own
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # "meta" holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); without --device the best one is") from None
    return device


def run_training(parts: Callable[[], tuple[type, Callable[[Any], Any]]], description: str) -> None:
    """A training script: parses its arguments, builds the config and the task, trains.

    `parts` gives the config's class and what makes the task of it; only called after --help was seen to, as it
    imports torch.
    """

    def main() -> None:
        parser = argument_parser(description)
        parser.add_argument("--config", type=Path, required=True, help="TOML file; see configs/")
        parser.add_argument("--out", type=Path, required=True, help="run folder; the same command again resumes")
        parser.add_argument("--force", action="store_true", help="resume though the config has changed")
        parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. train.steps=1000")
        args = parser.parse_intermixed_args()
        config_class, make_task = parts()
        config = load(config_class, args.config, args.overrides)
        from ldm.train import processes, train

        processes()  # refuses a launch that cannot be, before the work begins
        try:
            train(make_task(config), config.train, args.out, to_dict(config), args.force)
        except KeyboardInterrupt:
            print("the same command goes on from the last checkpoint", file=sys.stderr)
            raise
        processes().destroy_process_group()

    run_script(main)


class _Parser(argparse.ArgumentParser):
    """Its subcommands' parsers are of the same class, hence complain alike."""

    def error(self, message: str) -> NoReturn:
        """In place of printing the usage and exiting."""
        raise UserError(f"{message}; see --help")


def _show_warning(message: Warning | str, *rest: object, **named: object) -> None:
    from tqdm import tqdm

    tqdm.write(f"warning: {_one_line(message)}", file=sys.stderr)  # on a line of its own, above a progress bar


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
