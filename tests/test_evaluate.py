import importlib.util
import json
import shutil
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.clip import CLIP, TextConfig, TextEncoder, VisionConfig
from ldm.commands.cli import run_script
from ldm.config import UserError
from ldm.data.emoji import Emoji
from ldm.data.shapes import Scene, Shapes, render
from ldm.diffusion import Schedule, ScheduleConfig
from ldm.evaluate.baseline import against
from ldm.evaluate.measure import reconstruct
from ldm.evaluate.model import EvaluateConfig, evaluate, pose, sample_indices, trained_on
from ldm.evaluate.pictures import _runs
from ldm.evaluate.records import best_guidance, find
from ldm.evaluate.report import write_report
from ldm.evaluate.report_html import Gallery, Row
from ldm.metrics import (
    cmmd,
    cosine,
    features,
    frechet_distance,
    judges,
    kernel_distance,
    precision_recall,
    psnr,
    retrieval,
    ssim,
)
from ldm.metrics.alignment import chance
from ldm.metrics.attributes import ATTRIBUTES
from ldm.metrics.compositional import TASKS, breakdown, check, score
from ldm.metrics.diversity import nearest
from ldm.metrics.features import FeatureExtractor
from ldm.metrics.judges import ImageTextModel
from ldm.metrics.preprocess import resized
from ldm.pipeline import Pipeline
from ldm.pipeline_io import Parts
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet, UNetConfig
from ldm.vae import VAE, VAEConfig

N, GUIDANCE = 16, (1.0, 2.0)


def tiny_pipeline(seed: int = 0) -> Pipeline:
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(["a red circle"], 514, context_length=77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        **ends,
    )
    vae = VAEConfig(block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2, scaling_factor=1.0)
    unet = UNetConfig(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=1,
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    schedule = Schedule(ScheduleConfig(sampler="ddim", steps_offset=1))
    return Pipeline(Parts(VAE(vae), TextEncoder(text), tokenizer, UNet(unet), schedule))


def stub_extractor() -> FeatureExtractor:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())  # 12 features
    return FeatureExtractor("stub", "5" * 64, 32, network, resized(32, torch.zeros(3), torch.ones(3)))


class KnowsAll:
    """A judge that has seen every held-out picture beside its captions: the embedding of a caption is that of its
    picture."""

    def __init__(self) -> None:
        self.dataset = Shapes(32, "test")
        chosen = sample_indices(len(self.dataset), 40, 0)
        self.known = {caption: i for i in chosen for caption in self.dataset.captions(i)}

    def images(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1) - 0.8, dim=1)

    def texts(self, captions: list[str]) -> torch.Tensor:
        blank = torch.zeros(3, 32, 32, dtype=torch.uint8)
        get = lambda c: self.dataset[self.known[c]]["image"] if c in self.known else blank  # noqa: E731
        return self.images(torch.stack([get(caption) for caption in captions]) / 127.5 - 1)


def as_judge(name: str, stub: Any, size: int) -> ImageTextModel:
    return ImageTextModel(name, nn.Identity(), size, stub.images, stub.texts)


