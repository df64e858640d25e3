"""The rate that a study chooses for a method, and means over seeds with their t-intervals."""

import math
from collections.abc import Iterable, Sequence

from .rows import StudyError, group_rows

CONFIDENCE = 0.95  # of the intervals
# The best rate counts as at the edge of its grid only if it beats its neighbour by more than this.
EDGE = 0.005


def choose_rate(rows: Iterable[dict], criterion: str) -> tuple[float, bool]:
    """Return the learning rate with the least mean of result[criterion] over seeds, and whether it is at an edge.

    At an edge: it is the first or last of the rates and beats its neighbour by more than EDGE, so that a better rate
    may lie outside. A rate at which a seed diverged to NaN is not chosen.

    Raises:
        StudyError: a rate has fewer seeds than another.
    """
    groups = group_rows(sorted(rows, key=lambda row: row["cell"]["rate"]), "rate")
    if len({len(group) for group in groups.values()}) > 1:
        raise StudyError("some rates have fewer seeds than others: run the missing cells first")
    means = {rate: sum(row["result"][criterion] for row in group) / len(group) for (rate,), group in groups.items()}
    means = {rate: math.inf if math.isnan(mean) else mean for rate, mean in means.items()}
    rates, best = list(means), min(means, key=means.get)
    if len(rates) == 1 or best not in (rates[0], rates[-1]):
        return best, False
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return best, means[neighbour] - means[best] > EDGE


def select_rate(rows: Iterable[dict], rate: float) -> list[dict]:
    """Return the rows with a learning rate, by seed."""
    return sorted((row for row in rows if row["cell"]["rate"] == rate), key=lambda row: row["cell"]["seed"])


def estimate_mean(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, low and high: the mean of values, one a seed, and its t-interval, in their unit. With one value,
    low and high are None."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None}
    error = float(stats.sem(values))
    half = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def estimate_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """Return `estimate_mean` of our values minus theirs, both in the same order of seeds."""
    return estimate_mean([one - other for one, other in zip(ours, theirs, strict=True)])
