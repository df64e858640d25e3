"""The adapted layers against functional.delta_weight applied by hand in float64."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from dual_lora import DualLoraConfig, delta_weight, init_std, set_update_scale
from tests.tuner.layers import (
    IN,
    KINDS,
    OUT,
    Net,
    adapted,
    config,
    factors_of,
    layer_of,
    list_files,
    named_factors,
    relative_error,
)

F_NOW = 0.8
SCALE = F_NOW * 7 / 8**0.5  # f * alpha / sqrt(r1 * r2) of layers.config


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reference(kind, model, x, mask=1.0, **kinds):
    """The adapter's own term in float64, and the factors it was computed from."""
    f = {n: t.detach().double().requires_grad_() for n, t in named_factors(factors_of(model)).items()}
    x = x.double() * mask if x.is_floating_point() else x
    return kind.term(x, delta_weight(**f, scale=SCALE, **kinds)), f


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", KINDS)
def test_output_and_gradients_equal_float64_autograd(name, dropout):
    kind = KINDS[name]
    base, x = kind.base(), kind.inputs()
    model = adapted(copy.deepcopy(base), F_NOW, lora_dropout=dropout)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    mask = F.dropout(torch.ones_like(x), dropout).double() if kind.dropout else 1.0
    term, f = reference(kind, model, x, mask)
    expected = base.double()(x.double() if x.is_floating_point() else x) + term
    assert relative_error(y, expected) < 1e-5
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for factor, grad in ((t, f[n].grad) for n, t in named_factors(factors_of(model)).items()):
        assert grad.norm() > 0 and relative_error(factor.grad, grad) < 1e-5


@pytest.mark.parametrize(
    "kinds",
    [
        {"ste": "identity"},
        {"ste": "hardtanh"},
        {"magnitude": "abs"},
        {"magnitude": "softplus"},
        {"magnitude": "identity"},
        {"direction": "tanh"},
        {"magnitude": "identity", "direction": "identity"},
    ],
    ids=str,
)
def test_variants_reach_the_layer(kinds):
    kind, base = KINDS["linear"], KINDS["linear"].base()
    x = 10 * kind.inputs()
    model = adapted(base, F_NOW, **kinds)
    term, f = reference(kind, model, x, **kinds)
    model(x).sum().backward()
    term.sum().backward()
    paper_term, paper = reference(kind, model, x)
    paper_term.sum().backward()
    for n, t in named_factors(factors_of(model)).items():
        assert relative_error(t.grad, f[n].grad) < 1e-5
    assert any(relative_error(f[n].grad, paper[n].grad) > 1e-2 for n in "ABCD")


@pytest.mark.parametrize("name", KINDS)
def test_merged_equals_unmerged_and_unmerge_is_exact(name):
    kind = KINDS[name]
    base, x = kind.base(), kind.inputs()
    before = base.weight.detach().clone()
    model = adapted(base, F_NOW).eval()
    y, y_base = model(x), base(x)
    assert relative_error(y, y_base) > 0.01
    model.merge_adapter(safe_merge=True)
    assert relative_error(model(x), y) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).get_base_layer().weight, before) and torch.equal(model(x), y)
    merged = model.merge_and_unload()
    assert type(merged.layer) is type(base) and relative_error(merged(x), y) < 1e-5


def test_what_is_written_to_a_merged_weight_outlives_further_merges_and_copies():
    model = adapted(nn.Linear(IN, OUT), F_NOW)
    model.add_adapter("other", DualLoraConfig(target_modules=["layer"], init_weights=False))
    layer = layer_of(model)
    expected = layer.base_layer.weight.detach() + 1
    model.merge_adapter(["default"])
    with torch.no_grad():
        layer.base_layer.weight.add_(1)
    twin = copy.deepcopy(model)
    model.merge_adapter(["other"])
    for some in (model, twin, copy.deepcopy(model)):
        some.unmerge_adapter()
        torch.testing.assert_close(layer_of(some).base_layer.weight.detach(), expected)


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_subtracted_from_a_written_weight_is_what_was_merged(copied):
    model = adapted(nn.Linear(IN, OUT), F_NOW)
    expected = layer_of(model).base_layer.weight.detach() + 1
    model.merge_adapter()
    with torch.no_grad():
        layer_of(model).base_layer.weight.add_(1)
        factors_of(model).D.neg_()
    factors_of(model).set_update_scale(0.3, ramp=False)
    model = copy.deepcopy(model) if copied else model
    model.unmerge_adapter()
    torch.testing.assert_close(layer_of(model).base_layer.weight.detach(), expected)


