"""Pictures from prompts.

python scripts/sample.py --model emoji --prompt "a 3D emoji of a red apple" --out outputs

With --image a picture is what to begin with, with --mask only its white part is drawn anew. --interpolate N makes N
pictures from the first of two prompts (and --seed) to the second (and --seed-to), a strip and a GIF of them.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.commands.cli import argument_parser, run_script
from ldm.config import UserError
from ldm.distributed import find_device

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import Pipeline

# Arguments that the pipeline takes under the same name
OPTIONS = ("negative_prompt", "strength", "resample", "steps", "guidance", "guidance_rescale", "sampler", "seed")
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
    parser.add_argument("--image", type=Path, metavar="FILE", help="begin with it: its centre square, resized")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="white (or clear) is drawn anew, black stays")
    parser.add_argument(
        "--resample",
        type=int,
        default=1,
        help="with --mask: how often each step asks the model; 2 fits what stays better",
    )
    parser.add_argument("--strength", type=float, default=0.8, help="with --image, in (0, 1]: how much is redrawn")
    parser.add_argument(
        "--interpolate", type=int, default=0, metavar="N", help="2 or more; with a sampler without noise"
    )
    parser.add_argument("--seed-to", type=int, metavar="SEED", help="of the last one; default: --seed for all")
    parser.add_argument("--height", type=int, help="pixels; default: the model's own")
    parser.add_argument("--width", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="minutes more at first, for hundreds of pictures")
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


def check(args: argparse.Namespace, prompts: list[str]) -> None:
    """UserError for what can be refused before a model is opened."""
    for text in (*prompts, args.negative_prompt):
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # what Python makes of other bytes in arguments
            raise UserError(f"prompt {text!r} is not valid UTF-8; give it in the terminal's encoding, UTF-8")
    for path, kind in ((args.out, "folder"), (args.grid, "file")):
        if path and path.exists() and path.is_dir() != (kind == "folder"):
            raise UserError(f"{str(path)!r} is there and is no {kind}; give another name")
    if args.interpolate and (len(prompts) != 2 or args.interpolate < 2):
        raise UserError(
            f"--interpolate {args.interpolate} with {len(prompts)} prompts: give 2 or more, and two prompts"
        )
    if args.seed_to is not None and not args.interpolate:
        raise UserError("--seed-to is where --interpolate ends; without that, leave it out")
    if args.image and args.height != args.width:
        raise UserError(
            f"an image is cut to a square, so --height {args.height} and --width {args.width} must be equal"
        )


def read_squares(args: argparse.Namespace, side: int) -> dict[str, Image.Image]:
    """The image and the mask as square RGB pictures of --height, else of `side` pixels (UserError)."""
    from PIL import Image

    from ldm.images import ImageError, read_image, to_pil

    found, sizes = {}, {}
    for name in ("image", "mask"):
        path = getattr(args, name)
        if path:
            try:
                pixels = read_image(path, side if args.height is None else max(args.height, 1))
            except ImageError as error:
                raise UserError(str(error)) from None
            (found[name],) = to_pil(pixels[None] / 127.5 - 1)
            with Image.open(path) as image:
                sizes[name] = f"{image.width}x{image.height}"
    if len(set(sizes.values())) > 1:
        raise UserError(f"the mask is {sizes['mask']}, the image {sizes['image']}; both must have one size")
    return found


def interpolation(pipe: Pipeline, prompts: list[str], args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """What the pipeline takes for the pictures on the way, and what their PNGs say of them (UserError)."""
    import torch

    from ldm.edit import between, slerp
    from ldm.samplers import ImageNoise

    last = args.seed if args.seed_to is None else args.seed_to
    a, b = ImageNoise([args.seed, last], pipe.latent_shape(args.height, args.width))()
    shares = torch.linspace(0, 1, args.interpolate).tolist()
    first, second = (pipe.encode_prompt([prompt]) for prompt in prompts)
    options = {"prompt_embeds": between(first, second, shares)}
    options["latents"] = torch.stack([slerp(a, b, share) for share in shares])
    words = {"prompt": " -> ".join(prompts), "seed": args.seed, "seed_to": last}
    return options, [words | {"share": f"{share:.4g}"} for share in shares]


def write_pictures(folder: Path, images: list, about: list[dict[str, str]]) -> None:
    """PNGs named by number and prompt, what they were made from in their text chunks."""
    from ldm.images import save_png

    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, texts) in enumerate(zip(images, about, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", texts["prompt"].lower())[:48].strip("-")
        save_png(image, folder / f"{i:04d}-{slug or 'prompt'}.png", texts)


def main() -> None:
    """Samples all prompts with a progress bar, then writes the PNGs and the grid."""
    args = parse_arguments()
    prompts = read_prompts(args.prompts) if args.prompts else args.prompt
    check(args, prompts)
    from tqdm import tqdm

    from ldm.images import captioned_grid
    from ldm.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(args.model, find_device(args.device))
    pipe = pipe.compile() if args.compile else pipe
    options = {name: getattr(args, name) for name in OPTIONS}
    options |= read_squares(args, pipe.latent_shape()[1] * pipe.vae.factor)
    if args.interpolate:
        path, about = interpolation(pipe, prompts, args)
        options |= path
    else:
        options["prompt"] = prompts
        about = [{"prompt": prompt, "seed": args.seed + i} for i, prompt in enumerate(prompts)]
    steps = int(args.steps * args.strength) if args.image else args.steps
    total = -(-len(about) // max(args.batch_size, 1)) * steps
    with tqdm(total=total, unit="step", delay=1e-3) as bar:  # the delay: no bar before an error
        images = pipe(callback=lambda progress: bar.update(), **options)
    settings = {
        "negative_prompt": args.negative_prompt,
        "sampler": args.sampler or pipe.schedule.config.sampler,
        "steps": args.steps,
        "guidance": args.guidance,
        "guidance_rescale": args.guidance_rescale,
        "model": args.model,
    }
    if args.image:
        settings |= {"image": args.image, "mask": args.mask or "", "strength": args.strength, "resample": args.resample}
    write_pictures(args.out, images, [{k: str(v) for k, v in (texts | settings).items()} for texts in about])
    grid = args.grid or args.out / "grid.png"
    grid.parent.mkdir(parents=True, exist_ok=True)
    captions = [texts.get("share", texts["prompt"]) for texts in about]
    captioned_grid(images, captions, columns=len(images) if args.interpolate else min(6, len(images))).save(grid)
    print(f"{len(images)} pictures in {args.out}, grid in {grid}")
    if args.interpolate:
        gif = args.out / "path.gif"
        images[0].save(gif, save_all=True, append_images=images[1:], duration=120, loop=0)
        print(f"the way as {gif}")


if __name__ == "__main__":
    run_script(main)
