"""Surrogate-gap SAM."""

from typing import Any

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, along, plus


class GSAMOptions(Chunked):
    alpha: float = Field(0.4, ge=0, description="weight of the subtracted part (CIFAR-10: 0.4; noisy labels: 0.01)")
    rho_min: float = Field(0.0, ge=0, description="radius at learning rate 0; rho is the radius at its peak")


@OPTIMIZERS.register("gsam", source="arXiv 2203.08065, Algorithm 1")
class GSAM(SharpnessAware):
    """GSAM: SAM that also decreases the surrogate gap; its radius follows the learning rate.

    Equation: g' = g_p - alpha (g - <g, g_p> g_p / |g_p|^2); rho_t = rho_min + (rho - rho_min) lr_t / lr, lr the peak.
    Code: juntang-zhuang/GSAM@a770275 gsam/gsam.py, scheduler.py (ProportionScheduler, whose lower rate is 0 here).
    Deviation: the peak is a scheduler's max_lr, else the largest rate so far, so that rho_t never exceeds rho.
    Checked: parity, 1e-10 relative over 10 steps (2e-12 measured); pytorch_optimizer's GSAM.
    """

    Options = GSAMOptions
    options: GSAMOptions
    copies = 4
    null = {"rho": 0.0, "m": "batch", "alpha": 0.0}
    per_group = ("rho", "rho_min", "alpha")

    def arrange(self) -> None:
        for group in self.param_groups:
            group.setdefault("peak_lr", group["lr"])

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        for group in self.param_groups:
            group["peak_lr"] = max(group["lr"], group.get("max_lr") or group["peak_lr"])
        g, there = self.both(objective, rows, self.by_group(_radius))
        across = plus(g, along(g, there), -1)
        return plus(there, across, self.by_group(lambda group: -group["alpha"]))


def _radius(group: dict[str, Any]) -> float:
    """GSAM's radius at the present learning rate of a param group."""
    peak: float = group["peak_lr"]
    return group["rho_min"] + (group["rho"] - group["rho_min"]) * group["lr"] / (peak or 1.0)
