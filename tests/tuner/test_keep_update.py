"""dW kept between the forwards of an optimizer step: the same bits, and never a stale one."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dual_lora import DualLoraConfig, set_update_scale
from dual_lora.kernels import recompute

OUT, IN, ROWS = 70, 48, 12
FUSED = {"fused_slices": {"0": [5, [1, 4]]}}


def build_model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = DualLoraConfig(r=8, target_modules=["0", "2"], scale_warmup_steps=3, **options)
    base = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN)).to(dtype)
    return get_peft_model(base, config).train()


def train(model, dtype=torch.float32, steps=4, accumulation=3):
    """Return the loss and every gradient of each micro-batch. The ramp moves f, the optimizer the factors."""
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulation):
            x = torch.randn(ROWS, IN, generator=draw).to(dtype).requires_grad_()
            loss = model(x).float().square().mean()
            loss.backward()
            found += [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
        optimizer.step()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"ste": "identity"}, FUSED, {"lora_dropout": 0.2}], ids=str)
def test_training_is_the_same_to_the_bit(dtype, options, monkeypatch):
    monkeypatch.setattr(recompute, "TILE", 7 * IN)
    torch.manual_seed(2)
    expected = train(build_model(dtype, **options), dtype)
    torch.manual_seed(2)
    found = train(build_model(dtype, keep_update=True, **options), dtype)
    assert all(map(torch.equal, found, expected)) and any(t.any() for t in found)


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.5])
def test_zeros_of_the_size_keep_their_sign(scale):
    """Half the entries of ReLU(B A) are 0; their gradient to the direction must not lose Sign(D C)."""
    models = [build_model(keep_update=kept) for kept in (False, True)]
    for model in models:
        set_update_scale(model, scale)
    found, expected = (train(model, steps=1, accumulation=2) for model in models)
    assert all(map(torch.equal, found, expected))


def count_rebuilds(monkeypatch):
    """Return a list that gets, for each rebuild, whether it was of dW from the factors and in a forward."""
    counted = []
    rebuild = recompute.rebuild

    def count(*args, **kwargs):
        counted.append(kwargs.get("dW") is None and kwargs.get("out") is None)
        return rebuild(*args, **kwargs)

    monkeypatch.setattr(recompute, "TORCH", recompute.Ops(count, recompute.project))
    monkeypatch.setattr("dual_lora.kernels.TORCH", recompute.TORCH)
    return counted


def test_dw_is_rebuilt_once_an_optimizer_step(monkeypatch):
    counted = count_rebuilds(monkeypatch)
    train(build_model(keep_update=True), steps=4, accumulation=3)
    assert sum(counted) == 4 * 2  # steps x layers
    counted.clear()
    train(build_model(), steps=4, accumulation=3)
    assert sum(counted) == 4 * 2 * 3


def test_blocks_of_fused_layers_are_rebuilt_once_too(monkeypatch):
    counted = count_rebuilds(monkeypatch)
    train(build_model(keep_update=True, **FUSED), steps=4, accumulation=3)
    assert sum(counted) == 4 * 3  # steps x blocks of both layers


@pytest.mark.parametrize("training", [True, False])
def test_what_inference_mode_computed_is_not_used_with_gradients(training):
    """bias="all" trains the bias, so that evaluation and training both keep dW alone."""
    found = []
    for infer in (False, True):
        model = build_model(keep_update=True, bias="all").train(training)
        set_update_scale(model, 1.0)
        if infer:
            with torch.inference_mode():
                model(torch.ones(ROWS, IN))
        found.append(train(model, steps=1))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("options", [{"kernel": "eager"}, {"direction": "identity"}], ids=str)
def test_plain_autograd_keeps_nothing(options):
    with pytest.raises(ValueError, match="keep_update=True: expected False with kernel='eager'"):
        DualLoraConfig(keep_update=True, **options)


def test_hardtanh_cannot_use_what_is_kept():
    with pytest.raises(ValueError, match="keep_update=True: expected False with ste='hardtanh'"):
        DualLoraConfig(keep_update=True, ste="hardtanh")


# A matrix cached by evaluation belongs to one base weight, and not to the next one at the same address.


SIZE, ROUNDS = 64, 12  # the allocator gives a freed address of this size back at once


WEIGHT = "base_model.model.0.base_layer.weight"


def free_and_assign(model, weight):
    base = model.get_submodule("base_model.model.0.base_layer")
    base.weight = None
    base.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return model


def empty_and_fill(model, weight):
    held = model.get_parameter(WEIGHT)
    held.data = torch.empty(0)
    held.data = weight.clone()
    return model


def call_with(model, weight):
    replaced = {WEIGHT: nn.Parameter(weight.clone(), requires_grad=False)}
    return lambda x: torch.func.functional_call(model, replaced, (x,))


@pytest.mark.parametrize("replace", [free_and_assign, empty_and_fill, call_with])
@torch.no_grad()
def test_a_weight_at_the_address_of_a_freed_one_is_not_taken_for_it(replace):
    torch.manual_seed(0)
    config = DualLoraConfig(r=8, target_modules=["0"], scale_warmup_steps=0)
    model = get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE)), config).eval()
    layer, x = model.base_model.model[0], torch.randn(3, SIZE)
    dW, bias = layer.get_delta_weight("default"), layer.base_layer.bias
    first = model.get_parameter(WEIGHT).clone()
    for number in range(ROUNDS):
        weight = first * (number + 1)
        call = replace(model, weight)
        torch.testing.assert_close(call(x), x @ weight.T + x @ dW.T + bias)
        del call, weight
