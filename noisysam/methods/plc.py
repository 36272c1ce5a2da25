"""PLC: progressive label correction."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet
from noisysam.methods.history import History
from noisysam.methods.recipe import Epochs, PublishedRecipe

FEW = 0.001  # share of the samples below which a correction counts as none
MOST = 0.9  # of the threshold


class PLCOptions(Options):
    warmup: float = Field(0.044, ge=0, le=1, description="share of --epochs before labels are corrected (8 of 180)")
    window: Epochs = Field(5, ge=1, description="epochs whose predictions are averaged (5)")
    delta: float = Field(0.3, ge=0, le=MOST, description="ratio below which a label is replaced, at first (0.3)")
    step: float = Field(0.1, ge=0, description="by how much that ratio grows when few labels are replaced (0.1)")


@METHODS.register("plc", source="arXiv 2103.07756, Algorithm 1")
class PLC(Method):
    """PLC: labels that are improbable beside the predicted class are replaced by it, less and less cautiously.

    Equation: y <- argmax P where P_y / max P < delta, after each epoch, P the mean of a sample's predictions in the
        last 5 epochs; delta grows by 0.1, up to 0.9, where less than a thousandth of the labels is replaced; CE(y, p)
    Code: pxiangwu/PLC@8c2bcfd cifar/train.py, utils.py lrt_correction
    Deviation: the epoch reported is the last, not the best on a split.
    State: 8 + 20 K bytes per sample
    Checked: equal to the authors' labels, thresholds, loss and gradient to 1e-6 over eleven epochs (tests/parity).
    """

    Options = PLCOptions
    requires = ("index", "one process")
    current: Tensor
    delta: Tensor

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="pxiangwu/PLC@8c2bcfd cifar/train.py, cifar/readme.md",
            augment="standard",
            batch=128,
            epochs=180,
            lr=0.01,
            nesterov=True,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[40, 80],
            lr_factor=0.5,
            differs={"model": "a pre-activation ResNet-34, not in this package"},
        )

    def on_stage(self, labels: Tensor) -> None:
        self.history = History(self.info, self.options.window)
        self.register_buffer("current", labels.clone())
        self.register_buffer("delta", torch.full((), self.options.delta, device=labels.device))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        if epoch <= round(self.options.warmup * self.info.epochs):
            return
        best, found = (mean := self.history.mean()).max(1)
        replaced = mean.gather(1, self.current[:, None]).squeeze(1) < self.delta * best
        self.current = found.where(replaced, self.current)
        grown = (self.delta + self.options.step).clamp(max=MOST)
        self.delta = torch.where(replaced.sum() < FEW * len(replaced), grown, self.delta)

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        return [Task(0, batch.inputs, self.current[batch.index], batch.index)]

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        assert tasks[0].index is not None
        self.history.take_in(self.epoch, tasks[0].index, logits[0].softmax(1))
