"""PENCIL."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, Stage, StageContext, one_hot
from noisysam.methods.recipe import PublishedRecipe

SCALE = 10.0  # of the labels' logits at first


class PENCILOptions(Options):
    begin: float = Field(0.22, ge=0, le=1, description="share of --epochs before labels are learnt (70 of 320)")
    end: float = Field(0.625, gt=0, le=1, description="share of --epochs after which they are fixed (200 of 320)")
    alpha: float = Field(0.4, ge=0, description="weight of the compatibility with the given label (0.4)")
    beta: float = Field(0.1, ge=0, description="weight of the predictions' entropy (0.1)")
    lr_y: float = Field(600.0, gt=0, description="learning rate of the labels' logits, for batches of 128 (600)")
    last_lr: float | None = Field(
        None, gt=0, description="learning rate once labels are fixed (default: --lr; published 0.2)"
    )
    compatibility: Literal["code", "paper"] = Field(
        "code", description="cross-entropy of the label that takes the probabilities for logits; or minus their log"
    )

    @model_validator(mode="after")
    def _in_order(self) -> "PENCILOptions":
        if self.begin > self.end:
            raise ValueError(f"begin={self.begin:g} should not be above end={self.end:g}")
        return self


@METHODS.register("pencil", source="arXiv 1903.07788, section 3")
class PENCIL(Method):
    """PENCIL: each sample's label distribution is learnt with the network, by plain gradient descent.

    Equation: CE(y, p); then KL(p || q) / K + alpha L_o(q, y) + beta H(p) / K with q = softmax(z) and z, at first 10
        e_y, learnt too; then KL(p || q) / K with q fixed; the rate is constant until then; L_o = CE(y, softmax(q)), or
        -log q_y as in the paper
    Code: yikun2019/PENCIL@8a89ed5 PENCIL.py
    Deviation: the last part begins with no momentum and follows the run's schedule (paper: 0.2, a tenth at each third;
        in the code an integer division makes the rate zero after the first).
    State: 4 K bytes per sample
    Checked: equal to the authors' loss, gradient and labels to 1e-6 over five visits of each part (tests/parity).
    """

    Options = PENCILOptions
    requires = ("index", "one process")
    provides = ("index", "one view")

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"last_lr": 0.2}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="yikun2019/PENCIL@8a89ed5 PENCIL.py (its defaults)",
            augment="standard",
            batch=128,
            epochs=320,
            lr=0.06,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[320 / 3, 640 / 3],
            differs={"model": "a pre-activation ResNet-32, not in this package"},
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, epochs = self.options, self.info.epochs
        until, self.fixed = min(epochs, max(1, round(o.end * epochs))), False
        yield Stage(settings={"schedule": "constant", "epochs": until})
        if until < epochs:
            self.fixed = True
            lr = {} if o.last_lr is None else {"lr": o.last_lr}
            yield Stage(start="continue", settings={"warmup": 0.0, "epochs": epochs - until, **lr})

    def on_stage(self, labels: Tensor) -> None:
        if not hasattr(self, "z"):  # kept for the last part
            self.z = nn.Parameter(SCALE * one_hot(labels, self.info.classes))

    def auxiliary_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.z], lr=self.options.lr_y)

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        o = self.options
        if not self.fixed and self.epoch < round(o.begin * self.info.epochs):
            return self.cross_entropy(logits, task.labels)
        assert task.index is not None
        log_p, log_q = logits.log_softmax(1), self.z[task.index].log_softmax(1)
        p = log_p.exp()
        if self.fixed:
            return (p * (log_p - log_q.detach())).mean(1)
        agreed = log_q if o.compatibility == "paper" else log_q.exp().log_softmax(1)
        compatibility = F.nll_loss(agreed, task.labels, reduction="none")
        return (p * (log_p - log_q)).mean(1) + o.alpha * compatibility - o.beta * (p * log_p).mean(1)
