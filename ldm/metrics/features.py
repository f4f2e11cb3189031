"""Feature networks by name, for distances between sets of pictures."""

import hashlib

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import UserError
from ldm.perceptual import EFFNET_MEAN, EFFNET_STD, effnet_lite0_file, effnet_lite0_stages


class FeatureExtractor(nn.Module):
    """Pictures -> features by a frozen network, always in eval mode.

    Carries what a number must be printed with: `name`, `sha256` of the weights file, `size` in pixels that
    pictures are resized to, and the `resize` filter.
    """

    def __init__(self, name: str, sha256: str, size: int, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.name, self.sha256, self.size = name, sha256, size
        self.resize = "bicubic, antialiased"
        self.network = network
        self.register_buffer("mean", rearrange(mean, "c -> c 1 1"))
        self.register_buffer("std", rearrange(std, "c -> c 1 1"))
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in eval mode, even where a parent module is switched to training."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1], any size -> features (B, D), float32; ValueError for other input."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"pictures must be (B, 3, H, W), not {tuple(x.shape)}")
        if not x.is_floating_point() or x.abs().amax() > 1.001:
            raise ValueError(f"pictures must be floats in [-1, 1], not {x.dtype} up to {float(x.abs().amax()):.3g}")
        x = F.interpolate(x.float(), size=(self.size, self.size), mode="bicubic", antialias=True)
        return self.network((x.clamp(-1, 1) - self.mean) / self.std)  # bicubic overshoots at edges


def feature_extractor(name: str) -> FeatureExtractor:
    """The extractor `name`, one of EXTRACTORS, on the CPU; UserError for other names or missing weights."""
    if name not in EXTRACTORS:
        raise UserError(f"unknown feature network {name!r}; known: {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]()


def _effnet_lite0() -> FeatureExtractor:
    """EfficientNet-Lite0's pooled last layer, 1280 features, at its own 224 pixels."""
    sha256 = hashlib.sha256(effnet_lite0_file().read_bytes()).hexdigest()
    network = nn.Sequential(*effnet_lite0_stages(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return FeatureExtractor("effnet-lite0", sha256, 224, network, EFFNET_MEAN, EFFNET_STD)


EXTRACTORS = {"effnet-lite0": _effnet_lite0}
