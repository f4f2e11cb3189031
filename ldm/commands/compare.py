"""Opens a Stable Diffusion folder here and in diffusers, and prints how far each part and the pictures differ.

ldm compare stable-diffusion-v1-5

Everything runs on the CPU in float32 on the same noise. Needs diffusers (pip install diffusers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ldm.commands.cli import positional, read_options
from ldm.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipeline import Pipeline

PROMPTS = ("a photograph of an astronaut riding a horse", "a red circle above a blue square")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm compare`."""

    folder: str = positional()  # a Stable Diffusion folder, a run folder or a shipped model
    prompt: tuple[str, ...] = ()  # prompt to compare; may be repeated; default: two built-in ones
    steps: int = 10  # denoising steps
    guidance: tuple[float, ...] = (1, 7.5)  # scales of classifier-free guidance, each 1 or more
    seed: int = 0  # picture i is made with seed + i


def main() -> None:
    """Prints one line per part and per guidance."""
    options = read_options(Options, __doc__)
    if not all(1 <= g < float("inf") for g in options.guidance):
        raise UserError(f"--guidance {options.guidance} is not allowed: 1 or more, where 1 is none in both libraries")
    import torch

    from ldm.commands.benchmark_jobs import open_diffusers
    from ldm.pipeline import Pipeline

    if not find_spec("diffusers"):
        raise UserError("diffusers is not installed: pip install diffusers")
    ours = Pipeline.from_pretrained(options.folder, "cpu")
    try:
        theirs = open_diffusers(options.folder)
    except (OSError, ValueError) as error:
        raise UserError(f"diffusers cannot open {options.folder!r}: {str(error).splitlines()[0]}") from None
    print(f"{'':24}{'largest difference':>20}{'largest value':>16}")
    with torch.no_grad():
        for name, a, b in outputs(ours, theirs, list(options.prompt or PROMPTS), options):
            print(f"{name:24}{float((a - b).abs().max()):>20.3g}{float(b.abs().max()):>16.3g}")


def outputs(ours: Pipeline, theirs: Any, prompts: list[str], options: Options) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, our output, diffusers' output) of each part on the same inputs; and of pictures, with values in [0, 255],
    by the folder's own scheduler."""
    import numpy as np
    import torch

    tokens, count = ours.tokenizer(prompts), len(prompts)
    padded = {"padding": "max_length", "truncation": True, "max_length": tokens.shape[1]}
    yield "tokens", tokens, theirs.tokenizer(prompts, return_tensors="pt", **padded).input_ids
    context = ours.text_encoder(tokens)
    yield "text context", context, theirs.text_encoder(tokens)[0]
    z = torch.randn((count, *ours.latent_shape()), generator=torch.Generator().manual_seed(options.seed))
    x = ours.vae.decode_raw(z)
    yield "VAE decoded", x, theirs.vae.decode(z).sample
    posterior, expected = ours.vae.encode(x), theirs.vae.encode(x).latent_dist
    yield "VAE moments", torch.cat([posterior.mean, posterior.std]), torch.cat([expected.mean, expected.std])
    for t in (10, 500, 990):
        yield f"U-Net at t {t}", ours.unet(z, torch.tensor(t), context), theirs.unet(z, t, context).sample
    for g in options.guidance:
        noise = [torch.Generator().manual_seed(options.seed + i) for i in range(count)]
        batches = (
            ours(prompts, steps=options.steps, guidance=g, seed=options.seed),
            theirs(prompts, num_inference_steps=options.steps, guidance_scale=g, generator=noise).images,
        )
        yield f"pictures, guidance {g:g}", *(torch.from_numpy(np.stack(batch)).float() for batch in batches)
