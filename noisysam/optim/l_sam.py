"""L-SAM: the part of SAM that acts through the loss."""

from typing import Any

from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, Passes, SharpnessAware


@OPTIMIZERS.register("l-sam", source="arXiv 2405.03676")
class LSAM(SharpnessAware):
    """L-SAM: the derivative of the loss by the logits at the perturbed weights, the Jacobian at w.

    Equation: g' = J(w)' r(w + e), r the derivative of the loss by the logits, e = rho g / |g|.
    Code: none released.
    Deviation: the paper perturbs for each sample (--sam-m 1); here for each chunk of m rows.
    Checked: parity with the equation for m = 1, 1e-10 relative over 10 steps (2e-16 measured); J-SAM and L-SAM
    on the logistic model, where L-SAM is SAM.
    """

    Options = Chunked
    options: Chunked
    passes = ("3", "2")
    copies = 1
    null = {"rho": 0.0, "m": "batch"}
    requires = ("rows",)

    @classmethod
    def cost(cls, options: Any) -> Passes:
        return Passes(3, 2)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        with self.at(self.unit(objective.grad(rows)), self.radius()):
            logits, _ = objective.output(rows, grad=False)
        return objective.pull(objective.output(rows)[0], objective.residual(logits, rows))
