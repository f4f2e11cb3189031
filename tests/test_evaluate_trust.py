"""What an evaluation says of itself: its failures, floors and intervals, what it compares with, and what it refuses."""

import json
import math
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import (  # noqa: F401 (fixtures)
    GUIDANCE,
    KnowsAll,
    N,
    arrays,
    config_for,
    copy_of,
    done,
    model,
    one,
    prompts_made,
    results_of,
    stub,
    stub_extractor,
)
from test_evaluate_more import fill, record, vae  # noqa: F401 (a fixture)

from ldm.config import UserError
from ldm.evaluate.autoencoder import AutoencoderEvaluation, evaluate_autoencoder
from ldm.evaluate.coded import Coded, kl_nats
from ldm.evaluate.folders import FolderEvaluation, evaluate_folders
from ldm.evaluate.measure import knows_little
from ldm.evaluate.model import evaluate, pose
from ldm.evaluate.pictures import PictureSet, generate
from ldm.evaluate.records import SHUFFLED, best_guidance, cmmd_record, find, frechet_records
from ldm.evaluate.report import OF_INCEPTION, ROWS, called, write_report
from ldm.evaluate.report_autoencoder import _at
from ldm.metrics import cmmd
from ldm.metrics.codecs import encoded, nearest_to
from ldm.metrics.compositional import TASKS, check, halves, tally
from ldm.metrics.features import judged_by
from ldm.metrics.judges import ImageTextModel
from ldm.model_io import module_hash
from ldm.pipeline import Pipeline


def broken_png(path: Path) -> None:
    """One whose header is right and whose pixels are not."""
    data = bytearray(path.read_bytes())
    place = data.index(b"IDAT")
    data[place + 8 : place + 24] = bytes(16)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("folder", ["pictures", "cases"])
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda path: Image.new("RGB", (48, 32)).save(path), "is 48x32 px, not 32x32"),
        (broken_png, "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read"),
    ],
)
def test_a_kept_picture_that_is_not_what_was_made_is_one_line(done, model, tmp_path, folder, spoil, words):  # noqa: F811
    out = copy_of(done, tmp_path)
    spoil(out / folder / "g1/00002.png")
    with pytest.raises(UserError, match=f"00002.png' {words}; delete it, and the same command remakes it") as error:
        evaluate(config_for(model), out, "cpu")
    assert "\n" not in str(error.value)
    assert (out / "metrics.json").read_bytes() == (done / "metrics.json").read_bytes()


def test_a_stop_while_captions_are_written_leaves_none_or_all(done, model, tmp_path, monkeypatch):  # noqa: F811
    out = copy_of(done, tmp_path)
    shutil.rmtree(out / "pictures/g2")
    write = Path.write_text

    def stopped(self: Path, text: str, *args, **options):
        if "metadata.jsonl" not in self.name:
            return write(self, text, *args, **options)
        write(self, text[:100], *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config_for(model), out, "cpu")
    evaluate(config_for(model), out, "cpu")
    assert not [r for r in results_of(out) if r["metric"] == "frechet_distance" and r["value"] is None]
    same = (out / "pictures/g2/metadata.jsonl").read_bytes()
    assert same == (done / "pictures/g2/metadata.jsonl").read_bytes()


def noise_data(root: Path, broken: bool = True) -> Path:
    """Folders train and test of 101 captioned pictures; of the test ones one cannot be read and one is blank."""
    for split in ("train", "test"):
        fill(root / split, 101, len(split), captions=True)
    if broken:
        (root / "test/007.png").write_bytes(b"no picture")
    Image.new("RGB", (24, 24), "red").save(root / "test/009.png")
    return root


