"""Symmetric cross-entropy."""

from typing import Any

from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, one_hot
from noisysam.methods.recipe import PublishedRecipe


def reverse_cross_entropy(log_p: Tensor, labels: Tensor, floor: float) -> Tensor:
    """-sum_k p_k log t_k of each row, with logarithms of the target t (n, K) of at least ``floor``."""
    return -(log_p.exp() * labels.log().clamp(min=floor)).sum(1)


RELEASED = -9.210340371976182  # log 1e-4, at which the released codes clip labels: 2.3 times -4
LOG_ZERO = Field(
    -4.0, lt=0, allow_inf_nan=False, description="what stands for log 0 (-4; released code: -9.2103, log 1e-4)"
)


class SCEOptions(Options):
    alpha: float = Field(0.1, ge=0, description="weight of the cross-entropy (CIFAR-10: 0.1; CIFAR-100: 6)")
    beta: float = Field(1.0, ge=0, description="weight of the reverse cross-entropy (CIFAR-10: 1; CIFAR-100: 0.1)")
    A: float = LOG_ZERO


@METHODS.register("sce", source="arXiv 1908.06112, the SL loss")
class SCE(Method):
    """Symmetric cross-entropy: cross-entropy and its reverse.

    Equation: L = alpha CE + beta RCE, RCE = -sum_k p_k log (e_y)_k = -A (1 - p_y), A in place of log 0
    Code: YisenWang/symmetric_cross_entropy_for_noisy_labels@235d93b loss.py; HanxunH/SCELoss-Reproduce@c81fb33 loss.py
    Deviation: A = -4 as others quote the paper. The released code clips labels at 1e-4, which is A = -9.21: there the
        reverse cross-entropy weighs 2.3 times as much (A=-9.2103; --preset published).
    Checked: equal to the released loss and gradient at A = log 1e-4 to 1e-7 (tests/parity); numpy, values and
        gradients; RCE is -A / 2 times mae.
    """

    Options = SCEOptions
    smooths = False

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"A": RELEASED, **({"alpha": 6.0, "beta": 0.1} if dataset == "cifar100" else {})}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        hundred = dataset == "cifar100"
        return PublishedRecipe(
            source="YisenWang/symmetric_cross_entropy_for_noisy_labels@235d93b train_models.py, util.py,"
            " models.py, resnet.py",
            model="resnet44" if hundred else "cnn8",
            augment="standard",
            batch=128,
            epochs=150 if hundred else 120,
            lr=0.1 if hundred else 0.01,
            weight_decay=0.02 if hundred else 0.0,
            l2="loss" if hundred else "descent",
            schedule="milestones",
            milestones=[80, 120] if hundred else [40, 80],
            differs={
                "lr": "Keras' decay=5e-3 divides the rate by 1 + 0.005 x steps too",
                "model": "a pre-activation form" if hundred else "after HanxunH/SCELoss-Reproduce@c81fb33 model.py",
                "weight_decay": "of weight matrices alone" if hundred else "l2(0.01) on one linear layer; here none",
                "augment": "shifts by up to 20 %, mirrored" + (", rotations by up to 20 degrees" if hundred else ""),
            },
        )

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        o, log_p, labels = self.options, logits.log_softmax(1), one_hot(task.labels, logits.shape[1])
        return o.alpha * -(labels * log_p).sum(1) + o.beta * reverse_cross_entropy(log_p, labels, o.A)
