"""DISC: dynamic instance-specific selection and correction."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Method, Options, PredictTrainingSet, one_hot
from noisysam.methods.mixup import mix
from noisysam.methods.recipe import Epochs, PublishedRecipe
from noisysam.methods.semi import Policy, partners


class DISCOptions(Options):
    start: Epochs = Field(20, ge=1, description="epochs of cross-entropy first (20; instance noise: 15)")
    momentum: float = Field(
        0.99, ge=0, lt=1, description="of the thresholds (0.99; asymmetric noise, or from 60 % on: 0.95)"
    )
    sigma: float = Field(0.5, ge=0, description="by how much a corrected label's confidence exceeds them (0.5)")
    hard: float = Field(1.0, ge=0, description="weight of the loss of hard samples (1; from 60 % on: 0.2)")
    q: float = Field(0.7, gt=0, le=1, description="of the generalised cross-entropy of hard samples (0.7)")
    alpha: float = Field(5.0, gt=0, description="of the mixup's Beta(alpha, alpha) (5)")
    strong: Policy = Field("rand", description="augmentation of the strong view (RandAugment)")


@METHODS.register("disc", source="Li et al. 2023 (CVPR), equations 1 to 9")
class DISC(Method):
    """DISC: each sample's thresholds follow its confidence in two views; they select it, call it hard, or relabel it.

    Equation: clean: p_y above its threshold in both views, CE of both; hard: in one, GCE of both; corrected: in
        neither, and the largest mean probability above the mean threshold + sigma (at most 0.99), its class; mixup of
        all these with their labels, for each view; a threshold is a moving average of the largest probability
    Code: JackYFL/DISC@a21e910 algorithms/DISC.py, losses/loss_mixup.py
    Deviation: the strong view is RandAugment of magnitude 9 of 30 (code: FixMatch's, at magnitudes drawn anew, with
        cutout and reflected borders). Rows without a label to mix go through the mixed forwards too, with no weight,
        among themselves.
    State: 8 K + 28 bytes per sample
    Checked: equal to the authors' thresholds, sets, labels, loss and gradient to 1e-6 over several epochs
        (tests/parity); the sets by hand.
    """

    Options = DISCOptions
    requires = ("index", "one process")
    provides = ("index", "hard labels")
    views = 4
    smooths = False
    probabilities: Tensor
    thresholds: Tensor
    clean: Tensor
    hard: Tensor
    mixed: Tensor
    corrected: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        chosen: dict[str, Any] = {"start": 15} if noise_type == "instance" else {}
        if noise_type.startswith("asymmetric") or noise >= 0.6:
            chosen["momentum"] = 0.95
        return {**chosen, "hard": 0.2} if noise >= 0.6 else chosen

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        optimizer: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "weight_decay": 1e-3, "schedule": "milestones"}
        optimizer["milestones"] = [80, 160]
        if noise > 0.6:
            optimizer = {"base_opt": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "linear"}
            optimizer |= {"decay_from": 120, "final_momentum": 0.1}
        return PublishedRecipe(
            source="JackYFL/DISC@a21e910 algorithms/DISC.py, configs/DISC_CIFAR.py",
            model="resnet34" if noise_type == "instance" else "resnet18",
            augment="standard",
            batch=128,
            epochs=200,
            **optimizer,
        )

    def on_stage(self, labels: Tensor) -> None:
        self.labels, n, device = labels, len(labels), labels.device
        self.register_buffer("probabilities", torch.zeros((2, n, self.info.classes), device=device))
        self.register_buffer("thresholds", torch.full((2, n), 1 / n, device=device))
        for name in ("clean", "hard", "mixed"):
            self.register_buffer(name, torch.zeros(n, device=device))
        self.register_buffer("corrected", labels.clone())

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        """Divide the samples by the probabilities of the epoch that ended."""
        if not epoch:
            return
        p = self.probabilities
        own = p[:, torch.arange(len(self.labels), device=p.device), self.labels] > self.thresholds
        selected, self.clean = own.any(0), own.all(0).float()
        self.hard = selected.float() - self.clean
        confidence, found = p.mean(0).max(1)
        bound = (self.thresholds.mean(0) + self.options.sigma).clamp(max=0.99)
        corrects = (confidence > bound) & ~selected
        self.corrected = torch.where(corrects, found, torch.where(selected, self.labels, self.corrected))
        self.mixed = (corrects | selected).float()
        self.thresholds = torch.lerp(p.max(2).values, self.thresholds, self.options.momentum)

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        for batch in epoch:
            yield replace(batch, views=[batch.inputs, epoch.view(batch.index, self.options.strong)])

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        """Each row: its weak and its strong view, and after the first epochs a mixture of each with another row's."""
        if self.epoch < self.options.start:
            return [Task(0, torch.stack(batch.views, 1), batch.labels, batch.index)]
        index, alpha, views = batch.index, self.options.alpha, list(batch.views)
        mixed, labels = self.mixed[index], one_hot(self.corrected[index], self.info.classes)
        targets = []
        for view in batch.views:
            weight = float(self.rng.beta(alpha, alpha))
            weight, other = max(weight, 1 - weight), partners(mixed, self.generator)
            views.append(mix(view, other, weight))
            targets.append(mix(labels, other, weight))
        plan = {"clean": self.clean[index], "hard": self.hard[index], "targets": torch.stack(targets, 1)}
        plan["mixed"] = mixed * len(mixed) / mixed.sum().clamp(min=1)
        return [Task(0, torch.stack(views, 1), batch.labels, index, plan, forwards=(2, 1, 1))]

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        """Remember the probabilities in both views."""
        ((task,), (z,)) = tasks, logits
        assert task.index is not None
        for view, own in enumerate(self.probabilities):
            self.write(own, task.index, z[:, view].softmax(1))

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, 2, K), or (n, 4, K) after the first epochs."""
        log_p = logits.log_softmax(2)
        labels = one_hot(task.labels, logits.shape[2])[:, None]
        supervised = -(labels * log_p[:, :2]).sum((1, 2))
        if "mixed" not in task.plan:
            return supervised
        q, plan = self.options.q, task.plan
        p = (labels * log_p[:, :2].exp()).sum(2).clamp(min=1e-7)
        generalised = ((1 - p**q) / q).sum(1)
        mixture = -(plan["targets"] * log_p[:, 2:]).sum((1, 2))
        return plan["clean"] * supervised + self.options.hard * plan["hard"] * generalised + plan["mixed"] * mixture
