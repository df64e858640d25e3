"""Gradients whose full-size products are taken in bfloat16: how far from float32, where they apply, who refuses."""

import importlib.util

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dual_lora import DualLoraConfig, kernels
from dual_lora.kernels import GradientTypes, choose_ops, dual_linear, recompute

OUT, IN, RANK, ROWS = 96, 80, 4, 64
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
KERNELS = ["recompute", pytest.param("triton", marks=needs_triton)]
BOTH = GradientTypes(torch.bfloat16, torch.bfloat16)
CHOICES = {"weight": GradientTypes(weight=torch.bfloat16), "input": GradientTypes(input=torch.bfloat16), "both": BOTH}
NAMES = ("y", "dx", "dA", "dB", "dC", "dD")


def draw_problem(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = ((ROWS, IN), (OUT, IN), (ROWS, OUT), (RANK, IN), (OUT, RANK), (RANK, IN), (OUT, RANK))
    x, weight, g, *factors = (torch.randn(*shape, generator=draw) for shape in shapes)
    return x.to(dtype).requires_grad_(), weight.to(dtype), g.to(dtype), [0.3 * t for t in factors]


def compute(types, kernel="recompute", dtype=torch.float32):
    """Return y, dL/dx and the gradients of the factors, by name."""
    x, weight, g, factors = draw_problem(dtype)
    [t.requires_grad_() for t in factors]
    ops = choose_ops(kernel, torch.device("cpu"))
    y = dual_linear(x, *factors, torch.tensor(0.7), weight=weight, ops=ops, gradient_types=types)
    return dict(zip(NAMES, (y, *torch.autograd.grad(y, [x, *factors], g)), strict=True))


@pytest.fixture(params=[10**6, 20 * IN], ids=["one block", "five blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(recompute, "BLOCK", request.param)
    monkeypatch.setattr(recompute, "TILE", 10 * IN)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("choice", CHOICES)
def test_only_the_chosen_products_are_rounded(kernel, choice, blocks):
    exact, found = compute(None, kernel), compute(CHOICES[choice], kernel)
    rounded = {"weight": NAMES[2:], "input": NAMES[1:2], "both": NAMES[1:]}[choice]
    for name in NAMES:
        error = (found[name] - exact[name]).norm() / exact[name].norm()
        assert found[name].dtype == torch.float32
        # a factor of a product is off by up to 2^-9 of itself, and on average by less
        assert 1e-4 < error < 2**-7 if name in rounded else torch.equal(found[name], exact[name]), (name, error)


@pytest.mark.parametrize("choice", CHOICES)
def test_activations_of_16_bits_are_taken_as_they_are(choice):
    exact, found = (compute(types, dtype=torch.bfloat16) for types in (None, CHOICES[choice]))
    assert all(torch.equal(found[name], exact[name]) for name in NAMES)


def test_sums_over_blocks_are_float32(monkeypatch):
    """Summed in bfloat16, 96 blocks would lose far more than the rounding of a product's factors."""
    monkeypatch.setattr(recompute, "BLOCK", IN)
    exact, found = compute(None)["dx"], compute(BOTH)["dx"]
    assert (found - exact).norm() < 2**-7 * exact.norm()


def build_model(**options):
    torch.manual_seed(0)
    config = DualLoraConfig(r=8, target_modules=["0"], init_weights=False, **options)
    return get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config)


def compute_layer_gradients(model):
    x, _, g, _ = draw_problem()
    model(x).backward(g)
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def test_the_config_reaches_the_product(monkeypatch):
    monkeypatch.setattr(kernels, "explain_slow_bfloat16", lambda device: None)
    plain = compute_layer_gradients(build_model())
    low = compute_layer_gradients(build_model(weight_gradient_dtype="bfloat16"))
    assert torch.equal(plain[0], low[0]) and not any(map(torch.equal, plain[1:], low[1:]))
    low = compute_layer_gradients(build_model(input_gradient_dtype="bfloat16"))
    assert not torch.equal(plain[0], low[0]) and all(map(torch.equal, plain[1:], low[1:]))
    assert "input_gradient=torch.bfloat16" in repr(build_model(input_gradient_dtype="bfloat16"))


@pytest.mark.parametrize("name", ["weight_gradient_dtype", "input_gradient_dtype"])
def test_a_device_without_fast_products_is_refused_in_training_only(monkeypatch, name):
    monkeypatch.setattr(kernels, "explain_slow_bfloat16", lambda device: "no such units")
    model, plain = build_model(**{name: "bfloat16"}), build_model()
    with pytest.raises(ValueError, match=f"{name}='bfloat16': no such units; leave it None to train here"):
        model.train()(torch.zeros(2, IN))
    gradients = compute_layer_gradients(model.eval())
    assert all(map(torch.equal, gradients, compute_layer_gradients(plain.eval())))


def test_which_devices_are_fast(monkeypatch):
    explain = kernels.explain_slow_bfloat16.__wrapped__
    assert explain("meta") is None and "mps" in explain("mps")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert "neither avx512_bf16 nor AMX" in explain("cpu")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert explain("cpu") is None


@pytest.mark.parametrize(
    "options",
    [{"kernel": "eager"}, {"magnitude": "abs"}, {"direction": "tanh"}, {"direction_dtype": "bfloat16"}],
    ids=lambda o: next(iter(o)),
)
def test_plain_autograd_has_no_such_products(options):
    with pytest.raises(ValueError, match="weight_gradient_dtype='bfloat16': expected None with kernel='eager'"):
        DualLoraConfig(weight_gradient_dtype="bfloat16", **options)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="input_gradient_dtype='float16': expected None or 'bfloat16'"):
        DualLoraConfig(input_gradient_dtype="float16")
