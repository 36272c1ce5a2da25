"""CORES²: the sample sieve."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, PredictTrainingSet, one_hot
from noisysam.methods.recipe import PublishedRecipe

EPS = 1e-8  # the authors add it to probabilities before the logarithm


class CORES2Options(Options):
    beta: float = Field(2.0, ge=0, description="weight of the confidence regulariser at its largest (2)")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the training after which it grows (10 of 100)")
    ramp: float = Field(0.29, ge=0, le=1, description="share of the training over which it grows (29 of 100)")
    start: float = Field(0.3, ge=0, le=1, description="share of the training after which the sieve works (30 of 100)")


@METHODS.register("cores2", source="arXiv 2010.02347, equations 3 and 4, Algorithm 1")
class CORES2(Method):
    """CORES²: predictions are made confident, and samples whose loss is above the mean over all labels are left out.

    Equation: L = v (CE(y) - beta sum_k P_k CE(k)) / (1 + beta), v = [CE(y) <= mean_k CE(k)], P the shares of the noisy
        labels among the samples that passed in the epoch before; beta grows linearly from a tenth of the training on
    Code: UCSC-REAL/cores@cf0945e loss.py, phase1.py
    Deviation: the division by 1 + beta is the code's of the learning rate (it has no momentum and no weight decay, so
        that there the two are the same). Shares of the training, so that they keep their place in one of another
        length.
    State: none per sample; 2 K numbers
    Checked: equal to the authors' loss, gradient, sieve and prior to 1e-6 over several epochs, beta at every epoch of
        100 (tests/parity); cross-entropy at beta = 0 before the sieve.
    """

    Options: ClassVar[type[Options]] = CORES2Options
    requires = ("one process",)
    smooths = False
    prior: Tensor
    left_out: Tensor

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="UCSC-REAL/cores@cf0945e phase1.py",
            model="resnet34",
            augment="standard",
            batch=64,
            epochs=100,
            lr=0.1,
            momentum=0.0,
            weight_decay=0.0,
            schedule="milestones",
            milestones=[50],
        )

    def on_stage(self, labels: Tensor) -> None:
        self.counts = one_hot(labels, self.info.classes).sum(0)
        self.register_buffer("prior", self.counts / self.counts.sum())
        self.register_buffer("left_out", torch.zeros_like(self.counts))

    def done(self) -> float:
        """The share of the training that is over when this epoch begins."""
        return self.epoch / self.info.epochs

    def beta(self) -> float:
        """The weight of the regulariser in this epoch."""
        o = self.options
        return float(o.beta * np.clip((self.done() - o.warmup) / max(o.ramp, 1e-9), 0, 1))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        passed = self.counts - self.left_out
        self.prior = passed / passed.sum().clamp(min=1)
        self.left_out = torch.zeros_like(self.counts)

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        """The sieve."""
        ((task,), (z,)) = tasks, logits
        margin = self.cross_entropy(z, task.labels) - every_loss(z).mean(1)
        sieves = self.done() > self.options.start + 1e-9
        passes = (margin <= 0).float() if sieves else torch.ones(len(margin), device=margin.device)
        task.plan["weight"] = passes * len(passes) / passes.sum().clamp(min=1)
        left_out = self.left_out + (1 - passes) @ one_hot(task.labels, self.info.classes)
        self.left_out = torch.where(torch.isfinite(margin).all(), left_out, self.left_out)

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        beta = self.beta()
        regularised = self.cross_entropy(logits, task.labels) - beta * (every_loss(logits) * self.prior).sum(1)
        return task.plan["weight"] * regularised / (1 + beta)


def every_loss(logits: Tensor) -> Tensor:
    """-log(p_k + 1e-8) of each row for every class (n, K)."""
    return -(logits.softmax(1) + EPS).log()
