"""The command line that all commands share: options from a dataclass, one line and exit code 2 for a user's mistake."""

import argparse
import dataclasses
import errno
import os
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ldm.config import Typed, UserError, comments, convert

T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the quota, or what `ulimit -f` allows
# Errors of a file name that was given.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ELOOP)
UNUSABLE += (errno.ENAMETOOLONG,)


def run_command(main: Callable[[], None]) -> None:
    """Runs `main`. A UserError becomes one line on stderr and exit code 2, a warning one line; stopped by a signal, the
    exit code is 128 plus the signal's number: 130 for ctrl-C, 143 for SIGTERM."""
    warnings.showwarning = _show_warning
    try:
        main()
    except BrokenPipeError:  # as in `ldm --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, OSError) and number not in (*FULL, *UNUSABLE):
            raise
        hint = "; with more room the same command goes on" if number in FULL else ""
        print(f"error: {_one_line(error)}{hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage; for use within `run_command`."""

    def __init__(self, description: str, **named: Any):
        named |= {"prog": Path(sys.argv[0]).name, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(description=description.strip(), **named)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def positional() -> Any:
    """A dataclass field without default that `read_options` reads from the command line without its name."""
    return dataclasses.field(metadata={"positional": True})


def read_options(cls: type[T], description: str | None, argv: Sequence[str] | None = None) -> T:
    """The command line as the dataclass `cls`: a field `batch_size: int = 16  # help` is the option --batch-size.

    A field without default is required, a bool (False by default) is a flag, a tuple of strings an option that may be
    repeated, another tuple a list with commas. Raises UserError for unknown options and values of the wrong type.
    """
    parser, hints, texts = Parser(description or ""), typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        kind, name, value = hints[field.name], field.name.replace("_", "-"), field.default
        many = kind in (tuple[str, ...], tuple[Path, ...])
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": texts[field.name].replace("%", "%%")}
        if kind is bool:
            options["action"] = "store_true"
        elif many or kind in (str, Path):  # taken as it is typed
            options["type"] = typing.get_args(kind)[0] if many else kind
        else:
            options["type"] = lambda text, kind=kind, name=name: convert(kind, Typed(text), name, "--{}")
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        if kind is not bool and value not in (None, "", (), dataclasses.MISSING):
            options["help"] += f"; default: {','.join(map(str, value)) if isinstance(value, tuple) else value}"
        if field.metadata.get("positional"):
            parser.add_argument(field.name, metavar=field.name.upper(), nargs="+" if many else None, **options)
        else:
            options |= {"action": "append"} if many else {}
            parser.add_argument(f"--{name}", required=value is dataclasses.MISSING, **options)
    values = vars(parser.parse_args(argv))
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def markdown_table(*rows: Sequence[str]) -> str:
    """A Markdown table with aligned columns; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


def _show_warning(message: Warning | str, *rest: object, **named: object) -> None:
    from tqdm import tqdm

    tqdm.write(f"warning: {_one_line(message)}", file=sys.stderr)  # above a progress bar


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