def test_what_cannot_be_read_or_is_blank_is_counted_and_said(model, tmp_path):  # noqa: F811
    data = noise_data(tmp_path / "data")
    config = config_for(model, data="folder", data_path=str(data), guidance=(1.0,), judge="", num=101)
    lines = evaluate(config, tmp_path / "out", "cpu")
    left = one(tmp_path / "out", "left_out", "data")
    assert (left["value"], left["n"]) == (1, 101) and "007.png" in left["note"]
    blank = one(tmp_path / "out", "blank_pictures", "real held-out")
    assert (blank["value"], blank["n"]) == (1, 100)
    assert one(tmp_path / "out", "frechet_distance", "samples")["n"] == 100
    text = (tmp_path / "out/report.html").read_text()
    assert "1 of 101 samples of the data could not be used, the first: " in text and "007.png" in text
    assert "count in every number: 1 of 100 real held-out." in text
    assert "left out: 1 of 101 data" in lines and "blank pictures: 1 of 100 real held-out" in lines


def test_an_autoencoder_is_not_shown_another_picture_for_one_that_cannot_be_read(vae, tmp_path):  # noqa: F811
    config = AutoencoderEvaluation(
        autoencoder=str(vae), data="folder", data_path=str(noise_data(tmp_path / "data")), num=101, features="none"
    )
    evaluate_autoencoder(config, tmp_path / "out", "cpu")
    assert (
        record(tmp_path / "out", "psnr_db")["n"] == 100 and record(tmp_path / "out", "left_out", "data")["value"] == 1
    )
    assert record(tmp_path / "out", "blank_pictures", "real held-out")["value"] == 1
    text = (tmp_path / "out/report.html").read_text()
    assert "1 of 101 samples of the data could not be used" in text and "1 of 100 real held-out" in text
    assert '"num": 100' in (tmp_path / "out/metrics.json").read_text()


def test_the_exact_checker_stands_between_floor_and_ceiling(done):  # noqa: F811
    posed, best = pose(N, 0), best_guidance(results_of(done))
    pictures = arrays(done, "untrained", "g1")
    right = [check(x, case.required) for x, case in zip(pictures, posed, strict=False)]
    assert one(done, "compositional_score", "untrained")["value"] == tally(right, posed)
    assert one(done, "compositional_score", SHUFFLED, guidance=best)["n"] == len(posed)
    for of in ("real held-out", "reconstructions", "samples"):
        for found in find(results_of(done), "scene_accuracy", of):
            for aspect, value in found["value"].items():
                assert found["interval"][aspect][0] <= value <= found["interval"][aspect][1]
    assert "shows exactly what is asked for, %" in (done / "report.html").read_text()


def test_every_task_has_its_interval(done):  # noqa: F811
    found = one(done, "compositional_score", "samples", guidance=2.0)
    assert found["intervals"].keys() == found["value"].keys() == {*TASKS, "mean"}
    assert found["interval"] == found["intervals"]["mean"]["all"]
    for task, own in found["intervals"].items():
        for half, (low, high) in own.items():
            assert low <= found["value"][task][half] <= high


def test_halves_are_the_cases_of_each_kind():
    posed = pose(48, 0)
    right = [i % 3 == 0 for i in range(len(posed))]
    found = halves(right, posed)
    assert len(found["mean"]["all"]) == 48 and sum(found["mean"]["all"]) == 16
    assert all(len(found[task][half]) == 4 for task in TASKS for half in ("seen", "held_out"))
    kinds = [(case.task, case.held_out) for case in posed]
    want = [ok for ok, kind in zip(right, kinds, strict=True) if kind == ("position", True)]
    assert found["position"]["held_out"] == want


def test_single_pictures_are_kept_for_paired_tests_and_for_copies(done):  # noqa: F811
    for g in GUIDANCE:
        found = one(done, "clip_cosine", "samples", guidance=g)
        assert len(found["each"]) == N and np.mean(found["each"]) == pytest.approx(found["value"], abs=1e-6)
    copies = one(done, "memorized", "samples", guidance=best_guidance(results_of(done)))
    assert len(copies["nearest"]) == len(copies["distances"]) == N
    assert sorted(copies["distances"])[0] == pytest.approx(copies["quantiles"][0])
    low, high = copies["nearer_interval"]
    assert low <= copies["nearer_than_any"] <= high


