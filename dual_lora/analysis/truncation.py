"""A weight update cut to a lower rank: the closest matrix of rank k, by the singular value decomposition.

    dW = U diag(s) V^T,    dW_k = sum over i <= k of s_i u_i v_i^T        (Eckart and Young 1936)

A score that survives the cut did not need the rest of the update's rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .entries import check_matrices


@dataclass(frozen=True)
class Decomposition:
    """left: out x n, the columns u_i; values: n, descending; right: n x in, the rows v_i; n = min(out, in)."""

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def compute(cls, dW: Tensor) -> "Decomposition":
        """Decompose dW, out x in, in float64: rounding must not look like rank.

        Raises:
            ValueError: dW is not a finite matrix.
        """
        check_matrices(dW=dW)
        return cls(*torch.linalg.svd(dW.detach().double(), full_matrices=False))

    def truncate(self, rank: int) -> Tensor:
        """Return dW_k for k = rank, out x in, float32; from n on it is dW up to rounding."""
        return (self.left[:, :rank] * self.values[:rank] @ self.right[:rank]).float()

    def compute_kept_share(self, rank: int) -> float:
        """Return ||dW_k||_F^2 / ||dW||_F^2; 1 where dW is 0."""
        energy = self.values.square()
        return (energy[:rank].sum() / energy.sum()).item() if energy.any() else 1.0

    @property
    def numerical_rank(self) -> int:
        """How many singular values differ from 0 by more than float32 rounding, counted as `compute_ranks` does."""
        size = max(self.left.shape[0], self.right.shape[1])
        return int((self.values > self.values.max() * size * torch.finfo(torch.float32).eps).sum())


def list_cut_ranks(numerical_rank: int) -> list[int]:
    """Return 0, the powers of two below a numerical rank, and that rank itself."""
    powers = [2**i for i in range(max(numerical_rank - 1, 0).bit_length())]
    return sorted({0, *powers, numerical_rank})
