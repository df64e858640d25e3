"""Corrections for many comparisons."""

from collections.abc import Sequence

from statsmodels.stats.multitest import multipletests


def adjust_holm(pvalues: Sequence[float | None], family: int = 0) -> list[float | None]:
    """Return p-values adjusted by Holm's method; None stays None.

    family: how many comparisons were planned. Those that have no p count as p = 1: a study that is half done must not
    be treated as a complete smaller one. Where it is not given, only the known p-values count.
    """
    known = [p for p in pvalues if p is not None]
    missing = [1.0] * max(0, family - len(known))
    adjusted = iter(multipletests([*known, *missing], method="holm")[1] if known else ())
    return [None if p is None else float(next(adjusted)) for p in pvalues]
