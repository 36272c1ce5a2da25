"""SAM, and its control along random directions."""

from typing import Any

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, Passes, SharpnessAware, global_norm, plus, scaled


class SAMOptions(Chunked):
    ascent_steps: int = Field(1, ge=1, description="steps of projected gradient ascent, each of length rho (1)")
    interval: int = Field(1, ge=1, description="every how many steps one is perturbed; the others are plain (1)")


@OPTIMIZERS.register("sam", source="arXiv 2010.01412, Algorithm 1 and section 4.1")
class SAM(SharpnessAware):
    """Sharpness-aware minimization: the gradient at w + rho g / |g|, for each chunk of m rows.

    Equation: e = rho g / |g|, g the gradient at w; g' = grad L(w + e), averaged over chunks. Further ascent steps:
    e <- e + rho g(w + e) / |g(w + e)|, scaled back to length rho if it is longer.
    Code: google-research/sam@dae9904 sam_jax/training_utils/flax_training.py; davda54/sam@3c3afdb sam.py; several
    ascent steps and chunks: tml-epfl/understanding-sam@306adde deep_nets/sam.py, train.py.
    Deviation: weight decay is in the base step; --l2 loss is google-research/sam's L2 in the loss of both evaluations.
    Checked: parity with all three, 1e-10 relative over 10 steps (2e-12 measured); closed form on a quadratic.
    """

    Options = SAMOptions
    options: SAMOptions
    passes = ("1 + ascent_steps / interval", "1 + ascent_steps / interval")
    copies = 2
    null = {"rho": 0.0, "m": "batch"}

    @classmethod
    def cost(cls, options: Any) -> Passes:
        each = 1 + options.ascent_steps / options.interval
        return Passes(each, each)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        if self.steps % o.interval:
            return objective.grad(rows)
        direction = self.unit(objective.grad(rows))
        for _ in range(o.ascent_steps - 1):
            with self.at(direction, self.radius()):
                direction = plus(direction, self.unit(objective.grad(rows)), 1)
            direction = scaled(direction, 1 / global_norm(direction).clamp(min=1))
        with self.at(direction, self.radius()):
            return objective.grad(rows)


@OPTIMIZERS.register("sam-random", source="control; random perturbations of arXiv 2010.01412, appendix C.5")
class SAMRandom(SharpnessAware):
    """A control for SAM: the same radius in a random direction.

    Equation: e = rho z / |z|, z standard normal; g' = grad L(w + e).
    Code: none released.
    Checked: parity with the written equation on the same draws, 1e-10 relative over 10 steps (1e-16 measured).
    """

    Options = Chunked
    options: Chunked
    passes = ("1", "1")
    copies = 2
    null = {"rho": 0.0, "m": "batch"}
    begins_at_w = False

    @classmethod
    def cost(cls, options: Any) -> Passes:
        return Passes(1, 1)

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        with self.at(self.unit(self.noise()), self.radius()):
            return objective.grad(rows)
