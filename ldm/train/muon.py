"""Muon: momentum whose every update is made orthogonal (Jordan et al. 2024, "Muon: An optimizer for hidden layers")."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.train.sharding import full, shard

QUINTIC = (3.4445, -4.7750, 2.0315)  # takes singular values from (0, 1] to about [0.7, 1.2] in five rounds
WIDE = 4  # columns a row from which the rounds are cheaper on the small side
NARROW = 16  # a layer with fewer inputs or outputs has too few directions to even out


def hidden_weights(module: nn.Module) -> list[nn.Parameter]:
    """The matrices and kernels (out, in, ...) of linear and convolutional layers with at least NARROW inputs and
    outputs, those that are trained: no embeddings, norms or biases."""
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return [m.weight for m in layers if m.weight.requires_grad and min(m.weight.shape[:2]) >= NARROW]


def orthogonalize(updates: Tensor, rounds: int = 5) -> Tensor:
    """(K, M, N), M <= N -> about U V^T of each U S V^T, by Newton-Schulz iteration, in float32 or float64.

    All directions of an update get the same length, so what is rare in the loss is learned as fast as what is common.
    """
    a, b, c = QUINTIC
    x = updates / updates.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.shape[2] < WIDE * x.shape[1]:
        for _ in range(rounds):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x
    # Every round multiplies x by a polynomial of x x^T, and these commute: the rounds need M x M matrices only.
    gram, product = x @ x.mT, None
    for _ in range(rounds):
        factor = b * gram + c * gram @ gram
        factor.diagonal(dim1=1, dim2=2).add_(a)
        gram = factor @ gram @ factor
        product = factor if product is None else factor @ product
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for `hidden_weights`.

    A kernel (out, in, h, w) is taken as the matrix (out, in * h * w). An update has the root mean square of a usual
    AdamW step, 0.2 times the learning rate (Liu et al. 2025, arXiv:2502.16982, eq. 4), so both can have one rate.
    torch.optim.Muon is the same on matrices; it works in bfloat16, slow on most CPUs, and takes no kernels.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            alike = defaultdict(list)  # by shape, to be worked on at once
            for parameter in group["params"]:
                if parameter.grad is not None:
                    matrix = full(self.nesterov(parameter, group["momentum"])).flatten(1)
                    tall = matrix.shape[0] > matrix.shape[1]
                    alike[matrix.shape].append((parameter, matrix.mT if tall else matrix))
            for (rows, columns), members in alike.items():
                updates = orthogonalize(torch.stack([matrix for _, matrix in members]))
                updates = rearrange(updates, "k m n -> k n m") if rows > columns else updates
                size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for (parameter, _), update in zip(members, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(shard(update.reshape(parameter.shape), parameter), alpha=size)

    def nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The gradient, looking one step ahead along its running mean, which this moves."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)
