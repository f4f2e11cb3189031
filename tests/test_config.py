"""TOML and overrides -> frozen dataclasses, and every mistake in one line."""

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from ldm.config import UserError, build, load, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 10
    name: str = "x"
    flip: bool = False
    length: int | None = None
    widths: tuple[int, ...] = (1, 2)
    heads: int | tuple[int, ...] = 8
    inner: Inner = field(default_factory=Inner)


def test_file_then_overrides_then_defaults(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('steps = 5\nname = "größer"\nwidths = [4, 5, 6]\n[inner]\nrate = 2\n', encoding="utf-8")
    config = load(Config, path, ["inner.kind=b", "steps = 7", "heads=[1, 2]", "length=3"])
    inner = Inner(rate=2.0, kind="b")
    assert config == Config(steps=7, name="größer", widths=(4, 5, 6), heads=(1, 2), length=3, inner=inner)
    assert type(config.inner.rate) is float
    assert load(Config, None) == Config()
    assert build(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=a red circle", "name", "a red circle"),
        ('name="7"', "name", "7"),
        ("name=a=b", "name", "a=b"),
        ("name=2024", "name", "2024"),
        ("name=none", "name", "none"),
        ("flip=true", "flip", True),
        ("length=none", "length", None),
        ("widths=3", "widths", (3,)),
        ("inner.rate=1e-4", "inner", Inner(rate=1e-4)),
    ],
)
def test_override_values_are_toml_or_plain_strings(override, key, value):
    assert getattr(load(Config, None, [override]), key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=1", "unknown config key 'stepz'; did you mean 'steps'"),
        ("inner.rata=1", "unknown config key 'inner.rata'; did you mean 'rate'"),
        ("qqq=1", "unknown config key 'qqq'; known: steps, name"),
        ("steps=1.5", "'steps' is 1.5; it must be int"),
        ("steps=true", "'steps' is True; it must be int"),
        ("inner.rate=false", "'inner.rate' is False; it must be float"),
        ("inner.rate=fast", "'inner.rate' is 'fast'; it must be float"),
        ("flip=1", "'flip' is 1; it must be bool"),
        ("length=nine", "'length' is 'nine'; it must be int . None"),
        ("length=true", "'length' is 'true'"),
        ("inner.kind=c", "'inner.kind' is 'c'; it must be one of 'a', 'b'"),
        ("inner.pair=[1]", "'inner.pair' is .1."),
        ('widths=[1, "2"]', "'widths.1.' is '2'; it must be int"),
        ("heads=[1, true]", "'heads' is"),
        ("inner=3", "'inner' is 3; it must be a table"),
        ("steps=" + "9" * 5000, "'steps' is '999"),
        ("steps=" + "[" * 100_000, r"'steps' is '\[\["),
        ("steps", "override 'steps' is not of the form"),
        ("=1", "is not of the form"),
    ],
    ids=lambda text: text[:40],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(UserError, match=message) as error:
        load(Config, None, [override])
    assert "\n" not in str(error.value)


def test_broken_files(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("steps = 5\n")
    with pytest.raises(UserError, match="'steps' is a value, not a table"):
        load(Config, path, ["steps.more=1"])
    for data in (b"\xff\xfe\x00", b"steps = " + b"9" * 5000, b"steps = " + b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not valid TOML"):
            load(Config, path)
