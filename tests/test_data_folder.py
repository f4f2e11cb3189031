import io
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import UserError
from ldm.data import DataConfig, flip_half, open_dataset
from ldm.data.folder import Folder
from ldm.data.splits import assign, caption_group, position, split_of
from ldm.images import ImageError, read_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(size=64):
    """Red top left, green top right, blue bottom left, white bottom right."""
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1, 0], pixels[1, 1] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)


def picture(folder, name, color=RED):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)
    return path


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
    names = [Image.Transpose(i) for i in range(7)]
    stored = upright if orientation == 1 else upright.transpose(names[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
    ):
        x = read_image(encode(stored, kind, exif=exif, **options), 64)
        found = [x[:, 8, 8], x[:, 8, 56], x[:, 56, 8], x[:, 56, 56]]
        assert all(near(f, c) for f, c in zip(found, (RED, GREEN, BLUE, WHITE), strict=True)), kind


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_spoils_only_the_orientation():
    data = encode(corners(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert read_image(data, 16).shape == (3, 16, 16)


def test_alpha_lies_on_white():
    half = Image.new("RGBA", (8, 8), (0, 0, 255, 128))
    assert near(read_image(encode(half, "PNG"), 8)[:, 4, 4], (127, 127, 255), 1)
    hidden = Image.new("RGBA", (64, 64), (255, 0, 0, 0))  # red under full transparency must not bleed in
    hidden.paste((0, 0, 255, 255), (0, 0, 32, 64))
    x = read_image(encode(hidden, "PNG"), 16)
    assert near(x[:, 8, 12], WHITE, 0) and (x[2] == 255).all()
    la = read_image(encode(Image.new("LA", (8, 8), (0, 128)), "PNG"), 8)
    assert near(la[:, 0, 0], (127, 127, 127), 1)


def test_palette_with_and_without_transparency():
    palette = corners().convert("P", palette=Image.Palette.ADAPTIVE)
    assert near(read_image(encode(palette, "PNG"), 64)[:, 8, 8], RED)
    clear = palette.getpixel((0, 0))
    for kind in ("PNG", "GIF"):
        x = read_image(encode(palette, kind, transparency=clear), 64)
        assert near(x[:, 8, 8], WHITE) and near(x[:, 8, 56], GREEN)


def test_cmyk_and_grey():
    for name, color in (("CMYK", RED), ("L", (76, 76, 76)), ("1", WHITE)):
        image = Image.new("RGB", (16, 16), WHITE if name == "1" else RED).convert(name)
        x = read_image(encode(image, "PNG" if name == "1" else "JPEG", **({} if name == "1" else {"quality": 95})), 8)
        assert near(x[:, 4, 4], color), name


def test_16_bit_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    image = Image.fromarray(np.tile(ramp, (256, 1)))
    assert image.mode.startswith("I;16")
    for kind in ("PNG", "TIFF"):
        x = read_image(encode(image, kind), 256)
        assert (x[:, 0].float() - torch.arange(256.0)).abs().max() <= 1, kind
    wide = Image.fromarray(np.full((4, 4), 40_000, np.int32))
    assert near(read_image(encode(wide, "TIFF"), 4)[:, 0, 0], (156, 156, 156), 0)
    with pytest.raises(ImageError, match="32 bits"):
        read_image(encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), 4)


def test_16_bit_rgb_png():
    # Pillow writes none, so by hand: one row of 2 pixels, 16 bits a sample.
    import zlib

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
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert near(read_image(data, 8)[:, 4, 4], RED)


def test_one_pixel_and_extreme_shapes():
    assert near(read_image(encode(Image.new("RGB", (1, 1), GREEN), "PNG"), 16), np.array(GREEN)[:, None, None], 0)
    strip = Image.new("RGB", (15_001, 1), RED)
    strip.putpixel((7500, 0), BLUE)
    for image in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        assert near(read_image(encode(image, "PNG"), 9)[:, 4, 4], BLUE, 3)  # the one blue pixel is the centre


def test_resize_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    x = read_image(encode(Image.fromarray(stripes), "PNG"), 32).float()
    assert (x[:, :, 2:-2] - 127.5).abs().max() < 4  # without antialias: 0 or 255


def test_resize_and_crop_agree_with_torchvision():
    from torchvision.transforms.v2 import functional as F

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
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


def test_flip_mirrors_half_of_the_pictures_left_to_right():
    torch.manual_seed(0)
    x = read_image(encode(corners(), "PNG"), 64)
    flipped = flip_half(x.repeat(256, 1, 1, 1))
    mirrored = torch.tensor([torch.equal(y, x.flip(-1)) for y in flipped])
    assert near(x.flip(-1)[:, 8, 8], GREEN) and 96 < mirrored.sum() < 160
    assert all(torch.equal(y, x) for y in flipped[~mirrored])


def test_metadata_and_text_files(tmp_path):
    picture(tmp_path, "a.png")
    picture(tmp_path, "sub/b.jpg", BLUE)
    picture(tmp_path, "c.png", GREEN)
    picture(tmp_path, ".hidden/d.png")
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "sub/b.jpg", "text": [" two ", "", "три"]}]
    lines.append({"file_name": "a.png", "text": ["one", "uno"]})
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfthree\r\n\r\n  drei \r\n")
    folder = Folder(tmp_path, 8, val=0, test=0)
    samples = {sample["key"]: sample for sample in (folder[i] for i in range(len(folder)))}
    assert {key: sample["captions"] for key, sample in samples.items()} == {
        "a.png": ["one", "uno"],
        "c.png": ["three", "drei"],
        "sub/b.jpg": ["two", "три"],
    }
    assert near(samples["sub/b.jpg"]["image"][:, 4, 4], BLUE)
    assert [folder.captions(i) for i in range(3)] == [folder[i]["captions"] for i in range(3)]


