"""Variants of the map that answer a reviewer's question: other activations, other ramps, a direction in 16 bits."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from dual_lora import DualLoraConfig, delta_weight, init_std, set_update_scale
from dual_lora.functional import DIRECTIONS, INIT_RELATIVE_SIZE, MAGNITUDES, RAMPS

R1, R2, ALPHA, SCALE = 3, 5, 7.0, 0.8


def draw(std=1.0, rows=11, width=9, r1=R1, r2=R2, dtype=torch.float64):
    torch.manual_seed(0)
    return [std * torch.randn(*shape, dtype=dtype) for shape in ((r1, width), (rows, r1), (r2, width), (rows, r2))]


@pytest.mark.parametrize(
    ("magnitude", "size"),
    [
        ("leaky_relu", lambda x: torch.where(x > 0, x, 0.01 * x)),
        ("squared_relu", lambda x: torch.where(x > 0, x * x, torch.zeros_like(x))),
    ],
)
@pytest.mark.parametrize(("direction", "gate"), [("sigmoid", lambda x: 1 / (1 + torch.exp(-x))), ("tanh", torch.tanh)])
def test_the_variants_are_their_equations(magnitude, size, direction, gate):
    A, B, C, D = draw()
    expected = SCALE * size(B @ A) * gate(D @ C)
    torch.testing.assert_close(delta_weight(A, B, C, D, SCALE, magnitude, direction), expected, rtol=1e-12, atol=0)


def test_identity_with_sigmoid_is_a_gated_linear_unit():
    A, B, C, D = draw()
    expected = SCALE * F.glu(torch.cat([B @ A, D @ C], -1), -1)
    torch.testing.assert_close(delta_weight(A, B, C, D, SCALE, "identity", "sigmoid"), expected)


@pytest.mark.parametrize(("r1", "r2"), [(8, 8), (12, 4)])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_a_fresh_update_has_the_same_size_under_every_variant(magnitude, direction, r1, r2):
    if magnitude == "softplus":
        pytest.skip("counts as ReLU, which it only approaches")
    width, alpha = 512, 16
    std = init_std(width, r1, r2, alpha, magnitude, direction)
    dW = delta_weight(*draw(std, 256, width, r1, r2), alpha / math.sqrt(r1 * r2), magnitude, direction)
    assert float(dW.square().mean().sqrt()) * math.sqrt(width) == pytest.approx(INIT_RELATIVE_SIZE, rel=0.2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_direction_in_16_bits_flips_some_signs_and_keeps_the_magnitude(dtype):
    four = draw(0.1, 256, 256, 8, 8, torch.float32)
    exact, rounded = delta_weight(*four, SCALE), delta_weight(*four, SCALE, direction_dtype=dtype)
    assert rounded.dtype == torch.float32 and torch.equal(exact.abs(), rounded.abs())
    flipped = float((exact != rounded).float().mean())
    assert 0 < flipped < 0.01
    A, B, C, D = (t.requires_grad_() for t in four)
    delta_weight(A, B, C, D, SCALE, direction_dtype=dtype).sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in (A, B, C, D))


def adapted(**fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    return get_peft_model(model, DualLoraConfig(target_modules=["0"], r=4, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"magnitude": "leaky_relu"},
        {"magnitude": "squared_relu"},
        {"direction": "sigmoid"},
        {"direction_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_variant_is_computed_by_autograd_and_trains_merges_and_is_saved(fields, tmp_path):
    model = adapted(scale_warmup_steps=0, kernel="recompute", **fields)
    (factors,) = [m for m in model.modules() if type(m).__name__ == "DualLoraFactors"]
    assert factors.kernel_used == "eager"
    before = [p.detach().clone() for p in factors.parameters()]
    optimizer = torch.optim.Adam(factors.parameters(), lr=1e-2)
    x = torch.randn(8, 16)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, factors.parameters(), strict=True))
    model.save_pretrained(tmp_path)
    loaded = DualLoraConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields
    expected = model.eval()(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0]),
        ("cosine", [(1 - math.cos(math.pi * k / 4)) / 2 for k in range(1, 5)]),
        ("quadratic", [1 / 16, 1 / 4, 9 / 16, 1.0]),
        ("root", [0.5, math.sqrt(0.5), math.sqrt(0.75), 1.0]),
    ],
)
def test_a_ramp_has_its_shape_ends_at_one_and_continues_from_a_given_height(shape, expected):
    model = adapted(scale_warmup_steps=4, scale_warmup_shape=shape)
    (factors,) = [m for m in model.modules() if type(m).__name__ == "DualLoraFactors"]
    seen = []
    for _ in range(6):
        factors.advance_ramp()
        seen.append(float(factors.update_scale))
    assert seen == pytest.approx([*expected, 1.0, 1.0])
    set_update_scale(model, expected[1], ramp=True)
    assert int(factors.step) == 2
    factors.advance_ramp()
    assert float(factors.update_scale) == pytest.approx(expected[2])


def test_every_ramp_begins_at_zero_and_only_rises():
    share = torch.linspace(0, 1, 101)
    for name, rise in RAMPS.items():
        heights = rise(share)
        assert heights[0] == 0 and heights[-1] == 1 and (heights.diff() > 0).all(), name


@pytest.mark.parametrize(
    "fields", [{"scale_warmup_shape": "cubic"}, {"direction_dtype": "int8"}, {"magnitude": "gelu"}], ids=str
)
def test_an_unknown_variant_is_refused(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name}='{fields[name]}': expected one of"):
        DualLoraConfig(**fields)