def opened(name: str) -> ImageTextModel:
    return as_judge(name, KnowsAll(), 32) if name == "knows-all" else judges.image_text_model(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    monkeypatch.setitem(features.EXTRACTORS, "stub", lambda where: stub_extractor())
    monkeypatch.setattr("ldm.evaluate.model.image_text_model", opened)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # run_script sets it for good


def config_for(model: Path, **changes) -> EvaluateConfig:
    base = EvaluateConfig(
        model=str(model),
        data="shapes",
        num=N,
        guidance=GUIDANCE,
        guidance_rescale=0.5,
        steps=2,
        features="stub",
        judge="knows-all",
        train_num=40,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def done(model, tmp_path_factory) -> Path:
    """One whole evaluation, not to be changed."""
    out = tmp_path_factory.mktemp("done") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(features.EXTRACTORS, "stub", lambda where: stub_extractor())
        patch.setattr("ldm.evaluate.model.image_text_model", opened)
        evaluate(config_for(model), out, "cpu")
    return out


def run_main(monkeypatch, *arguments: str) -> None:
    path = Path(__file__).parents[1] / "scripts" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    run_script(script.main)


def results_of(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())["results"]


def one(out: Path, metric: str, of: str, **where) -> dict:
    (record,) = find(results_of(out), metric, of, **where)
    return record


def arrays(out: Path, name: str, guidance: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((out / name / guidance).glob("*.png"))]


def tensor(images: list[np.ndarray]) -> torch.Tensor:
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def real_pictures() -> torch.Tensor:
    dataset = Shapes(32, "test")
    return torch.stack([dataset[i]["image"] for i in sample_indices(len(dataset), N, 0)]) / 127.5 - 1


def test_pictures_are_kept_with_their_captions(done):
    for name, count in (("pictures", N), ("cases", 2 * len(TASKS))):
        for guidance in ("g1", "g2"):
            folder = done / name / guidance
            lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
            assert [line["file_name"] for line in lines] == sorted(p.name for p in folder.glob("*.png"))
            assert len(lines) == count
            with Image.open(folder / lines[3]["file_name"]) as image:
                assert image.size == (32, 32) and image.text["prompt"] == lines[3]["text"]
                assert (image.text["seed"], image.text["guidance"]) == ("3", f"{float(guidance[1:])}")
    dataset = Shapes(32, "test")
    texts = [json.loads(line)["text"] for line in (done / "pictures/g1/metadata.jsonl").read_text().splitlines()]
    indices = sample_indices(len(dataset), N, 0)
    assert all(text in dataset.captions(i) for text, i in zip(texts, indices, strict=True))


def test_a_kept_picture_is_the_pipelines(done, model):
    lines = (done / "pictures/g2/metadata.jsonl").read_text().splitlines()
    caption = json.loads(lines[5])["text"]
    (want,) = Pipeline.from_pretrained(model)(
        caption, guidance=2.0, guidance_rescale=0.5, steps=2, sampler="ddim", seed=5
    )
    have = np.asarray(Image.open(done / "pictures/g2/00005.png")).astype(int)
    assert np.abs(have - np.asarray(want).astype(int)).max() <= 1


def test_every_number_is_what_the_kept_pictures_give(done, model):
    net, real, pipe = stub_extractor(), real_pictures(), Pipeline.from_pretrained(model)
    decoded = reconstruct(pipe, real)
    assert one(done, "psnr_db", "reconstructions")["value"] == pytest.approx(float(psnr(real, decoded).mean()))
    assert one(done, "ssim", "reconstructions")["value"] == pytest.approx(float(ssim(real, decoded).mean()), abs=1e-6)
    rfd = one(done, "frechet_distance", "reconstructions")["value"]
    assert rfd == pytest.approx(frechet_distance(net(decoded), net(real)), rel=1e-3)
    posed = pose(N, 0)
    for name, guidance in (("g1", 1.0), ("g2", 2.0)):
        record = one(done, "frechet_distance", "samples", guidance=guidance)
        want = frechet_distance(net(tensor(arrays(done, "pictures", name))), net(real))
        assert record["value"] == pytest.approx(want, rel=1e-4)
        images = arrays(done, "cases", name)
        assert one(done, "compositional_score", "samples", guidance=guidance)["value"] == score(images, posed)
        have = one(done, "scene_accuracy", "samples", guidance=guidance)["value"]
        assert have == breakdown(images, [case.required for case in posed])
    assert one(done, "scene_accuracy", "real held-out")["value"]["all"] == 1.0
    train = Shapes(32, "train")
    rows = torch.stack([train[i]["image"] for i in sample_indices(len(train), N, 0)]) / 127.5 - 1
    floor = one(done, "frechet_distance", "real train")
    assert floor["value"] == pytest.approx(frechet_distance(net(rows), net(real)), rel=1e-4)


def test_every_number_has_an_interval_but_counts_and_costs(done):
    plain = {"blank_pictures", "seconds_per_picture", "parameters", "memory_per_picture_bytes"}
    without = {r["metric"] for r in results_of(done) if r["value"] is not None and "interval" not in r}
    assert without <= plain


def test_every_alignment_is_what_the_kept_pictures_give(done):
    judge, real = KnowsAll(), real_pictures()
    captions = [json.loads(line)["text"] for line in (done / "pictures/g1/metadata.jsonl").read_text().splitlines()]
    texts, others = judge.texts(captions), judge.images(real)
    same = torch.tensor([[bool({*a} & {*b}) for b in captions_of(N)] for a in captions_of(N)])
    for of, guidance, x in (
        ("samples", 1.0, tensor(arrays(done, "pictures", "g1"))),
        ("samples", 2.0, tensor(arrays(done, "pictures", "g2"))),
        ("untrained", None, tensor(arrays(done, "untrained", "g1"))),
        ("real held-out", None, real),
    ):
        where = {"guidance": guidance} if guidance else {}
        images = judge.images(x)
        record = one(done, "clip_cosine", of, **where)
        assert record["value"] == pytest.approx(cosine(images, texts).mean().item(), abs=1e-5)
        assert record["interval"][0] < record["value"] < record["interval"][1]
        assert (record["extractor"], record["n"]) == ("knows-all", N)
        for name, value in retrieval(images, texts, same=same).items():
            if "chance" not in name:
                record = one(done, name, of, **where)
                assert record["value"] == pytest.approx(value)
                assert record["chance"] == pytest.approx(chance(same, int(name[-1])))
        if of != "real held-out":
            frechet = one(done, "judge_frechet_distance", of, **where)
            assert frechet["value"] == pytest.approx(frechet_distance(images, others), rel=1e-4)
            assert frechet["extractor"] == "knows-all"
            assert one(done, "cmmd", of, **where)["value"] == pytest.approx(cmmd(images, others), abs=1e-4)
    best = best_guidance(results_of(done))
    assert one(done, "text_to_image@1", "real held-out")["value"] > 0.9
    shuffled = one(done, "clip_cosine", "real held-out, shuffled captions")
    assert shuffled["value"] == pytest.approx(cosine(others, texts.roll(1, 0)).mean().item(), abs=1e-5)
    assert shuffled["value"] < one(done, "clip_cosine", "real held-out")["value"] - 0.1
    assert one(done, "clip_cosine", "samples, shuffled captions", guidance=best)["n"] == N


def captions_of(count: int) -> list[list[str]]:
    dataset = Shapes(32, "test")
    return [dataset.captions(i) for i in sample_indices(len(dataset), count, 0)]


def test_other_distances_and_copies_are_what_the_kept_pictures_give(done):
    net, real, train = stub_extractor(), real_pictures(), Shapes(32, "train")
    for guidance in GUIDANCE:
        features = net(tensor(arrays(done, "pictures", f"g{guidance:g}")))
        near = one(done, "kernel_distance", "samples", guidance=guidance)
        assert near["value"] == pytest.approx(kernel_distance(features, net(real), subset_size=N // 2)[0], rel=1e-3)
        for name, value in precision_recall(net(real), features).items():
            assert one(done, name, "samples", guidance=guidance)["value"] == value
    endless = [r for r in results_of(done) if r["metric"] == "frechet_distance_infinite"]
    assert endless and all(r["value"] is None and "24 pictures" in r["note"] for r in endless)
    best = best_guidance(results_of(done))
    bank = torch.stack([train[i]["image"] for i in sample_indices(len(train), 40, 0)]) / 127.5 - 1
    held_out = nearest(net(real), net(bank))[0]
    distances = nearest(net(tensor(arrays(done, "pictures", f"g{best:g}"))), net(bank))[0]
    record = one(done, "memorized", "samples", guidance=best)
    assert record["value"] == (distances < torch.quantile(held_out, 0.05)).double().mean().item()
    assert record["nearer_than_any"] == (distances < held_out.min()).double().mean().item()
    assert (record["bank"], record["bank_is_whole"]) == (40, False)
    assert record["quantiles"][25] == pytest.approx(torch.quantile(distances, 0.5).item(), rel=1e-5)
    assert one(done, "memorized", "real held-out")["value"] == 1 / 16  # one of 16 is below the 5% quantile


def test_wording_is_measured_against_the_same_caption_as_first_asked(done):
    judge, best = KnowsAll(), best_guidance(results_of(done))
    texts = judge.texts([c["text"] for c in map(json.loads, (done / "pictures/g1/metadata.jsonl").open())])
    plain = cosine(judge.images(tensor(arrays(done, "pictures", f"g{best:g}"))), texts)
    for kind in ("other wording", "upper case", "typos"):
        folder = f"wording/{kind.replace(' ', '-')}"
        changed = cosine(judge.images(tensor(arrays(done, folder, f"g{best:g}"))), texts)
        record = one(done, "clip_cosine_change", kind)
        asked = [json.loads(line)["text"] for line in (done / folder / f"g{best:g}/metadata.jsonl").open()]
        first = [c["text"] for c in map(json.loads, (done / "pictures/g1/metadata.jsonl").open())]
        other = torch.tensor([a != b for a, b in zip(asked, first, strict=True)])
        assert record["value"] == pytest.approx((changed - plain)[other].mean().item(), abs=1e-5)
        assert record["n"] == int(other.sum()) > N // 2
        for caption, known, before in zip(asked, captions_of(N), first, strict=True):
            if kind == "other wording":  # which says neither more nor less
                assert caption in known and ("small" in caption) == ("small" in before)
    first = Image.open(done / f"wording/typos/g{best:g}/00003.png")
    assert first.text["seed"] == "3"  # the same noise as the picture that it is held against


def test_a_judge_that_knows_nothing_or_is_the_models_own_is_refused(done, model, tmp_path, monkeypatch):
    out = copy_of(done, tmp_path)
    monkeypatch.setattr(KnowsAll, "texts", lambda self, captions: torch.ones(len(captions), 192))
    shutil.rmtree(out / "pictures")
    with pytest.raises(UserError, match="judge 'knows-all' finds the right one of 16 real pictures .* --judge none"):
        evaluate(config_for(model), out, "cpu")
    assert not (out / "pictures").exists()  # refused before the long work
    text = Pipeline.from_pretrained(model).text_encoder.config
    vision = VisionConfig(image_size=32, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    clip = CLIP(replace(text, projection_dim=512), vision)
    clip.text_model = Pipeline.from_pretrained(model).text_encoder.text_model
    clip.save_pretrained(tmp_path / "judge")
    Pipeline.from_pretrained(model).tokenizer.save_pretrained(tmp_path / "judge")
    with pytest.raises(UserError, match="would judge itself"):
        evaluate(config_for(model, judge=str(tmp_path)), out, "cpu")
    with pytest.raises(UserError, match="would judge itself"):  # by transformers it is the same encoder
        evaluate(config_for(model, judge=f"clip:{tmp_path / 'judge'}"), out, "cpu")
    with pytest.raises(UserError, match="learned from the validation split"):
        evaluate(config_for(model, judge=str(tmp_path), split="val"), tmp_path / "new", "cpu")


def test_groups_that_captions_name_are_reported_apart(tmp_path):
    """On emoji, whose captions name skin tones, with a judge that sees how dark a picture is."""
    pipe = tiny_pipeline()
    pipe.unet.config = replace(pipe.unet.config, sample_size=4)
    pipe.save_pretrained(tmp_path / "model")
    config = config_for(tmp_path / "model", data="emoji", num=60, guidance=(1.0,), steps=1, judge="sees-dark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.evaluate.model.image_text_model", lambda name: as_judge(name, SeesDark(), 16))
        patch.setattr("ldm.evaluate.measure.MOST", 0.0)
        evaluate(config, tmp_path / "out", "cpu")
    results, dataset = results_of(tmp_path / "out"), Emoji(16, "test")
    records = [dataset.records[i] for i in sample_indices(len(dataset), 60, 0)]
    for tone in ("light", "dark"):
        mine = [r for r in results if r.get("group") == tone and r["of"] == "real held-out"]
        assert {r["metric"] for r in mine} == {"group_clip_cosine", "group_paired", "group_diversity"}
        assert mine[0]["n"] == sum(r["skin_tone"] == tone for r in records)
        assert all(r["interval"][0] <= r["value"] <= r["interval"][1] for r in mine)
    (open_,) = [r for r in results if r["metric"] == "left_open" and r["attribute"] == "skin tone"]
    assert sum(open_["value"].values()) == pytest.approx(1)
    real, samples = [r for r in results if r["metric"] == "new_combinations"]
    assert real["n"] == samples["n"] == sum(r["held_out"] == "combination" for r in records)
    assert 0 < real["every"] <= real["value"] < 1  # it cannot tell genders
    prompts = [json.loads(line)["text"] for line in (tmp_path / "out/open/skin-tone/g1/metadata.jsonl").open()]
    assert len(prompts) == open_["n"] and not any("skin tone" in prompt for prompt in prompts)
    text = (tmp_path / "out/report.html").read_text()
    assert (
        "<h2>Groups</h2>" in text
        and "<h2>No skin tone asked for</h2>" in text
        and "how often all" in text
        and not Tags(text).open
    )


class SeesDark:
    """Embeds a picture by its brightness and a caption by the skin tone it names."""

    def images(self, x: torch.Tensor) -> torch.Tensor:
        angle = x.mean((1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], 1)

    def texts(self, captions: list[str]) -> torch.Tensor:
        order = list(ATTRIBUTES[0].values)
        tones = [order.index(ATTRIBUTES[0].named(c)) if ATTRIBUTES[0].named(c) else 0 for c in captions]
        return self.images(torch.tensor(tones, dtype=torch.float32)[:, None, None, None] / -5)


def test_every_record_says_what_it_depends_on(done):
    table = json.loads((done / "metrics.json").read_text())
    assert table["format"] == "ldm-evaluation-2"
    wanted = {"model", "model_sha256", "data", "data_sha256", "split", "size", "steps", "sampler", "seed", "num"}
    wanted |= {"guidance", "guidance_rescale", "parameters", "judge"}
    assert wanted == set(table["settings"])
    for record in table["results"]:
        assert {"metric", "of", "value", "n"} <= set(record)
        if record["of"] == "samples":
            assert (record["steps"], record["sampler"], record["seed"]) == (2, "ddim", 0)
            assert record["guidance"] in GUIDANCE and record["guidance_rescale"] == 0.5
        if "extractor" in record and record["extractor"] != "stub":
            assert (record["extractor"], record["resize"]) == ("knows-all", "32 px, bicubic, antialiased")
        if record["metric"] == "frechet_distance":
            assert (record["extractor"], record["extractor_sha256"]) == ("stub", "5" * 64)
            assert record["resize"].startswith("32 px") and record["against"] == "real held-out"
            assert (record["n"], record["dimensions"], record["biased"]) == (N, 12, False)
    assert "fid" not in json.dumps(table).lower()


class Tags(HTMLParser):
    VOID = {"meta", "img", "br", "path", "circle", "polyline"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_report_is_whole_and_loads_nothing(done):
    text = (done / "report.html").read_text()
    tags = Tags(text)
    assert not tags.open  # every element is closed
    pictures = [about["src"] for tag, about in tags.seen if tag == "img"]
    # 12 prompts beside the real one, 12 reconstructed pairs, 12 nearest pairs, 12 in three other wordings, and every
    # wrong case
    wrong = sum(not check(i, c.required) for i, c in zip(arrays(done, "cases", "g1"), pose(N, 0), strict=True))
    assert len(pictures) == 12 * (1 + len(GUIDANCE)) + 12 * 2 + 12 * 2 + 12 * 4 + wrong
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    for word in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert word not in text
    titles = (
        "Between floor and ceiling",
        "Guidance",
        "What the captions ask for",
        "Link by link",
        "Autoencoder",
        "Cost",
    )
    titles += ("Prompts", "Does it copy?", "Nearest to the training set", "Other wording", "What went wrong")
    assert all(f"<h2>{title}</h2>" in text for title in titles) and "<h2>Groups</h2>" not in text
    assert sum(tag == "svg" for tag, _ in tags.seen) == 4
    first = json.loads((done / "pictures/g1/metadata.jsonl").read_text().splitlines()[0])["text"]
    assert first in text


def test_report_escapes_what_it_is_told(tmp_path):
    picture = Image.new("RGB", (300, 600))
    rows = [Row(caption="<script>&", pictures=[("<b>", picture)], note="<i>")]
    settings = {"model": "<m>", "data": "d", "split": "test", "num": 16, "size": 32, "guidance": [1.0]}
    settings |= {"sampler": "ddim", "steps": 1, "seed": 0}
    results = [{"metric": "blank_pictures", "of": "samples", "value": 0, "n": 16, "guidance": 1.0}]
    write_report(tmp_path / "r.html", settings, results, [Gallery(title="<t>", about="<a>", rows=rows)])
    tags = Tags((tmp_path / "r.html").read_text())
    assert not tags.open and not {"script", "i", "m", "t", "a"} & {tag for tag, _ in tags.seen}
    assert "&lt;b&gt;" in (tmp_path / "r.html").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


@pytest.fixture
def prompts_made(monkeypatch) -> list[str]:
    """The prompts that the pipeline is asked for, but for those that only its speed is measured with."""
    monkeypatch.setattr("ldm.evaluate.measure.efficiency", lambda bench, guidance: [])
    made, call = [], Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, p, **options: made.extend(p) or call(self, p, **options))
    return made


def copy_of(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


def test_resuming_makes_only_what_is_missing(done, model, tmp_path, prompts_made):
    out = copy_of(done, tmp_path)
    lost = out / "pictures/g2/00007.png"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.png") if p != lost}
    want = np.asarray(Image.open(lost)).astype(int)
    caption = Image.open(lost).text["prompt"]
    lost.unlink()
    evaluate(config_for(model), out, "cpu")
    assert prompts_made == [caption]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.png") if p != lost} == before
    assert np.abs(np.asarray(Image.open(lost)).astype(int) - want).max() <= 1
    assert not list(out.rglob("*.part")) and not list(out.rglob("*.tmp"))


def test_more_captions_and_another_guidance_add_to_what_is_there(done, model, tmp_path, prompts_made):
    out = copy_of(done, tmp_path)
    evaluate(config_for(model, num=N + 2, batch_size=5, judge="none"), out, "cpu")
    assert len(prompts_made) == 2 * 2 + 2  # the cases are the same 12; two by the untrained model
    captions = (out / "pictures/g1/metadata.jsonl").read_text()
    assert captions.startswith((done / "pictures/g1/metadata.jsonl").read_text())
    prompts_made.clear()
    evaluate(config_for(model, guidance=(1.0, 3.0), features="none", judge="none"), out, "cpu")
    assert len(prompts_made) == N + 2 * len(TASKS)
    assert (out / "pictures/g1/metadata.jsonl").read_text() == captions
    assert not find(results_of(out), "frechet_distance", "samples")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 3}, "steps 2, not 3"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"sampler": "euler"}, "sampler ddim, not euler"),
        ({"split": "val"}, "split test, not val"),
    ],
)
def test_other_settings_are_refused_by_name(done, model, tmp_path, prompts_made, change, words):
    out = copy_of(done, tmp_path)
    with pytest.raises(UserError, match=words):
        evaluate(config_for(model, **change), out, "cpu")
    assert not prompts_made
    for path in done.rglob("*.*"):
        assert (out / path.relative_to(done)).read_bytes() == path.read_bytes()


def test_another_models_pictures_are_refused_and_a_copy_of_the_model_is_not(done, tmp_path, model, prompts_made):
    out = copy_of(done, tmp_path)
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="model_sha256"):
        evaluate(config_for(tmp_path / "other"), out, "cpu")
    tiny_pipeline().save_pretrained(tmp_path / "same")
    evaluate(config_for(tmp_path / "same"), out, "cpu")
    assert not prompts_made


