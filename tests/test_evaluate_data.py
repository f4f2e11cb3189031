"""What a model is evaluated with: its judge, groups that captions name, data that are missing or broken."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_evaluation
import torch
from PIL import Image
from tiny_evaluation import OPENED, N, captions, config_for, fill, image_text, one, report, results

from ldm.clip import CLIP, VisionConfig
from ldm.commands.evaluate import main
from ldm.config import UserError, comments
from ldm.evaluate.config import AutoencoderEvaluation, EvaluateConfig, FolderEvaluation
from ldm.evaluate.evaluation import pose_cases
from ldm.evaluate.model import evaluate
from ldm.evaluate.pictures import data_config, sample_indices
from ldm.evaluate.records import judge_fault
from ldm.metrics import features
from ldm.metrics.compositional import TASKS
from ldm.pipeline import Pipeline

model, networks = tiny_evaluation.model, tiny_evaluation.networks


def test_a_judge_must_know_the_pictures_and_not_be_the_models_own(model, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        knowing = tiny_evaluation.knows_shapes()
        ignorant = image_text("ignorant", knowing.images, lambda texts: torch.ones(len(texts), 192))
        patch.setattr(OPENED, lambda name: ignorant)
        with pytest.raises(UserError, match="'ignorant' finds the right one of 16 real pictures .* --judge none"):
            evaluate(config_for(model, tmp_path / "out"))
    pipe = Pipeline.from_pretrained(model)
    vision = VisionConfig(image_size=32, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    clip = CLIP(replace(pipe.text_encoder.config, projection_dim=512), vision)
    clip.text_model = pipe.text_encoder.text_model
    clip.save_pretrained(tmp_path / "judge")
    pipe.tokenizer.save_pretrained(tmp_path / "judge")
    for name, changes, words in (
        (tmp_path, {}, "would judge itself"),
        (f"clip:{tmp_path / 'judge'}", {}, "would judge itself"),  # by transformers it is the same encoder
        (tmp_path, {"split": "val"}, "learned from the validation split"),
        ("none", {"features": "judge"}, "there is none"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(config_for(model, tmp_path / "out", judge=str(name), **changes))
    assert not (tmp_path / "out").exists()
    base = {"extractor": "net", "n": 480, "of": "real held-out"}
    assert judge_fault(base | {"value": 0.7, "chance": 1 / 480}) == ""
    assert "0.3% (chance 0.2%, 10.0% needed)" in judge_fault(base | {"value": 0.003, "chance": 1 / 480})


def noise(root: Path, shared: int = 0, count: int = N) -> Path:
    """Folders train and test of noise, the first `shared` pictures the same in both."""
    for seed, split in enumerate(("test", "train")):
        fill(root / split, count, seed, text="noise" if split == "test" else "other noise")
    for i in range(shared):
        Image.open(root / f"test/{i:03d}.png").save(root / f"train/{i:03d}.bmp")
        (root / f"train/{i:03d}.png").unlink()
        (root / f"train/{i:03d}.txt").write_text(f"noise {i}")
    return root


def of_folder(model: Path, data: Path, out: Path, **changes) -> EvaluateConfig:
    return config_for(model, out, data="folder", data_path=str(data), guidance=(2.0,), **{"judge": ""} | changes)


def test_training_pictures_may_be_missing_broken_or_held_out_ones(model, tmp_path):
    data, out = noise(tmp_path / "data", shared=3), tmp_path / "out"
    with pytest.warns(UserWarning, match="3 of the 16 held-out pictures are in the training set"):
        evaluate(of_folder(model, data, out))
    assert one(out, "memorized", "samples")["held_out_in_train"] == 3 and not (out / "cases").exists()
    (tmp_path / "run").mkdir()
    shutil.copytree(model, tmp_path / "run", dirs_exist_ok=True)
    (tmp_path / "run/config.json").write_text('{"data": {"name": "folder", "max_broken": 1.0}}')
    for file in sorted((data / "train").glob("*.png"))[:9]:
        file.write_bytes(file.read_bytes()[:600])
    evaluate(of_folder(tmp_path / "run", data, tmp_path / "few"))
    (floor,) = [r for r in results(tmp_path / "few") if r["of"] == "real train"]
    assert floor["value"] is None and floor["note"] == "only 7 training pictures can be read, and 16 are needed"
    text = report(tmp_path / "few")
    assert captions(tmp_path / "few/pictures/g2")[0] in text
    assert "floor at this N: unknown, only 7 training" in text and "Link by link" not in text


def test_held_out_pictures_may_be_broken_and_too_few_for_the_features(model, tmp_path, monkeypatch):
    monkeypatch.setitem(features.EXTRACTORS, "stub", lambda where: tiny_evaluation.stub_extractor(6))  # 108 features
    data, out = noise(tmp_path / "data", count=101), tmp_path / "out"
    (data / "test/007.png").write_bytes((data / "test/007.png").read_bytes()[:600])
    Image.new("RGB", (24, 24), "red").save(data / "test/009.png")
    lines, text = evaluate(of_folder(model, data, out, num=101, judge="none")), report(out)
    left, distance = one(out, "left_out", "data"), one(out, "frechet_distance", "samples")
    assert (left["value"], left["n"]) == (1, 101) and "007.png" in left["note"] and distance["n"] == 100
    assert "1 of 101 samples of the data could not be used, the first: " in text and "1 of 100 real held-out" in text
    assert {"left out of data (N=101): 1", "blank pictures of real held-out (N=100): 1"} <= set(lines)
    needs = "needs 109 pictures on both sides, one more than features, for less bias"
    assert distance["biased"] and distance["note"] == needs and needs in text
    assert any(line.startswith(f"Frechet distance is biased: it {needs}") for line in lines)


def test_data_are_those_of_the_models_run_and_fewer_begin_more(model, tmp_path):
    assert data_config("shapes", "shapes", "", 32).length == 100_000
    assert data_config(str(model), "shapes", "", 32).length is None
    checkpoint = tmp_path / "run/checkpoints/step-00000004"  # of a run that has not ended
    shutil.copytree(model, checkpoint)
    (tmp_path / "run/config.json").write_text('{"data": {"name": "folder", "seed": 3, "length": null}}')
    assert data_config(str(tmp_path / "run"), "folder", "x", 32).seed == 3
    assert data_config(str(tmp_path / "run"), "shapes", "", 32).seed == 0  # other data
    assert sample_indices(2000, 16, 3) == sample_indices(2000, 40, 3)[:16]
    few, many = pose_cases(24, 0), pose_cases(72, 0)
    kinds = [(case.task, case.held_out) for case in many]
    assert few == many[:24] and all(kinds.count((task, half)) == 6 for task in TASKS for half in (False, True))


def test_evaluations_need_their_packages(monkeypatch):
    monkeypatch.setattr("ldm.evaluate.report.find_spec", lambda name: None if name == "matplotlib" else name)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", "shapes", "--data", "shapes", "--out", "new"])
    with pytest.raises(UserError, match=r"need matplotlib: pip install 'ldm\[evaluate\]'"):
        main()


@pytest.mark.parametrize("options", [EvaluateConfig, AutoencoderEvaluation, FolderEvaluation])
def test_every_option_has_its_help(options):
    assert all(comments(options).values())
