"""The kernels inside the adapted layers: where one product serves, what is kept, and what evaluation rebuilds."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from dual_lora import functional, set_update_scale
from dual_lora.analysis.memory import measure_kept_bytes
from dual_lora.tuner import factors as factors_module
from tests.tuner.layers import IN, KINDS, OUT, adapted, config, factors_of, layer_of, relative_error


@pytest.fixture
def builds(monkeypatch):
    """Counts how often dW is computed."""
    count = []
    for module, name in ((factors_module.kernels, "delta_weight"), (factors_module, "delta_weight")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: count.append(1) or real(*a, **k))
    return count


def grads(model, x):
    model.zero_grad()
    y = model(x)
    y.pow(2).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_of_layer_computes_the_same_with_every_kernel(kind, training):
    torch.manual_seed(0)
    base, x = KINDS[kind].base(), KINDS[kind].inputs()
    found = []
    for kernel in ("eager", "recompute", "auto"):
        torch.manual_seed(1)
        found.append(grads(adapted(copy.deepcopy(base), kernel=kernel).train(training), x))
    for other in found[1:]:
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("fields", [{"magnitude": "abs"}, {"direction": "tanh"}, {"kernel": "eager"}])
def test_variants_of_the_map_are_left_to_autograd(fields):
    assert not factors_of(adapted(nn.Linear(IN, OUT), **fields)).recomputes


def saved_bytes(model, x):
    return measure_kept_bytes(model, lambda: model(x).sum().backward)


@pytest.mark.parametrize("base", [lambda: nn.Linear(256, 256), lambda: Conv1D(256, 256)])
def test_backward_keeps_the_input_alone(base):
    x = torch.randn(16, 256, requires_grad=True)
    scalars = 64
    assert saved_bytes(adapted(base()), x) <= x.nbytes + scalars
    assert saved_bytes(adapted(base(), kernel="eager"), x) >= x.nbytes + 3 * 256 * 256 * 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model: layer_of(model).base_layer.weight.requires_grad_(True),
        lambda model: layer_of(model).base_layer.register_forward_hook(lambda *_: None),
        lambda model: setattr(layer_of(model).base_layer, "forward", layer_of(model).base_layer.forward),
        lambda model: model.add_adapter("second", config()) or model.base_model.set_adapter(["default", "second"]),
        lambda model: model.base_model.disable_adapter_layers(),
    ],
    ids=["trained base", "hook", "patched forward", "two adapters", "disabled"],
)
def test_the_base_layer_is_called_wherever_its_call_matters(change):
    model = adapted(nn.Linear(IN, OUT))
    x = torch.ones(3, IN)
    assert layer_of(model)._find_fusable_factors(x) is not None
    change(model)
    assert layer_of(model)._find_fusable_factors(x) is None


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_of_all_modules_see_the_base_layer(kind):
    model, called = adapted(nn.Linear(IN, OUT)), []
    register = getattr(nn.modules.module, f"register_module_{kind}")
    handle = register(lambda module, *_: called.append(module))
    try:
        model(torch.ones(3, IN, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert layer_of(model).base_layer in called
    with FlopCounterMode(display=False):  # whose hooks only look on: it counts what training computes
        assert layer_of(model)._find_fusable_factors(torch.ones(3, IN)) is not None


@pytest.mark.parametrize("training", [True, False])
def test_an_input_the_base_layer_refuses_is_refused(training):
    model = adapted(nn.Linear(IN, OUT), dtype=torch.bfloat16).train(training)
    with pytest.raises(RuntimeError, match="dtype"), torch.set_grad_enabled(training):
        model(torch.ones(3, IN))


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN)])
def test_an_input_without_rows(shape):
    """An expert that no token was sent to."""
    model = adapted(nn.Linear(IN, OUT))
    y = model(torch.ones(shape))
    y.sum().backward()
    assert y.shape == (*shape[:-1], OUT)
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("fields", [{}, {"lora_dropout": 0.5}, {"keep_update": True}, {"kernel": "eager"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_may_write_into_the_output(kind, fields):
    """As Longformer does with its queries, and nn.ReLU(inplace=True) with any layer's output."""
    if not KINDS[kind].dropout and "lora_dropout" in fields:
        pytest.skip("no dropout on ids")
    torch.manual_seed(0)
    model, x = adapted(KINDS[kind].base(), **fields), KINDS[kind].inputs()
    found = []
    for scale in (torch.mul, torch.Tensor.mul_):
        model.zero_grad()
        torch.manual_seed(1)
        scale(model(x), 0.5).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *found))


