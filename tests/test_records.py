"""Records of an evaluation: what they are of, and when two of them compare."""

import math

import numpy as np
import pytest
import torch
from test_metrics_sets import normal

from ldm.config import UserError
from ldm.evaluate.records import alignment_records, class_records, frechet_records, picture_records, ratio
from ldm.metrics import cosine, frechet_distance, frechet_distance_infinite, inception_score


def test_interval_of_the_inception_score_holds_its_spread_over_new_samples():
    new = [(2 * normal(200, 10, seed)).softmax(1) for seed in range(60)]
    (record,) = class_records(new[0], "samples", {})
    low, high = record["interval"]
    spread = np.quantile([inception_score(p)[0] for p in new], [0.025, 0.975])
    assert low < record["value"] < high
    assert 0.6 < (high - low) / (spread[1] - spread[0]) < 1.7


def test_records_say_what_they_are_of_and_unlike_ones_are_not_compared():
    x, y = normal(300, 6, 0), normal(300, 6, 1)
    about = {"extractor": "net", "extractor_sha256": "5" * 64, "resize": "32 px, bicubic"}
    both = lambda a, b: [*frechet_records(a, b, "samples", about), *picture_records(a, b, "samples", about)]  # noqa: E731
    found = {r["metric"]: r for r in both(x, y)}
    assert found["frechet_distance"]["value"] == frechet_distance(x, y) and not found["frechet_distance"]["biased"]
    assert found["frechet_distance_infinite"]["value"] == frechet_distance_infinite(x, y)
    assert {"kernel_distance", "precision", "recall", "density", "coverage"} <= found.keys()
    assert all(r["n"] == 300 and r["extractor"] == "net" and r["of"] == "samples" for r in found.values())
    few = {r["metric"]: r for r in both(x[:11], y[:11])}
    assert (
        few["frechet_distance_infinite"]["value"] is None and "12 pictures" in few["frechet_distance_infinite"]["note"]
    )
    a = found["frechet_distance"]
    assert ratio(a, a | {"of": "real train", "value": 2 * a["value"]}) == 0.5
    assert math.isnan(ratio(a, a | {"value": -0.1}))  # a kernel distance may be below 0
    for key, value in (("n", 299), ("extractor", "other"), ("resize", "64 px"), ("extractor_sha256", "6" * 64)):
        with pytest.raises(UserError, match=f"do not compare: {key} "):
            ratio(a, a | {key: value})
    with pytest.raises(UserError, match="metric frechet_distance and precision"):
        ratio(a, found["precision"])


def test_alignment_records_are_scales_of_one_cosine():
    texts = normal(200, 32, 0)
    images = texts + 3 * normal(200, 32, 1)
    right = cosine(images, texts)
    found = {r["metric"]: r for r in alignment_records(images, texts, torch.eye(200) > 0, "samples", {})}
    assert found["clip_score"]["value"] == pytest.approx(2.5 * right.clamp_min(0).mean().item())
    assert found["clip_score_100"]["value"] == pytest.approx(40 * found["clip_score"]["value"])
    low, high = found["clip_cosine"]["interval"]
    assert low < found["clip_cosine"]["value"] < high
    assert found["clip_cosine"]["value"] == pytest.approx(right.mean().item())
    assert [found[f"text_to_image@{k}"]["chance"] for k in (1, 5)] == pytest.approx([1 / 200, 5 / 200])
