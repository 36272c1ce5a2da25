"""L-SAM: the part of SAM that acts through the loss."""

from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


@OPTIMIZERS.register("l-sam", source="arXiv 2405.03676")
class LSAM(SharpnessAware):
    """L-SAM: the loss's derivative by the logits at the perturbed weights, the Jacobian at w.

    Equation: g' = J(w)' r(w + e), r the loss's derivative by the logits, e = rho g / |g|.
    Deviation: the paper perturbs for each sample (--sam-m 1); here for each chunk of m rows.
    Checked: numpy recursion; J-SAM and L-SAM together on the logistic model, where L-SAM is SAM.
    """

    Options = Chunked
    options: Chunked
    passes = ("3", "2")
    copies = 1
    null = {"rho": 0.0, "m": "batch"}
    needs = ("rows",)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        with self.at(self.unit(objective.grad(rows)), self.options.rho):
            logits, _ = objective.output(rows, grad=False)
        return objective.pull(objective.output(rows)[0], objective.residual(logits, rows))
