"""Jo-SRC: joint sample selection and model regularisation by consistency."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, RunInfo, one_hot
from noisysam.methods.recipe import Epochs, PublishedRecipe

FLAT = 10.0  # by which the logits of a target for a sample of no class are divided


class JoSRCOptions(Options):
    warmup: Epochs = Field(10, ge=1, description="epochs of the selected samples alone (10 of 200)")
    eps: float = Field(0.6, ge=0, lt=1, description="mass of the label that is spread over the other classes (0.6)")
    tau: float = Field(0.75, ge=0, le=1, description="threshold of clean samples at the end of the warm-up (0.75)")
    tau_last: float = Field(0.95, ge=0, le=1, description="the same at the end of the training (0.95)")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the consistency, 1 - alpha that of the labels (0.5)")
    ema: float = Field(0.99, gt=0, lt=1, description="decay of the weight average that guesses labels (0.99)")


@METHODS.register("jo-src", source="arXiv 2103.13029, section 3")
class JoSRC(Method):
    """Jo-SRC: rows near their label are clean; others get the average's guess where two views agree, else a flat one.

    Equation: clean where 1 - JS(p of view 1, smoothed y) >= tau; else of a known class where both views predict the
        same one, its target the mean prediction q of the weights' average; else of none, softmax(q / 10), and its
        consistency counts negatively; L = (1 - alpha) sum of both views' CE + alpha symmetric KL between them, in bits;
        in the warm-up CE on the clean alone, tau growing from 0; afterwards tau grows to tau_last
    Code: NUST-Machine-Intelligence-Laboratory/Jo-SRC@e5c8bd9 cifar100.py, utils/ema.py
    Deviation: where no row of a batch is clean in the warm-up, its loss is 0 (code: not a number).
    Checked: equal to the authors' thresholds, targets, loss and gradient to 1e-6 over epochs of both parts
        (tests/parity).
    """

    Options = JoSRCOptions
    requires = ("one process",)
    provides = ("index",)
    views = 2
    smooths = False

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="NUST-Machine-Intelligence-Laboratory/Jo-SRC@e5c8bd9 config/cifar100.cfg, cifar100.py",
            augment="standard",
            batch=128,
            epochs=200,
            base_opt="adam",
            lr=1e-3,
            weight_decay=0.0,
            schedule="linear",
            decay_from=80,
            final_momentum=0.1,
            differs={"model": "a CNN of seven layers, not in this package"},
        )

    def __init__(self, options: Any, info: RunInfo) -> None:
        super().__init__(options, info)
        self.teacher_decay = options.ema

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        for batch in epoch:  # its crops are those of any other method
            batch.views = [batch.inputs, epoch.view(batch.index)]
            yield batch

    @property
    def threshold(self) -> float:
        o, epochs = self.options, self.info.epochs
        if self.epoch < o.warmup:
            return o.tau * self.epoch / o.warmup
        done = (self.epoch - o.warmup) / max(1, epochs - o.warmup)
        return o.tau + (o.tau_last - o.tau) * done

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        plan = {}
        if self.epoch >= self.options.warmup:
            plan["guess"] = torch.stack([forward(0, x, averaged=True).softmax(1) for x in batch.views]).mean(0)
        return [Task(0, torch.stack(batch.views, 1), batch.labels, batch.index, plan, forwards=(1, 1))]

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        """Targets, signs of the consistency, and in the warm-up which rows count."""
        ((task,), (z,)) = tasks, logits
        p, eps, classes = z[:, 0].softmax(1), self.options.eps, self.info.classes
        rest = eps / (classes - 1)
        target = (1 - eps - rest) * one_hot(task.labels, classes).to(p) + rest
        clean = 1 - divergence(p, target) >= self.threshold
        if "guess" in task.plan:
            agree = z[:, 0].argmax(1) == z[:, 1].argmax(1)
            guess = task.plan.pop("guess")
            guess = guess.where(agree[:, None], (guess / FLAT).softmax(1))
            target = target.where(clean[:, None], guess)
            task.plan["sign"] = torch.where(clean | agree, 1.0, -1.0)
        else:
            task.plan["weight"] = clean * (len(clean) / clean.sum().clamp(min=1))
        task.plan["target"] = target

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, 2, K)."""
        log_p = logits.log_softmax(2)
        supervised = -(task.plan["target"][:, None] * log_p).sum((1, 2))
        if "weight" in task.plan:
            return task.plan["weight"] * supervised
        apart = ((log_p[:, 0].exp() - log_p[:, 1].exp()) * (log_p[:, 0] - log_p[:, 1])).sum(1) / math.log(2)
        alpha = self.options.alpha
        return (1 - alpha) * supervised + alpha * task.plan["sign"] * apart


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence of rows (n, K), in bits: from 0 to 1."""
    m = (p + q) / 2
    parts = (torch.xlogy(d, d) - torch.xlogy(d, m) for d in (p, q))
    return sum(part.sum(1) for part in parts) / (2 * math.log(2))  # type: ignore[return-value]
