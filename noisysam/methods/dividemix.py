"""DivideMix."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field
from sklearn.mixture import GaussianMixture
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet, one_hot
from noisysam.methods.mixup import draw, mix
from noisysam.methods.recipe import Epochs, PublishedRecipe


class MixMatchOptions(Options):
    warmup: Epochs = Field(10, ge=1, description="epochs of cross-entropy first (CIFAR-10: 10; CIFAR-100: 30)")
    temperature: float = Field(0.5, gt=0, description="sharpening of the targets (0.5)")
    alpha: float = Field(4.0, gt=0, description="of the mixup's Beta(alpha, alpha) (4)")
    lambda_u: float = Field(25.0, ge=0, description="weight of the unlabelled loss (CIFAR-10: 0, 25 or 50, by noise)")
    ramp: Epochs = Field(16, ge=1, description="epochs until lambda_u is reached, step by step (16)")
    confidence_penalty: bool = Field(
        False, description="add the predictions' negative entropy to the loss of the warm-up (asymmetric noise: True)"
    )


class DivideMixOptions(MixMatchOptions):
    threshold: float = Field(0.5, ge=0, le=1, description="least probability of being clean of a labelled sample (0.5)")
    history: int = Field(1, ge=1, description="epochs whose losses are averaged for the mixture (1; 90 % noise: 5)")


@METHODS.register("dividemix", source="arXiv 2002.07394, Algorithm 1", revision=2)
class DivideMix(Method):
    """DivideMix: a mixture on each network's losses divides the data for the other; MixMatch on the two pools.

    A batch holds ``batch`` labelled and ``batch`` unlabelled samples, each in two views; the networks take turns,
    one epoch over the labelled pool each.

    Equation: w = P(the component of smaller mean | loss) of a two-component Gaussian mixture; labelled where w >
        threshold; targets sharpened w y + (1 - w) p, and the mean guess of both networks; MixMatch: CE + lambda_u
        squared error + KL(uniform || mean p); lambda_u grows with every step after the warm-up
    Code: LiJunnan1992/DivideMix@d9d3058 Train_cifar.py
    Deviation: networks that guess labels use the batch's own statistics in batch norm (code: the other network is in
        evaluation mode); where a pool is empty, the epoch is one of cross-entropy. One setting for every noise; the
        authors' lambda_u, penalty and history by noise are --preset published.
    State: 16 bytes per sample; 8 more for each further epoch of history
    Checked: equal to the authors' steps to 1e-5 over several epochs, with one and five epochs of losses and with and
        without the penalty (tests/parity); mixture, pools, targets and loss by hand.
    """

    Options: ClassVar[type[BaseModel]] = DivideMixOptions
    requires: ClassVar[tuple[str, ...]] = ("one process",)
    provides: ClassVar[tuple[str, ...]] = ("one view",)
    networks = 2
    smooths = False
    clean: Tensor
    past: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        asymmetric = noise_type.startswith(("asymmetric", "pair"))
        chosen: dict[str, Any] = {"confidence_penalty": True} if asymmetric else {}
        if noise >= 0.9:
            chosen["history"] = 5
        if dataset == "cifar100":
            return {**chosen, "warmup": 30, "lambda_u": 25.0 if noise < 0.5 else 150.0}
        if noise >= 0.9:
            chosen["threshold"] = 0.6
        return {**chosen, "lambda_u": 0.0 if asymmetric or noise < 0.5 else 50.0 if noise >= 0.9 else 25.0}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="LiJunnan1992/DivideMix@d9d3058 Train_cifar.py; lambda_u and threshold by noise: arXiv 2002.07394",
            model="preact-resnet18",
            augment="standard",
            batch=64,
            epochs=300,
            lr=0.02,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[150],
        )

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        self.progress = 0.0  # epochs, in steps of a labelled pool
        samples, device = self.info.samples, self.info.device
        self.register_buffer("clean", torch.ones(2, samples, device=device))
        self.register_buffer("past", torch.zeros(2, self.options.history, samples, device=device))

    @property
    def first_division(self) -> int:
        """The epoch in which the losses are first taken in."""
        return self.options.warmup

    def labelled(self, k: int) -> Tensor:
        """Which samples (n,) network k holds for clean."""
        return self.clean[k] > self.options.threshold

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        if epoch < self.first_division:
            return
        divided = epoch - self.first_division  # epochs whose losses were taken in before this one
        for k in range(2):
            losses = F.cross_entropy(predict(k), self.labels, reduction="none")
            self.past[k, divided % self.options.history] = scaled(losses)
            mean = self.past[k, : divided + 1].mean(0)
            self.clean[k] = probability_clean(mean, seed=int(self.rng.integers(2**31)))

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        if epoch.number < self.options.warmup:
            yield from epoch
            return
        for k in range(2):
            yield from self._pools(epoch, k)

    def _pools(self, epoch: Epoch, k: int) -> Iterator[Batch]:
        """Batches for network k: labelled rows first, then as many unlabelled ones, divided by the other network."""
        chosen = self.labelled(1 - k)
        labelled, unlabelled = chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
        if not len(labelled) or not len(unlabelled):
            for batch in epoch:
                yield Batch(batch.inputs, batch.labels, batch.index, batch.epoch, network=k)
            return
        steps = max(1, len(labelled) // epoch.rows)
        pools = (epoch.cycle(pool, epoch.rows, steps, self.generator) for pool in (labelled, unlabelled))
        for number, pair in enumerate(zip(*pools, strict=True)):
            self.progress = epoch.number + number / (len(labelled) // epoch.rows + 1)
            yield self.drawn(epoch, torch.cat(pair), k)

    def drawn(self, epoch: Epoch, index: Tensor, network: int) -> Batch:
        """A batch for a network: labels are guessed on its first two views, and learnt from its last two."""
        return epoch.batch(index, network=network, views=2, divided=True)

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        if not batch.divided:
            targets = one_hot(batch.labels, self.info.classes)
            networks = range(2) if batch.network is None else (batch.network,)
            return [Task(k, batch.inputs, targets) for k in networks]
        k, rows = batch.network, len(batch.index) // 2
        assert k is not None
        views = batch.views[:2]
        own = torch.stack([forward(k, x).softmax(1) for x in views]).mean(0)
        peer = forward(1 - k, torch.cat([x[rows:] for x in views])).softmax(1).reshape(2, rows, -1).mean(0)
        w = self.clean[1 - k][batch.index[:rows], None]
        refined = w * one_hot(batch.labels[:rows], self.info.classes) + (1 - w) * self.corrected(own[:rows], k)
        guessed = self.corrected((own[rows:] + peer) / 2, k)
        targets = sharpen(torch.cat([refined, guessed]), self.options.temperature)
        inputs, targets = torch.cat(batch.views[-2:]), targets.repeat(2, 1)
        labelled = (torch.arange(len(targets), device=targets.device) % (2 * rows) < rows).float()
        order = labelled.argsort(descending=True, stable=True)  # the labelled rows of both views first
        inputs, targets, labelled = inputs[order], targets[order], labelled[order]
        weight, other = draw(self.options.alpha, len(inputs), self.generator, self.rng, inputs.device)
        weight = max(weight, 1 - weight)
        ramp = min(1.0, (self.progress - self.options.warmup) / self.options.ramp)
        plan = {"labelled": labelled, "lambda_u": self.options.lambda_u * ramp}
        return [Task(k, mix(inputs, other, weight), mix(targets, other, weight), plan=plan)]

    def corrected(self, p: Tensor, k: int) -> Tensor:
        """Predictions (n, K) for a batch of network k as they are used in its targets: as they are."""
        return p

    @property
    def warming_up(self) -> bool:
        """Whether the confidence penalty, if there is one, belongs to the loss."""
        return self.epoch < self.options.warmup

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """Cross-entropy on labelled rows, squared error on unlabelled ones, and the prior on the mean prediction."""
        log_p = logits.log_softmax(1)
        p, supervised = log_p.exp(), -(task.labels * log_p).sum(1)
        if "labelled" not in task.plan:  # the warm-up, or an epoch with an empty pool
            penalised = self.options.confidence_penalty and self.warming_up
            return supervised + (p * log_p).sum(1) if penalised else supervised
        labelled = task.plan["labelled"]
        guessed = task.plan["lambda_u"] * ((p - task.labels) ** 2).mean(1)
        prior = -math.log(self.info.classes) - p.mean(0).log().mean()  # KL(uniform || mean p)
        return 2 * torch.where(labelled > 0, supervised, guessed) + prior  # each half of the rows has its own mean

    def outputs(self, logits: Sequence[Tensor]) -> Tensor:
        """The sum of both networks' logits."""
        return torch.stack(list(logits)).sum(0)


def sharpen(p: Tensor, temperature: float) -> Tensor:
    """p^(1/T), normalised."""
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def scaled(losses: Tensor) -> Tensor:
    """Losses (n,) in [0, 1]; not finite where they do not differ."""
    return (losses - losses.min()) / (losses.max() - losses.min())


def probability_clean(losses: Tensor, seed: int) -> Tensor:
    """Probability of each sample to belong to the component of smaller mean of a two-component Gaussian mixture.

    All ones where the losses (n,) are not finite or do not differ: nothing can be divided.
    """
    values = losses.double().cpu().numpy().reshape(-1, 1)
    if not np.isfinite(values).all() or np.ptp(values) == 0:
        return torch.ones_like(losses)
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed).fit(values)
    p = mixture.predict_proba(values)[:, int(mixture.means_.argmin())]
    return torch.as_tensor(p, dtype=losses.dtype, device=losses.device)
