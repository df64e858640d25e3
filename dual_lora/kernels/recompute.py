"""The adapted linear map as one autograd function that keeps its input and the factors and rebuilds dW in backward.

With M = B A, S = D C and dW = scale * ReLU(M) ⊙ Sign(S) (arXiv 2512.03402, method section), y = x (W0 + dW)^T has

    dL/dx = g (W0 + dW),  G = g^T x,  dL/dM = scale * Sign(S) [M > 0] G,  dL/dSign = scale * ReLU(M) G

for g = dL/dy. Plain autograd keeps M, S, ReLU(M) and Sign(S), each out x in, until backward. This keeps none of them:
its temporary matrices are bounded by BLOCK, and elementwise work stays in a CPU's cache, TILE entries at a time.

In units of 2 N out in operations for N rows of x, one step takes 3 + 4 (r1 + r2) / N: forward, dL/dx, G, and the four
thin products twice. Where the products are taken in 16 bits, rounding W0 + dW would lose dW, so forward adds x W0^T and
x dW^T, 4 units; dL/dx takes the rounded sum, whose error is the rounding of W0 itself.

Backward can take G, and dL/dx, in a narrower type than the activations' (`GradientTypes`): the factors of a product are
rounded, its sums are float32, and forward, M, S and the masks stay as they are. This is not in the paper.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..functional import CLIPPED, check_ste, suspend_autocast, take_sign_

# Entries of an out x in matrix that are held temporarily (64 MB of float32), and that a CPU works on at once.
BLOCK = 2**24
TILE = 2**18

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


class GradientTypes(NamedTuple):
    """The types in which backward takes its two full-size products; None, or a type no narrower than the activations',
    takes them in the activations' own.

    weight: of G = g^T x, out x in. input: of dL/dx = g (W0 + dW), N x in.
    """

    weight: torch.dtype | None = None
    input: torch.dtype | None = None


class Ops(NamedTuple):
    """The two operations on an out x in matrix that an implementation provides: `rebuild` and `project` below."""

    rebuild: Callable[..., Tensor]
    project: Callable[..., Factors]


def dual_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    scale: Tensor,
    ste: str = "clip",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    ops: Ops | None = None,
    gradient_types: GradientTypes | None = None,
    dW: Tensor | None = None,
) -> Tensor:
    """Return x (weight + dW)^T + bias, or x dW^T without a weight: ... x in -> ... x out, in x's dtype.

    A: r1 x in, B: out x r1, C: r2 x in, D: out x r2, all float32 or all float64; scale: 0-dim, a constant, as are
    weight, out x in, and bias, out. ops: None for plain torch. dW: what `rebuild` gave for these factors and this
    scale, if the caller has it; it is read instead of rebuilt, to the same bits. Inside a transform of torch.func, in
    forward mode, in torch.export, and where gradients are differentiated again or batched, plain autograd computes it,
    which keeps matrices of out x in and takes both products in x's dtype.

    Raises:
        ValueError: unknown ste.
    """
    check_ste(ste)
    if _needs_autograd():
        return _compute_by_autograd(x, functional.delta_weight(A, B, C, D, scale, ste=ste), weight, bias)
    types = gradient_types or GradientTypes()
    dW = None if ste == "hardtanh" else dW  # hardtanh's mask needs D C itself, not only its sign
    return _DualLinear.apply(x, A, B, C, D, scale, ste, weight, bias, ops or TORCH, types, dW)


def delta_weight(
    A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor, ste: str = "clip", ops: Ops | None = None
) -> Tensor:
    """Return dW, out x in, like `dual_lora.functional.delta_weight`, but keep only the factors.

    Shapes, and where plain autograd computes it, as in `dual_linear`.

    Raises:
        ValueError: unknown ste.
    """
    check_ste(ste)
    if _needs_autograd():
        return functional.delta_weight(A, B, C, D, scale, ste=ste)
    return _DeltaWeight.apply(A, B, C, D, scale, ste, ops or TORCH)


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
    """Return weight + dW, or dW without a weight; out x in, rounded once to dtype (None: the factors') or into `out`.

    Zeros of dW keep the sign of D C (+0 or -0), so dW alone determines everything backward needs.

    Shapes as in `dual_linear`; weight and out: out x in. dW: an earlier result without a weight, to be read instead.
    """
    # |scale| goes into B, where it costs out x r1 products, and its sign into Sign(S): ReLU must see B A itself.
    abs_scale, sign = scale.abs(), _get_scale_sign(scale)
    W = A.new_empty(B.shape[0], A.shape[1], dtype=dtype or A.dtype) if out is None else out
    with suspend_autocast(A.device.type):
        for rows, (M, S) in _iterate_tiles(W, A.dtype, scratch=2):
            if dW is None:
                torch.mm(B[rows] * abs_scale, A, out=M).relu_()
                take_sign_(torch.mm(D[rows], C, out=S), sign)
            else:
                _split_update(dW[rows], M, S)
            _add_product(weight, rows, M, S, out=W[rows])
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
    """Return dL/dA, dL/dB, dL/dC, dL/dD for G = dL/ddW, out x in, of any floating dtype; each shaped like its factor.

    rebuilt: if given, it is filled in the same pass with weight + dW (with dW alone if there is no weight). It may be G
    itself. dW: as in `rebuild`, but not with ste="hardtanh".
    """
    abs_scale, sign = scale.abs(), _get_scale_sign(scale)
    dA, dB, dC, dD = torch.zeros_like(A), torch.empty_like(B), torch.zeros_like(C), torch.empty_like(D)
    with suspend_autocast(A.device.type):
        for rows, (M, S, P, *own) in _iterate_tiles(G, A.dtype, scratch=3 if G.dtype == A.dtype else 4):
            scaled_B = B[rows] * abs_scale
            if dW is None:
                torch.mm(scaled_B, A, out=M)
                torch.mm(D[rows], C, out=S)
            else:
                _split_update(dW[rows], M, S)
            g = own[0].copy_(G[rows]) if own else G[rows]
            passes = S.abs() <= 1 if ste == "hardtanh" else None
            if dW is None:
                take_sign_(S, sign)
            torch.mul(g, S, out=P)  # dL/dM before ReLU's mask: M > 0, applied in place
            torch.ops.aten.threshold_backward.grad_input(P, M, 0, grad_input=P)
            torch.mm(P, A.T, out=dB[rows])
            torch.addmm(dA, scaled_B.T, P, out=dA)
            Q = torch.mul(g, M.relu_(), out=P)
            if ste == "clip":
                CLIPPED.count(Q)
                Q.clamp_(-1, 1)
            elif ste == "hardtanh":
                Q.mul_(passes)
            torch.mm(Q, C.T, out=dD[rows])
            torch.addmm(dC, D[rows].T, Q, out=dC)
            if rebuilt is not None:
                _add_product(weight, rows, M, S, out=rebuilt[rows])
    return dA, dB.mul_(abs_scale), dC.mul_(sign), dD.mul_(sign)


TORCH = Ops(rebuild, project)


class _DualLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, C, D, scale, ste, weight, bias, ops, gradient_types, dW):
        ctx.save_for_backward(x, A, B, C, D, scale, weight, dW)
        ctx.ste, ctx.ops, ctx.types = ste, ops, [_choose_narrower(x.dtype, dtype) for dtype in gradient_types]
        # In 16 bits the sum weight + dW would be rounded to the weight's own precision, and most of dW lost.
        apart = weight is not None and x.dtype != A.dtype
        flat = x.reshape(-1, x.shape[-1])
        # A model may write into the result in place, which autograd refuses where a custom function returns a view.
        result = x.new_empty(*x.shape[:-1], B.shape[0])
        y = result.view(-1, B.shape[0])
        with suspend_autocast(x.device.type):
            for rows in _iterate_blocks(B.shape[0], A.shape[1]):
                base = None if weight is None else weight[rows]
                known = None if dW is None else dW[rows]
                W = ops.rebuild(A, B[rows], C, D[rows], scale, None if apart else base, x.dtype, dW=known)
                _apply_linear(flat, W, bias, rows, out=y[:, rows])
                if apart:
                    torch.addmm(y[:, rows], flat, base.to(x.dtype).T, out=y[:, rows])
        return result

    @staticmethod
    def backward(ctx, grad):
        x, A, B, C, D, scale, weight, dW = ctx.saved_tensors
        if _is_transformed(grad):

            def compute(x, *factors):
                return _compute_by_autograd(x, functional.delta_weight(*factors, scale, ste=ctx.ste), weight, None)

            return *_differentiate(compute, (x, A, B, C, D), grad), *[None] * 7
        flat, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        needs_dx, trained = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
        weight_type, input_type = ctx.types
        x_G, g_G = (flat.to(weight_type), g.to(weight_type)) if trained else (None, None)
        g_dx = (g_G if trained and input_type == weight_type else g.to(input_type)) if needs_dx else None
        dx = torch.empty_like(flat) if needs_dx else None
        dA, dB, dC, dD = grads = [torch.zeros_like(t) if trained else None for t in (A, B, C, D)]
        with suspend_autocast(x.device.type):
            for rows in _iterate_blocks(B.shape[0], A.shape[1]):
                factors = A, B[rows], C, D[rows], scale
                base, known = (None if full is None else full[rows] for full in (weight, dW))
                if trained:
                    # G = dL/ddW; `project` turns it into weight + dW on its way, so that dL/dx needs no second pass
                    # over a matrix of this size.
                    G = g_G[:, rows].T @ x_G
                    W = G if input_type == weight_type else torch.empty_like(G, dtype=input_type)
                    part = ctx.ops.project(G, *factors, ctx.ste, base, rebuilt=W if needs_dx else None, dW=known)
                    for total, piece in zip((dA, dB[rows], dC, dD[rows]), part, strict=True):
                        total += piece
                else:
                    W = ctx.ops.rebuild(*factors, base, input_type, dW=known)
                if needs_dx:
                    _add_rows(g_dx[:, rows], W, first=rows.start == 0, out=dx)
        return (dx.view(x.shape) if needs_dx else None), *grads, None, None, None, None, None, None, None


class _DeltaWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A, B, C, D, scale, ste, ops):
        ctx.save_for_backward(A, B, C, D, scale)
        ctx.ste, ctx.ops = ste, ops
        return ops.rebuild(A, B, C, D, scale)

    @staticmethod
    def backward(ctx, grad):
        *factors, scale = ctx.saved_tensors
        if _is_transformed(grad):
            found = _differentiate(lambda *own: functional.delta_weight(*own, scale, ste=ctx.ste), factors, grad)
        else:
            found = ctx.ops.project(grad, *factors, scale, ctx.ste)
        return *found, None, None, None


def _is_transformed(grad: Tensor) -> bool:
    """Return whether what backward computes from this is itself differentiated (`create_graph=True`) or batched
    (`is_grads_batched=True`), which only plain operations can be. Compiled, it is neither."""
    if torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or batched or functional.is_transformed()


def _differentiate(compute: Callable[..., Tensor], inputs: Iterable[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Return the gradients of compute(*inputs) at those inputs that require one, given its own, by plain autograd."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [t.view_as(t) for t in inputs]  # so that what one input owes to another is not counted here
        wanted = [t for t in own if t.requires_grad]
        found = iter(torch.autograd.grad(compute(*own), wanted, grad, create_graph=again))
    return [next(found) if t.requires_grad else None for t in own]


def _needs_autograd() -> bool:
    """Return whether only plain operations can serve here: inside a transform of torch.func or forward-mode
    differentiation, in torch.export, which unlike Dynamo looks into our functions, or where torch.jit.trace records
    them without gradients, to be saved."""
    if functional.is_traced_without_gradient():
        return True
    if torch.compiler.is_compiling():
        return not torch.compiler.is_dynamo_compiling()
    return functional.is_transformed()


def _compute_by_autograd(x: Tensor, dW: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return what `dual_linear` does, given dW, out x in."""
    with suspend_autocast(x.device.type):
        if weight is not None and x.dtype == dW.dtype:
            return F.linear(x, weight + dW, bias)
        term = F.linear(x, dW.to(x.dtype))
        if weight is None:
            return term
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) + term


