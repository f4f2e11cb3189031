"""The command line that all commands share: options from a dataclass, one line and exit code 2 for a user's mistake."""

import argparse
import dataclasses
import errno
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ldm.config import Typed, UserError, comments, convert, load, to_dict, type_name

T = TypeVar("T")
UNUSABLE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP, errno.EROFS)  # of a name that was given
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not become so large here (ulimit -f)",
}


def run_command(main: Callable[[], None]) -> None:
    """Runs `main`. A UserError becomes one line on stderr and exit code 2, a warning one line; stopped by a signal, the
    exit code is 128 plus the signal's number: 130 for ctrl-C, 143 for SIGTERM."""
    warnings.showwarning = _show_warning
    try:
        main()
    except (UserError, PermissionError, FileExistsError, NotADirectoryError) as error:
        _fail(error)
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
    """Complains by UserError instead of printing the usage; for use within `run_command`."""

    def __init__(self, description: str | None = None, **named: Any):
        named.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description and description.strip(), **named)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def read_options(cls: type[T], description: str, argv: Sequence[str] | None = None) -> T:
    """The command line as the dataclass `cls`: a field `batch_size: int = 16  # help` is the option --batch-size.

    A field without default is required, a bool is a flag, a tuple of strings an option that may be repeated, another
    tuple a list with commas. Raises UserError for unknown options and values of the wrong type.
    """
    parser, hints, texts = Parser(description), typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        kind, required = hints[field.name], _default(field) is dataclasses.MISSING
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field, kind, texts[field.name])}
        if kind is bool:
            options["action"] = "store_false" if field.default else "store_true"
        else:
            options |= {"required": required, "metavar": _metavar(kind)}
            if kind == tuple[str, ...]:
                options["action"] = "append"
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = convert(hints[name], Typed(value), name.replace("_", "-"), "--{}")
        elif isinstance(value, list):
            values[name] = tuple(value)
    return cls(**values)


def train(parts: Callable[[], tuple[type, Callable[[Any], Any]]], description: str) -> None:
    """Runs a training command: reads its arguments, builds the config and the task, trains.

    `parts` returns the config's class and what makes the task from it; it imports torch, hence is called late.
    """
    parser = Parser(description, add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="list all config keys")
    parser.add_argument("--config", type=Path, help="TOML file; see configs/")
    parser.add_argument("--out", type=Path, help="run folder; the same command again resumes")
    parser.add_argument("--force", action="store_true", help="resume though the config has changed")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. train.steps=1000")
    args = parser.parse_intermixed_args()
    config_class, make_task = parts()
    if args.help:
        print(parser.format_help() + "\nconfig keys, with their defaults:\n" + "\n".join(_keys(config_class)))
        return
    for name in ("config", "out"):
        if getattr(args, name) is None:
            raise UserError(f"the following arguments are required: --{name}; see --help")
    config = load(config_class, args.config, args.overrides)
    from ldm.distributed import processes
    from ldm.train.loop import train

    processes()  # refuses an unsupported launch before any work
    try:
        train(make_task(config), config.train, args.out, to_dict(config), args.force)
    except KeyboardInterrupt:
        print("the same command goes on from the last checkpoint", file=sys.stderr)
        raise
    processes().destroy_process_group()


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    """One line per key of a nested config: `train.steps = 10000  # help`."""
    texts, hints = comments(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], key + ".")
        else:
            default = "" if _default(field) is dataclasses.MISSING else f" = {_default(field)!r}"
            yield f"  {key}{default}" + (f"  # {texts[field.name]}" if texts[field.name] else "")


def _default(field: dataclasses.Field) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _help(field: dataclasses.Field, kind: Any, text: str) -> str:
    default = _default(field)
    if kind is bool or default is None or default == () or default == "" or default is dataclasses.MISSING:
        return text.replace("%", "%%")
    shown = ",".join(f"{item:g}" for item in default) if isinstance(default, tuple) else default
    return (f"{text}; " if text else "").replace("%", "%%") + f"default: {shown}"


def _metavar(kind: Any) -> str:
    options = [option for option in typing.get_args(kind) if option is not types.NoneType]
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(options)
    if typing.get_origin(kind) is tuple:
        return "TEXT" if options[0] is str else "LIST"
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


# The names until the scripts are rewritten.
run_script, argument_parser = run_command, Parser


def run_training(parts: Callable[[], tuple[type, Callable[[Any], Any]]], description: str) -> None:
    """A training script."""
    run_command(lambda: train(parts, description))
