"""A small latent diffusion system: `Pipeline`, and its parts `VAE`, `TextEncoder` and `UNet`."""

from typing import Any

_HOME = {"Pipeline": "ldm.pipeline", "VAE": "ldm.vae", "TextEncoder": "ldm.clip", "UNet": "ldm.unet"}
__all__ = ["VAE", "Pipeline", "TextEncoder", "UNet"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import ldm` costs nothing (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
