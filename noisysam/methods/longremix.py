"""LongReMix."""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import METHODS, PredictTrainingSet, Stage, StageContext
from noisysam.methods.dividemix import DivideMix, DivideMixOptions
from noisysam.methods.recipe import Epochs, PublishedRecipe


class LongReMixOptions(DivideMixOptions):
    confident: Epochs = Field(
        5, ge=1, description="epochs in a row that a sample must be clean in the first training (5)"
    )
    searched: float = Field(
        0.5, gt=0, le=1, description="share of the first training, at its end, that the set is taken from (150 of 300)"
    )


@METHODS.register("longremix", source="arXiv 2103.04173, section 3")
class LongReMix(DivideMix):
    """LongReMix: DivideMix that labels what was clean for several epochs; then DivideMix anew that trusts this set.

    Equation: first training, at a constant rate: labelled where w > threshold in each of the last 5 epochs; second,
        from scratch: w = 1 on the largest set that the first network had so in the last half of the first training
    Code: filipe-research/LongReMix@567c89b Train_cifar_longremix_stage1.py, Train_cifar_longremix_stage2.py
    Deviation: those of DivideMix. A mixture of the warm-up's losses is fitted before its last four epochs and each
        later one, to each network's own (code: after all of its epochs, to those of the first network for both).
    State: 28 bytes per sample; 8 more for each further epoch of history
    Checked: equal to the authors' sets in both trainings over nine epochs (tests/parity).
    """

    Options = LongReMixOptions
    streak: Tensor
    trusted: Tensor

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        theirs = super().published_recipe(dataset, noise_type, noise)
        source = "filipe-research/LongReMix@567c89b Train_cifar_longremix_stage1.py, Train_cifar_longremix_stage2.py"
        return theirs.model_copy(update={"source": f"{source}; lambda_u and threshold by noise: DivideMix's"})

    def stages(self, context: StageContext) -> Iterator[Stage]:
        self.final = False
        yield Stage(settings={"schedule": "constant"})
        self.final = True
        yield Stage()

    def on_stage(self, labels: Tensor) -> None:
        super().on_stage(labels)
        self.register_buffer("streak", torch.zeros(2, len(labels), device=labels.device))
        if not hasattr(self, "trusted"):  # kept for the second training
            self.register_buffer("trusted", torch.zeros(len(labels), device=labels.device))

    @property
    def first_division(self) -> int:
        o = self.options
        return o.warmup if self.final else max(1, o.warmup - o.confident + 1)

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        super().on_epoch(epoch, predict)
        if epoch < self.first_division:
            return
        if self.final:
            self.clean = torch.where(self.trusted > 0, 1.0, self.clean)
            return
        self.streak = torch.where(self.clean > self.options.threshold, self.streak + 1, 0.0)
        if epoch >= max(self.options.warmup, round((1 - self.options.searched) * self.info.epochs)):
            found = self.labelled(0).float()
            self.trusted = torch.where(found.sum() >= self.trusted.sum(), found, self.trusted)

    def labelled(self, k: int) -> Tensor:
        if self.final:
            return super().labelled(k)
        seen = self.epoch - self.first_division + 1
        return self.streak[k] >= min(self.options.confident, seen)
