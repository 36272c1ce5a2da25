"""UNICON: uniform selection and contrastive learning."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.augdesc import AugDesc
from noisysam.methods.base import METHODS, Forward, PredictTrainingSet, one_hot
from noisysam.methods.contrastive import contrastive, drawn
from noisysam.methods.dividemix import MixMatchOptions
from noisysam.methods.jo_src import divergence
from noisysam.methods.recipe import PublishedRecipe
from noisysam.methods.semi import Policy

WIDTH = 128  # of the projection


class UNICONOptions(MixMatchOptions):
    lambda_u: float = Field(30.0, ge=0, description="weight of the unlabelled loss (30)")
    lambda_c: float = Field(0.025, ge=0, description="weight of the contrastive loss (0.025)")
    contrast: float = Field(0.05, gt=0, description="temperature of the contrastive loss (0.05)")
    head_lr: float = Field(0.02, gt=0, description="learning rate of the projections (0.02)")
    strong: Policy = Field("auto-plain", description="augmentation of what is learnt from (AutoAugment without cutout)")


@METHODS.register("unicon", source="arXiv 2203.14542, Algorithm 1")
class UNICON(AugDesc):
    """UNICON: as many clean samples of each class, by divergence; DivideMix's losses and a contrastive one.

    Equation: d = JS(mean prediction of both networks, e_y), in nats; of each class the s n / K samples of smallest d
        are labelled, s the share of samples with d below its mean; w = 1 - d, or 1 where d < 0.5; targets from weak
        views as in DivideMix; CE + lambda_u squared error + KL(uniform || mean p) on mixed strong views, + lambda_c
        contrastive loss of a projection of the unlabelled rows' strong views
    Code: nazmul-karim170/UNICON-Noisy-Label@616dc49 Train_cifar.py, dataloader_cifar.py, Contrastive_loss.py
    Deviation: as many unlabelled rows as labelled ones in a batch (code: 1 / (2 s) times as many), and one division an
        epoch (code: again before the second network). The paper's lower bound for large mean divergences is left out:
        in the code, whose divergence is below log 2, it never applies. Networks that guess labels use the batch's own
        statistics; the projections have a constant rate. In chunks of m rows, a row is contrasted with those of its
        chunk.
    State: 12 bytes per sample, and the projections (0.13 M weights)
    Checked: equal to the authors' selection, weights, targets, loss and gradient to 1e-5 (tests/parity).
    """

    Options = UNICONOptions
    requires = ("features", "one process")
    provides = ()
    views = 6
    chosen: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        chosen: dict[str, Any] = {"warmup": 30} if dataset == "cifar100" else {}
        return {**chosen, "confidence_penalty": True} if noise_type.startswith(("asymmetric", "pair")) else chosen

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="nazmul-karim170/UNICON-Noisy-Label@616dc49 Train_cifar.py",
            model="preact-resnet18",
            augment="standard",
            batch=64,
            epochs=350,
            lr=0.02,
            weight_decay=5e-4,
            schedule="cosine",
            lr_min=2e-4,
            differs={"schedule": "the cosine ends after 280 epochs, and the rate rises again", "batch": "128 at first"},
        )

    def on_stage(self, labels: Tensor) -> None:
        self.labels, samples, device = labels, len(labels), labels.device
        self.progress = 0.0  # epochs, in steps of a labelled pool
        self.register_buffer("clean", torch.ones(2, samples, device=device))  # the weights of the labels, alike
        self.register_buffer("chosen", torch.zeros(samples, device=device))
        made = [drawn(lambda: projection(self.info.features), self.rng, device) for _ in range(2)]
        self.project = nn.ModuleList(made)

    def auxiliary_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.options.head_lr, momentum=0.9, weight_decay=5e-4)

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        if epoch < self.options.warmup:
            return
        p = torch.stack([predict(k).softmax(1) for k in range(2)]).mean(0)
        apart = divergence(p, one_hot(self.labels, self.info.classes)) * math.log(2)
        count = int((apart < apart.mean()).sum()) // self.info.classes
        self.chosen = uniform_selection(apart, self.labels, self.info.classes, max(1, count)).float()
        self.clean[:] = torch.where(apart < 0.5, 1.0, 1 - apart)

    def labelled(self, k: int) -> Tensor:
        return self.chosen > 0

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        """Each row: two mixed strong views of a labelled and of an unlabelled sample, and the latter's as they are."""
        tasks = super().tasks(batch, forward)
        if not batch.divided:
            return tasks
        (task,), n = tasks, len(batch.index) // 2
        images = torch.cat([task.inputs, *(view[n:] for view in batch.views[-2:])]).unflatten(0, (6, n)).transpose(0, 1)
        targets = task.labels.unflatten(0, (4, n)).transpose(0, 1)
        plan = {"targets": targets, "lambda_u": task.plan["lambda_u"]}
        return [Task(task.network, images, targets.mean(1), plan=plan, forwards=(4, 1, 1))]

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, 6, K) after the warm-up."""
        if "targets" not in task.plan:
            return super().loss(logits, task)
        assert task.features is not None
        o, targets, log_p = self.options, task.plan["targets"], logits[:, :4].log_softmax(2)
        p = log_p.exp()
        supervised = -(targets[:, :2] * log_p[:, :2]).sum(2).mean(1)
        guessed = task.plan["lambda_u"] * ((p - targets)[:, 2:] ** 2).mean((1, 2))
        prior = -math.log(self.info.classes) - p.mean((0, 1)).log().mean()  # KL(uniform || mean p)
        first, second = (self.project[task.network](task.features[:, view]) for view in (4, 5))
        return supervised + guessed + prior + o.lambda_c * contrastive(first, second, o.contrast)


def projection(features: int) -> nn.Module:
    """The projection of a network. Batch norm without running statistics: a loss writes no state."""
    return nn.Sequential(nn.Linear(features, WIDTH), nn.BatchNorm1d(WIDTH, track_running_stats=False))


def uniform_selection(scores: Tensor, labels: Tensor, classes: int, count: int) -> Tensor:
    """Of each class, the ``count`` samples of smallest score, or all where there are fewer: True for those (n,)."""
    order = scores.argsort(stable=True)
    of_class = one_hot(labels[order], classes)
    rank = (of_class * of_class.cumsum(0)).sum(1)  # in its class, from 1
    return torch.empty_like(scores, dtype=torch.bool).scatter_(0, order, rank <= count)
