"""Ranks of a matrix, all from one set of singular values s of W (m x n).

    rank             how many s are above max(s) * max(m, n) * eps, as torch.linalg.matrix_rank counts
    rank_T           how many s are above T * max(s)
    stable rank      ||W||_F^2 / ||W||_2^2 = sum s^2 / max(s)^2
    effective rank   exp(-sum p ln p) with p = s / sum s

Source of the effective rank: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO
2007. A numerical rank near min(m, n) says little alone: random factors have it too.
"""

import torch
from torch import Tensor

from .entries import check_matrices

# Relative to the largest singular value; float32's default is 4.9e-4 at 4096 x 4096.
TOLERANCES = (1e-3, 1e-2, 1e-1)


@torch.no_grad()
def compute_ranks(W: Tensor) -> dict[str, float]:
    """Return the ranks of W: m x n, float32 or float64 (others are taken in float32); all are 0 for a zero matrix.

    Keys: rank, rank_T for each T of TOLERANCES, stable_rank, effective_rank.

    Raises:
        ValueError: W is not one finite matrix. Pass the matrices of a stack one by one.
    """
    check_matrices(W=W)
    W = W if W.dtype == torch.float64 else W.float()
    s = torch.linalg.svdvals(W)
    if not s.isfinite().all():  # their squares overflow in W's dtype
        s = torch.linalg.svdvals(W.double())
    default = max(W.shape) * torch.finfo(W.dtype).eps
    limits = {"rank": default, **{f"rank_{t:g}": t for t in TOLERANCES}}
    ranks = {name: int((s > s.max() * limit).sum()) for name, limit in limits.items()}
    return ranks | _soft_ranks(s.double())


def _soft_ranks(s: Tensor) -> dict[str, float]:
    if not s.any():
        return {"stable_rank": 0.0, "effective_rank": 0.0}
    p = s / s.sum()
    stable, effective = (s / s.max()).square().sum(), torch.special.entr(p).sum().exp()
    return {"stable_rank": stable.item(), "effective_rank": effective.item()}
