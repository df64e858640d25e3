"""The entries of an update: zeros, size, histograms, and similarity to another update.

Shares, ratios and cosines are fractions without a unit. A matrix is out x in.
"""

import torch
from torch import Tensor

from ..functional import DIRECTION_DTYPES, check_choice, multiply_direction, sign_ste

# Bins of half a decade, the same for every model. Bin i holds edges[i - 1] < x <= edges[i]; the first and the last are
# open, so the first bin of a magnitude is its exact zeros, and the bin that ends in 0 has the sign -1.
_DECADES = tuple(10 ** (k / 2) for k in range(-12, 3))
MAGNITUDE_EDGES = (0.0, *_DECADES)
DIRECTION_EDGES = (*(-e for e in reversed(_DECADES)), 0.0, *_DECADES)


def check_matrices(**matrices: Tensor) -> None:
    """Refuse tensors that are not matrices, or matrices of different shapes: torch would broadcast them.

    matrices: by the names that the errors give them.

    Raises:
        ValueError: with the shapes, or where values are NaN or infinite.
    """
    shapes = {name: " x ".join(map(str, matrix.shape)) for name, matrix in matrices.items()}
    if len(set(shapes.values())) > 1 or any(m.ndim != 2 or 0 in m.shape for m in matrices.values()):
        named = ", ".join(f"{name}: {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes {named}: expected matrices of one shape, out x in")
    for name, matrix in matrices.items():
        if not matrix.isfinite().all():
            raise ValueError(f"matrix {name} ({shapes[name]}) contains NaN or Inf")


def compute_zero_share(dW: Tensor) -> float:
    """Return the share of entries of dW: out x in that are exactly 0.

    Raises:
        ValueError: dW is not a finite matrix.
    """
    check_matrices(dW=dW)
    return (dW == 0).double().mean().item()


def count_dead_rows(dW: Tensor) -> int:
    """Return how many rows (outputs) of dW: out x in are all 0.

    Raises:
        ValueError: dW is not a finite matrix.
    """
    check_matrices(dW=dW)
    return int((~dW.bool().any(1)).sum())


def compute_relative_size(dW: Tensor, W0: Tensor) -> float | None:
    """Return ||dW||_F / ||W0||_F, both out x in; None where W0 is 0.

    Raises:
        ValueError: they are not finite matrices of one shape.
    """
    check_matrices(dW=dW, W0=W0)
    return _ratio(dW.double().norm(), W0.double().norm())


def count_by_bin(x: Tensor, edges: tuple[float, ...]) -> list[int]:
    """Return how many entries of x, of any shape, are in each of len(edges) + 1 bins.

    Bin i holds edges[i - 1] < x <= edges[i].

    Raises:
        ValueError: an entry is NaN, which belongs to no bin.
    """
    if x.isnan().any():
        raise ValueError("an entry is NaN, which belongs to no bin")
    x = x if x.is_floating_point() else x.double()  # else the edges would be rounded to integers
    bounds = torch.tensor(edges, dtype=x.dtype, device=x.device)
    return torch.bincount(torch.bucketize(x.flatten(), bounds), minlength=len(edges) + 1).tolist()


@torch.no_grad()
def compute_flipped_share(C: Tensor, D: Tensor, C0: Tensor, D0: Tensor, direction_dtype: str = "float32") -> float:
    """Return the share of entries whose Sign(D C) differs from Sign(D0 C0); C, C0: r2 x in, D, D0: out x r2, taken in
    float32; direction_dtype as in `delta_weight`.

    Raises:
        ValueError: unknown direction_dtype, or the products are not finite matrices of one shape.
    """
    check_choice("direction_dtype", direction_dtype, DIRECTION_DTYPES)
    now, before = (multiply_direction(d.float(), c.float(), direction_dtype) for d, c in ((D, C), (D0, C0)))
    check_matrices(**{"D C": now, "D0 C0": before})
    return (sign_ste(now) != sign_ste(before)).double().mean().item()


def compare_updates(a: Tensor, b: Tensor) -> dict[str, float | None]:
    """Return how similar two updates of one shape, out x in, are.

    Keys: cosine, of the entries as one vector, None where either update is 0; sign_agreement, the share of equal signs
    among the entries that are 0 in neither (chance: 0.5), None if there are none.

    Raises:
        ValueError: they are not finite matrices of one shape.
    """
    check_matrices(a=a, b=b)
    both = (a != 0) & (b != 0)
    equal = ((a > 0) == (b > 0)) & both
    return {"cosine": compute_cosine(a, b), "sign_agreement": _ratio(equal.sum(), both.sum())}


@torch.no_grad()
def measure_decomposition(W0: Tensor, dW: Tensor) -> dict[str, float]:
    """Return how far an update changes size and direction of the rows (outputs) of a weight; W0, dW: out x in.

    Keys, each a mean over rows w of W0 and w' of W0 + dW: magnitude_change, | ||w'|| - ||w|| |; direction_change,
    1 - cos(w', w). Their correlation over layers tells methods apart (DoRA, arXiv 2402.09353, section 3.2). By rows,
    as DoRA's code takes magnitudes. In float64, since the cosine of two close rows is near 1.

    Raises:
        ValueError: they are not finite matrices of one shape.
    """
    check_matrices(W0=W0, dW=dW)
    before, after = W0.double(), W0.double() + dW.double()
    size = (after.norm(dim=1) - before.norm(dim=1)).abs()
    turn = 1 - torch.nn.functional.cosine_similarity(after, before, dim=1)
    turn = torch.where(dW.bool().any(1), turn, 0.0)  # a row of zeros that stays one has not turned either
    return {"magnitude_change": size.mean().item(), "direction_change": turn.mean().item()}


def compute_cosine(a: Tensor, b: Tensor) -> float | None:
    """Return the cosine between two tensors of one shape, taken as vectors; None where either is 0.

    Raises:
        ValueError: their shapes differ, or values are NaN or infinite.
    """
    check_matrices(a=a.reshape(1, -1), b=b.reshape(1, -1))
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}: expected one shape")
    a, b = a.double(), b.double()
    return _ratio((a * b).sum(), a.norm() * b.norm())


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return (part / whole).item() if whole > 0 else None
