"""WSAM."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, plus, scaled


class WSAMOptions(Chunked):
    gamma: float = Field(0.9, ge=0, lt=1, description="weight of the sharpness is gamma / (1 - gamma) (0.8 to 0.95)")
    decouple: bool = Field(
        True, description="sharpness is subtracted after the base step (the paper), not added to its gradient"
    )


@OPTIMIZERS.register("wsam", source="arXiv 2305.15817, Algorithm 2", revision=2)
class WSAM(SharpnessAware):
    """WSAM: sharpness as a regularization term with its own weight, decoupled from the base rule.

    Equation: the base rule steps with g; then w <- w - lr gamma / (1 - gamma) (g_p - g). With --clip each of the two
    gradients is clipped.
    Code: intelligent-machine-learning/dlrover@05e4f76 atorch/atorch/optimizers/wsam.py.
    Deviation: clipping is off by default; in the code it is on, at norm 1.
    Checked: parity, both forms, 1e-10 relative over 10 steps (7e-13 measured), with clipping 1e-5 (5e-7 measured:
    their 1e-6 in a denominator); pytorch_optimizer's WSAM.
    """

    Options = WSAMOptions
    options: WSAMOptions
    copies = 3.5
    null = {"rho": 0.0, "m": "batch"}
    per_group = ("rho", "gamma")

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        g, there = self.both(objective, rows, self.radius())
        self.gather("there", there)
        return g

    def update(self, grads: list[Tensor]) -> None:
        sharpness = plus(self.prepared(self.gathered["there"]), grads, -1)
        if not self.options.decouple:
            return self.descend(plus(grads, sharpness, self.by_group(_weight)))
        self.descend(grads)
        moves = scaled(sharpness, self.by_group(lambda group: group["lr"] * _weight(group)))
        for p, move in zip(self.params, moves, strict=True):
            p.copy_(torch.where(self.found_inf == 0, p - move, p))


def _weight(group: dict[str, Any]) -> float:
    """WSAM's weight of the sharpness in a param group."""
    gamma: float = group["gamma"]
    return gamma / (1 - gamma)
