"""Backward correction of the loss."""

import math
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from noisysam.core.task import Task
from noisysam.methods.base import METHODS, Stage, StageContext, one_hot
from noisysam.methods.forward import ForwardCorrection, ForwardOptions


class BackwardOptions(ForwardOptions):
    cutoff: float = Field(
        0.01, ge=0, lt=1, description="singular values of T below this share of the largest are not inverted (paper: 0)"
    )
    floor: float = Field(
        0.0, ge=0, lt=1, description="least p whose logarithm is taken (paper: 0; released code: 1e-7)"
    )


@METHODS.register("backward", source="arXiv 1609.03683, Theorem 1")
class BackwardCorrection(ForwardCorrection):
    """Backward correction: a combination of the losses of all labels whose mean over the noise is the clean loss.

    Equation: L = -sum_k (T^-1)_yk log p_k, T as in forward
    Code: giorgiop/loss-correction@15a79de loss.py, models.py
    Deviation: where T is nearly singular its pseudo-inverse is used: directions of small singular values are left out,
        so that weights stay below 1 / cutoff; the loss is unbiased except along them. T is estimated as in forward. The
        loss has no lower bound; the code's has one, since it clips predictions (option floor).
    State: none per sample; 2 K^2 numbers
    Checked: equal to the authors' loss, gradient and matrix to 1e-6 (tests/parity); numpy, values and gradients; the
        mean over noisy labels is cross-entropy; singular T.
    """

    Options = BackwardOptions
    inverse: Tensor

    def stages(self, context: StageContext) -> Iterator[Stage]:
        yield from super().stages(context)

    def on_stage(self, labels: Tensor) -> None:
        super().on_stage(labels)
        inverse = torch.linalg.pinv(self.believed.double(), rtol=self.options.cutoff)
        self.register_buffer("inverse", inverse.float())

    def loss(self, logits: Tensor, task: Task) -> Tensor:
        log_p = logits.log_softmax(1)
        if self.options.floor:
            log_p = log_p.clamp(min=math.log(self.options.floor))
        weight = one_hot(task.labels, logits.shape[1]).float() @ self.inverse
        return -(weight * log_p).sum(1)