def test_memory_and_time_are_a_pictures(done):  # noqa: F811
    found = one(done, "memory_per_picture_bytes", "samples")
    assert found["peak"] > 50 * 2**20
    assert found["value"] is None or 0 <= found["value"] < found["peak"]
    assert one(done, "seconds_per_picture", "samples")["value"] > 0
    text = (done / "report.html").read_text()
    assert "memory a picture" in text and "2 steps" in text


def test_only_inceptions_distances_are_called_fid(done, tmp_path):  # noqa: F811
    table = json.loads((done / "metrics.json").read_text())
    settings, results = table["settings"], table["results"]
    text = re.sub('base64,[^"]+', "", (done / "report.html").read_text())
    assert "KID" not in text and "<td>FID" not in text and "It is not FID" in text
    as_inception = [r | {"extractor": "inception"} if r.get("extractor") == "stub" else r for r in results]
    write_report(tmp_path / "report.html", settings, as_inception, [])
    text = (tmp_path / "report.html").read_text()
    assert "<td>FID</td>" in text and "<td>KID x 1000</td>" in text and "FID, N = 16" in text
    assert all(called("own", {"metric": metric}) == "own" for metric, *_ in ROWS)
    assert OF_INCEPTION.keys() < {metric for metric, *_ in ROWS}


def test_too_few_pictures_for_the_features_say_what_is_needed_and_what_else(model, tmp_path, monkeypatch):  # noqa: F811
    from ldm.metrics import features

    wide = stub_extractor()
    wide.network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten())  # 27 features
    monkeypatch.setitem(features.EXTRACTORS, "stub", lambda where: wide)
    evaluate(config_for(model, guidance=(1.0,)), tmp_path / "out", "cpu")
    found = one(tmp_path / "out", "frechet_distance", "samples")
    assert found["biased"] and "needs 28 pictures on both sides" in found["note"]
    text = (tmp_path / "out/report.html").read_text()
    assert "needs 28 pictures on both sides" in text and "The kernel distance and CMMD need no more" in text


@pytest.mark.parametrize(
    "features, judge, want",
    [
        ("effnet-lite0", "none", "effnet-lite0"),
        ("judge", "shapes", "judge:shapes"),
        ("judge", "judge:shapes", "judge:shapes"),
        ("judge", "clip:folder", "clip:folder"),
        ("judge:other", "none", "judge:other"),
    ],
)
def test_the_evaluations_own_judge_gives_its_features(features, judge, want):
    assert judged_by(features, judge) == want


def test_features_of_no_judge_are_refused(model, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="there is none"):
        evaluate(config_for(model, features="judge", judge="none"), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_a_baseline_of_another_resize_is_refused_before_any_work(done, model, tmp_path, prompts_made):  # noqa: F811
    other = copy_of(done, tmp_path)
    file = other / "metrics.json"
    file.write_text(file.read_text().replace("32 px, bicubic, antialiased", "32 px, nearest"))
    with pytest.raises(UserError, match="resized to 32 px, nearest, here to 32 px, bicubic, antialiased"):
        evaluate(config_for(model, baseline=str(other)), tmp_path / "new", "cpu")
    assert not prompts_made and not (tmp_path / "new").exists()


def test_folders_do_not_overwrite_an_evaluation_of_a_model(done, tmp_path):  # noqa: F811
    out = copy_of(done, tmp_path)
    a, b = fill(tmp_path / "a", 16, 0), fill(tmp_path / "b", 16, 1)
    config = FolderEvaluation(images=a, reference=b, features="stub")
    with pytest.raises(UserError, match="use another --out"):
        evaluate_folders(config, out, "cpu")
    assert (out / "metrics.json").read_bytes() == (done / "metrics.json").read_bytes()
    evaluate_folders(config, tmp_path / "new", "cpu")
    before = (tmp_path / "new/metrics.json").read_bytes()
    evaluate_folders(config, tmp_path / "new", "cpu")  # the same again
    assert (tmp_path / "new/metrics.json").read_bytes() == before
    with pytest.raises(UserError, match="seed 0, not 1"):
        evaluate_folders(replace(config, seed=1), tmp_path / "new", "cpu")


def knows(pictures: dict[str, torch.Tensor]) -> ImageTextModel:
    """A judge that has seen the pictures that captions name."""
    images = lambda x: torch.nn.functional.normalize(x.flatten(1), dim=1)  # noqa: E731
    texts = lambda captions: images(torch.stack([pictures[c] for c in captions]))  # noqa: E731
    return ImageTextModel("knows", torch.nn.Identity(), 24, images, texts)


def test_the_references_own_alignment_stands_beside_the_images(tmp_path, monkeypatch):
    a, b = (fill(tmp_path / name, 20, seed, captions=True) for seed, name in enumerate("ab"))
    read = lambda path: torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) / 127.5 - 1  # noqa: E731
    for folder in (a, b):
        for file in folder.glob("*.txt"):
            file.write_text(f"{folder.name} {file.stem}")
    seen = {f"{path.parent.name} {path.stem}": read(path) for path in [*a.glob("*.png"), *b.glob("*.png")]}
    monkeypatch.setattr("ldm.evaluate.folders.image_text_model", lambda name: knows(seen))
    config = FolderEvaluation(images=a, reference=b, features="none", judge="knows")
    evaluate_folders(config, tmp_path / "out", "cpu")
    for of in ("images", "reference"):
        assert record(tmp_path / "out", "clip_cosine", of)["value"] == pytest.approx(1, abs=1e-5)
    one_picture = {name: read(a / "000.png") for name in seen}
    monkeypatch.setattr("ldm.evaluate.folders.image_text_model", lambda name: knows(one_picture))
    with pytest.warns(UserWarning, match="right one of 20 reference pictures .* 25.0% needed"):
        evaluate_folders(config, tmp_path / "other", "cpu")


