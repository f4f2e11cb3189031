"""Writes a model as one file in the original layout of Stable Diffusion, as ComfyUI, A1111 and diffusers open it.

ldm export runs/mine/diffusion --single-file outputs/mine.safetensors
"""

from dataclasses import dataclass
from pathlib import Path

from ldm.commands.cli import positional, read_options
from ldm.config import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm export`."""

    model: str = positional()  # a shipped model, a run folder, a Stable Diffusion folder or single file
    single_file: Path  # .safetensors to write
    half: bool = False  # store float16


def main() -> None:
    """Writes the file, without the tokenizer, and prints its name."""
    options = read_options(Options, __doc__)
    path = options.single_file
    if path.suffix != ".safetensors":
        raise UserError(f"--single-file {str(path)!r} must name a .safetensors file")
    from ldm.pipeline_io import load_parts, save_single_file

    save_single_file(path, load_parts(options.model), options.half)
    print(f"{options.model} is in {path}; it holds no tokenizer")
