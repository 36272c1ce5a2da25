"""Momentum-SAM."""

import torch
from torch import Tensor

from noisysam.objective import Objective, Rows
from noisysam.optim.base import OPTIMIZERS, Radius, SharpnessAware


@OPTIMIZERS.register("msam", source="arXiv 2401.12033, Algorithm 1")
class MSAM(SharpnessAware):
    """Momentum-SAM: the gradient at w + rho v / |v|, v the accumulated gradients; one evaluation a step."""

    Options = Radius
    options: Radius
    passes = "1 + 1"
    null = {"rho": 0.0}
    begins_at_w = False

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        momentum = [self._buffer(p) for p in self.params]
        with self.at(self.unit(momentum), self.options.rho):
            return objective.grad(rows)

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        buffer = state.get("momentum_buffer", state.get("exp_avg"))
        return torch.zeros_like(param) if buffer is None else buffer
