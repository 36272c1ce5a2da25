"""T-Revision."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, RunInfo, Stage, StageContext, one_hot
from noisysam.methods.forward import anchors
from noisysam.methods.recipe import PublishedRecipe

DECAY = 1e-4  # weight decay of the revision, in Adam's gradient


class TRevisionOptions(Options):
    estimate: float = Field(
        0.1, gt=0, lt=1, description="length of the training that estimates the matrix, in --epochs (20 of 200)"
    )
    quantile: float = Field(
        0.97, gt=0, le=1, description="anchor of a class, by its probability; 1: largest (0.97; CIFAR-100: 1)"
    )
    teacher: Literal["last", "selected"] = Field(
        "last", description="epoch that estimates: the last, or the best on noisy validation labels (released code)"
    )
    revision: float = Field(1.0, ge=0, description="length of the revision, in --epochs; 0: none (published 1)")
    revision_lr: float = Field(5e-7, gt=0, description="its learning rate, with Adam, of network and matrix (5e-7)")


@METHODS.register("t-revision", source="arXiv 1906.00189, equation 2 and Algorithm 1")
class TRevision(Method):
    """T-Revision: losses reweighted by an estimated transition matrix, which is then revised along with the network.

    Equation: L = p_y / (T' p)_y CE(y), the weight a constant; revised: T + dT in place of T, dT learnt from zero with
        the network by Adam, the weight no constant; T from anchor points of a first training
    Code: xiaoboxia/T-Revision@b598cf2 main.py, loss.py
    Deviation: T + dT for each row of a batch; the code adds dT again for every row before it. Trainings go on from the
        last epoch of the one before, not from the best on noisy validation labels; an anchor is the sample at the
        quantile (as in forward). The first training has the run's rule, schedule and momentum (code: a constant rate,
        no momentum).
    State: none per sample; 2 K^2 numbers
    Checked: equal to the authors' loss, gradient and step of dT to 1e-6 in both trainings (tests/parity); its stages;
        cross-entropy at T = I.
    """

    Options: ClassVar[type[Options]] = TRevisionOptions
    requires = ("one process",)
    smooths = False
    revises = False  # whether this training revises the matrix
    transition: Tensor

    def __init__(self, options: Any, info: RunInfo) -> None:
        super().__init__(options, info)
        self.believed = torch.eye(info.classes, device=info.device)

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"quantile": 1.0} if dataset == "cifar100" else {}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="xiaoboxia/T-Revision@b598cf2 main.py",
            model="resnet34" if dataset == "cifar100" else "resnet18",
            augment="standard",
            batch=128,
            epochs=200,
            lr=0.01,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[40, 80],
            differs={"first training": "at 0.01 throughout, without momentum"},
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, epochs = self.options, self.info.epochs
        self.revises = False
        yield Stage(settings={"epochs": max(1, round(o.estimate * epochs))})  # T = I is cross-entropy
        self.believed = anchors(context.predict(o.teacher), o.quantile)
        yield Stage(start="continue")
        if o.revision:
            self.revises = True
            settings = {
                "base_opt": "adam",
                "l2": "descent",
                "weight_decay": DECAY,
                "schedule": "constant",
                "warmup": 0.0,
            }
            length = max(1, round(o.revision * epochs))
            yield Stage(start="continue", settings={**settings, "lr": o.revision_lr, "epochs": length})

    def on_stage(self, labels: Tensor) -> None:
        self.register_buffer("transition", self.believed.clone())  # a resumed run writes into it
        if self.revises:
            self.change = nn.Parameter(torch.zeros_like(self.transition))

    def auxiliary_optimizer(self) -> torch.optim.Optimizer | None:
        if not self.revises:
            return None
        return torch.optim.Adam([self.change], lr=self.options.revision_lr, weight_decay=DECAY)

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        p, labels = logits.softmax(1), one_hot(task.labels, logits.shape[1])
        matrix = self.transition + self.change if self.revises else self.transition
        tiny = torch.finfo(torch.float32).tiny  # a label that T rules out
        weight = p / (p.unsqueeze(2) * matrix).sum(1).clamp(min=tiny)
        return (labels * (weight if self.revises else weight.detach()) * -logits.log_softmax(1)).sum(1)
