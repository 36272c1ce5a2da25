"""LookSAM."""

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, along, global_norm, plus


class LookSAMOptions(Chunked):
    interval: int = Field(5, ge=1, description="steps from one evaluation at perturbed weights to the next (5)")
    alpha: float = Field(0.7, ge=0, description="length of the reused part against the gradient's (ViT: 0.7)")


@OPTIMIZERS.register("looksam", source="arXiv 2203.02714, Algorithm 1")
class LookSAM(SharpnessAware):
    """LookSAM: every k-th step is SAM's; the others reuse its part across the plain gradient.

    Equation: every k steps g' = g_s, and v = g_s - <g_s, g> g / |g|^2 is kept; else g' = g + alpha |g| v / |v|.
    Code: none of the authors'; rollovd/LookSAM@8f5c8ef projects for each tensor, the paper over all.
    Checked: numpy recursion over two periods; pytorch_optimizer's LookSAM departs, shown in the test.
    """

    Options = LookSAMOptions
    options: LookSAMOptions
    passes = ("1 + 1 / interval", "1 + 1 / interval")
    copies = 5
    null = {"rho": 0.0, "m": "batch", "alpha": 0.0}
    keeps = ("across",)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        g = objective.grad(rows)
        if self.steps % o.interval:
            return plus(g, self.unit(self.memory["across"]), o.alpha * global_norm(g))
        with self.at(self.unit(g), o.rho):
            there = objective.grad(rows)
        self.gather("across", plus(there, along(there, g), -1))
        return there
