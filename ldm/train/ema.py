"""Exponential moving average of a module's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.train.sharding import local, shard


class EMA:
    """Float32 shadow of a module: parameters averaged, buffers copied.

    `decay` is the final rate; until then the rate is 1 - (1 + step)^-power, so that the random first weights
    are forgotten quickly (at power 0.75 the average covers about the last step^0.75 steps). `state_dict()`
    has the module's own names, hence loads into the module itself with strict=True.
    Always give the bare module, not its DistributedDataParallel or compiled wrapper: those rename parameters.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, power: float = 0.75) -> None:
        if not 0 <= decay < 1 or power <= 0:
            raise ValueError(f"decay {decay}, power {power}: decay must be in [0, 1) and power above 0")
        self.decay, self.power = decay, power
        self.shadow = {name: _as_shadow(value).clone() for name, value in _state(module).items()}

    def rate(self, step: int) -> float:
        """How much of the shadow stays at this step (counted from 0, at which nothing stays)."""
        return min(self.decay, 1 - (1 + step) ** -self.power)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """shadow <- rate * shadow + (1 - rate) * weights; `step` goes on counting after a resume."""
        averaged, weights, copied, buffers = [], [], [], []
        for name, value in self._matched(module).items():
            if self.shadow[name].device != value.device:  # the module was moved since the last call
                self.shadow[name] = self.shadow[name].to(value.device)
            is_weight = isinstance(value, nn.Parameter)
            (averaged if is_weight else copied).append(local(self.shadow[name]))
            (weights if is_weight else buffers).append(local(_as_shadow(value)))
        if averaged:
            torch._foreach_lerp_(averaged, weights, 1 - self.rate(step))
        if copied:
            torch._foreach_copy_(copied, buffers)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the shadow into the module, in the module's own precision and device."""
        state = self._matched(module)
        if state:
            torch._foreach_copy_(list(state.values()), [self.shadow[name] for name in state])

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[nn.Module]:
        """Within the block the module carries the shadow; after it, error or not, its own weights again."""
        backup = {name: value.detach().clone() for name, value in self._matched(module).items()}
        self.copy_to(module)
        try:
            yield module
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(_state(module).values()), list(backup.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow under the module's parameter and buffer names (not copies)."""
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes a saved shadow; ValueError unless names and shapes are the same."""
        ours, theirs = ({k: v.shape for k, v in s.items()} for s in (self.shadow, state))
        if ours != theirs:
            differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            raise ValueError(f"EMA state of another module: {', '.join(differing[:4])} differ")
        for name, value in state.items():
            value = _as_shadow(value).to(self.shadow[name].device, copy=True)
            self.shadow[name] = shard(value, self.shadow[name])

    def _matched(self, module: nn.Module) -> dict[str, Tensor]:
        state = _state(module)
        if state.keys() != self.shadow.keys():
            differing = sorted(state.keys() ^ self.shadow.keys())
            raise ValueError(f"EMA of another module, or of a wrapped one: {', '.join(differing[:4])} differ")
        return state


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}


def _as_shadow(value: Tensor) -> Tensor:
    value = value.detach()
    return value.float() if value.is_floating_point() else value