def test_a_right_picture_counts_and_a_blank_one_is_reported(done, model, tmp_path):
    out = copy_of(done, tmp_path)
    case = pose(N, 0)[0]
    (thing,) = case.required.things
    thing = replace(thing, x=0.5, y=0.5, size=thing.size or "large")
    Image.fromarray(render(Scene(things=(thing,), relation=None), 32)).save(out / "cases/g2/00000.png")
    Image.new("RGB", (32, 32), "white").save(out / "pictures/g2/00003.png")
    evaluate(config_for(model), out, "cpu")
    single = one(out, "compositional_score", "samples", guidance=2.0)["value"]["single object"]
    assert (single["seen"], single["held_out"], single["n"]) == (1.0, 0.0, 2)
    assert best_guidance(results_of(out)) == 2.0
    assert one(out, "blank_pictures", "samples", guidance=2.0)["value"] == 1
    text = (out / "report.html").read_text()
    assert f"11 of {2 * len(TASKS)} pictures at guidance 2 do not show" in text


def test_pictures_of_other_captions_are_not_taken_for_these(done, model, tmp_path, prompts_made):
    out = copy_of(done, tmp_path)
    file = out / "pictures/g2/metadata.jsonl"
    file.write_text(file.read_text().replace('"text": "', '"text": "not ', 1))
    with pytest.raises(UserError, match="g2' has pictures of other captions; delete that folder"):
        evaluate(config_for(model), out, "cpu")
    assert not prompts_made


