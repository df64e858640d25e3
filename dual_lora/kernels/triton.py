"""`rebuild` and `project` of `recompute` as Triton kernels: one pass over the out x in matrix, nothing of that size
except what is read and written.

M = B A and S = D C are made tile by tile in registers, in IEEE float32 (TF32 would flip signs). The two gradients of
the out-side factors come from one sweep along the rows of G, those of the in-side factors from the same kernel on the
transposed problem, so that no sum depends on the order in which programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import recompute
from .recompute import Factors, Ops

ROWS, COLUMNS = 32, 64
MAX_RANK = 64  # of a group; tiles of more need more shared memory than all cards since Turing have (64 KiB)
MAX_PIPELINED_RANK = 32  # above it, tiles that are loaded ahead would need more
STE = {"clip": 0, "identity": 1, "hardtanh": 2}


@triton.jit
def _load(start, rows, columns, n_rows, n_columns, row_stride, column_stride):
    """Load the tile rows x columns of a matrix with these strides, 0 beyond its edge, in float32."""
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    at = start + rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _turn(size, S):
    """Return size * Sign(S), NaN where S is."""
    return tl.where(S > 0, size, tl.where(S <= 0, -size, S))


@triton.jit
def _rebuild(
    A, B, C, D, scale, weight, W, n_out, n_in, r1, r2,
    weight_row, weight_column, a_row, a_column, b_row, b_column, c_row, c_column, d_row, d_column,
    HAS_WEIGHT: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k1, k2 = tl.arange(0, R1), tl.arange(0, R2)
    b = _load(B, rows, k1, n_out, r1, b_row, b_column)
    a = _load(A, k1, columns, r1, n_in, a_row, a_column)
    d = _load(D, rows, k2, n_out, r2, d_row, d_column)
    c = _load(C, k2, columns, r2, n_in, c_row, c_column)
    M = tl.dot(b, a, input_precision="ieee")
    S = tl.dot(d, c, input_precision="ieee")
    size = tl.load(scale) * tl.where(M <= 0, 0.0, M)  # not tl.maximum, which turns NaN into 0
    out = _turn(size, S)
    if HAS_WEIGHT:
        out += _load(weight, rows, columns, n_out, n_in, weight_row, weight_column)
    inside = (rows[:, None] < n_out) & (columns[None, :] < n_in)
    at = W + rows[:, None].to(tl.int64) * n_in + columns[None, :]
    tl.store(at, out.to(W.dtype.element_ty), mask=inside)


@triton.jit
def _project(
    G, A, B, C, D, scale, dB, dD, n_out, n_in, r1, r2,
    g_row, g_column, a_row, a_column, b_row, b_column, c_row, c_column, d_row, d_column,
    STE: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k1, k2 = tl.arange(0, R1), tl.arange(0, R2)
    s = tl.load(scale)
    b = _load(B, rows, k1, n_out, r1, b_row, b_column)
    d = _load(D, rows, k2, n_out, r2, d_row, d_column)
    sum_b = tl.zeros((ROWS, R1), tl.float32)
    sum_d = tl.zeros((ROWS, R2), tl.float32)
    for start in range(0, n_in, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        a = _load(A, k1, columns, r1, n_in, a_row, a_column)
        c = _load(C, k2, columns, r2, n_in, c_row, c_column)
        g = s * _load(G, rows, columns, n_out, n_in, g_row, g_column)
        M = tl.dot(b, a, input_precision="ieee")
        S = tl.dot(d, c, input_precision="ieee")
        P = tl.where(M <= 0, 0.0, _turn(g, S))
        Q = g * tl.where(M <= 0, 0.0, M)
        if STE == 0:
            Q = tl.where(Q > 1, 1.0, tl.where(Q < -1, -1.0, Q))
        if STE == 2:
            Q = Q * (tl.abs(S) <= 1).to(tl.float32)
        sum_b = tl.dot(P, tl.trans(a), sum_b, input_precision="ieee")
        sum_d = tl.dot(Q, tl.trans(c), sum_d, input_precision="ieee")
    edge = rows[:, None] < n_out
    tl.store(dB + rows[:, None] * r1 + k1[None, :], sum_b, mask=edge & (k1[None, :] < r1))
    tl.store(dD + rows[:, None] * r2 + k2[None, :], sum_d, mask=edge & (k2[None, :] < r2))


def _pad_rank(r: int) -> int:
    """Return a rank padded to the inner size of a product: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(r))


