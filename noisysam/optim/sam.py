"""SAM, and its control along random directions."""

from pydantic import Field
from torch import Tensor

from noisysam.core.objective import Objective
from noisysam.core.task import Rows
from noisysam.optim.base import OPTIMIZERS, Chunked, SharpnessAware, global_norm, plus, scaled


class SAMOptions(Chunked):
    ascent_steps: int = Field(1, ge=1, description="steps of projected gradient ascent, each of length rho (1)")
    interval: int = Field(1, ge=1, description="steps from one perturbed step to the next; plain ones between")


@OPTIMIZERS.register("sam", source="arXiv 2010.01412, Algorithm 1 and section 4.1")
class SAM(SharpnessAware):
    """Sharpness-aware minimization: the gradient at w + rho g / |g|, for each chunk of m rows.

    Equation: e = rho g / |g|, g the gradient at w; g' = grad L(w + e); over chunks, the mean of g'. Further ascent
    steps: e <- e + rho g(w + e) / |g(w + e)|, back to length rho where it is longer.
    Code: google-research/sam@dae9904 sam_jax/training_utils/flax_training.py; ascent steps:
    tml-epfl/understanding-sam@306adde deep_nets/sam.py.
    Deviation: the released code's L2 in the loss of both evaluations is --l2 loss; the default decays in the step.
    Checked: closed form on a quadratic; numpy recursion, m = 1, 5, batch; pytorch_optimizer's SAM.
    """

    Options = SAMOptions
    options: SAMOptions
    passes = ("1 + ascent_steps / interval", "1 + ascent_steps / interval")
    copies = 2
    null = {"rho": 0.0, "m": "batch"}

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        o = self.options
        if self.steps % o.interval:
            return objective.grad(rows)
        direction = self.unit(objective.grad(rows))
        for _ in range(o.ascent_steps - 1):
            with self.at(direction, o.rho):
                direction = plus(direction, self.unit(objective.grad(rows)), 1)
            direction = scaled(direction, 1 / global_norm(direction).clamp(min=1))
        with self.at(direction, o.rho):
            return objective.grad(rows)


@OPTIMIZERS.register("sam-random", source="control; random perturbations of arXiv 2010.01412, appendix C.5")
class SAMRandom(SharpnessAware):
    """The control: SAM's radius along a random direction.

    Equation: e = rho z / |z|, z standard normal; g' = grad L(w + e).
    Checked: numpy recursion on the same draws.
    """

    Options = Chunked
    options: Chunked
    passes = ("1", "1")
    copies = 2
    null = {"rho": 0.0, "m": "batch"}
    begins_at_w = False

    def gradient(self, objective: Objective, rows: Rows) -> list[Tensor]:
        with self.at(self.unit(self.noise()), self.options.rho):
            return objective.grad(rows)
