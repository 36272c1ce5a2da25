"""Peer loss."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, one_hot
from noisysam.methods.recipe import PublishedRecipe

# the runners of its authors: epochs of the training that they are for, and alpha at some of these, linear between them
COURSES: dict[str, tuple[int, tuple[tuple[int, float], ...]]] = {
    "sparse": (300, ((20, 0), (39, 1), (40, 1), (89, 2), (90, 2), (139, 5), (140, 5), (239, 10), (240, 10), (339, 20))),
    "uniform": (
        300,
        ((20, 0), (39, 0.1), (40, 1), (89, 2), (90, 2), (139, 2.5), (140, 2.5), (239, 3.3), (240, 3.3), (339, 5)),
    ),
    "sparse-100": (250, ((110, 0), (129, 2), (130, 2), (199, 10), (200, 10), (249, 20))),
    "uniform-100": (250, ((99, 0), (100, 0.95))),
}
EPS = 1e-5  # the authors add it to probabilities before the logarithm


class PeerOptions(Options):
    alpha: Annotated[float, Field(ge=0)] | Literal["sparse", "uniform", "sparse-100", "uniform-100"] = Field(
        "uniform", description="weight of the peer term: a number, or the authors' course for a kind of noise (uniform)"
    )


def course(name: str, epoch: int, epochs: int) -> float:
    """A published course at an epoch, stretched to a training of so many epochs."""
    length, knots = COURSES[name]
    return float(np.interp(epoch * length / epochs, [at for at, _ in knots], [alpha for _, alpha in knots]))


def stable_cross_entropy(logits: Tensor, labels: Tensor, eps: float = EPS) -> Tensor:
    """-log(p_y + eps) of each row, with classes or distributions as labels."""
    return -(one_hot(labels, logits.shape[1]) * (logits.softmax(1) + eps).log()).sum(1)


@METHODS.register("peer", source="arXiv 1910.03231, equation 5, with the weight alpha of section 4")
class Peer(Method):
    """Peer loss: cross-entropy, less that of another sample's image with a third sample's label.

    Equation: L = (l(f(x_i), y_i) - alpha l(f(x_j), y_k)) / (1 + alpha), j and k drawn for each row, l = -log(p_y +
        1e-5); alpha follows the epochs of a training of 300
    Code: weijiaheng/Multi-class-Peer-Loss-functions@fba9eb6 CIFAR-10/runner.py, CIFAR-100/runner.py
    Deviation: the division by 1 + alpha is the code's of the learning rate; there it also divides the weight decay. The
        code makes its optimizer anew each epoch, so that momentum starts at zero. Peers are drawn with replacement.
        alpha keeps its place in a training of another length. The default is the code's for uniform noise, used at
        every rate; sparse (most labels of a class go to one other) is --preset published for asymmetric and pair noise.
    State: none per sample
    Checked: equal to the authors' loss, gradient and alpha at every epoch to 1e-6 (tests/parity); cross-entropy at
        alpha = 0.
    """

    Options: ClassVar[type[Options]] = PeerOptions
    provides = ("index", "hard labels")
    views = 2
    smooths = False

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        kind = "sparse" if noise_type.startswith(("asymmetric", "pair")) else "uniform"
        return {"alpha": f"{kind}-100" if dataset == "cifar100" else kind}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        hundred = dataset == "cifar100"
        return PublishedRecipe(
            source="weijiaheng/Multi-class-Peer-Loss-functions@fba9eb6 CIFAR-10/runner.py, CIFAR-100/runner.py",
            model="preact-resnet18",
            augment="standard",
            batch=128,
            epochs=250 if hundred else 300,
            lr=0.1,
            weight_decay=5e-4 if hundred else 1e-4,
            schedule="milestones",
            milestones=[60, 100] if hundred else [40, 80, 120, 160, 200, 240, 280],
            differs={"augment": "turned by up to 15 degrees too"},
        )

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels

    def drawn(self, rows: int) -> Tensor:
        """Places of samples, uniform."""
        return torch.randint(len(self.labels), (rows,), generator=self.generator, device=self.labels.device)

    def alpha(self) -> float:
        """The weight of the peer term in this epoch."""
        alpha = self.options.alpha
        return course(alpha, self.epoch, self.info.epochs) if isinstance(alpha, str) else float(alpha)

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        for batch in epoch:
            yield replace(batch, views=[batch.inputs, epoch.view(self.drawn(len(batch.index)))])

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        """Each row holds its own image and its peer's; they go through the network in a forward each."""
        plan = {"peer": self.labels[self.drawn(len(batch.index))]}
        return [Task(0, torch.stack(batch.views, 1), batch.labels, batch.index, plan, forwards=(1, 1))]

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, 2, K)."""
        own = stable_cross_entropy(logits[:, 0], task.labels)
        peer = stable_cross_entropy(logits[:, 1], task.plan["peer"])
        return (own - self.alpha() * peer) / (1 + self.alpha())