def test_a_damaged_picture_is_one_clear_line(done, model, tmp_path):
    out = copy_of(done, tmp_path)
    (out / "pictures/g1/00002.png").write_bytes(b"no png")
    with pytest.raises(UserError, match="00002.png.*delete it"):
        evaluate(config_for(model), out, "cpu")


def test_a_folder_without_training_pictures_has_no_floor(model, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "test").mkdir(parents=True)
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"data/test/{i}.png")
        (tmp_path / f"data/test/{i}.txt").write_text(f"noise {i}")
    config = config_for(model, data="folder", data_path=str(tmp_path / "data"), guidance=(2.0,), judge="")
    evaluate(config, tmp_path / "out", "cpu")
    (floor,) = [r for r in results_of(tmp_path / "out") if r["of"] == "real train"]
    assert floor["value"] is None and "train" in floor["note"]
    assert not (tmp_path / "out" / "cases").exists()
    assert not find(results_of(tmp_path / "out"), "compositional_score", "samples")
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Link by link" not in text and "floor at this N: unknown" in text and "noise 3" in text


@pytest.mark.parametrize("shared", [0, 3])
def test_held_out_pictures_that_were_trained_on_are_told(model, tmp_path, recwarn, shared):
    for split, seed, suffix in (("test", 100, "png"), ("train", 200, "bmp")):  # the same pixels in other files
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(N):
            name = f"{i}" if i < shared else f"{i} {split}"
            rng = np.random.default_rng(i if i < shared else seed + i)
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"data/{split}/{name}.{suffix}")
            (tmp_path / f"data/{split}/{name}.txt").write_text(f"noise {name}")
    config = config_for(model, data="folder", data_path=str(tmp_path / "data"), guidance=(2.0,), judge="")
    evaluate(config, tmp_path / "out", "cpu")
    assert one(tmp_path / "out", "memorized", "samples", guidance=2.0)["held_out_in_train"] == shared
    told = [str(w.message) for w in recwarn if "held-out pictures are in the training set" in str(w.message)]
    assert [text[:9] for text in told] == [f"{shared} of the "] * (shared > 0)


