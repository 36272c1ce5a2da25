"""Co-teaching."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import METHODS, Method, Options
from noisysam.objective import Task


class CoTeachingOptions(Options):
    forget_rate: float | None = Field(
        None, ge=0, lt=1, description="share of each batch left out in the end (default: the run's noise rate, oracle)"
    )
    ramp: int = Field(10, ge=1, description="epochs until the share is reached (published 10)")


@METHODS.register("co-teaching", source="arXiv 1804.06872, Algorithm 1")
class CoTeaching(Method):
    """Co-teaching: two networks; each learns from the rows of the batch that have the smallest loss for the other.

    The share kept falls linearly from all to 1 - tau over the first ``ramp`` epochs. tau is the measured share of
    wrong labels, which makes the run oracle; with ``forget_rate`` given it is blind.
    """

    Options = CoTeachingOptions
    networks = 2

    @classmethod
    def knows(cls, options: CoTeachingOptions) -> tuple[str, ...]:
        return ("rate",) if options.forget_rate is None else ()

    def keep(self, rows: int, epoch: int) -> int:
        """How many of ``rows`` rows are kept in an epoch (counted from 0); at least one."""
        tau = self.facts.rate if self.options.forget_rate is None else self.options.forget_rate
        assert tau is not None
        return max(1, int(rows * (1 - tau * min(1.0, epoch / self.options.ramp))))

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
