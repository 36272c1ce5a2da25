"""Normalised and reverse cross-entropy."""

from typing import Any

from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, one_hot
from noisysam.methods.recipe import PublishedRecipe
from noisysam.methods.sce import LOG_ZERO, RELEASED, reverse_cross_entropy


class NCERCEOptions(Options):
    alpha: float = Field(1.0, ge=0, description="weight of the normalised cross-entropy (CIFAR-10: 1; CIFAR-100: 10)")
    beta: float = Field(1.0, ge=0, description="weight of the reverse cross-entropy (CIFAR-10: 1; CIFAR-100: 0.1)")
    A: float = LOG_ZERO


@METHODS.register("nce-rce", source="arXiv 2006.13554, active passive loss")
class NCERCE(Method):
    """Active passive loss: normalised cross-entropy and reverse cross-entropy.

    Equation: L = alpha NCE + beta RCE, NCE = log p_y / sum_k log p_k, RCE = -A (1 - p_y), A in place of log 0
    Code: HanxunH/Active-Passive-Losses@04bce53 loss.py
    Deviation: A = -4, by which the code normalises RCE elsewhere. In this loss it clips labels at 1e-4, which is A =
        -9.21: there the reverse cross-entropy weighs 2.3 times as much (A=-9.2103; --preset published).
    Checked: equal to the released loss and gradient at A = log 1e-4 to 1e-7 (tests/parity); numpy, values and
        gradients; NCE over all labels sums to 1.
    """

    Options = NCERCEOptions
    smooths = False

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"A": RELEASED, **({"alpha": 10.0, "beta": 0.1} if dataset == "cifar100" else {})}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        hundred = dataset == "cifar100"
        resnet50 = {"model": "ResNet-50, not in this package", "augment": "rotations by up to 20 degrees too"}
        return PublishedRecipe(
            source="HanxunH/Active-Passive-Losses@04bce53 configs/cifar10, configs/cifar100 (nce+rce.yaml), dataset.py",
            model=None if hundred else "cnn8",
            augment="standard",
            batch=128,
            epochs=200 if hundred else 120,
            lr=0.1 if hundred else 0.01,
            weight_decay=1e-5 if hundred else 1e-4,
            clip=5.0,
            schedule="cosine",
            differs=resnet50 if hundred else {},
        )

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        o, log_p, labels = self.options, logits.log_softmax(1), one_hot(task.labels, logits.shape[1])
        normalised = (labels * log_p).sum(1) / log_p.sum(1)
        return o.alpha * normalised + o.beta * reverse_cross_entropy(log_p, labels, o.A)
