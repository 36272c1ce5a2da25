"""Surrogate-gap SAM."""

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, along, plus


class GSAMOptions(Chunked):
    alpha: float = Field(0.4, ge=0, description="weight of what is taken away (CIFAR-10: 0.4; noisy labels: 0.01)")
    rho_min: float = Field(0.0, ge=0, description="radius where the learning rate is zero; rho is that of its peak")


@OPTIMIZERS.register("gsam", source="arXiv 2203.08065, Algorithm 1")
class GSAM(SharpnessAware):
    """GSAM: SAM that also lowers the surrogate gap, with a radius that follows the learning rate.

    Equation: g' = g_p - alpha (g - <g, g_p> g_p / |g_p|^2); rho_t = rho_min + (rho - rho_min) lr_t / lr.
    Code: juntang-zhuang/GSAM@a770275 gsam/gsam.py.
    Checked: numpy recursion; pytorch_optimizer's GSAM.
    """

    Options = GSAMOptions
    options: GSAMOptions
    passes = ("2", "2")
    copies = 4
    null = {"rho": 0.0, "m": "batch", "alpha": 0.0}

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        radius = o.rho_min + (o.rho - o.rho_min) * self.param_groups[0]["lr"] / (self.peak_lr or 1.0)
        g, there = self.both(objective, rows, radius)
        across = plus(g, along(g, there), -1)
        return plus(there, across, -o.alpha)
