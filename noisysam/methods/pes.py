"""Progressive early stopping."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet, Stage, StageContext, one_hot
from noisysam.methods.recipe import PublishedRecipe


class PESOptions(Options):
    first: float = Field(0.125, gt=0, lt=1, description="share of the training before parts are drawn anew (25 of 200)")
    second: int = Field(2457, ge=1, description="steps of the last stage and the head alone (7 epochs of 351)")
    third: int = Field(1755, ge=1, description="steps of the head alone (5 epochs of 351)")
    refine_lr: float = Field(1e-4, gt=0, description="learning rate of those, with Adam (1e-4)")
    schedule: Literal["anew", "continued"] = Field(
        "anew",
        description="learning rates of the first and the last part: constant, then the whole schedule; or the"
        " run's schedule, which goes on after the refinement (code)",
    )


@METHODS.register("pes", source="arXiv 2106.15853, Algorithm 1", revision=2)
class PES(Method):
    """PES: later parts of the network are stopped earlier; then only samples that agree with their label are learnt.

    Equation: train all; draw the last stage and the head anew and train them alone; the head alone; then, with those
        two held fixed, each epoch class-balanced cross-entropy on the samples whose predicted class is their label
    Code: tmllab/2021_NeurIPS_PES@ec5290d PES_cs.py, common/tools.py
    Deviation: the last part's learning rate begins its schedule anew (``schedule=continued``: it goes on, as in the
        code) and its momentum at zero; the epoch reported is the last, not the best on a split. The refinement counts
        in steps, rounded to epochs of this run: in a short run it is many epochs.
    State: 4 bytes per sample (and 4 K for the classes)
    Checked: equal to the authors' selection, class weights and loss to 1e-6 over three epochs, and to the parts that
        their optimizer moves (tests/parity); the blocks that each stage moves.
    """

    Options = PESOptions
    requires = ("one process",)
    selected: Tensor
    balance: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        chosen: dict[str, Any] = {"schedule": "continued"}
        return {**chosen, "first": 0.15} if dataset == "cifar100" else chosen  # 30 of 200 epochs

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="tmllab/2021_NeurIPS_PES@ec5290d PES_cs.py",
            model="resnet34" if dataset == "cifar100" else "resnet18",
            augment="standard",
            batch=128,
            epochs=200,
            lr=0.1,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[100, 150],
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, refined = self.options, {"base_opt": "adamw", "l2": "descent", "weight_decay": 0.0, "warmup": 0.0}
        refined |= {"lr": o.refine_lr, "schedule": "constant"}
        first = max(1, round(o.first * self.info.epochs))
        self.selects = False
        continued = o.schedule == "continued"
        if continued:
            yield Stage(settings={"epochs": first}, schedule_epoch=0)
        else:
            yield Stage(settings={"epochs": first, "schedule": "constant"})
        for steps, last in ((o.second, 2), (o.third, 1)):
            epochs = max(1, round(steps / self.info.steps))
            settings = {**refined, "epochs": epochs, "eval_every": epochs}
            yield Stage(start="continue", fresh=last, trainable=last, settings=settings)
        self.selects = True  # what was drawn anew is in no optimizer of the authors from here on
        last_epochs = max(1, self.info.epochs - first - 1)  # the refinement takes the place of one, as in the code
        place = self.info.epochs - last_epochs if continued else None
        yield Stage(start="continue", frozen=2, settings={"epochs": last_epochs}, schedule_epoch=place)

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        self.register_buffer("selected", torch.ones(len(labels), device=labels.device))
        self.register_buffer("balance", torch.ones(self.info.classes, device=labels.device))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        """Select what agrees with the mean prediction for two augmented views."""
        if self.selects:
            p = torch.stack([predict(0, augmented=True).softmax(1) for _ in range(2)]).mean(0)
            self.selected = (p.argmax(1) == self.labels).float()
            counts = F.one_hot(self.labels, self.info.classes).float().T @ self.selected
            present = counts > 0
            self.balance = torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        pool = self.selected.nonzero().flatten() if self.selects else torch.empty(0)
        if not len(pool):  # before the selection, or where nothing agrees with its label
            yield from epoch
            return
        for index in epoch.cycle(pool, min(epoch.rows, len(pool)), max(1, len(pool) // epoch.rows), self.generator):
            yield epoch.batch(index)

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        weight = one_hot(batch.labels, len(self.balance)) @ self.balance
        weight = weight / weight.mean().clamp(min=torch.finfo(weight.dtype).tiny)  # torch's weighted mean
        return [Task(0, batch.inputs, batch.labels, batch.index, {"weight": weight})]

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return task.plan["weight"] * self.cross_entropy(logits, task.labels)
