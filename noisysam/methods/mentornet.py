"""MentorNet with its predefined curriculum."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options
from noisysam.methods.recipe import PublishedRecipe


class MentorNetOptions(Options):
    percentile: float = Field(0.7, ge=0, le=1, description="p of the moving average of losses (published 0.7 to 0.75)")
    decay: float = Field(0.5, ge=0, lt=1, description="of that moving average (published 0.5)")
    burn_in: float = Field(
        0.0, ge=0, le=1, description="share of the epochs with all weights 1 (0; the data-driven MentorNet: 0.18)"
    )


@METHODS.register("mentornet", source="arXiv 1712.05055, equation 1, the predefined curriculum", revision=2)
class MentorNet(Method):
    """MentorNet, its predefined curriculum: a row counts where its loss is at most a moving percentile of losses.

    Equation: L = 1/n sum_i v_i CE(y_i, p_i), v_i = 1[CE_i <= a], a <- decay a + (1 - decay) percentile_p(CE_1..n)
    Code: google-research/google-research@0c1bbe5 mentormix/code/utils.py, loss_thresholding_function and mentornet;
        burn-in and percentiles: google/mentornet@9e41f60 commands/train_studentnet_resnet.sh
    Deviation: v is the threshold that the code offers as the simplest MentorNet, at the moving average that its comment
        recommends, not a trained network (whose data-driven form needs clean labels); no example dropout; weight decay
        is not scaled by the mean of v. The mean is over all rows, as in equation 1; where none counts, nothing is
        learned in that step. The average starts at 0, as in the code, so that the first steps choose fewer rows.
    State: 0 bytes per sample (one number)
    Checked: average, weights and gradient over five batches to 1e-6 (tests/parity); burn-in; losses that are not
        finite.
    """

    Options = MentorNetOptions
    requires = ("one process",)
    average: Tensor

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="google/mentornet@76d6be2 code/cifar_train_mentornet.py, commands/train_studentnet_resnet.sh",
            augment="standard",
            batch=128,
            epochs=100,  # 39,000 steps
            lr=0.1,
            weight_decay=2e-4,
            l2="loss",
            schedule="milestones",
            milestones=[50, 64, 76.8],  # 19,531, 25,000 and 30,000 steps
            differs={
                "model": "56 layers of widths 160, 320 and 640, not in this package",
                "augment": "crops of images padded by 8",
                "weight_decay": "scaled by the mean of the weights of the rows",
            },
        )

    def on_stage(self, labels: Tensor) -> None:
        self.register_buffer("average", torch.zeros((), device=self.info.device))

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        ((task,), (z,)) = tasks, logits
        task.plan["weight"] = weigh(self, self.average, self.cross_entropy(z, task.labels))

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return task.plan["weight"] * self.cross_entropy(logits, task.labels)


def weigh(method: Method, average: Tensor, losses: Tensor) -> Tensor:
    """1 for each loss up to the moving average of their percentile, which takes these losses in first, else 0; all ones
    in the burn-in. Losses that are not finite leave the average as it was."""
    o = method.options
    new = o.decay * average + (1 - o.decay) * losses.quantile(o.percentile, interpolation="nearest")
    average.copy_(torch.where(new.isfinite(), new, average))
    if method.epoch < o.burn_in * method.info.epochs:
        return torch.ones_like(losses)
    return (losses <= average).to(losses.dtype)