def test_the_script_says_the_headline(done, model, tmp_path, monkeypatch, capsys):
    out = copy_of(done, tmp_path)
    rest = ["--num", "16", "--guidance", "1,2", "--guidance-rescale", "0.5", "--steps", "2"]
    rest += ["--features", "stub", "--judge", "knows-all", "--train-num", "40", "--device", "cpu"]
    run_main(monkeypatch, "--model", str(model), "--data", "shapes", "--out", str(out), *rest)
    printed = capsys.readouterr().out
    assert "Frechet distance (stub, N=16)" in printed and "compositional score (N=12)" in printed
    assert str(out / "report.html") in printed


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--num", "15"], "16 or more"),
        (["--num", "3000"], "has 2000"),
        (["--split", "train"], "'test' or 'val'"),
        (["--guidance", "1,x"], "list of numbers"),
        (["--guidance", "1,-1"], "0 or more"),
        (["--guidance", "nan"], "0 or more"),
        (["--guidance", "2,2.0"], "different"),
        (["--guidance-rescale", "1.5"], "in [0, 1]"),
        (["--batch-size", "0"], "1 or more"),
        (["--seed", "-1"], "0 or more"),
        (["--size", "64"], "no meaning with --model"),
        (["--reference", "."], "no meaning with --model"),
        (["--steps", "0"], "steps"),
        (["--sampler", "magic"], "dpmpp_2m"),
        (["--data", "nothing"], "known: shapes"),
        (["--data", "folder", "--data-path", "nowhere"], "nowhere"),
        (["--data", "folder"], "needs a path"),
        (["--features", "magic"], "effnet-lite0"),
        (["--features", "effnet-lite0:magic"], "'effnet-lite0:magic'"),
        (["--device", "magic"], "--device"),
        (["--device", "meta"], "--device"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(model, tmp_path, monkeypatch, capsys, changes, words):
    base = {"--model": str(model), "--data": "shapes", "--num": "16", "--device": "cpu", "--features": "stub"}
    base["--judge"] = "none"
    base |= dict(zip(changes[::2], changes[1::2], strict=True))
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, "--out", str(tmp_path / "out"), *[word for pair in base.items() for word in pair])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


