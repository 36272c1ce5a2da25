"""The Jacobian half of SAM."""

import torch
from torch import Tensor

from noisysam.objective import Objective, Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


@OPTIMIZERS.register("j-sam", source="arXiv 2405.03676; batched: functional SAM, arXiv 2502.02407")
class JSAM(SharpnessAware):
    """J-SAM: the Jacobian of the logits at the perturbed weights, the loss's derivative by the logits at w."""

    Options = Chunked
    options: Chunked
    passes = "2 + 2"
    null = {"rho": 0.0, "m": "batch"}
    needs = ("rows",)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        logits, losses = objective.output(rows)
        mean = torch.full_like(losses, 1 / len(losses))
        (residual,) = torch.autograd.grad(losses, logits, mean)  # of the loss alone: the network's graph stays
        with self.at(self.unit(objective.pull(logits, residual)), self.options.rho):
            perturbed, _ = objective.output(rows)
            return objective.pull(perturbed, residual)
