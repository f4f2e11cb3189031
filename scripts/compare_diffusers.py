"""Opens a Stable Diffusion folder here and in diffusers, and prints how far each part and whole pictures differ.

python scripts/compare_diffusers.py stable-diffusion-v1-5

Everything runs on the CPU in float32 on the same noise. Needs diffusers (pip install diffusers).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ldm.commands.cli import argument_parser, run_script
from ldm.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.pipeline import Pipeline

PROMPTS = ["a photograph of an astronaut riding a horse", "a red circle above a blue square"]


def parse_arguments() -> argparse.Namespace:
    """The command line; --help needs no heavy import."""
    parser = argument_parser(__doc__)
    parser.add_argument("folder", help="a Stable Diffusion folder, a run folder or a shipped model's name")
    parser.add_argument("--prompt", action="append", help="may be given several times; default: two of its own")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", default="1,7.5", metavar="LIST", help="with commas; default: 1,7.5")
    parser.add_argument("--seed", type=int, default=0, help="picture i has seed + i")
    return parser.parse_args()


def parts(ours: Pipeline, theirs: Any, prompts: list[str], seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(part, our output, diffusers') on the same inputs."""
    import torch

    tokens = ours.tokenizer(prompts)
    length = ours.tokenizer.context_length
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    yield "tokens", tokens, theirs.tokenizer(prompts, **options).input_ids
    context = ours.text_encoder(tokens)
    yield "text context", context, theirs.text_encoder(tokens)[0]
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts), *ours.latent_shape())
    x = torch.rand((len(prompts), 3, *(side * ours.vae.factor for side in shape[2:])), generator=generator) * 2 - 1
    posterior, expected = ours.vae.encode(x), theirs.vae.encode(x).latent_dist
    yield "VAE moments", torch.cat([posterior.mean, posterior.std]), torch.cat([expected.mean, expected.std])
    yield "VAE decoded", ours.vae.decode_raw(posterior.mean), theirs.vae.decode(posterior.mean).sample
    z_t = torch.randn(shape, generator=generator)
    for t in (10, 500, 990):
        yield f"U-Net at t {t}", ours.unet(z_t, torch.tensor(t), context), theirs.unet(z_t, t, context).sample


def pictures(
    ours: Pipeline, theirs: Any, prompts: list[str], guidance: list[float], args: argparse.Namespace
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, our pictures, diffusers') as tensors of 0..255, by the folder's own scheduler."""
    import numpy as np
    import torch

    for g in guidance:
        made = ours(prompts, steps=args.steps, guidance=g, seed=args.seed)
        noise = [torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))]
        expected = theirs(prompts, num_inference_steps=args.steps, guidance_scale=g, generator=noise).images
        a, b = (torch.from_numpy(np.stack([np.asarray(image) for image in images])) for images in (made, expected))
        yield f"pictures, guidance {g:g}", a.float(), b.float()


def open_both(args: argparse.Namespace) -> tuple[Pipeline, Any]:
    """The folder in both libraries (UserError)."""
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError:
        raise UserError("diffusers is not installed: pip install diffusers") from None
    from ldm.model_io import find_root
    from ldm.pipeline import Pipeline
    from ldm.samplers import ImageNoise, make_grid

    ours = Pipeline.from_pretrained(args.folder)
    make_grid(ours.schedule, ours.schedule.config.sampler, args.steps)  # refuses what cannot be before anything is done
    ImageNoise([args.seed], ours.latent_shape())
    try:
        theirs = StableDiffusionPipeline.from_pretrained(
            find_root(args.folder), safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"diffusers cannot open {args.folder!r}: {str(error).splitlines()[0]}") from None
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


def main() -> None:
    """Prints a line for each part and each guidance."""
    args = parse_arguments()
    try:
        guidance = [float(g) for g in args.guidance.split(",")]
    except ValueError:
        raise UserError(f"guidance {args.guidance!r} is no list of numbers with commas between, e.g. 1,7.5") from None
    if not all(1 <= g < float("inf") for g in guidance):
        raise UserError(f"guidance {args.guidance} is not allowed: 1 or more, where 1 is none in both libraries")
    ours, theirs = open_both(args)
    import torch

    prompts = args.prompt or PROMPTS
    print(f"{'':24}{'largest difference':>20}{'largest value':>16}")
    with torch.no_grad():
        compared = (parts(ours, theirs, prompts, args.seed), pictures(ours, theirs, prompts, guidance, args))
        for name, a, b in itertools.chain(*compared):
            difference, value = float((a - b).abs().max()), float(b.abs().max())
            print(f"{name:24}{difference:>20.3g}{value:>16.3g}")


if __name__ == "__main__":
    run_script(main)
