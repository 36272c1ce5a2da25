"""Intervals and tests for a few seeds: small functions of one value per seed.

The p value of a test is small if the statement that the function is named after holds. With fewer than two values
p = 1. Values without spread are treated as the limit of a vanishing spread: p is 0 or 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Values = Sequence[float] | NDArray[np.float64]  # (n,), one value per seed


@dataclass(frozen=True)
class Estimate:
    """A mean with its sample standard deviation and t interval, in the unit of the values; one value has neither."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


def estimate(values: Values, level: float = 0.05) -> Estimate:
    """Mean, sample standard deviation (n - 1) and t interval with coverage 1 - 2 ``level``, so that its ends are the
    bounds of the two one-sided tests at ``level``. ``ValueError`` without values."""
    n, mean, sd = _moments(values)
    if n == 1:
        return Estimate(1, mean, None, None, None)
    reach = float(special.stdtrit(n - 1, 1 - level)) * sd / math.sqrt(n)
    return Estimate(n, mean, sd, mean - reach, mean + reach)


def share_interval(values: Values, level: float = 0.025) -> tuple[float, float]:
    """Interval of the mean of shares (0 to 1) with coverage 1 - 2 ``level``, never outside of 0 to 1: the t interval on
    the logit scale, where the standard error of the mean m is that of the shares over m (1 - m) (delta method). Without
    spread it is the mean alone. Two values or more."""
    n, mean, sd = _moments(values)
    if not 0 < mean < 1:
        return mean, mean
    reach = float(special.stdtrit(n - 1, 1 - level)) * sd / math.sqrt(n) / (mean * (1 - mean))
    centre = special.logit(mean)
    return float(special.expit(centre - reach)), float(special.expit(centre + reach))


def _moments(values: Values) -> tuple[int, float, float]:
    """Number, mean and sample standard deviation (of one value: 0)."""
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    mean = math.fsum(values) / n
    return n, mean, math.sqrt(math.fsum([(value - mean) ** 2 for value in values]) / max(n - 1, 1))


def paired(a: Values, b: Values, level: float = 0.05) -> Estimate:
    """The mean of a - b, seed by seed, with its interval. ``ValueError`` where the seeds are not the same number."""
    return estimate([x - y for x, y in zip(a, b, strict=True)], level)


def welch(a: Values, b: Values, level: float = 0.05) -> tuple[float, float, float]:
    """mean(a) - mean(b) of unpaired samples with unequal variances, and the ends of its interval with coverage
    1 - 2 ``level`` (Welch 1947). Each sample has two values or more."""
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 2 * level)
    return math.fsum(a) / len(a) - math.fsum(b) / len(b), float(interval.low), float(interval.high)


def greater(values: Values, bound: float = 0.0) -> float:
    """That the mean exceeds ``bound``: Student's one-sided t test."""
    return _beyond(values, bound, 1)


def less(values: Values, bound: float = 0.0) -> float:
    """That the mean is below ``bound``."""
    return _beyond(values, bound, -1)


def _beyond(values: Values, bound: float, sign: int) -> float:
    if len(values) < 2:
        return 1.0
    n, mean, sd = _moments(values)
    ahead = sign * (mean - bound)
    return float(special.stdtr(n - 1, -ahead * math.sqrt(n) / sd)) if sd else float(ahead <= 0)


def sign_flip(values: Values, bound: float = 0.0) -> float:
    """That the mean exceeds ``bound``, by the sign-flip test (Fisher 1935): the share of the 2^n ways to flip the signs
    of value - ``bound`` whose mean is at least as large. If 2^n > 9,999, random flips with a fixed seed are used."""
    if len(values) < 2:
        return 1.0
    distances = (np.round(np.asarray(values, np.float64) - bound, 9),)
    test = stats.permutation_test(
        distances, np.mean, permutation_type="samples", alternative="greater", rng=np.random.default_rng(0)
    )
    return float(test.pvalue)


def goes_with(x: Values, y: Values) -> float:
    """That ``x`` goes up with ``y``: Spearman's rank correlation, by the share of the n! ways to pair them in which it
    is at least as large; if there are more than 9,999, random ones with a fixed seed are used. 1 if one is constant."""
    if min(len(set(x)), len(set(y))) < 2:
        return 1.0
    ours, theirs = stats.rankdata(x), stats.rankdata(y)

    def statistic(ranks: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.asarray((ranks * theirs).sum(axis=axis))

    test = stats.permutation_test(
        (ours,), statistic, permutation_type="pairings", alternative="greater", rng=np.random.default_rng(0)
    )
    return float(test.pvalue)


def noninferior(differences: Values, margin: float) -> float:
    """That the mean of a - b is above -``margin``: a is not worse than b by ``margin`` or more."""
    return greater(differences, -margin)


def equivalent(differences: Values, margin: float) -> float:
    """That the mean lies between -``margin`` and ``margin``: two one-sided tests (Schuirmann 1987)."""
    return max(greater(differences, -margin), less(differences, margin))


def different(differences: Values, margin: float = 0.0) -> float:
    """That the mean lies outside of -``margin`` to ``margin``: the better of two one-sided tests, doubled."""
    return min(1.0, 2 * min(greater(differences, margin), less(differences, -margin)))


def intersection_union(p: Sequence[float]) -> float:
    """That all of several statements hold, each tested at full level (Berger 1982): the largest p."""
    return max(p)


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for a family of tests, under any dependence (Holm 1979): if those at or below a level are taken
    as shown, the probability of any error is at most that level."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    return [float(value) for value in np.minimum(steps, 1)[np.argsort(order)]]


def simes(p: Sequence[float]) -> float:
    """That at least one of several statements holds (Simes 1986): min over j of k p_(j) / j. It is never above Holm's
    smallest, nor above the largest p; at level where the tests are independent or positively dependent."""
    return min(len(p) * value / (j + 1) for j, value in enumerate(sorted(p)))


def slopes(values: ArrayLike, rates: Values) -> NDArray[np.float64]:
    """For each seed the least-squares slope of its ``values`` (seeds, rates) over ``rates``, two or more: (seeds,)."""
    centred = np.asarray(rates, np.float64) - math.fsum(rates) / len(rates)
    return np.asarray(values, np.float64) @ centred / (centred @ centred)