def _count_stages(r1: int, r2: int) -> int:
    """Return how many tiles the compiler may have on their way at once; 3 is its default."""
    return 3 if max(r1, r2) <= MAX_PIPELINED_RANK else 1


def _list_strides(*matrices: Tensor) -> list[int]:
    return [stride for matrix in matrices for stride in matrix.stride()]


def fits_shared_memory(A: Tensor, C: Tensor) -> bool:
    """Return whether tiles of these ranks fit in shared memory and the dtype is the kernels'.

    A: (leading dimensions x) r1 x in, C: (leading dimensions x) r2 x in.
    """
    return A.dtype == torch.float32 and max(A.shape[-2], C.shape[-2]) <= MAX_RANK


def rebuild(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    dW: Tensor | None = None,
) -> Tensor:
    """As `recompute.rebuild`; float64 factors, ranks above `MAX_RANK` and a known dW are left to it."""
    if dW is not None or not fits_shared_memory(A, C):
        return recompute.rebuild(A, B, C, D, scale, weight, dtype, out, dW)
    n_out, n_in = B.shape[0], A.shape[1]
    W = A.new_empty(n_out, n_in, dtype=dtype or A.dtype) if out is None else out
    kept = A if weight is None else weight
    grid = triton.cdiv(n_out, ROWS), triton.cdiv(n_in, COLUMNS)
    with torch.cuda.device_of(A):
        _rebuild[grid](
            A, B, C, D, scale, kept, W, n_out, n_in, A.shape[0], C.shape[0], *_list_strides(kept, A, B, C, D),
            HAS_WEIGHT=weight is not None, R1=_pad_rank(A.shape[0]), R2=_pad_rank(C.shape[0]),
            ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return W


def project(
    G: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    scale: Tensor,
    ste: str,
    weight: Tensor | None = None,
    rebuilt: Tensor | None = None,
    dW: Tensor | None = None,
) -> Factors:
    """As `recompute.project`; float64 factors, ranks above `MAX_RANK` and a known dW are left to it."""
    if dW is not None or not fits_shared_memory(A, C):
        return recompute.project(G, A, B, C, D, scale, ste, weight, rebuilt, dW)
    dB, dD = _project_out_side(G, A, B, C, D, scale, ste)
    dAt, dCt = _project_out_side(G.T, B.T, A.T, D.T, C.T, scale, ste)
    if rebuilt is not None:
        rebuild(A, B, C, D, scale, weight, out=rebuilt)
    return dAt.T, dB, dCt.T, dD


def _project_out_side(G, A, B, C, D, scale, ste) -> tuple[Tensor, Tensor]:
    """Return dL/dB and dL/dD, shaped like B and D."""
    dB, dD = A.new_empty(B.shape), A.new_empty(D.shape)
    n_out, n_in, r1, r2 = *G.shape, A.shape[0], C.shape[0]
    with torch.cuda.device_of(A):
        _project[triton.cdiv(n_out, ROWS),](
            G, A, B, C, D, scale, dB, dD, n_out, n_in, r1, r2, *_list_strides(G, A, B, C, D),
            STE=STE[ste], R1=_pad_rank(r1), R2=_pad_rank(r2), ROWS=ROWS, COLUMNS=COLUMNS,
            num_stages=_count_stages(r1, r2),
        )  # fmt: skip
    return dB, dD


TRITON = Ops(rebuild, project)
