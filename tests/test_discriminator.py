"""The patch discriminator: shapes, receptive field, independence of pictures, learning, refusals."""

import pytest
import torch

from ldm.discriminator import PatchDiscriminator


@pytest.mark.parametrize(("size", "layers", "side"), [(32, 3, 2), (64, 3, 6), (24, 3, 1), (32, 2, 6), (256, 3, 30)])
def test_one_logit_for_each_patch(size, layers, side):
    net = PatchDiscriminator(channels=8, layers=layers)
    assert net(torch.zeros(1, 3, size, size)).shape == (1, 1, side, side)


def test_pictures_are_judged_alone():
    torch.manual_seed(0)
    net = PatchDiscriminator(channels=8).train()
    x = torch.randn(3, 3, 32, 32)
    together, alone = net(x), torch.cat([net(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not list(net.buffers())


def test_receptive_field_is_70_pixels():
    torch.manual_seed(0)
    net = PatchDiscriminator(channels=4)
    # without the normalization, which sees the whole picture
    net.net = torch.nn.Sequential(*[m for m in net.net if not isinstance(m, torch.nn.GroupNorm)])
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    net(x)[0, 0, 15, 15].backward()
    seen = x.grad.abs().sum((0, 1))
    assert (seen.sum(0) > 0).sum() == 70 and (seen.sum(1) > 0).sum() == 70
