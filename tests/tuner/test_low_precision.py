"""Factors that others have cast to 16 bits are trained with a warning."""

import warnings

import pytest
import torch
from peft import get_peft_model

from dual_lora import DualLoraConfig


def train(model: torch.nn.Module, steps: int) -> list[str]:
    """Return the warnings of a short training."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(torch.ones(2, 8)).float().sum().backward()
            optimizer.step()
    assert {warning.filename for warning in caught} <= {__file__}  # the line that steps
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_factors_are_warned_about_once_and_not_after_the_remedy(dtype):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), DualLoraConfig(r=4, target_modules=["0"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert train(model, 2) == []
    for p in trained:
        p.data = p.data.to(dtype)
    (message,) = train(model, 3)
    assert f"factors in {dtype}" in message and "p.data = p.data.float()" in message
    for p in trained:
        p.data, p.grad = p.data.float(), None
    assert train(model, 2) == []
