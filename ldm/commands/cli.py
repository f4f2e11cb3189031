"""The command line that all commands share: options from a dataclass, one line and exit code 2 for a user's mistake."""

import argparse
import dataclasses
import errno
import os
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ldm.config import Typed, UserError, comments, convert, type_name

T = TypeVar("T")
UNUSABLE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP, errno.EROFS)  # errors of a file name that was given
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than allowed here (ulimit -f)",
}


def run_command(main: Callable[[], None]) -> None:
    """Runs `main`. A UserError becomes one line on stderr and exit code 2, a warning one line; stopped by a signal, the
    exit code is 128 plus the signal's number: 130 for ctrl-C, 143 for SIGTERM."""
    warnings.showwarning = _show_warning
    try:
        main()
    except (UserError, PermissionError, FileExistsError, NotADirectoryError) as error:
        _fail(error)
    except BrokenPipeError:  # as in `ldm --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno in FULL:
            _fail(f"{FULL[error.errno]} ({_one_line(error)}); with more room the same command goes on")
        if error.errno not in UNUSABLE:
            raise
        _fail(error)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage; for use within `run_command`."""

    def __init__(self, description: str, **named: Any):
        named = {"prog": Path(sys.argv[0]).name, "formatter_class": argparse.RawDescriptionHelpFormatter} | named
        super().__init__(description=description.strip(), **named)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def positional() -> Any:
    """A dataclass field without default that `read_options` reads from the command line without its name."""
    return dataclasses.field(metadata={"positional": True})


def read_options(cls: type[T], description: str | None, argv: Sequence[str] | None = None) -> T:
    """The command line as the dataclass `cls`: a field `batch_size: int = 16  # help` is the option --batch-size.

    A field without default is required, a bool is a flag, a tuple of strings an option that may be repeated, another
    tuple a list with commas. Raises UserError for unknown options and values of the wrong type.
    """
    parser, hints, texts = Parser(description or ""), typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field, kind, texts[field.name])}
        options |= {"action": f"store_{not field.default}".lower()} if kind is bool else {"metavar": _metavar(kind)}
        if field.metadata.get("positional"):
            options |= {"metavar": field.name.upper()} | ({"nargs": "+"} if typing.get_origin(kind) is tuple else {})
            parser.add_argument(field.name, **options)
            continue
        options |= {"action": "append"} if kind == tuple[str, ...] else {}
        required = default(field) is dataclasses.MISSING
        parser.add_argument("--" + field.name.replace("_", "-"), required=required, **options)
    values = vars(parser.parse_args(argv))
    return cls(**{name: _value(hints[name], value, name.replace("_", "-")) for name, value in values.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    """An option's value; what is text or a path is taken as it is typed."""
    if isinstance(value, list):
        return tuple(map(typing.get_args(kind)[0], value))
    if isinstance(value, bool) or kind in (str, Path):
        return value if kind is not Path else Path(value)
    return convert(kind, Typed(value), name, "--{}")


def default(field: dataclasses.Field) -> Any:
    """The default of a dataclass field, `dataclasses.MISSING` where it has none."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _help(field: dataclasses.Field, kind: Any, text: str) -> str:
    value = default(field)
    if kind is bool or value is None or value == () or value == "" or value is dataclasses.MISSING:
        return text.replace("%", "%%")
    values = value if isinstance(value, tuple) else (value,)
    shown = ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in values)
    return (f"{text}; " if text else "").replace("%", "%%") + f"default: {shown}"


def _metavar(kind: Any) -> str:
    options = [option for option in typing.get_args(kind) if option is not types.NoneType]
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(options)
    if typing.get_origin(kind) is tuple and options[0] not in (str, Path):
        return "LIST"
    kind = options[0] if options else kind
    return {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(kind, type_name(kind).upper())


def _fail(error: object) -> NoReturn:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    sys.exit(2)


def _show_warning(message: Warning | str, *rest: object, **named: object) -> None:
    from tqdm import tqdm

    tqdm.write(f"warning: {_one_line(message)}", file=sys.stderr)  # above a progress bar


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
