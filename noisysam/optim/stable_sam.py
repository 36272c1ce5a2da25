"""StableSAM."""

import torch
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, global_norm, scaled


@OPTIMIZERS.register("stable-sam", source="arXiv 2401.07250, Algorithm 1")
class StableSAM(SharpnessAware):
    """StableSAM: SAM's gradient scaled to the length of the plain one.

    Equation: g' = |g| g_p / |g_p|.
    Code: cltan023/stablesam2024@57264e7 sam.py.
    Checked: parity, 1e-10 relative over 10 steps (8e-13 measured).
    """

    Options = Chunked
    options: Chunked
    copies = 3
    null = {"rho": 0.0, "m": "batch"}

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        g, there = self.both(objective, rows, self.radius())
        norm = global_norm(there)
        return scaled(there, torch.where(norm > 0, global_norm(g) / norm, norm))
