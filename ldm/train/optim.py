"""Which optimizer moves which weights of a module."""

from torch import nn, optim

from ldm.train.config import OptimizerConfig
from ldm.train.muon import Muon, hidden_weights


def optimizers_of(name: str, module: nn.Module, o: OptimizerConfig) -> dict[str, optim.Optimizer]:
    """A module's optimizers: AdamW under its name, and with `muon_lr` a Muon under name-muon for its hidden layers."""
    hidden = hidden_weights(module) if o.muon_lr else []
    apart = set(hidden)
    rest = [p for p in module.parameters() if p.requires_grad and p not in apart]
    found: dict[str, optim.Optimizer] = {}
    if rest:
        options = {"lr": o.lr, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
        found[name] = optim.AdamW(rest, fused=True, **options)
    if hidden:
        found[f"{name}-muon"] = Muon(hidden, lr=o.muon_lr, weight_decay=o.weight_decay)
    return found
