"""Evaluating an autoencoder alone, and two folders of pictures."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import Tags, run_main, stub, stub_extractor, tiny_pipeline  # noqa: F401 (stub is a fixture)

from ldm.config import UserError
from ldm.data.shapes import Shapes
from ldm.evaluate.autoencoder import AutoencoderEvaluation, evaluate_autoencoder, scales
from ldm.evaluate.features import FeatureCache
from ldm.evaluate.folders import FolderEvaluation, evaluate_folders
from ldm.evaluate.model import sample_indices
from ldm.evaluate.pictures import claim
from ldm.evaluate.records import find
from ldm.evaluate.report_plots import Line, plot, ticks
from ldm.metrics import features, frechet_distance, kernel_distance, precision_recall, psnr, sharpness
from ldm.metrics.judges import ImageTextModel
from ldm.metrics.reconstruction import discretized_logistic
from ldm.vae import VAE

N = 20


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    model = tiny_pipeline().vae
    model.config = replace(model.config, sample_size=32, scaling_factor=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(vae, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("autoencoder") / "out"
    config = AutoencoderEvaluation(autoencoder=str(vae), data="shapes", num=N, features="stub", batch_size=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(features.EXTRACTORS, "stub", lambda where: stub_extractor())
        patch.setattr("ldm.evaluate.latents.SCENES", 300)
        lines = evaluate_autoencoder(config, out, "cpu")
    assert lines[0].startswith("PSNR: ") and any(line.startswith("bits_per_dimension") for line in lines)
    return out


def record(out: Path, metric: str, of: str = "reconstructions", **where) -> dict:
    (found,) = find(json.loads((out / "metrics.json").read_text())["results"], metric, of, **where)
    return found


def held_out() -> torch.Tensor:
    dataset = Shapes(32, "test")
    return torch.stack([dataset[i]["image"] for i in sample_indices(len(dataset), N, 0)])


@torch.no_grad()
def test_an_autoencoders_numbers_are_what_it_gives(measured, vae):
    model, pixels, net = VAE.from_pretrained(vae), held_out(), stub_extractor()
    x = pixels / 127.5 - 1
    posterior = model.encode(x)
    decoded = ((model.decode_raw(posterior.mean).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    assert record(measured, "psnr_db")["value"] == pytest.approx(psnr(x, decoded).mean().item(), abs=1e-3)
    assert record(measured, "sharpness")["value"] == pytest.approx(sharpness(x, decoded).mean().item(), abs=1e-3)
    want = frechet_distance(net(decoded), net(x))
    assert record(measured, "frechet_distance")["value"] == pytest.approx(want, rel=1e-3)
    mean, variance = 0.5 * posterior.mean.double(), (0.5 * posterior.std.double()) ** 2  # of the normalized latent
    kl = 0.5 * (mean**2 + variance - 1 - variance.log()).sum((1, 2, 3))
    latent, rest = record(measured, "bits_of_latent"), record(measured, "bits_of_rest")
    assert latent["value"] == pytest.approx(kl.mean().item() / (3072 * math.log(2)), rel=1e-4)
    total = record(measured, "bits_per_dimension")
    assert total["value"] == pytest.approx(latent["value"] + rest["value"])
    channels = record(measured, "latent_channels", "latents")["value"]
    z = 0.5 * posterior.mean
    assert [c["std"] for c in channels] == pytest.approx(z.std((0, 2, 3)).tolist(), rel=1e-3)
    assert all(0 < c["noise_share"] < 1 for c in channels)


@torch.no_grad()
def test_the_likelihoods_scale_comes_from_training_pictures_alone(measured, vae):
    model, train = VAE.from_pretrained(vae), Shapes(32, "train")
    pixels = torch.stack([train[i]["image"] for i in sample_indices(len(train), 256, 0)])
    posterior = model.encode(pixels / 127.5 - 1)
    # batches of 7, whose generators are seeded by the place in the list
    eps = [torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(i)) for i in range(256)]
    mean = model.decode_raw(posterior.mean + posterior.std * torch.stack(eps))
    costs = {scale: discretized_logistic(pixels, mean, scale).mean().item() for scale in scales()}
    chosen = record(measured, "bits_per_dimension")["scale"]
    assert chosen == min(costs, key=costs.get) and min(scales()) < chosen < max(scales())
    assert record(measured, "bits_per_dimension")["value"] < 8  # better than knowing nothing


def test_the_autoencoders_report_is_whole(measured):
    text = (measured / "report.html").read_text()
    tags = Tags(text)
    assert not tags.open and "http" not in text
    for title in ("Reconstruction", "Latents", "Rate and distortion", "What the latents say", "Furthest off"):
        assert f"<h2>{title}</h2>" in text
    rates = record(measured, "rate_distortion")["value"]
    assert rates["latents, 8 bits"][0][0] == 4 * 8 * 8 and len(rates["JPEG"]) == len(rates["WEBP"]) == 10
    for label in ("colour", "shape", "size", "x", "y"):
        probe = record(measured, "linear_probe", "latents", label=label)
        assert 0 <= probe["value"] <= 1 and probe["classes"] > 1
        for metric in ("linear_probe", "homogeneity", "completeness", "v_measure"):
            found = record(measured, metric, "latents", label=label)
            assert found["interval"][0] <= found["value"] <= found["interval"][1]
    gap = record(measured, "mig", "latents")
    assert 0 <= gap["value"] <= 1 and gap["interval"][0] < gap["value"] < gap["interval"][1]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num": 15}, "16 or more are needed"),
        ({"num": 3000}, "has 2000"),
        ({"split": "train"}, "'test' or 'val'"),
        ({"batch_size": 0}, "1 or more"),
        ({"seed": -1}, "0 or more"),
        ({"size": 8}, "11 to 4000 px, a multiple of 4"),
        ({"size": 33}, "a multiple of 4"),
        ({"features": "magic"}, "effnet-lite0"),
        ({"perceptual": "magic"}, "lpips-vgg"),
        ({"autoencoder": "nowhere"}, "nowhere"),
        ({"data": "nothing"}, "known: shapes"),
    ],
)
def test_an_autoencoder_that_cannot_be_measured_is_one_line(vae, tmp_path, changes, words):
    config = AutoencoderEvaluation(autoencoder=str(vae), data="shapes", features="stub")
    with pytest.raises(UserError, match=words) as error:
        evaluate_autoencoder(replace(config, **changes), tmp_path / "out", "cpu")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_judges_own_features_are_taken_by_name(vae, tmp_path):
    config = AutoencoderEvaluation(autoencoder=str(vae), data="shapes", num=N, features="judge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.evaluate.latents.SCENES", 150)
        evaluate_autoencoder(config, tmp_path, "cpu")
    found = record(tmp_path, "frechet_distance")
    assert found["extractor"] == "judge:shapes" and found["dimensions"] == 96 and found["biased"]


def test_a_folder_holds_one_kind_of_evaluation(measured, vae, tmp_path):
    config = AutoencoderEvaluation(autoencoder=str(vae), data="shapes", num=N, features="none", seed=1)
    before = (measured / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="seed 0, not 1; use another --out"):
        evaluate_autoencoder(config, measured, "cpu")
    with pytest.raises(UserError, match="model_sha256 None"):
        claim(measured, {"model_sha256": "1" * 64})
    assert (measured / "metrics.json").read_bytes() == before


def fill(folder: Path, count: int, seed: int, size: int = 24, captions: bool = False) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
        if captions:
            (folder / f"{i:03d}.txt").write_text(f"noise {i}")
    return folder


@torch.no_grad()
def test_two_folders_are_scored_as_their_pictures_are(tmp_path):
    a, b, net = fill(tmp_path / "a", 20, 0, captions=True), fill(tmp_path / "b", 18, 1), stub_extractor()
    config = FolderEvaluation(images=a, reference=b, features="stub")
    lines = evaluate_folders(config, tmp_path / "out", "cpu")
    x, y = (torch.stack([read(p) for p in sorted(folder.glob("*.png"))]) for folder in (a, b))
    want = frechet_distance(net(x), net(y))
    assert record(tmp_path / "out", "frechet_distance", "images")["value"] == pytest.approx(want, rel=1e-4)
    assert any(line.startswith("frechet_distance (stub, N=18): ") for line in lines)
    near = record(tmp_path / "out", "kernel_distance", "images")
    want = kernel_distance(net(x), net(y), 1, 18)[0]  # of subsets in another order, hence about
    assert near["value"] == pytest.approx(want, abs=0.5 * near["deviation"]) and near["subset_size"] == 9
    assert (near["n_images"], near["n_reference"], near["extractor"]) == (20, 18, "stub")
    for name, value in precision_recall(net(y), net(x)).items():
        assert record(tmp_path / "out", name, "images")["value"] == pytest.approx(value)
    text = (tmp_path / "out/report.html").read_text()
    assert not Tags(text).open and text.count("data:image/png") == 38


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) / 127.5 - 1


def test_folders_with_captions_and_a_judge_are_scored_for_alignment(tmp_path, monkeypatch):
    images = lambda x: torch.nn.functional.normalize(x.flatten(1), dim=1)  # noqa: E731

    def texts(captions: list[str]) -> torch.Tensor:
        rng = np.random.default_rng(0)  # the pictures, in order
        all_ = [read_array(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(20)]
        return images(torch.stack([all_[int(c.split()[1])] for c in captions]))

    reads = ImageTextModel("reads", torch.nn.Identity(), 24, images, texts)
    monkeypatch.setattr("ldm.evaluate.folders.image_text_model", lambda name: reads)
    a, b = fill(tmp_path / "a", 20, 0, captions=True), fill(tmp_path / "b", 20, 1)
    config = FolderEvaluation(images=a, reference=b, features="none", judge="reads")
    evaluate_folders(config, tmp_path / "out", "cpu")
    assert record(tmp_path / "out", "clip_cosine", "images")["value"] == pytest.approx(1, abs=1e-5)
    assert record(tmp_path / "out", "image_to_text@1", "images")["value"] == 1
    assert record(tmp_path / "out", "cmmd", "images")["value"] > 0
    (a / "003.txt").unlink()
    with pytest.raises(UserError, match="1 of 20 --images have no caption"):
        evaluate_folders(config, tmp_path / "out", "cpu")


def read_array(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def test_pictures_that_cannot_be_compared_are_one_line(tmp_path, monkeypatch, capsys):
    a, b = fill(tmp_path / "a", 16, 0), fill(tmp_path / "b", 16, 1)

    def complaint(*changes: str) -> str:
        with pytest.raises(SystemExit) as stop:
            run_main(monkeypatch, "--images", str(a), "--reference", str(b), "--out", str(tmp_path / "out"), *changes)
        error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
        assert stop.value.code == 2 and error.startswith("error: ") and not (tmp_path / "out").exists()
        return error

    assert "16 pictures are too few for a Frechet distance of 1280 features; 1281" in complaint()
    assert "does not exist" in complaint("--reference", str(tmp_path / "c"))
    few = fill(tmp_path / "few", 15, 0)
    assert "15 pictures, too few" in complaint("--reference", str(few))
    Image.new("RGB", (30, 24)).save(b / "007.png")
    assert "007.png' is 30x24 px, not 24x24" in complaint("--features", "stub")
    (b / "007.png").write_bytes(b"no picture")
    assert "007.png' cannot be read" in complaint("--features", "stub")
    assert "007.png" in complaint("--features", "stub", "--size", "16")
    assert "--size -5 is not allowed" in complaint("--size", "-5")
    assert "--num has no meaning with --images" in complaint("--num", "20")


def test_folders_of_other_sizes_are_resized_on_request_and_blank_ones_counted(tmp_path):
    a, b = fill(tmp_path / "a", 16, 0), fill(tmp_path / "b", 16, 1, size=40)
    Image.new("RGB", (24, 24), "red").save(a / "003.png")
    config = FolderEvaluation(images=a, reference=b, size=32, features="stub", without_frechet=True)
    evaluate_folders(config, tmp_path / "out", "cpu")
    assert record(tmp_path / "out", "blank_pictures", "images")["value"] == 1
    results = json.loads((tmp_path / "out/metrics.json").read_text())["results"]
    assert not any(r["metric"].startswith("frechet") for r in results)
    assert "count in every number: 1 of 16 images." in (tmp_path / "out/report.html").read_text()


def test_features_are_kept_by_the_pictures_own_pixels(tmp_path):
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x.mean((2, 3))

    def cache() -> FeatureCache:
        return FeatureCache(tmp_path, "net/work:1", "5" * 64, network, torch.device("cpu"))

    pixels = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    for size in (1, 7, 10):
        first = cache()(pixels.split(size).__getitem__, -(-10 // size), "")
        assert torch.allclose(first, (pixels / 127.5 - 1).mean((2, 3)), atol=1e-6)
    assert sum(seen) == 10  # once each
    pixels[4] = 0
    again = cache()(pixels.split(5).__getitem__, 2, "")
    assert sum(seen) == 11 and torch.allclose(again[4], torch.full((3,), -1.0))
    (file,) = tmp_path.iterdir()
    assert file.name == "net-work-1-55555555.safetensors"
    file.write_bytes(b"damaged")
    assert torch.equal(cache()(pixels.split(5).__getitem__, 2, ""), again) and sum(seen) == 21


@pytest.mark.parametrize("low, high", [(0, 1), (0, 201.1), (-0.013, 0.02), (49.8, 57.9), (3, 3), (0, 0), (8.9, 9.1)])
def test_ticks_are_short_and_hold_all(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    assert all(len(f"{value:.4g}") <= 7 for value in found) and np.allclose(np.diff(found), found[1] - found[0])


def test_every_line_of_a_plot_is_drawn_however_many_there_are():
    lines = [Line(name=f"line {i}", points=[(0, i), (1, i + 1)]) for i in range(5)]
    drawn = plot("title", "x", lines)
    assert drawn.count("<polyline") == 5 and all(f"line {i}<" in drawn for i in range(5))
