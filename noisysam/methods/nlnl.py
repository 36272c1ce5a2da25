"""NLNL: negative learning."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet, Stage, StageContext, one_hot
from noisysam.methods.history import History
from noisysam.methods.recipe import Epochs, PublishedRecipe

TINY = 1e-5  # the authors' least value of 1 - p
THIRD = 0.3333


class NLNLOptions(Options):
    negatives: int = Field(1, ge=1, description="complementary labels of a row (CIFAR-10: 1; CIFAR-100: 110)")
    all: float = Field(THIRD, ge=0, le=1, description="share of --epochs of negative learning of all (720 of 2160)")
    selective: float = Field(
        THIRD, ge=0, le=1, description="share of --epochs of negative learning of those above 1 / K (720 of 2160)"
    )
    cut: float = Field(0.5, ge=0, le=1, description="least probability of a label that is learnt positively (0.5)")
    window: Epochs = Field(10, ge=1, description="epochs whose predictions are averaged (10)")
    pseudo: float = Field(
        0.222, ge=0, description="length of each of two trainings on pseudo-labels, in --epochs (480 of 2160); 0: none"
    )
    pseudo_lr: float | None = Field(
        None, gt=0, description="learning rate of those (default: --lr; published 0.1, before 0.02)"
    )


@METHODS.register("nlnl", source="arXiv 1908.07387, NL, SelNL, SelPL and pseudo-labels")
class NLNL(Method):
    """NLNL: learns which class an image is not; then only labels that have become probable, positively in the end.

    Equation: -log(1 - p_c), c drawn from the classes but the label; then only where P_y >= 1 / K, P the mean of a
        sample's predictions in the last 10 epochs; then -log p_y only where P_y >= 0.5; each over the rows that count,
        weighted by the largest class's size over that of the label's class. Two trainings from scratch follow: on the
        samples with P_y >= 0.5 alone, and on its mean predictions of the last 10 epochs for all samples
    Code: ydkim1293/NLNL-Negative-Learning-for-Noisy-Labels@921dec4 main_NL.py, main_PL.py, main_pseudo1.py,
        main_pseudo2.py
    Deviation: before ten epochs are over, the mean is over those that are; the code's is over ten.
    State: 4 + 44 K bytes per sample
    Checked: equal to the authors' selection, weights, loss and gradient to 1e-6 over epochs of each of the five parts
        (tests/parity).
    """

    Options = NLNLOptions
    requires = ("index", "one process")
    provides = ("index", "one view")
    targets: Tensor
    selected: Tensor
    balance: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"pseudo_lr": 0.1, **({"negatives": 110} if dataset == "cifar100" else {})}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="ydkim1293/NLNL-Negative-Learning-for-Noisy-Labels@921dec4 run.sh, args.py",
            model="resnet34",
            augment="standard",
            batch=128,
            epochs=2160,
            lr=0.02,
            weight_decay=1e-4,
            schedule="milestones",
            milestones=[0.4 * 2160, 0.6 * 2160],
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, self.part = self.options, "nlnl"
        yield Stage(settings={"schedule": "constant"})
        if o.pseudo:
            settings: dict[str, Any] = {"epochs": max(1, round(o.pseudo * self.info.epochs))}
            if o.pseudo_lr is not None:
                settings["lr"] = o.pseudo_lr
            for self.part in ("selected", "pseudo"):
                yield Stage(settings=settings)

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        if not hasattr(self, "targets"):  # kept from training to training
            self.history = History(self.info, self.options.window)
            self.register_buffer("targets", one_hot(labels, self.info.classes).clone())
            self.register_buffer("selected", torch.ones(len(labels), device=labels.device))
            self.register_buffer("balance", balanced(self.targets))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        if epoch or self.part == "nlnl":
            return
        mean = self.history.mean()
        if self.part == "selected":
            self.selected = (mean.gather(1, self.labels[:, None]).squeeze(1) >= self.options.cut).float()
            self.balance = balanced(self.selected[:, None] * one_hot(self.labels, self.info.classes))
            self.history.past.zero_()
        else:
            self.targets = mean
            self.balance = balanced(one_hot(mean.argmax(1), self.info.classes))

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        labels, index = batch.labels, batch.index
        if self.part == "pseudo":
            target = self.targets[index]
            plan = {"target": target, "weight": self.balance[target.argmax(1)]}
        elif self.part == "selected":
            plan = {"weight": mean_of(self.selected[index] * self.balance[labels])}
        else:
            plan = self._selective(labels, index)
        return [Task(0, batch.inputs, labels, index, plan)]

    def _selective(self, labels: Tensor, index: Tensor) -> dict[str, Tensor]:
        """What counts, and the complementary labels (n, m), in the three parts of the first training."""
        o, epochs, classes = self.options, self.info.epochs, self.info.classes
        own, weight = self.history.mean(index).gather(1, labels[:, None]).squeeze(1), self.balance[labels]
        if self.epoch >= round((o.all + o.selective) * epochs):
            return {"weight": mean_of((own >= o.cut) * weight)}
        chosen = own >= (0 if self.epoch < round(o.all * epochs) else 1 / classes)
        shape, device = (len(labels), o.negatives), labels.device
        others = torch.randint(1, classes, shape, generator=self.generator, device=device)
        weight = chosen * weight * (len(labels) / chosen.sum().clamp(min=1))
        return {"weight": weight, "negative": (labels[:, None] + others) % classes}

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        if self.part != "pseudo":
            assert tasks[0].index is not None
            self.history.take_in(self.epoch, tasks[0].index, logits[0].softmax(1))

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        if "negative" in task.plan:
            p = logits.softmax(1).gather(1, task.plan["negative"])
            loss = -(1 - p).clamp(min=TINY).log().sum(1)
        else:
            loss = self.cross_entropy(logits, task.plan.get("target", task.labels))
        return task.plan["weight"] * loss


def balanced(counted: Tensor) -> Tensor:
    """Weights (K,) of classes from (n, K) indicators: the size of the largest over their own, 0 for an empty one."""
    count = counted.sum(0)
    return torch.where(count > 0, count.max() / count.clamp(min=1), 0.0)


def mean_of(weight: Tensor) -> Tensor:
    """Weights whose mean is one, so that the mean over rows is a weighted mean; 0 where all are."""
    return weight / weight.mean().clamp(min=torch.finfo(weight.dtype).tiny)
