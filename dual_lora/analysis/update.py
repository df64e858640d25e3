"""The numbers of one update: of its two groups, where it is Dual LoRA's, and of dW itself.

    dW = scale * ReLU(B A) ⊙ Sign(D C)        A: r1 x in, B: out x r1, C: r2 x in, D: out x r2

Source: arXiv 2512.03402, method section; its Figure 3 shows the numerical ranks of the three.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..functional import (
    DIRECTION_DTYPES,
    DIRECTIONS,
    MAGNITUDES,
    check_choice,
    check_factors,
    multiply_direction,
    sign_ste,
)
from .entries import (
    DIRECTION_EDGES,
    MAGNITUDE_EDGES,
    compute_relative_size,
    compute_zero_share,
    count_by_bin,
    count_dead_rows,
)
from .spectrum import compute_ranks


@torch.no_grad()
def measure_groups(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    magnitude: str = "relu",
    direction: str = "sign",
    direction_dtype: str = "float32",
) -> dict:
    """Return ranks and histograms of the two groups; one matrix is held at a time.

    A: r1 x in, B: out x r1, C: r2 x in, D: out x r2, taken in float32; magnitude, direction and direction_dtype as in
    `delta_weight`.
    Keys: magnitude_* and direction_* as in `compute_ranks`, magnitude_histogram of magnitude(B A) over MAGNITUDE_EDGES,
    direction_histogram of D C, before its sign, over DIRECTION_EDGES.

    Raises:
        ValueError: unknown magnitude, direction or direction_dtype, or products that are not finite matrices of one
            shape.
    """
    check_choice("magnitude", magnitude, MAGNITUDES)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("direction_dtype", direction_dtype, DIRECTION_DTYPES)
    A, B, C, D = (t.float() for t in (A, B, C, D))
    check_factors(A, B, C, D)
    activate = sign_ste if direction == "sign" else DIRECTIONS[direction]
    sizes = _measure_group("magnitude", MAGNITUDES[magnitude](B @ A), lambda size: size, MAGNITUDE_EDGES)
    return sizes | _measure_group("direction", multiply_direction(D, C, direction_dtype), activate, DIRECTION_EDGES)


def _measure_group(name: str, entries: Tensor, activate: Callable[[Tensor], Tensor], edges: tuple[float, ...]) -> dict:
    counts, ranks = count_by_bin(entries, edges), compute_ranks(activate(entries))
    return {f"{name}_{key}": value for key, value in ranks.items()} | {f"{name}_histogram": counts}


@torch.no_grad()
def measure_overall(dW: Tensor, W0: Tensor | None) -> dict[str, float | None]:
    """Return the numbers of dW itself. dW, W0: out x in.

    Keys: overall_* as in `compute_ranks`; zeros, the share of entries that are 0; dead_rows, how many; relative_size,
    ||dW||_F / ||W0||_F, None without W0.

    Raises:
        ValueError: they are not finite matrices of one shape.
    """
    ranks = {f"overall_{key}": value for key, value in compute_ranks(dW).items()}
    size = None if W0 is None else compute_relative_size(dW, W0)
    return ranks | {"zeros": compute_zero_share(dW), "dead_rows": count_dead_rows(dW), "relative_size": size}