def test_fewer_are_the_beginning_of_more():
    assert sample_indices(2000, 16, 3) == sample_indices(2000, 40, 3)[:16]
    assert sorted(sample_indices(40, 40, 0)) == list(range(40)) != sample_indices(40, 40, 0)
    few, many = pose(24, 0), pose(72, 0)
    assert len(few) == 24 and few == many[:24]
    kinds = [(case.task, case.held_out) for case in many]
    assert all(kinds.count((task, half)) == 6 for task in TASKS for half in (False, True)) and len(many) == 72


def test_runs_have_no_gaps_and_are_not_too_long():
    assert list(_runs([0, 1, 2, 3, 7, 9, 10], 3)) == [[0, 1, 2], [3], [7], [9, 10]]
    assert list(_runs([], 3)) == []


def test_numbers_of_groups_are_not_compared_with_each_other():
    """Each group has records of the same metric, and its own n."""
    base = {"of": "samples", "guidance": 1.0, "extractor": "net", "extractor_sha256": "5" * 64, "resize": "32 px"}
    whole = {"metric": "clip_cosine", "value": 0.5, "n": 40, **base}
    groups = [{"metric": "group_clip_cosine", "value": 0.5, "n": n, "group": str(n), **base} for n in (12, 20)]
    blank = {"metric": "blank_pictures", "of": "samples", "value": 0, "n": 40, "guidance": 1.0}
    found = against({"results": [whole, *groups, blank]}, [whole | {"value": 0.25}, *groups, blank], "other")
    assert [(r["metric"], r["ours"], r["value"], r["ratio"]) for r in found] == [("clip_cosine", 0.25, 0.5, 0.5)]