@pytest.mark.parametrize("part", [factors_of, layer_of])
def test_a_compiled_adapter_can_be_pickled(part):
    model = adapted(nn.Linear(IN, OUT), F_NOW).eval()
    part(model).compile(backend="eager")
    twin, x = pickle.loads(pickle.dumps(model)), torch.randn(2, IN)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("name", KINDS)
def test_get_delta_weight_is_shaped_like_the_weight(name):
    model = adapted(KINDS[name].base(), F_NOW)
    dW = layer_of(model).get_delta_weight("default")
    assert dW.shape == layer_of(model).weight.shape
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged.layer.weight, layer_of(model).weight + dW)


@pytest.mark.parametrize("training", [True, False])
def test_merging_ignores_dropout(training):
    model = adapted(KINDS["linear"].base(), lora_dropout=0.5).train(training)
    expected = layer_of(model).weight + factors_of(model).delta_weight()
    model.merge_adapter()
    assert torch.equal(layer_of(model).weight, expected)


@pytest.mark.parametrize("name", KINDS)
def test_two_adapters_merge_together(name):
    kind = KINDS[name]
    base, x = kind.base(), kind.inputs()
    before = base.weight.detach().clone()
    model = adapted(base, F_NOW)
    model.add_adapter("other", config(r1=1, r2=1))
    set_update_scale(model, F_NOW)
    layer_of(model).set_adapter(["default", "other"])
    model.eval()
    y = model(x)
    apart = sum(layer_of(model).get_delta_weight(a) for a in ("default", "other"))
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(layer_of(model).weight, before + apart)
    assert relative_error(model(x), y) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).weight, before)


def test_an_adapter_that_is_named_twice_counts_once():
    model, x = adapted(nn.Linear(IN, OUT)), torch.randn(3, IN)
    expected = model(x)
    model.base_model.set_adapter(["default", "default"])
    assert torch.equal(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_a_weighted_sum_of_adapters_is_refused():
    model = adapted(nn.Linear(IN, OUT))
    model.add_adapter("second", config())
    with pytest.raises(ValueError, match="^add_weighted_adapter: Dual LoRA's dW is no linear function"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


def test_safe_merge_finds_nan_in_any_factor_and_leaves_the_weight_alone():
    for name in "ABCD":
        model = adapted(KINDS["linear"].base())
        before = layer_of(model).weight.detach().clone()
        getattr(factors_of(model), name).data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(layer_of(model).weight, before)


def test_safe_merge_finds_overflow():
    model = adapted(nn.Linear(IN, OUT), dtype=torch.float16, init_std=300.0)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)


def test_scaled_embeddings_scale_the_update():
    """As Gemma 3 does: its embedding multiplies what it looks up by `embed_scale`."""

    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    model, ids = adapted(Scaled(IN, OUT)).eval(), torch.arange(IN)
    y = model(ids)
    assert relative_error(model.merge_and_unload()(ids), y) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_16_bit_base_keeps_float32_factors_and_unmerges_exactly(name, dtype):
    kind = KINDS[name]
    x = kind.inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    model = adapted(kind.base(), F_NOW, dtype=dtype).eval()
    before = layer_of(model).weight.detach().clone()
    assert all(p.dtype == torch.float32 for p in factors_of(model).parameters())
    assert factors_of(model).update_scale.dtype == torch.float32
    y = model(x)
    assert y.dtype == dtype
    term, _ = reference(kind, model, x)
    with model.disable_adapter():
        y_base = model(x)
    assert relative_error(y, y_base.double() + term) < 0.01
    model.merge_adapter()
    assert relative_error(model(x), y) < 0.02
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).weight, before)


def small_update_on_bf16_base():
    """A bf16 Linear of 256 x 256, its input, and a Dual LoRA model whose dW is 1/1000 of |W0|."""
    layer, x = nn.Linear(256, 256, bias=False), torch.randn(64, 256).bfloat16()
    model = adapted(layer, 1.0, dtype=torch.bfloat16, init_std=None, r1=8, r2=8).eval()
    dW = layer_of(model).get_delta_weight("default")
    factors_of(model).update_scale.mul_(1e-3 * layer.weight.float().norm() / dW.norm())
    return layer, x, model


