"""A frozen dataclass is config file, command line and documentation at once: each option is written in one place.

TOML files and `key.path=value` overrides are checked against its fields. The comment at the end of a field's line is
its help text.
"""

import ast
import dataclasses
import difflib
import inspect
import textwrap
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can fix: one line with the value, the allowed values and the way out. Commands print
    it without a traceback and exit with code 2."""


class Typed(str):
    """A value as typed on a command line; the field's type decides how it is read, and "none" is None."""


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises UserError with the config key, its value and the allowed values unless `condition` holds."""
    if not condition:
        raise UserError(f"config key {key!r} is {value!r}; it must be {allowed}")


def require_positive(config: Any, *names: str) -> None:
    """Raises UserError unless these sizes of a config, or all entries of those that are tuples, are 1 or more."""
    for name in names:
        value = getattr(config, name)
        sizes = value if isinstance(value, tuple) else (value,)
        if not sizes or min(sizes) < 1:
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
        _apply(table, override)
    return build(cls, table)


def _apply(table: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = (part.strip() for part in key.split("."))
    if not equals or not all([*parents, last]):
        raise UserError(f"override {override!r} is not of the form key.path=value, e.g. train.steps=1000")
    for name in parents:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"override {override!r}: {name!r} is a value, not a table")
    table[last] = Typed(text.strip())


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
            try:
                return convert(option, value, key, label)
            except UserError:
                continue
    elif isinstance(value, Typed):
        return convert(kind, _read(kind, value), key, label)
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return build(kind, value, key + ".")
        raise UserError(f"{label.format(key)} is {value!r}; it must be a table, set it as {key}.NAME=value")
    elif origin is typing.Literal:
        if value in options and not isinstance(value, bool):
            return value
        raise UserError(f"{label.format(key)} is {value!r}; allowed: {', '.join(map(repr, options))}")
    elif origin is tuple and isinstance(value, list | tuple):
        inner = [options[0]] * len(value) if options[-1] is ... else list(options)
        if len(inner) == len(value):
            items = enumerate(zip(inner, value, strict=True))
            return tuple(convert(k, v, f"{key}[{i}]", label) for i, (k, v) in items)
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif kind is types.NoneType and value is None:
        return None
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    kind_given = "" if isinstance(value, Typed) else f" ({type(value).__name__})"
    raise UserError(f"{label.format(key)} is {value!r}{kind_given}; it must be {type_name(kind)}")


def _read(kind: Any, text: str) -> Any:
    """The value that was typed for a field of type `kind`: TOML, where that is of no other type than asked for."""
    if kind is types.NoneType:
        return None if text.lower() == "none" else str(text)
    for source in (text, f"[{text}]") if typing.get_origin(kind) is tuple else (text,):
        try:
            value = tomllib.loads(f"value = {source}")["value"]
        except (ValueError, RecursionError):
            continue
        if typing.get_origin(kind) is tuple and not isinstance(value, list):
            continue  # one item, without brackets
        return value if isinstance(value, str) or kind not in (str, Path) else str(text)
    return str(text)


def type_name(kind: Any) -> str:
    """How a type is written in messages."""
    if kind == tuple[float, ...]:
        return "numbers with commas, e.g. 1,7.5"
    return kind.__name__ if isinstance(kind, type) and not typing.get_origin(kind) else str(kind)


def comments(cls: type) -> dict[str, str]:
    """The comment at the end of each field's line of a dataclass, "" where there is none."""
    lines = textwrap.dedent(inspect.getsource(cls))
    fields = [node for node in ast.parse(lines).body[0].body if isinstance(node, ast.AnnAssign)]
    rest = {node.target.id: lines.splitlines()[node.end_lineno - 1][node.end_col_offset :] for node in fields}
    return {name: text.partition("#")[2].strip() for name, text in rest.items()}


def to_dict(config: Any) -> dict:
    """The config as nested dicts and lists, ready for JSON."""
    return dataclasses.asdict(config)
