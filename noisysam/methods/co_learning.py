"""Co-learning."""

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, one_hot
from noisysam.methods.contrastive import contrastive, drawn
from noisysam.methods.mixup import draw, mix
from noisysam.methods.recipe import PublishedRecipe
from noisysam.methods.semi import Policy

TINY = 1e-12  # the authors' least squared distance, and what they add within the logarithm
WIDTH = 512  # of the projection and its hidden layer


class CoLearningOptions(Options):
    alpha: float = Field(5.0, gt=0, description="of the mixup's Beta(alpha, alpha) (5)")
    temperature: float = Field(0.5, gt=0, description="of the contrastive loss (0.5)")
    structure: float = Field(
        0.2, ge=0, description="weight of the structural loss (a fifth of the rate, see Deviation)"
    )
    head_lr: float = Field(1e-3, gt=0, description="learning rate of the projection, with Adam (0.001)")
    strong: Policy = Field("color", description="augmentation of the two views of the contrastive loss")


@METHODS.register("co-learning", source="arXiv 2108.04063, section 3")
class CoLearning(Method):
    """Co-learning: the features also serve a contrastive loss, whose distances the predictions are to keep.

    Equation: CE on mixed rows + contrastive loss of projections of two views + structure: -mean_ij(exp(-D_ij) log(exp(-
        d_ij) + 1e-12)), D and d the squared distances of rows' projections, a constant, and of their logits
    Code: chengtan9907/Co-learning@9d709ed algorithms/Colearning.py, losses/loss_ntxent.py, losses/loss_structrue.py
    Deviation: the structural loss is a term of the objective, and all weights follow it; in the code it moves the last
        layer alone, in a step of its own with a fifth of the rate. The run's crops for the plain view, crops and colour
        for the two others (code: resized crops, for those also with jitter and grey). In chunks of m rows, a row is
        contrasted with those of its chunk.
    State: none per sample; the projection (0.5 M weights for 512 features)
    Checked: equal to the authors' loss and gradient, of the head too, to 1e-5 over three batches (tests/parity).
    """

    Options = CoLearningOptions
    requires = ("features", "one process")
    provides = ()
    views = 4
    smooths = False

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="chengtan9907/Co-learning@9d709ed configs/colearning.py, algorithms/Colearning.py",
            model="resnet18",
            augment="standard",
            batch=128,
            epochs=200,
            base_opt="adam",
            lr=1e-3,
            weight_decay=0.0,
            schedule="linear",
            decay_from=80,
            final_momentum=0.1,
            differs={"augment": "crops of any size, brought to 32 pixels, and flips"},
        )

    def on_stage(self, labels: Tensor) -> None:
        self.project = drawn(lambda: projection(self.info.features), self.rng, labels.device)

    def auxiliary_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.options.head_lr)

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        for batch in epoch:  # its crops are those of any other method
            batch.views = [batch.inputs, *(epoch.view(batch.index, self.options.strong) for _ in range(2))]
            yield batch

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        """Each row: the plain image, two strong views, and the plain image mixed with another row's."""
        labels = one_hot(batch.labels, self.info.classes)
        weight, other = draw(self.options.alpha, len(labels), self.generator, self.rng, labels.device)
        inputs = torch.stack([*batch.views, mix(batch.inputs, other, weight)], 1)
        return [Task(0, inputs, mix(labels, other, weight), forwards=(1, 1, 1, 1))]

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, 4, K)."""
        assert task.features is not None
        o, (plain, first, second) = self.options, self.project(task.features[:, :3]).unbind(1)
        supervised = -(task.labels * logits[:, 3].log_softmax(1)).sum(1)
        near = (-squared_distances(plain.detach())).exp()
        kept = -(near * ((-squared_distances(logits[:, 0])).exp() + TINY).log()).mean(1)
        return supervised + contrastive(first, second, o.temperature) + o.structure * kept


def projection(features: int) -> nn.Module:
    """The authors' projection head."""
    return nn.Sequential(nn.Linear(features, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def squared_distances(x: Tensor) -> Tensor:
    """Between the rows of x (n, d): (n, n), at least ``TINY``."""
    square = x.square().sum(1)
    return (square[:, None] + square - 2 * x @ x.T).clamp(min=TINY).fill_diagonal_(TINY)
