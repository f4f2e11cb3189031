"""Pictures of pictures: grids with captions, for previews and the demo; and PNGs that say what they were made from."""

import base64
import io
import textwrap
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.config import UserError
from ldm.data import to_uint8
from ldm.data.images import LIMIT


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
