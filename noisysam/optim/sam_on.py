"""SAM-ON."""

from pydantic import Field
from torch import Tensor

from noisysam.core.errors import UserError
from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware


class SAMONOptions(Chunked):
    rho: float = Field(0.5, ge=0, allow_inf_nan=False, description="radius of the perturbation (0.5)")


@OPTIMIZERS.register("sam-on", source="arXiv 2306.04226, section 3")
class SAMON(SharpnessAware):
    """SAM-ON: only the normalization layers are perturbed.

    Equation: e = rho g_N / |g_N|, g_N the gradient of the norm layers' weights and biases; g' = grad L(w + e).
    Code: mueller-mp/SAM-ON@8b8869a sam_on.py.
    Deviation: the code finds norm layers by name; here they are the layers whose weight has one dimension.
    Checked: parity, 1e-10 relative over 10 steps (1e-16 measured); the first backward skips the other weights.
    """

    Options = SAMONOptions
    options: SAMONOptions
    copies = 0
    null = {"rho": 0.0, "m": "batch"}
    requires = ("names", "norm layers")

    def arrange(self) -> None:
        weights = {n: p for n, p in zip(self.names, self.params, strict=True) if n.endswith("weight") and p.ndim == 1}
        layers = {name.rpartition(".")[0] for name in weights}
        self.norms = [p for n, p in zip(self.names, self.params, strict=True) if n.rpartition(".")[0] in layers]
        if not self.norms:
            raise UserError("optimizer sam-on needs trainable normalization layers: this network has none")

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        direction = self.unit(objective.grad(rows, self.norms))
        with self.at(direction, self.radius(params=self.norms), self.norms):
            return objective.grad(rows)
