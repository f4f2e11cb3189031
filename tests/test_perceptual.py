"""Perceptual distances: LPIPS against its package, gradients, ordering of distortions, refusals."""

import pytest
import torch
import torchvision

from ldm import perceptual
from ldm.config import UserError
from ldm.perceptual import perceptual_network

BACKBONES = {"lpips-vgg": ("vgg16", "vgg"), "lpips-alex": ("alexnet", "alex")}


@pytest.fixture(scope="module")
def effnet():
    return perceptual_network("effnet-lite0")


def discs(size: int) -> torch.Tensor:
    """Discs of four colours on a grey gradient, (4, 3, size, size) in [-1, 1]."""
    rows, columns = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    inside = (rows - 0.4) ** 2 + (columns - 0.5) ** 2 < 0.04
    colours = torch.rand((4, 3, 1, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.where(inside, colours, rows - 0.5)


def random_backbone(name: str, folder) -> str:
    """The file of random weights of the layers that count."""
    torch.manual_seed(0)
    with torch.device("meta"):
        features = getattr(torchvision.models, BACKBONES[name][0])().features
    state = {f"features.{k}": 0.05 * torch.randn(v.shape) for k, v in features.state_dict().items()}
    torch.save(state, folder / "weights.pth")
    return str(folder / "weights.pth")


@pytest.mark.parametrize("name", list(BACKBONES))
def test_lpips_equals_its_package(name, tmp_path, monkeypatch):
    import lpips

    path = random_backbone(name, tmp_path)
    ours = perceptual_network(name, path)
    backbone, net = BACKBONES[name]
    build = getattr(torchvision.models, backbone)

    def stand_in(pretrained: bool) -> torch.nn.Module:  # torchvision's, less the making of its classifier
        with torch.device("meta"):
            model = build()
        state = {k.removeprefix("features."): v for k, v in torch.load(path).items()}
        model.features.load_state_dict(state, assign=True)
        return model

    monkeypatch.setattr(lpips.pretrained_networks.tv, backbone, stand_in)
    theirs = lpips.LPIPS(net=net, verbose=False)
    torch.manual_seed(1)
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    expected = theirs(x, y).flatten()
    assert (expected > 1e-3).all()
    assert torch.allclose(ours(x, y), expected, rtol=1e-4, atol=1e-6)


def test_gradient_is_finite_where_features_are_all_zero(tmp_path):
    ours = perceptual_network("lpips-alex", random_backbone("lpips-alex", tmp_path))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()  # so every feature is exactly zero
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    ours(x, torch.zeros(1, 3, 64, 64)).sum().backward()
    assert x.grad.isfinite().all()


def test_gradient_reaches_the_picture_but_no_weight(effnet):
    x = discs(32).add(0.1).requires_grad_()
    effnet(x, discs(32)).sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in effnet.parameters())


def test_stages_equal_the_package_network_run_whole(effnet):
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    net.load_state_dict(torch.load(perceptual.effnet_file(0), weights_only=True))
    x = discs(64)
    with torch.no_grad():
        stages = torch.nn.Sequential(*perceptual.effnet_lite0_stages())
        assert torch.allclose(stages(x), net.extract_features(x), atol=1e-5)
    two = perceptual_network("effnet-lite0", depth=2)
    assert [torch.equal(a, b) for a, b in zip(two.features(x), effnet.features(x), strict=False)] == [True, True]


def test_other_weights_are_refused():
    with pytest.raises(UserError, match="holds no weights of effnet-lite0"):
        perceptual_network("effnet-lite0", __file__)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match="needs no download"):
        perceptual_network("lpips-alex")
