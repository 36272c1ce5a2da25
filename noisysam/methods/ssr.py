"""SSR+: sample selection and relabelling, with feature consistency."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet, one_hot
from noisysam.methods.mixup import draw, mix
from noisysam.methods.recipe import PublishedRecipe

ROWS = 1000  # of the neighbour search at a time


class SSROptions(Options):
    theta_r: float = Field(
        0.9, ge=0, le=1, description="confidence above which labels are replaced (0.9; 0.8 from 50 %)"
    )
    theta_s: float = Field(1.0, ge=0, le=1, description="share of the largest vote that a label needs (1)")
    k: int = Field(200, ge=1, description="neighbours that vote (200)")
    alpha: float = Field(4.0, gt=0, description="of the mixup's Beta(alpha, alpha) (4)")
    consistency: float = Field(1.0, ge=0, description="weight of the feature consistency; 0: SSR (1)")
    head_lr: float = Field(0.02, gt=0, description="learning rate of the two heads of the consistency (0.02)")


@METHODS.register("ssr", source="arXiv 2111.11288, Algorithm 1", revision=2)
class SSR(Method):
    """SSR+: confident predictions replace labels, votes of neighbours select samples; mixup on those, each epoch.

    Equation: y_r = argmax p where max p > theta_r, else y; selected where the class-balanced vote for y_r among the k
        nearest features is at least theta_s of the largest; CE on mixed views of selected samples, each class as often
        as the largest, less consistency times the cosine of h(g(f(view 2))) and g(f(view 1)) of any samples, the latter
        constant; mixed images, first and second views go through the network in a forward each
    Code: MrChenFeng/SSR_BMVC2022@849530d main_cifar.py, utils/funcs.py, utils/classbalancedsampler.py
    Deviation: all views by the run's own augmentation (code: AutoAugment for both views of the selected samples and for
        one of the others'); the selection looks at plain inputs (code: augmented ones); the heads' rate is constant and
        their batch norm keeps no running statistics; those of the network move once a step, by the mean over the three
        forwards (code: by each in turn). Where nothing is selected, all samples are.
    State: 12 bytes per sample, and the heads (0.13 M weights)
    Checked: equal to the authors' relabelling, votes, selection, repeats of the sampler and loss to 1e-6 over two
        epochs (tests/parity); relabelling, votes and selection by hand; the forwards that batch norm sees.
    """

    Options = SSROptions
    requires = ("features", "one process")
    provides = ()
    views = 4
    smooths = False
    relabelled: Tensor
    selected: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"theta_r": 0.8} if noise >= 0.5 else {}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="MrChenFeng/SSR_BMVC2022@849530d main_cifar.py, README.md",
            model="preact-resnet18",
            augment="rand",
            batch=128,
            epochs=300,
            lr=0.02,
            weight_decay=5e-4,
            schedule="cosine",
            lr_min=0.0004,
            differs={"augment": "AutoAugment for some views, crop and flip for the others; here RandAugment for all"},
        )

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        self.register_buffer("relabelled", labels.clone())
        self.register_buffer("selected", torch.ones(len(labels), device=labels.device))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(self.rng.integers(2**31)))
            self.project, self.predict = (perceptron(d).to(labels.device) for d in (self.info.features, 128))

    def auxiliary_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.options.head_lr, momentum=0.9, weight_decay=5e-4)

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        confidence, found = predict(0).softmax(1).max(1)
        self.relabelled = torch.where(confidence > self.options.theta_r, found, self.labels)
        votes = balanced_votes(predict(0, features=True), self.relabelled, self.info.classes, self.options.k)
        own = votes.gather(1, self.relabelled[:, None]).squeeze(1)
        self.selected = (own >= self.options.theta_s * votes.max(1).values).float()

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        chosen = self.selected.nonzero().flatten()
        if not len(chosen):
            chosen = torch.arange(len(self.selected), device=chosen.device)
        even = balanced(chosen, self.relabelled[chosen], self.generator)
        batches = epoch.cycle(even, epoch.rows, len(epoch), self.generator)
        for index, batch in zip(batches, epoch, strict=True):
            yield epoch.batch(torch.cat([index, batch.index]), views=2)

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        """Each row holds four images: two mixed ones of selected samples, and two views of any sample."""
        n = len(batch.index) // 2
        labels = one_hot(self.relabelled[batch.index[:n]], self.info.classes).repeat(2, 1)
        weight, other = draw(self.options.alpha, 2 * n, self.generator, self.rng, labels.device)
        weight = max(weight, 1 - weight)
        mixed = mix(torch.cat([view[:n] for view in batch.views]), other, weight)
        labels = mix(labels, other, weight).unflatten(0, (2, n)).transpose(0, 1)
        inputs = torch.stack([mixed[:n], mixed[n:], *(view[n:] for view in batch.views)], 1)
        return [Task(0, inputs, labels.mean(1), plan={"labels": labels}, forwards=(2, 1, 1))]

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        assert task.features is not None
        loss = -(task.plan["labels"] * logits[:, :2].log_softmax(2)).sum(2).mean(1)
        first, second = self.project(task.features[:, 2]), self.project(task.features[:, 3])
        return loss - self.options.consistency * F.cosine_similarity(self.predict(second), first.detach())


def perceptron(inputs: int) -> nn.Module:
    """One hidden layer of 256 and 128 outputs. Batch norm without running statistics: a loss writes no state."""
    norm = nn.BatchNorm1d(256, track_running_stats=False)
    return nn.Sequential(nn.Linear(inputs, 256), norm, nn.ReLU(), nn.Linear(256, 128))


def balanced(places: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
    """The places of each class, repeated to at least the size of the largest class, the last of them shuffled, and cut
    to that size."""
    largest, found = int(labels.bincount().max()), []
    for label in labels.unique():
        own = places[labels == label]
        own = own.repeat(-(-largest // len(own)))
        order = torch.randperm(largest, generator=generator, device=own.device)
        found.append(torch.cat([own[:-largest], own[-largest:][order]])[:largest])
    return torch.cat(found)


def balanced_votes(features: Tensor, labels: Tensor, classes: int, k: int) -> Tensor:
    """Shares (n, K) of the k nearest samples by cosine, each sample one of its own, divided by the classes' shares."""
    unit, votes = F.normalize(features, dim=1), one_hot(labels, classes)
    found = [
        votes[(part @ unit.T).topk(min(k, len(unit))).indices].mean(1) / votes.mean(0).clamp(min=1e-10)
        for part in unit.split(ROWS)
    ]
    shares = torch.cat(found)
    return shares / shares.sum(1, keepdim=True)
