"""Pictures from prompts.

python scripts/sample.py --model emoji --prompt "a 3D emoji of a red apple" --out outputs
"""

import argparse
import re
from pathlib import Path

from ldm.cli import run_script
from ldm.config import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line; --help needs no heavy import."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a shipped model's name, a run folder or a Stable Diffusion folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="may be given several times")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the PNGs and grid.png")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance; 1 is none")
    parser.add_argument("--guidance-rescale", type=float, default=0.0)
    parser.add_argument("--sampler", help="ddpm, ddim, euler, euler_a, heun, dpmpp_2m or unipc; default: the model's own")
    parser.add_argument("--seed", type=int, default=0, help="picture i has seed + i")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--height", type=int, help="pixels; default: the model's own")
    parser.add_argument("--width", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--grid", type=Path, metavar="FILE", help="captioned grid; default: DIR/grid.png")
    parser.add_argument("--device", default="", help="default: cuda where there is one, else cpu")
    return parser.parse_args()


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a text file (UserError)."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read: {error}") from None
    if not prompts:
        raise UserError(f"prompt file {str(path)!r} holds no prompt; write one a line")
    return prompts


def main() -> None:
    """Samples all prompts with a progress bar, then writes the PNGs and the grid."""
    args = parse_arguments()
    prompts = read_prompts(args.prompts) if args.prompts else args.prompt
    import torch
    from PIL.PngImagePlugin import PngInfo
    from tqdm import tqdm

    from ldm.images import captioned_grid
    from ldm.pipeline import Pipeline

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = Pipeline.from_pretrained(args.model, device)
    batches = -(-len(prompts) // max(args.batch_size, 1))
    with tqdm(total=batches * args.steps, unit="step") as bar:
        images = pipe(
            prompts,
            negative_prompt=args.negative_prompt,
            steps=args.steps,
            guidance=args.guidance,
            guidance_rescale=args.guidance_rescale,
            sampler=args.sampler,
            seed=args.seed,
            height=args.height,
            width=args.width,
            batch_size=args.batch_size,
            callback=lambda progress: bar.update(),
        )
    args.out.mkdir(parents=True, exist_ok=True)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        about = {
            "prompt": prompt,
            "negative_prompt": args.negative_prompt,
            "seed": args.seed + i,
            "sampler": args.sampler or pipe.schedule.config.sampler,
            "steps": args.steps,
            "guidance": args.guidance,
            "model": args.model,
        }
        info = PngInfo()
        for key, value in about.items():
            info.add_itxt(key, str(value))
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48]
        image.save(args.out / f"{i:04d}-{slug or 'prompt'}.png", pnginfo=info)
    grid = args.grid or args.out / "grid.png"
    grid.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(images, prompts, columns=min(6, len(images))).save(grid)
    print(f"{len(images)} pictures in {args.out}, grid in {grid}")


if __name__ == "__main__":
    run_script(main)
