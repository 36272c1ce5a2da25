"""J-SAM: the part of SAM that acts through the Jacobian."""

from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


@OPTIMIZERS.register("j-sam", source="arXiv 2405.03676; batched: functional SAM, arXiv 2502.02407")
class JSAM(SharpnessAware):
    """J-SAM: the Jacobian of the logits at the perturbed weights, the loss's derivative by the logits at w.

    Equation: g' = J(w + e)' r(w), r the loss's derivative by the logits, e = rho g / |g|.
    Deviation: the paper perturbs for each sample (--sam-m 1); here for each chunk of m rows.
    Checked: numpy recursion; a linear network, where it is SGD.
    """

    Options = Chunked
    options: Chunked
    passes = ("2", "2")
    copies = 2
    null = {"rho": 0.0, "m": "batch"}
    needs = ("rows",)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        logits, _ = objective.output(rows)
        residual = objective.residual(logits, rows)
        with self.at(self.unit(objective.pull(logits, residual)), self.options.rho):
            return objective.pull(objective.output(rows)[0], residual)
