"""diffusers' DPMSolverSDEScheduler without torchsde, of which only its own noise has need."""

import sys
import types

import diffusers  # noqa: F401  # before the stand-in: it looks for the package

sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler  # noqa: E402, F401
