"""Pictures of pictures: grids with captions, for previews and the demo."""

import textwrap

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.data import to_uint8


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
