"""Sparse SAM by Fisher information."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, global_norm


class SSAMOptions(Chunked):
    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the weights that is never perturbed (0.5)")
    samples: int = Field(16, ge=1, description="samples that the Fisher information is taken from (16)")


@OPTIMIZERS.register("ssam-f", source="arXiv 2210.05177, Algorithm 2")
class SSAMF(SharpnessAware):
    """Sparse SAM by Fisher information: only the weights that the labels depend on most are perturbed.

    Equation: mask = the (1 - s) d weights of largest mean (d log p(y | x) / d w)^2 over some samples, anew at the first
    step of each epoch; e = rho mask g / |g|.
    Code: Mi-Peng/Sparse-Sharpness-Aware-Minimization@76974fd solver/sam.py.
    Deviation: the samples are the batch's first and share batch statistics; the code takes single ones, which enter its
    running statistics, and its first step of all has an empty mask.
    Checked: numpy recursion with its own Fisher mask.
    """

    Options = SSAMOptions
    options: SSAMOptions
    passes = ("2", "2")
    copies = 4.25
    null = {"rho": 0.0, "m": "batch"}
    needs = ("rows",)
    stale = False

    def on_epoch(self, epoch: int, epochs: int, samples: int) -> None:
        super().on_epoch(epoch, epochs, samples)
        self.stale = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.stale = False

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        g = objective.grad(rows)
        if self.stale or "mask" not in self.memory:
            fisher = objective.squares(slice(0, self.options.samples))
            self.gather("fisher", [global_norm(fisher)])
            self.memory["mask"], self.stale = self._mask(fisher), False
        with self.at([d * keep for d, keep in zip(self.unit(g), self.memory["mask"], strict=True)], self.options.rho):
            return objective.grad(rows)

    def _mask(self, fisher: list[Tensor]) -> list[Tensor]:
        """Booleans in the shapes of the weights, true for the share that has the largest values."""
        scores = torch.cat([f.flatten() for f in fisher])
        chosen = scores.topk(int((1 - self.options.sparsity) * len(scores))).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, chosen, True)
        return [part.view_as(f) for part, f in zip(mask.split([f.numel() for f in fisher]), fisher, strict=True)]
