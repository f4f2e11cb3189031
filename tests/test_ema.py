"""The moving average: against torch's own, warm-up, resume, swapping, refusals."""

import copy

import pytest
import torch
from torch import nn

from ldm.train.ema import EMA


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


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_matches_torch_averaged_model_after_the_warm_up():
    module = net()
    decay = 0.5
    ema = EMA(module, decay=decay, power=100.0)  # such a power is warm from step 1 on
    oracle = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=False
    )
    for step in range(6):
        walk(module, step)
        ema.update(module, step)
        oracle.update_parameters(module)
    shadow = ema.state_dict()
    for name, value in oracle.module.named_parameters():
        assert torch.allclose(shadow[name], value, atol=1e-6), name


def test_warm_up_forgets_the_first_weights():
    ema = EMA(net(), decay=0.9, power=0.75)
    assert ema.rate(0) == 0
    assert ema.rate(1) == pytest.approx(1 - 2**-0.75)
    assert ema.rate(10**6) == 0.9
    module = net()
    walk(module, 1)
    ema.update(module, 0)
    assert equal(ema.state_dict(), module.state_dict())


def test_moves_lags_and_copies_buffers():
    module = net()
    first = copy.deepcopy(module.state_dict())
    ema = EMA(module)
    for step in range(20):
        walk(module, step)
        ema.update(module, step)
    for name, value in ema.state_dict().items():
        now = module.state_dict()[name]
        if name in dict(module.named_parameters()):
            assert not torch.equal(value, first[name]) and not torch.equal(value, now), name
        else:
            assert torch.equal(value, now) and value is not now, name


def test_resume_is_as_if_never_stopped():
    module, straight = net(), EMA(net())
    for step in range(4):
        walk(module, step)
        straight.update(module, step)
    resumed = EMA(net())
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for step in range(4, 8):
        walk(module, step)
        straight.update(module, step)
        resumed.update(module, step)
    assert equal(resumed.state_dict(), straight.state_dict())


def test_saved_shadow_is_not_moved_by_later_updates_of_the_loader():
    module = net()
    ema = EMA(module)
    saved = EMA(module).state_dict()
    before = copy.deepcopy(saved)
    ema.load_state_dict(saved)
    walk(module, 1)
    ema.update(module, 5)
    assert equal(saved, before)


def test_swapped_restores_even_on_an_error():
    module = net()
    ema = EMA(module)
    walk(module, 1)
    own = copy.deepcopy(module.state_dict())
    with pytest.raises(KeyError), ema.swapped(module):
        assert equal(module.state_dict(), ema.state_dict())
        raise KeyError
    assert equal(module.state_dict(), own)


def test_shadow_is_float32_and_state_loads_strictly():
    module = net().bfloat16()
    ema = EMA(module, decay=0.999, power=10.0)
    with torch.no_grad():
        module[0].weight.fill_(1.0)
    ema.load_state_dict({k: torch.zeros_like(v) for k, v in ema.state_dict().items()})
    ema.update(module, 1000)
    assert ema.state_dict()["0.weight"].dtype == torch.float32
    assert ema.state_dict()["0.weight"].flatten()[0].item() == pytest.approx(1e-3, rel=1e-4)
    net().load_state_dict(ema.state_dict(), strict=True)
    ema.copy_to(module)
    assert module[0].weight.dtype == torch.bfloat16


def test_refuses_another_module():
    ema = EMA(net())
    with pytest.raises(ValueError, match="wrapped"):
        ema.update(nn.DataParallel(net()), 0)
    with pytest.raises(ValueError, match="differ"):
        ema.load_state_dict(nn.Linear(2, 2).state_dict())
