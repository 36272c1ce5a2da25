"""CAL: covariance-assisted learning."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet, Stage, StageContext, one_hot
from noisysam.methods.recipe import PublishedRecipe

EPS = 1e-5  # added to probabilities before the logarithm, but 1e-8 in the cross-entropy


class CALOptions(Options):
    sieve: float = Field(
        0.66, gt=0, description="length of the training that guesses the clean labels, in --epochs (66 of 100)"
    )
    sieve_alpha: float = Field(2.0, ge=0, description="largest weight of its peer term (CIFAR-10: 2; CIFAR-100: 1)")
    margin: float = Field(-8.0, description="labels are kept where CE(y) - mean_k CE(k) is below it (-8)")
    alpha: float = Field(1.0, ge=0, description="weight of the peer term of the second training at its largest (1)")
    scale: float = Field(1.0, gt=0, description="multiplies the peer term (CIFAR-10: 1; CIFAR-100: 10)")
    warmup: float = Field(0.1, ge=0, le=1, description="share of --epochs after which these weights grow (10 of 100)")
    ramp: float = Field(0.3, gt=0, le=1, description="share of --epochs over which they grow (30 of 100)")


@METHODS.register("cal", source="arXiv 2012.11854, equations 5 and 6, Algorithm 1")
class CAL(Method):
    """CAL: peer loss, less the covariance between noise and loss, by clean labels guessed in a first training.

    Equation: L = (CE(y) - alpha sum_k P_k CE(k) - C) / (1 + alpha); C of a batch: sum_i P(d = i) mean over rows with d
        = i of sum_j ([y = j] - P(y = j | d = i)) (CE(j) - m_ij), m_ij the mean of CE(j) where d = i in the epoch
        before; d guessed by a first training without C: the label where it is far likelier than others, else the
        prediction. P_k in the first training: the normalised square root of the labels' shares
    Code: UCSC-REAL/CAL@bdb376b lossfuncs/peerloss.py, experiments/exptPeerReg.py, models/peerreg_CAL.py
    Deviation: the division by 1 + alpha is the code's of the learning rate; there it also divides the weight decay. d
        comes from plain inputs after the first training (code: from augmented ones in its 66th epoch). Shares of the
        training, so that they keep their place in one of another length.
    State: 8 bytes per sample; 2 K^2 + 3 K numbers
    Checked: equal to the authors' guesses, loss, gradient and means to 1e-6 over several epochs, alpha at every epoch
        of 100 (tests/parity); its stages; cross-entropy where it has nothing to add.
    """

    Options = CALOptions
    requires = ("one process",)
    smooths = False
    calibrates = False  # whether this is the second training
    guessed: Tensor
    sums: Tensor
    seen: Tensor
    means: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, float]:
        return {"sieve_alpha": 1.0, "scale": 10.0} if dataset == "cifar100" else {}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        turned = {"augment": "turned by up to 15 degrees too"} if dataset == "cifar100" else {}
        return PublishedRecipe(
            source="UCSC-REAL/CAL@bdb376b run_exptPRLD_C10_CAL.py, run_exptPRLD_C100_CAL.py",
            model="resnet34",
            augment="standard",
            batch=128,
            epochs=100,
            lr=0.1,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[60],
            differs=turned,
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        self.calibrates = False
        yield Stage(settings={"epochs": max(1, round(self.options.sieve * self.info.epochs))})
        self.judged = context.predict("last")
        self.calibrates = True
        yield Stage()

    def on_stage(self, labels: Tensor) -> None:
        classes = self.info.classes
        shares = one_hot(labels, classes).mean(0)
        prior = shares if self.calibrates else shares.sqrt() / shares.sqrt().sum()
        self.prior = self.options.scale * prior
        guessed = guess(self.judged.to(labels.device), labels, self.options.margin) if self.calibrates else labels
        self.register_buffer("guessed", guessed.clone())
        hot = one_hot(self.guessed, classes)
        self.guessed_shares = hot.mean(0)
        self.transition = hot.T @ one_hot(labels, classes) / hot.sum(0).clamp(min=1)[:, None]
        for name, shape in (("sums", (classes, classes)), ("seen", (classes,)), ("means", (classes, classes))):
            self.register_buffer(name, torch.zeros(shape, device=labels.device))

    def alpha(self) -> float:
        """The weight of the peer term in this epoch."""
        o = self.options
        most = o.alpha if self.calibrates else o.sieve_alpha
        return float(most * np.clip((self.epoch / self.info.epochs - o.warmup) / o.ramp, 0, 1))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        if epoch:
            self.means = self.sums / self.seen.clamp(min=1)[:, None]
        self.sums, self.seen = torch.zeros_like(self.sums), torch.zeros_like(self.seen)

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        d, rows = self.guessed[batch.index], len(batch.index)
        count = one_hot(d, self.info.classes).sum(0)
        noise = one_hot(batch.labels, self.info.classes) - self.transition[d]
        plan = {"noise": rows * (self.guessed_shares / count.clamp(min=1))[d, None] * noise, "means": self.means[d]}
        return [Task(0, batch.inputs, batch.labels, batch.index, plan)]

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        """Add to the means of the next epoch."""
        ((task,), (z,)) = tasks, logits
        hot = one_hot(self.guessed[task.index], self.info.classes)
        finite = torch.isfinite(z).all()
        self.sums = torch.where(finite, self.sums + hot.T @ losses(z).float(), self.sums)
        self.seen = torch.where(finite, self.seen + hot.sum(0), self.seen)

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        own = (one_hot(task.labels, logits.shape[1]) * losses(logits, 1e-8)).sum(1)
        every, alpha = losses(logits), self.alpha()
        loss = own - alpha * (every * self.prior).sum(1)
        if self.calibrates:
            loss = loss - (task.plan["noise"] * (every - task.plan["means"])).sum(1)
        return loss / (1 + alpha)


def guess(logits: Tensor, labels: Tensor, bound: float) -> Tensor:
    """The label of each sample (n,) where it is far likelier than others, else its predicted class."""
    every = losses(logits, 1e-8)
    margin = every.gather(1, labels[:, None]).squeeze(1) - every.mean(1)
    return torch.where(margin < bound, labels, logits.argmax(1))


def losses(logits: Tensor, eps: float = EPS) -> Tensor:
    """-log(p_k + eps) of each row for every class (n, K)."""
    return -(logits.softmax(1) + eps).log()
