"""Forward correction of the loss by the transition matrix of the noise, known or estimated."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, RunInfo, Stage, StageContext, one_hot
from noisysam.methods.recipe import PublishedRecipe


class ForwardOptions(Options):
    matrix: Literal["true", "anchors"] = Field(
        "anchors", description="transition matrix: the run's own (oracle), or estimated by a first training (published)"
    )
    quantile: float = Field(
        0.97, gt=0, le=1, description="anchor of a class, by its probability; 1: largest (0.97; CIFAR-100: 1)"
    )
    teacher: Literal["last", "selected"] = Field(
        "last", description="epoch that estimates: the last, or the best on noisy validation labels (released code)"
    )


def anchors(logits: Tensor, quantile: float) -> Tensor:
    """The transition matrix (K, K) from logits (n, K): row i is the prediction at the sample whose probability of
    class i is at this quantile. Rows are distributions as they are."""
    p = logits.softmax(1)
    place = math.floor(quantile * (len(p) - 1))
    return p[p.argsort(dim=0, stable=True)[place]]


@METHODS.register("forward", source="arXiv 1609.03683, Theorem 2")
class ForwardCorrection(Method):
    """Forward correction: the prediction is multiplied by the transition matrix before it is compared with the label.

    Equation: L = -log (T' p)_y, T_ij = P(label j | class i); T_ij = p_j(x_i), x_i the anchor of class i in a first
        training by cross-entropy; the second training starts from scratch
    Code: giorgiop/loss-correction@15a79de loss.py, models.py
    Deviation: an anchor is the sample at the quantile; the code takes the largest probability below its 97 % quantile
        and sets those above to 0 in place, so that its rows depend on the rows before them. The first training ends
        with its last epoch, the code's with its best on validation labels (option teacher).
    State: none per sample; K^2 numbers
    Checked: equal to the authors' loss, gradient and, without the filter of outliers, matrix to 1e-6 (tests/parity);
        numpy, values and gradients; cross-entropy at T = I; anchors by hand; the stages.
    """

    Options: ClassVar[type[Options]] = ForwardOptions
    smooths = False
    transition: Tensor

    def __init__(self, options: Any, info: RunInfo) -> None:
        super().__init__(options, info)
        self.believed = torch.eye(info.classes, device=info.device) if info.matrix is None else info.matrix

    @classmethod
    def noise_facts(cls, options: ForwardOptions) -> tuple[str, ...]:
        return ("matrix",) if options.matrix == "true" else ()

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"quantile": 1.0} if dataset == "cifar100" else {}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        hundred = dataset == "cifar100"
        return PublishedRecipe(
            source="giorgiop/loss-correction@15a79de models.py, resnet.py, experiment.py",
            model="resnet44" if hundred else "resnet32",
            augment="standard",
            batch=128,
            epochs=150 if hundred else 120,
            lr=0.1,
            weight_decay=2e-3 if hundred else 2e-4,  # Keras' l2 has no half
            l2="loss",
            schedule="milestones",
            milestones=[80, 120] if hundred else [40, 80],
            differs={
                "model": "a pre-activation form",
                "augment": "shifts by up to 10 %, mirrored",
                "weight_decay": "of weight matrices alone",
            },
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        if self.options.matrix == "anchors":
            yield Stage()  # T = I is cross-entropy
            self.believed = anchors(context.predict(self.options.teacher), self.options.quantile)
        yield Stage()

    def on_stage(self, labels: Tensor) -> None:
        self.register_buffer("transition", self.believed.clone())  # a resumed run writes into it

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        tiny = torch.finfo(torch.float32).tiny  # a label that T rules out has a large loss, not an infinite one
        log_t = self.transition.clamp(min=tiny).log()
        log_q = (logits.log_softmax(1).unsqueeze(2) + log_t).logsumexp(1)
        return -(one_hot(task.labels, logits.shape[1]) * log_q).sum(1)