def test_sub_folders_are_the_splits(tmp_path):
    for name in ("train", "test"):
        picture(tmp_path / name, "a.png").with_suffix(".txt").write_text(f"of {name}")
    assert Folder(tmp_path, 8, "train")[0]["key"] == "train/a.png"
    assert Folder(tmp_path, 8, "test")[0]["captions"] == ["of test"]
    with pytest.raises(UserError, match="sub-folders train, test but no 'val'"):
        Folder(tmp_path, 8, "val")


def test_hash_split_is_disjoint_and_leaks_no_caption(tmp_path):
    for i in range(60):
        picture(tmp_path, f"{i:02d}.png").with_suffix(".txt").write_text(f"caption {i // 2}\nshared")
    parts = {name: Folder(tmp_path, 8, name, seed=3, val=0.2, test=0.3) for name in ("train", "val", "test")}
    keys = {name: {key for key, _ in part.samples} for name, part in parts.items()}
    assert sum(map(len, keys.values())) == 60 == len(set.union(*keys.values()))
    first = {name: {captions[0] for _, captions in part.samples} for name, part in parts.items()}
    assert not first["train"] & first["test"] and not first["train"] & first["val"]
    again = Folder(tmp_path, 8, "test", seed=3, val=0.2, test=0.3)
    assert again.samples == parts["test"].samples
    assert Folder(tmp_path, 8, "test", seed=4, val=0.2, test=0.3).samples != parts["test"].samples


def test_split_shares_and_stability():
    keys = [f"key {i}" for i in range(20_000)]
    splits = [split_of(key, 0, 0.02, 0.08) for key in keys]
    assert abs(splits.count("test") / 20_000 - 0.08) < 0.008
    assert abs(splits.count("val") / 20_000 - 0.02) < 0.004
    assert assign(keys[:5000], 0, 0.02, 0.08) == splits[:5000]
    assert position("key 0", 0) == position("key 0", 0) != position("key 0", 1)
    assert caption_group(["A  cat", "dog"]) == caption_group(["dog", "a cat", "Dog "])


