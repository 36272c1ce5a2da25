"""Generalised Jensen-Shannon loss."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, one_hot
from noisysam.methods.recipe import PublishedRecipe


class GJSOptions(Options):
    pi: float = Field(
        0.5, gt=0, lt=1, description="weight of the label; 0: cross-entropy, 1: absolute error (limits; 0.1 to 0.9)"
    )


GJS_PI = {  # the authors' weight of the label, by noise
    ("cifar10", "symmetric"): {0.0: 0.5, 0.2: 0.3, 0.4: 0.9, 0.6: 0.1, 0.8: 0.1},
    ("cifar10", "asymmetric"): {0.2: 0.3, 0.4: 0.3},
    ("cifar100", "symmetric"): {0.0: 0.3, 0.2: 0.3, 0.4: 0.5, 0.6: 0.9, 0.8: 0.1},
    ("cifar100", "asymmetric"): {0.2: 0.5, 0.4: 0.1},
}


@METHODS.register("gjs", source="arXiv 2105.04522, the GJS loss")
class GJS(Method):
    """Generalised Jensen-Shannon divergence between the label and the predictions for two views of the image.

    Equation: L = (H(m) - pi H(e_y) - sum_v (1 - pi) / 2 H(p_v)) / Z, m = pi e_y + sum_v (1 - pi) / 2 p_v, Z = -(1 - pi)
        log(1 - pi)
    Code: ErikEnglesson/GJS@1a3c9e0 losses.py
    Deviation: the run's own augmentation; the authors' is RandAugment and cutout.
    Checked: equal to the authors' loss and gradient to 1e-7 (tests/parity); numpy, values and gradients; equal views:
        cross-entropy as pi falls to 0, half of mae as it rises to 1.
    """

    Options = GJSOptions
    provides = ("index", "hard labels")
    views = 2
    smooths = False

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        pi = GJS_PI.get((dataset, noise_type), {}).get(round(noise, 3))
        return {} if pi is None else {"pi": pi}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        asymmetric = noise_type.startswith("asymmetric")
        if dataset == "cifar100":
            lr, decay = (0.4, 1e-4) if asymmetric else (0.2, 5e-5)
        else:
            lr, decay = 0.1, 1e-3 if asymmetric else 5e-4
        return PublishedRecipe(
            source="ErikEnglesson/GJS@1a3c9e0 scripts/C10, scripts/C100 (gjs-*.yaml), train.py",
            augment="rand",
            batch=128,
            epochs=400,
            lr=lr,
            nesterov=True,
            weight_decay=decay,
            schedule="milestones",
            milestones=[200, 300],
            differs={
                "model": "PreAct-ResNet-34, not in this package",
                "augment": "one operation of RandAugment, magnitude 3, and cutout of 16; here two of magnitude 9",
            },
        )

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        for batch in epoch:  # its crops are those of any other method
            yield replace(batch, views=[batch.inputs, epoch.batch(batch.index).inputs])

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        return [Task(0, torch.stack(batch.views, 1), batch.labels, batch.index)]

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, 2, K)."""
        pi, (_, views, classes) = self.options.pi, logits.shape
        labels, log_p = one_hot(task.labels, classes), logits.log_softmax(2)
        parts = torch.cat([labels.log().unsqueeze(1) + math.log(pi), log_p + math.log((1 - pi) / views)], 1)
        log_m = parts.logsumexp(1)
        own = pi * torch.xlogy(labels, labels).sum(1) + (1 - pi) * (log_p.exp() * log_p).sum(2).mean(1)
        return ((log_m.exp() * log_m).sum(1) - own) / ((1 - pi) * math.log1p(-pi))
