"""The plain rules and SAM itself."""

from typing import Any

from torch import Tensor

from noisysam.objective import Objective, Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


@OPTIMIZERS.register("sgd", source="Robbins and Monro 1951; Nesterov 1983")
class SGD(SharpnessAware):
    """Stochastic gradient descent, with Nesterov momentum by default."""

    passes = "1 + 1"

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        return objective.grad(rows)


@OPTIMIZERS.register("adamw", source="arXiv 1711.05101")
class AdamW(SGD):
    """Adam with decoupled weight decay."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **{**settings, "base": "adamw"})


@OPTIMIZERS.register("sam", source="arXiv 2010.01412, Algorithm 1 and section 4.1")
class SAM(SharpnessAware):
    """Sharpness-aware minimization: the gradient at w + rho g / |g|, for each chunk of m rows."""

    Options = Chunked
    options: Chunked
    passes = "2 + 2"
    null = {"rho": 0.0, "m": "batch"}

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        with self.at(self.unit(objective.grad(rows)), self.options.rho):
            return objective.grad(rows)
