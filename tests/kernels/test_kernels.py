"""Every kernel against plain autograd on the readable map, in float64 and float32."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from dual_lora import functional
from dual_lora.kernels import choose_ops, delta_weight, dual_linear, recompute

OUT, IN, R1, R2 = 70, 45, 3, 5
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
KERNELS = ["recompute", pytest.param("triton", marks=needs_triton)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several blocks and several tiles, the last of each cut short."""
    monkeypatch.setattr(recompute, "BLOCK", 32 * IN)
    monkeypatch.setattr(recompute, "TILE", 10 * IN)


def ops(kernel):
    return choose_ops(kernel, torch.device("cpu"))


def drawn(dtype, size=0.7):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    factors = [size * normal(*shape) for shape in ((R1, IN), (OUT, R1), (R2, IN), (OUT, R2))]
    factors[3][7] = 0.0  # a row of exact zeros, whose sign is -1
    return normal(2, 11, IN), factors, normal(OUT, IN) / IN**0.5, normal(OUT), normal(2, 11, OUT)


def gradients(y, g, x, factors, create_graph=False):
    return [y, *torch.autograd.grad(y, [x, *factors], g, create_graph=create_graph)]


def assert_close(found, expected, tolerance):
    for name, a, b in zip(("y", "dx", "dA", "dB", "dC", "dD"), found, expected, strict=False):
        assert a.dtype == b.dtype, name
        assert (a - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [2.5, 0.0, -1.5])
