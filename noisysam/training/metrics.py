"""What is measured on predictions: accuracy, calibration, memorisation and noise detection.

Logits are (n, K) of any float type, labels int64 (n,). Non-finite logits crash nothing: a row with a NaN predicts no
class and counts as wrong, and averages over such rows are NaN. Functions that return a 0-d tensor stay on the device;
those that return floats synchronise.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from noisysam.core.rng import random_bits


def _predictions(logits: Tensor) -> Tensor:
    """The class with the largest logit, -1 for a row with a NaN (argmax alone would name its place a class)."""
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is at the label; 0-d float32, NaN for no rows."""
    return (_predictions(logits) == labels).float().mean()


def per_sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row in nats; float32 (n,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats; 0-d float32."""
    return per_sample_loss(logits, labels).mean()


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    0-d float32 in 0 ... 1, NaN if any probability is not finite. Bins are closed below; the last one holds 1 too.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error  # a second to import

    probabilities = logits.float().softmax(1)
    finite = probabilities.isfinite().all()
    # torchmetrics would give a confidence of exactly 1, common where labels are memorised, a bin of its own, and
    # would index out of range on a NaN.
    below_one = probabilities.nan_to_num(0.0).clamp(max=1 - 2**-24)
    error = multiclass_calibration_error(below_one, labels, logits.shape[1], n_bins=bins, validate_args=False)
    return torch.where(finite, error, torch.nan)


def memorisation(logits: Tensor, given: Tensor, clean: Tensor) -> dict[str, float]:
    """How a network treats right and wrong training labels (as in ELR, Liu et al. 2020, arXiv 2007.00151, figure 1).

    ``given`` are the labels trained on, ``clean`` the true ones; a sample is flipped where they differ.
    ``clean_accuracy``: share of the correctly labelled samples predicted as their label; ``memorised``: share of the
    flipped predicted as their given, wrong label; ``recovered``: share of the flipped predicted as their true label.
    NaN where a group is empty.
    """
    predicted = _predictions(logits)
    flipped = given != clean
    right = predicted == clean
    shares = torch.stack(
        (
            right[~flipped].float().mean(),
            (predicted == given)[flipped].float().mean(),
            right[flipped].float().mean(),
        )
    )
    return dict(zip(("clean_accuracy", "memorised", "recovered"), shares.tolist(), strict=True))


def detection_auroc(losses: Tensor, flipped: Tensor) -> float:
    """Area under the ROC curve of the per-sample loss as a detector of flipped labels (higher loss: flipped).

    The probability that a flipped sample has a higher loss than a correct one, ties counting half. An infinite loss
    processes highest; NaN if any loss is NaN, or if all samples or none are flipped.
    """
    from sklearn.metrics import roc_auc_score

    scores = losses.float().nan_to_num(torch.nan).cpu().numpy()  # sklearn refuses infinities: the largest float instead
    truth = flipped.cpu().numpy()
    if np.isnan(scores).any() or truth.all() or not truth.any():
        return float("nan")
    return float(roc_auc_score(truth, scores))


def stratified_sample(
    flipped: npt.NDArray[np.bool_], clean: npt.NDArray[np.int64], size: int, seed: int
) -> npt.NDArray[np.int64]:
    """Sorted indices of at most ``size`` samples, stratified by (flipped, true class); all of them if n <= size.

    Each stratum gets its proportional share, rounded by largest remainders (ties to the first stratum), and is drawn
    without replacement from the bits named by ``seed`` alone.
    """
    n = len(clean)
    if n <= size:
        return np.arange(n)
    _, stratum, counts = np.unique(
        np.stack([flipped.astype(np.int64), clean]), axis=1, return_inverse=True, return_counts=True
    )
    quota, remainder = np.divmod(counts * size, n)
    quota[np.argsort(-remainder, kind="stable")[: size - quota.sum()]] += 1
    order = np.lexsort((random_bits(n, "stratified_sample", seed), stratum))
    rank = np.arange(n) - np.repeat(counts.cumsum() - counts, counts)  # place within the stratum, in this order
    return np.sort(order[rank < np.repeat(quota, counts)])
