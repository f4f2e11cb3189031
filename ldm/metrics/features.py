"""Feature networks by name, for distances between sets of pictures.

    effnet-lite0          EfficientNet-Lite0, ImageNet, from an installed package: no download
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
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import UserError
from ldm.images import to_uint8
from ldm.metrics.judges import image_text_model, preparation, pretrained
from ldm.metrics.libraries import library
from ldm.metrics.preprocess import RESIZE, checked_batch, resized
from ldm.model_io import module_hash
from ldm.perceptual import EFFNET_MEAN, EFFNET_STD, effnet_lite0_file, effnet_lite0_network, effnet_lite0_stages

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")


class FeatureExtractor(nn.Module):
    """Pictures -> features by a frozen network, always in eval mode.

    `name`, `sha256` of the weights, `size` in pixels and `resize` filter belong beside every number of it (`about`).
    `prepare` makes the network's input from pictures in [-1, 1], `read` the features from its output, `classifier` the
    logits from the features, where the network knows classes.
    """

    def __init__(
        self,
        name: str,
        sha256: str,
        size: int,
        network: nn.Module,
        prepare: Callable[[Tensor], Tensor],
        resize: str = RESIZE,
        classifier: nn.Module | None = None,
        read: Callable[[Any], Tensor] = lambda output: output,
    ) -> None:
        super().__init__()
        self.name, self.sha256, self.size, self.resize = name, sha256, size, resize
        self.network, self.prepare, self.classifier, self.read = network, prepare, classifier, read
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in eval mode, even where a parent module is switched to training."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1], any size -> features (B, D), float32. Raises ValueError for other input."""
        return self.read(self.network(self.prepare(checked_batch(x)))).float()

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor | None:
        """Class probabilities (B, classes) of features (B, D); None for a network without classes."""
        return None if self.classifier is None else self.classifier(features).softmax(1)

    @property
    def about(self) -> dict[str, str]:
        """The fields that every number of these features carries."""
        return {"extractor": self.name, "extractor_sha256": self.sha256, "resize": f"{self.size} px, {self.resize}"}


def feature_extractor(name: str) -> FeatureExtractor:
    """The extractor `name` ("kind" or "kind:where"), on the CPU. Raises UserError for others and missing weights."""
    kind, _, where = name.partition(":")
    if kind not in EXTRACTORS:
        raise UserError(f"unknown feature network {name!r}; known: {', '.join(KNOWN)}")
    return EXTRACTORS[kind](where)


def judged_by(features: str, judge: str) -> str:
    """The network that `features` names, where "judge" alone is the evaluation's judge (UserError without one)."""
    if features != "judge":
        return features
    if judge in ("", "none"):
        raise UserError("features 'judge' are the judge's, and there is none; name one: judge:FOLDER")
    return judge if judge.startswith(("clip:", "judge:")) else f"judge:{judge}"


def _effnet_lite0(where: str) -> FeatureExtractor:
    """EfficientNet-Lite0's pooled last layer, 1280 features, at its own 224 pixels, with ImageNet's classes."""
    if where:
        raise UserError(f"unknown feature network 'effnet-lite0:{where}': effnet-lite0 is in a package, takes no file")
    network = nn.Sequential(*effnet_lite0_stages(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    sha256 = hashlib.sha256(effnet_lite0_file().read_bytes()).hexdigest()
    prepare, classes = resized(224, EFFNET_MEAN, EFFNET_STD), effnet_lite0_network()._fc
    return FeatureExtractor("effnet-lite0", sha256, 224, network, prepare, classifier=classes)


def _inception(where: str) -> FeatureExtractor:
    """FID's graph and weights: 2048 pooled features of uint8 pictures, resized by it as TensorFlow 1 did."""
    fidelity = library("torch_fidelity.feature_extractor_inceptionv3")
    home = Path(torch.hub.get_dir()) / "checkpoints"
    files = [Path(where)] if where else [home / name for name in INCEPTION_FILES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        problem = f"{where!r} does not exist" if where else f"{INCEPTION_FILES[0]} is not in {str(home)!r}"
        raise UserError(
            f"Inception's weights: {problem}; put the file there (torch-fidelity 0.2.0 releases it), name it as"
            " inception:FILE, or use effnet-lite0, which needs no download"
        )
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 != INCEPTION_SHA256:
        raise UserError(f"{str(file)!r} has SHA-256 {sha256[:8]}..., expected {INCEPTION_SHA256[:8]}...: damaged?")
    with redirect_stdout(sys.stderr):
        net = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    classes = nn.Linear(2048, 1008, bias=False)  # without the bias, as the Inception Score is usually computed
    classes.weight = nn.Parameter(net.fc.weight.detach().clone())
    resize = "bilinear as in TensorFlow 1, not antialiased"
    return FeatureExtractor("inception", sha256, 299, net, to_uint8, resize, classes, read=lambda outputs: outputs[0])


def _dinov2(where: str) -> FeatureExtractor:
    """The final CLS token of DINOv2 (Oquab et al. 2023)."""
    from transformers import AutoImageProcessor, Dinov2Model

    model = pretrained(Dinov2Model, where, "dinov2")
    size, prepare = preparation(pretrained(AutoImageProcessor, where, "dinov2"), where)
    name, read = f"dinov2:{where}", lambda output: output.pooler_output
    return FeatureExtractor(name, module_hash(model), size, model, prepare, read=read)


def _image_tower(kind: str, where: str) -> FeatureExtractor:
    model = image_text_model(f"{kind}:{where}")
    return FeatureExtractor(model.name, model.sha256, model.size, model, nn.Identity())


EXTRACTORS: dict[str, Callable[[str], FeatureExtractor]] = {
    "effnet-lite0": _effnet_lite0,
    "inception": _inception,
    "clip": partial(_image_tower, "clip"),
    "dinov2": _dinov2,
    "judge": partial(_image_tower, "judge"),
}
KNOWN = ("effnet-lite0", "inception", "inception:FILE", "clip:FOLDER", "dinov2:FOLDER", "judge:FOLDER")
