"""The universal class of sharpness: functions of t'Ht at random draws t, from differences of the loss."""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Options, Passes, SharpnessAware, plus, scaled


class UniversalOptions(Options):
    n: int = Field(1, ge=1, description="draws per step (1)")
    rho: float = Field(0.01, gt=0, allow_inf_nan=False, description="length of a draw's unit, for each weight (0.01)")
    lam: float = Field(1.0, ge=0, description="weight of the sharpness (1)")
    antithetic: bool = Field(False, description="draws in pairs t, -t, so that odd terms cancel; n must be even")

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if self.antithetic and self.n % 2:
            raise ValueError("antithetic draws come in pairs: option n must be even")
        return self


class Universal(SharpnessAware):
    """The universal class of sharpness: phi of the mean of psi(t'Ht / 2) over draws t of mu.

    A subclass defines ``phi``, ``psi`` and ``draw``; derivatives are computed here. With d_i = (L(w + rho t_i) - L(w))
    / rho^2 and R = phi(mean psi(d_i)), the step's gradient is that of L + lam rho^2 R: g + lam sum dR/dd_i (g_i - g).
    """

    Options: ClassVar[type[Options]] = UniversalOptions
    options: UniversalOptions
    passes = ("1 + n", "1 + n")
    copies = 5
    null = {"lam": 0.0}
    per_group = ()

    @classmethod
    def cost(cls, options: Any) -> Passes:
        return Passes(1 + options.n, 1 + options.n)

    def phi(self, mean: Tensor) -> Tensor:
        """The outer function, of the mean (a 0-d tensor, or (k,) if psi has k values)."""
        return mean

    def psi(self, d: Tensor) -> Tensor:
        """The inner function, of each difference: (n,) -> (n,) or (n, k)."""
        return d

    def draw(self) -> list[Tensor]:
        """One draw of mu, in the shapes of the weights."""
        return self.noise()

    def sharpness(self, d: Tensor) -> Tensor:
        """R as a function of the differences (n,)."""
        return self.phi(self.psi(d).mean(0))

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        here, g = objective.evaluate(rows)
        losses, changes = [], []
        t: list[Tensor] = []
        for i in range(o.n):
            t = scaled(t, -1) if o.antithetic and i % 2 else self.draw()
            with self.at(t, o.rho):
                there, g_there = objective.evaluate(rows)
            losses.append(there)
            changes.append(plus(g_there, g, -1))
        d = ((torch.stack(losses) - here) / o.rho**2).requires_grad_()
        with torch.enable_grad():
            (weights,) = torch.autograd.grad(self.sharpness(d), d)
        for weight, change in zip(weights, changes, strict=True):
            g = plus(g, change, o.lam * weight)
        return g


@OPTIMIZERS.register("trace-sam", source="arXiv 2406.03682")
class TraceSAM(Universal):
    """Trace-SAM: the trace of the Hessian.

    Equation: R = mean d_i, t ~ N(0, I).
    Code: dbahri/universal_sam@0218d34 solver/sam.py (its hypersphere is in fact this Gaussian).
    Checked: parity at the same draws, 1e-10 relative over 10 steps (3e-16 measured); finite differences of
    L + lam rho^2 R.
    """


class DetOptions(UniversalOptions):
    rho: float = Field(1.0, gt=0, allow_inf_nan=False, description="length of a draw's unit (1)")
    half: float = Field(0.01, gt=0, allow_inf_nan=False, description="half the cube's edge (0.01)")
    form: Literal["paper", "released"] = Field(
        "paper", description="released: exp(-d / 2), for which the published values are"
    )


@OPTIMIZERS.register("det-sam", source="arXiv 2406.03682")
class DetSAM(Universal):
    """Det-SAM: the determinant of the Hessian, by a Gaussian integral over a small cube.

    Equation: R = (mean exp(-d_i))^-2, t uniform in [-h, h]^d; the integral of exp(-t'Ht / 2) is proportional to
    det(H)^(-1/2).
    Code: dbahri/universal_sam@0218d34 solver/sam.py.
    Deviation: only the paper's abstract could be read; the code has exp(-d / 2), which is form=released.
    Checked: parity of the released form at the same draws, 1e-10 relative over 10 steps (2e-16 measured); finite
    differences of L + lam rho^2 R, both forms.
    """

    Options = DetOptions
    options: DetOptions

    def phi(self, mean: Tensor) -> Tensor:
        return mean**-2

    def psi(self, d: Tensor) -> Tensor:
        return torch.exp(-d if self.options.form == "paper" else -d / 2)

    def draw(self) -> list[Tensor]:
        half = self.options.half
        return [
            (2 * torch.rand(p.shape, generator=self.generator, device=p.device, dtype=p.dtype) - 1) * half
            for p in self.params
        ]


class FrobOptions(UniversalOptions):
    n: int = Field(2, ge=2, description="draws of a step (2)")
    rho: float = Field(0.005, gt=0, allow_inf_nan=False, description="length of a draw's unit, for each weight (0.005)")
    lam: float = Field(0.005, ge=0, description="weight of the sharpness (0.005)")

    @model_validator(mode="after")
    def _variance(self) -> Self:
        if self.antithetic and self.n < 4:
            raise ValueError("a variance over antithetic pairs needs two pairs: option n must be 4 or more")
        return self


@OPTIMIZERS.register("frob-sam", source="arXiv 2406.03682")
class FrobSAM(Universal):
    """Frob-SAM: the Frobenius norm of the Hessian, by the variance of the loss.

    Equation: R = Var(d_i) / 2, t ~ N(0, I), the unbiased sample variance; |H|_F^2 = 2 Var(t'Ht / 2).
    Code: dbahri/universal_sam@0218d34 solver/sam.py.
    Checked: parity at the same draws, 1e-10 relative over 10 steps (4e-16 measured); on a quadratic its expectation is
    g + lam H g; its curvature term on a quartic.
    """

    Options = FrobOptions
    copies = 6

    def sharpness(self, d: Tensor) -> Tensor:
        if not self.options.antithetic:
            return d.var() / 2
        plus_, minus = d.view(-1, 2).unbind(1)  # the odd part of a pair has mean zero
        return ((plus_ - minus) / 2).square().mean() / 2 + ((plus_ + minus) / 2).var() / 2
