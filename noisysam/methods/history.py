"""Predictions of the last epochs, which several methods correct labels by."""

import torch
from torch import Tensor, nn

from noisysam.methods.base import RunInfo

TINY = 1e-12  # a sample without a prediction has the uniform mean


class History(nn.Module):
    """The probabilities (K) predicted for each sample in the last ``window`` epochs, as they were in training."""

    past: Tensor

    def __init__(self, info: RunInfo, window: int) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(window, info.samples, info.classes, device=info.device))

    def take_in(self, epoch: int, index: Tensor, p: Tensor) -> None:
        """Keep the predictions for some samples in an epoch; a value that is not finite leaves all as they were."""
        slot = self.past[epoch % len(self.past)]
        slot[index] = torch.where(torch.isfinite(p).all(), p.to(slot.dtype), slot[index])

    def mean(self, index: Tensor | None = None) -> Tensor:
        """The mean (n, K) over the epochs that are kept, of all samples or of some."""
        total = (self.past if index is None else self.past[:, index]).sum(0) + TINY
        return total / total.sum(1, keepdim=True)
