"""VaSSO."""

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, plus, scaled


class VaSSOOptions(Chunked):
    theta: float = Field(0.9, gt=0, le=1, description="weight of the present gradient in the direction (0.2 to 0.9)")


@OPTIMIZERS.register("vasso", source="arXiv 2309.15639, Algorithm 2")
class VaSSO(SharpnessAware):
    """VaSSO: the perturbation follows a moving average of gradients.

    Equation: d <- (1 - theta) d + theta g, first d = g; g' = grad L(w + rho d / |d|).
    Code: BingcongLi/VaSSO@3524bad solver/vasso.py (its start is followed).
    Checked: numpy recursion.
    """

    Options = VaSSOOptions
    options: VaSSOOptions
    passes = ("2", "2")
    copies = 4
    null = {"rho": 0.0, "m": "batch"}
    keeps = ("direction",)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        theta = self.in_turn(1.0, self.options.theta)
        d = plus(scaled(self.memory["direction"], 1 - theta), objective.grad(rows), theta)
        self.gather("direction", d)
        with self.at(self.unit(d), self.options.rho):
            return objective.grad(rows)
