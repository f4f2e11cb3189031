"""Imports point one way (the layers below, lowest first), are light, and do nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports from lower rows only; modules of one package (`ldm.data`, `ldm.metrics`) may import each other.
ROWS = (
    ("ldm", "ldm.config", "ldm.bpe", "ldm.distributed", "ldm.images"),
    ("ldm.layers", "ldm.diffusion", "ldm.losses", "ldm.perceptual", "ldm.samplers"),
    ("ldm.model_io",),
    ("ldm.data", "ldm.tokenizer", "ldm.clip_towers"),
    ("ldm.vae", "ldm.unet", "ldm.clip", "ldm.edit", "ldm.discriminator"),
    ("ldm.pipeline_io", "ldm.metrics"),
    ("ldm.pipeline",),
    ("ldm.train", "ldm.evaluate"),
    ("ldm.app", "ldm.bench"),
    ("ldm.commands",),
    ("scripts",),
)
PACKAGES = ("ldm.data", "ldm.metrics", "ldm.train", "ldm.evaluate", "ldm.app", "ldm.bench", "ldm.commands")
MODELS = {"ldm.layers", "ldm.vae", "ldm.unet", "ldm.clip", "ldm.clip_towers", "ldm.discriminator", "ldm.perceptual"}
MODELS |= {"ldm.pipeline_io", "ldm.pipeline", "ldm.train", "ldm.evaluate"}
HEAVY = {"transformers", "diffusers", "lpips", "tensorboard", "sklearn", "scipy", "skimage", "torchmetrics", "gradio"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for folder in ("ldm", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Our modules that `module` imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= submodules or {node.module}
    return {name for name in found if name.split(".")[0] in ("ldm", "scripts")}


def unit(module: str) -> str:
    """The entry of ROWS that a module belongs to."""
    if module.startswith("scripts"):
        return "scripts"
    return next((package for package in PACKAGES if module.startswith(package + ".")), module)


def row(module: str) -> int:
    rows = [i for i, names in enumerate(ROWS) if unit(module) in names]
    assert rows, f"{module} is new: give it a row in {Path(__file__).name}"
    return rows[0]


def reached(module: str) -> set[str]:
    """All of our modules that importing `module` brings in, in the end."""
    seen, todo = set(), [module]
    while todo:
        new = imports(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    for name in imports(module):
        assert name in SOURCES, f"{module} imports {name}, which does not exist"
        same_package = unit(name) == unit(module) and unit(module) in PACKAGES
        assert same_package or row(name) < row(module), f"{module} must not import {name}"


@pytest.mark.parametrize(
    "module", ["diffusion", "samplers", "losses", "ema", "muon", "train", "data", "config", "weights"]
)
def test_no_model_is_known(module):
    found = {name for name in reached(f"ldm.{module}") if unit(name) in MODELS}
    assert not found


def test_the_rows_name_what_exists():
    assert {name for names in ROWS for name in names} == {unit(module) for module in SOURCES}


def test_importing_everything_is_silent_and_light():
    with_gradio = tuple(f"ldm.app.{name}" for name in ("controls", "page", "tab"))
    modules = [module for module in SOURCES if module.startswith("ldm") and not module.startswith(with_gradio)]
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"sys.exit(', '.join({HEAVY!r} & set(sys.modules)) or 0)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


def test_import_ldm_is_light_and_gives_the_public_names():
    code = """
import sys
import ldm
assert not {"torch", "numpy", "PIL"} & set(sys.modules)
from ldm import VAE, Pipeline, TextEncoder, UNet
assert {c.__name__ for c in (Pipeline, VAE, TextEncoder, UNet)} == set(ldm.__all__)
try:
    ldm.Nothing
except AttributeError as error:
    assert "Nothing" in str(error)
else:
    raise AssertionError
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_opening_a_model_and_sampling_need_no_compiler():
    """They are most of what `import torch` may leave out, a second or more at every start."""
    code = """
import sys
import torch
before = set(sys.modules)
from ldm import Pipeline
Pipeline.from_pretrained("shapes")("a red circle", steps=1, guidance=2.0)
sys.exit(", ".join({"sympy", "torch._dynamo", "torchvision", "scipy"} & (sys.modules.keys() - before)) or 0)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "")
