"""SANER."""

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


class SANEROptions(Chunked):
    alpha: float = Field(0.5, ge=0, le=1, description="how far the masked components are shrunk (0.5)")
    warmup: int = Field(50, ge=0, description="epochs over which alpha grows from 0 (50 of 200)")


@OPTIMIZERS.register("saner", source="arXiv 2411.17132, Algorithm 1")
class SANER(SharpnessAware):
    """SANER: SAM's gradient, shrunk where its component is smaller than SGD's and of the same sign.

    Equation: g' = (1 - alpha [0 < g_p / g < 1]) g_p, component by component; alpha grows over the first epochs.
    Code: lhchau/saner@07fd303 optimizer/saner.py.
    Deviation: the code adds 1e-8 to the denominator, which turns the sign of the smallest; not followed.
    Checked: numpy recursion.
    """

    Options = SANEROptions
    options: SANEROptions
    passes = ("2", "2")
    copies = 3
    null = {"rho": 0.0, "m": "batch"}

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        alpha = o.alpha * (min(1.0, (self.epoch + 1) / o.warmup) if o.warmup else 1.0)
        g, there = self.both(objective, rows, o.rho)
        noisy = [(a * b > 0) & (b.abs() < a.abs()) for a, b in zip(g, there, strict=True)]
        return [torch.where(n, (1 - alpha) * b, b) for n, b in zip(noisy, there, strict=True)]
