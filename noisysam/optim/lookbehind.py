"""Lookbehind-SAM."""

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


class LookbehindOptions(Chunked):
    steps: int = Field(2, ge=1, description="k, steps of ascent, each of length rho, and of the fast weights (2 to 10)")
    alpha: float = Field(0.5, ge=0, le=1, description="step of the slow weights towards the fast ones (0.2, 0.5, 0.8)")


@OPTIMIZERS.register("lookbehind", source="arXiv 2307.16704, Algorithm 1")
class Lookbehind(SharpnessAware):
    """Lookbehind-SAM: k steps of ascent, a fast step with the gradient at each; then a slow step back between.

    Equation: u <- u + rho g(u) / |g(u)| and f <- base(f, g(u)), k times from u = f = w; then w <- w + alpha (f - w).
    Code: chandar-lab/Lookbehind-SAM@ac7c5af lookbehind.py (it evaluates each g(u) twice; here once).
    Checked: numpy recursion.
    """

    Options = LookbehindOptions
    options: LookbehindOptions
    passes = ("1 + steps", "1 + steps")
    copies = 4
    null = {"rho": 0.0, "m": "batch", "steps": 1, "alpha": 1.0}

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        self.slow = [p.detach().clone() for p in self.params]
        found = [objective.grad(rows)]
        with self.restored():
            for _ in range(self.options.steps):
                self.move(self.unit(found[-1]), self.options.rho)
                found.append(objective.grad(rows))
        for k, g in enumerate(found[2:], start=1):
            self.gather(f"step {k}", g)
        return found[1]

    def after(self, objective: Objective) -> None:
        for k in range(1, self.options.steps):
            self.descend(self.gathered[f"step {k}"])
        for p, slow in zip(self.params, self.slow, strict=True):
            p.copy_(torch.lerp(slow, p, self.options.alpha))
        self.slow = []
