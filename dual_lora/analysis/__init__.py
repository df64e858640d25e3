"""What an adapter did to a weight, as plain numbers. What this module exports needs only torch and
`dual_lora.functional`, and so do `truncation` and `memory`, which measures what autograd keeps in a training step.

The others need the extra `analysis` (SciPy and matplotlib): `curvature`, and two studies of what the method's form can
express, which are commands of their own, `python -m dual_lora.analysis.fit` and `python -m dual_lora.analysis.teacher`.
The second adapts small models through PEFT.
"""

from .entries import (
    DIRECTION_EDGES,
    MAGNITUDE_EDGES,
    compare_updates,
    compute_cosine,
    compute_flipped_share,
    compute_relative_size,
    compute_zero_share,
    count_by_bin,
    count_dead_rows,
    measure_decomposition,
)
from .spectrum import TOLERANCES, compute_ranks
from .update import measure_groups, measure_overall

__all__ = [
    "DIRECTION_EDGES",
    "MAGNITUDE_EDGES",
    "TOLERANCES",
    "compare_updates",
    "compute_cosine",
    "compute_flipped_share",
    "compute_ranks",
    "compute_relative_size",
    "compute_zero_share",
    "count_by_bin",
    "count_dead_rows",
    "measure_decomposition",
    "measure_groups",
    "measure_overall",
]
