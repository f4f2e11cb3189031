"""Evaluating a model: every number is what the kept pictures give, work is never done twice, mistakes are one line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_evaluation
import torch
from PIL import Image
from tiny_evaluation import GUIDANCE, N, Tags, captions, config_for, kept, one, report, results

from ldm.config import UserError
from ldm.data.shapes import Shapes
from ldm.evaluate.evaluation import pose_cases, reconstruct
from ldm.evaluate.model import evaluate
from ldm.evaluate.pictures import sample_indices
from ldm.evaluate.records import SHUFFLED, best_guidance, find
from ldm.evaluate.report import write_results
from ldm.metrics import cmmd, cosine, frechet_distance, kernel_distance, precision_recall, psnr, retrieval, ssim
from ldm.metrics.alignment import chance
from ldm.metrics.compositional import TASKS, by_aspect, check, tally
from ldm.metrics.diversity import nearest
from ldm.pipeline import Pipeline

model, networks = tiny_evaluation.model, tiny_evaluation.networks


@pytest.fixture(scope="module")
def done(model, networks, tmp_path_factory) -> Path:
    """A complete evaluation, not to be changed."""
    out = tmp_path_factory.mktemp("done") / "out"
    evaluate(config_for(model, out))
    return out


@pytest.fixture
def copy(done, tmp_path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


@pytest.fixture
def prompts(monkeypatch) -> list[str]:
    """The prompts for which the pipeline is asked, but for those of its speed."""
    monkeypatch.setattr("ldm.evaluate.model.cost_records", lambda e: [])
    made, call = [], Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, p, **options: made.extend(p) or call(self, p, **options))
    return made


def real() -> torch.Tensor:
    dataset = Shapes(32, "test")
    return tiny_evaluation.to_x([dataset[i]["image"] for i in sample_indices(len(dataset), N, 0)])


def arrays(x: torch.Tensor) -> list[np.ndarray]:
    return list(((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())


def test_pictures_are_kept_with_their_captions_and_are_the_pipelines(done, model):
    dataset = Shapes(32, "test")
    for name, count in (("pictures", N), ("cases", 2 * len(TASKS))):
        for guidance in ("g1", "g2"):
            folder = done / name / guidance
            assert len(captions(folder)) == len(list(folder.glob("*.png"))) == count
            with Image.open(folder / "00003.png") as image:
                assert image.size == (32, 32) and image.text["prompt"] == captions(folder)[3]
                assert (image.text["seed"], image.text["guidance"]) == ("3", f"{float(guidance[1:])}")
    texts = captions(done / "pictures/g2")
    assert all(t in dataset.captions(i) for t, i in zip(texts, sample_indices(len(dataset), N, 0), strict=True))
    options = {"guidance": 2.0, "guidance_rescale": 0.5, "steps": 2, "sampler": "ddim", "seed": 5}
    (want,) = Pipeline.from_pretrained(model)(texts[5], **options)
    have = np.asarray(Image.open(done / "pictures/g2/00005.png")).astype(int)
    assert np.abs(have - np.asarray(want).astype(int)).max() <= 1


def test_every_distance_is_that_of_the_kept_pictures(done, model):
    net, x = tiny_evaluation.stub_extractor(), real()
    decoded = tiny_evaluation.to_x(reconstruct(Pipeline.from_pretrained(model), x))
    assert one(done, "psnr_db", "reconstructions")["value"] == pytest.approx(float(psnr(x, decoded).mean()))
    assert one(done, "ssim", "reconstructions")["value"] == pytest.approx(float(ssim(x, decoded).mean()), abs=1e-6)
    train = Shapes(32, "train")
    bank = tiny_evaluation.to_x([train[i]["image"] for i in sample_indices(len(train), 40, 0)])
    sources = [("reconstructions", {}, decoded), ("real train", {}, bank[:N])]
    sources += [("untrained", {}, kept(done / "untrained/g1"))]
    sources += [("samples", {"guidance": g}, kept(done / f"pictures/g{g:g}")) for g in GUIDANCE]
    for of, where, y in sources:
        frechet = one(done, "frechet_distance", of, **where)
        assert frechet["value"] == pytest.approx(frechet_distance(net(y), net(x)), rel=1e-3)
        assert (frechet["n"], frechet["dimensions"], frechet["biased"]) == (N, 12, False)
        kernel = kernel_distance(net(y), net(x), subset_size=N // 2)[0]
        assert one(done, "kernel_distance", of, **where)["value"] == pytest.approx(kernel, rel=1e-3, abs=1e-7)
        for name, value in precision_recall(net(x), net(y)).items():
            assert one(done, name, of, **where)["value"] == value
    endless = [r for r in results(done) if r["metric"] == "frechet_distance_infinite"]
    assert endless and all(r["value"] is None and "24 pictures" in r["note"] for r in endless)
    best = best_guidance(results(done))
    held_out, distances = (nearest(net(y), net(bank))[0] for y in (x, kept(done / f"pictures/g{best:g}")))
    record = one(done, "memorized", "samples", guidance=best)
    assert record["value"] == (distances < torch.quantile(held_out, 0.05)).double().mean().item()
    assert record["nearer_than_any"] == (distances < held_out.min()).double().mean().item()
    assert record["distances"] == pytest.approx(distances.tolist(), rel=1e-5) and len(record["nearest"]) == N
    assert (record["bank"], record["bank_is_whole"], len(record["quantiles"])) == (40, False, 51)
    assert one(done, "memorized", "real held-out")["value"] == 1 / 16  # one of 16 is below the 5% quantile


def test_every_alignment_is_that_of_the_kept_pictures(done):
    net, x, dataset = tiny_evaluation.knows_shapes(), real(), Shapes(32, "test")
    texts = net.texts(captions(done / "pictures/g1"))
    alternatives = [dataset.captions(i) for i in sample_indices(len(dataset), N, 0)]
    same = torch.tensor([[bool({*a} & {*b}) for b in alternatives] for a in alternatives])
    sources = [("real held-out", {}, x), ("untrained", {}, kept(done / "untrained/g1"))]
    sources += [("samples", {"guidance": g}, kept(done / f"pictures/g{g:g}")) for g in GUIDANCE]
    for of, where, y in sources:
        images = net.images(y)
        record = one(done, "clip_cosine", of, **where)
        assert record["value"] == pytest.approx(cosine(images, texts).mean().item(), abs=1e-5)
        assert record["each"] == pytest.approx(cosine(images, texts).tolist(), abs=1e-5)
        for name, value in retrieval(images, texts, same=same).items():
            if "chance" not in name:
                record = one(done, name, of, **where)
                assert record["value"] == pytest.approx(value)
                assert record["chance"] == pytest.approx(chance(same, int(name[-1])))
        if of != "real held-out":
            frechet = one(done, "judge_frechet_distance", of, **where)
            assert frechet["value"] == pytest.approx(frechet_distance(images, net.images(x)), rel=1e-4)
            assert one(done, "cmmd", of, **where)["value"] == pytest.approx(cmmd(images, net.images(x)), abs=1e-4)
    shuffled = one(done, "clip_cosine", "real held-out, shuffled captions")["value"]
    assert shuffled == pytest.approx(cosine(net.images(x), texts.roll(1, 0)).mean().item(), abs=1e-5)
    best = best_guidance(results(done))
    plain = cosine(net.images(kept(done / f"pictures/g{best:g}")), texts)
    for kind in ("other wording", "upper case", "typos"):
        folder = done / f"wording/{kind.replace(' ', '-')}/g{best:g}"
        other = torch.tensor([a != b for a, b in zip(captions(folder), captions(done / "pictures/g1"), strict=True)])
        record = one(done, "clip_cosine_change", kind)
        change = cosine(net.images(kept(folder)), texts) - plain
        assert record["value"] == pytest.approx(change[other].mean().item(), abs=1e-5) and record["n"] == other.sum()
        assert Image.open(folder / "00003.png").text["seed"] == "3"  # from the same noise as the first picture


def test_the_exact_checker_stands_between_floor_and_ceiling(done):
    posed, best = pose_cases(N, 0), best_guidance(results(done))
    for g in GUIDANCE:
        images = arrays(kept(done / f"cases/g{g:g}"))
        assert one(done, "compositional_score", "samples", guidance=g)["value"] == tally(
            [check(x, case.required) for x, case in zip(images, posed, strict=True)], posed
        )
        scenes = [case.required for case in posed]
        assert one(done, "scene_accuracy", "samples", guidance=g)["value"] == {
            name: np.mean(right) for name, right in by_aspect(images, scenes).items()
        }
    pairs = zip(arrays(kept(done / "untrained/g1")), posed, strict=False)
    right = [check(x, case.required) for x, case in pairs]
    assert one(done, "compositional_score", "untrained")["value"] == tally(right, posed)
    assert one(done, "compositional_score", SHUFFLED, guidance=best)["n"] == len(posed)
    assert one(done, "scene_accuracy", "real held-out")["value"]["all"] == 1.0


def test_the_report_shows_all_of_it_and_names_only_inceptions_distance_fid(done, tmp_path):
    text, best = report(done), best_guidance(results(done))
    pictures = [attributes["src"] for tag, attributes in Tags(text).seen if tag == "img"]
    cases = zip(arrays(kept(done / f"cases/g{best:g}")), pose_cases(N, 0), strict=True)
    wrong = sum(not check(image, case.required) for image, case in cases)
    # prompts beside real pictures, reconstructions, nearest training pictures, three other wordings, wrong cases
    assert len(pictures) == 12 * (1 + len(GUIDANCE)) + 12 * 2 + 12 * 2 + 12 * 4 + wrong
    titles = "Between floor and ceiling|Guidance|What the captions ask for|Link by link|Autoencoder|Does it copy?"
    titles += "|Other wording|Cost|Prompts|Reconstructions|Nearest to the training set|What went wrong|Settings"
    assert set(titles.split("|")) <= set(re.findall(r"<h2[^>]*>(.*?)</h2>", text)) and ">Groups<" not in text
    assert sum(tag == "svg" for tag, _ in Tags(text).seen) == 4 and captions(done / "pictures/g1")[0] in text
    assert f"{wrong} of {2 * len(TASKS)} pictures at guidance" in text and "chosen on these same captions" in text
    plain = re.sub('base64,[^"]+', "", text)
    assert "KID" not in plain and "<td>FID" not in plain and "It is not FID" in text
    table = json.loads((done / "metrics.json").read_text())
    as_inception = [r | {"extractor": "inception"} if r.get("extractor") == "stub" else r for r in table["results"]]
    pages = []
    for _ in range(2):
        write_results("model", tmp_path, table["settings"] | {"model": "<b>&"}, as_inception, {})
        pages.append(report(tmp_path))
    assert pages[0] == pages[1]  # the same numbers are the same page
    assert all(t in pages[0] for t in ("<td>FID</td>", "<td>KID x 1000</td>", "FID, N = 16", "of &lt;b&gt;&amp; on"))


def test_only_what_is_missing_is_sampled_and_numbers_stay_the_same(done, copy, model, prompts):
    (copy / "pictures/g2/00007.png").unlink()
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.png")}
    evaluate(config_for(model, copy))
    assert set(prompts) == {*captions(copy / "pictures/g2")}  # one batch
    assert {path: path.stat().st_mtime_ns for path in before} == before and not list(copy.rglob("*.tmp"))
    numbers = [[r for r in results(out) if "threads" not in r] for out in (done, copy)]
    assert numbers[0] == numbers[1]
    prompts.clear()
    evaluate(config_for(model, copy, guidance=(1.0, 3.0), num=N + 2, batch_size=8, features="none", judge="none"))
    assert len(prompts) == 2 + 18 + 2 + 2 * len(TASKS)  # at guidance 1 and 3, of the untrained model, cases at 3
    assert len(captions(copy / "pictures/g1")) == N + 2
    assert not find(results(copy), "frechet_distance", "samples")


def test_pictures_of_other_settings_are_refused_and_a_damaged_one_is_one_line(done, copy, tmp_path, model, prompts):
    tiny_evaluation.tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    shutil.copytree(model, tmp_path / "same")  # the same model in another folder
    for folder, changes, words in (
        (model, {"steps": (3,)}, "steps 2, not 3; use another --out"),
        (model, {"sampler": "euler"}, "ddim, not euler"),
        (tmp_path / "other", {}, "model_sha256"),
        (tmp_path / "same", {}, "00002.png"),
    ):
        if words == "00002.png":
            assert all((copy / p.relative_to(done)).read_bytes() == p.read_bytes() for p in done.rglob("*.*"))
            (copy / "pictures/g1/00002.png").write_bytes((done / "pictures/g1/00002.png").read_bytes()[:60])
        with pytest.raises(UserError, match=words):
            evaluate(config_for(folder, copy, **changes))
    assert not prompts and (copy / "metrics.json").read_bytes() == (done / "metrics.json").read_bytes()


def test_another_evaluation_is_compared_with_where_it_may_be(done, copy, model, tmp_path):
    tiny_evaluation.tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    config = config_for(tmp_path / "other", tmp_path / "out", baseline=str(done), guidance=(1.0,))
    evaluate(config)
    best = best_guidance(results(done))
    for metric in ("frechet_distance", "clip_cosine", "cmmd"):
        ours, theirs = one(tmp_path / "out", metric, "samples"), one(done, metric, "samples", guidance=best)
        record = one(tmp_path / "out", metric, "baseline")
        assert record["value"] == theirs["value"] and record["ratio"] == ours["value"] / theirs["value"]
    assert f">Against {model}</h2>" in report(tmp_path / "out")
    assert all("group" not in r and "bank" not in r for r in results(tmp_path / "out") if r["of"] == "baseline")
    (copy / "metrics.json").write_text((done / "metrics.json").read_text().replace("32 px, bicubic", "32 px, nearest"))
    for changes, words in (
        ({"num": 18}, "num 16, here 18"),
        ({"seed": 1}, "seed 0, here 1"),
        ({"features": "effnet-lite0"}, "effnet-lite0.* not measured"),
        ({"baseline": str(copy)}, "32 px, nearest, antialiased, here 32 px, bicubic"),
        ({"baseline": str(tmp_path)}, "metrics.json' does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(replace(config, out=tmp_path / "new", **changes))
        assert not (tmp_path / "new").exists()
