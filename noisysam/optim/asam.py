"""Adaptive SAM."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


class ASAMOptions(Chunked):
    rho: float = Field(0.5, ge=0, allow_inf_nan=False, description="radius, in units of the weights (CIFAR-10: 0.5)")
    eta: float = Field(0.01, ge=0, description="added to the absolute value of each weight (0.01)")
    rule: Literal["weights", "all"] = Field(
        "weights", description="parameters scaled by their size: those named weight, or all"
    )


@OPTIMIZERS.register("asam", source="arXiv 2102.11600, equation 9")
class ASAM(SharpnessAware):
    """Adaptive SAM: the perturbation of a weight is proportional to its size.

    Equation: e = rho T^2 g / |T g|, T = |w| + eta for weights (of norm layers too) and 1 for biases.
    Code: SamsungLabs/ASAM@f156a68 asam.py.
    Checked: parity, 1e-10 relative over 10 steps (3e-16 measured); |T^-1 e| = rho; pytorch_optimizer's adaptive SAM,
    with eta 0 and rule=all.
    """

    Options = ASAMOptions
    options: ASAMOptions
    copies = 4
    null = {"rho": 0.0, "m": "batch"}
    requires = ("names",)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        sizes = [
            p.abs() + o.eta if o.rule == "all" or "weight" in name else torch.ones_like(p)
            for name, p in zip(self.names, self.params, strict=True)
        ]
        direction = self.unit(torch._foreach_mul(sizes, objective.grad(rows)))
        with self.at(torch._foreach_mul(sizes, direction), self.radius()):
            return objective.grad(rows)
