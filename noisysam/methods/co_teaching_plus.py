"""Co-teaching+."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS
from noisysam.methods.co_teaching import UNSCALED, CoTeaching, CoTeachingOptions, smallest
from noisysam.methods.decoupling import differing
from noisysam.methods.recipe import Epochs, PublishedRecipe


class CoTeachingPlusOptions(CoTeachingOptions):
    warmup: Epochs = Field(
        20, ge=0, description="epochs of co-teaching first (code: CIFAR-10 20, CIFAR-100 5, MNIST 0)"
    )


@METHODS.register("co-teaching+", source="arXiv 1901.04215, Algorithm 1", revision=2)
class CoTeachingPlus(CoTeaching):
    """Co-teaching+: co-teaching, after a warm-up only among the rows that the two networks predict differently.

    Equation: network k learns from the R(e) |D| rows of D = {i: argmax p_1i != argmax p_2i} that have the smallest
        CE(y_i, p_ji), j being the other network; R(e) = 1 - tau min(e / ramp, 1)
    Code: xingruiyu/coteaching_plus@a68ed61 main.py, loss.py
    Deviation: cross-entropy of logits, as in the paper (the code takes it of probabilities, a second softmax); no row
        is lost (the code drops the sample of index 0). Of few disagreements at least one row is kept (the code then
        keeps all of them); where there are none nothing is learned in that step (the code: after its first 5000 steps).
    Checked: equal to the paper's selection and gradient to 1e-6 over 14 epochs of both schedules (tests/parity);
        selections by hand; equality with co-teaching in the warm-up and where all rows differ.
    """

    Options: ClassVar[type[CoTeachingOptions]] = CoTeachingPlusOptions

    @classmethod
    def published(cls, dataset: str, noise_type: str, noise: float) -> dict[str, Any]:
        return {**super().published(dataset, noise_type, noise), **({"warmup": 5} if dataset == "cifar100" else {})}

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        network = (
            "six convolutions and a linear layer"
            if dataset == "cifar100"
            else "two convolutions and three linear layers"
        )
        return PublishedRecipe(
            source="xingruiyu/coteaching_plus@40d5831 main.py",
            augment="none",
            batch=128,
            epochs=200,
            base_opt="adam",
            lr=1e-3,
            weight_decay=0.0,
            schedule="linear",
            decay_from=80,
            final_momentum=0.1,
            differs={"model": f"{network}, not in this package", **UNSCALED},
        )

    def plan(self, tasks: Sequence[Task], logits: Sequence[Tensor]) -> None:
        if self.epoch < self.options.warmup:
            super().plan(tasks, logits)
            return
        chosen = differing(logits)
        # by a table, so that the number of disagreements need not leave the device
        table = torch.tensor([self.keep(n, self.epoch) for n in range(len(chosen) + 1)], device=chosen.device)
        kept = table.take(chosen.sum())
        for k, other in ((0, 1), (1, 0)):
            losses = self.cross_entropy(logits[other], tasks[other].labels)
            tasks[k].plan["weight"] = chosen * smallest(losses.where(chosen, torch.inf), kept)
