"""Pictures: read from files, converted between tensors and PIL, laid out in grids, saved as PNG with metadata."""

import base64
import contextlib
import errno
import io
import json
import math
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.config import UserError

LIMIT = 16_000_000  # pixels; a header with more is refused before anything is decoded
# Formats decoded inside Pillow itself; EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
# Errors of the disk, the network or the process, which do not mean that the picture is broken.
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)

# A1111's names of settings and samplers, which ComfyUI's readers, Fooocus and others know
PARAMETERS = {
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "sigmas",
    "CFG scale": "guidance",
    "Seed": "seed",
}
PARAMETERS |= {"Model": "model", "Denoising strength": "strength", "CFG Rescale phi": "guidance_rescale"}
A1111 = {"ddim": "DDIM", "euler": "Euler", "euler_a": "Euler a", "heun": "Heun", "dpmpp_2m": "DPM++ 2M", "lcm": "LCM"}
A1111 |= {"dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_sde": "DPM++ SDE", "unipc": "UniPC", "pndm": "PLMS", "deis": "DEIS"}


class ImageError(UserError):
    """A picture that cannot be read."""


def to_float(image: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """x in [-1, 1], clamped -> uint8 pixels, rounded to nearest."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_pil(x: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] -> PIL images."""
    return [Image.fromarray(pixels) for pixels in rearrange(to_uint8(x).cpu(), "b c h w -> b h w c").numpy()]


def tile(x: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Images (N, 3, H, W) in [-1, 1] as one picture of full rows of `columns`, each pixel enlarged `scale` times."""
    (image,) = to_pil(rearrange(x, "(rows columns) c h w -> 1 c (rows h) (columns w)", columns=columns))
    return ImageOps.scale(image, scale, Image.Resampling.NEAREST)


def captioned_grid(images: list[Image.Image], captions: list[str], columns: int, cell: int = 160) -> Image.Image:
    """Each image with its wrapped caption below it, scaled so that its longer side is `cell` pixels."""
    font = ImageFont.load_default(size=max(11, cell // 13))
    texts = [textwrap.fill(caption, max(8, int(cell / (font.size * 0.52)))) for caption in captions]
    lines, gap, rows = max((text.count("\n") + 1 for text in texts), default=0), 10, -(-len(images) // columns)
    width, height = cell + gap, cell + int(font.size * 1.25) * lines + 2 * gap
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = gap + i % columns * width, gap + i // columns * height
        method = Image.Resampling.NEAREST if image.width < 64 else Image.Resampling.LANCZOS
        sheet.paste(ImageOps.pad(image, (cell, cell), method, color="white"), (x, y))
        draw.text((x, y + cell + 3), text, fill="black", font=font, spacing=font.size // 6)
    return sheet


def data_url(image: Image.Image) -> str:
    """A picture as a data URL, PNG."""
    data = io.BytesIO()
    image.convert("RGB").save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def save_png(image: Image.Image, path: Path, metadata: dict[str, str]) -> None:
    """A PNG with metadata in its text chunks; that of a sample once more as `parameters`, which other tools read."""
    info = PngInfo()
    more = {"parameters": format_parameters(metadata, image.size)} if "prompt" in metadata else {}
    for key, value in (metadata | more).items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode())  # no lone surrogates
    image.save(path, "PNG", pnginfo=info)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in a PNG of `save_png`, or of `parameters` by A1111 and tools that write as it does. Raises
    UserError for a file without it."""
    with _open(path) as image:
        metadata = dict(getattr(image, "text", {}))  # of a PNG
    text = metadata.pop("parameters", "")
    if not {"prompt", "seed"} <= metadata.keys():
        metadata = parse_parameters(text)
    if "seed" not in metadata:
        raise UserError("the PNG has no prompt and seed in its text chunks, neither as saved here nor by A1111")
    return metadata


def format_parameters(metadata: dict[str, str], size: tuple[int, int]) -> str:
    """Metadata as A1111 writes it: the prompt, the negative prompt, and a line of settings."""
    values = {theirs: metadata[ours] for theirs, ours in PARAMETERS.items() if ours in metadata}
    values |= {"Size": "x".join(map(str, size))}
    values |= {"Schedule type": metadata["sigmas"].capitalize()} if "sigmas" in metadata else {}
    if "sampler" in metadata:
        values["Sampler"] = A1111.get(metadata["sampler"], metadata["sampler"])
    shown = (f"{key}: {json.dumps(v) if set(v) & set(',:') else v}" for key, v in values.items())
    negative = metadata.get("negative_prompt", "")
    return "\n".join([metadata["prompt"], *([f"Negative prompt: {negative}"] if negative else []), ", ".join(shown)])


def parse_parameters(text: str) -> dict[str, str]:
    """The metadata in A1111's `parameters`; empty where it is something else."""
    found = re.fullmatch(r"(.*?)(?:\n?Negative prompt: (.*?))?\n?(Steps: [^\n]*)", text.strip(), re.DOTALL)
    if not found:
        return {}
    prompt, negative, line = found.groups()
    values = dict(re.findall(r'([A-Z][\w /-]*): ("(?:\\.|[^"\\])*"|[^,]*)', line))
    values = {key: json.loads(value) if value.startswith('"') else value.strip() for key, value in values.items()}
    metadata = {"prompt": prompt.strip()} | ({"negative_prompt": negative.strip()} if negative else {})
    metadata |= {ours: values[theirs] for theirs, ours in PARAMETERS.items() if theirs in values}
    # older files name the noise levels behind the sampler
    name, _, levels = values.get("Sampler", "").rpartition(" ")
    if levels in ("Karras", "Exponential"):
        metadata |= {"sampler": name, "sigmas": levels}
    if "sampler" in metadata:
        samplers = {theirs: ours for ours, theirs in A1111.items()}
        metadata["sampler"] = samplers.get(metadata["sampler"], metadata["sampler"])
    sigmas = metadata.pop("sigmas", "").lower()
    metadata |= {"sigmas": sigmas} if sigmas in ("karras", "exponential", "beta") else {}
    size = re.fullmatch(r"(\d+)x(\d+)", values.get("Size", ""))
    return metadata | (dict(zip(("width", "height"), size.groups(), strict=True)) if size else {})


def read_image(source: str | Path | bytes, size: int, limit: int = LIMIT, name: str = "") -> Tensor:
    """A picture as uint8 RGB (3, size, size): the centred square, resized with antialias (bicubic).

    `source` is a path or the bytes of an image file, `name` its name in messages; errors are those of `open_image`.
    """
    square = ImageOps.fit(open_image(source, limit, name), (size, size), Image.Resampling.BICUBIC)
    return rearrange(torch.from_numpy(np.array(square)), "h w c -> c h w").contiguous()


def open_image(source: str | Path | bytes, limit: int = LIMIT, name: str = "") -> Image.Image:
    """A picture as `upright_rgb` returns it; of an animation, the first frame.

    Raises ImageError for a file that is missing, broken, of an unknown kind, or of more than `limit` pixels (checked
    before decoding), and UserError for a failure of the system, which may pass.
    """
    with _open(source, limit, name) as image:
        image.load()
        return upright_rgb(image)


def image_size(path: Path, limit: float = math.inf) -> tuple[int, int]:
    """Width and height in a picture's header, before EXIF orientation. Raises ImageError as `read_image`."""
    with _open(path, limit) as image:
        return image.size


def upright_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB: turned by its EXIF orientation, 16 bits scaled to 8, alpha composited on white.

    Raises ImageError for floating-point and 32-bit samples, whose range is unknown.
    """
    with contextlib.suppress(Exception):  # a broken EXIF block spoils the orientation, not the picture
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("F", "I")):  # Pillow's convert would clip 16 bits at 255
        samples = np.asarray(image)
        if image.mode == "F" or samples.min() < 0 or samples.max() > 65535:
            raise ImageError("its samples are floating point or have 32 bits; save it with 8 or 16 bits")
        image = Image.fromarray(((samples.astype(np.int64) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextlib.contextmanager
def _open(source: str | Path | bytes, limit: float = LIMIT, name: str = "") -> Iterator[Image.Image]:
    """An image whose header is read; errors of a decoder within, which may be of any class, become one line."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    name = name or (str(file) if file is source else "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `limit` decides instead
            image = Image.open(file, formats=FORMATS)
        with image:
            width, height = image.size
            if width * height > limit:
                raise ImageError(f"it has {width}x{height} pixels, more than the limit of {limit / 1e6:g} million")
            yield image
    except MemoryError:
        raise
    except FileNotFoundError:
        raise ImageError(f"image {name!r} does not exist") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"image {name!r} is no image file that can be read here ({', '.join(FORMATS)})") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if getattr(error, "errno", None) in TRANSIENT:
            raise UserError(f"image {name!r} cannot be read now ({reason}); give the same command again") from None
        raise ImageError(f"image {name!r} cannot be read: {reason}") from None
