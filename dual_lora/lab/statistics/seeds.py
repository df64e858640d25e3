"""Tests over seeds: each seed's difference is one observation, whatever the number of its examples and test sets.

A paired t-test and its interval (Student 1908), the two one-sided tests of equivalence (Schuirmann 1987) and the power
of both. They assume nothing about the predictions and hold with few seeds, where resampling does not (see
`calibration`). They hold for the test examples at hand; whether other examples would give another difference is for the
tests on predictions to say.

Units are those of the differences given: fractions, or points of percent.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi, norm, t
from statsmodels.stats.weightstats import DescrStatsW

LEVEL = 0.05
POWER = 0.8
# Fewer seeds than this decide nothing, whatever their p: their standard deviation is hardly known.
MIN_SEEDS = 5
# Differences are equal up to this, in their unit and relative to their size: sums of floats are not exact, and a
# standard deviation of 1e-17 would decide a test.
DECIMALS = 12
TOLERANCE = 10.0**-DECIMALS


@dataclass(frozen=True)
class SeedTest:
    """The mean of the seeds' differences and its t-test against zero; what one seed, or a few equal differences, cannot
    say is None.

    Attributes:
        deviation: sample standard deviation of the differences.
        low, high: 95 % t-interval of the mean.
        p: two-sided.
    """

    mean: float
    seeds: int
    deviation: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def compute_seed_test(differences: Sequence[float]) -> SeedTest:
    """Return the t-test of the seeds' differences, of shape (S,).

    Raises:
        ValueError: there is no difference, or one is NaN or infinite.
    """
    values_S = check_differences(differences)
    if len(values_S) == 1:
        return SeedTest(float(values_S[0]), 1)
    if (same := find_common_value(values_S)) is not None:
        if len(values_S) < MIN_SEEDS:  # scores are multiples of 1/n, so that a few are easily equal: no spread is known
            return SeedTest(same, len(values_S), 0.0)
        return SeedTest(same, len(values_S), 0.0, same, same, float(same == 0))  # t is infinite, or 0 / 0
    found = DescrStatsW(values_S)
    low, high = found.tconfint_mean(LEVEL)
    mean, deviation = float(values_S.mean()), float(values_S.std(ddof=1))
    return SeedTest(mean, len(values_S), deviation, float(low), float(high), float(found.ttest_mean(0)[1]))


def compute_equivalence_p(differences: Sequence[float], margin: float) -> float | None:
    """Return the p of two one-sided t-tests that the mean lies within -margin and +margin; None with one seed, or a few
    equal differences.

    Raises:
        ValueError: as `compute_seed_test`, or the margin is not positive.
    """
    values_S = check_differences(differences)
    if margin <= 0:
        raise ValueError(f"margin {margin}: a positive number is needed")
    if len(values_S) == 1:
        return None
    if (same := find_common_value(values_S)) is not None:
        return None if len(values_S) < MIN_SEEDS else float(abs(same) >= margin * (1 - TOLERANCE))
    return float(DescrStatsW(values_S).ttost_mean(-margin, margin)[0])


def check_differences(differences: Sequence[float]) -> np.ndarray:
    """Return the differences as an array.

    Raises:
        ValueError: there is none, or one is NaN or infinite.
    """
    values_S = np.round(np.asarray(differences, dtype=float), DECIMALS)
    if values_S.ndim != 1 or not values_S.size or not np.isfinite(values_S).all():
        raise ValueError(f"differences {differences}: one finite number a seed is needed")
    return values_S


def find_common_value(values_S: np.ndarray) -> float | None:
    """Return the value of all differences where they are equal up to rounding; None where they are not."""
    equal = np.ptp(values_S) <= TOLERANCE * np.abs(values_S).max()
    return float(values_S[0]) if equal else None


@functools.cache
def compute_detectable_difference(
    deviation: float | None, seeds: int, comparisons: int = 1, least: float = 0.0
) -> float | None:
    """Return the smallest true difference that this number of seeds finds in four of five studies; None with one seed.

    Found is what a two-sided t-test over the seeds finds, at the strictest step of Holm's correction for these
    comparisons, and what is larger than `least`. One comparison needs 11.5 standard deviations of two seeds, 1.7 of
    five, 1.2 of eight.

    The statistic is (Z + effect) / (root / sqrt(freedom)), noncentral t by definition: Z is standard normal, root the
    square root of a chi-squared number. The power is therefore the mean over root of P(Z + effect > threshold root).

    deviation: the standard deviation of the seeds' differences. least: what another test asks of the mean, in the same
        unit.
    """
    if deviation is None or seeds < 2:
        return None
    if deviation == 0:
        return least
    error, freedom = deviation / np.sqrt(seeds), seeds - 1
    threshold = t.ppf(1 - LEVEL / comparisons / 2, freedom) / np.sqrt(freedom)

    def miss(effect: float) -> float:  # effect in standard errors; the opposite tail is negligible at this power
        # root: the square root of a chi-squared number
        found = chi(freedom).expect(lambda root: norm.sf(np.maximum(threshold * root, least / error) - effect))
        return float(found) - POWER

    highest = 10 * threshold * np.sqrt(freedom) + least / error
    return float(brentq(miss, 0, highest, rtol=1e-6) * error)


def compute_equivalence_power(deviation: float, seeds: int, margin: float) -> float:
    """Return how often equal methods are found equivalent, averaged over the distribution of the estimated deviation.

    deviation: the true standard deviation of the seeds' differences.
    """
    error, freedom = deviation / np.sqrt(seeds), seeds - 1
    threshold = t.ppf(1 - LEVEL, freedom) / np.sqrt(freedom)

    def find_share(root: float) -> float:  # root: the square root of a chi-squared number
        return max(0.0, 2 * norm.cdf(margin / error - threshold * root) - 1)

    return float(chi(freedom).expect(find_share))
