"""Reading one picture of any common kind as a square RGB tensor."""

import errno
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
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
