"""Pictures of pictures: grids with captions, for previews and the demo; and PNGs that say what they were made from."""

import base64
import errno
import io
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.config import UserError

LIMIT = 16_000_000  # pixels; a header that claims more is refused before anything is decoded
# Formats decoded inside Pillow itself. Others are left out on purpose: EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # with "JPEG" go MPO files, as phones write
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Of the disk, the network or the process and not of the picture: it must not count as broken.
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
ORIENTATION = 0x0112  # EXIF 2.3, table 4
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_float(image: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """x in [-1, 1], clamped -> uint8 pixels, rounded: truncation would darken by half a level."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(x: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] -> PIL images."""
    pixels = rearrange(to_uint8(x).cpu(), "b c h w -> b h w c").numpy()
    return [Image.fromarray(p) for p in pixels]


def tile(x: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Images (B, 3, H, W) in [-1, 1] as one picture of `columns` columns, enlarged by whole pixels."""
    padding = torch.ones(-len(x) % columns, *x.shape[1:])
    rows = rearrange(torch.cat([x.cpu().float(), padding]), "(r c) k h w -> k (r h) (c w)", c=columns)
    (image,) = to_pil(rows[None])
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def data_url(image: Image.Image) -> str:
    """A picture as a data URL, PNG."""
    data = io.BytesIO()
    image.convert("RGB").save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def save_png(image: Image.Image, path: Path, about: dict[str, str]) -> None:
    """A PNG with what it was made from in its text chunks."""
    info = PngInfo()
    for key, value in about.items():
        info.add_itxt(key, value.encode("utf-8", "replace").decode())  # no lone surrogates
    image.save(path, "PNG", pnginfo=info)


def read_about(path: str | Path) -> dict[str, str]:
    """What a PNG of `save_png` was made from; UserError for one that does not say, or no PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > LIMIT:
                raise ValueError(f"it has more than {LIMIT / 1e6:g} million pixels")
            image.load()  # text may stand behind the pixels
            texts = {str(key): str(value) for key, value in image.text.items()}
    except Exception as error:  # decoders given broken bytes raise nearly anything
        raise UserError(f"the file is no PNG that can be read ({type(error).__name__})") from None
    if not {"prompt", "seed"} <= texts.keys():
        raise UserError("the PNG does not say what it was made from; those that are downloaded here do")
    return texts


def captioned_grid(images: list[Image.Image], captions: list[str], columns: int, cell: int = 160) -> Image.Image:
    """Each image with its caption below it, wrapped, its longer side made `cell` pixels; for people to look at."""
    font = ImageFont.load_default(size=max(11, cell // 13))
    wrapped = [textwrap.wrap(c, max(8, int(cell / (font.size * 0.52)))) for c in captions]
    line, gap = int(font.size * 1.25), 10
    height = cell + line * max(map(len, wrapped), default=0) + gap
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = gap + (i % columns) * (cell + gap), gap + (i // columns) * (height + gap)
        enlarge = Image.Resampling.NEAREST if image.width < 64 else Image.Resampling.LANCZOS
        w, h = (max(1, round(side * cell / max(image.size))) for side in image.size)
        sheet.paste(image.resize((w, h), enlarge), (x + (cell - w) // 2, y + (cell - h) // 2))
        for j, text in enumerate(lines):
            draw.text((x, y + cell + 3 + j * line), text, fill="black", font=font)
    return sheet


class ImageError(ValueError):
    """A picture that cannot be read; the message names the file and says why, in one line."""


def read_image(source: str | Path | bytes, size: int, limit: int = LIMIT, name: str = "") -> Tensor:
    """A picture as uint8 (3, size, size) in 0..255, RGB.

    `source` is a path or the bytes of an image file, `name` what messages call it (the path where it is
    empty). EXIF orientation is applied, alpha lies on white, 16-bit samples are scaled to 8 bits, an
    animation gives its first frame. The centred square of the shorter side is resized with antialias
    (bicubic). Raises ImageError for a file that is missing, broken, cut short, of an unknown kind, or of
    more than `limit` pixels (checked in the header, before decoding).
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `limit` decides instead
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        with image:
            _check_size(image, limit)
            image.load()
            picture = _resize(_on_white(_upright(image)), size)
    except FileNotFoundError:
        raise ImageError(f"image {name!r} does not exist") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"image {name!r} is no image file that can be read here ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which is higher
        raise ImageError(
            f"image {name!r} claims to have far more pixels than the limit of {limit / 1e6:g} million"
        ) from None
    except MemoryError:
        raise
    # Decoders given broken bytes raise nearly anything: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if getattr(error, "errno", None) in PASSING:
            raise UserError(f"image {name!r} cannot be read now ({reason}); give the same command again") from None
        raise ImageError(f"image {name!r} cannot be read: {reason}") from None
    return torch.from_numpy(rearrange(np.array(picture), "h w c -> c h w").copy())


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as its header says; ImageError where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return image.size
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"image {str(path)!r} cannot be read: {reason}") from None


def _check_size(image: Image.Image, limit: int) -> None:
    width, height = image.size
    if width * height > limit:
        raise ValueError(f"it has {width}x{height} pixels, more than the limit of {limit / 1e6:g} million")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a broken EXIF block spoils the orientation, not the picture
        turn = None
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its samples are floating point, of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _from_16_bit(image)
    if "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    # Pillow's own convert("L") clips 16-bit samples at 255: nearly every picture would come out white.
    samples = np.asarray(image).astype(np.int64)
    if samples.min() < 0 or samples.max() > 65535:
        raise ValueError("its samples have 32 bits; save it with 8 or 16 bits")
    clear = image.info.get("transparency")
    alpha = np.where(samples == clear, 0, 255) if isinstance(clear, int) else np.full(samples.shape, 255)
    grey = repeat((samples + 128) // 257, "h w -> h w c", c=3)
    return Image.fromarray(np.concatenate([grey, alpha[..., None]], axis=2).astype(np.uint8), "RGBA")


def _resize(image: Image.Image, size: int) -> Image.Image:
    # The square is cut out by the resize itself: a 1x10000 strip would otherwise become 64x640000 first.
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
