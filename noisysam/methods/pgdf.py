"""PGDF: prior guided denoising framework."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.augdesc import AugDesc
from noisysam.methods.base import (
    METHODS,
    Forward,
    PredictTrainingSet,
    Rate,
    Stage,
    StageContext,
    one_hot,
    rate_facts,
)
from noisysam.methods.contrastive import drawn
from noisysam.methods.dividemix import MixMatchOptions, probability_clean, scaled
from noisysam.methods.recipe import PublishedRecipe
from noisysam.methods.semi import Policy

ROWS = 256  # of a step of the classifiers
LENGTHS = (13, 14)  # epochs of the two classifiers


class PGDFOptions(MixMatchOptions):
    temperature: float = Field(1.0, gt=0, description="sharpening of the targets (1: none)")
    rate: Rate = Field(None, description="share of wrong labels (default: the run's noise rate; 0.5x of it)")
    hardness: float = Field(2.0, ge=0, description="exponent of w, by which a labelled sample's loss is divided (2)")
    enhance: float = Field(0.3333, ge=0, le=1, description="share of --epochs before that (100 of 300)")
    denoise: float = Field(0.5, ge=0, le=1, description="share of --epochs before guesses are denoised (150 of 300)")
    divide: float = Field(0.6667, ge=0, le=1, description="share of --epochs before losses count too (200 of 300)")
    mixture: float = Field(0.5, ge=0, le=1, description="weight of the mixture of losses, the rest the prior's (0.5)")
    strong: Policy = Field("auto-plain", description="augmentation of what is learnt from (AutoAugment without cutout)")


@METHODS.register("pgdf", source="arXiv 2112.01197, Algorithms 1 and 2")
class PGDF(AugDesc):
    """PGDF: the course of p_y in a training tells easy, hard and noisy samples; DivideMix on weak and strong views.

    Equation: first training on all samples: by mean p_y the (1 - r) / 2 n largest are easy, the r / 2 n smallest noisy;
        second from scratch on the easy ones, r of them with random labels: a convolutional classifier learns from its
        courses of p_y which labels those are, and says of the samples between how hard, not noisy, they are (w; easy 1,
        noisy 0); third: labelled where w > 0.5, CE divided by w^2 from a third on; guesses times the inverse of the
        mean predictions for easy samples by label from a half on; w the mean with DivideMix's from two thirds on
    Code: bupt-ai-cz/PGDF@f7b6de7 train_cifar_getPrior.py, train_cifar.py, dataloader_easy.py
    Deviation: those of DivideMix. Random labels are drawn over all classes (code, for asymmetric noise: by the
        classes' own map); courses of samples that an epoch leaves out go on as they were; the inverse is of
        predictions for plain images (code: for two augmented ones).
    State: 828 bytes per sample over 200 epochs (4 for each)
    Checked: equal to the authors' easy, hard and noisy samples, classifiers, inverse, targets and loss to 1e-5
        (tests/parity).
    """

    Options = PGDFOptions
    recorded: Tensor
    injected: Tensor
    easy: Tensor
    prior: Tensor
    inverse: Tensor

    @classmethod
    def noise_facts(cls, options: PGDFOptions) -> tuple[str, ...]:
        return rate_facts(options.rate)

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        theirs = super().published(dataset, noise_type, noise)
        return {name: value for name, value in theirs.items() if name in cls.Options.model_fields}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        epochs, milestone = (400, 300) if dataset == "cifar100" else (300, 150)
        return PublishedRecipe(
            source="bupt-ai-cz/PGDF@f7b6de7 presets.json, train_cifar.py",
            model="preact-resnet18",
            augment="standard",
            batch=128,
            epochs=epochs,
            lr=0.02,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[milestone],
            differs={"lambda_u": "given for 20 and 50 % symmetric noise alone; DivideMix's for the rest"},
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        for self.part in ("all", "easy", "final"):
            yield Stage()

    def on_stage(self, labels: Tensor) -> None:
        self.labels, samples, device = labels, len(labels), labels.device
        self.progress = 0.0  # epochs, in steps of a labelled pool
        if not hasattr(self, "recorded"):  # kept from training to training
            self.register_buffer("recorded", torch.zeros(samples, self.info.epochs, device=device))
            self.register_buffer("injected", labels.clone())
            self.register_buffer("easy", torch.zeros(samples, device=device))
            self.register_buffer("prior", torch.ones(2, samples, device=device))
            self.register_buffer("clean", torch.ones(2, samples, device=device))
            self.register_buffer("inverse", torch.eye(self.info.classes, device=device).repeat(2, 1, 1))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        if self.part == "easy" and epoch == 0:
            self._choose_easy()
        elif self.part == "final":
            if epoch == 0:
                self._learn_prior()
            if epoch >= self.options.warmup:
                self._divide(epoch, predict)

    # the prior

    def _choose_easy(self) -> None:
        """The easy samples, and some of their labels drawn anew."""
        rate, samples = self.rate(self.options.rate), len(self.labels)
        easy = by_mean(self.recorded)[int(samples * (0.5 + rate / 2)) :]
        self.easy = torch.zeros_like(self.easy).index_fill_(0, easy, 1.0)
        shuffled = easy[torch.randperm(len(easy), generator=self.generator, device=easy.device)]
        changed = shuffled[: int(rate * len(easy))]
        other = torch.randint(self.info.classes, changed.shape, generator=self.generator, device=easy.device)
        self.injected = self.labels.index_copy(0, changed, other)

    def _learn_prior(self) -> None:
        """How hard, not noisy, each sample is: twice, by classifiers of two lengths."""
        rate, (easy, rest) = self.rate(self.options.rate), ((self.easy == x).nonzero().flatten() for x in (1, 0))
        known = easy[by_mean(self.recorded[easy])][int(len(easy) * rate / 2) : int(len(easy) * (0.5 + rate / 2))]
        kept = (self.injected == self.labels)[known].long()
        # the second training has written those of the easy samples alone
        unknown = rest[by_mean(self.recorded[rest])][int(len(self.labels) * rate / 2) :]
        for k, epochs in enumerate(LENGTHS):
            classifier = drawn(lambda: courses_classifier(self.info.epochs), self.rng, self.labels.device)
            with torch.enable_grad():
                train_classifier(classifier, self.recorded[known], kept, epochs)
            with torch.no_grad():
                hard = classifier(self.recorded[unknown][:, None]).softmax(1)[:, 1]
            self.prior[k] = torch.zeros_like(self.prior[k]).index_copy(0, unknown, hard)
            self.prior[k][easy] = 1.0

    # the last training

    def _after(self, share: float) -> bool:
        return self.epoch > round(share * self.info.epochs)

    def _divide(self, epoch: int, predict: PredictTrainingSet) -> None:
        self.clean = self.prior.clone()
        for k in range(2):
            if not (self._after(self.options.denoise) or self._after(self.options.divide)):
                continue
            logits = predict(k)
            if self._after(self.options.denoise):
                given = one_hot(self.labels, self.info.classes) * self.easy[:, None]
                mean = given.T @ logits.softmax(1)
                found, failed = torch.linalg.inv_ex(mean / mean.sum(1, keepdim=True))
                usable = torch.isfinite(found).all() & (failed == 0)
                self.inverse[k] = torch.where(usable, found, self.inverse[k])
            if self._after(self.options.divide):
                losses = scaled(F.cross_entropy(logits, self.labels, reduction="none"))
                by_loss = probability_clean(losses, seed=int(self.rng.integers(2**31)))
                self.clean[k] = torch.lerp(self.prior[k], by_loss, self.options.mixture)

    def labelled(self, k: int) -> Tensor:
        return self.clean[k] > 0.5

    def subset(self) -> Tensor | None:
        return self.easy.nonzero().flatten() if self.part == "easy" else None

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        return super().batches(epoch) if self.part == "final" else epoch

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        if self.part != "final":  # one network is trained
            labels = one_hot(self.injected[batch.index], self.info.classes)
            return [Task(0, batch.inputs, labels, batch.index)]
        tasks = super().tasks(batch, forward)
        if batch.divided and self._after(self.options.enhance):
            (task,), rows = tasks, len(batch.index) // 2
            w = self.clean[1 - task.network][batch.index[:rows]].repeat(2)
            weight = torch.cat([w**-self.options.hardness, torch.ones_like(w)])
            task.labels = task.labels * torch.where(task.plan["labelled"] > 0, weight, 1.0)[:, None]
        return tasks

    def corrected(self, p: Tensor, k: int) -> Tensor:
        return (p @ self.inverse[k]).clamp(min=0) if self._after(self.options.denoise) else p

    @property
    def warming_up(self) -> bool:
        return self.part != "final" or super().warming_up

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        """Go on with the courses of p_y, to the end of the training."""
        if self.part != "final":
            ((task,), (z,)) = tasks, logits
            assert task.index is not None
            p = (z.softmax(1) * task.labels).sum(1, keepdim=True)
            self.write(self.recorded[:, self.epoch :], task.index, p.expand(-1, self.info.epochs - self.epoch))


def by_mean(courses: Tensor) -> Tensor:
    """Places of the courses (n, E) by their means, the smallest first."""
    return courses.mean(1).argsort(stable=True)


def courses_classifier(epochs: int) -> nn.Module:
    """The authors' one-dimensional network: courses (n, 1, epochs) -> logits of noisy and hard."""
    layers = [nn.Conv1d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv1d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * epochs, 2))


def train_classifier(classifier: nn.Module, courses: Tensor, hard: Tensor, epochs: int) -> None:
    """Train on courses (n, E) whose labels are known to be right (1) or wrong (0); the batches are in order."""
    optimizer = torch.optim.Adadelta(classifier.parameters(), lr=1.0)
    rate = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    for _ in range(epochs):
        for x, y in zip(courses.split(ROWS), hard.split(ROWS), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(classifier(x[:, None]), y).backward()
            optimizer.step()
        rate.step()