def test_bf16_base_does_not_swallow_dW():
    layer, x, model = small_update_on_bf16_base()
    dW = layer_of(model).get_delta_weight("default")
    assert dW.norm() / layer.weight.float().norm() == pytest.approx(1e-3, rel=1e-3)
    exact = x.double() @ dW.double().T
    assert relative_error(factors_of(model)(x), exact) < 0.01

    lora = get_peft_model(Net(copy.deepcopy(layer)), LoraConfig(r=16, lora_alpha=16, target_modules=["layer"])).eval()
    pair = lora.base_model.model.layer
    nn.init.normal_(pair.lora_B["default"].weight)
    lora_dW = pair.get_delta_weight("default")
    pair.scaling["default"] *= (dW.norm() / lora_dW.norm()).item()
    lora_exact = x.double() @ pair.get_delta_weight("default").double().T

    base = x.double() @ layer.weight.double().T
    lost = (model(x).double() - base - exact).norm()
    lora_lost = (lora(x).double() - base - lora_exact).norm()
    assert lost < 1.05 * lora_lost


def test_merging_a_small_dW_into_bf16_warns():
    _, _, model = small_update_on_bf16_base()
    with pytest.warns(UserWarning, match="rounds away more than 10% of dW") as found:
        model.merge_adapter()
    assert list_files(found) == {__file__}


def test_merging_into_float32_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(KINDS["linear"].base()).merge_adapter()


def test_signs_are_the_same_in_forward_merge_and_after_reload(tmp_path):
    """Forward on a bf16 base under autocast uses the very dW that merging and a reloaded adapter use."""
    base = nn.Linear(256, 256, bias=False)
    model = adapted(copy.deepcopy(base), 1.0, dtype=torch.bfloat16)
    eye = torch.eye(256).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        in_forward = factors_of(model)(eye).T
    dW = layer_of(model).get_delta_weight("default")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Net(base).bfloat16(), tmp_path)
    assert torch.equal(layer_of(again).get_delta_weight("default"), dW)
    assert torch.equal(in_forward, dW.bfloat16())


def test_explicit_16_bit_factors_are_honoured():
    model = get_peft_model(Net(nn.Linear(IN, OUT)).bfloat16(), config(), autocast_adapter_dtype=False)
    factors = factors_of(model)
    assert {p.dtype for p in factors.parameters()} == {torch.bfloat16}
    assert factors.update_scale.dtype == torch.float32 and factors.delta_weight().dtype == torch.float32


def test_float64_base_gets_float64_factors():
    model = adapted(nn.Linear(IN, OUT), dtype=torch.float64)
    assert factors_of(model).A.dtype == layer_of(model).get_delta_weight("default").dtype == torch.float64


def test_dead_draw_is_drawn_again():
    """P(every entry of BA <= 0) is about 1/32 on 5 inputs and 1 output, so that 500 layers would hold some 15."""
    for seed in range(500):
        torch.manual_seed(seed)
        factors = factors_of(adapted(nn.Linear(5, 1)))
        assert (factors.B @ factors.A > 0).any()


def test_layer_that_dies_later_warns():
    model = adapted(nn.Linear(IN, OUT))
    factors_of(model).A.data.abs_()
    factors_of(model).B.data.abs_().neg_()
    with pytest.warns(UserWarning, match="layer is dead") as found:
        model.merge_adapter()
    assert list_files(found) == {__file__}


def test_no_warning_at_the_start_of_the_ramp():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not layer_of(adapted(nn.Linear(IN, OUT), 0.0)).get_delta_weight("default").any()


def test_every_factor_has_a_gradient_at_the_declared_init():
    for name, kind in KINDS.items():
        model = get_peft_model(Net(kind.base()), DualLoraConfig(r=4, target_modules=["layer"]))
        x = kind.inputs()
        set_update_scale(model, 0.01)
        model(x).square().sum().backward()
        assert all(f.grad.any() for f in factors_of(model).parameters()), name


