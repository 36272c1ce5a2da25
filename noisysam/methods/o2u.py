"""O2U-Net."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import METHODS, Method, Options, PredictTrainingSet, Rate, Stage, StageContext, rate_facts
from noisysam.methods.recipe import Epochs, PublishedRecipe


class O2UOptions(Options):
    remove: Rate = Field(None, description="share of the samples left out (default: the run's noise rate; 0.5x of it)")
    pretrain: float = Field(
        1.0, gt=0, description="length of the first training, in --epochs (250 of 250, see Deviation)"
    )
    cyclical: float = Field(1.0, gt=0, description="length of all cycles, in --epochs (250 of 250, see Deviation)")
    period: Epochs = Field(10, ge=1, description="epochs of a cycle (published 10)")
    lr: float = Field(0.01, gt=0, description="first learning rate, and peak of a cycle (published 0.01, for sgd)")


@METHODS.register("o2u", source="Huang et al., ICCV 2019", revision=2)
class O2U(Method):
    """O2U-Net: ranks samples by their losses over cycles of the learning rate, drops the top, trains from scratch.

    Equation: score_i = sum over the cycles' epochs of (loss_i - mean loss); kept: the floor((1-eta) n) smallest; the
        first training's rate is lr, lr / 2 from a quarter of it on, and lr / 10 from half of it on
    Code: hjimce/O2U-Net@ef89d99 main.py
    Deviation: a cycle falls by a half cosine to 0 (paper: linearly from 0.01 to 0.001), its optimizer starts anew, as
        it does at each of the first training's rates, and its batch is the run's (paper: 16 in the cycles).
    Deviation: losses are those of plain inputs at the end of an epoch (paper: of each training step).
    Deviation: the paper trains at first until accuracy is stable; the lengths are those of the code, which continues
        from the first training's weights in the last.
    State: 4 bytes per sample
    Checked: equal to the code's scores, choice and rates on the same losses to 1e-5 (tests/parity); a resume in a cycle
        and in the last stage
    """

    Options = O2UOptions
    requires = ("one process",)
    score: Tensor

    @classmethod
    def noise_facts(cls, options: O2UOptions) -> tuple[str, ...]:
        return rate_facts(options.remove)

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        return PublishedRecipe(
            source="hjimce/O2U-Net@ef89d99 main.py (not the authors')",
            model="cnn9",
            augment="none",
            batch=128,
            epochs=250,
            lr=0.01,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[62.5, 125],
            lr_factor=10**-0.5,
            differs={
                "schedule": "the last training's rate falls to a half and a tenth; here to 0.32 and a tenth",
                "batch": "16 in the cycles",
            },
        )

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, epochs = self.options, self.info.epochs
        self.cycle, self.final = 0, False
        yield from self.first_training()
        cycle = {"schedule": "cosine", "warmup": 0.0, "lr": o.lr, "epochs": o.period}
        for _ in range(max(1, round(o.cyclical * epochs / o.period))):
            self.cycle += 1
            yield Stage(start="continue", settings=cycle)
        self.last, self.final = context.predict("last"), True
        yield Stage()

    def first_training(self) -> Iterator[Stage]:
        """One stage for each of its learning rates, those without an epoch left out."""
        length = max(1, round(self.options.pretrain * self.info.epochs))
        ends = [0, math.ceil(length / 4), math.ceil(length / 2), length]
        for start, end, divisor in zip(ends[:3], ends[1:], (1, 2, 10), strict=True):
            settings = {"schedule": "constant", "lr": self.options.lr / divisor, "epochs": end - start}
            if not start:
                yield Stage(settings=settings)
            elif end > start:
                yield Stage(start="continue", settings={**settings, "warmup": 0.0})

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        if not hasattr(self, "score"):  # kept from stage to stage
            self.register_buffer("score", torch.zeros(self.info.samples, device=self.info.device))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        """Take in the losses that the epoch before ended with, if it belonged to a cycle."""
        if self.final:
            if epoch == 0:
                self.take_in(self.last)
        elif self.cycle > 1 or (self.cycle == 1 and epoch > 0):
            self.take_in(self.outputs([predict(k) for k in range(self.networks)]))

    def subset(self) -> Tensor | None:
        return self.kept() if self.final else None

    def take_in(self, logits: Tensor) -> None:
        losses = F.cross_entropy(logits, self.labels, reduction="none")
        self.write(self.score, torch.arange(len(losses), device=losses.device), self.score + losses - losses.mean())

    def kept(self) -> Tensor:
        """Places of the samples of smallest score, in order; at least one."""
        count = max(1, int((1 - self.rate(self.options.remove)) * len(self.score)))
        return self.score.argsort(stable=True)[:count].sort().values
