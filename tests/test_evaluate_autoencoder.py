"""Evaluating an autoencoder: its numbers are what it gives, its report is complete, mistakes are one line."""

import math
import re
from pathlib import Path

import pytest
import tiny_evaluation
import torch
from tiny_evaluation import fill, one, report, results, stub_extractor, tiny_vae

from ldm.data.shapes import Shapes
from ldm.evaluate.autoencoder import SCALES, Coded, evaluate_autoencoder
from ldm.evaluate.config import AutoencoderEvaluation
from ldm.evaluate.pictures import sample_indices
from ldm.evaluate.report import at_size
from ldm.metrics import frechet_distance, psnr, sharpness
from ldm.model_io import module_hash
from ldm.perceptual import perceptual_network
from ldm.vae import VAE

N = 20
networks = tiny_evaluation.networks


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(vae, networks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("autoencoder") / "out"
    config = AutoencoderEvaluation(autoencoder=str(vae), data="shapes", num=N, features="stub", batch_size=7, out=out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.evaluate.autoencoder.SCENES", 150)
        patch.setattr("ldm.evaluate.autoencoder.FITTED", 32)
        lines = evaluate_autoencoder(config)
    assert lines[0].startswith("psnr db of reconstructions (N=20): ")
    assert any(line.startswith("frechet distance of reconstructions (stub, N=20): ") for line in lines)
    return out


def pixels(split: str, count: int) -> torch.Tensor:
    dataset = Shapes(32, split)
    return torch.stack([dataset[i]["image"] for i in sample_indices(len(dataset), count, 0)])


@torch.no_grad()
def test_its_numbers_are_those_of_its_reconstructions(measured, vae):
    model, x, net = VAE.from_pretrained(vae), pixels("test", N) / 127.5 - 1, stub_extractor()
    posterior = model.encode(x)
    decoded = ((model.decode_raw(posterior.mean).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    value = {r["metric"]: r["value"] for r in results(measured) if r["of"] == "reconstructions"}
    assert value["psnr_db"] == pytest.approx(psnr(x, decoded).mean().item(), abs=1e-3)
    assert value["sharpness"] == pytest.approx(sharpness(x, decoded).mean().item(), abs=1e-3)
    assert value["frechet_distance"] == pytest.approx(frechet_distance(net(decoded), net(x)), rel=1e-3)
    mean, variance = 0.5 * posterior.mean.double(), (0.5 * posterior.std.double()) ** 2  # of the normalized latent
    normal = torch.distributions.Normal(torch.zeros_like(mean), 1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, variance.sqrt()), normal)
    of_latent = kl.sum((1, 2, 3)).mean().item() / (3072 * math.log(2))
    assert of_latent < value["bits_per_dimension"] < 8  # better than knowing nothing
    channels = one(measured, "latent_channels", "latents")["value"]
    assert [c["std"] for c in channels] == pytest.approx(mean.std((0, 2, 3)).tolist(), rel=1e-3)
    assert [c["kl_nats"] for c in channels] == pytest.approx(kl.mean((0, 2, 3)).tolist(), rel=1e-3)
    assert all(0 < c["noise_share"] < 1 for c in channels)
    rates = value["rate_distortion"]
    assert rates["latents, 8 bits"][0][0] == 4 * 8 * 8 and len(rates["JPEG"]) == len(rates["WEBP"]) == 10
    perceptual = one(measured, "perceptual_distance", "reconstructions")
    assert (perceptual["extractor"], perceptual["resize"]) == ("effnet-lite0", "none; sides under 64 px doubled")
    assert perceptual["extractor_sha256"] == module_hash(perceptual_network("effnet-lite0"))


def test_the_scale_of_the_likelihood_comes_from_training_images_alone(measured, vae):
    train = Shapes(32, "train")
    coded = Coded(VAE.from_pretrained(vae), 32, train, sample_indices(len(train), 32, 0))
    chosen = one(measured, "bits_per_dimension", "reconstructions")["scale"]
    costs = {scale: coded.nll(scale).mean().item() for scale in SCALES}
    assert chosen == min(costs, key=costs.get) and min(SCALES) < chosen < max(SCALES)


def test_probes_of_the_latents_have_intervals_and_the_report_is_complete(measured):
    for label in ("colour", "shape", "size", "x", "y"):
        assert one(measured, "linear_probe", "latents", label=label)["classes"] > 1
        for metric in ("linear_probe", "homogeneity", "completeness", "v_measure"):
            record = one(measured, metric, "latents", label=label)
            assert 0 <= record["interval"][0] <= record["value"] <= record["interval"][1] <= 1
    gap = one(measured, "mig", "latents")
    assert 0 <= gap["value"] <= 1 and gap["interval"][0] < gap["value"] < gap["interval"][1]
    assert {f"dci_{key}" for key in ("disentanglement", "completeness", "informativeness")} <= {
        r["metric"] for r in results(measured)
    }
    text = report(measured)
    titles = "Reconstruction|Latents|Rate and distortion|What the latents say|Reconstructions"
    assert {*titles.split("|")} <= set(re.findall(r"<h2[^>]*>(.*?)</h2>", text))
    assert "stub, weights 555555555555" in text and text.count("data:image/png") == 20 * 2


def test_images_that_cannot_be_read_are_left_out_and_judges_features_taken_by_name(vae, tmp_path):
    for split in ("train", "test"):
        fill(tmp_path / "data" / split, 101, len(split), text="noise")
    broken = tmp_path / "data/test/007.png"
    broken.write_bytes(broken.read_bytes()[:600])
    base = {"data": "folder", "data_path": str(tmp_path / "data"), "num": 101, "features": "judge:shapes"}
    evaluate_autoencoder(AutoencoderEvaluation(autoencoder=str(vae), out=tmp_path / "out", **base))
    assert one(tmp_path / "out", "psnr_db", "reconstructions")["n"] == 100
    assert one(tmp_path / "out", "frechet_distance", "reconstructions")["extractor"] == "judge:shapes"
    assert "1 of 101 samples of the data could not be used" in report(tmp_path / "out")


def test_quality_at_as_many_bytes_lies_on_the_line_over_their_logarithm():
    points = [(400.0, 30.0), (100.0, 20.0)]
    assert at_size(points, 200.0) == "25.00" and at_size(points, 100.0) == "20.00"
    assert at_size(points, 99.0) == "none; 20.00 at 100" and at_size(points, 500.0) == "none; 30.00 at 400"
