"""Mixup."""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.base import METHODS, Forward, Method, Options, one_hot
from noisysam.methods.recipe import PublishedRecipe


class MixupOptions(Options):
    alpha: float = Field(1.0, gt=0, description="of Beta(alpha, alpha); arXiv 2010.01412 tries 1, 8, 16, 32")


@METHODS.register("mixup", source="arXiv 1710.09412")
class Mixup(Method):
    """Mixup: each row is mixed with another of its batch, inputs and labels by one weight per batch.

    Equation: x = l x_i + (1 - l) x_j, CE to l y_i + (1 - l) y_j, l ~ Beta(alpha, alpha).
    Code: facebookresearch/mixup-cifar10@eaff31a train.py
    Checked: equal to the authors' inputs, loss and gradient to 1e-6 on the same draws (tests/parity); partners are a
        permutation.
    """

    Options = MixupOptions
    provides = ("one view",)

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="facebookresearch/mixup-cifar10@1fe8c5e train.py, models/resnet.py",
            model="preact-resnet18",
            augment="standard",
            batch=128,
            epochs=200,
            lr=0.1,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[100, 150],
        )

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        weight, other = draw(self.options.alpha, len(batch.inputs), self.generator, self.rng, batch.inputs.device)
        labels = one_hot(batch.labels, self.info.classes)
        inputs, labels = mix(batch.inputs, other, weight), mix(labels, other, weight)
        return [Task(k, inputs, labels) for k in range(self.networks)]


def draw(
    alpha: float, rows: int, generator: torch.Generator | None, rng: np.random.Generator, device: torch.device
) -> tuple[float, torch.Tensor]:
    """One weight from Beta(alpha, alpha), drawn on the host, and a random partner for each row, on the device."""
    return float(rng.beta(alpha, alpha)), torch.randperm(rows, generator=generator, device=device)


def mix(values: torch.Tensor, other: torch.Tensor, weight: float) -> torch.Tensor:
    """``weight`` of each row and the rest of its partner."""
    return weight * values + (1 - weight) * values[other]
