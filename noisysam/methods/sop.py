"""Sparse over-parameterisation."""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, one_hot
from noisysam.methods.recipe import PublishedRecipe

TINY = 1e-4  # the authors' clamp of probabilities
START = 1e-8  # standard deviation of u and v at first


class SOPOptions(Options):
    lr_u: float = Field(10.0, gt=0, description="learning rate of u (CIFAR-10: 10; CIFAR-100: 1; asymmetric: 0.1)")
    lr_v: float = Field(10.0, gt=0, description="learning rate of v (10; asymmetric CIFAR-100: 100)")


@METHODS.register("sop", source="arXiv 2202.14026, equations 3 to 6")
class SOP(Method):
    """SOP: each sample's label noise is modelled by parameters of its own, sparse by the way they are learnt.

    Equation: s = u^2 y - v^2 (1 - y); CE(normalised(p + s), y) + |onehot(argmax p) + s - y|^2, v constant in the first
        term; u and v step by plain gradient descent, each with its rate
    Code: shengliu66/SOP@4d991ce model/loss.py, train.py
    Deviation: without the consistency and balance terms of SOP+ (method sop+).
    State: 4 (K + 1) bytes per sample
    Checked: equal to the authors' loss, gradient and steps of u and v to 1e-6 over five visits (tests/parity); own
        steps by the first evaluation.
    """

    Options: ClassVar[type[Options]] = SOPOptions
    requires = ("index", "one process")
    smooths = False

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        if dataset != "cifar100":
            return {}
        return {"lr_u": 0.1, "lr_v": 100.0} if noise_type.startswith("asymmetric") else {"lr_u": 1.0, "lr_v": 10.0}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        released = "the released configuration is that of SOP+ (PreAct-ResNet-18, AutoAugment, cosine, 300 epochs)"
        unknown = {"cifar100": "the paper's table was not at hand: these are its values for CIFAR-10"}
        return PublishedRecipe(
            source="arXiv 2202.14026, table A.1, as quoted; rates of u and v: shengliu66/SOP@4d991ce README.md",
            model="resnet34",
            augment="standard",
            batch=128,
            epochs=120,
            lr=0.02,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[40, 80],
            differs={"code": released, **(unknown if dataset == "cifar100" else {})},
        )

    def on_stage(self, labels: Tensor) -> None:
        samples, classes = self.info.samples, self.info.classes
        draws = torch.from_numpy(self.rng.normal(0, START, (samples, 1 + classes))).float().to(self.info.device)
        self.u, self.v = nn.Parameter(draws[:, :1].clone()), nn.Parameter(draws[:, 1:].clone())

    def auxiliary_optimizer(self) -> torch.optim.Optimizer:
        o = self.options
        return torch.optim.SGD([{"params": [self.u], "lr": o.lr_u}, {"params": [self.v], "lr": o.lr_v}])

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return self.modelled(logits, task)[1]

    def modelled(self, logits: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        """The prediction with its modelled noise (n, K), and the loss of each row."""
        assert task.index is not None
        y = one_hot(task.labels, logits.shape[1])
        u = (self.u[task.index] ** 2 * y).clamp(0, 1)
        v = (self.v[task.index] ** 2 * (1 - y)).clamp(0, 1)
        p = (logits.softmax(1) + u - v.detach()).clamp(min=TINY)
        p = (p / p.sum(1, keepdim=True)).clamp(TINY, 1)
        hard = one_hot(logits.detach().argmax(1), logits.shape[1])
        return p, -(y * p.log()).sum(1) + ((hard + u - v - y) ** 2).sum(1)
