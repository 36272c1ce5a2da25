"""Intervals and tests against scipy, statsmodels, published examples and the definitions of the procedures."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_paired

from noisysam.report.statistics import (
    different,
    equivalent,
    estimate,
    greater,
    holm,
    intersection_union,
    less,
    noninferior,
    paired,
    share_interval,
    sign_flip,
    simes,
    slopes,
    welch,
)

# Student 1908: hours of sleep that two drugs add, ten patients.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]

RNG = np.random.default_rng(0)
SAMPLES = [RNG.normal(0.5, 1, n) for n in (2, 3, 5, 20)]
values = st.lists(st.integers(-1000, 1000).map(lambda k: k / 10), min_size=2, max_size=8)
p_values = st.lists(st.integers(0, 1000).map(lambda k: k / 1000), min_size=1, max_size=6)


def test_estimate_by_hand() -> None:
    """Mean 2, standard deviation 1; the 95 % quantile of t with 2 degrees of freedom is 2.919986."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    reach = 2.919986 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - reach, abs=1e-6), pytest.approx(2 + reach, abs=1e-6))


@pytest.mark.parametrize("sample", SAMPLES, ids=len)
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_estimate_against_scipy(sample: np.ndarray, level: float) -> None:
    found = estimate(sample, level)
    interval = stats.ttest_1samp(sample, 0).confidence_interval(1 - 2 * level)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-10)
    assert (found.mean, found.sd) == pytest.approx((sample.mean(), sample.std(ddof=1)), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(DescrStatsW(sample).tconfint_mean(2 * level), rel=1e-10)


def test_one_value_has_no_interval() -> None:
    found = estimate([3.5])
    assert (found.n, found.mean, found.sd, found.low, found.high) == (1, 3.5, None, None, None)
    for test in (greater, less):
        assert test([3.5], 0) == 1
    assert equivalent([0.0], 1) == different([9.0], 1) == noninferior([9.0], 1) == 1
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_paired_on_student_1908() -> None:
    """The paired t test of R's manual on its data set ``sleep``: interval -2.4599 to -0.7001, p 0.002833."""
    found = paired(FIRST, SECOND, level=0.025)
    assert (found.low, found.high) == (pytest.approx(-2.4598858, abs=1e-7), pytest.approx(-0.7001142, abs=1e-7))
    differences = np.subtract(FIRST, SECOND)
    assert different(differences) == pytest.approx(0.002833, abs=1e-6)
    interval = stats.ttest_rel(FIRST, SECOND).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-10)
    with pytest.raises(ValueError, match="zip"):
        paired(FIRST, SECOND[:9])


def test_welch_on_student_1908() -> None:
    """R's t.test(extra ~ group, data = sleep): interval -3.3654832 to 0.2054832."""
    mean, low, high = welch(FIRST, SECOND, level=0.025)
    assert (mean, low, high) == pytest.approx((-1.58, -3.3654832, 0.2054832), abs=1e-7)
    oracle = CompareMeans(DescrStatsW(FIRST), DescrStatsW(SECOND)).tconfint_diff(alpha=0.1, usevar="unequal")
    assert welch(FIRST, SECOND)[1:] == pytest.approx(oracle, rel=1e-10)


@pytest.mark.parametrize("sample", SAMPLES, ids=len)
@pytest.mark.parametrize("bound", [-1.0, 0.0, 0.7])
def test_one_sided_tests_against_scipy(sample: np.ndarray, bound: float) -> None:
    for test, side in ((greater, "greater"), (less, "less")):
        assert test(sample, bound) == pytest.approx(stats.ttest_1samp(sample, bound, alternative=side).pvalue, rel=1e-9)
    two_sided = stats.ttest_1samp(sample, 0).pvalue
    assert different(sample) == pytest.approx(two_sided, rel=1e-9)
    assert noninferior(sample, 1.5) == greater(sample, -1.5)


@pytest.mark.parametrize("margin", [0.1, 1.0, 2.5])
def test_equivalence_against_statsmodels(margin: float) -> None:
    p, *_ = ttost_paired(np.array(FIRST), np.array(SECOND), -margin, margin)
    assert equivalent(np.subtract(FIRST, SECOND), margin) == pytest.approx(p, rel=1e-9)


def test_no_spread_is_the_limit() -> None:
    for spread in (1e-9, 0.0):
        sample = [1.0 - spread, 1.0, 1.0 + spread]
        assert greater(sample, 0.5) == pytest.approx(0, abs=1e-9)
        assert less(sample, 0.5) == pytest.approx(1, abs=1e-9)
        assert equivalent(sample, 1.5) == pytest.approx(0, abs=1e-9)
        assert different(sample, 0.5) == pytest.approx(0, abs=1e-9)
    assert greater([0.0] * 3) == less([0.0] * 3) == 1  # neither side of the bound


@given(values, st.integers(-50, 50), st.sampled_from([0.5, 2.0, 8.0]))
def test_tests_go_with_the_data(sample: list[float], bound: int, scale: float) -> None:
    """Mirrored, scaled and reordered data; the interval's end and the p value tell the same."""
    p = greater(sample, bound)
    assert less([-v for v in sample], -bound) == p
    assert greater([scale * v for v in sample], scale * bound) == pytest.approx(p, abs=1e-9)
    assert greater(sample[::-1], bound) == p
    assert greater(sample, bound - 1) <= p
    if len(set(sample)) > 1:
        low = estimate(sample, 0.05).low
        assert low is not None
        assert abs(low - bound) < 1e-9 or (p < 0.05) == (low > bound)


