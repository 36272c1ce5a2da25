"""Generalised cross-entropy."""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, one_hot


class GCEOptions(Options):
    q: float = Field(0.7, gt=0, le=1, description="0: cross-entropy (limit), 1: mean absolute error (published 0.7)")


@METHODS.register("gce", source="arXiv 1805.07836, the L_q loss")
class GCE(Method):
    """Generalised cross-entropy, (1 - p_y^q) / q.

    Equation: L = (1 - p_y^q) / q
    Code: none by the authors; HanxunH/Active-Passive-Losses@04bce53 loss.py
    Checked: equal to that code's loss and gradient to 1e-12 (tests/parity); numpy, values and gradients; cross-entropy
        as q falls to 0, half of mae at q = 1.
    """

    Options: ClassVar[type[Options]] = GCEOptions
    smooths = False

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        q = self.options.q
        log_p = logits.log_softmax(1)
        return ((1 - (q * log_p).exp()) / q * one_hot(task.labels, logits.shape[1])).sum(1)
