"""Imports point one way (the rows below, lowest first), are light, and do nothing."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module imports from lower rows only; modules of one package may import each other.
ROWS = (
    {"ldm", "ldm.config"},
    {"ldm.distributed", "ldm.images", "ldm.layers", "ldm.diffusion", "ldm.losses", "ldm.model_io"},
    {"ldm.single_file"},
    {"ldm.lora", "ldm.samplers", "ldm.data", "ldm.tokenizer", "ldm.vae", "ldm.unet", "ldm.clip"}
    | {"ldm.discriminator", "ldm.perceptual"},
    {"ldm.compilation", "ldm.edit", "ldm.metrics", "ldm.pipeline_io", "ldm.prompts"},
    {"ldm.pipeline"},
    {"ldm.train", "ldm.evaluate"},
    {"ldm.app"},
    {"ldm.commands"},
    {"ldm.__main__", "scripts"},
)
MODELS = {"ldm.layers", "ldm.vae", "ldm.unet", "ldm.clip", "ldm.discriminator", "ldm.perceptual", "ldm.pipeline_io"}
# A module, and the modules that it must not reach, itself or through others.
APART = {
    **dict.fromkeys(("ldm.samplers", "ldm.losses", "ldm.data", "ldm.model_io"), MODELS),
    **dict.fromkeys(("ldm.train.loop", "ldm.train.state", "ldm.train.optim"), MODELS),
    "ldm.evaluate": {"ldm.train"},
    "ldm.pipeline": {"ldm.data", "ldm.train", "ldm.metrics"},
}
HEAVY = {"transformers", "diffusers", "lpips", "tensorboard", "sklearn", "scipy", "skimage", "torchmetrics", "gradio"}
COMPILER = {"sympy", "torch._dynamo", "torchvision", "scipy"}  # seconds at every start


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for folder in ("ldm", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))}


@functools.cache
def imports(module: str) -> set[str]:
    """Our modules that `module` imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys() or {node.module}
    return {name for name in names if name.split(".")[0] in ("ldm", "scripts")}


def unit(module: str) -> str:
    """The entry of ROWS that a module belongs to."""
    first, _, second = module.partition(".")
    return ".".join([first, *second.split(".")[:1]]) if first == "ldm" and second else first


def reached(module: str) -> set[str]:
    seen, todo = set(), [module]
    while todo:
        new = imports(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


def test_imports_point_down():
    row = {name: i for i, names in enumerate(ROWS) for name in names}
    assert row.keys() == {unit(module) for module in SOURCES}
    pairs = [(module, name) for module in SOURCES for name in imports(module)]
    assert {name for _, name in pairs} <= SOURCES.keys()
    assert not [(a, b) for a, b in pairs if row[unit(b)] >= row[unit(a)] and unit(a) != unit(b)]


@pytest.mark.parametrize("module", APART)
def test_parts_stay_apart(module):
    names = [name for name in SOURCES if name == module or name.startswith(module + ".")]
    assert names and not {unit(other) for name in names for other in reached(name)} & APART[module]


MODULES = [name for name in SOURCES if name.startswith("ldm") and not name.startswith(("ldm.app.", "ldm.__main__"))]
EVERYTHING = f"import importlib\nfor name in {MODULES!r}: importlib.import_module(name)"
SAMPLING = "from ldm import Pipeline\nPipeline.from_pretrained('shapes')('a red circle', steps=1, guidance=2.0)"


@pytest.mark.parametrize(
    ("before", "code", "absent"),
    [
        ("", EVERYTHING, HEAVY),
        ("import torch", SAMPLING, COMPILER),
    ],
    ids=["everything", "sampling"],
)
def test_imports_are_silent_and_light(before, code, absent):
    lines = [before, "import sys", "before = set(sys.modules)", code]
    lines.append(f"sys.exit(', '.join({absent!r} & (sys.modules.keys() - before)) or 0)")
    out = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