@pytest.mark.parametrize("ste", functional.STRAIGHT_THROUGH)
@pytest.mark.parametrize("with_weight", [True, False])
def test_output_and_every_gradient_are_those_of_autograd(kernel, scale, ste, with_weight):
    dtype, tolerance = (torch.float64, 1e-13) if kernel == "recompute" else (torch.float32, 2e-6)
    x, factors, weight, bias, g = drawn(dtype)
    scale = torch.tensor(scale, dtype=dtype)
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in factors)]
    dW = functional.delta_weight(*factors, scale, ste=ste)
    expected = F.linear(x, weight + dW, bias) if with_weight else F.linear(x, dW)
    plain = {"weight": weight, "bias": bias} if with_weight else {}
    expected = gradients(expected, g, leaves[0], factors)
    for create_graph in (False, True):
        found = dual_linear(x, *factors, scale, ste, **plain, ops=ops(kernel))
        assert_close(gradients(found, g, leaves[0], factors, create_graph), expected, tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
def test_delta_weight_is_that_of_the_readable_map(kernel):
    _, factors, *_ = drawn(torch.float32)
    [t.requires_grad_() for t in factors]
    scale = torch.tensor(1.25)
    expected = functional.delta_weight(*factors, scale)
    found = delta_weight(*factors, scale, ops=ops(kernel))
    assert torch.equal(found.sign(), expected.sign())
    g = torch.randn(OUT, IN)
    pairs = zip(torch.autograd.grad(found, factors, g), torch.autograd.grad(expected, factors, g), strict=True)
    assert all((a - b).norm() <= 2e-6 * b.norm() for a, b in [(found, expected), *pairs])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_transposed_weight_and_strided_gradients(kernel):
    """GPT-2's Conv1D keeps in x out; a sum gives expanded gradients."""
    x, factors, weight, bias, _ = drawn(torch.float32)
    x.requires_grad_()
    [t.requires_grad_() for t in factors]
    scale = torch.tensor(0.5)
    kept = weight.T.contiguous()
    found = dual_linear(x, *factors, scale, weight=kept.T, bias=bias, ops=ops(kernel))
    expected = F.linear(x, weight + functional.delta_weight(*factors, scale), bias)
    ones = torch.ones(()).expand(expected.shape)
    assert_close(gradients(found, ones, x, factors), gradients(expected, ones, x, factors), 3e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_in_16_bits_a_small_update_is_not_lost(kernel):
    """dW a thousandth of W0, below half a unit in the last place of bfloat16."""
    x, factors, weight, _, _ = drawn(torch.float32, size=0.02)
    x, weight, scale = x.bfloat16(), weight.bfloat16(), torch.tensor(1.0)
    dW = functional.delta_weight(*factors, scale)
    scale = 1e-3 * weight.float().norm() / dW.norm()
    term = F.linear(x.double(), (scale * dW).double())
    base = F.linear(x.double(), weight.double())
    found = dual_linear(x, *factors, scale, weight=weight, ops=ops(kernel))
    fused = F.linear(x, (weight + scale * dW).bfloat16())
    apart = base + term
    assert found.dtype == torch.bfloat16
    # Both carry the rounding of the output; only the fused one lacks the update.
    assert ((found.double() - apart).norm() / term.norm()) < ((fused.double() - apart).norm() / term.norm())
    exact = dual_linear(x.float(), *factors, scale, ops=ops(kernel)).double()
    assert (exact - term).norm() < 1e-5 * term.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_16_bit_gradients_are_as_good_as_autograd_in_16_bits(kernel):
    x, factors, weight, _, g = drawn(torch.float32, size=0.1)
    x, weight, g = x.bfloat16().requires_grad_(), weight.bfloat16(), g.bfloat16()
    [t.requires_grad_() for t in factors]
    scale = torch.tensor(1.0)
    exact_dW = functional.delta_weight(*(t.double() for t in factors), scale.double())
    exact = gradients(F.linear(x.double(), weight.double() + exact_dW), g.double(), x, factors)
    eager_dW = functional.delta_weight(*factors, scale).bfloat16()
    eager = gradients(F.linear(x, weight) + F.linear(x, eager_dW), g, x, factors)
    found = gradients(dual_linear(x, *factors, scale, weight=weight, ops=ops(kernel)), g, x, factors)
    for name, a, b, c in zip(("y", "dx", "dA", "dB", "dC", "dD"), found, eager, exact, strict=True):
        error, of_eager = ((t.double() - c.double()).norm() / c.double().norm() for t in (a, b))
        assert error <= 1.5 * of_eager, name


def test_only_what_needs_a_gradient_gets_one():
    x, factors, weight, _, g = drawn(torch.float32)
    scale = torch.tensor(1.0)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(dual_linear(x, *factors, scale, weight=weight), x, g)
    W = weight + functional.delta_weight(*factors, scale)
    assert (dx - g @ W).norm() < 1e-6 * dx.norm()
    factors[0].requires_grad_()
    y = dual_linear(x.detach(), *factors, scale, weight=weight)
    assert torch.autograd.grad(y, factors[0], g)[0].shape == factors[0].shape


def test_unknown_ste_is_refused():
    x, factors, *_ = drawn(torch.float32)
    with pytest.raises(ValueError, match="ste='soft'"):
        dual_linear(x, *factors, torch.tensor(1.0), "soft")


def test_triton_leaves_large_ranks_and_float64_to_torch():
    pytest.importorskip("triton")
    for dtype, rank in ((torch.float64, 4), (torch.float32, 200)):
        A, C = (torch.randn(rank, IN, dtype=dtype) for _ in range(2))
        B, D = (torch.randn(OUT, rank, dtype=dtype) for _ in range(2))
        scale = torch.tensor(1.0, dtype=dtype)
        assert torch.equal(ops("triton").rebuild(A, B, C, D, scale), recompute.rebuild(A, B, C, D, scale))


def test_without_triton_plain_torch_serves(monkeypatch):
    from dual_lora import kernels

    monkeypatch.setattr(kernels, "_has_triton", lambda: False)
    kernels._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="kernel='triton' is unavailable on cpu"):
        assert kernels.choose_ops("triton", torch.device("cpu")) is recompute.TORCH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_weight", [True, False])
def test_inside_torch_func_autograd_takes_over(dtype, with_weight):
    x, factors, weight, bias, _ = drawn(torch.float32)
    x, scale = x.to(dtype), torch.tensor(1.25)
    plain = {"weight": weight.to(dtype), "bias": bias.to(dtype)} if with_weight else {}
    loss = lambda A, row: dual_linear(row, A, *factors[1:], scale, **plain).float().square().sum()  # noqa: E731
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(factors[0], x)
    for row, gradient in zip(x, found, strict=True):
        A = factors[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(A, row), A)
        assert (gradient - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * expected.norm()


def differentiate_twice(y, x, factors):
    """Return the gradients of a loss, and the second derivatives along them."""
    first = torch.autograd.grad(y.square().sum(), [x, *factors], create_graph=True)
    along = sum((g * g.detach()).sum() for g in first)
    return *first, *torch.autograd.grad(along, [x, *factors], retain_graph=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("ste", functional.STRAIGHT_THROUGH)
@pytest.mark.parametrize("with_weight", [True, False])
def test_second_derivatives_are_those_of_autograd(kernel, ste, with_weight):
    """With "clip" where it does not bite: it acts on each use of a sign, and those of second derivatives differ."""
    dtype, tolerance = (torch.float64, 1e-12) if kernel == "recompute" else (torch.float32, 1e-5)
    x, factors, weight, bias, _ = drawn(dtype, size=0.3)
    scale = torch.tensor(1e-3 if ste == "clip" else 0.7, dtype=dtype)
    for leaf in (x, *factors):
        leaf.requires_grad_()
    inputs = 0.1 * torch.tanh(x + factors[0].sum())  # a second way from a factor to the output
    plain = {"weight": 0.1 * weight, "bias": 0.1 * bias} if with_weight else {}
    dW = functional.delta_weight(*factors, scale, ste=ste)
    expected = F.linear(inputs, plain["weight"] + dW, plain["bias"]) if with_weight else F.linear(inputs, dW)
    rebuilt = delta_weight(*factors, scale, ste, ops=ops(kernel)) + 0 * x.sum()
    for y, reference in (
        (dual_linear(inputs, *factors, scale, ste, **plain, ops=ops(kernel)), expected),
        (rebuilt, dW + 0 * x.sum()),
    ):
        pairs = zip(*(differentiate_twice(some, x, factors) for some in (y, reference)), strict=True)
        assert all((a - b).norm() <= tolerance * b.norm() for a, b in pairs)


def test_second_derivatives_are_those_of_finite_differences():
    """Along A, B and x, which move no sign: there the straight-through gradient is the map's own."""
    x, factors, weight, bias, _ = drawn(torch.float64)
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in factors)]
    scale = torch.tensor(0.7, dtype=torch.float64)
    moved = [torch.randn_like(t) if i < 3 else torch.zeros_like(t) for i, t in enumerate(leaves)]

    def differentiate(step, **options):
        own = [(t + step * move).detach().requires_grad_() for t, move in zip(leaves, moved, strict=True)]
        y = dual_linear(*own, scale, "identity", weight, bias)
        return own, torch.autograd.grad(y.sin().sum(), own, **options)

    step = 1e-6
    pairs = zip(differentiate(step)[1], differentiate(-step)[1], strict=True)
    expected = [(after - before) / (2 * step) for after, before in pairs]
    own, first = differentiate(0.0, create_graph=True)
    along = sum((g * move).sum() for g, move in zip(first, moved, strict=True))
    for found, reference in zip(torch.autograd.grad(along, own), expected, strict=True):
        assert (found - reference).norm() <= 1e-6 * reference.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_of_gradients_is_that_of_each(kernel):
    x, factors, weight, bias, g = drawn(torch.float32)
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in factors)]
    y = dual_linear(x, *factors, torch.tensor(0.7), weight=weight, bias=bias, ops=ops(kernel))
    several = torch.stack([g, 0.1 * g, -g])
    found = torch.autograd.grad(y, leaves, several, retain_graph=True, is_grads_batched=True)
    for i, one in enumerate(several):
        expected = torch.autograd.grad(y, leaves, one, retain_graph=True)
        assert all((a[i] - b).norm() <= 1e-5 * b.norm() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kernel", ["eager", *KERNELS])
@pytest.mark.parametrize("ste", functional.STRAIGHT_THROUGH)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["A", "B", "C", "D", "scale", "gradient"])
def test_what_is_not_finite_shows(kernel, ste, value, place):
    _, factors, _, _, _ = drawn(torch.float32)
    tensors = dict(zip("ABCD", factors, strict=True)) | {"scale": torch.tensor(0.7), "gradient": torch.randn(OUT, IN)}
    tensors[place].view(-1)[0] = value
    *inputs, scale, g = tensors.values()
    for factor in inputs:
        factor.requires_grad_()
    plain = functional.delta_weight(*inputs, scale, ste=ste)
    dW = plain if kernel == "eager" else delta_weight(*inputs, scale, ste, ops=ops(kernel))
    grads = torch.autograd.grad(dW, inputs, g, retain_graph=True)
    signs_alone = value != value or place not in "CD"  # an infinite product D C has a sign
    assert not signs_alone or not all(t.isfinite().all() for t in (dW, *grads))
    if value != value and place in "ABCD":
        row = dW[0] if place in "BD" else dW[:, 0]
        assert row.isnan().all() and dW.isnan().sum() == row.numel()
    if place != "scale":  # the kernels multiply by it in another place
        expected = torch.autograd.grad(plain, inputs, g, retain_graph=True)
        pairs = list(zip((dW, *grads), (plain, *expected), strict=True))
        assert all((a.isfinite() <= b.isfinite()).all() for a, b in pairs)
        assert value == value or all(torch.equal(a.isnan(), b.isnan()) for a, b in pairs)
