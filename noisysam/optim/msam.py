"""Momentum-SAM."""

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Radius, SharpnessAware


class MSAMOptions(Radius):
    rho: float = Field(0.3, ge=0, allow_inf_nan=False, description="radius (code: 0.3; CIFAR-100: 3)")


@OPTIMIZERS.register("msam", source="arXiv 2401.12033, Algorithm 1", revision=2)
class MSAM(SharpnessAware):
    """Momentum-SAM: the gradient at w + rho v / |v|, v the accumulated gradients; one evaluation a step.

    Equation: g' = grad L(w + rho v / |v|), v the base rule's momentum before this step (minus the paper's v).
    Code: MarlonBecker/MSAM@780fa4f optimizer/msam.py.
    Deviation: the code decays the perturbed weights.
    Checked: numpy recursion.
    """

    Options = MSAMOptions
    options: MSAMOptions
    passes = ("1", "1")
    copies = 2
    null = {"rho": 0.0}
    begins_at_w = False

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        with self.at(self.unit([self._momentum(p) for p in self.params]), self.options.rho):
            return objective.grad(rows)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        buffer = state.get("momentum_buffer", state.get("exp_avg"))
        return torch.zeros_like(param) if buffer is None else buffer
