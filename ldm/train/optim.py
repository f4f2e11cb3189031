"""Which optimizer moves which weights, Muon, and the moving average of the weights."""

import copy
import fnmatch
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm.config import UserError
from ldm.train.config import OptimizerConfig
from ldm.train.sharding import full, local, shard_like

QUINTIC = (3.4445, -4.7750, 2.0315)  # takes singular values from (0, 1] to about [0.7, 1.2] in five rounds
NARROW = 16  # a layer with fewer inputs or outputs has too few directions to equalize


def freeze(module: nn.Module, patterns: tuple[str, ...]) -> None:
    """Stops the training of parameters whose names match a shell pattern. Raises UserError for a pattern that matches
    none, or when nothing is left to train."""
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise UserError(f"frozen pattern {pattern!r} matches no parameter, e.g. {next(iter(parameters))!r}")
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"frozen {list(patterns)} leaves no parameter to train; name fewer")


def make_optimizers(name: str, module: nn.Module, config: OptimizerConfig) -> dict[str, torch.optim.Optimizer]:
    """A module's optimizers: AdamW under its name, and with `muon_lr` Muon under NAME-muon for its hidden layers: the
    matrices and kernels with at least NARROW inputs and outputs.

    Weight decay is for the matrices and kernels of linear and convolutional layers alone: no norms, biases,
    embeddings, nor CLIP's logit scale.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    kernels = {m.weight for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    wide = {p for p in kernels if config.muon_lr and min(p.shape[:2]) >= NARROW}
    decayed, others = [p for p in trained if p in kernels - wide], [p for p in trained if p not in kernels]
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if decayed or others:
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizers[name] = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if hidden := [p for p in trained if p in wide]:
        optimizers[f"{name}-muon"] = Muon(hidden, lr=config.muon_lr, weight_decay=config.weight_decay)
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalized (Jordan et al. 2024, "Muon: An optimizer for hidden layers"), with
    Nesterov momentum and decoupled weight decay.

    A kernel (out, in, h, w) is taken as the matrix (out, in * h * w). An update has the root mean square of a usual
    AdamW step, 0.2 times the learning rate (Liu et al. 2025, arXiv:2502.16982, eq. 4), so both can share a rate.
    torch.optim.Muon is the same on matrices; it works in bfloat16, slow on most CPUs, and takes no kernels.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            beta, lr = group["momentum"], group["lr"]
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - beta)
                update = full(p.grad.lerp(momentum, beta)).flatten(1)
                size = lr * 0.2 * max(update.shape) ** 0.5
                update = orthogonalize(update).reshape(p.shape)
                p.mul_(1 - lr * group["weight_decay"]).sub_(shard_like(update, p), alpha=size)


def orthogonalize(update: Tensor, rounds: int = 5) -> Tensor:
    """(M, N) -> about U V^T of its U S V^T, by Newton-Schulz iteration, in float32 or float64.

    All directions of an update get the same length, so rare features are learned as fast as common ones.
    """
    if update.shape[0] > update.shape[1]:
        return orthogonalize(update.mT, rounds).mT
    a, b, c = QUINTIC
    x = update / update.norm().clamp(min=1e-7)
    # Every round multiplies x by a polynomial of x x^T, and these commute: the rounds need M x M matrices only.
    gram, product = x @ x.mT, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(rounds):
        factor = b * gram + c * gram @ gram
        factor.diagonal().add_(a)
        gram, product = factor @ gram @ factor, factor @ product
    return product @ x


class EMA:
    """Exponential moving average of a module's parameters, kept as a second module in evaluation mode.

    `decay` is the final rate; until then it is 1 - (1 + step)^-power, so that the random first weights are forgotten
    quickly (at power 0.75 the average covers about the last step^0.75 steps).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, power: float = 0.75) -> None:
        self.decay, self.power = decay, power
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.blank: nn.Module | None = None  # where it is sharded, an unsharded copy without values

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """average <- rate * average + (1 - rate) * weights at this step, counted from 0; buffers are copied."""
        rate = min(self.decay, 1 - (1 + step) ** -self.power)
        averages, weights = ([local(p) for p in m.parameters()] for m in (self.module, module))
        torch._foreach_lerp_(averages, weights, 1 - rate)
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)