def test_the_data_are_those_that_the_models_run_was_trained_on(model, tmp_path):
    assert trained_on("shapes", "shapes", "", 32).length == 100_000
    assert trained_on(str(model), "shapes", "", 32).length is None
    shutil.copytree(model, tmp_path / "run")
    (tmp_path / "run/config.json").write_text('{"data": {"name": "folder", "seed": 3, "length": null}}')
    assert trained_on(str(tmp_path / "run"), "folder", "x", 32).seed == 3
    assert trained_on(str(tmp_path / "run"), "shapes", "", 32).seed == 0  # other data
    shutil.copytree(model, tmp_path / "run/checkpoints/step-00000004")  # a run that has not ended
    for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(tmp_path / "run" / part)
    assert trained_on(str(tmp_path / "run"), "folder", "x", 32).seed == 3


def test_another_evaluation_is_compared_with_where_it_may_be(done, model, tmp_path, monkeypatch):
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    config = config_for(tmp_path / "other", baseline=str(done), guidance=(1.0,))
    evaluate(config, tmp_path / "out", "cpu")
    best = best_guidance(results_of(done))
    for metric in ("frechet_distance", "clip_cosine", "cmmd"):
        ours, theirs = one(tmp_path / "out", metric, "samples"), one(done, metric, "samples", guidance=best)
        record = one(tmp_path / "out", metric, "baseline")
        assert record["value"] == theirs["value"] and record["ratio"] == ours["value"] / theirs["value"]
    assert f"<h2>Against {model}</h2>" in (tmp_path / "out/report.html").read_text()
    for changes, words in (
        ({"num": 18}, "num 16, here 18"),
        ({"seed": 1}, "seed 0, here 1"),
        ({"features": "effnet-lite0"}, "not with effnet-lite0"),
        ({"baseline": str(tmp_path)}, "metrics.json' does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(replace(config, **changes), tmp_path / "new", "cpu")
        assert not (tmp_path / "new").exists()
