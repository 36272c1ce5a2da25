"""Metrics against independent numpy formulas, their invariants, and their behaviour on non-finite logits."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noisysam.training.metrics import (
    accuracy,
    detection_auroc,
    expected_calibration_error,
    memorisation,
    negative_log_likelihood,
    per_sample_loss,
    stratified_sample,
)

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, n: int = 200, classes: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(scale * rng.standard_normal((n, classes))).float()
    return logits, torch.from_numpy(rng.integers(0, classes, n))


def numpy_probabilities(logits: Tensor) -> npt.NDArray[np.float64]:
    z = logits.double().numpy()
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def numpy_ece(logits: Tensor, labels: Tensor, bins: int) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    probabilities = numpy_probabilities(logits)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    total = 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & ((confidence < (b + 1) / bins) | (b == bins - 1))
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
    return total / len(right)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_accuracy_and_losses_against_numpy(seed: int) -> None:
    logits, labels = draw(seed)
    probabilities = numpy_probabilities(logits)
    loss = -np.log(probabilities[np.arange(len(labels)), labels.numpy()])
    assert accuracy(logits, labels).item() == pytest.approx((probabilities.argmax(1) == labels.numpy()).mean())
    np.testing.assert_allclose(per_sample_loss(logits, labels).numpy(), loss, rtol=1e-4, atol=1e-5)
    assert negative_log_likelihood(logits, labels).item() == pytest.approx(loss.mean(), rel=1e-5)


def test_losses_are_float32_whatever_the_logits() -> None:
    logits, labels = draw(0)
    low = logits.bfloat16()
    for value in (per_sample_loss(low, labels), negative_log_likelihood(low, labels), accuracy(low, labels)):
        assert value.dtype == torch.float32
    torch.testing.assert_close(per_sample_loss(low, labels), per_sample_loss(low.float(), labels))


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([1, 7, 15]), st.sampled_from([0.5, 3.0, 200.0]))
def test_calibration_error_against_numpy(seed: int, bins: int, scale: float) -> None:
    logits, labels = draw(seed, scale=scale)  # at scale 200 most confidences are exactly 1
    assert expected_calibration_error(logits, labels, bins).item() == pytest.approx(
        numpy_ece(logits, labels, bins), abs=2e-5
    )


def test_calibration_error_by_hand() -> None:
    sure = torch.tensor([[1e4, 0.0], [1e4, 0.0], [1e4, 0.0], [1e4, 0.0]])
    assert expected_calibration_error(sure, torch.tensor([0, 0, 0, 1])).item() == pytest.approx(0.25, abs=1e-6)
    assert expected_calibration_error(sure, torch.tensor([0, 0, 0, 0])).item() == pytest.approx(0, abs=1e-6)
    # Confidences 1 and 0.99 share the last of 15 bins: their gaps (-1 + 0.99) cancel instead of adding up.
    mixed = torch.tensor([[1e4, 0.0], [math.log(99.0), 0.0]])
    assert expected_calibration_error(mixed, torch.tensor([1, 0])).item() == pytest.approx(0.495, abs=1e-5)


def test_memorisation_by_hand() -> None:
    clean = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    noisy = torch.tensor([0, 0, 1, 2, 0, 1, 2])
    predicted = torch.tensor([0, 1, 1, 2, 2, 0, 2])
    found = memorisation(torch.eye(3)[predicted], noisy, clean)
    assert found == pytest.approx({"clean_accuracy": 3 / 4, "memorised": 1 / 3, "recovered": 1 / 3})


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_memorisation_against_numpy_and_accuracy(seed: int) -> None:
    logits, clean = draw(seed)
    noisy = torch.where(torch.rand(200, generator=torch.Generator().manual_seed(seed)) < 0.4, (clean + 1) % 5, clean)
    found = memorisation(logits, noisy, clean)
    predicted, g, c = logits.numpy().argmax(1), noisy.numpy(), clean.numpy()
    wrong = g != c
    assert found["clean_accuracy"] == pytest.approx((predicted == c)[~wrong].mean())
    assert found["memorised"] == pytest.approx((predicted == g)[wrong].mean())
    assert found["recovered"] == pytest.approx((predicted == c)[wrong].mean())
    assert found["memorised"] + found["recovered"] <= 1 + 1e-6
    share = wrong.mean()
    total = (1 - share) * found["clean_accuracy"] + share * found["recovered"]
    assert total == pytest.approx(accuracy(logits, clean).item())


def test_empty_groups_are_nan() -> None:
    logits, clean = draw(0)
    found = memorisation(logits, clean, clean)
    assert math.isnan(found["memorised"])
    assert math.isnan(found["recovered"])
    assert found["clean_accuracy"] == pytest.approx(accuracy(logits, clean).item())
    assert math.isnan(memorisation(logits, (clean + 1) % 5, clean)["clean_accuracy"])
    for flipped in (torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)):
        assert math.isnan(detection_auroc(torch.rand(3), flipped))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_mann_whitney_share(rows: list[tuple[int, bool]]) -> None:
    losses, flipped = np.array([row[0] for row in rows], float), np.array([row[1] for row in rows])
    found = detection_auroc(torch.from_numpy(losses), torch.from_numpy(flipped))
    high, low = losses[flipped][:, None], losses[~flipped][None, :]
    if high.size * low.size == 0:
        assert math.isnan(found)
        return
    assert found == pytest.approx(((high > low) + 0.5 * (high == low)).mean())
    # Any increasing map keeps it; the reversed loss mirrors it.
    assert detection_auroc(torch.from_numpy(losses**3), torch.from_numpy(flipped)) == pytest.approx(found)
    assert detection_auroc(torch.from_numpy(-losses), torch.from_numpy(flipped)) == pytest.approx(1 - found)


def test_auroc_ranks_infinity_highest_and_nan_gives_nan() -> None:
    flipped = torch.tensor([False, True, False, True])
    assert detection_auroc(torch.tensor([0.1, math.inf, 0.2, 0.3]), flipped) == 1
    assert math.isnan(detection_auroc(torch.tensor([0.1, math.nan, 0.2, 0.3]), flipped))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_non_finite_logits_crash_nothing(bad: float, everywhere: bool) -> None:
    logits, labels = draw(1)
    if everywhere:
        logits[:] = bad
    else:
        logits[3, 2] = bad
    assert 0 <= accuracy(logits, labels).item() <= 1
    negative_log_likelihood(logits, labels)
    error = expected_calibration_error(logits, labels).item()
    assert math.isnan(error) == bool(everywhere or not bad < 0)
    assert 0 <= memorisation(logits, (labels + 1) % 5, labels)["recovered"] <= 1
    detection_auroc(per_sample_loss(logits, labels), labels == 0)


def test_a_row_with_nan_counts_as_wrong() -> None:
    logits = torch.tensor([[math.nan, 0.0], [0.0, math.nan], [1.0, 0.0], [math.inf, 0.0]])
    assert accuracy(logits, torch.tensor([0, 1, 0, 0])).item() == 0.5


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 300), st.integers(0, 320), st.integers(1, 12))
def test_stratified_sample(seed: int, n: int, size: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    flipped, clean = rng.random(n) < 0.3, rng.integers(0, classes, n)
    index = stratified_sample(flipped, clean, size, seed=seed % 7)
    assert len(index) == min(n, size)
    assert (np.diff(index) > 0).all()
    assert np.array_equal(index, stratified_sample(flipped, clean, size, seed=seed % 7))
    if len(index):
        assert index[0] >= 0
        assert index[-1] < n
    quotas = []
    for stratum in ((f, c) for f in (False, True) for c in range(classes)):
        inside = (flipped == stratum[0]) & (clean == stratum[1])
        share = inside.sum() * min(n, size) / n
        got = int(inside[index].sum())
        assert math.floor(share) <= got <= math.ceil(share)
        quotas.append((share - math.floor(share), got > share))
    # Largest remainders: who was rounded up had at least the remainder of who was rounded down.
    up = [remainder for remainder, raised in quotas if raised]
    down = [remainder for remainder, raised in quotas if not raised]
    assert not up or not down or min(up) >= max(down) - 1e-9


def test_stratified_sample_is_uniform_within_a_stratum_and_follows_the_seed() -> None:
    flipped, clean = np.zeros(20, bool), np.zeros(20, np.int64)
    counts = np.zeros(20)
    for seed in range(400):
        counts[stratified_sample(flipped, clean, 5, seed)] += 1
    # 400 draws of 5 in 20: 100 each, standard deviation 8.7; the chi-square of 19 degrees stays below 43.8 (p = 0.001).
    assert ((counts - 100) ** 2 / (100 * 0.75)).sum() * 19 / 20 < 43.8