def test_captions_that_are_missing_are_said_before_any_work(tmp_path, monkeypatch):
    a, b = fill(tmp_path / "a", 20, 0, captions=True), fill(tmp_path / "b", 20, 1)
    (a / "003.txt").unlink()
    config = FolderEvaluation(images=a, reference=b, features="stub", judge="shapes")
    with pytest.raises(UserError, match="1 of 20 --images have no caption, '003.png' for one"):
        evaluate_folders(config, tmp_path / "out", "cpu")
    with pytest.raises(UserError, match="1 of 20 --reference have no caption, '003.png' for one"):
        evaluate_folders(replace(config, images=b, reference=a), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()
    for file in a.glob("*.txt"):
        file.unlink()
    monkeypatch.setattr("ldm.evaluate.folders.image_text_model", lambda name: knows({}))
    evaluate_folders(config, tmp_path / "out", "cpu")
    assert "The images have no captions" in (tmp_path / "out/report.html").read_text()


def test_a_judge_beats_chance_by_far_or_little_is_known():
    base = {"extractor": "net", "n": 480, "of": "real held-out"}
    assert knows_little(base | {"value": 0.7, "chance": 1 / 480}) == ""
    assert "0.3% (chance 0.2%, 10.0% needed)" in knows_little(base | {"value": 0.003, "chance": 1 / 480})
    assert "50.0% needed" in knows_little(base | {"value": 0.4, "chance": 0.2})


def test_a_perceptual_distance_says_which_weights_and_resize(vae, tmp_path):  # noqa: F811
    from ldm.perceptual import perceptual_network

    config = AutoencoderEvaluation(autoencoder=str(vae), data="shapes", num=16, features="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.evaluate.autoencoder.find_spec", lambda name: None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluate_autoencoder(config, tmp_path / "out", "cpu")
    found = record(tmp_path / "out", "perceptual_distance")
    assert (found["extractor"], found["n"]) == ("effnet-lite0", 16)
    assert found["extractor_sha256"] == module_hash(perceptual_network("effnet-lite0"))
    assert found["resize"] == "none; sides under 64 px doubled"
    text = (tmp_path / "out/report.html").read_text()
    assert "<h2>Beside JPEG and WebP</h2>" in text and "JPEG of as many bytes" in text


@pytest.mark.parametrize("codec", ["JPEG", "WEBP"])
def test_a_codec_takes_as_many_bytes_as_it_may_or_the_fewest_it_can(codec):
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 48, 48), dtype=np.uint8))
    sizes = [encoded(pixels.permute(1, 2, 0).numpy(), codec, quality)[0] for quality in range(1, 101)]
    middle = sorted(sizes)[50]
    used, decoded = nearest_to(pixels, codec, middle)
    assert used == max(size for size in sizes if size <= middle) and decoded.shape == (3, 48, 48)
    assert nearest_to(pixels, codec, 1)[0] == min(sizes)


