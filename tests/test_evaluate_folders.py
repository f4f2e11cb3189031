"""Evaluating two folders: their numbers are those of their pictures, and features are computed once."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_evaluation
import torch
from PIL import Image
from tiny_evaluation import OPENED, fill, image_text, kept, one, read, report, results, stub_extractor, to_x

from ldm.config import UserError
from ldm.evaluate.config import FolderEvaluation
from ldm.evaluate.folders import evaluate_folders
from ldm.metrics import frechet_distance, kernel_distance, precision_recall
from ldm.metrics.features import EXTRACTORS

networks = tiny_evaluation.networks


@torch.no_grad()
def test_numbers_are_those_of_the_pictures_whatever_their_order(tmp_path, monkeypatch):
    a, b, net, out = fill(tmp_path / "a", 20, 0), fill(tmp_path / "b", 18, 1), stub_extractor(), tmp_path / "out"
    config = FolderEvaluation(images=a, reference=b, features="stub", out=out)
    lines = evaluate_folders(config)
    assert any(line.startswith("frechet distance of images (stub, N=18): ") for line in lines)
    assert "blank pictures of images (N=20): 0" in lines
    x, y = net(kept(a)), net(kept(b))
    assert one(out, "frechet_distance", "images")["value"] == pytest.approx(frechet_distance(x, y), rel=1e-4)
    near = one(out, "kernel_distance", "images")
    want = kernel_distance(x, y, 1, 18)[0]  # of subsets in another order, hence about
    assert near["value"] == pytest.approx(want, abs=0.5 * near["deviation"]) and near["subset_size"] == 9
    fields = [near[key] for key in ("n", "n_images", "n_reference", "extractor", "against")]
    assert fields == [18, 20, 18, "stub", "reference"]
    for name, value in precision_recall(y, x).items():
        assert one(out, name, "images")["value"] == pytest.approx(value)
    text = report(out)
    assert text.count("data:image/png") == 38 and "The folders differ in number" in text
    before = (out / "metrics.json").read_bytes()
    seen, kept_features = [], [*(out / "features").rglob("*.*")]
    network = stub_extractor()
    network.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setitem(EXTRACTORS, "stub", lambda where: network)
    evaluate_folders(config)
    assert seen == [1] and (out / "metrics.json").read_bytes() == before  # one picture, to see how many features
    for file in kept_features:
        file.write_bytes(b"damaged")
    evaluate_folders(config)
    assert sum(seen[1:]) == 39 and len(kept_features) == 2 and (out / "metrics.json").read_bytes() == before
    with pytest.raises(UserError, match="seed 0, not 1; use another --out"):
        evaluate_folders(replace(config, seed=1))


def test_names_of_any_bytes_come_through_to_the_report(tmp_path):
    odd = tmp_path / "caf\udce9"  # one byte, which is not UTF-8
    a, b = fill(odd / "a", 16, 0), fill(tmp_path / "b", 16, 1)
    (a / "000.png").rename(a / "caf\udce9.png")
    config = FolderEvaluation(images=a, reference=b, features="stub", out=odd / "out")
    evaluate_folders(config)
    evaluate_folders(config)
    assert r"caf\udce9/a against" in report(odd / "out")


def knows(*folders: Path):
    """A judge that has seen the pictures of folders, whose captions name them: "a 3" is a/003.png."""
    known = {f"{folder.name} {int(path.stem)}": read(path) for folder in folders for path in folder.glob("*.png")}
    embed = lambda x: torch.nn.functional.normalize(x.flatten(1), dim=1)  # noqa: E731
    return image_text("knows", embed, lambda texts: embed(to_x([known[text] for text in texts])), 24)


def test_alignment_is_of_each_folder_with_its_own_captions(tmp_path, monkeypatch):
    a, b = (fill(tmp_path / name, 20, seed, text=name) for seed, name in enumerate("ab"))
    monkeypatch.setattr(OPENED, lambda name: knows(a, b))
    config = FolderEvaluation(images=a, reference=b, features="none", judge="knows", out=tmp_path / "out")
    evaluate_folders(config)
    for of in ("images", "reference"):
        assert one(tmp_path / "out", "clip_cosine", of)["value"] == pytest.approx(1, abs=1e-5)
        assert one(tmp_path / "out", "image_to_text@1", of)["value"] == 1
    assert one(tmp_path / "out", "cmmd", "images")["value"] > 0
    same = image_text("same", lambda x: torch.ones(len(x), 4), lambda texts: torch.ones(len(texts), 4))
    monkeypatch.setattr(OPENED, lambda name: same)
    with pytest.warns(UserWarning, match="right one of 20 reference pictures .* 25.0% needed"):
        evaluate_folders(replace(config, out=tmp_path / "other"))
    (a / "003.txt").unlink()
    for images, reference, option in ((a, b, "images"), (b, a, "reference")):
        with pytest.raises(UserError, match=f"1 of 20 --{option} have no caption, '003.png' for one"):
            evaluate_folders(replace(config, images=images, reference=reference, out=tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    for file in a.glob("*.txt"):
        file.unlink()
    evaluate_folders(replace(config, out=tmp_path / "new"))
    assert "The images have no captions" in report(tmp_path / "new")


def test_other_sizes_are_resized_on_request_and_blank_pictures_counted(tmp_path):
    a, b, out = fill(tmp_path / "a", 16, 0), fill(tmp_path / "b", 16, 1, size=40), tmp_path / "out"
    Image.new("RGB", (24, 24), "red").save(a / "003.png")
    config = FolderEvaluation(images=a, reference=b, size=32, features="stub", without_frechet=True, out=out)
    evaluate_folders(config)
    assert one(out, "blank_pictures", "images")["value"] == 1
    assert not any(r["metric"].startswith("frechet") for r in results(out))
    assert "count in every number: 1 of 16 images." in report(out)
    Image.new("RGB", (30, 24)).save(a / "007.png")
    with pytest.raises(UserError, match="007.png' is 30x24 px, not 24x24"):
        evaluate_folders(replace(config, size=0, out=tmp_path / "new"))
