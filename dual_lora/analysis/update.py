"""The numbers of one update: of its two groups, where it is Dual LoRA's, and of dW itself.

    dW = scale * ReLU(B A) ⊙ Sign(D C)        A: r1 x in, B: out x r1, C: r2 x in, D: out x r2

Source: arXiv 2512.03402, method section; its Figure 3 shows the numerical ranks of the three.
"""

import torch
from torch import Tensor

from ..functional import DIRECTIONS, MAGNITUDES, check_factors, sign_ste
from .entries import DIRECTION_EDGES, MAGNITUDE_EDGES, dead_rows, histogram, relative_size, zeros
from .spectrum import spectrum


@torch.no_grad()
def dual(A: Tensor, B: Tensor, C: Tensor, D: Tensor, magnitude: str = "relu", direction: str = "sign") -> dict:
    """Ranks and histograms of the two groups; one matrix is held at a time.

    A: r1 x in, B: out x r1, C: r2 x in, D: out x r2, taken in float32; magnitude and direction as in `delta_weight`.
    Keys: magnitude_* and direction_* as in `spectrum`, magnitude_histogram of magnitude(B A) over MAGNITUDE_EDGES,
    direction_histogram of D C, before its sign, over DIRECTION_EDGES.

    Raises:
        KeyError: unknown magnitude or direction.
        ValueError: the products are not finite matrices of one shape.
    """
    A, B, C, D = (t.float() for t in (A, B, C, D))
    check_factors(A, B, C, D)
    return _group("magnitude", MAGNITUDES[magnitude](B @ A), lambda size: size, MAGNITUDE_EDGES) | _group(
        "direction", D @ C, sign_ste if direction == "sign" else DIRECTIONS[direction], DIRECTION_EDGES
    )


def _group(name: str, entries: Tensor, then, edges: tuple[float, ...]) -> dict:
    counts = histogram(entries, edges)
    return {f"{name}_{key}": value for key, value in spectrum(then(entries)).items()} | {f"{name}_histogram": counts}


@torch.no_grad()
def overall(dW: Tensor, W0: Tensor | None) -> dict[str, float | None]:
    """Keys: overall_* as in `spectrum`, zeros, dead_rows, relative_size (None without W0); dW, W0: out x in.

    Raises:
        ValueError: they are not finite matrices of one shape.
    """
    ranks = {f"overall_{key}": value for key, value in spectrum(dW).items()}
    size = None if W0 is None else relative_size(dW, W0)
    return ranks | {"zeros": zeros(dW), "dead_rows": dead_rows(dW), "relative_size": size}
