"""The protocol, from the command to metrics.json: guidance is chosen on validation and reported on test, kinds of
picture and training captions are measured apart, further samplers and steps are points of a curve, and a network that
trained the VAE is marked."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_evaluation
import torch
from tiny_evaluation import OPENED, N, captions, fill, image_text, kept, one, report, results, stub_extractor, to_x

from ldm.commands.evaluate import main
from ldm.config import UserError
from ldm.data.emoji import Emoji
from ldm.data.shapes import Shapes
from ldm.evaluate.evaluation import pose_cases
from ldm.evaluate.pictures import sample_indices
from ldm.metrics import frechet_distance, retrieval
from ldm.metrics.attributes import ATTRIBUTES
from ldm.metrics.compositional import TASKS, check, tally
from ldm.metrics.intervals import mean_interval
from ldm.pipeline import Pipeline
from ldm.unet import UNet

model, networks = tiny_evaluation.model, tiny_evaluation.networks


def run(out: Path, model: Path, *options: object) -> dict:
    """The settings in metrics.json after the command."""
    base = ["--model", model, "--num", N, "--steps", 1, "--features", "stub", "--train-num", 40, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.evaluate.model.TIMED", 1)
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, [*base, "--out", out, *options])])
        main()
    return json.loads((out / "metrics.json").read_text())["settings"]


def guidances(out: Path, of: str) -> set[float]:
    return {r["guidance"] for r in results(out) if r["of"] == of}


@pytest.fixture(scope="module")
def chosen(model, networks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("chosen") / "out"
    options = "--data shapes --judge knows-shapes --guidance 1,2,3 --train-captions 20"
    run(out, model, *options.split())
    return out


def test_guidance_is_chosen_on_validation_and_one_value_reported_on_test(chosen):
    settings = json.loads((chosen / "metrics.json").read_text())["settings"]
    choice, posed = settings["guidance_choice"], pose_cases(N, 1)
    scores = {}
    for g in (1, 2, 3):
        images = ((kept(chosen / f"validation/cases/g{g}") + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        scores[g] = tally([check(x, c.required) for x, c in zip(images, posed, strict=True)], posed)["mean"]["all"]
        r = one(chosen, "compositional_score", "validation samples", guidance=float(g))
        assert r["value"]["mean"]["all"] == scores[g] and r["curve"]
    best = max(scores, key=lambda g: (scores[g], -g))
    want = {"split": "val", "values": [1, 2, 3], "value": best, "criterion": "compositional_score", "times": 1}
    assert choice.items() >= want.items() and choice["n"] == 2 * len(TASKS)
    assert guidances(chosen, "samples") == {best} and guidances(chosen, "validation samples") == {1, 2, 3}
    assert not any("curve" in r for r in results(chosen) if r["of"] != "validation samples")
    assert [path.name for path in (chosen / "pictures").iterdir()] == [f"g{best}"]
    val = Shapes(32, "val")
    asked = zip(captions(chosen / "validation/pictures/g2"), sample_indices(len(val), N, 0), strict=True)
    assert all(text in val.captions(i) for text, i in asked)
    assert {*captions(chosen / "cases" / f"g{best}")} != {*captions(chosen / "validation/cases/g1")}
    assert settings.items() >= {"device": "cpu", "features": "stub", "judge": "knows-shapes", "notes": []}.items()
    train, training = Shapes(32, "train"), captions(chosen / f"training/pictures/g{best}")
    assert all(t in train.captions(i) for t, i in zip(training, sample_indices(len(train), 20, 0), strict=True))
    assert f"Guidance {best} was chosen among 3 by compositional score on 12 cases of split val" in report(chosen)


def test_a_small_validation_split_is_asked_several_times_and_none_is_said(model, tmp_path):
    for split, count in (("train", N), ("val", N), ("test", 2 * N)):
        fill(tmp_path / "data" / split, count, len(split), text=split)
    options = ["--data", "folder", "--data-path", tmp_path / "data", "--judge", "none", "--num", 2 * N]
    choice = run(tmp_path / "out", model, *options, "--guidance", "1,2")["guidance_choice"]
    assert choice.items() >= {"times": 2, "criterion": "frechet_distance", "n": 2 * N, "note": ""}.items()
    folder = tmp_path / "out/validation/pictures/g1"
    assert captions(folder)[:N] == captions(folder)[N:] and (kept(folder)[:N] != kept(folder)[N:]).any()
    real = to_x(tiny_evaluation.read(path) for path in sorted((tmp_path / "data/val").glob("*.png")))
    real = torch.nn.functional.interpolate(real, size=(32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
    net, record = stub_extractor(), one(tmp_path / "out", "frechet_distance", "validation samples", guidance=1.0)
    assert record["value"] == pytest.approx(frechet_distance(net(kept(folder)), net(real)), rel=0.02)
    for path in sorted((tmp_path / "data/val").iterdir())[2:]:
        path.unlink()
    with pytest.warns(UserWarning, match="themselves, as split 'val' of folder has 1 of the 16 or more"):
        run(tmp_path / "few", model, *options, "--guidance", "1,2")
    for path in (tmp_path / "data/val").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="the guidance is chosen on the reported captions themselves, as"):
        choice = run(tmp_path / "test", model, *options, "--guidance", "1,2")["guidance_choice"]
    assert choice["split"] == "test" and "themselves, as no pictures in" in choice["note"]
    assert "The guidance is chosen on the reported captions themselves" in report(tmp_path / "test")
    assert {r["guidance"] for r in results(tmp_path / "test") if "curve" in r} == {1, 2} - {choice["value"]}
    choice = run(tmp_path / "none", model, *options, "--guidance", "2,1", "--choose-on", "none")["guidance_choice"]
    assert (choice["split"], choice["value"]) == (None, 2) and guidances(tmp_path / "none", "samples") == {1, 2}


def test_emoji_are_reported_by_kind_with_intervals_over_concepts_and_by_group(tmp_path, monkeypatch):
    """With a judge that sees how dark a picture is; captions of emoji name skin tones."""
    tones = list(ATTRIBUTES[0].values)

    def embed(angle: torch.Tensor) -> torch.Tensor:
        return torch.stack([angle.cos(), angle.sin()], 1)

    def words(captions: list[str]) -> torch.Tensor:
        return embed(torch.tensor([tones.index(ATTRIBUTES[0].named(c) or "light") for c in captions]) / -5)

    tiny_evaluation.tiny_pipeline(size=4).save_pretrained(tmp_path / "model")
    judge = image_text("sees-dark", lambda x: embed(x.mean((1, 2, 3))), words)
    monkeypatch.setattr(OPENED, lambda name: judge)
    monkeypatch.setattr("ldm.evaluate.records.MOST", 0.0)
    monkeypatch.setattr("ldm.evaluate.probes.AVERAGED", 8)
    out = tmp_path / "out"
    options = "--data emoji --judge sees-dark --num 60 --guidance 2 --train-captions 8 --train-num 60"
    settings = run(out, tmp_path / "model", *options.split())
    assert settings["intervals_over"] == "concepts" and settings["guidance_choice"]["split"] is None
    test, images, texts = Emoji(16, "test"), judge.images(kept(out / "pictures/g2")), captions(out / "pictures/g2")
    indices, averaged = sample_indices(len(test), 60, 0), []
    for kind in ("people", "faces and hands", "animals and food", "objects", "flags", "symbols"):
        rows = [k for k, i in enumerate(indices) if test.kind(i) == kind]
        same = [[bool({*test.captions(indices[a])} & {*test.captions(indices[b])}) for b in rows] for a in rows]
        scores = retrieval(images[rows], judge.texts([texts[k] for k in rows]), k=(1,), same=torch.tensor(same))
        for metric in ("image_to_text@1", "text_to_image@1"):
            r = one(out, f"kind_{metric}", "samples", kind=kind)
            assert (r["value"], r["n"]) == (pytest.approx(scores[metric]), len(rows))
        averaged += [scores["image_to_text@1"]] * (len(rows) >= 8)
        assert one(out, "kind_image_to_text@1", "real training", kind=kind)["n"] == 8
    mean = one(out, "mean_kind_image_to_text@1", "samples")
    assert mean["value"] == pytest.approx(np.mean(averaged)) and len(mean["kinds"]) == len(averaged) < 6
    assert mean["interval"][0] <= mean["value"] <= mean["interval"][1]
    cosines, concepts = one(out, "clip_cosine", "samples"), [test.records[i]["concept"] for i in indices]
    assert cosines["interval"] == pytest.approx(mean_interval(cosines["each"], groups=concepts), abs=1e-5)
    records = [test.records[i] for i in indices]
    for tone in ("light", "dark"):
        mine = [r for r in results(out) if r.get("group") == tone and r["of"] == "real held-out"]
        assert {r["metric"] for r in mine} == {"group_clip_cosine", "group_paired", "group_diversity"}
        assert mine[0]["n"] == sum(r["skin_tone"] == tone for r in records)
    left_open = one(out, "left_open", "samples", attribute="skin tone")
    assert sum(left_open["value"].values()) == pytest.approx(1)
    prompts = captions(out / "open/skin-tone/g2")
    assert len(prompts) == left_open["n"] and not any("skin tone" in prompt for prompt in prompts)
    new, samples = [r for r in results(out) if r["metric"] == "new_combinations"]
    assert new["n"] == samples["n"] == sum(r["held_out"] == "combination" for r in records)
    assert 0 < new["every"] <= new["value"] < 1  # it cannot tell genders
    titles = ">By kind</h2>", ">Training captions</h2>", ">Groups<", ">No skin tone asked for<", "how often all"
    assert all(words in report(out) for words in titles)


def test_a_network_that_trained_the_vae_is_marked(model, tmp_path):
    options = ["--data", "shapes", "--judge", "none", "--guidance", 1, "--train-captions", 0]
    (tmp_path / "run").symlink_to(model)
    assert run(tmp_path / "out", tmp_path / "run", *options)["perceptual_net_of_vae"] == "unknown"
    assert not any("trained_the_vae" in r for r in results(tmp_path / "out"))
    taught = Pipeline.from_pretrained(model)
    taught.vae.perceptual_net = "stub, lpips-vgg"
    taught.save_pretrained(tmp_path / "taught")
    settings = run(tmp_path / "out", tmp_path / "taught", *options)
    assert settings["perceptual_net_of_vae"] == "stub, lpips-vgg"
    assert one(tmp_path / "out", "frechet_distance", "samples")["trained_the_vae"]
    assert "trained to please this very network" in report(tmp_path / "out")


def test_further_samplers_and_steps_are_points_of_a_curve(model, tmp_path, monkeypatch, capsys):
    options = ["--data", "shapes", "--judge", "knows-shapes", "--guidance", "2", "--train-captions", "0"]
    run(tmp_path / "alone", model, *options)  # at 1 step
    out, passes, forward = tmp_path / "out", [], UNet.forward
    settings = run(out, model, *options, "--steps", 2)
    alone, before = ([r for r in results(each) if "threads" not in r] for each in (tmp_path / "alone", out))
    monkeypatch.setattr(UNet, "forward", lambda self, z, *rest: passes.append(len(z)) or forward(self, z, *rest))
    assert run(out, model, *options, "--steps", "2,1", "--sampler", "ddim,heun") == settings
    counted = {(r["sampler"], r["steps"]): r["value"] for r in results(out) if r["metric"] == "model_passes"}
    assert counted == {("ddim", 2): 4, ("ddim", 1): 2, ("heun", 2): 6, ("heun", 1): 2}
    # only the pictures of the curve were missing; one more of each is timed, and one of the reported is before that
    assert sum(passes) == (2 + 6 + 2) * (N + 2 * len(TASKS) + 1) + 2 * 4
    after = [r for r in results(out) if "threads" not in r and r["metric"] != "model_passes"]
    assert [r for r in after if "curve" not in r] == before
    points = [r for r in after if r["of"] == "1-step ddim samples"]
    assert {"compositional_score", "frechet_distance", "image_to_text@1"} < {r["metric"] for r in points}
    samples = {r["metric"]: r for r in alone if r["of"] == "samples"}
    assert all(r == samples[r["metric"]] | {"of": r["of"], "curve": True} for r in points)
    seconds = [r for r in results(out) if r["metric"] == "seconds_per_picture"]
    assert [r.get("curve", False) for r in seconds] == [False, True, True, True]
    assert {path.name for path in (out / "cases").iterdir()} == {"g2", "g2-ddim-1", "g2-heun-2", "g2-heun-1"}
    assert "<td>heun</td><td>2</td><td>6</td>" in report(out) and ">Model passes</h2>" in report(out)
    assert "\nheun, steps 2: model passes 6; exactly right, % " in capsys.readouterr().out
    for wrong, words in (
        (("--steps", "8,51", "--sampler", "ddim,lcm"), "steps 51 is out of range for lcm; allowed: 1 to 50"),
        (("--steps", "8,1001"), "steps 1001 is out of range for ddim"),
        (("--sampler", "ddim,"), "sampler '' is unknown"),
        (("--steps", "8,x"), "--steps is .8,x.; it must be whole numbers, e.g. 8,30"),
        (("--steps", ""), "--steps  is not allowed; use whole numbers of 1 or more"),
    ):
        with pytest.raises(UserError, match=words):
            run(tmp_path / "new", model, *options, *wrong)
        assert not (tmp_path / "new").exists()
