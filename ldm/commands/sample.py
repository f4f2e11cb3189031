"""Makes pictures from prompts.

ldm sample --model emoji --prompt "a 3D emoji of a red apple" --out outputs

--image starts from a picture, and --mask redraws only the white part of it. --interpolate N makes N pictures from the
first of two prompts (and --seed) to the second (and --seed-to), and an animated GIF of them.

Samplers: ddpm, ddim, euler, euler_a, heun, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde, unipc, deis, pndm, lcm.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ldm.commands.cli import read_options
from ldm.config import Dtype, UserError

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import Pipeline, Progress

RECORDED = ["negative_prompt", "steps", "guidance", "guidance_rescale"]
RECORDED += ["model", "vae", "sampler", "sigmas", "height", "width", "lora", "weights"]
OWN = ("sampler", "sigmas")  # options whose default is the model's


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `ldm sample`."""

    model: str  # a shipped model, a run folder, a Stable Diffusion folder or single file
    vae: str | None = None  # another VAE, from a folder or a file
    tokenizer: str | None = None  # with a single file: folder of its tokenizer; default: CLIP's own
    prediction: str = ""  # epsilon or v_prediction, of a single file that does not name it
    zero_snr: bool = False  # a single file was trained with zero terminal SNR
    ema: bool = False  # the averaged U-Net of a single file
    prompt: tuple[str, ...] = ()  # text to make a picture of; may be repeated
    prompts: Path | None = None  # text file with one prompt per line, instead of --prompt
    weights: bool = False  # read (more), [less] and (word:1.3) in prompts as A1111 does, of any length
    out: Path  # folder for the PNGs and grid.png
    lora: tuple[str, ...] = ()  # low-rank adapter, as FILE or FILE:WEIGHT; may be repeated
    steps: int | None = None  # denoising steps; default: 30, or those of a distilled model
    guidance: float | None = None  # scale of classifier-free guidance; 1 is none; default: 5, distilled 1
    guidance_rescale: float = 0.0  # 0 to 1: reduces overexposure at high guidance
    sampler: str | None = None  # one of those above; default: the model's own
    sigmas: Literal["karras", "exponential", "beta", "none"] | None = None  # noise levels; default: the model's own
    seed: int = 0  # picture i is made with seed + i
    negative_prompt: str = ""  # text that guidance leads away from
    image: Path | None = None  # picture to start from: its centre square, resized
    mask: Path | None = None  # with --image: white (or transparent) parts are redrawn, black ones are kept
    resample: int = 1  # with --mask: model calls per step; 2 blends the kept part in better
    strength: float = 0.8  # with --image, above 0 and up to 1: how much is redrawn
    interpolate: int | None = None  # number of pictures from the first prompt to the second; not with ddpm or euler_a
    seed_to: int | None = None  # with --interpolate: seed of the last picture; default: --seed
    height: int | None = None  # in pixels; default: the model's own
    width: int | None = None  # in pixels; default: the model's own
    batch_size: int = 16  # pictures per call of the model
    compile: Literal["auto", "always", "never"] = "auto"  # the models first; auto: by OpenVINO where that saves time
    precision: Literal["float32", "bfloat16"] = "float32"  # of the U-Net, compiled; bfloat16 needs OpenVINO
    grid: Path | None = None  # PNG with all pictures and their prompts; default: grid.png in --out
    device: str = ""  # cpu or cuda; default: cuda where available
    dtype: Dtype = "auto"  # of the weights; auto: bfloat16 on GPUs that have it, else float16; float32 on CPUs


def main() -> None:
    """Samples all prompts with a progress bar, then writes the PNGs and the grid."""
    options = read_options(Options, __doc__)
    prompts = read_prompts(options)
    from tqdm import tqdm

    from ldm.lora import read_weight
    from ldm.pipeline import Pipeline
    from ldm.prompts import encode_weighted

    parts = {name: getattr(options, name) for name in ("vae", "tokenizer", "prediction", "zero_snr", "ema")}
    pipe = Pipeline.from_pretrained(options.model, options.device, options.dtype, **parts)
    for file, weight in map(read_weight, options.lora):
        pipe.load_lora(file, weight)
    given = vars(options) | {"lora": ", ".join(options.lora) or None, "weights": options.weights or None}
    given |= {name: vars(options)[name] or getattr(pipe.schedule.config, name) for name in OWN}
    given |= {name: value for name, value in pipe.defaults.items() if given[name] is None}
    batches = -(-(options.interpolate or len(prompts)) // max(options.batch_size, 1))
    if options.compile == "always" or options.precision != "float32":
        pipe.compile(precision=options.precision)
    elif options.compile == "auto":
        pipe.compile(passes=batches * given["steps"])
    inputs = {name: given[name] for name in inspect.signature(pipe.__call__).parameters if name in given}
    inputs |= {"prompt": prompts} | read_squares(options, pipe)
    metadata: list[dict[str, Any]] = [{"prompt": text, "seed": options.seed + i} for i, text in enumerate(prompts)]
    if options.weights:
        negative = [options.negative_prompt]
        embeds = encode_weighted(pipe.tokenizer, pipe.text_encoder, prompts, negative)
        inputs |= dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=True))
        inputs |= {"prompt": None, "negative_prompt": None}
    if options.interpolate:
        path, metadata = interpolate(pipe, prompts, options)
        inputs |= {"prompt": None} | path
    with tqdm(unit="step", delay=1e-3) as bar:  # the delay: no bar before an error

        def advance(progress: Progress) -> None:
            bar.total = batches * progress.steps
            bar.update()

        images = pipe(callback=advance, **inputs)
    given |= {"device": pipe.device, "dtype": str(pipe.dtype).removeprefix("torch.")}
    given["compiled"] = options.precision if pipe.compiled else None
    edit = ("image", "mask", "strength", "resample") if options.image else ()
    names = [*RECORDED, "device", "dtype", "compiled", *edit]
    shared = {name: given[name] for name in names if given[name] is not None}
    write(options, images, [{key: str(value) for key, value in (own | shared).items()} for own in metadata])


