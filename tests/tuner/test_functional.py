"""The equations against numpy and hand-derived gradients."""

import math

import numpy as np
import pytest
import torch

from dual_lora import delta_weight, init_std, sign_ste
from dual_lora.functional import INIT_RELATIVE_SIZE, SOFTPLUS_BETA

OUT, IN, R1, R2, ALPHA = 7, 5, 2, 3, 11.0
SCALE = 0.6 * ALPHA / math.sqrt(R1 * R2)

NUMPY = {
    "relu": lambda x: np.maximum(x, 0),
    "abs": np.abs,
    "softplus": lambda x: np.logaddexp(0, SOFTPLUS_BETA * x) / SOFTPLUS_BETA,
    "identity": lambda x: x,
    "sign": lambda x: np.where(x > 0, 1.0, -1.0),
    "tanh": np.tanh,
}


def factors(std=1.0, lead=()):
    torch.manual_seed(0)
    shapes = ((R1, IN), (OUT, R1), (R2, IN), (OUT, R2))
    return [(std * torch.randn(*lead, *s, dtype=torch.float64)).requires_grad_() for s in shapes]


@pytest.mark.parametrize("magnitude", ["relu", "abs", "softplus", "identity"])
@pytest.mark.parametrize("direction", ["sign", "tanh", "identity"])
def test_delta_weight_is_the_equation(magnitude, direction):
    A, B, C, D = (t.detach().numpy() for t in factors())
    expected = SCALE * NUMPY[magnitude](B @ A) * NUMPY[direction](D @ C)
    got = delta_weight(*factors(), SCALE, magnitude, direction).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_gradients_are_the_paper_s():
    A, B, C, D = factors()
    G = torch.randn(OUT, IN, dtype=torch.float64)
    delta_weight(A, B, C, D, SCALE).backward(G)
    with torch.no_grad():
        BA, DC = B @ A, D @ C
        g_size = G * SCALE * torch.where(DC > 0, 1.0, -1.0) * (BA > 0)
        g_sign = (G * SCALE * BA.clamp(min=0)).clamp(-1, 1)
        expected = (B.T @ g_size, g_size @ A.T, D.T @ g_sign, g_sign @ C.T)
    assert (G * SCALE * BA.clamp(min=0)).abs().max() > 1  # the clip bites
    for factor, gradient in zip((A, B, C, D), expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-12, atol=1e-12)


def test_plain_hadamard_product_has_exact_gradients():
    def product(*f):
        return delta_weight(*f, SCALE, "identity", "identity")

    assert torch.autograd.gradcheck(product, factors())


def test_sign_of_zero_is_minus_one():
    assert sign_ste(torch.tensor([-2.0, -0.0, 0.0, 1e-30])).tolist() == [-1, -1, -1, 1]


@pytest.mark.parametrize(
    "ste, expected", [("clip", [-1.0, 0.5, 1.0]), ("identity", [-3.0, 0.5, 2.0]), ("hardtanh", [-3.0, 0.5, 0.0])]
)
def test_straight_through_kinds(ste, expected):
    x = torch.tensor([-1.0, 0.3, 1.5], requires_grad=True)
    sign_ste(x, ste).backward(torch.tensor([-3.0, 0.5, 2.0]))
    assert x.grad.tolist() == expected


def test_unknown_straight_through_kind_is_an_error():
    with pytest.raises(ValueError, match="ste='bnn'"):
        sign_ste(torch.ones(1), "bnn")


@pytest.mark.parametrize(
    "name, known", [("magnitude", "relu"), ("direction", "sign"), ("ste", "clip"), ("direction_dtype", "float32")]
)
def test_an_unknown_variant_is_refused_with_the_known_ones(name, known):
    with pytest.raises(ValueError, match=f"^{name}='cube': expected one of {known}, "):
        delta_weight(*factors(), SCALE, **{"direction": "tanh", name: "cube"})


def test_autocast_does_not_touch_the_products():
    f = [t.detach().float() for t in factors()]
    plain = delta_weight(*f, SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        inside = delta_weight(*f, SCALE)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)


def test_16_bit_factors_are_multiplied_in_float32():
    f = [t.detach().bfloat16() for t in factors()]
    assert torch.equal(delta_weight(*f, SCALE), delta_weight(*(t.float() for t in f), SCALE))


def test_leading_dimensions_hold_separate_updates():
    stacked = factors(lead=(3,))
    got = delta_weight(*stacked, SCALE)
    for i in range(3):
        torch.testing.assert_close(got[i], delta_weight(*(t[i] for t in stacked), SCALE))