def _iterate_blocks(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of the rows of a matrix, of about BLOCK entries each."""
    return _iterate_slices(rows, _count_rows(BLOCK, width))


def _iterate_tiles(matrix: Tensor, dtype: torch.dtype, scratch: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield slices of the rows of a matrix: of about TILE entries on a CPU, or all rows where the device or compiler
    does the tiling. With each slice comes the requested number of uninitialized matrices of its shape. All tiles
    share their memory, since fresh memory costs a CPU page faults."""
    small = matrix.device.type == "cpu" and not torch.compiler.is_compiling()
    rows, width = matrix.shape
    tile_rows = min(rows, _count_rows(TILE, width)) if small else rows
    room = [matrix.new_empty(tile_rows, width, dtype=dtype) for _ in range(scratch)]
    for part in _iterate_slices(rows, tile_rows):
        yield part, [piece[: part.stop - part.start] for piece in room]


def _count_rows(entries: int, width: int) -> int:
    """Return how many rows of this width hold about `entries` entries. The width is 0 in an embedding without ids."""
    return max(1, entries // max(1, width))


def _iterate_slices(rows: int, step: int) -> Iterator[slice]:
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _get_scale_sign(scale: Tensor) -> Tensor:
    one = torch.ones_like(scale)
    return torch.where(scale < 0, -one, one)


def _split_update(dW: Tensor, M: Tensor, S: Tensor) -> None:
    """Write |scale| ReLU(B A) into M and Sign(scale) Sign(D C) into S: the size and the sign of dW."""
    torch.abs(dW, out=M)
    torch.copysign(torch.ones((), dtype=S.dtype, device=S.device), dW, out=S)


def _add_product(weight: Tensor | None, rows: slice, M: Tensor, S: Tensor, out: Tensor) -> None:
    if weight is None:
        torch.mul(M, S, out=out)
    else:
        torch.addcmul(weight[rows].to(M.dtype), M, S, out=out)


def _choose_narrower(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return own if asked is None or asked.itemsize >= own.itemsize else asked


def _add_rows(g: Tensor, W: Tensor, first: bool, out: Tensor) -> None:
    """Add g W to out, or write it there. Blocks are summed in out's type, whatever the product's."""
    if g.dtype != out.dtype:
        product = g @ W
        out.copy_(product) if first else out.add_(product)
    elif first:
        torch.mm(g, W, out=out)
    else:
        torch.addmm(out, g, W, out=out)


def _apply_linear(x: Tensor, W: Tensor, bias: Tensor | None, rows: slice, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, W.T, out=out)
    else:
        torch.addmm(bias[rows].to(x.dtype), x, W.T, out=out)