def test_adam_moves_both_groups_alike_and_sgd_does_not():
    """What the equal sigma of all four factors means: the direction group's gradient is smaller by the size of B A."""
    moved = {}
    for make in (torch.optim.Adam, torch.optim.SGD):
        torch.manual_seed(0)
        model = get_peft_model(Net(nn.Linear(64, 64)), DualLoraConfig(r=16, target_modules=["layer"]))
        set_update_scale(model, 1.0)
        before = copy.deepcopy(named_factors(factors_of(model)))
        optimizer = make(factors_of(model).parameters(), lr=1e-3)
        model(torch.randn(32, 64)).square().sum().backward()
        optimizer.step()
        moved[make] = {n: (t - before[n]).abs().mean().item() for n, t in named_factors(factors_of(model)).items()}
    adam, sgd = moved[torch.optim.Adam], moved[torch.optim.SGD]
    assert all(step == pytest.approx(1e-3, rel=0.1) for step in adam.values())
    assert max(sgd["C"], sgd["D"]) < 0.02 * min(sgd["A"], sgd["B"])


def test_the_direction_group_may_have_a_sigma_of_its_own():
    """Sign(D C), and so dW, does not depend on it; the other group's draw is the same."""
    found = {}
    for std in (None, 0.4, 0.04):
        torch.manual_seed(3)
        found[std] = factors_of(adapted(nn.Linear(64, 64), direction_init_std=std))
    plain, same, smaller = found.values()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), same.parameters(), strict=True))
    assert torch.equal(plain.A, smaller.A) and torch.allclose(plain.C, 10 * smaller.C)
    assert smaller.C.std().item() == pytest.approx(0.04, rel=0.1) == smaller.D.std().item()
    torch.testing.assert_close(plain.delta_weight(), smaller.delta_weight())


@pytest.mark.parametrize("fields", [{"init_std": 1e-30}, {"init_std": 1e30}, {"direction_init_std": 1e-30}], ids=str)
def test_a_sigma_whose_products_float32_does_not_hold_is_refused(fields):
    with pytest.raises(ValueError, match="layer: init_std=.*0 or infinite"):
        adapted(nn.Linear(IN, OUT), **fields)