@pytest.mark.parametrize("width", [64, 384, 2048, 8192])
@pytest.mark.parametrize("direction, magnitude", [("sign", "relu"), ("sign", "abs"), ("tanh", "relu")])
def test_init_rule_gives_the_same_relative_size_at_every_width(width, magnitude, direction):
    """The size of dW x beside W0 x at f = 1 stays within 25 % of 2 %, whatever the width, ranks and alpha."""
    torch.manual_seed(width)
    rows = 256  # of dW; enough for a norm
    for r1, r2, alpha in ((8, 8, 16), (4, 28, 64), (2, 2, 32)):
        std = init_std(width, r1, r2, alpha, magnitude, direction)
        f = (std * torch.randn(s) for s in ((r1, width), (rows, r1), (r2, width), (rows, r2)))
        dW = delta_weight(*f, alpha / math.sqrt(r1 * r2), magnitude, direction)
        W0 = torch.randn(rows, width) / math.sqrt(width)
        x = torch.randn(width, 64)
        assert (dW @ x).norm() / (W0 @ x).norm() == pytest.approx(INIT_RELATIVE_SIZE, rel=0.25 if r1 > 2 else 0.5)


@pytest.mark.parametrize("width", [64, 384, 2048, 8192])
def test_init_rule_balances_the_gradients_at_every_width(width):
    """The entries of the gradients of A and B, and of C and D, agree within 2; those of the direction group are
    smaller than those of the magnitude group by the size of B A, sqrt(r1) sigma^2, which is what an equal sigma for
    all four factors implies (Adam does not see it, SGD and Adam's epsilon do)."""
    torch.manual_seed(width)
    r1 = r2 = 8
    std = init_std(width, r1, r2, 16)
    shapes = {"A": (r1, width), "B": (width, r1), "C": (r2, width), "D": (width, r2)}
    f = {name: (std * torch.randn(s)).requires_grad_() for name, s in shapes.items()}
    G = torch.randn(width, 4) @ torch.randn(4, width) / width  # a few samples' worth of gradient
    delta_weight(**f, scale=2.0).backward(G)
    size = {name: t.grad.square().mean().sqrt().item() for name, t in f.items()}
    assert 0.5 < size["A"] / size["B"] < 2 and 0.5 < size["C"] / size["D"] < 2
    assert 0.5 < size["D"] / size["B"] / (math.sqrt(r1) * std**2) < 2


@pytest.mark.parametrize("ste", ["clip", "identity", "hardtanh"])
def test_forward_mode_is_straight_through(ste):
    """The tangent passes; "clip" bounds gradients that come from a loss, and a tangent does not."""
    x, t = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0]), torch.tensor([3.0, -3.0, 0.2, 3.0, 0.1])
    value, tangent = torch.func.jvp(lambda v: sign_ste(v, ste), (x,), (t,))
    passed = t * (x.abs() <= 1) if ste == "hardtanh" else t
    assert torch.equal(value, torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0])) and torch.equal(tangent, passed)


def test_batches_of_signs_clip_each_gradient():
    x, g = torch.randn(4, 3), 3 * torch.randn(4, 3)
    found = torch.func.vmap(lambda v, w: torch.func.vjp(sign_ste, v)[1](w)[0])(x, g)
    assert torch.equal(found, g.clamp(-1, 1))


@pytest.mark.parametrize("name, value", [("fan_in", 0), ("alpha", 0.0), ("r1", 0), ("alpha", float("nan"))])
def test_the_rule_for_sigma_wants_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        init_std(**{"fan_in": 8, "r1": 2, "r2": 2, "alpha": 16, name: value})


@pytest.mark.parametrize("ste", ["clip", "identity", "hardtanh"])
def test_plain_autograd_compiles_to_one_graph(ste):
    torch._dynamo.reset()
    factors = [torch.randn(*shape, requires_grad=True) for shape in ((2, 6), (5, 2), (3, 6), (5, 3))]
    compiled = torch.compile(delta_weight, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(f(*factors, 0.7, ste=ste).square().sum(), factors) for f in (compiled, delta_weight)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("fields", [{"alpha": math.inf}, {"magnitude": "rellu"}, {"direction": "signs"}])
def test_the_rule_for_sigma_knows_its_values(fields):
    with pytest.raises(ValueError, match="expected"):
        init_std(**{"fan_in": 8, "r1": 2, "r2": 2, "alpha": 16.0, **fields})
