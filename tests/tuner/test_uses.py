"""Layers that other code uses than their parent's forward: by the weight alone, or under several names."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn

from dual_lora import set_update_scale
from tests.tuner.layers import IN, OUT, config, list_files


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Holder(nn.Module):
    """Holds a layer and leaves it to whoever holds this."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x):
        return x


class Grandparent(nn.Module):
    def __init__(self):
        super().__init__()
        self.holder = Holder()

    def forward(self, x):
        return F.linear(self.holder(x), self.holder.layer.weight, self.holder.layer.bias)


class ReadsLayersOfAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(IN, OUT)])

    def forward(self, x):
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        return x


def apply(layer, x):
    return x @ layer.weight.T + layer.bias


class ReadsThroughAFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x):
        return apply(self.layer, x)


class ReadsInTraining(nn.Module):
    """As kernels that fuse the last layer with the loss do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x):
        return apply(self.layer, x) if self.training else self.layer(x)


READERS = [Grandparent, ReadsLayersOfAList, ReadsThroughAFunction]
TARGETS = r".*(layer|layers\.\d)"


def adapt(base, **fields):
    return get_peft_model(base, config(target_modules=TARGETS, **fields))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", READERS)
def test_a_weight_that_is_only_read_is_never_merged(kind, training):
    base, x = kind(), torch.randn(3, IN)
    expected = base(x)
    model = adapt(base, init_weights=False).train(training)
    with pytest.warns(UserWarning, match="never called by the parent module") as found:
        assert torch.equal(model(x), expected)
    assert list_files(found) == {__file__}
    with pytest.warns(UserWarning, match="not merged"):
        merged = model.merge_and_unload()
    assert torch.equal(merged(x), expected)


@pytest.mark.filterwarnings("ignore:Dual LoRA")
@pytest.mark.parametrize("kind", READERS)
def test_what_trained_without_effect_has_none_elsewhere(kind, tmp_path):
    base, x = kind(), torch.randn(3, IN)
    clean = copy.deepcopy(base)
    model = adapt(base, init_weights=False)
    model(x).sum()
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(copy.deepcopy(clean), tmp_path).merge_and_unload()
    assert torch.equal(merged(x), clean(x))


@pytest.mark.filterwarnings("ignore:Dual LoRA")
def test_factors_that_training_never_uses_do_nothing_in_evaluation():
    base, x = ReadsInTraining(), torch.randn(3, IN)
    expected = base(x)
    model = adapt(base, init_weights=False)
    model.train()(x)
    torch.testing.assert_close(model.eval()(x), expected)


class CallsLater(nn.Module):
    """Asks the weight for its dtype in every forward, and calls the layer in some."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x, call=True):
        x = x.to(self.layer.weight.dtype)
        return self.layer(x) if call else x


@pytest.mark.filterwarnings("ignore:Dual LoRA")
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy])
@pytest.mark.parametrize("fields, expected", [({}, [0.0, 0.5, 1.0]), ({"init_weights": False}, [1.0, 1.0, 1.0])])
def test_a_layer_that_training_calls_later_trains_from_then_on(fields, expected, copied):
    model = adapt(CallsLater(), scale_warmup_steps=2, **fields).train()
    model(torch.randn(3, IN), call=False)
    model = copied(model)
    factors = model.base_model.model.layer.dual_lora_factors["default"]
    optimizer = torch.optim.SGD(factors.parameters(), lr=1e-3)
    model.eval()(torch.randn(3, IN))
    assert factors.update_scale == 0.0
    model.train()
    found = []
    for _ in expected:
        model(torch.randn(3, IN)).square().sum().backward()
        found.append(factors.update_scale.item())
        optimizer.step()
    assert found == expected and any(p.grad.any() for p in factors.parameters())


@pytest.mark.filterwarnings("ignore:Dual LoRA")
def test_f_set_by_hand_outlives_a_later_call():
    model = adapt(CallsLater()).train()
    model(torch.randn(3, IN), call=False)
    set_update_scale(model, 0.7)
    model(torch.randn(3, IN))
    assert model.base_model.model.layer.dual_lora_factors["default"].update_scale.item() == pytest.approx(0.7)


def test_the_first_forward_watches_no_layer_that_is_called():
    model = adapt(Grandparent())
    model.base_model.model.forward = lambda x: model.base_model.model.holder.layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, IN))
    layer = model.base_model.model.holder.layer
    assert not layer.bypassed and layer.uses is None


class Caller(Holder):
    def forward(self, x):
        return self.layer(x)


class Decoder(nn.Module):
    """Computes with the weight of a layer that its parent calls, as Perceiver's decoder does."""

    def __init__(self):
        super().__init__()
        self.encoder = Caller()

    def forward(self, x):
        return torch.matmul(
            self.encoder(x),
            self.encoder.layer.weight,
        )


class Asker(nn.Module):
    """Asks the weight of a layer that its parent calls for its kind, as vision models do."""

    def __init__(self):
        super().__init__()
        self.encoder = Caller()

    def forward(self, x):
        if isinstance(self.encoder.layer.weight, nn.Parameter) and self.encoder.layer.weight.ndim == 2:
            x = x.to(self.encoder.layer.weight.dtype)
        return self.encoder(x)[..., : self.encoder.layer.weight.shape[0]]


def test_a_weight_that_others_read_besides_the_calls_is_told_of_once():
    model, x = adapt(Decoder()), torch.randn(3, IN)
    with pytest.warns(UserWarning, match="encoder.layer is called in some places; in others its weight") as found:
        model(x)
    assert list_files(found) == {__file__} and not model.base_model.model.encoder.layer.bypassed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(x)
        adapt(Asker())(x)


class Twice(nn.Module):
    """One layer under two names, one of them below another module."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(IN, IN)
        self.rest = nn.Sequential(nn.Tanh(), self.first)

    def forward(self, x):
        return self.rest(self.first(x))


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_layer_under_two_names_is_adapted_under_both(copied):
    base, x = Twice(), torch.randn(3, IN)
    weight, bias = base.first.weight.detach().clone(), base.first.bias.detach()
    model = copied(get_peft_model(base, config(target_modules=["first"], init_weights=False)).eval())
    inner = model.base_model.model
    assert inner.first is inner.rest[1]
    whole = weight + inner.first.get_delta_weight("default")
    expected = F.linear(torch.tanh(F.linear(x, whole, bias)), whole, bias)
    torch.testing.assert_close(model(x), expected)
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear and merged.first is merged.rest[1]
    torch.testing.assert_close(merged(x), expected)


def test_a_layer_under_two_names_is_saved_and_loaded(tmp_path):
    base, x = Twice(), torch.randn(3, IN)
    clean = copy.deepcopy(base)
    model = get_peft_model(base, config(target_modules=["first"], init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        loaded = PeftModel.from_pretrained(clean, tmp_path)
    torch.testing.assert_close(loaded(x), model(x))
    plain = model.unload()
    assert type(plain.first) is nn.Linear and plain.first is plain.rest[1]
