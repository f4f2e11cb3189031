"""TOML files and `key.path=value` overrides -> frozen dataclasses. Unknown keys and wrong types are errors."""

import dataclasses
import difflib
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake the user can mend: one line that says what was wrong, what is allowed and the way out.
    Scripts print it without a traceback and exit with code 2."""


def require(holds: bool, key: str, value: Any, allowed: str) -> None:
    """UserError that names a config key, its value and what is allowed, unless `holds`."""
    if not holds:
        raise UserError(f"config key {key!r} is {value!r}; it must be {allowed}")


def load(cls: type[T], path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> T:
    """Reads `path` (TOML, overrides of the defaults in `cls`), applies `key.path=value` items, builds `cls`.

    Values of overrides are TOML values; what is no TOML value is taken as a plain string.
    Raises UserError for a missing or broken file, an unknown key, or a value of the wrong type.
    """
    table = read_toml(path) if path else {}
    for item in overrides:
        _override(table, item)
    return build(cls, table)


def read_toml(path: str | Path) -> dict:
    """The table in a TOML file; UserError when it is missing or does not parse."""
    if not Path(path).is_file():
        raise UserError(f"config file {str(path)!r} does not exist; the shipped ones are in configs/")
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of its text, or a number of too many digits, or too deep
        raise UserError(f"config file {str(path)!r} is not valid TOML: {error}") from None


def _override(table: dict, item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError(f"override {item!r} is not of the form key.path=value, e.g. train.steps=1000")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *parents, last = (part.strip() for part in key.split("."))
    for name in parents:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"override {item!r}: {name!r} is a value, not a table")
    table[last] = value


def build(cls: type[T], table: dict, where: str = "") -> T:
    """A dataclass from a nested table, every key known and every value of the annotated type (UserError).

    A whole number is taken for a float, a list for a tuple, never a bool for a number. `where` goes before the
    key in messages.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in table:
        if key not in names:
            close = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
            raise UserError(f"unknown config key {where + key!r}{hint}")
    return cls(**{key: _convert(hints[key], value, where + key) for key, value in table.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return build(kind, value, where + ".")
        raise UserError(f"config key {where!r} is {value!r}; it must be a table, set it as {where}.NAME=value")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _convert(option, value, where)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise UserError(f"config key {where!r} is {value!r}; allowed: {', '.join(map(repr, args))}")
    elif origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is ... else list(args)
        if len(inner) == len(value):
            return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True)))
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif kind is types.NoneType and value is None:
        return None
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    name = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise UserError(f"config key {where!r} is {value!r} ({type(value).__name__}); it must be {name}")


def to_dict(config: Any) -> dict:
    """The resolved config as nested plain dicts and lists, ready for JSON."""
    return dataclasses.asdict(config)
