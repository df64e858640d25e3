"""The kinds of layer under test: how to build one, feed it, and apply a weight update to it by hand."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dual_lora import DualLoraConfig, set_update_scale

OUT, IN = 12, 10


@dataclass(frozen=True)
class Kind:
    base: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    # (input, dW as out x in) -> the adapter's own term, by plain torch
    term: Callable[[Tensor, Tensor], Tensor]
    dropout: bool = True


def _floats(*shape):
    return lambda: torch.randn(*shape)


KINDS = {
    "linear": Kind(lambda: nn.Linear(IN, OUT), _floats(4, 5, IN), F.linear),
    "conv1d_gpt2": Kind(lambda: Conv1D(OUT, IN), _floats(4, 5, IN), F.linear),
    "conv1d_gpt2_square": Kind(lambda: Conv1D(IN, IN), _floats(4, 5, IN), F.linear),
    "embedding": Kind(
        lambda: nn.Embedding(IN, OUT),
        lambda: torch.randint(0, IN, (4, 5)),
        lambda ids, dW: F.embedding(ids, dW.T),
        dropout=False,
    ),
    "conv1d": Kind(
        lambda: nn.Conv1d(4, OUT, 3, padding=1),
        _floats(2, 4, 9),
        lambda x, dW: F.conv1d(x, dW.view(OUT, 4, 3), padding=1),
    ),
    "conv2d": Kind(
        lambda: nn.Conv2d(4, OUT, 3, stride=2),
        _floats(2, 4, 9, 9),
        lambda x, dW: F.conv2d(x, dW.view(OUT, 4, 3, 3), stride=2),
    ),
    "conv2d_groups": Kind(
        lambda: nn.Conv2d(4, OUT, 3, groups=2),
        _floats(2, 4, 9, 9),
        lambda x, dW: F.conv2d(x, dW.view(OUT, 2, 3, 3), groups=2),
    ),
}


class Net(nn.Module):
    """One layer, as a model PEFT can adapt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def config(**fields) -> DualLoraConfig:
    """Unequal ranks, alpha != rank, factors large enough for dW to matter."""
    fields = {"r1": 2, "r2": 4, "lora_alpha": 7, "init_std": 0.4, "target_modules": ["layer"], **fields}
    return DualLoraConfig(**fields)


def adapted(base: nn.Module, f: float = 0.8, dtype: torch.dtype = torch.float32, **fields):
    """The base layer in a PEFT model at ramp factor f."""
    model = get_peft_model(Net(base).to(dtype), config(**fields))
    set_update_scale(model, f)
    return model


def layer_of(model):
    return model.base_model.model.layer


def factors_of(model, adapter: str = "default"):
    return layer_of(model).dual_lora_factors[adapter]


def named_factors(factors) -> dict[str, Tensor]:
    return {name: getattr(factors, name) for name in "ABCD"}


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def list_files(found: list[warnings.WarningMessage]) -> set[str]:
    """Return the files whose lines our warnings among these name."""
    return {warning.filename for warning in found if "Dual LoRA" in str(warning.message)}
