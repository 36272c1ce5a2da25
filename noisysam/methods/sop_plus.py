"""SOP+."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch, Epoch
from noisysam.methods.base import METHODS, Forward, Options
from noisysam.methods.recipe import PublishedRecipe
from noisysam.methods.semi import StrongView, consistency
from noisysam.methods.sop import SOP, SOPOptions


class SOPPlusOptions(SOPOptions, StrongView):
    consistency: float = Field(0.9, ge=0, description="weight of the consistency with a strong view (0.9)")
    balance: float = Field(0.1, ge=0, description="weight of the balance of classes (0.1)")


@METHODS.register("sop+", source="arXiv 2202.14026, appendix A, with equations 3 to 6")
class SOPPlus(SOP):
    """SOP+: SOP with consistency between a weak and a strong view, and predictions that spread over all classes.

    Equation: L = L_SOP(weak) + 0.9 KL(p(weak) || p(strong)) - 0.1 mean_k log(mean q_k), q the prediction of SOP with
        its modelled noise, p(weak) a constant in the second term; both views in one forward
    Code: shengliu66/SOP@4d991ce model/loss.py, data_loader/data_loaders.py
    Deviation: AutoAugment follows crop and flip, as in its paper (code: comes before them), by torchvision's kernels.
    State: 4 (K + 1) bytes per sample
    Checked: equal to the authors' loss, gradient and steps of u and v to 1e-6 over five visits (tests/parity); SOP
        where both weights are 0.
    """

    Options: ClassVar[type[Options]] = SOPPlusOptions
    provides = ("index", "hard labels")
    views = 2

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="shengliu66/SOP@4d991ce config_cifar100.json",
            model="preact-resnet18",
            augment="standard",
            batch=128,
            epochs=300,
            lr=0.02,
            weight_decay=1e-3 if dataset == "cifar100" else 5e-4,
            schedule="cosine",
            lr_min=0.0002,
            differs={} if dataset == "cifar100" else {"weight_decay": "not released for CIFAR-10: that of SOP"},
        )

    def batches(self, epoch: Epoch) -> Iterable[Batch]:
        for batch in epoch:
            yield replace(batch, views=[batch.inputs, epoch.view(batch.index, self.options.strong)])

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        return [Task(0, torch.stack(batch.views, 1), batch.labels, batch.index)]

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        """``logits`` (n, 2, K): of the weak and of the strong view."""
        weak, strong = logits.unbind(1)
        q, loss = self.modelled(weak, task)
        balance = -q.mean(0).log().mean()  # of the batch: the same for every row
        return loss + self.options.consistency * consistency(weak, strong) + self.options.balance * balance
