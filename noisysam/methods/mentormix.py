"""MentorMix."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.base import METHODS, Forward, Method, RunInfo, one_hot
from noisysam.methods.mentornet import MentorNetOptions, weigh
from noisysam.methods.recipe import PublishedRecipe


class MentorMixOptions(MentorNetOptions):
    percentile: float = Field(
        0.7, ge=0, le=1, description="gamma_p (code's default 0.7; CIFAR-10 0.8 to 0.2, CIFAR-100 0.7 to 0.1, by noise)"
    )
    burn_in: float = Field(0.1, ge=0, le=1, description="share of the epochs with all weights 1 (published 0.1)")
    alpha: float = Field(8.0, gt=0, description="of Beta(alpha, alpha) (code's default 8; published 2 to 8, by noise)")
    second: bool = Field(True, description="weigh the mixed rows too (code's default; published from 60 % noise on)")


# google-research/google-research, mentormix/code/training_mentormix_command.sh: (alpha, gamma_p, second)
MENTORMIX = {
    "cifar10": {0.2: (2, 0.8, False), 0.4: (8, 0.6, False), 0.6: (8, 0.6, True), 0.8: (4, 0.2, True)},
    "cifar100": {0.2: (2, 0.7, False), 0.4: (8, 0.5, False), 0.6: (4, 0.3, True), 0.8: (8, 0.1, True)},
}


@METHODS.register("mentormix", source="arXiv 1911.09781, Algorithm 1")
class MentorMix(Method):
    """MentorMix: mixup whose partners are drawn by MentorNet's weights, the larger share going to rows with a weight.

    Equation: v_i = 1[CE_i <= a]; j ~ softmax(v); x' = l x_i + (1 - l) x_j, labels alike, l = max(m, 1 - m) where v_i =
        1, else min(m, 1 - m), m ~ Beta(alpha, alpha) for each row; L = 1/n sum_i v'_i CE(y'_i, p'_i), v'_i = 1, or with
        the second weighting 1[CE'_i <= a'], a' being another average
    Code: google-research/google-research@0c1bbe5 mentormix/code/utils.py, cifar_train_mentormix.py
    Deviation: v is MentorNet's threshold, not the released network; weight decay is not scaled by the mean of v'. The
        authors also evaluate averaged weights (--ema 0.9999).
    State: 0 bytes per sample (two numbers)
    Checked: equal to the code's mixed batch, averages, loss and gradient for that v to 1e-6 over five batches
        (tests/parity); all rows counting, and none; the published table.
    """

    Options = MentorMixOptions
    requires = ("one process",)
    provides = ("one view",)
    average: Tensor
    average_mixed: Tensor

    def __init__(self, options: MentorMixOptions, info: RunInfo) -> None:
        super().__init__(options, info)
        if not options.second:
            self.plan = None  # type: ignore[method-assign, assignment]  # nothing to decide: spare its forward

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        if not noise_type.startswith("symmetric") or noise not in MENTORMIX.get(dataset, {}):
            return {}
        return dict(zip(("alpha", "percentile", "second"), MENTORMIX[dataset][noise], strict=True))

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="google-research/google-research@0c1bbe5 mentormix/code/cifar_train_mentormix.py,"
            " cifar_data_provider.py, training_mentormix_command.sh",
            model="resnet32-wide",
            augment="color",
            batch=128,
            epochs=512,  # 200,000 steps
            lr=0.1,
            weight_decay=2e-4,
            l2="loss",
            schedule="milestones",
            milestones=list(range(30, 512, 30)),
            lr_factor=0.9,
            ema=0.9999,
            differs={"weight_decay": "none where the mixed rows are weighted"},
        )

    def on_stage(self, labels: Tensor) -> None:
        for name in ("average", "average_mixed"):
            self.register_buffer(name, torch.zeros((), device=self.info.device))

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        rows, device = len(batch.inputs), batch.inputs.device
        v = weigh(self, self.average, self.cross_entropy(forward(0, batch.inputs), batch.labels))
        other = torch.multinomial(v.softmax(0), rows, replacement=True, generator=self.generator)
        m = torch.from_numpy(self.rng.beta(self.options.alpha, self.options.alpha, rows)).float().to(device)
        share = torch.where(v > 0, torch.maximum(m, 1 - m), torch.minimum(m, 1 - m))
        labels = one_hot(batch.labels, self.info.classes)
        labels = share[:, None] * labels + (1 - share)[:, None] * labels[other]
        share = share[:, None, None, None]
        return [Task(0, share * batch.inputs + (1 - share) * batch.inputs[other], labels)]

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        ((task,), (z,)) = tasks, logits
        task.plan["weight"] = weigh(self, self.average_mixed, self.cross_entropy(z, task.labels))

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return task.plan.get("weight", 1.0) * self.cross_entropy(logits, task.labels)
