"""A frozen dataclass is config file, command line and documentation at once: each option is written in one place.

TOML files and `key.path=value` overrides are checked against its fields. The comment at the end of a field's line is
its help text.
"""

import contextlib
import dataclasses
import difflib
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # auto: bfloat16 or float16 on GPUs, float32 on CPUs


class UserError(Exception):
    """A mistake that the user can fix: one line with the value, the allowed values and the way out. Commands print
    it without a traceback and exit with code 2."""


class Typed(str):
    """A value as typed on a command line; the field's type decides how it is read, and "none" is None."""


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises UserError with the config key, its value and the allowed values unless `condition` holds."""
    if not condition:
        raise UserError(f"config key {key!r} is {value!r}; it must be {allowed}")


def require_positive(config: Any, *exempt: str) -> None:
    """Raises UserError unless all whole numbers in a config, but those of the fields `exempt`, are 1 or more."""
    for name, value in vars(config).items():
        entries = value if isinstance(value, tuple) else (value,)
        if name not in exempt and (not entries or any(type(entry) is int and entry < 1 for entry in entries)):
            raise UserError(f"{type(config).__name__}: {name} is {value!r}; it must be 1 or more")


def load(cls: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Builds `cls` from its defaults, a TOML file and `key.path=value` overrides, the later ones first.

    Raises UserError for a missing or broken file, an unknown key, or a value of the wrong type.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig")) if path else {}
    except OSError:
        raise UserError(f"config file {str(path)!r} does not exist; the shipped ones are in configs/") from None
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise UserError(f"config file {str(path)!r} is not valid TOML: {error}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        *parents, last = (part.strip() for part in key.split("."))
        if not equals or not all([*parents, last]):
            raise UserError(f"override {override!r} is not of the form key.path=value, e.g. train.steps=1000")
        parent = table
        for name in parents:
            parent = parent.setdefault(name, {})
            if not isinstance(parent, dict):
                raise UserError(f"override {override!r}: {name!r} is a value, not a table")
        parent[last] = Typed(text.strip())
    return build(cls, table)


def build(cls: type[T], table: dict, where: str = "") -> T:
    """A dataclass from a nested table; `where` precedes the keys in messages.

    An int is taken for a float and a list for a tuple, never a bool for a number. Raises UserError for an unknown key
    or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in table:
        if key not in names:
            close = difflib.get_close_matches(key, names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
            raise UserError(f"unknown config key {where + key!r}; {hint}")
    return cls(**{key: convert(hints[key], value, where + key) for key, value in table.items()})


def convert(kind: Any, value: Any, key: str, label: str = "config key {!r}") -> Any:
    """`value` as the annotated type `kind`. Raises UserError, naming the key by `label`, where it is of another."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in sorted(options, key=lambda option: option is not types.NoneType):
            with contextlib.suppress(UserError):
                return convert(option, value, key, label)
    elif isinstance(value, Typed):
        return convert(kind, _read(kind, value), key, label)
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return build(kind, value, key + ".")
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = options[:1] * len(value) if options[-1] is ... else options
        if len(kinds) == len(value):
            items = enumerate(zip(kinds, value, strict=True))
            return tuple(convert(item_kind, item, f"{key}[{i}]", label) for i, (item_kind, item) in items)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(value, bool) and kind is not bool:
        pass  # an int to Python
    elif kind is float and isinstance(value, int):
        return float(value)
    elif origin is typing.Literal and value in options or isinstance(kind, type) and isinstance(value, kind):
        return value
    raise UserError(f"{label.format(key)} is {value!r}; it must be {type_name(kind)}")


def _read(kind: Any, text: str) -> Any:
    """The value typed for a field of type `kind`, which is TOML, or plain text where TOML has another type."""
    if kind is types.NoneType:
        return None if text.lower() == "none" else str(text)
    many = typing.get_origin(kind) is tuple
    for source in (text, f"[{text}]") if many else (text,):  # one item needs no brackets
        with contextlib.suppress(ValueError, RecursionError):
            value = tomllib.loads(f"value = {source}")["value"]
            if isinstance(value, list if many else str) or not many and kind not in (str, Path):
                return value
    return str(text)


def type_name(kind: Any) -> str:
    """How a type is written in messages."""
    if kind in (tuple[float, ...], tuple[float, ...] | None):
        return "numbers with commas, e.g. 1,7.5"
    if kind in (tuple[int, ...], tuple[int, ...] | None):
        return "whole numbers, e.g. 8,30"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if dataclasses.is_dataclass(kind):
        return "a table, set as KEY.NAME=value"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def comments(cls: type) -> dict[str, str]:
    """The comment at the end of each field's line of a dataclass, "" where there is none."""
    texts = dict(re.findall(r"^ +(\w+): .*  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    return {field.name: texts.get(field.name, "") for field in dataclasses.fields(cls)}


def to_dict(config: Any) -> dict:
    """The config as nested dicts and lists, ready for JSON."""
    return dataclasses.asdict(config)
