"""AdaCorr: error-bounded correction of labels."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet
from noisysam.methods.history import History
from noisysam.methods.recipe import Epochs, PublishedRecipe

RETRO, REST = 0.9, 1e-4  # weight of the class that a sample had, and of every other, in the retroactive loss


class AdaCorrOptions(Options):
    retro: float = Field(0.14, ge=0, le=1, description="share of --epochs before the retroactive loss (25 of 180)")
    correct: float = Field(0.167, ge=0, le=1, description="share of --epochs before labels are corrected (30 of 180)")
    interval: float = Field(
        0.222, ge=0, description="share of --epochs after which the retroactive loss takes new labels (40 of 180)"
    )
    window: Epochs = Field(10, ge=1, description="epochs whose predictions are averaged (10)")
    delta: float = Field(1.2, ge=1, description="likelihood ratio above which a label is replaced, at first (1.2)")
    growth: float = Field(3.6, ge=0, description="by how much that ratio grows in --epochs (0.02 an epoch of 180)")


@METHODS.register("adacorr", source="arXiv 2011.10077 (ICML 2020), Algorithms 1 and 2")
class AdaCorr(Method):
    """AdaCorr: a label is replaced by the predicted class where the ratio of their mean probabilities is large.

    Equation: y <- argmax P where max P / P_y > delta, after each epoch, P the mean of a sample's predictions in the
        last 10 epochs; CE(y, p) + CE(r, p), r the retroactive target: 0.9 for the class that the label had at the
        last of two given epochs, 1e-4 for every other; delta grows with every epoch
    Code: pingqingsheng/LRT@ba1ede6 LRTcorrect.py
    Deviation: without the authors' RAdam, made anew in each epoch, and its rates; the network is not trained a second
        time, which the code leaves out too. Epochs of the code are shares of the training.
    State: 16 + 40 K bytes per sample
    Checked: equal to the authors' labels, loss and gradient to 1e-6 over eleven epochs (tests/parity).
    """

    Options = AdaCorrOptions
    requires = ("index", "one process")
    current: Tensor
    anchored: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        early = {"retro": 20 / 180, "correct": 25 / 180}
        if noise_type.startswith(("asymmetric", "pair")):
            return {} if dataset == "cifar100" else early
        if noise < 0.8:
            return {}
        return {"retro": 30 / 180, "correct": 35 / 180} if dataset == "cifar100" else early

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="pingqingsheng/LRT@ba1ede6 README.md, LRTcorrect.py",
            augment="standard",
            batch=128,
            epochs=180,
            base_opt="adamw",
            lr=1e-3,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[61, 121, 161],
            lr_factor=0.5,
            differs={
                "model": "a pre-activation ResNet-34, not in this package",
                "base_opt": "rectified Adam, begun anew in each epoch",
            },
        )

    def on_stage(self, labels: Tensor) -> None:
        self.history = History(self.info, self.options.window)
        self.register_buffer("current", labels.clone())
        self.register_buffer("anchored", labels.clone())

    def after(self, share: float) -> int:
        """So many epochs are a share of the training."""
        return round(share * self.info.epochs)

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        o = self.options
        retro, correct = self.after(o.retro), self.after(o.correct)
        if epoch in (retro, retro + self.after(o.interval)):
            self.anchored = self.current.clone()
        if epoch > correct:
            best, found = (mean := self.history.mean()).max(1)
            own = mean.gather(1, self.current[:, None]).squeeze(1)
            delta = o.delta + o.growth * (epoch - correct) / self.info.epochs
            self.current = found.where(best > delta * own, self.current)

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        plan = {"anchored": self.anchored[batch.index]} if self.epoch >= self.after(self.options.retro) else {}
        return [Task(0, batch.inputs, self.current[batch.index], batch.index, plan)]

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        assert tasks[0].index is not None
        self.history.take_in(self.epoch, tasks[0].index, logits[0].softmax(1))

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        loss = self.cross_entropy(logits, task.labels)
        if "anchored" not in task.plan:
            return loss
        log_p = logits.log_softmax(1)
        own = F.nll_loss(log_p, task.plan["anchored"], reduction="none")
        return loss + (RETRO - REST / (log_p.shape[1] - 1) - REST) * own - REST * log_p.sum(1)
