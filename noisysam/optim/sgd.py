"""The base rules: SGD and AdamW."""

from typing import Any

from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, SharpnessAware


@OPTIMIZERS.register("sgd", source="Robbins and Monro 1951; Nesterov 1983")
class SGD(SharpnessAware):
    """Stochastic gradient descent, with Nesterov momentum by default.

    Equation: v <- mu v + g; w <- w - lr (g + mu v).
    Code: torch.optim.SGD, whose fused form takes the step.
    Checked: torch's own rule, driven by hand.
    """

    passes = ("1", "1")
    copies = 0

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        return objective.grad(rows)


@OPTIMIZERS.register("adamw", source="arXiv 1711.05101")
class AdamW(SGD):
    """Adam with decoupled weight decay.

    Equation: m, v the moving means of g, g^2; w <- w - lr (m / (sqrt(v) + 1e-8) + decay w), corrected for their start.
    Code: torch.optim.AdamW, whose fused form takes the step.
    Checked: torch's own rule, driven by hand.
    """

    copies = 1

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{**settings, "base": "adamw"})
