"""Pictures through the one function that reads them, and PNGs with metadata."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.config import UserError
from ldm.images import ImageError, captioned_grid, read_image, read_metadata, save_png, tile, to_float, to_uint8

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(size: int = 64) -> Image.Image:
    """Red, green; blue, white."""
    image = Image.new("RGB", (size, size), WHITE)
    for color, place in ((RED, (0, 0)), (GREEN, (size // 2, 0)), (BLUE, (0, size // 2))):
        image.paste(color, (*place, place[0] + size // 2, place[1] + size // 2))
    return image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def near(x, color, tolerance=6):
    return (x.float() - torch.tensor(color).float()).abs().max() <= tolerance


def test_pixels_survive_floats_and_rounding():
    x = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(x)), x)
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    undo = {2: 0, 3: 1 + 2, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the turn that makes the stored picture
    stored = corners() if orientation == 1 else corners().transpose(list(Image.Transpose)[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True})):
        x = read_image(encode(stored, kind, exif=exif, **options), 64)
        for (i, j), color in zip(((8, 8), (8, 56), (56, 8), (56, 56)), (RED, GREEN, BLUE, WHITE), strict=True):
            assert near(x[:, i, j], color), kind


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_spoils_only_the_orientation():
    data = encode(corners(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert read_image(data, 16).shape == (3, 16, 16)


def test_modes():
    """Alpha on white, palettes, CMYK, greys; 16 bits scaled, not clipped; the first frame of an animation."""
    hidden = Image.new("RGBA", (64, 64), (255, 0, 0, 0))  # red under full transparency must not bleed in
    palette = corners().convert("P", palette=Image.Palette.ADAPTIVE)
    sixteen = Image.fromarray(np.full((8, 8), 32896, np.uint16))
    for image, kind, options, color in (
        (Image.new("RGBA", (8, 8), (0, 0, 255, 128)), "PNG", {}, (127, 127, 255)),
        (hidden, "PNG", {}, WHITE),
        (Image.new("LA", (8, 8), (0, 128)), "PNG", {}, (127, 127, 127)),
        (palette, "PNG", {}, RED),
        (palette, "GIF", {"transparency": palette.getpixel((0, 0))}, WHITE),
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", {"quality": 95}, RED),
        (Image.new("1", (8, 8), 1), "PNG", {}, WHITE),
        (Image.new("RGB", (8, 8), RED), "AVIF", {}, RED),
        (sixteen, "PNG", {}, (128, 128, 128)),
        (sixteen, "TIFF", {}, (128, 128, 128)),
        (Image.fromarray(np.full((8, 8), 40_000, np.int32)), "TIFF", {}, (156, 156, 156)),
        (Image.new("RGB", (8, 8), RED), "GIF", {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]}, RED),
    ):
        assert near(read_image(encode(image, kind, **options), 16)[:, 2, 2], np.array(color)), (image.mode, kind)
    for image, message in (
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "32 bits"),
        (Image.new("F", (4, 4)), "floating point"),
    ):
        with pytest.raises(ImageError, match=f"^image 'image' cannot be read: its samples .*{message}"):
            read_image(encode(image, "TIFF"), 4)


def test_resize_and_crop_agree_with_torchvision():
    from torchvision.transforms.v2 import functional as F

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    theirs = F.resize(F.pil_to_tensor(image), [20], F.InterpolationMode.BICUBIC, antialias=True)
    assert (read_image(encode(image, "PNG"), 20).float() - F.center_crop(theirs, [20, 20]).float()).abs().max() <= 1
    strip = Image.new("RGB", (15_001, 1), RED)
    strip.putpixel((7500, 0), BLUE)
    assert near(read_image(encode(strip, "PNG"), 9)[:, 4, 4], BLUE, 3)  # the one blue pixel is the centre


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_broken_files_are_one_clear_line(kind, monkeypatch, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    for part in (data[: len(data) // 2], data[:12], b"", b"not an image" * 50):
        with pytest.raises(ImageError, match="^image 'cat' ") as caught:
            read_image(part, 8, name="cat")
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "none.png", 8)
    large = encode(Image.new("L", (6000, 6000)), kind)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="6000x6000 pixels, more than the limit of 16 million"):
        read_image(large, 8)


def test_metadata_survives_in_png(tmp_path):
    metadata = {"prompt": "größer\n日本 😀", "seed": "3"}
    save_png(corners(), tmp_path / "a.png", metadata)
    assert read_metadata(tmp_path / "a.png") == metadata
    corners().save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("text")
    for name, message in (("plain.png", "no prompt and seed"), ("text.png", "no image file that can be read")):
        with pytest.raises(UserError, match=message):
            read_metadata(tmp_path / name)


A1111 = """a cat, (masterpiece:1.2)
on a mat
Negative prompt: blurry,
bad
Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 123, Size: 512x768, Model: "a, b", Lora hashes: "c: d, e: f"
"""


def test_parameters_of_a1111_are_read_and_written(tmp_path):
    info = PngInfo()
    info.add_text("parameters", A1111)
    corners().save(tmp_path / "theirs.png", pnginfo=info)
    metadata = read_metadata(tmp_path / "theirs.png")
    assert metadata == {
        **{"prompt": "a cat, (masterpiece:1.2)\non a mat", "negative_prompt": "blurry,\nbad", "steps": "25"},
        **{"sampler": "dpmpp_2m", "sigmas": "karras", "guidance": "7.5", "seed": "123", "model": "a, b"},
        **{"width": "512", "height": "768"},
    }
    save_png(corners(), tmp_path / "ours.png", metadata)
    with Image.open(tmp_path / "ours.png") as image:
        text = image.text["parameters"]
    settings = "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 123"
    assert text.splitlines()[:4] == A1111.splitlines()[:4] and settings in text
    info = PngInfo()
    info.add_text("parameters", text)
    corners().save(tmp_path / "again.png", pnginfo=info)
    width, height = map(str, corners().size)
    assert read_metadata(tmp_path / "again.png") == metadata | {"width": width, "height": height}


def test_grids():
    x = torch.stack([torch.full((3, 2, 4), value) for value in (-1.0, 0.0, 1.0, 1.0)])
    sheet = np.asarray(tile(x, columns=2, scale=3))
    assert sheet.shape == (12, 24, 3) and (sheet[0, ::12, 0] == (0, 128)).all() and (sheet[6:] == 255).all()
    grid = captioned_grid([Image.new("RGB", (8, 4), RED)] * 3, ["short", "a long caption " * 9, ""], columns=2, cell=80)
    pixels = np.asarray(grid)
    assert grid.width == 2 * 90 + 10 and (pixels[50, 50] == RED).all() and (pixels[15, 50] == 255).all()
    assert pixels[90:].min() < 100  # text
