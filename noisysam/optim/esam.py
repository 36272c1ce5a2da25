"""Efficient SAM."""

import math

import torch
from pydantic import Field
from torch import Tensor

from noisysam.objective import Objective, Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


class ESAMOptions(Chunked):
    beta: float = Field(0.6, gt=0, le=1, description="share of the weights that is perturbed (ResNet-18: 0.6)")
    gamma: float = Field(0.5, gt=0, le=1, description="share of the rows kept for the second gradient (0.5)")


@OPTIMIZERS.register("esam", source="arXiv 2110.03141, Algorithm 1")
class ESAM(SharpnessAware):
    """Efficient SAM: a random part of the weights is perturbed; the rows whose loss rises most give the gradient.

    Stochastic weight perturbation draws its mask per weight (the paper; the released code draws it per tensor).
    Sharpness-sensitive data selection keeps exactly ceil(gamma n) rows. The radius is the paper's: rho / beta times
    the masked unit gradient, so that its expectation is SAM's.
    """

    Options = ESAMOptions
    options: ESAMOptions
    passes = "2 + gamma + 1 + gamma"
    null = {"rho": 0.0, "m": "batch", "gamma": 1.0}
    needs = ("rows",)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        _, before = objective.output(rows)
        direction = self.unit(objective.pull(before, torch.full_like(before, 1 / len(before))))
        if self.options.beta < 1:
            keep = [
                torch.rand(d.shape, generator=self.generator, device=d.device) < self.options.beta for d in direction
            ]
            direction = [d * k for d, k in zip(direction, keep, strict=True)]
        with self.at(direction, self.options.rho / self.options.beta):
            if self.options.gamma == 1:
                return objective.grad(rows)
            _, after = objective.output(rows, grad=False)
            chosen = (after - before.detach()).topk(math.ceil(self.options.gamma * len(before))).indices.sort().values
            start = rows.start if isinstance(rows, slice) else 0
            return objective.grad(chosen + start)
