"""Muon against torch's own, the polar factor, and what it must leave alone."""

import pytest
import torch
from torch import nn

from ldm.train.muon import Muon, hidden_weights, orthogonalize
from ldm.unet import UNet, UNetConfig


def test_equals_torch_on_matrices():
    """torch's works in bfloat16, hence the tolerance; ten steps with decay and another gradient each."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 48), (32, 48), (96, 32)]
    start = [torch.randn(s, generator=generator) for s in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    options = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        moved, expected = a.detach() - w, b.detach() - w
        assert float((moved - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("columns", [40, 200])  # 200: the rounds on the small side
def test_orthogonalized_has_the_singular_vectors_and_nearly_equal_singular_values(columns):
    x = torch.randn(3, 24, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    turned = u.mT @ orthogonalize(x) @ vt.mT
    values = turned.diagonal(dim1=1, dim2=2)
    assert torch.allclose(turned, torch.diag_embed(values), atol=1e-9)
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_kernel_moves_as_its_matrix_does():
    kernel = nn.Parameter(torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn(32, 16, 3, 3)
    matrix.grad = kernel.grad.flatten(1)
    for parameter in (kernel, matrix):
        Muon([parameter], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6)


def test_a_zero_gradient_and_a_missing_one_move_nothing():
    still, untouched = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(16, 16))
    still.grad = torch.zeros(16, 16)
    Muon([still, untouched], lr=0.1).step()
    assert torch.equal(still, torch.ones(16, 16)) and torch.equal(untouched, torch.ones(16, 16))


def test_edges_norms_biases_and_embeddings_are_left_to_adamw():
    with torch.device("meta"):
        unet = UNet(UNetConfig(block_out_channels=(32, 32, 32, 32), cross_attention_dim=32))
    unet.mid_block.requires_grad_(False)
    names = {parameter: name for name, parameter in unet.named_parameters()}
    chosen = {names[weight] for weight in hidden_weights(unet)}
    assert {"down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"} <= chosen
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight" in chosen
    assert not {name for name in chosen if name.startswith(("conv_", "mid_block"))}
    assert not {name for name in chosen if "norm" in name or "bias" in name}
    assert hidden_weights(nn.Embedding(64, 64)) == []
