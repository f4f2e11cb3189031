"""What layers do in another way for speed is what torch's own operations do, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import normal

from ldm.layers import Attention, GroupNorm, Upsample, attend, doubled, padded, pointwise, widen


def assert_alike(ours, theirs, *inputs):
    """Equal outputs and gradients of all inputs, for the same random weights of the output."""
    a, b = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    weights = normal(*a.shape, seed=9)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), inputs) for x in (a, b))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(4, 6), (32, 40)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_doubling_is_nearest_neighbours_and_a_convolution(size, layout):
    layer = Upsample(6)

    def plain(x, weight, bias):
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)

    def ours(x, weight, bias):
        return torch.func.functional_call(layer, {"conv.weight": weight, "conv.bias": bias}, (x,))

    x = normal(2, 6, *size).contiguous(memory_format=layout)
    assert_alike(ours, plain, *(given.requires_grad_() for given in (x, normal(6, 6, 3, 3, seed=2), normal(6, seed=3))))


def test_a_doubled_kernel_is_exact_for_whole_numbers():
    kernel, x = torch.randint(-9, 9, (5, 3, 3, 3)).double(), torch.randint(-9, 9, (2, 3, 7, 4)).double()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), kernel, padding=1)
    assert torch.equal(F.conv_transpose2d(x, doubled(kernel), stride=2, padding=1), expected)


@pytest.mark.parametrize("channels", [4, 12, 16, 24])
@pytest.mark.parametrize("positions", [16, 256])
def test_attention_of_narrow_heads(channels, positions):
    q, k, v = (normal(2, 3, n, channels, seed=i).requires_grad_() for i, n in enumerate((positions, 9, 9)))
    assert_alike(attend, F.scaled_dot_product_attention, q, k, v)


@torch.no_grad()
@pytest.mark.parametrize("length", [16, 77])
@pytest.mark.parametrize("channels", [4, 15, 16])
def test_keys_that_are_added_get_no_weight(length, channels):
    q, k, v = (
        normal(2, 3, 9, channels),
        9 * normal(2, 3, length, channels, seed=2),
        normal(2, 3, length, channels, seed=3),
    )
    more, values = padded(k, v)
    assert (more.shape[2] % 16 == 0 and more.shape[3] == 16) or channels == 16
    torch.testing.assert_close(attend(q, more, values), F.scaled_dot_product_attention(q, k, v))


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 9])
def test_attention_weights_are_those_that_it_uses(length):
    attention = Attention(16, 4, context_channels=6)
    x, context = normal(2, 10, 16), normal(2, length, 6, seed=1)
    prepared = attention.prepare(context)
    assert prepared[0].ndim == (3 if length == 3 else 4)
    weights = attention.weights(x, prepared[0])
    assert length == 3 or not weights[..., length:].any()
    weights = weights[..., :length]
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 10, 4))
    values = attention.split(attention.to_v(context))
    expected = attention.to_out[0](torch.einsum("bnhl,bhld->bnhd", weights, values).flatten(2))
    torch.testing.assert_close(attention(x, prepared), expected)
    torch.testing.assert_close(attention(x, context), expected)


@pytest.mark.parametrize("size", [(4, 4), (20, 20)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_in_every_layout(size, layout):
    layer, x = GroupNorm(4, 8), normal(2, 8, *size).contiguous(memory_format=layout).requires_grad_()
    assert_alike(layer, lambda x: F.group_norm(x, 4, layer.weight, layer.bias, layer.eps), x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pointwise_is_a_convolution(layout):
    layer, x = torch.nn.Conv2d(6, 5, 1), normal(2, 6, 3, 4).contiguous(memory_format=layout).requires_grad_()
    assert_alike(lambda x: pointwise(layer, x), layer, x)


def test_widening_repeats_the_whole_batch():
    x = torch.arange(2)[:, None]
    assert widen(x, 6).flatten().tolist() == [0, 1, 0, 1, 0, 1]
    assert widen(x, 2) is x
