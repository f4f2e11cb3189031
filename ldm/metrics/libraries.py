"""Packages of the extra `evaluate`, imported where they are used."""

import importlib
from types import ModuleType

from ldm.config import UserError

PACKAGES = {"sklearn": "scikit-learn", "torch_fidelity": "torch-fidelity"}  # where the package has another name


def library(module: str) -> ModuleType:
    """The module by its dotted name. Raises UserError, with the command that installs it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        root = module.partition(".")[0]
        package = PACKAGES.get(root, root)
        raise UserError(f"{package} is not installed: pip install {package}") from None
