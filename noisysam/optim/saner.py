"""SANER."""

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


class SANEROptions(Chunked):
    alpha: float = Field(0.5, ge=0, le=1, description="share by which masked components are reduced (0.5)")
    warmup: int = Field(50, ge=0, description="epochs over which alpha increases from 0 (50 of 200)")


@OPTIMIZERS.register("saner", source="arXiv 2411.17132, Algorithm 1")
class SANER(SharpnessAware):
    """SANER: SAM's gradient, reduced where a component is smaller than SGD's and of the same sign.

    Equation: g' = (1 - alpha [0 < g_p / g < 1]) g_p, elementwise; alpha increases over the first epochs.
    Code: lhchau/saner@07fd303 optimizer/saner.py, utils/utils.py (the schedule).
    Deviation: the code adds 1e-8 to the denominator, which changes the sign of the smallest gradients; not followed.
    Checked: parity without that 1e-8, 1e-10 relative over 10 steps (4e-13 measured).
    """

    Options = SANEROptions
    options: SANEROptions
    copies = 3
    null = {"rho": 0.0, "m": "batch"}

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        alpha = o.alpha * (min(1.0, (self.epoch + 1) / o.warmup) if o.warmup else 1.0)
        g, there = self.both(objective, rows, self.radius())
        noisy = [(a * b > 0) & (b.abs() < a.abs()) for a, b in zip(g, there, strict=True)]
        return [torch.where(n, (1 - alpha) * b, b) for n, b in zip(noisy, there, strict=True)]
