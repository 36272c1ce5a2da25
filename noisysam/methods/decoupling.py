"""Decoupling."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options
from noisysam.methods.recipe import Epochs


class DecouplingOptions(Options):
    warmup: Epochs = Field(20, ge=0, description="epochs of plain training first (code: iterations, none unless given)")
    floor: float = Field(
        0.1, ge=0, le=1, description="least share of the batch that the mean is taken over (code 0.1; paper: open)"
    )


@METHODS.register("decoupling", source="arXiv 1706.02613, Algorithm 1 (update by disagreement)", revision=2)
class Decoupling(Method):
    """Decoupling: two networks learn from the rows that they predict differently, and from no others.

    Equation: L_k = sum_i d_i CE(y_i, p_ki) / max(sum_i d_i, floor n), d_i = 1[argmax p_1i != argmax p_2i]
    Code: emalach/UpdateByDisagreement@86d01a8 train.py
    Deviation: a warm-up in epochs, not in iterations; without the code's weights by class (of two classes) and its
        buffer of rows. Where no rows differ nothing is learned in that step, as in the paper: only weight decay and
        momentum move the weights.
    Checked: equal to the code's loss and gradient, without weights by class, to 1e-6 over five epochs (tests/parity);
        weights of hand-made disagreements, none of them included.
    """

    Options = DecouplingOptions
    requires = ("one process",)
    networks = 2
    headline = "mean of networks"

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        rows = len(logits[0])
        weight = torch.ones_like(logits[0][:, 0])
        if self.epoch >= self.options.warmup:
            chosen = differing(logits)
            weight = chosen * (rows / chosen.sum().clamp(min=max(1.0, self.options.floor * rows)))
        for task in tasks:
            task.plan["weight"] = weight

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return task.plan["weight"] * self.cross_entropy(logits, task.labels)


def differing(logits: Sequence[Tensor]) -> Tensor:
    """The rows (n,) that the two networks predict differently."""
    return logits[0].argmax(1) != logits[1].argmax(1)
