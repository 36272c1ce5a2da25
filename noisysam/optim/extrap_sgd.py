"""Extrap-SGD."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Options, Passes, SharpnessAware


class ExtrapOptions(Options):
    form: Literal["past", "extragradient"] = Field(
        "past", description="extrapolate along the last step's gradient or this one's"
    )
    scale: float = Field(1.0, ge=0, description="step size of the extrapolation, in learning rates")


@OPTIMIZERS.register("extrap-sgd", source="arXiv 2006.05720, Algorithm 1")
class ExtrapSGD(SharpnessAware):
    """Extrap-SGD: the gradient at extrapolated weights, in the descent direction.

    Equation: g' = grad L(w - scale lr z), z the gradient of the last step (past) or at w (extragradient).
    Code: none released.
    Deviation: the paper's step size of the extrapolation could not be read; it is the learning rate here, without
    scaling per layer.
    Checked: parity with the written equations, both forms, 1e-10 relative over 10 steps (3e-16 measured).
    """

    Options = ExtrapOptions
    options: ExtrapOptions
    passes = ("1 + (form == 'extragradient')", "1 + (form == 'extragradient')")
    copies = 2
    null = {"scale": 0.0}
    keeps = ("past",)
    per_group = ("scale",)
    begins_at_w = False

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.begins_at_w = self.options.form == "extragradient"

    @classmethod
    def cost(cls, options: Any) -> Passes:
        each = 1 + (options.form == "extragradient")
        return Passes(each, each)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        ahead = self.recall("past") if self.options.form == "past" else objective.grad(rows)
        with self.at(ahead, self.by_group(lambda group: -group["scale"] * group["lr"])):
            g = objective.grad(rows)
        self.gather("past", g)
        return g
