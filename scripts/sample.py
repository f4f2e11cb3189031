"""Pictures from prompts.

python scripts/sample.py --model emoji --prompt "a 3D emoji of a red apple" --out outputs
"""

import argparse
import re
from pathlib import Path

from ldm.cli import argument_parser, find_device, run_script
from ldm.config import UserError

# Arguments that the pipeline takes under the same name
OPTIONS = ("negative_prompt", "steps", "guidance", "guidance_rescale", "sampler", "seed")
OPTIONS += ("height", "width", "batch_size")


def parse_arguments() -> argparse.Namespace:
    """The command line; --help needs no heavy import."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", required=True, help="shipped model's name, run folder or Stable Diffusion folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="may be given several times")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the PNGs and grid.png")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0, help="classifier-free guidance; 1 is none")
    parser.add_argument("--guidance-rescale", type=float, default=0.0)
    parser.add_argument("--sampler", help="ddpm, ddim, euler, euler_a, heun, dpmpp_2m, unipc, pndm; default: model's")
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


def write_pictures(folder: Path, images: list, about: list[dict[str, str]]) -> None:
    """PNGs named by number and prompt, what they were made from in their text chunks."""
    from PIL.PngImagePlugin import PngInfo

    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, texts) in enumerate(zip(images, about, strict=True)):
        info = PngInfo()
        for key, value in texts.items():
            info.add_itxt(key, value)
        slug = re.sub(r"[^a-z0-9]+", "-", texts["prompt"].lower())[:48].strip("-")
        image.save(folder / f"{i:04d}-{slug or 'prompt'}.png", pnginfo=info)


def main() -> None:
    """Samples all prompts with a progress bar, then writes the PNGs and the grid."""
    args = parse_arguments()
    prompts = read_prompts(args.prompts) if args.prompts else args.prompt
    for path, kind in ((args.out, "folder"), (args.grid, "file")):
        if path and path.exists() and path.is_dir() != (kind == "folder"):
            raise UserError(f"{str(path)!r} is there and is no {kind}; give another name")
    from tqdm import tqdm

    from ldm.images import captioned_grid
    from ldm.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(args.model, find_device(args.device))
    options = {name: getattr(args, name) for name in OPTIONS}
    total = -(-len(prompts) // max(args.batch_size, 1)) * args.steps
    with tqdm(total=total, unit="step", delay=1e-3) as bar:  # the delay: no bar before an error
        images = pipe(prompts, callback=lambda progress: bar.update(), **options)
    settings = {
        "negative_prompt": args.negative_prompt,
        "sampler": args.sampler or pipe.schedule.config.sampler,
        "steps": args.steps,
        "guidance": args.guidance,
        "guidance_rescale": args.guidance_rescale,
        "model": args.model,
    }
    about = [{"prompt": prompt, "seed": args.seed + i} | settings for i, prompt in enumerate(prompts)]
    write_pictures(args.out, images, [{k: str(v) for k, v in texts.items()} for texts in about])
    grid = args.grid or args.out / "grid.png"
    grid.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(images, prompts, columns=min(6, len(images))).save(grid)
    print(f"{len(images)} pictures in {args.out}, grid in {grid}")


if __name__ == "__main__":
    run_script(main)
