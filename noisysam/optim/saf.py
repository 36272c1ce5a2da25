"""SAF."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from noisysam.core.errors import UserError
from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Options, Passes, SharpnessAware


def divergence(logits: Tensor, target: Tensor, tau: float, form: str) -> Tensor:
    """KL(softmax(target / tau) || softmax(logits / tau)) per row; times tau^2 in the released form."""
    p, q = F.log_softmax(target / tau, 1), F.log_softmax(logits / tau, 1)
    return (p.exp() * (p - q)).sum(1) * (tau**2 if form == "released" else 1)


class SAFOptions(Options):
    lam: float = Field(0.3, ge=0, description="weight of the divergence (0.3)")
    tau: float = Field(5.0, gt=0, description="temperature (5)")
    start: int = Field(5, ge=0, description="last epoch without the divergence, counted from 0 (5)")
    past: int = Field(3, ge=1, description="age of the target outputs in epochs (3)")
    form: Literal["paper", "released"] = Field("paper", description="released: the divergence times tau^2")


@OPTIMIZERS.register("saf", source="arXiv 2205.14083, equation 8")
class SAF(SharpnessAware):
    """SAF: the outputs stay close to those of the same samples some epochs ago.

    Equation: L + lam KL(softmax(z_past / tau) || softmax(z / tau)), per row, z_past from epoch e - past.
    Code: AngusDujw/SAF@6e85600 SAF_train.py.
    Deviation: the code multiplies the divergence by tau^2 (form=released) and ends it at epoch 300. A sample without
    outputs in that epoch (of a dropped last batch) has no divergence; in the code its target is uniform.
    Checked: parity of the released form, 1e-10 relative over 10 steps (2e-16 measured); numpy recursion, both forms.
    """

    Options = SAFOptions
    options: SAFOptions
    passes = ("1", "1")
    copies = 0
    null = {"lam": 0.0}
    requires = ("rows", "one view", "index", "one process")

    @classmethod
    def cost(cls, options: Any) -> Passes:
        return Passes(1, 1)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        logits, losses = objective.output(rows)
        target, known = self._target(logits.detach(), objective.task.index)
        if self.epoch > o.start:
            with torch.enable_grad():
                losses = losses + torch.where(known, o.lam * divergence(logits, target, o.tau, o.form), 0)
        return objective.pull(losses, torch.full_like(losses, 1 / len(losses)))

    def _target(self, logits: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Store this epoch's outputs; return those of ``past`` epochs ago, and which rows have them."""
        if index is None or not self.samples:
            raise UserError("optimizer saf needs each row's place in the training set, and on_epoch() to be called")
        slots = self.options.past + 1
        if "outputs" not in self.memory:
            outputs = logits.new_zeros(slots, self.samples, logits.shape[1])
            self.memory["outputs"] = [outputs, outputs.new_full((slots, self.samples), -1, dtype=torch.int)]
        outputs, written = self.memory["outputs"]
        now, before = self.epoch % slots, (self.epoch - self.options.past) % slots
        sound = torch.isfinite(logits).all()
        outputs[now, index] = torch.where(sound, logits, outputs[now, index])
        written[now, index] = torch.where(sound, self.epoch, written[now, index])
        return outputs[before, index], written[before, index] == self.epoch - self.options.past
