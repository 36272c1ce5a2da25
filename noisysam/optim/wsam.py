"""WSAM."""

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, plus


class WSAMOptions(Chunked):
    gamma: float = Field(0.9, ge=0, lt=1, description="weight of the sharpness: gamma / (1 - gamma) (0.8 to 0.95)")
    decouple: bool = Field(True, description="the sharpness acts outside the base rule (the paper), or in its gradient")


@OPTIMIZERS.register("wsam", source="arXiv 2305.15817, Algorithm 2")
class WSAM(SharpnessAware):
    """WSAM: the sharpness is a regulariser with its own weight, apart from the base rule.

    Equation: the base rule steps with g; then w <- w - lr gamma / (1 - gamma) (g_p - g).
    Code: intelligent-machine-learning/dlrover, atorch's WeightedSAM.
    Checked: numpy recursion; pytorch_optimizer's WSAM.
    """

    Options = WSAMOptions
    options: WSAMOptions
    passes = ("2", "2")
    copies = 5
    null = {"rho": 0.0, "m": "batch"}

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        g = objective.grad(rows)
        with self.at(self.unit(g), o.rho):
            sharpness = plus(objective.grad(rows), g, -1)
        if not o.decouple:
            return plus(g, sharpness, o.gamma / (1 - o.gamma))
        self.gather("sharpness", sharpness)
        return g

    def after(self, objective: Objective) -> None:
        weight = self.options.gamma / (1 - self.options.gamma)
        rates = [group["lr"] for group in self.param_groups for p in group["params"] if p.requires_grad]
        if self.options.decouple:
            for p, s, lr in zip(self.params, self.gathered["sharpness"], rates, strict=True):
                p.copy_(torch.where(self.found_inf == 0, p - lr * weight * s, p))
