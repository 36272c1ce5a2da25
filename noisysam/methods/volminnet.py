"""VolMinNet."""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, PredictTrainingSet, one_hot
from noisysam.methods.recipe import PublishedRecipe

DECAYS = (30 / 80, 60 / 80)  # shares of the training at which the matrix's learning rate falls to a tenth


class VolMinNetOptions(Options):
    volume: float = Field(1e-4, ge=0, description="weight of the logarithm of the matrix's volume (1e-4)")
    start: float = Field(2.0, description="off-diagonal entries start at sigmoid(-start) (CIFAR-10: 2; CIFAR-100: 4.5)")
    rule: Literal["sgd", "adam"] = Field("sgd", description="optimizer of the matrix (CIFAR-10: sgd; CIFAR-100: adam)")
    matrix_lr: float = Field(0.01, gt=0, description="its learning rate (0.01)")


@METHODS.register("volminnet", source="arXiv 2102.02400, equation 6")
class VolMinNet(Method):
    """VolMinNet: forward correction by a transition matrix that is learnt along, of the smallest volume that fits.

    Equation: L = -log (T' p)_y + lambda log |det T|, T_ij = P(label j | class i): rows of I + sigmoid(W) off the
        diagonal, normalised
    Code: xuefeng-li1/Provably-end-to-end-label-noise-learning-without-anchor-points@06e4167 main.py, models.py
    Deviation: the epoch reported is the last, not the one of the least loss on noisy validation labels.
    State: none per sample; K^2 numbers
    Checked: equal to the authors' loss, gradient and steps of the matrix to 1e-6 over five batches (tests/parity); its
        learning rate at every epoch; forward correction at lambda = 0.
    """

    Options = VolMinNetOptions
    requires = ("one process",)
    smooths = False

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"start": 4.5, "rule": "adam"} if dataset == "cifar100" else {}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="xuefeng-li1/Provably-end-to-end-label-noise-learning-without-anchor-points@06e4167 main.py",
            model="resnet34" if dataset == "cifar100" else "resnet18",
            augment="standard",
            batch=128,
            epochs=80,
            lr=0.01,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[30, 60],
        )

    def on_stage(self, labels: Tensor) -> None:
        classes, device = self.info.classes, self.info.device
        self.weight = nn.Parameter(torch.full((classes, classes), -self.options.start, device=device))

    def transition(self) -> Tensor:
        """The matrix (K, K), row: true class."""
        identity = torch.eye(len(self.weight), device=self.weight.device)
        matrix = identity + self.weight.sigmoid() * (1 - identity)
        return matrix / matrix.sum(1, keepdim=True)

    def auxiliary_optimizer(self) -> torch.optim.Optimizer:
        lr = self.options.matrix_lr
        self.matrix_optimizer: torch.optim.Optimizer = (
            torch.optim.SGD([self.weight], lr=lr, momentum=0.9)
            if self.options.rule == "sgd"
            else torch.optim.Adam([self.weight], lr=lr)
        )
        return self.matrix_optimizer

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        falls = sum(epoch >= share * self.info.epochs for share in DECAYS)
        self.matrix_optimizer.param_groups[0]["lr"] = self.options.matrix_lr * 0.1**falls

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        matrix = self.transition()
        log_q = (logits.log_softmax(1).unsqueeze(2) + matrix.log()).logsumexp(1)
        volume = torch.linalg.slogdet(matrix).logabsdet
        return -(one_hot(task.labels, logits.shape[1]) * log_q).sum(1) + self.options.volume * volume
