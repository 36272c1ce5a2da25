"""Extrap-SGD."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Options, SharpnessAware


class ExtrapOptions(Options):
    form: Literal["past", "extragradient"] = Field("past", description="look ahead along the last gradient or this one")
    scale: float = Field(1.0, ge=0, description="step of the extrapolation, in learning rates")


@OPTIMIZERS.register("extrap-sgd", source="arXiv 2006.05720, Algorithm 1")
class ExtrapSGD(SharpnessAware):
    """Extrap-SGD: the gradient at weights extrapolated downhill.

    Equation: g' = grad L(w - scale lr z), z the gradient of the last step (past) or at w (extragradient).
    Code: none public.
    Deviation: the paper's step of extrapolation could not be read: the learning rate here; no scaling by layers.
    Checked: numpy recursion, both forms.
    """

    Options = ExtrapOptions
    options: ExtrapOptions
    passes = ("1 + (form == 'extragradient')", "1 + (form == 'extragradient')")
    copies = 2
    null = {"scale": 0.0}
    keeps = ("past",)

    begins_at_w = False

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.begins_at_w = self.options.form == "extragradient"

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        ahead = self.memory["past"] if o.form == "past" else objective.grad(rows)
        with self.at(ahead, -o.scale * self.param_groups[0]["lr"]):
            g = objective.grad(rows)
        self.gather("past", g)
        return g
