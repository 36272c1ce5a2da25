"""CR-SAM."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, Passes, SharpnessAware, plus


class CRSAMOptions(Chunked):
    form: Literal["paper", "released"] = Field(
        "paper", description="the paper's normalized form, or the released code's update"
    )
    probe: Literal["gradient", "random"] = Field("gradient", description="direction of the finite differences")
    gamma: float = Field(0.1, ge=0, description="weight of the curvature, log v'Hv (0.1)")
    beta: float = Field(0.01, ge=0, description="weight of the slope, log |g| (0.01)")
    floor: float = Field(
        0.01, gt=0, description="lower bound of the loss differences that the paper's form divides by (ours)"
    )


@OPTIMIZERS.register("cr-sam", source="arXiv 2312.13555")
class CRSAM(SharpnessAware):
    """CR-SAM: SAM with a curvature regularizer, by finite differences along the perturbation.

    Equation: g' = g_s + gamma (g+ + g- - 2 g) / (L+ + L- - 2 L) + beta (g+ - g-) / (L+ - L-), + and - at w +- rho v;
    released: without the denominators. v = g / |g|, so that g+ = g_s, or random, so that E[v'Hv] is the trace.
    Code: TrustAIoT/CR-SAM@7f9fe3e utils/crsam.py, which has the released form only.
    Deviation: the paper's form is known from its abstract: gradients of gamma log v'Hv and beta log |g| by differences.
    Checked: parity of the released form, 1e-10 relative over 10 steps (4e-13 measured); both forms by closed forms and
    numpy recursions, the paper's form against no code.
    """

    Options = CRSAMOptions
    options: CRSAMOptions
    passes = ("3 + (probe == 'random')", "3 + (probe == 'random')")
    copies = 7
    null = {"rho": 0.0, "m": "batch", "gamma": 0.0, "beta": 0.0}

    @classmethod
    def cost(cls, options: Any) -> Passes:
        each = 3 + (options.probe == "random")
        return Passes(each, each)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        loss, g = objective.evaluate(rows)
        along_g = self.unit(g)
        v = self.unit(self.noise()) if o.probe == "random" else along_g
        with self.at(v, self.radius()):
            loss_plus, g_plus = objective.evaluate(rows)
        with self.at(v, self.radius(-1)):
            loss_minus, g_minus = objective.evaluate(rows)
        sam = g_plus
        if o.probe == "random":
            with self.at(along_g, self.radius()):
                sam = objective.grad(rows)
        bend, slope = loss_plus + loss_minus - 2 * loss, loss_plus - loss_minus
        gamma, beta = torch.full_like(loss, o.gamma), torch.full_like(loss, o.beta)
        if o.form == "paper":  # log v'Hv is undefined unless the curvature is positive
            gamma = gamma * (bend > 0) / bend.clamp(min=o.floor)
            beta = beta * slope.sign() / slope.abs().clamp(min=o.floor)
        regularised = plus(sam, plus(plus(g_plus, g_minus, 1), g, -2), gamma)
        return plus(regularised, plus(g_plus, g_minus, -1), beta)
