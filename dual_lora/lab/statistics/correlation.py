"""Rank correlation with an interval, for a few points."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import atanh, sqrt, tanh

from scipy.stats import norm, spearmanr

MIN_POINTS = 5


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho of so many points and its 95 % interval, which takes the points for independent."""

    rho: float
    low: float
    high: float
    points: int


def correlate_ranks(xs: Sequence[float], ys: Sequence[float]) -> RankCorrelation | None:
    """Return Spearman's rank correlation; None with fewer than five points, or where all xs or all ys are equal.

    The interval is that of Bonett and Wright (2000): Fisher's z with variance (1 + rho^2 / 2) / (n - 3).
    """
    n = len(xs)
    if n < MIN_POINTS or len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    rho = float(spearmanr(xs, ys).statistic)
    if abs(rho) >= 1 - 1e-12:
        return RankCorrelation(rho, rho, rho, n)
    half = norm.ppf(0.975) * sqrt((1 + rho**2 / 2) / (n - 3))
    return RankCorrelation(rho, tanh(atanh(rho) - half), tanh(atanh(rho) + half), n)