def test_dropout_acts_on_the_adapter_alone():
    model = adapted(nn.Linear(IN, OUT), lora_dropout=0.5).train()
    x = torch.ones(1, IN)
    base = layer_of(model).base_layer(x)
    set_update_scale(model, 0.0)
    assert torch.equal(model(x), base)


class TestEvaluation:
    """Evaluation without merging rebuilds dW when something changed, and only then."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16])
    def model(self, request):
        return adapted(nn.Linear(IN, OUT), dtype=request.param).eval()

    def x(self, model):
        return torch.ones(3, IN, dtype=layer_of(model).base_layer.weight.dtype)

    @pytest.mark.parametrize("without_gradient", [torch.no_grad, torch.inference_mode])
    def test_nothing_changed_nothing_rebuilt(self, model, builds, without_gradient):
        with without_gradient():
            outputs = [model(self.x(model)) for _ in range(3)]
        assert len(builds) == 1
        assert torch.equal(outputs[0], outputs[2])

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: factors_of(model).C.mul_(-1),
            lambda model: setattr(factors_of(model).B, "data", factors_of(model).B * 2),
            lambda model: set_update_scale(model, 0.3),
            lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}),
            lambda model: factors_of(model).reset_parameters(0.9),
            lambda model: setattr(factors_of(model), "scaling", 3.0),
            lambda model: layer_of(model).base_layer.weight.mul_(2),
        ],
        ids=["in place", "data", "ramp", "load", "reset", "scaling", "base"],
    )
    def test_any_change_shows(self, model, change):
        with torch.no_grad():
            model(self.x(model))
            change(model)
            kept = model(self.x(model))
            fresh = copy.deepcopy(model).train().eval()(self.x(model))
        assert torch.equal(kept, fresh)

    def test_without_values_nothing_is_kept(self, model):
        x = self.x(model)
        with torch.no_grad():
            expected = model(x)
            for again in (copy.deepcopy(model), model):  # nothing kept yet; a matrix with values kept
                with FakeTensorMode(allow_non_fake_inputs=True):
                    assert {type(again(x)) for _ in range(2)} == {FakeTensor}
                assert torch.equal(again(x), expected)
            model.to("meta")
            assert {model(x.to("meta")).device.type for _ in range(2)} == {"meta"}

    def test_an_optimizer_step_shows_even_where_no_version_tells(self, model):
        class Gathered(torch.optim.SGD):
            """Changes parameters as sharded ones are gathered: their version stays what it was."""

            def step(self):
                for p in self.param_groups[0]["params"]:
                    p.data.add_(1.0)

        with torch.no_grad():
            before = model(self.x(model))
        Gathered([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        with torch.no_grad():
            assert not torch.equal(model(self.x(model)), before)

    def test_what_is_kept_is_neither_saved_nor_copied_into_training(self, model):
        names = set(model.state_dict())
        with torch.no_grad():
            model(self.x(model))
        assert factors_of(model)._cache is not None
        assert set(model.state_dict()) == names
        assert pickle.loads(pickle.dumps(factors_of(model)))._cache is None
        model.train()
        assert factors_of(model)._cache is None

    def test_other_adapters_and_merging_release_what_is_kept(self, model):
        model.add_adapter("second", config())
        with torch.no_grad():
            model(self.x(model))
            model.set_adapter("second")
            assert factors_of(model)._cache is None
            model(self.x(model))
            assert factors_of(model, "second")._cache is not None
            model.merge_adapter()
            assert factors_of(model, "second")._cache is None

    def test_with_gradients_on_the_gradient_is_there(self, model):
        with torch.no_grad():
            model(self.x(model))
        assert model(self.x(model)).requires_grad


def test_merged_and_functional_updates_agree():
    model = adapted(nn.Linear(IN, OUT))
    f = factors_of(model)
    expected = functional.delta_weight(f.A, f.B, f.C, f.D, f.scale)
    assert relative_error(layer_of(model).get_delta_weight("default"), expected) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_the_adapted_layer_can_be_exported_with_gradients(kind):
    model, x = adapted(KINDS[kind].base()).base_model.model, KINDS[kind].inputs()
    exported = torch.export.export(model, (x,), strict=False).module()
    for some in (model, exported):
        some(x).square().sum().backward()
    torch.testing.assert_close(exported(x), model(x))
    of_exported = dict(exported.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(of_exported[name].grad, parameter.grad)


@pytest.mark.parametrize("fields", [{}, {"kernel": "eager"}, {"direction": "tanh"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapted_layer_can_be_traced_and_saved(kind, fields):
    model, inputs = adapted(KINDS[kind].base(), **fields).base_model.model.eval(), KINDS[kind].inputs
    file = io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, inputs()), file)
        file.seek(0)
        x = inputs()
        torch.testing.assert_close(torch.jit.load(file)(x), model(x))
