"""SGD with the regularizers that explain part of SAM's robustness."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.errors import UserError
from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Options, Passes, SharpnessAware


class RegOptions(Options):
    gamma_z: float = Field(0.01, ge=0, description="weight of the features' squared norm (ours)")
    gamma_v: float = Field(0.01, ge=0, description="weight of the last layer's squared norm (ours)")


@OPTIMIZERS.register("reg-sgd", source="arXiv 2405.03676, section 4")
class RegSGD(SharpnessAware):
    """Regularized SGD: what J-SAM reduces to in a network of two layers, at the cost of SGD.

    Equation: L + gamma_z |z|^2 + gamma_v |v|^2, per row, z the penultimate features, v the last layer's weights.
    Code: none released.
    Deviation: the paper's values of gamma, and a stop-gradient in its equation 4.5, could not be read; the defaults are
    ours.
    Checked: parity with the written equation, 1e-10 relative over 10 steps (2e-16 measured).
    """

    Options = RegOptions
    options: RegOptions
    passes = ("1", "1")
    copies = 0
    null = {"gamma_z": 0.0, "gamma_v": 0.0}
    requires = ("rows", "features")

    @classmethod
    def cost(cls, options: Any) -> Passes:
        return Passes(1, 1)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        _, losses = objective.output(rows)
        features, head = objective.net.features, getattr(objective.net.module, "head", None)
        if features is None or head is None:
            raise UserError(
                "optimizer reg-sgd needs a network with features() and head, such as those of `list models`"
            )
        with torch.enable_grad():
            squares = features.to(losses.dtype).square().sum(-1)  # of each view
            losses = losses + self.options.gamma_z * squares.reshape(len(losses), -1).mean(1)
            losses = losses + self.options.gamma_v * head.weight.square().sum()
        return objective.pull(losses, torch.full_like(losses, 1 / len(losses)))
