"""Co-teaching."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, Rate, rate_facts
from noisysam.methods.recipe import Epochs, PublishedRecipe


def smallest(losses: Tensor, kept: int | Tensor) -> Tensor:
    """rows / kept for each of the ``kept`` smallest losses (those that are not finite come last), 0 for the others."""
    rank = losses.nan_to_num(torch.inf).argsort().argsort()
    return (rank < kept) * (len(losses) / kept)


UNSCALED = {"inputs": "images in [0, 1]; here they are standardised"}


class CoTeachingOptions(Options):
    forget_rate: Rate = Field(None, description="share left out in the end (default: the run's noise rate; 0.5x of it)")
    ramp: Epochs = Field(10, ge=1, description="epochs until the share is reached (published 10)")
    schedule: Literal["paper", "code"] = Field(
        "paper",
        description="share left out in epoch e = 0, 1, ...: min(e / ramp, 1) of it, or min((e + 1) / (ramp - 1), 1)",
    )


@METHODS.register("co-teaching", source="arXiv 1804.06872, Algorithm 1", revision=2)
class CoTeaching(Method):
    """Co-teaching: two networks; each learns from the rows of the batch that have the smallest loss for the other.

    tau is the measured share of wrong labels, which makes the run oracle; with a number as ``forget_rate`` it is blind.

    Equation: of each batch the 1 - tau min(1, epoch / ramp) with the smallest losses of the other network, their mean.
    Code: bhanML/Co-teaching@7c7fbe2 loss.py, main.py
    Deviation: the mean over the rows that are kept, as in the paper; the code divides it by their number once more.
        ``schedule=code`` is the code's linspace(0, tau, ramp), whose training begins at its second value.
    Checked: equal to the authors' selection and gradient to 1e-6 over 14 epochs of both schedules (tests/parity);
        selection and schedule by hand; the exchange of rows between the networks.
    """

    Options = CoTeachingOptions
    requires = ("one process",)
    networks = 2
    headline = "mean of networks"

    @classmethod
    def noise_facts(cls, options: CoTeachingOptions) -> tuple[str, ...]:
        return rate_facts(options.forget_rate)

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"schedule": "code"}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="bhanML/Co-teaching@7c7fbe2 main.py",
            model="cnn9",
            augment="none",
            batch=128,
            epochs=200,
            base_opt="adam",
            lr=1e-3,
            weight_decay=0.0,
            schedule="linear",
            decay_from=100 if dataset == "cifar100" else 80,
            final_momentum=0.1,
            differs=UNSCALED,
        )

    def keep(self, rows: int, epoch: int) -> int:
        """How many of ``rows`` rows are kept in an epoch (counted from 0); at least one."""
        o = self.options
        done = epoch / o.ramp if o.schedule == "paper" else (epoch + 1) / max(1, o.ramp - 1)
        return max(1, int(rows * (1 - self.rate(o.forget_rate) * min(1.0, done))))

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        rows = len(logits[0])
        kept = self.keep(rows, self.epoch)
        for k, other in ((0, 1), (1, 0)):
            losses = self.cross_entropy(logits[other], tasks[other].labels)
            order = losses.nan_to_num(torch.inf).argsort()
            weight = torch.zeros_like(losses)
            weight[order[:kept]] = rows / kept
            tasks[k].plan["weight"] = weight

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return task.plan["weight"] * self.cross_entropy(logits, task.labels)
