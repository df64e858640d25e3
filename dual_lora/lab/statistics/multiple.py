"""Corrections for many comparisons."""

from collections.abc import Sequence

from statsmodels.stats.multitest import multipletests


def adjust_holm(pvalues: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted for their number by Holm's method; None stays None and does not count."""
    known = [p for p in pvalues if p is not None]
    adjusted = iter(multipletests(known, method="holm")[1] if known else ())
    return [None if p is None else float(next(adjusted)) for p in pvalues]
