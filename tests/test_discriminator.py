"""The patch discriminator: shapes, receptive field, independence of pictures, learning, refusals."""

import pytest
import torch

from ldm.config import UserError
from ldm.discriminator import PatchDiscriminator
from ldm.losses import hinge_discriminator, hinge_generator


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


def test_learns_to_tell_two_sets_apart():
    torch.manual_seed(0)
    net = PatchDiscriminator(channels=8, layers=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    real = torch.linspace(-1, 1, 32).expand(8, 3, 32, 32)
    fake = real + 0.2 * torch.randn(8, 3, 32, 32)
    for _ in range(30):
        loss = hinge_discriminator(net(real), net(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net(real).mean() > net(fake).mean() + 1


def test_generator_step_reaches_the_picture_and_spares_a_frozen_discriminator():
    net = PatchDiscriminator(channels=8).requires_grad_(False)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    hinge_generator(net(x)).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())


def test_refusals_name_the_value():
    with pytest.raises(UserError, match="16x20 pixels"):
        PatchDiscriminator(channels=8)(torch.zeros(1, 3, 20, 16))
    with pytest.raises(UserError, match="6 channels"):
        PatchDiscriminator(channels=6)
