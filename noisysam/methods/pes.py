"""Progressive early stopping."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Method, Options, PredictTrainingSet, Stage, StageContext, one_hot


class PESOptions(Options):
    first: float = Field(0.125, gt=0, lt=1, description="share of the training before parts are drawn anew (25 of 200)")
    second: int = Field(7, ge=1, description="epochs of the last stage and the head alone (7)")
    third: int = Field(5, ge=1, description="epochs of the head alone (5)")
    refine_lr: float = Field(1e-4, gt=0, description="learning rate of those, with Adam (1e-4)")


@METHODS.register("pes", source="arXiv 2106.15853, Algorithm 1")
class PES(Method):
    """PES: later parts of the network are stopped earlier; then only samples that agree with their label are learnt.

    Equation: train all; draw the last stage and the head anew and train them alone; the head alone; then, each epoch,
    class-balanced cross-entropy on the samples whose predicted class is their label.
    Code: tmllab/2021_NeurIPS_PES@ec5290d PES_cs.py.
    Deviation: the last part's learning rate begins its schedule anew; the epoch is the last, not the best on a split.
    State: 4 bytes per sample (and 4 K for the classes).
    Checked: the blocks that each stage moves; selection and class weights by hand.
    """

    Options = PESOptions
    selected: Tensor
    balance: Tensor

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, refined = self.options, {"base_opt": "adamw", "l2": "descent", "weight_decay": 0.0, "warmup": 0.0}
        refined |= {"lr": o.refine_lr, "schedule": "constant"}
        first = max(1, round(o.first * self.info.epochs))
        self.selects = False
        yield Stage(settings={"epochs": first})
        for epochs, last in ((o.second, 2), (o.third, 1)):
            yield Stage(start="continue", fresh=last, trainable=last, settings={**refined, "epochs": epochs})
        self.selects = True
        yield Stage(start="continue", settings={"epochs": max(1, self.info.epochs - first)})

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        self.register_buffer("selected", torch.ones(len(labels), device=labels.device))
        self.register_buffer("balance", torch.ones(self.info.classes, device=labels.device))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        if self.selects:
            self.selected = (predict(0).argmax(1) == self.labels).float()
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

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return one_hot(task.labels, len(self.balance)) @ self.balance * self.cross_entropy(logits, task.labels)
