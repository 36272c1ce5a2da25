"""SAM-SGA: minimization by SAM, maximization by stochastic gradient ascent."""

from collections.abc import Callable

import torch
from torch import Tensor

from noisysam.optim.base import SharpnessAware, global_norm


class SAMSGA:
    """min over theta, max over phi of L(theta, phi): theta by a SAM step, phi by gradient ascent (arXiv 2310.13315).

    theta <- theta - lr grad_theta L(theta + rho g / |g|, phi); then phi <- phi + lr' grad_phi L(theta, phi), at the new
    theta, or at the old one if ``simultaneous`` (the paper could not be read in this detail). Three forwards and three
    backwards. The authors released no code. A step that is not finite changes neither theta nor phi.
    """

    def __init__(self, student: SharpnessAware, adversary: torch.optim.Optimizer, simultaneous: bool = False) -> None:
        """``student``: an optimizer of this package on theta; ``adversary``: one with ``maximize=True`` on phi."""
        if not all(group.get("maximize") for group in adversary.param_groups):
            raise ValueError("the adversary must maximize: create its optimizer with maximize=True")
        self.student, self.adversary, self.simultaneous = student, adversary, simultaneous
        self.phi = [p for group in adversary.param_groups for p in group["params"]]

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """One step of both on the same batch; returns the loss before it."""

        def descend() -> Tensor:
            self.student.zero_grad()
            value = loss()
            value.backward(inputs=self.student.params)
            return value

        def gradient() -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(), self.phi)

        before = gradient() if self.simultaneous else None
        value: Tensor = self.student.step(descend)
        ascent = before or gradient()
        if not self.student.found_inf and torch.isfinite(global_norm(ascent)):  # else neither moves
            for p, g in zip(self.phi, ascent, strict=True):
                p.grad = g
            self.adversary.step()
        return value.detach()
