"""Which optimizer moves which weights, Muon, and the moving average of the weights."""

import copy
import fnmatch
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from ldm.config import UserError
from ldm.distributed import rank_and_world
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

    Each process orthogonalizes its share of the matrices. `found_inf` is as for torch's fused optimizers: a scalar on
    the device, at 1 of which a step changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        rank, world = rank_and_world()
        for group in self.param_groups:
            params = sorted((p for p in group["params"] if p.grad is not None), key=nn.Parameter.numel)
            for start in range(0, len(params), world):
                updates = [self.momentum(p, group["momentum"]) for p in params[start : start + world]]
                if rank < len(updates):
                    updates[rank] = orthogonalize(updates[rank])
                for owner, (p, update) in enumerate(zip(params[start:], updates, strict=False)):
                    if world > 1:
                        distributed.broadcast(update, owner)
                    size = group["lr"] * 0.2 * max(update.shape) ** 0.5
                    kept = p * (1 - group["lr"] * group["weight_decay"])
                    self.assign(p, kept.sub_(shard_like(update.reshape(p.shape), p), alpha=size))

    def momentum(self, p: nn.Parameter, beta: float) -> Tensor:
        """The update of a parameter as a whole matrix, before it is orthogonalized."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp(p.grad, 1 - beta)
        self.assign(state["momentum"], momentum)
        return full(p.grad.lerp(momentum, beta)).flatten(1)

    def assign(self, x: Tensor, value: Tensor) -> None:
        """Copies a value into `x`, unless the step changes nothing."""
        x, value = local(x), local(value)
        x.copy_(value if self.found_inf is None else torch.where(self.found_inf > 0, x, value))


def orthogonalize(update: Tensor, rounds: int = 5) -> Tensor:
    """(M, N) -> about U V^T of its U S V^T, by Newton-Schulz iteration; on a GPU in bfloat16, to a few percent.

    All directions of an update get the same length, so rare features are learned as fast as common ones.
    """
    if update.shape[0] > update.shape[1]:
        return orthogonalize(update.mT, rounds).mT.contiguous()
    a, b, c = QUINTIC
    x = (update / update.norm().clamp(min=1e-7)).to(torch.bfloat16 if update.is_cuda else update.dtype)
    if x.dtype == torch.bfloat16:  # whose rounding grows without bound in the shorter form below
        for _ in range(rounds):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.to(update.dtype)
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
    def update(self, module: nn.Module, step: int, skip: Tensor | float = 0.0) -> None:
        """average <- rate * average + (1 - rate) * weights at this step, counted from 0, unless `skip` is 1; copies
        buffers."""
        rate = min(self.decay, 1 - (1 + step) ** -self.power)
        averages, weights = ([local(p) for p in m.parameters()] for m in (self.module, module))
        share = torch.as_tensor((1 - rate) * (1 - skip))
        torch._foreach_lerp_(averages, weights, [share] * len(averages))
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)
