"""Truncated generalised cross-entropy."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.data.loader import Batch
from noisysam.methods.base import METHODS, Forward, PredictTrainingSet
from noisysam.methods.gce import GCE, GCEOptions
from noisysam.methods.recipe import Epochs


class TruncatedOptions(GCEOptions):
    k: float = Field(0.5, gt=0, lt=1, description="least p_y of a sample that is kept (published 0.5)")
    start: Epochs = Field(
        40, ge=0, description="epoch, counted from 1, that first leaves samples out (CIFAR-10: 40; CIFAR-100: 80)"
    )
    every: Epochs = Field(10, ge=1, description="epochs between two choices of the samples (published 10)")


@METHODS.register("gce-truncated", source="arXiv 1805.07836, the truncated L_q loss and Algorithm 1", revision=2)
class GCETruncated(GCE):
    """Truncated generalised cross-entropy: samples whose label is less probable than k are left out for some epochs.

    Equation: L = w (L_q - L_q(k)), L_q(k) = (1 - k^q) / q; every few epochs w = [L_q <= L_q(k)], 1 before the first
    Code: AlanChou/Truncated-Loss@fef5908 TruncatedLoss.py, main.py (not the authors')
    Deviation: samples are chosen by the network as it is, not by the one that was best on the test set; on plain
        inputs, not augmented ones. A choice that would leave nothing keeps the last one. Rows left out count in the
        mean, as published.
    State: 1 byte per sample
    Checked: equal to the code's loss, weights and epochs (the 40th, 50th, ...) to 1e-12 (tests/parity); numpy, values
        and gradients; choices and their epochs by hand.
    """

    Options = TruncatedOptions
    requires = ("index", "one process")
    kept: Tensor

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {"start": 80} if dataset == "cifar100" else {}

    def bound(self) -> float:
        """The loss at p_y = k."""
        return (1 - self.options.k**self.options.q) / self.options.q

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        self.register_buffer("kept", torch.ones(self.info.samples, dtype=torch.bool, device=self.info.device))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        past = epoch + 1 - self.options.start
        if past < 0 or past % self.options.every:
            return
        logits = predict(0)
        kept = super().loss(logits, Task(0, logits, self.labels)) <= self.bound()  # never where it is not finite
        self.kept.copy_(torch.where(kept.any(), kept, self.kept))

    def tasks(self, batch: Batch, forward: Forward) -> Sequence[Task]:
        return [Task(0, batch.inputs, batch.labels, batch.index, {"kept": self.kept[batch.index]})]

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        return task.plan["kept"] * (super().loss(logits, task) - self.bound())
