"""Rank correlation with an interval and a permutation test, for a few points."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import atanh, sqrt, tanh

import numpy as np
from scipy.stats import norm, permutation_test, rankdata, zscore

MIN_POINTS = 5
PERMUTATIONS = 9999  # as many at most; of up to seven points every one is taken


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho of N points, its 95 % interval and the two-sided p of no correlation. Both take the points
    for independent. A rho of 1 or -1 has no interval: that of few points would seem to be certain."""

    rho: float
    low: float | None
    high: float | None
    p: float
    points: int


def correlate_ranks(xs: Sequence[float], ys: Sequence[float], tolerance: float = 0.0) -> RankCorrelation | None:
    """Return Spearman's rank correlation; None with fewer than five points, or where all xs or all ys are equal.

    The interval is that of Bonett and Wright (2000): Fisher's z with variance (1 + rho^2 / 2) / (n - 3), which is rough
    for so few points. p is that of a permutation test.

    tolerance: the relative error of the xs. Those that differ by no more are tied, as their order is chance.
    """
    n, ranks = len(xs), rank_with_ties(xs, tolerance)
    if n < MIN_POINTS or len(set(ranks)) == 1 or len(set(ys)) == 1:
        return None
    xs_N, ys_N = zscore(rankdata(ranks)), zscore(rankdata(ys))
    rho = float(np.mean(xs_N * ys_N))
    test = permutation_test(
        (xs_N,),
        lambda permuted, axis: np.mean(permuted * ys_N, axis=axis),
        permutation_type="pairings",
        n_resamples=PERMUTATIONS,
        rng=0,
    )
    p = float(test.pvalue)
    if abs(rho) >= 1 - 1e-12:
        return RankCorrelation(rho, None, None, p, n)
    half = norm.ppf(0.975) * sqrt((1 + rho**2 / 2) / (n - 3))
    return RankCorrelation(rho, tanh(atanh(rho) - half), tanh(atanh(rho) + half), p, n)


def rank_with_ties(values: Sequence[float], tolerance: float) -> list[int]:
    """Return the place of each value in ascending order, the same for values that differ from the next lower one by no
    more than a relative tolerance."""
    ranks, last = {}, None
    for value in sorted(values):
        ranks[value] = ranks[last] if last is not None and value - last <= tolerance * abs(value) else len(ranks)
        last = value
    return [ranks[value] for value in values]
