"""MESA."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Options, Passes, SharpnessAware
from noisysam.optim.saf import divergence


class MESAOptions(Options):
    lam: float = Field(0.8, ge=0, description="weight of the divergence (0.8)")
    tau: float = Field(5.0, gt=0, description="temperature (5)")
    start: int = Field(5, ge=0, description="last epoch without the divergence, counted from 0 (5)")
    decay: float = Field(0.9998, ge=0, lt=1, description="beta, decay of the average per step (ImageNet: 0.9998)")
    form: Literal["paper", "released"] = Field("paper", description="released: the divergence times tau^2")


@OPTIMIZERS.register("mesa", source="arXiv 2205.14083, equation 12")
class MESA(SharpnessAware):
    """MESA: the outputs stay close to those of a moving average of the weights.

    Equation: v <- beta v + (1 - beta) w after each step; L + lam KL(softmax(z_v / tau) || softmax(z / tau)), per row.
    Code: AngusDujw/SAF@6e85600 MESA_train.py.
    Deviation: the code multiplies the divergence by tau^2 (form=released) and ends it at epoch 360. The averaged
    network uses the batch's statistics; in the code, averaged running statistics.
    Checked: parity of the released form without batch norm, 1e-10 relative over 10 steps (2e-16 measured); numpy
    recursion, both forms.
    """

    Options = MESAOptions
    options: MESAOptions
    passes = ("2", "1")
    copies = 1
    null = {"lam": 0.0}
    requires = ("rows", "one view")
    keeps = ("average",)

    @classmethod
    def cost(cls, options: Any) -> Passes:
        return Passes(2, 1)

    def remembered(self, param: Tensor) -> Tensor:
        return param.detach().clone()

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        logits, losses = objective.output(rows)
        if self.epoch > o.start:
            target = objective.net.logits(objective.task.inputs, grad=False, weights=self.recall("average"))
            with torch.enable_grad():
                losses = losses + o.lam * divergence(logits, target, o.tau, o.form)
        return objective.pull(losses, torch.full_like(losses, 1 / len(losses)))

    def update(self, grads: list[Tensor]) -> None:
        super().update(grads)
        weight = (1 - self.options.decay) * (1 - self.found_inf)
        for average, p in zip(self.recall("average"), self.params, strict=True):
            average.lerp_(p, weight.to(p.dtype))
