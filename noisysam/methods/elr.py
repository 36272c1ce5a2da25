"""Early-learning regularisation."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options


class ELROptions(Options):
    beta: float = Field(
        0.7, ge=0, lt=1, description="memory of the targets (CIFAR-10: 0.7; CIFAR-100 and asymmetric: 0.9)"
    )
    strength: float = Field(3.0, ge=0, description="lambda (CIFAR-10: 3, asymmetric: 1; CIFAR-100: 7)")


@METHODS.register("elr", source="arXiv 2007.00151, section 4")
class ELR(Method):
    """Early-learning regularisation: CE + lambda log(1 - <p, t>), t a running average of each sample's predictions.

    Equation: t <- beta t + (1 - beta) p; CE + lambda log(1 - <p, t>); p clamped at 1e-4, and renormalised in t
    Code: shengliu66/ELR@934af53 ELR/model/loss.py
    State: 4 K bytes per sample
    Checked: equal to the authors' targets, loss and gradient to 1e-6 over five visits (tests/parity); by numpy.
    """

    Options = ELROptions
    requires = ("index", "one process")
    targets: Tensor

    def on_stage(self, labels: Tensor) -> None:
        shape = (self.info.samples, self.info.classes)
        self.register_buffer("targets", torch.zeros(shape, device=self.info.device))

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        (task,), beta = tasks, self.options.beta
        assert task.index is not None
        p = logits[0].softmax(1).clamp(1e-4, 1 - 1e-4)
        new = beta * self.targets[task.index] + (1 - beta) * p / p.sum(1, keepdim=True)
        self.write(self.targets, task.index, new)
        task.plan["target"] = new

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        agreement = (p * task.plan["target"]).sum(1)
        return self.cross_entropy(logits, task.labels) + self.options.strength * torch.log(1 - agreement)