def read_prompts(options: Options) -> list[str]:
    """The prompts of --prompt, or the non-empty lines of the file --prompts. Raises UserError for them and for other
    options that can be refused before a model is opened."""
    from ldm.data.text import read_text

    if bool(options.prompt) == (options.prompts is not None):
        raise UserError("exactly one of --prompt and --prompts is required; see --help")
    lines = read_text(options.prompts).splitlines() if options.prompts else []
    prompts = list(options.prompt) or [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {str(options.prompts)!r} holds no prompt; write one per line")
    for text in (*prompts, options.negative_prompt):
        if re.search("[\ud800-\udfff]", text):  # how Python reads arguments of other encodings
            raise UserError(f"prompt {text!r} is not valid UTF-8")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {str(options.out)!r} is a file; give a folder, which may be new")
    if options.grid and options.grid.is_dir():
        raise UserError(f"--grid {str(options.grid)!r} is a folder; name a PNG in it")
    count = options.interpolate
    if count is not None and (count < 2 or len(prompts) != 2):
        raise UserError(f"--interpolate {count} with {len(prompts)} prompts; give 2 or more pictures and two prompts")
    if options.seed_to is not None and count is None:
        raise UserError("--seed-to is the last seed of --interpolate; leave it out without that")
    if options.precision != "float32" and options.compile == "never":
        raise UserError(f"--precision {options.precision} runs compiled models alone; leave --compile never out")
    if options.weights and count is not None:
        raise UserError("--interpolate reads prompts without weights; leave out one of --interpolate and --weights")
    if options.image and options.height != options.width:
        raise UserError(f"--image is cut to a square: --height {options.height} and --width {options.width} differ")
    return prompts


def read_squares(options: Options, pipe: Pipeline) -> dict[str, Image.Image]:
    """The centre squares of the image and the mask, resized to the height to sample."""
    from PIL import Image, ImageOps

    from ldm.images import open_image

    paths = {"image": options.image, "mask": options.mask}
    images = {name: open_image(path) for name, path in paths.items() if path}
    side = pipe.latent_shape(options.height, options.width)[1] * pipe.vae.factor
    sizes = sorted({f"{image.width}x{image.height}" for image in images.values()})
    if len(sizes) > 1:
        raise UserError(f"the image and its mask must have one size; they have {' and '.join(sizes)}")
    return {name: ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC) for name, image in images.items()}


def interpolate(pipe: Pipeline, prompts: list[str], options: Options) -> tuple[dict, list[dict]]:
    """Contexts (N, L, D) and latents (N, C, h, w) from the first prompt to the second, and the PNGs' metadata."""
    import torch

    from ldm.edit import between, slerp
    from ldm.samplers import ImageNoise

    last = options.seed if options.seed_to is None else options.seed_to
    a, b = ImageNoise([options.seed, last], pipe.latent_shape(options.height, options.width))()
    shares = torch.linspace(0, 1, options.interpolate).tolist()
    embeds = between(*pipe.encode_prompt(prompts).split(1), shares)
    latents = torch.stack([slerp(a, b, share) for share in shares])
    texts = {"prompt": " -> ".join(prompts), "seed": options.seed, "seed_to": last}
    return {"prompt_embeds": embeds, "latents": latents}, [texts | {"share": f"{share:.4g}"} for share in shares]


def write(options: Options, images: list[Image.Image], metadata: list[dict[str, str]]) -> None:
    """PNGs named by number and prompt, a captioned grid, and the GIF of an interpolation."""
    from ldm.images import captioned_grid, save_png

    file = options.grid or options.out / "grid.png"
    for folder in (options.out, file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for i, (image, texts) in enumerate(zip(images, metadata, strict=True)):
        slug = re.sub(r"[^a-z0-9]+", "-", texts["prompt"].lower())[:48].strip("-")
        save_png(image, options.out / f"{i:04d}-{slug or 'prompt'}.png", texts)
    captions = [texts.get("share", texts["prompt"])[:400] for texts in metadata]  # as many letters as fit a cell
    grid = captioned_grid(images, captions, len(images) if options.interpolate else min(6, len(images)))
    save_png(grid, file, {"grid": f"{len(images)} pictures"})  # so that an evaluation of the folder leaves it out
    print(f"{len(images)} pictures in {options.out}, grid in {file}")
    if options.interpolate:
        images[0].save(options.out / "path.gif", save_all=True, append_images=images[1:], duration=120, loop=0)
