"""MESA."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Options, SharpnessAware
from noisysam.optim.saf import divergence


class MESAOptions(Options):
    lam: float = Field(0.8, ge=0, description="weight of the divergence (0.8)")
    tau: float = Field(5.0, gt=0, description="temperature (5)")
    start: int = Field(5, ge=0, description="last epoch, from 0, without the divergence (5)")
    decay: float = Field(0.9998, ge=0, lt=1, description="beta, decay of the average, for each step (ImageNet: 0.9998)")
    form: Literal["paper", "released"] = Field("paper", description="released: the divergence times tau^2")


@OPTIMIZERS.register("mesa", source="arXiv 2205.14083, equation 12")
class MESA(SharpnessAware):
    """MESA: the outputs stay near those of the weights' moving average.

    Equation: v <- beta v + (1 - beta) w after each step; L + lam KL(softmax(z_v / tau) || softmax(z / tau)), by row.
    Code: AngusDujw/SAF@6e85600 MESA_train.py.
    Deviation: the code's tau^2 is form=released. The average's forward takes the batch's statistics; the code's those
    that it averages.
    Checked: numpy recursion.
    """

    Options = MESAOptions
    options: MESAOptions
    passes = ("2", "1")
    copies = 1
    null = {"lam": 0.0}
    needs = ("rows", "one view")

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.memory["average"] = [p.detach().clone() for p in self.params]

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        logits, losses = objective.output(rows)
        if self.epoch > o.start:
            target = objective.net.logits(objective.task.inputs, grad=False, weights=self.memory["average"])
            with torch.enable_grad():
                losses = losses + o.lam * divergence(logits, target, o.tau, o.form)
        return objective.pull(losses, torch.full_like(losses, 1 / len(losses)))

    def after(self, objective: Objective) -> None:
        weight = (1 - self.options.decay) * (1 - self.found_inf)
        for average, p in zip(self.memory["average"], self.params, strict=True):
            average.lerp_(p, weight.to(p.dtype))
