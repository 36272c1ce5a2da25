"""Joint optimization."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Method, Options, PredictTrainingSet, Stage, StageContext, one_hot
from noisysam.methods.history import History
from noisysam.methods.m_dyr_h import divergence
from noisysam.methods.recipe import Epochs, PublishedRecipe


class JointOptimizationOptions(Options):
    alpha: float = Field(1.2, ge=0, description="weight of KL(uniform || mean prediction) (1.2; asymmetric: 0.8)")
    beta: float = Field(0.8, ge=0, description="weight of the predictions' entropy (0.8; asymmetric: 0.4)")
    begin: float = Field(0.35, ge=0, le=1, description="share of --epochs before labels are replaced (70 of 200)")
    window: Epochs = Field(10, ge=1, description="epochs whose predictions are averaged into labels (10)")
    retrain: float = Field(
        0.6, ge=0, description="length of the second training, in --epochs (120 of 200); 0: none, the first one counts"
    )
    retrain_lr: float | None = Field(
        None, gt=0, description="learning rate of the second training (default: --lr; published 0.2)"
    )


@METHODS.register("joint-optimization", source="arXiv 1803.11364, section 3")
class JointOptimization(Method):
    """Joint optimization: labels become the mean of past predictions; then a new training on these labels.

    Equation: CE(q, p) + alpha KL(uniform || mean p) + beta H(p) at a constant rate; from epoch begin on, q is the mean
        of a sample's predictions in the last 10 epochs, before it is e_y; a second training from scratch has CE(q, p)
    Code: DaikiTanaka-UT/JointOptimization@7e7a30d first_step_train.py, second_step_train.py
    Deviation: the classes' prior is uniform, as in the code. The KL enters by its tangent at the batch's mean
        prediction at w, so that rows are apart: value and gradient are exact there. Before ten epochs are over, the
        mean is over those that are; the code's is over ten.
    State: 44 K bytes per sample
    Checked: equal to the authors' loss, gradient and labels to 1e-6 over epochs of both trainings (tests/parity).
    """

    Options = JointOptimizationOptions
    requires = ("index", "one process")
    provides = ("index", "one view")
    targets: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        weights = {"alpha": 0.8, "beta": 0.4} if noise_type.startswith(("asymmetric", "pair")) else {}
        return {**weights, "retrain_lr": 0.2}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="DaikiTanaka-UT/JointOptimization@7e7a30d README.md, first_step_train.py, second_step_train.py",
            augment="standard",
            batch=128,
            epochs=200,
            lr=0.03 if noise_type.startswith(("asymmetric", "pair")) else 0.08,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[200 / 3, 400 / 3],
            differs={
                "model": "a pre-activation ResNet-32 of widths 32, 64 and 128, not in this package",
                "lr": "given for 70 % symmetric and 40 % asymmetric noise alone",
            },
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, self.final = self.options, False
        yield Stage(settings={"schedule": "constant"})
        if o.retrain:
            self.final = True
            lr = {} if o.retrain_lr is None else {"lr": o.retrain_lr}
            yield Stage(settings={"epochs": max(1, round(o.retrain * self.info.epochs)), **lr})

    def on_stage(self, labels: Tensor) -> None:
        if not hasattr(self, "targets"):  # kept for the second training
            self.history = History(self.info, self.options.window)
            self.register_buffer("targets", one_hot(labels, self.info.classes).clone())

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        begin = max(1, round(self.options.begin * self.info.epochs))
        if (epoch == 0) if self.final else (epoch >= begin):
            self.targets = self.history.mean()

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        (task,) = tasks
        assert task.index is not None
        task.plan["target"] = self.targets[task.index]
        if not self.final:
            p = logits[0].softmax(1)
            self.history.take_in(self.epoch, task.index, p)
            task.plan["mean"] = p.mean(0).clamp_min(torch.finfo(p.dtype).tiny).expand_as(p)

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        loss = self.cross_entropy(logits, task.plan["target"])
        if "mean" not in task.plan:
            return loss
        log_p = logits.log_softmax(1)
        p, o = log_p.exp(), self.options
        return loss + o.alpha * divergence(p, task.plan["mean"]) - o.beta * (p * log_p).sum(1)