@pytest.mark.parametrize("count", range(3, 9))
def test_small_sets_have_every_split(count):
    for seed in range(20):
        found = assign([f"{i}" for i in range(count)], seed, 0.02, 0.08)
        assert set(found) == {"train", "val", "test"}
        assert set(assign([f"{i}" for i in range(count)], seed, 0.0, 0.08)) == {"train", "test"}


def faulty(tmp_path, name):
    """Makes one kind of bad folder and gives what the message must say."""
    picture(tmp_path, "good.png")
    metadata, good = tmp_path / "metadata.jsonl", '{"file_name": "good.png", "text": "x"}\n'
    lines = {
        "missing file": (
            '{"file_name": "gone.png", "text": "x"}',
            "line 2 names 'gone.png', which does not exist",
        ),
        "broken json": ('{"file_name": ', "line 2 is not valid JSON"),
        "deep json": ("[" * 100_000, "line 2 is not valid JSON"),
        "no object": ("[1]", "line 2 must be a JSON object"),
        "escape": ('{"file_name": "../good.png", "text": "x"}', "outside the folder"),
        "absolute": ('{"file_name": "/etc/passwd", "text": "x"}', "outside the folder"),
        "nul": ('{"file_name": "good.png\\u0000", "text": "x"}', "outside the folder"),
        "long name": (json.dumps({"file_name": "n" * 5000, "text": "x"}), "does not exist"),
        "no name": ('{"text": "x"}', "line 2 has no 'file_name'"),
        "no text": ('{"file_name": "good.png"}', "line 2 has no 'text'"),
        "empty text": ('{"file_name": "good.png", "text": [" "]}', "line 2 has no caption"),
        "text type": ('{"file_name": "good.png", "text": 3}', "must be a string or a list of strings"),
    }
    metadata.write_text(good + lines[name][0])
    return lines[name][1]


@pytest.mark.parametrize(
    "name",
    [
        "missing file",
        "broken json",
        "deep json",
        "no object",
        "escape",
        "absolute",
        "nul",
        "long name",
        "no name",
        "no text",
        "empty text",
        "text type",
    ],
)
def test_bad_metadata(tmp_path, name):
    message = faulty(tmp_path, name)
    with pytest.raises(UserError) as caught:
        Folder(tmp_path, 8)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Folder(tmp_path / "gone", 8)
    with pytest.raises(UserError, match="no pictures"):
        Folder(tmp_path, 8)
    with pytest.raises(UserError, match="unknown split 'dev'; allowed: train, val, test"):
        Folder(tmp_path, 8, "dev")
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path, name)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match="b.png' has no caption; write 'b.txt' .*2 of 3 samples cannot"):
        Folder(tmp_path, 8)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"b.txt' is not UTF-8"):
        Folder(tmp_path, 8)


def test_unreadable_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    (tmp_path / "a.txt").write_text("a cap\0tion")
    folder = Folder(tmp_path, 8, val=0, test=0)
    with pytest.raises(UserError, match=r"a\.png' .*; repair or remove it"):
        folder[0]
    with pytest.raises(UserError, match="split 'test' of .* is empty"):
        Folder(tmp_path, 8, "test", val=0, test=0)


def test_an_autoencoder_needs_no_captions(tmp_path):
    for i in range(40):
        Image.new("RGB", (8, 8), (6 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.txt").write_text("a dark red square")
    config = DataConfig(name="folder", path=str(tmp_path), size=8)
    splits = {split: open_dataset(config, split, need_captions=False) for split in ("train", "val", "test")}
    keys = [sample["key"] for data in splits.values() for sample in (data[i] for i in range(len(data)))]
    assert sorted(keys) == sorted(f"{i}.png" for i in range(40)) and all(len(data) for data in splits.values())
    captions = {data[i]["key"]: data[i]["captions"] for data in splits.values() for i in range(len(data))}
    assert captions.pop("3.png") == ["a dark red square"] and not any(captions.values())
    with pytest.raises(UserError, match="0.png' has no caption.*39 of 40 samples cannot be used"):
        open_dataset(config, "train")