def test_quality_at_as_many_bytes_lies_on_the_line_over_their_logarithm():
    points = [(400.0, 30.0), (100.0, 20.0)]
    assert _at(points, 200.0) == "25.00" and _at(points, 100.0) == "20.00"
    assert _at(points, 99.0) == "none; 20.00 at 100" and _at(points, 500.0) == "none; 30.00 at 400"


def test_nats_of_a_latent_are_the_vector():
    half = torch.full((2, 1, 1, 1), 0.5)
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    coded = Coded(pixels=pixels, mean=half, std=half, decoded=pixels, sampled=pixels, nll={})
    assert kl_nats(coded).flatten().tolist() == pytest.approx([0.44314718056] * 2, abs=1e-10)
    assert kl_nats(replace(coded, mean=0 * half, std=2 * half)).abs().max() < 1e-12
    assert math.isclose(kl_nats(replace(coded, std=2 * half))[0].item(), 0.125)


def test_a_refused_judge_leaves_nothing_behind(model, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(KnowsAll, "texts", lambda self, captions: torch.ones(len(captions), 192))
    with pytest.raises(UserError, match="cannot judge these"):
        evaluate(config_for(model), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_folders_of_which_nothing_is_measured_are_refused(tmp_path):
    a, b = fill(tmp_path / "a", 16, 0), fill(tmp_path / "b", 16, 1)
    with pytest.raises(UserError, match="nothing is measured"):
        evaluate_folders(FolderEvaluation(images=a, reference=b, features="none"), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_the_same_seed_gives_the_same_numbers_and_another_others(done, model, tmp_path):  # noqa: F811
    cost = ("seconds_per_picture", "memory_per_picture_bytes")
    numbers = lambda out: [r for r in results_of(out) if r["metric"] not in cost]  # noqa: E731
    evaluate(config_for(model), tmp_path / "again", "cpu")
    assert numbers(tmp_path / "again") == numbers(done)
    evaluate(config_for(model, seed=1, judge="none"), tmp_path / "other", "cpu")  # the judge knows those of seed 0
    for metric, of in (
        ("frechet_distance", "real train"),
        ("frechet_distance", "untrained"),
        ("ssim", "reconstructions"),
    ):
        assert one(tmp_path / "other", metric, of)["value"] != one(done, metric, of)["value"]


def test_a_bar_is_not_filled_beyond_its_end(model, tmp_path, monkeypatch):  # noqa: F811
    """The fifths of four pictures' steps add up to a little more than four."""
    filled = []
    monkeypatch.setattr("ldm.evaluate.pictures.tqdm", lambda **options: Filled(filled, options["total"]))
    made = PictureSet(folder=tmp_path / "made", captions=["a red circle"] * N, size=32)
    settings = {"model": "", "guidance_rescale": 0.0, "steps": 5, "sampler": "ddim", "seed": 0}
    generate(Pipeline.from_pretrained(model), [made], [1.0], settings, batch_size=4)
    assert len(list((tmp_path / "made/g1").glob("*.png"))) == N == filled[-1] and max(filled) == N


class Filled:
    """A progress bar that notes how far it was."""

    def __init__(self, filled: list[float], total: int) -> None:
        self.filled, self.total, self.n = filled, total, 0.0

    def __enter__(self) -> "Filled":
        return self

    def __exit__(self, *error) -> None:
        pass

    def update(self, step: float) -> None:
        self.n += step
        self.filled.append(self.n)


def test_intervals_of_distances_that_are_never_below_0_are_not_either():
    x, lows = torch.randn(20, 6, generator=torch.Generator().manual_seed(9)), []
    for s in range(6):
        y = x + 0.1 * torch.randn(20, 6, generator=torch.Generator().manual_seed(s))
        (distance, *_), mean = frechet_records(x, y, "samples", {}), cmmd_record(x, y, "samples", {})
        lows += [distance["interval"][0], mean["interval"][0]]
    assert min(lows) == 0


def test_a_folder_whose_training_pictures_are_mostly_broken_has_no_floor(model, tmp_path):  # noqa: F811
    data = noise_data(tmp_path / "data", broken=False)
    (tmp_path / "run").mkdir()
    shutil.copytree(model, tmp_path / "run", dirs_exist_ok=True)
    (tmp_path / "run/config.json").write_text('{"data": {"name": "folder", "max_broken": 1.0}}')
    for file in sorted((data / "train").glob("*.png"))[:90]:
        file.write_bytes(b"no picture")
    of = {"data": "folder", "data_path": str(data), "judge": ""}
    config = config_for(tmp_path / "run", **of, guidance=(1.0,), num=20, train_num=101)
    evaluate(config, tmp_path / "out", "cpu")
    (floor,) = [r for r in results_of(tmp_path / "out") if r["of"] == "real train"]
    assert floor["value"] is None and floor["note"] == "only 11 of 101 training pictures can be read"


def test_cmmd_is_never_below_0():
    for seed in range(20):
        x = torch.randn(30, 8, generator=torch.Generator().manual_seed(seed))
        assert 0 <= cmmd(x, x.flip(0)) < 1e-9


def test_every_printed_distance_says_network_and_number_and_what_it_lacks(model, vae, tmp_path, monkeypatch):  # noqa: F811
    from ldm.metrics import features

    wide = stub_extractor()
    wide.network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten())  # 27 features
    monkeypatch.setitem(features.EXTRACTORS, "stub", lambda where: wide)
    monkeypatch.setattr("ldm.evaluate.autoencoder.find_spec", lambda name: None)
    monkeypatch.setattr(warnings, "warn", lambda *text, **options: None)
    a, b = fill(tmp_path / "a", 30, 0), fill(tmp_path / "b", 30, 1)
    about = FolderEvaluation(images=a, reference=b, features="stub")
    lines = evaluate_folders(about, tmp_path / "folders", "cpu")
    assert "blank_pictures (N=30): 0" in lines
    assert all("(stub, N=30)" in line for line in lines if "blank" not in line) and len(lines) > 5
    config = AutoencoderEvaluation(autoencoder=str(vae), data="shapes", num=16, features="stub")
    lines = evaluate_autoencoder(config, tmp_path / "vae", "cpu")
    assert any(line.startswith("frechet_distance (stub, N=16): ") for line in lines)
    assert any(line.startswith("perceptual_distance (effnet-lite0, N=16): ") for line in lines)
    needs = "Frechet distance is biased: it needs 28 pictures on both sides, one more than features, for less bias"
    assert any(line.startswith(needs) for line in lines)
    lines = evaluate(config_for(model, guidance=(1.0,)), tmp_path / "model", "cpu")
    assert any(line.startswith(needs) for line in lines)
    for name in ("folders", "vae"):
        assert "stub, weights 555555555555" in (tmp_path / name / "report.html").read_text()


def test_a_size_beyond_what_memory_holds_is_one_line(vae, tmp_path):  # noqa: F811
    a, b = fill(tmp_path / "a", 16, 0), fill(tmp_path / "b", 16, 1)
    config = FolderEvaluation(images=a, reference=b, features="stub", size=100_000, without_frechet=True)
    with pytest.raises(UserError, match="--size 100000 is not allowed; use 1 to 4000"):
        evaluate_folders(config, tmp_path / "out", "cpu")
    other = AutoencoderEvaluation(autoencoder=str(vae), data="shapes", num=16, features="stub", size=100_000)
    with pytest.raises(UserError, match="100000 px cannot be measured: --size is 11 to 4000 px"):
        evaluate_autoencoder(other, tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()
