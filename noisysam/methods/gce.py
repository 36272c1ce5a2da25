"""Generalised cross-entropy."""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, one_hot
from noisysam.methods.recipe import PublishedRecipe


class GCEOptions(Options):
    q: float = Field(0.7, gt=0, le=1, description="0: cross-entropy (limit), 1: mean absolute error (published 0.7)")


@METHODS.register("gce", source="arXiv 1805.07836, the L_q loss")
class GCE(Method):
    """Generalised cross-entropy, (1 - p_y^q) / q.

    Equation: L = (1 - p_y^q) / q
    Code: none by the authors; HanxunH/Active-Passive-Losses@04bce53 loss.py
    Checked: equal to that code's loss and gradient to 1e-12 (tests/parity); numpy, values and gradients; cross-entropy
        as q falls to 0, half of mae at q = 1.
    """

    Options: ClassVar[type[Options]] = GCEOptions
    smooths = False

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        hundred = dataset == "cifar100"
        return PublishedRecipe(
            source="arXiv 1805.07836, section 4, by AlanChou/Truncated-Loss@fef5908 README.md (not the authors')",
            model="resnet34",
            augment="standard",
            batch=128,
            epochs=150 if hundred else 120,
            lr=0.01,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[80, 120] if hundred else [40, 80],
        )

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        q = self.options.q
        log_p = logits.log_softmax(1)
        return ((1 - (q * log_p).exp()) / q * one_hot(task.labels, logits.shape[1])).sum(1)
