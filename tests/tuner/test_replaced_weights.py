"""A matrix cached by evaluation belongs to one base weight, and not to the next one at the same address."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dual_lora import DualLoraConfig

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
