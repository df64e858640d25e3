"""One word for a comparison, by rules that are fixed before the runs.

    better, worse     at least five seeds, p below 0.05, and an interval over examples and seeds that excludes zero. p
                      is the larger of two: the test on the predictions (would other examples say so?) and the t-test
                      on the seeds' differences (would other seeds?). In the planned family Holm's method corrects it.
                      A mean over tasks has only the t-test and its interval
    equivalent        at least five seeds, and both one-sided t-tests reject a difference as large as the margin;
                      corrected likewise
    undecided         neither. The smallest difference that the design could have found says how much that means

A difference may be found and yet lie within the margin. It is then called better or worse, and its interval says how
small it is.
"""

from dual_lora.lab.statistics.compare import Difference
from dual_lora.lab.statistics.seeds import LEVEL, MIN_SEEDS, compute_equivalence_p, compute_seed_test

BETTER, WORSE, EQUIVALENT, UNDECIDED = "better", "worse", "equivalent", "undecided"


def combine_p(difference: Difference) -> float | None:
    """Return the larger p of both tests: a difference is found only where each of them finds it (Berger 1982).

    None where either test has no p.
    """
    over_seeds = compute_seed_test(difference.by_seed).p if difference.by_seed else None
    return None if None in (difference.p, over_seeds) else max(difference.p, over_seeds)


def reach_verdict(
    difference: Difference, p: float | None, p_equivalent: float | None, lower_is_better: bool = False
) -> str:
    """Return the verdict. p, p_equivalent: of `combine_p` and `find_equivalence_p`, or corrected; None: unknown."""
    if len(difference.by_seed) < MIN_SEEDS:
        return UNDECIDED
    if p is not None and p < LEVEL and (difference.low > 0 or difference.high < 0):  # of NaN, neither
        return BETTER if (difference.mean > 0) != lower_is_better else WORSE
    return EQUIVALENT if p_equivalent is not None and p_equivalent < LEVEL else UNDECIDED


def find_equivalence_p(difference: Difference, margin: float | None) -> float | None:
    """Return the p of equivalence within a margin, in the difference's unit; None without a margin or several seeds."""
    return compute_equivalence_p(difference.by_seed, margin) if margin and difference.by_seed else None
