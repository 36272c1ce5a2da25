"""LookSAM."""

from typing import Any

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, Passes, SharpnessAware, along, global_norm, plus


class LookSAMOptions(Chunked):
    interval: int = Field(5, ge=1, description="every how many steps SAM's gradient is computed (5)")
    alpha: float = Field(0.7, ge=0, description="length of the reused part relative to the gradient (ViT: 0.7)")


@OPTIMIZERS.register("looksam", source="arXiv 2203.02714, Algorithm 1")
class LookSAM(SharpnessAware):
    """LookSAM: every k-th step is SAM's; the others reuse the part of its gradient orthogonal to the plain one.

    Equation: every k steps g' = g_s, and v = g_s - <g_s, g> g / |g|^2 is kept; else g' = g + alpha |g| v / |v|.
    Code: none by the authors; rollovd/LookSAM@8f5c8ef projects each tensor by itself, the paper all together.
    Checked: parity with Algorithm 1, 1e-10 relative over 10 steps (2e-13 measured); pytorch_optimizer's LookSAM
    differs, as a test shows.
    """

    Options = LookSAMOptions
    options: LookSAMOptions
    passes = ("1 + 1 / interval", "1 + 1 / interval")
    copies = 5
    null = {"rho": 0.0, "m": "batch", "alpha": 0.0}
    keeps = ("across",)

    @classmethod
    def cost(cls, options: Any) -> Passes:
        each = 1 + 1 / options.interval
        return Passes(each, each)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        g = objective.grad(rows)
        if self.steps % o.interval:
            return plus(g, self.unit(self.recall("across")), o.alpha * global_norm(g))
        with self.at(self.unit(g), self.radius()):
            there = objective.grad(rows)
        self.gather("across", plus(there, along(there, g), -1))
        return there
