"""4- and 8-bit base layers through PEFT's quantization backends (bitsandbytes, which also runs on the CPU)."""

import copy

import peft.utils
import pytest
import torch
from torch import nn

from tests.tuner.layers import adapted, factors_of, layer_of, relative_error

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
pytestmark = pytest.mark.skipif(
    not hasattr(peft.utils, "resolve_quantization_backend"), reason="quantization backends came with peft 0.20"
)
WIDTH = 128


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def eight_bit(linear):
    layer = bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def four_bit(linear, compress_statistics=True):
    options = {"compute_dtype": torch.float32, "quant_type": "nf4", "compress_statistics": compress_statistics}
    layer = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


KINDS = {"8bit": eight_bit, "4bit": four_bit}


def quantized_model(kind, options=(), **fields):
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    model = adapted(KINDS[kind](linear, **dict(options)), f=0.8, **fields).eval()
    return model, torch.randn(8, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_adds_its_float32_term_to_the_quantized_output(kind):
    model, x = quantized_model(kind)
    dW = layer_of(model).get_delta_weight("default")
    with model.disable_adapter():
        base = model(x)
    assert factors_of(model).A.dtype == torch.float32
    assert relative_error(model(x) - base, x @ dW.T) < 1e-3
    assert "quantization_backend='bnb" in repr(layer_of(model))


@pytest.mark.parametrize("kind", KINDS)
def test_all_factors_are_trained(kind):
    model, x = quantized_model(kind)
    model.train()(x).square().sum().backward()
    assert all(p.grad.any() for p in factors_of(model).parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_keeps_no_dW_beside_a_quantized_weight(kind):
    model, x = quantized_model(kind)
    with torch.no_grad():
        model(x)
    assert factors_of(model)._cache is None


@pytest.mark.parametrize("kind", KINDS)
def test_dW_is_kept_beside_a_quantized_weight_if_asked_for(kind):
    expected = None
    for keep_update in (False, True):
        torch.manual_seed(0)
        model, x = quantized_model(kind, keep_update=keep_update)
        model.train()(x).square().sum().backward()
        gradients = [p.grad for p in factors_of(model).parameters()]
        assert (factors_of(model)._cache is not None) == keep_update
        assert expected is None or all(map(torch.equal, gradients, expected))
        expected = gradients
    with torch.no_grad():
        model.eval()(x)
    assert factors_of(model)._cache is None


def test_8_bit_merge_and_unmerge():
    model, x = quantized_model("8bit")
    with model.disable_adapter():
        base = model(x)
    y = model(x)
    model.merge_adapter()
    assert relative_error(model(x), y) < 0.02
    model.unmerge_adapter()
    with model.disable_adapter():
        assert relative_error(model(x), base) < 1e-3
    assert relative_error(model(x), y) < 1e-3


def test_4_bit_merge_of_a_usual_dW_warns_that_it_is_rounded_away():
    model, _ = quantized_model("4bit", init_std=0.1)
    with pytest.warns(UserWarning, match="quantized base weights rounds away more than 10% of dW"):
        model.merge_adapter()
    before = copy.deepcopy(layer_of(model).get_base_layer().weight.data)
    model.unmerge_adapter()
    assert not torch.equal(layer_of(model).get_base_layer().weight.data, before)


@pytest.fixture
def packs(monkeypatch):
    """A CPU on which bitsandbytes packs 4-bit weights at the first evaluation."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


@pytest.mark.parametrize("double", [False, True])
def test_4_bits_are_merged_and_give_a_gradient_after_an_evaluation(double, packs):
    model, x = quantized_model("4bit", {"compress_statistics": double})
    grads = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        model.train()(leaf).sum().backward()
        grads.append(leaf.grad)
        with torch.no_grad():
            y = model.eval()(x)
    assert torch.equal(*grads)
    with torch.no_grad():
        model.merge_adapter()
        assert relative_error(model(x), y) < 0.2
        model.unmerge_adapter()
        assert relative_error(model(x), y) < 1e-3


def test_4_bits_that_were_evaluated_without_an_adapter_are_for_evaluation_alone():
    base, x = four_bit(nn.Linear(WIDTH, WIDTH, bias=False)).eval(), torch.randn(8, WIDTH)
    state = base.weight.quant_state
    with torch.no_grad():
        y = base(x)
    if not getattr(state, "packing_format_for_cpu", False):
        pytest.skip("needs a CPU with AVX512-BF16")
    model = adapted(base, f=0.8).eval()
    with torch.no_grad():
        assert relative_error(model(x) - y, x @ layer_of(model).get_delta_weight("default").T) < 1e-3
    with pytest.raises(ValueError, match="layer: cannot merge into Linear4bit: its 4-bit weight was packed"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="gives no gradient; reload the base model"):
        model.train()(x.requires_grad_())


@pytest.mark.parametrize("kind", [bnb.nn.Embedding8bit, bnb.nn.Embedding4bit])
def test_a_quantized_embedding_is_adapted_and_merging_into_it_refused(kind):
    base, ids = kind(WIDTH, WIDTH), torch.arange(4)
    base.load_state_dict(nn.Embedding(WIDTH, WIDTH).state_dict())
    model = adapted(base.to("cpu"), f=0.8).eval()
    with model.disable_adapter():
        y = model(ids)
    torch.testing.assert_close(model(ids), y + layer_of(model).get_delta_weight("default")[ids])
    with pytest.raises(ValueError, match=f"layer: cannot merge into {kind.__name__}: PEFT .* cannot write"):
        model.merge_adapter()
