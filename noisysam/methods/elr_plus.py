"""ELR+."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, RunInfo, one_hot
from noisysam.methods.elr import ELROptions
from noisysam.methods.mixup import draw, mix
from noisysam.methods.recipe import PublishedRecipe


class ELRPlusOptions(ELROptions):
    alpha: float = Field(1.0, gt=0, description="of the mixup's Beta(alpha, alpha) (1)")
    ema: float = Field(0.997, gt=0, lt=1, description="decay of the weight averages that make the targets (0.997)")
    ema_ramp: float = Field(
        0.57, ge=0, le=1, description="share of the training over which that decay grows (0.57: 40,000 of 70,400 steps)"
    )
    ramp: float = Field(
        0.0, ge=0, le=1, description="share of the training over which lambda grows (CIFAR-100: 0.45, 40,000 steps)"
    )


@METHODS.register("elr+", source="arXiv 2007.00151, section 4 and appendix E", revision=2)
class ELRPlus(Method):
    """ELR+: two networks with mixup; each one's targets come from the moving average of the other's weights.

    Equation: t <- beta t + (1 - beta) p of the other's average, on the plain batch; loss on mixed rows CE + lambda
        log(1 - <p, mixed t>); the average's decay is ema exp(-5 (1 - s)^2), s the share of its ramp that is over
    Code: shengliu66/ELR@934af53 ELR_plus/trainer/trainer.py, model/loss.py, utils/util.py
    Deviation: both ramps are shares of the training, so that they keep their place in one of another length: 40,000
        steps are 0.57 of 200 epochs of 352 steps (CIFAR-10) and 0.45 of 250 (CIFAR-100). The networks take turns by
        steps (code: by epochs). On CIFAR-100 the code also multiplies the labels by t; not done.
    State: 8 K bytes per sample
    Checked: equal to the authors' targets, loss, gradient and decays to 1e-6 over several epochs (tests/parity); the
        average after each step.
    """

    Options = ELRPlusOptions
    requires = ("one process",)
    provides = ("one view",)
    networks = 2
    targets: Tensor

    def __init__(self, options: Any, info: RunInfo) -> None:
        super().__init__(options, info)
        self.teacher_decay = options.ema  # set anew before each step

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        if dataset == "cifar100":
            return {"beta": 0.9, "strength": 7.0, "ramp": 0.45, "ema_ramp": 0.45}
        return {"beta": 0.9, "strength": 1.0} if noise_type.startswith("asymmetric") else {}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        hundred = dataset == "cifar100"
        return PublishedRecipe(
            source="shengliu66/ELR@934af53 ELR_plus (config_cifar10, config_cifar10_asym, config_cifar100)",
            model="preact-resnet18",
            augment="standard",
            batch=128,
            epochs=250 if hundred else 200,
            lr=0.02,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[200] if hundred else [150],
        )

    def on_stage(self, labels: Tensor) -> None:
        shape = (2, self.info.samples, self.info.classes)
        self.register_buffer("targets", torch.zeros(shape, device=self.info.device))
        self.progress = 0.0  # epochs at the end of this step

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        for number, batch in enumerate(epoch, start=1):
            self.progress = epoch.number + number / len(epoch)
            self.teacher_decay = self.options.ema * self.grown(self.options.ema_ramp, self.progress + 1 / len(epoch))
            yield batch

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
            task.plan["strength"] = self.options.strength * self.grown(self.options.ramp, self.progress)

    def grown(self, ramp: float, progress: float) -> float:
        """exp(-5 (1 - s)^2), s the share of a ramp that is over after so many epochs."""
        epochs = ramp * self.info.epochs
        return math.exp(-5 * max(0.0, 1 - progress / epochs) ** 2) if epochs else 1.0

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        agreement = (p * task.plan["target"]).sum(1)
        return self.cross_entropy(logits, task.labels) + task.plan["strength"] * torch.log(1 - agreement)

    def outputs(self, logits: Sequence[Tensor]) -> Tensor:
        """The mean of both networks' logits."""
        return torch.stack(list(logits)).mean(0)
