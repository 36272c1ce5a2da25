"""Friendly SAM."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, plus, scaled


class FSAMOptions(Chunked):
    rho: float = Field(0.2, ge=0, allow_inf_nan=False, description="radius of the perturbation (0.2)")
    sigma: float = Field(1.0, ge=0, description="share of the mean gradient that is subtracted (1)")
    decay: float = Field(0.6, ge=0, lt=1, description="lambda, decay of the mean gradient (ResNet-18: 0.6; else 0.95)")
    form: Literal["paper", "released"] = Field(
        "paper", description="released: subtract the mean before its update; first m = g"
    )


@OPTIMIZERS.register("f-sam", source="arXiv 2403.12350, Algorithm 1")
class FSAM(SharpnessAware):
    """Friendly SAM: the perturbation follows the difference between the batch gradient and its moving average.

    Equation: m <- lambda m + (1 - lambda) g; d = g - sigma m; g' = grad L(w + rho d / |d|).
    Code: nblt/F-SAM@2e2f989 utils.py.
    Deviation: the code subtracts m before its update and starts with m = g, d = g (form=released); the default order
    is the paper's, known from a secondary source.
    Checked: parity of the released form, 1e-10 relative over 10 steps (3e-13 measured), and of the equation (3e-16);
    pytorch_optimizer's FriendlySAM.
    """

    Options = FSAMOptions
    options: FSAMOptions
    copies = 5
    null = {"rho": 0.0, "m": "batch"}
    keeps = ("mean",)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o, old = self.options, self.recall("mean")
        g = objective.grad(rows)
        released = o.form == "released"
        decay = self.in_turn(0.0, o.decay) if released else o.decay
        mean = plus(scaled(old, decay), g, 1 - decay)
        self.gather("mean", mean)
        with self.at(self.unit(plus(g, old if released else mean, -o.sigma)), self.radius()):
            return objective.grad(rows)
