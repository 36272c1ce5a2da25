"""Robust generative classifier."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import METHODS, Method, Options, PredictTrainingSet

STEPS = 10  # of concentration; the subset hardly moves after a few
RIDGE = 1e-4  # of the mean variance, added where a covariance would not be invertible


class RoGOptions(Options):
    share: float = Field(
        0.5, gt=0, le=1, description="share of each class that its Gaussian is fitted to (0.5; code 0.7)"
    )


@METHODS.register("rog", source="arXiv 1901.11300, section 3")
class RoG(Method):
    """RoG: the network is trained as ever; a Gaussian for each class on its features, robustly fitted, classifies.

    Equation: mean and covariance of the share of each class with the smallest Mahalanobis distance, found by
    concentration steps from the median (minimum covariance determinant); log prior + log N(x; mean_c, the classes'
    pooled covariance).
    Code: pokaxpoka/RoGNoisyLabel@0cf223f generative_utils.py.
    Deviation: the penultimate features alone; the paper weighs several layers on a small validation set, which its code
    takes from the test set.
    Checked: against scikit-learn's discriminant analysis where all is kept; outliers by hand.
    """

    Options = RoGOptions
    reported = "features"

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels

    def on_evaluation(self, predict: PredictTrainingSet) -> None:
        features = predict(0, features=True).double()
        dim, classes = features.shape[1], self.info.classes
        pooled, counts = features.new_zeros(dim, dim), features.new_zeros(classes)
        self.means = features.new_zeros(classes, dim)
        for c in range(classes):
            kept = concentrated(features[self.labels == c], self.options.share)
            counts[c] = len(kept)
            if len(kept):
                self.means[c] = kept.mean(0)
                pooled += (kept - self.means[c]).T @ (kept - self.means[c])
        self.precision = torch.linalg.inv(ridged(pooled / counts.sum()))
        self.log_prior = (counts / counts.sum()).log()

    def outputs(self, logits: Sequence[Tensor]) -> Tensor:
        """Log densities (n, K), up to what the classes have in common, from the features (n, d)."""
        scaled = self.means @ self.precision
        scores = logits[0].double() @ scaled.T - (scaled * self.means).sum(1) / 2 + self.log_prior
        return scores.float()


def concentrated(points: Tensor, share: float) -> Tensor:
    """The share of the points (n, d) with the smallest Mahalanobis distance to their own mean, by repeated steps from
    those nearest to the median, in units of each coordinate's median deviation."""
    count = max(1, round(share * len(points)))
    if count >= len(points):
        return points
    away = (points - points.median(0).values).abs()
    scale = away.median(0).values.clamp(min=torch.finfo(points.dtype).eps)
    kept = points[(away / scale).square().sum(1).topk(count, largest=False).indices]
    for _ in range(STEPS):
        centre = kept.mean(0)
        spread = ridged((kept - centre).T @ (kept - centre) / len(kept))
        away = points - centre
        distance = (away * torch.linalg.solve(spread, away.T).T).sum(1)
        kept = points[distance.topk(count, largest=False).indices]
    return kept


def ridged(covariance: Tensor) -> Tensor:
    """With a little on its diagonal, so that it can be inverted."""
    size = covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).tiny)
    return covariance + RIDGE * size * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
