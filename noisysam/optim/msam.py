"""Momentum-SAM."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Passes, Radius, SharpnessAware


class MSAMOptions(Radius):
    rho: float = Field(0.3, ge=0, allow_inf_nan=False, description="radius (code: 0.3; CIFAR-100: 3)")


@OPTIMIZERS.register("msam", source="arXiv 2401.12033, Algorithm 1", revision=3)
class MSAM(SharpnessAware):
    """Momentum-SAM: the gradient at w - rho v / |v|, v the momentum buffer; one evaluation per step.

    Equation: g' = grad L(w - rho v / |v|), v the base rule's momentum buffer before this step (a mean of gradients, so
    that the perturbation goes in the direction of the next descent step, not against it).
    Code: MarlonBecker/MSAM@780fa4f optimizer/msam.py, adamW_msam.py.
    Deviation: the code decays the perturbed weights, as --l2 loss does; the default decays the unperturbed ones. Its
    AdamW decays after the step, torch's before.
    Checked: parity with --l2 loss, and with AdamW without decay, 1e-10 relative over 10 steps (2e-11 measured).
    """

    Options = MSAMOptions
    options: MSAMOptions
    passes = ("1", "1")
    copies = 2
    null = {"rho": 0.0}
    begins_at_w = False

    @classmethod
    def cost(cls, options: Any) -> Passes:
        return Passes(1, 1)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        with self.at(self.unit([self._momentum(p) for p in self.params]), self.radius(-1)):
            return objective.grad(rows)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        buffer = state.get("momentum_buffer", state.get("exp_avg"))
        return torch.zeros_like(param) if buffer is None else buffer