class TestTorchFunc:
    """Under torch.func: what plain autograd gives row by row."""

    class Halved(nn.Linear):
        """A forward of its own."""

        def forward(self, x):
            return super().forward(x) / 2

    @pytest.fixture(
        params=[(kind, kernel) for kind in (*KINDS, "fused", "own") for kernel in ("eager", "auto")], ids=str
    )
    def model(self, request):
        name, kernel = request.param
        kind = KINDS[name if name in KINDS else "linear"]
        fields = {"fused_slices": {"layer": [3, [0, 2]]}} if name == "fused" else {}
        base = self.Halved(IN, OUT) if name == "own" else kind.base()
        model = adapted(base, kernel=kernel, ste="identity", **fields)
        model.inputs = kind.inputs()
        return model

    def function(self, model):
        factors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        return factors, lambda p, x: torch.func.functional_call(model, p, (x,)).square().sum()

    def test_gradients_of_single_rows(self, model):
        factors, loss = self.function(model)
        rows = model.inputs.unsqueeze(1)
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(factors, rows)
        for i, row in enumerate(rows):
            expected = torch.func.grad(loss)(factors, row)
            assert all(relative_error(found[n][i], expected[n]) < 1e-4 for n in factors)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("with_gradient", [True, False])
    def test_a_batch_of_inputs_alone(self, model, training, with_gradient):
        model.train(training)
        with torch.set_grad_enabled(with_gradient):
            found = torch.func.vmap(model)(model.inputs)
            expected = torch.stack([model(row) for row in model.inputs])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert found.requires_grad == with_gradient
            torch.testing.assert_close(model(model.inputs), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("with_gradient", [True, False])
    def test_forward_mode_outside_a_transform(self, model, training, with_gradient):
        """Also in evaluation, after dW was kept without a tangent."""
        model.train(training)
        factors, loss = self.function(model)
        tangents = {n: torch.randn_like(p) for n, p in factors.items()}
        expected = torch.func.jvp(lambda p: loss(p, model.inputs), (factors,), (tangents,))[1]
        with torch.set_grad_enabled(with_gradient), forward_ad.dual_level():
            value = loss(factors, model.inputs)
            duals = {n: forward_ad.make_dual(p, tangents[n]) for n, p in factors.items()}
            found = forward_ad.unpack_dual(loss(duals, model.inputs)).tangent
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(loss(factors, model.inputs), value)

    def test_forward_mode_agrees_with_reverse_mode(self, model):
        factors, loss = self.function(model)
        tangents = {n: torch.randn_like(p) for n, p in factors.items()}
        _, found = torch.func.jvp(lambda p: loss(p, model.inputs), (factors,), (tangents,))
        gradient = torch.func.grad(loss)(factors, model.inputs)
        expected = sum((gradient[n] * tangents[n]).sum() for n in factors)
        assert found == pytest.approx(expected.item(), rel=1e-4)

    def test_second_derivatives(self, model):
        factors, loss = self.function(model)
        name = next(n for n in factors if n.endswith("C"))
        of_one = lambda c: loss({**factors, name: c}, model.inputs)  # noqa: E731
        found = torch.func.hessian(of_one)(factors[name])
        expected = torch.func.jacrev(torch.func.jacrev(of_one))(factors[name])
        assert expected.any() and relative_error(found, expected) < 1e-4
        outside = torch.autograd.functional.hessian(of_one, factors[name])
        assert relative_error(outside, expected) < 1e-4
        quick = torch.autograd.functional.hessian(of_one, factors[name], vectorize=True)
        assert relative_error(quick, expected) < 1e-4

    def test_batched_factors_in_evaluation(self, model):
        factors, loss = self.function(model)
        model.eval()
        several = {n: torch.stack([p, 2 * p]) for n, p in factors.items()}
        with torch.no_grad():
            found = torch.func.vmap(loss, (0, None))(several, model.inputs)
            expected = [loss({n: p[i] for n, p in several.items()}, model.inputs) for i in range(2)]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def fused(blocks=(0, 2), base=None):
    return adapted(base or Conv1D(3 * OUT, IN), F_NOW, fused_slices={"layer": [3, list(blocks)]})


@pytest.mark.parametrize(
    "base", [lambda: Conv1D(3 * OUT, IN), lambda: nn.Linear(IN, 3 * OUT)], ids=["Conv1D", "Linear"]
)
@pytest.mark.parametrize("blocks", [(0, 2), (2, 0), (1,)])
def test_fused_slices_adapt_only_their_blocks(base, blocks):
    x = torch.randn(4, 5, IN)
    model = fused(blocks, base())
    with model.disable_adapter():
        y_base = model(x)
    update = (model(x) - y_base).unflatten(-1, (3, OUT))
    f = factors_of(model)
    for block in range(3):
        if block in blocks:
            i = blocks.index(block)
            dW = delta_weight(*(t[i] for t in (f.A, f.B, f.C, f.D)), SCALE)
            torch.testing.assert_close(update[..., block, :], x @ dW.T, rtol=1e-4, atol=1e-5)
        else:
            assert not update[..., block, :].any()
    y = model(x)
    assert relative_error(model.merge_and_unload()(x), y) < 1e-5


def test_fused_slices_have_lora_s_parameter_count_on_q_and_v():
    trained = sum(p.numel() for p in fused().parameters() if p.requires_grad)
    assert trained == 2 * 6 * (IN + OUT)  # LoRA of rank 6 = r1 + r2 on two IN -> OUT projections


def test_fused_slices_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="no adapted module is called 'c_atn'"):
        adapted(Conv1D(3 * OUT, IN), fused_slices={"c_atn": [3, [0, 2]]})
    with pytest.raises(ValueError, match="3 equal blocks do not fit 10"):
        fused(base=nn.Linear(IN, 10))
    with pytest.raises(ValueError, match="Embedding is not a linear layer"):
        fused(base=nn.Embedding(IN, 3 * OUT))


def test_unsupported_layer_is_an_error():
    with pytest.raises(TypeError, match="not supported"):
        adapted(nn.LSTM(3, 3))


@pytest.mark.parametrize("name, fan", [("linear", IN), ("embedding", OUT), ("conv2d", 4 * 9), ("conv2d_groups", 2 * 9)])
def test_the_rule_for_sigma_sees_the_layer_s_fan_in(name, fan):
    draws = []
    for _ in range(200):
        draws += [p.flatten() for p in factors_of(adapted(KINDS[name].base(), init_std=None)).parameters()]
    assert torch.cat(draws).detach().std().item() == pytest.approx(init_std(fan, 2, 4, 7), rel=0.02)


def test_deepcopy_trains_on_its_own():
    model = adapted(nn.Linear(IN, OUT))
    twin = copy.deepcopy(model)
    twin(torch.randn(2, IN)).sum().backward()
    assert factors_of(twin).A.grad is not None and factors_of(model).A.grad is None


def test_repr_names_the_method():
    assert repr(layer_of(adapted(nn.Linear(IN, OUT)))).startswith("dual_lora.Linear(")