@given(values, st.integers(1, 50))
def test_equal_and_different_never_both(sample: list[float], margin: int) -> None:
    assert equivalent(sample, margin) >= 0.05 or different(sample, margin) >= 0.5
    assert equivalent(sample, margin + 1) <= equivalent(sample, margin)
    assert equivalent([-v for v in sample], margin) == equivalent(sample, margin)
    assert noninferior(sample, margin) <= equivalent(sample, margin)


def test_holm_by_hand() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04; times 4, 3, 2, 1; never falling: 0.02, 0.03, 0.06, 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-12)


@pytest.mark.slow
@given(p_values)
def test_holm_against_statsmodels(p: list[float]) -> None:
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=1e-12)


@given(st.lists(st.integers(1, 100).map(lambda k: k / 1000), min_size=1, max_size=5))
def test_holm_is_closed_bonferroni(p: list[float]) -> None:
    """By definition: a thing holds if Bonferroni rejects every set of nulls that it is in (Marcus et al. 1976)."""
    for k, adjusted in enumerate(holm(p)):
        sets = (s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size) if k in s)
        assert adjusted == pytest.approx(max(min(1, len(s) * min(p[j] for j in s)) for s in sets), abs=1e-12)


@given(p_values)
def test_simes(p: list[float]) -> None:
    assert simes(p) == pytest.approx(stats.false_discovery_control(p).min(), abs=1e-12)
    assert simes(p) <= min(min(holm(p)), intersection_union(p)) + 1e-12
    assert intersection_union(p) == max(p)


def test_simes_by_hand() -> None:
    """Three of 0.04: no one below 0.05 / 3, all below 0.05."""
    assert simes([0.04, 0.04, 0.04]) == pytest.approx(0.04)
    assert min(holm([0.04, 0.04, 0.04])) == pytest.approx(0.12)
    assert simes([0.5, 0.01]) == pytest.approx(0.02)


def test_slopes_against_polyfit() -> None:
    rates, gains = [0.2, 0.4, 0.8], RNG.normal(size=(5, 3))
    assert slopes(gains, rates) == pytest.approx([np.polyfit(rates, line, 1)[0] for line in gains], rel=1e-9)
    assert slopes([[1.0, 3.0, 7.0]], rates) == pytest.approx([10.0])


def test_share_interval_by_hand() -> None:
    """Delta method: logit 0.5 = 0, standard error 0.1 / root 3 / 0.25; t of 2 degrees of freedom: 4.302653."""
    reach = 4.302653 * 0.1 / math.sqrt(3) / 0.25
    assert share_interval([0.4, 0.5, 0.6]) == pytest.approx((1 / (1 + math.exp(reach)), 1 / (1 + math.exp(-reach))))
    assert share_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert share_interval([0.0, 0.0]) == (0.0, 0.0)
    assert share_interval([0.3, 0.3]) == pytest.approx((0.3, 0.3))


@given(st.lists(st.integers(0, 1000).map(lambda k: k / 1000), min_size=2, max_size=8))
def test_share_interval_stays_within_0_and_1(sample: list[float]) -> None:
    low, high = share_interval(sample)
    assert 0 <= low <= sum(sample) / len(sample) + 1e-9
    assert sum(sample) / len(sample) - 1e-9 <= high <= 1
    mirrored = share_interval([1 - value for value in sample])
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize(("mean", "sd"), [(0.5, 0.02), (0.9, 0.01), (0.97, 0.01), (0.2, 0.05), (0.05, 0.02)])
def test_share_interval_covers_the_mean(mean: float, sd: float, n: int) -> None:
    """Beta-distributed accuracies: 95 % within what 2,000 simulated studies and the skew of the law allow."""
    scale = mean * (1 - mean) / sd**2 - 1
    samples = np.random.default_rng([n, round(1000 * mean)]).beta(mean * scale, (1 - mean) * scale, (2000, n))
    covered = np.mean([low <= mean <= high for low, high in map(share_interval, samples)])
    assert 0.93 <= covered <= 0.975


def test_sign_flips_by_counting() -> None:
    """By definition: the share of sign patterns whose sum is as large."""
    for sample in ([1.0, 2.0, 3.0, 4.0, 5.0], [0.5, -0.2, 1.5, 2.5, 0.1, -0.4], FIRST):
        sums = [sum(s * v for s, v in zip(signs, sample, strict=True))
                for signs in itertools.product((1, -1), repeat=len(sample))]  # fmt: skip
        assert sign_flip(sample) == pytest.approx(np.mean([total >= sum(sample) - 1e-9 for total in sums]))
        assert sign_flip([v + 3 for v in sample], 3) == sign_flip(sample)
    assert sign_flip([2.0]) == 1
    many = RNG.normal(0.3, 1, 30)
    assert sign_flip(many) == sign_flip(many) == pytest.approx(greater(many), abs=0.02)
