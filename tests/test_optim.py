"""Muon and the moving average against torch's own, and which weights which optimizer moves."""

import copy

import pytest
import tiny
import torch
from tiny_models import unet_config
from torch import nn

from ldm.train.clip import CLIPTask
from ldm.train.config import OptimizerConfig
from ldm.train.optim import EMA, Muon, make_optimizers, orthogonalize
from ldm.unet import UNet


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def walk(module: nn.Module, step: int) -> None:
    """One seeded change of all parameters and running statistics."""
    torch.manual_seed(step)
    module.train()(torch.randn(2, 3, 6, 6))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))


def test_average_equals_torch_averaged_model_after_the_warm_up_and_copies_buffers():
    module = net()
    ema = EMA(module, decay=0.5, power=100.0)  # such a power is warm from step 1 on
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    theirs = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=average)
    for step in range(6):
        walk(module, step)
        ema.update(module, step)
        theirs.update_parameters(module)
    torch.testing.assert_close(dict(ema.module.named_parameters()), dict(theirs.module.named_parameters()))
    assert tiny.same(dict(ema.module.named_buffers()), dict(module.named_buffers()))
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())


def test_average_starts_at_the_weights_after_the_first_step():
    module = net()
    ema = EMA(module, decay=0.9, power=0.75)
    for step, rate in ((0, 0.0), (1, 1 - 2**-0.75), (10**6, 0.9)):
        before = copy.deepcopy(list(ema.module.parameters()))
        walk(module, step)
        ema.update(module, step)
        expected = [rate * a + (1 - rate) * b for a, b in zip(before, module.parameters(), strict=True)]
        torch.testing.assert_close(list(ema.module.parameters()), expected)


def test_muon_equals_torch_on_matrices():
    """torch's works in bfloat16, hence the tolerance; ten steps with decay and another gradient each."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in [(32, 48), (32, 48), (96, 32)]]
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


@pytest.mark.parametrize("shape", [(64, 64), (192, 128)])
def test_in_bfloat16_small_directions_are_lengthened_and_none_outgrows_the_others(shape):
    """Singular values from 1 to 1e-4: rounding must not add up over the rounds."""
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    update = u * torch.logspace(0, -4, len(s)) @ v
    ours, exact = orthogonalize(update.bfloat16()).float(), orthogonalize(update)
    assert float((ours - exact).norm() / exact.norm()) < 0.2 and float(torch.linalg.svdvals(ours).max()) < 1.3


def test_a_kernel_moves_as_its_matrix_and_without_a_gradient_nothing_moves():
    kernel = nn.Parameter(torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last))
    matrix, still = nn.Parameter(kernel.detach().flatten(1).clone()), nn.Parameter(torch.ones(16, 16))
    kernel.grad = torch.randn(32, 16, 3, 3)
    matrix.grad = kernel.grad.flatten(1)
    Muon([kernel, matrix, still], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6) and torch.equal(still, torch.ones(16, 16))


def test_edges_norms_biases_embeddings_and_frozen_weights_are_left_by_muon():
    unet = UNet(unet_config((32, 32), cross_attention_dim=32))
    unet.mid_block.requires_grad_(False)
    names = {parameter: name for name, parameter in unet.named_parameters()}
    optimizers = make_optimizers("unet", unet, OptimizerConfig(muon_lr=1e-2)).values()
    by_adamw, by_muon = ({names[p] for group in o.param_groups for p in group["params"]} for o in optimizers)
    assert {"down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"} <= by_muon
    assert not {name for name in by_muon if name.startswith("conv_") or "norm" in name or "bias" in name}
    assert by_muon | by_adamw == {name for name in names.values() if not name.startswith("mid_block")}
    assert make_optimizers("words", nn.Embedding(64, 64), OptimizerConfig(muon_lr=1e-2)).keys() == {"words"}


@pytest.mark.parametrize("muon_lr", [None, 1e-2])
def test_weight_decay_spares_norms_biases_embeddings_and_the_logit_scale(muon_lr):
    """With a zero gradient AdamW and Muon move a weight by its decay alone."""
    module = CLIPTask(tiny.clip()).modules["clip"]
    before = copy.deepcopy(dict(module.named_parameters()))
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    config = OptimizerConfig(lr=1e-2, muon_lr=muon_lr, weight_decay=0.5)
    for optimizer in make_optimizers("clip", module, config).values():
        optimizer.step()
    moved = {key for key, p in module.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {f"{key}.weight" for key, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
