"""O2U-Net."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import METHODS, Method, Options, PredictTrainingSet, Rate, Stage, StageContext, rate_facts


class O2UOptions(Options):
    remove: Rate = Field(None, description="share of the samples left out (default: the run's noise rate; 0.5x of it)")
    pretrain: float = Field(
        1.0, gt=0, description="length of the training at a constant rate, in --epochs (250 of 250, see Deviation)"
    )
    cyclical: float = Field(1.0, gt=0, description="length of all cycles, in --epochs (250 of 250, see Deviation)")
    period: int = Field(10, ge=1, description="epochs of a cycle (published 10)")
    lr: float = Field(0.01, gt=0, description="constant learning rate, and peak of a cycle (published 0.01, for sgd)")


@METHODS.register("o2u", source="Huang et al., ICCV 2019")
class O2U(Method):
    """O2U-Net: ranks samples by their losses over cycles of the learning rate, drops the top, trains from scratch.

    Equation: score_i = sum over the cycles' epochs of (loss_i - mean loss); kept: the floor((1-eta) n) smallest
    Deviation: a cycle falls by a half cosine to 0 (paper: linearly from 0.01 to 0.001), its optimizer starts anew, and
    its batch is the run's (paper: 16 in the cycles).
    Deviation: losses are those of plain inputs at the end of an epoch (paper: of each training step).
    Deviation: the paper trains at first until accuracy is stable; the lengths are those of hjimce/O2U-Net, who goes on
    from the first training's weights in the last.
    State: 4 bytes per sample
    Checked: scores and the choice by hand; the rate over the stages; a resume in a cycle and in the last stage
    """

    Options = O2UOptions
    score: Tensor

    @classmethod
    def noise_facts(cls, options: O2UOptions) -> tuple[str, ...]:
        return rate_facts(options.remove)

    def stages(self, context: StageContext) -> Iterator[Stage]:
        o, epochs = self.options, self.info.epochs
        constant = {"schedule": "constant", "lr": o.lr, "epochs": max(1, round(o.pretrain * epochs))}
        cycle = {"schedule": "cosine", "warmup": 0.0, "lr": o.lr, "epochs": o.period}
        self.cycle, self.final = 0, None
        yield Stage(settings=constant)
        for _ in range(max(1, round(o.cyclical * epochs / o.period))):
            self.cycle += 1
            yield Stage(start="continue", settings=cycle)
        self.last, self.final = context.predict("last"), Stage()
        yield self.final

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels
        if not hasattr(self, "score"):  # kept from stage to stage
            self.register_buffer("score", torch.zeros(self.info.samples, device=self.info.device))

    def on_epoch(self, epoch: int, predict: PredictTrainingSet) -> None:
        """Take in the losses that the epoch before ended with, if it belonged to a cycle."""
        if self.final is not None:
            if epoch == 0:
                self.take_in(self.last)
            self.final.subset = self.kept()
        elif self.cycle > 1 or (self.cycle == 1 and epoch > 0):
            self.take_in(self.outputs([predict(k) for k in range(self.networks)]))

    def take_in(self, logits: Tensor) -> None:
        losses = F.cross_entropy(logits, self.labels, reduction="none")
        self.write(self.score, torch.arange(len(losses), device=losses.device), self.score + losses - losses.mean())

    def kept(self) -> Tensor:
        """Places of the samples of smallest score, in order; at least one."""
        count = max(1, int((1 - self.rate(self.options.remove)) * len(self.score)))
        return self.score.argsort(stable=True)[:count].sort().values
