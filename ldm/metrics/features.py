"""Feature networks by name, for distances between sets of pictures.

    effnet-lite1          EfficientNet-Lite1, ImageNet, from an installed package: no download
    effnet-lite0          Lite0, which the VAE's default perceptual loss compares by
    inception[:FILE]      FID's own Inception, by torch-fidelity
    clip:FOLDER_OR_NAME   the image tower of a CLIP, by transformers
    dinov2:FOLDER_OR_NAME DINOv2, by transformers
    judge:FOLDER_OR_NAME  the image tower of an image-text model trained here to judge; "judge" alone: the evaluation's

A further network is one function and its entry in EXTRACTORS.
"""

import hashlib
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ldm.config import UserError
from ldm.images import to_uint8
from ldm.metrics.extractor import FeatureExtractor, preparation, pretrained
from ldm.metrics.inputs import resized
from ldm.metrics.judges import published_clip, trained_judge
from ldm.perceptual import EFFNET_MEAN, EFFNET_STD, effnet_file, effnet_lite

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")


def feature_extractor(name: str) -> FeatureExtractor:
    """The extractor `name` ("kind" or "kind:where") on the CPU. Raises UserError if unknown or without weights."""
    kind, _, where = name.partition(":")
    if kind not in EXTRACTORS:
        known = f"{', '.join(EXTRACTORS)}; those after the first two with :FILE or :FOLDER"
        raise UserError(f"unknown feature network {name!r}; known: {known}")
    return EXTRACTORS[kind](where)


def judged_by(features: str, judge: str) -> str:
    """The network that `features` names, where "judge" alone is the evaluation's judge (UserError without one)."""
    if features != "judge":
        return features
    if judge in ("", "none"):
        raise UserError("features 'judge' are the judge's, and there is none; name one: judge:FOLDER")
    return judge if judge.startswith(("clip:", "judge:")) else f"judge:{judge}"


def _effnet(version: int, size: int, where: str) -> FeatureExtractor:
    """The pooled last layer of EfficientNet-Lite, 1280 features, at the pixels of its training; ImageNet's classes."""
    name = f"effnet-lite{version}"
    if where:
        raise UserError(f"unknown feature network '{name}:{where}': {name} is in a package, takes no file")
    net, prepare = effnet_lite(version), resized(size, EFFNET_MEAN, EFFNET_STD)
    more = {"classifier": net._fc, "sha256": hashlib.sha256(effnet_file(version).read_bytes()).hexdigest()}
    return FeatureExtractor(name, net, size, lambda x: net.extract_features(prepare(x)).mean((2, 3)), **more)


def _inception(where: str) -> FeatureExtractor:
    """FID's graph and weights: 2048 pooled features of uint8 pictures, resized by it as TensorFlow 1 did."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    home = Path(torch.hub.get_dir()) / "checkpoints"
    files = [Path(where)] if where else [home / name for name in INCEPTION_FILES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        problem = f"{where!r} does not exist" if where else f"{INCEPTION_FILES[0]} is not in {str(home)!r}"
        raise UserError(
            f"Inception's weights: {problem}; put the file there (torch-fidelity 0.2.0 releases it), name it as"
            " inception:FILE, or use effnet-lite1, which needs no download"
        )
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 != INCEPTION_SHA256:
        raise UserError(f"{str(file)!r} has SHA-256 {sha256[:8]}..., expected {INCEPTION_SHA256[:8]}...: damaged?")
    with redirect_stdout(sys.stderr):
        net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    classes = nn.Linear(2048, 1008, bias=False)  # without the bias, as the Inception Score is usually computed
    classes.weight = net.fc.weight
    more = {"classifier": classes, "resize": "bilinear as in TensorFlow 1, not antialiased", "sha256": sha256}
    return FeatureExtractor("inception", net, 299, lambda x: net(to_uint8(x))[0], **more)


def _dinov2(where: str) -> FeatureExtractor:
    """The final CLS token of DINOv2 (Oquab et al. 2023)."""
    from transformers import AutoImageProcessor, Dinov2Model

    model = pretrained(Dinov2Model, where, "dinov2")
    size, prepare = preparation(AutoImageProcessor, where, "dinov2")
    return FeatureExtractor(f"dinov2:{where}", model, size, lambda x: model(prepare(x)).pooler_output)


EXTRACTORS: dict[str, Callable[[str], FeatureExtractor]] = {
    "effnet-lite1": partial(_effnet, 1, 240),
    "effnet-lite0": partial(_effnet, 0, 224),
    "inception": _inception,
    "clip": published_clip,
    "dinov2": _dinov2,
    "judge": trained_judge,
}
