"""Over several tasks and several comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import PermutationMethod, trim_mean, wilcoxon
from statsmodels.stats.multitest import multipletests

from dual_lora.lab.statistics.compare import LEVEL, RESAMPLES


@dataclass(frozen=True)
class TasksTest:
    """Wilcoxon's signed-rank test over tasks, one difference each; `least` is the smallest p so many tasks can give.

    Attributes:
        p: two-sided; tasks without a difference do not count.
        tasks: how many count.
        wins: how many of them are above zero.
        note: that p cannot be below 0.05, where it cannot.
    """

    p: float
    least: float
    tasks: int
    wins: int
    note: str


def test_across_tasks(differences: Mapping[str, float]) -> TasksTest:
    """Return the exact test of whether differences over tasks lie around zero (at random for ties in over 14 tasks)."""
    values = np.array([d for d in differences.values() if d != 0], dtype=float)
    n = len(values)
    least = min(1.0, 2.0 ** (1 - n))
    note = f"with {n} tasks p cannot be below {least:g}" if least >= LEVEL else ""
    equal = len(np.unique(np.abs(values))) < n
    method = PermutationMethod(n_resamples=2**14, rng=np.random.default_rng(0)) if equal else "exact"
    p = float(wilcoxon(values, method=method).pvalue) if n else 1.0
    return TasksTest(p, least, n, int((values > 0).sum()), note)


def adjust_holm(pvalues: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted for their number by Holm's method; None stays None and does not count."""
    known = [p for p in pvalues if p is not None]
    adjusted = iter(multipletests(known, method="holm")[1] if known else ())
    return [None if p is None else float(next(adjusted)) for p in pvalues]


def compute_iqm(
    scores_TS: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float | None, float | None]:
    """Return the mean of the middle half of all scores, and its 95 % interval from seeds redrawn within each task.

    Agarwal et al. 2021, arXiv 2108.13264, section 4.3. There is no interval with one seed.

    Raises:
        ValueError: not a table, or a score is missing.
    """
    scores_TS = np.asarray(scores_TS, dtype=float)
    if scores_TS.ndim != 2 or not scores_TS.size or not np.isfinite(scores_TS).all():
        raise ValueError(f"scores of shape {scores_TS.shape}: one is needed for every task and seed")
    tasks, seeds = scores_TS.shape
    value = float(trim_mean(scores_TS, 0.25, axis=None))
    if seeds == 1:
        return value, None, None
    drawn = np.random.default_rng(seed).integers(seeds, size=(resamples, tasks, seeds))
    redrawn = np.take_along_axis(scores_TS[None], drawn, axis=2).reshape(resamples, -1)
    low, high = np.percentile(trim_mean(redrawn, 0.25, axis=1), (2.5, 97.5))
    return value, float(low), float(high)
