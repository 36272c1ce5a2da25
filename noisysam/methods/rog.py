"""Robust generative classifier."""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from noisysam.methods.base import METHODS, Method, Options, PredictTrainingSet
from noisysam.methods.recipe import PublishedRecipe

ABSENT = -1e3  # added to the log density of a class without samples, which is never predicted


class RoGOptions(Options):
    share: float = Field(
        0.5, gt=0, le=1, description="share of each class that its Gaussian is fitted to (0.5; code 0.7)"
    )


@METHODS.register("rog", source="arXiv 1901.11300, section 3", revision=2)
class RoG(Method):
    """RoG: trains by cross-entropy; a Gaussian per class, fitted robustly to the features, is the classifier.

    Equation: of a random share of each class the mean and the pooled covariance; then of each class the share with the
        smallest Mahalanobis distance to that; its mean, and the covariances weighted by the size of the classes; log
        N(x; mean_c, pooled covariance), every class equally probable
    Code: pokaxpoka/RoGNoisyLabel@0cf223f generative_utils.py (random_sample_mean, MCD_single), inference.py
    Deviation: the penultimate features alone; the paper weighs several layers on a small validation set, which its code
        takes from the test set. The first covariances are pooled as the paper has it; the code divides their running
        sum once per class, so that the last class outweighs the others.
    Checked: equal to the authors' steps on the same draws to 1e-5 (tests/parity); scikit-learn's discriminant analysis
        where all samples are kept; outliers by hand.
    """

    Options = RoGOptions
    reported = "features"

    @classmethod
    def published_recipe(cls, dataset: str, noise_type: str, noise: float) -> PublishedRecipe:
        hundred = dataset == "cifar100"
        return PublishedRecipe(
            source="pokaxpoka/RoGNoisyLabel@0cf223f train.py",
            model="resnet34",
            augment="standard",
            batch=128,
            epochs=200 if hundred else 120,
            lr=0.1,
            weight_decay=5e-4,
            schedule="milestones",
            milestones=[80, 120, 160] if hundred else [40, 80],
            differs={"model": "DenseNet-100 or ResNet-34"},
        )

    def on_stage(self, labels: Tensor) -> None:
        self.labels = labels

    def on_evaluation(self, predict: PredictTrainingSet) -> None:
        features = predict(0, features=True).double()
        groups = [features[self.labels == c] for c in range(self.info.classes)]
        rng = np.random.default_rng(self.labels.cpu().numpy())  # the same draws whenever these networks are measured
        centres, precision = random_gaussians(groups, self.options.share, rng)
        kept = [nearest(x, c, precision, self.options.share) for x, c in zip(groups, centres, strict=True)]
        self.means, self.precision = gaussians(kept, [len(x) for x in groups])
        self.bias = torch.tensor([0.0 if len(x) else ABSENT for x in groups], device=features.device)

    def outputs(self, logits: Sequence[Tensor]) -> Tensor:
        """Log densities (n, K), up to what the classes have in common, from the features (n, d)."""
        scaled = self.means @ self.precision
        scores = logits[0].double() @ scaled.T - (scaled * self.means).sum(1) / 2 + self.bias
        return scores.float()


def random_gaussians(groups: Sequence[Tensor], share: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Means (K, d) and pooled precision (d, d) of a random share of each group of points (n, d)."""
    drawn = [x[torch.from_numpy(rng.permutation(len(x))[: count(x, share)]).to(x.device)] for x in groups]
    return gaussians(drawn, [len(x) for x in drawn])


def nearest(points: Tensor, centre: Tensor, precision: Tensor, share: float) -> Tensor:
    """The share of the points (n, d) with the smallest Mahalanobis distance to a centre."""
    away = points - centre
    distance = (away @ precision * away).sum(1)
    return points[distance.topk(count(points, share), largest=False).indices]


def count(points: Tensor, share: float) -> int:
    """How many of the points a share keeps; at least one of those that there are."""
    return max(min(1, len(points)), int(share * len(points)))


def gaussians(groups: Sequence[Tensor], weights: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean of each group of points (zeros where it is empty), and the inverse of the weighted mean covariance."""
    dim = groups[0].shape[1]
    means = torch.stack([x.mean(0) if len(x) else x.new_zeros(dim) for x in groups])
    spread = groups[0].new_zeros(dim, dim)
    for x, mean, weight in zip(groups, means, weights, strict=True):
        spread += weight / max(1, len(x)) * ((x - mean).T @ (x - mean))
    return means, torch.linalg.pinv(spread / sum(weights), hermitian=True)
