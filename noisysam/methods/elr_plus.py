"""ELR+."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.base import METHODS, Forward, Method, RunInfo, one_hot
from noisysam.methods.elr import ELROptions
from noisysam.methods.mixup import draw, mix


class ELRPlusOptions(ELROptions):
    alpha: float = Field(1.0, gt=0, description="of the mixup's Beta(alpha, alpha) (1)")
    ema: float = Field(0.997, gt=0, lt=1, description="decay of the weight averages that make the targets (0.997)")
    ramp: float = Field(0.0, ge=0, le=1, description="share of the training over which lambda grows (CIFAR-100: 0.4)")


@METHODS.register("elr+", source="arXiv 2007.00151, section 4 and appendix E")
class ELRPlus(Method):
    """ELR+: two networks with mixup; each one's targets come from the moving average of the other's weights.

    Equation: t <- beta t + (1 - beta) p of the other's average, on the plain batch; loss on mixed rows CE + lambda
    log(1 - <p, mixed t>).
    Code: shengliu66/ELR@934af53 ELR_plus.
    Deviation: on CIFAR-100 the code also multiplies the labels by t; not done.
    State: 8 K bytes per sample.
    Checked: target recursion, mixing and loss by hand; the average after each step.
    """

    Options = ELRPlusOptions
    networks = 2
    soft_labels = True
    index_free = True
    targets: Tensor

    def __init__(self, options: Any, info: RunInfo) -> None:
        super().__init__(options, info)
        self.teacher_decay = options.ema

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        if dataset == "cifar100":
            return {"beta": 0.9, "strength": 7.0, "ramp": 0.4}
        return {"beta": 0.9, "strength": 1.0} if noise_type == "asymmetric" else {}

    def on_stage(self, labels: Tensor) -> None:
        shape = (2, self.info.samples, self.info.classes)
        self.register_buffer("targets", torch.zeros(shape, device=self.info.device))

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        labels = one_hot(batch.labels, self.info.classes)
        found = []
        for k in range(2):
            p = forward(1 - k, batch.inputs, averaged=True).softmax(1)
            weight, other = draw(self.options.alpha, len(labels), self.generator, self.rng, labels.device)
            plan = {"p": p, "index": batch.index, "other": other, "weight": weight}
            found.append(Task(k, mix(batch.inputs, other, weight), mix(labels, other, weight), plan=plan))
        return found

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        for task in tasks:
            k, index, beta = task.network, task.plan["index"], self.options.beta
            new = beta * self.targets[k, index] + (1 - beta) * task.plan.pop("p")
            self.write(self.targets[k], index, new)
            task.plan["target"] = mix(new, task.plan["other"], task.plan["weight"])
            task.plan["strength"] = self.options.strength * self.growth()

    def growth(self) -> float:
        """Of lambda: exp(-5 (1 - t)^2), t the share of the ramp that is over."""
        epochs = self.options.ramp * self.info.epochs
        return math.exp(-5 * max(0.0, 1 - self.epoch / epochs) ** 2) if epochs else 1.0

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        agreement = (p * task.plan["target"]).sum(1)
        return self.cross_entropy(logits, task.labels) + task.plan["strength"] * torch.log(1 - agreement)

    def outputs(self, logits: Sequence[Tensor]) -> Tensor:
        """The mean of both networks' logits."""
        return torch.stack(list(logits)).mean(0)
