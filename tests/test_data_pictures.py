"""Reading of pictures: every kind that people have, upright, on white, in 8 bits, resized as torchvision resizes."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from ldm.images import ImageError, read_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(size=64):
    """Red top left, green top right, blue bottom left, white bottom right."""
    pixels = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def near(x, color, tolerance=6):
    return (x.float() - torch.tensor(color).float()).abs().max() <= tolerance


def test_plain_picture_is_exact():
    x = read_image(encode(corners(8), "PNG"), 8)
    assert x.dtype == torch.uint8 and x.shape == (3, 8, 8) and x.is_contiguous()
    np.testing.assert_array_equal(x.permute(1, 2, 0).numpy(), np.asarray(corners(8)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = corners()
    undo = {2: 0, 3: 1 + 2, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the turn that makes the stored picture
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True})):
        x = read_image(encode(stored, kind, exif=exif, **options), 64)
        seen = [x[:, 8, 8], x[:, 8, 56], x[:, 56, 8], x[:, 56, 56]]
        assert all(near(f, c) for f, c in zip(seen, (RED, GREEN, BLUE, WHITE), strict=True)), kind


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_spoils_only_the_orientation():
    data = encode(corners(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert read_image(data, 16).shape == (3, 16, 16)


def test_alpha_and_transparent_palettes_lie_on_white():
    half = Image.new("RGBA", (8, 8), (0, 0, 255, 128))
    assert near(read_image(encode(half, "PNG"), 8)[:, 4, 4], (127, 127, 255), 1)
    hidden = Image.new("RGBA", (64, 64), (255, 0, 0, 0))  # red under full transparency must not bleed in
    hidden.paste((0, 0, 255, 255), (0, 0, 32, 64))
    x = read_image(encode(hidden, "PNG"), 16)
    assert near(x[:, 8, 12], WHITE, 0) and (x[2] == 255).all()
    assert near(read_image(encode(Image.new("LA", (8, 8), (0, 128)), "PNG"), 8)[:, 0, 0], (127, 127, 127), 1)
    palette = corners().convert("P", palette=Image.Palette.ADAPTIVE)
    assert near(read_image(encode(palette, "PNG"), 64)[:, 8, 8], RED)
    for kind in ("PNG", "GIF"):
        x = read_image(encode(palette, kind, transparency=palette.getpixel((0, 0))), 64)
        assert near(x[:, 8, 8], WHITE) and near(x[:, 8, 56], GREEN)


def test_cmyk_and_grey():
    for mode, color, kind in (("CMYK", RED, "JPEG"), ("L", (76, 76, 76), "JPEG"), ("1", WHITE, "PNG")):
        image = Image.new("RGB", (16, 16), WHITE if mode == "1" else RED).convert(mode)
        assert near(read_image(encode(image, kind), 8)[:, 4, 4], color), mode


def test_16_bit_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        x = read_image(encode(Image.fromarray(np.tile(ramp, (256, 1))), kind), 256)
        assert (x[:, 0].float() - torch.arange(256.0)).abs().max() <= 1, kind
    wide = Image.fromarray(np.full((4, 4), 40_000, np.int32))
    assert near(read_image(encode(wide, "TIFF"), 4)[:, 0, 0], (156, 156, 156), 0)
    with pytest.raises(ImageError, match="32 bits"):
        read_image(encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), 4)
    with pytest.raises(ImageError, match="floating point"):
        read_image(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 4)


def test_16_bit_rgb_png():
    # Pillow writes none, so by hand: one row of 2 pixels, 16 bits a sample.
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">6H", 65535, 0, 32768, 65535, 0, 32768)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert near(read_image(data, 2)[:, 0, 0], (255, 0, 128), 1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), color) for color in (RED, GREEN, BLUE)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(io.BytesIO(data)).n_frames == 3 and near(read_image(data, 8)[:, 4, 4], RED)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif():
    assert near(read_image(encode(corners(), "AVIF", quality=95), 64)[:, 8, 8], RED, 20)


def test_extreme_shapes_give_their_centre():
    assert near(read_image(encode(Image.new("RGB", (1, 1), GREEN), "PNG"), 16), np.array(GREEN)[:, None, None], 0)
    strip = Image.new("RGB", (15_001, 1), RED)
    strip.putpixel((7500, 0), BLUE)
    for image in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        assert near(read_image(encode(image, "PNG"), 9)[:, 4, 4], BLUE, 3)


def test_resize_and_crop_agree_with_torchvision():
    from torchvision.transforms.v2 import functional as F

    for shape in ((60, 90, 3), (360, 120, 3)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        ours = read_image(encode(image, "PNG"), 20)
        theirs = F.resize(F.pil_to_tensor(image), [20], F.InterpolationMode.BICUBIC, antialias=True)
        assert (ours.float() - F.center_crop(theirs, [20, 20]).float()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_and_garbage(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    for part in (data[: len(data) // 2], data[:12], b"", b"not an image" * 50):
        with pytest.raises(ImageError, match="^image 'cat' ") as caught:
            read_image(part, 8, name="cat")
        assert "\n" not in str(caught.value)


def test_size_is_refused_before_decoding(monkeypatch):
    data = encode(Image.new("1", (6000, 6000)), "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="6000x6000 pixels, more than the limit of 16 million"):
        read_image(data, 8)
