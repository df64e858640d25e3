"""The largest eigenvalue of the Hessian of a loss, by the Lanczos method on Hessian-vector products.

    H = d^2 L / d theta^2;    with learning rates lr * m_i:  sqrt(m) H sqrt(m), whose largest eigenvalue bounds lr

Gradient descent with one rate is stable near a minimum while lr < 2 / lambda. Where parameters have rates of their own,
a change of variables theta_i = sqrt(m_i) u_i gives them one. Sign's straight-through gradient counts as a gradient: H
is the Hessian of the map in which each sign is replaced by a line of slope 1 through its value.

Whether lambda predicts the best rate of LoRA and its variants is the question of arXiv 2602.04998.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

# Vectors that the Lanczos method keeps; its default of 20 costs gigabytes with all weights of a model.
KEPT_VECTORS = 12
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Curvature:
    """The curvature of a loss at one point.

    Attributes:
        eigenvalue: the largest by value, which may be smaller in size than a negative one; gradient descent is stable
            for learning rates below 2 / eigenvalue.
        products: how many Hessian-vector products it took.
        loss: the loss at that point.
    """

    eigenvalue: float
    products: int
    loss: float


def compute_curvature(
    loss_of: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    multipliers: Sequence[float] | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Curvature:
    """Return the largest Hessian eigenvalue of a loss.

    loss_of: returns the loss, a scalar that can be differentiated twice; it is called once. parameters: of any shapes,
    at least two numbers in all; the loss need not depend on all. multipliers: m of each parameter, None: all 1.
    tolerance: relative error of the eigenvalue. seed: of the start vector.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: the eigenvalue was not found.
        ValueError: the loss is NaN or infinite.
    """
    roots = [m**0.5 for m in multipliers or [1.0] * len(parameters)]
    sizes, loss = [p.numel() for p in parameters], loss_of()
    if not loss.isfinite():
        raise ValueError(f"loss_of() returned {loss.item()}; the curvature needs a finite loss")
    grads = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    products, is_zero = 0, True

    def multiply(vector: np.ndarray) -> np.ndarray:
        nonlocal products, is_zero
        products += 1
        parts = torch.from_numpy(vector.reshape(-1)).to(loss.dtype).split(sizes)
        directions = [(part.view_as(p) * root).to(p) for part, p, root in zip(parts, parameters, roots, strict=True)]
        along = sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g.requires_grad)
        found = torch.autograd.grad(along, parameters, retain_graph=True, materialize_grads=True)
        product = torch.cat([(h * root).flatten() for h, root in zip(found, roots, strict=True)])
        is_zero = is_zero and not product.any()
        return product.cpu().numpy()

    size = sum(sizes)
    if not any(g.requires_grad for g in grads):  # a linear loss
        return Curvature(0.0, 0, loss.item())
    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float32)
    first = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    kept = min(size, KEPT_VECTORS)
    try:
        (value,) = eigsh(operator, k=1, which="LA", v0=first, ncv=kept, tol=tolerance, return_eigenvectors=False)
    except ArpackError:
        if not is_zero:
            raise
        value = 0.0  # H itself is 0, which ARPACK refuses
    return Curvature(float(value), products, loss.item())
