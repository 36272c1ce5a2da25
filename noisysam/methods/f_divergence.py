"""f-divergence between the joint distribution of prediction and label, and the product of the two."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, Stage, StageContext, one_hot
from noisysam.methods.peer import Peer, stable_cross_entropy
from noisysam.methods.recipe import PublishedRecipe

LOG_2 = 0.6931471805599453


class FDivergenceOptions(Options):
    divergence: Literal["total-variation", "jensen-shannon", "pearson", "kl", "jeffrey"] = Field(
        "total-variation", description="the divergence that is maximised (those that the authors use)"
    )
    first: float = Field(
        240 / 340, gt=0, lt=1, description="share of the epochs that train by cross-entropy first (240 of 340)"
    )
    lr: float = Field(0.01, gt=0, description="learning rate after that (0.01, a tenth of the first)")


def variational(name: str, p: Tensor) -> tuple[Tensor, Tensor]:
    """g(p) and the conjugate f*(g(p)) of a divergence, as the authors parametrise them."""
    if name == "total-variation":
        return p.tanh() / 2, p.tanh() / 2
    if name == "jensen-shannon":
        return LOG_2 - F.softplus(-p), p + F.softplus(-p) - LOG_2
    if name == "pearson":
        return p, p**2 / 4 + p
    if name == "kl":
        return p, (p - 1).exp()
    return p, p + p**2 / 4 + p**3 / 16  # jeffrey, an approximation


@METHODS.register("f-divergence", source="arXiv 2011.03687, equations 4 and 5")
class FDivergence(Peer):
    """f-divergence: after a training by cross-entropy, the label's probability is made large and a peer's small.

    Equation: L = -g(p_y(x_i)) + f*(g(p_{y_k}(x_j))), j and k drawn for each row; total variation: g = f* = tanh(p) / 2
    Code: weijiaheng/Robust-f-divergence-measures@93d9efe CIFAR-10/runner.py, runner_CE.py
    Deviation: the second part starts from the last epoch of the first, not from the best on noisy validation labels,
        and ends with its last, not with the one of the largest divergence there. Without the correction of the bias,
        which the authors find negligible. Peers are drawn with replacement.
    State: none per sample
    Checked: equal to the authors' loss and gradient for each divergence to 1e-6 (tests/parity); its stages.
    """

    Options: ClassVar[type[Options]] = FDivergenceOptions
    warm = False  # whether the training by cross-entropy is over

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="weijiaheng/Robust-f-divergence-measures@93d9efe CIFAR-10/runner_CE.py, runner.py",
            model="preact-resnet18",
            augment="standard",
            batch=128,
            epochs=340,
            lr=0.1,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[85, 170, 255],  # at a quarter, a half and three quarters of each training
            differs={
                "augment": "turned by up to 15 degrees too",
                "milestones": "at 30, 60, 90 of the second 100 epochs",
            },
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        first = max(1, round(self.options.first * self.info.epochs))
        self.warm = False
        yield Stage(settings={"epochs": first})
        self.warm = True
        yield Stage(start="continue", settings={"epochs": max(1, self.info.epochs - first), "lr": self.options.lr})

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        return super().batches(epoch) if self.warm else epoch

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        return super().tasks(batch, forward) if self.warm else Method.tasks(self, batch, forward)

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, K), or (n, 2, K) after the training by cross-entropy."""
        if not self.warm:
            return stable_cross_entropy(logits, task.labels)
        own, peer = torch.unbind(logits.softmax(2), 1)
        gained, _ = variational(self.options.divergence, (one_hot(task.labels, own.shape[1]) * own).sum(1))
        _, lost = variational(self.options.divergence, (one_hot(task.plan["peer"], own.shape[1]) * peer).sum(1))
        return lost - gained
