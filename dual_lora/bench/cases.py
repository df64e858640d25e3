"""What is measured: the contenders, and the layers and models that they adapt.

Every method has the parameters of LoRA at the given rank: Dual LoRA r1 + r2 = rank, LoHa rank / 2. Where the device has
fast products of bfloat16, Dual LoRA with `weight_gradient_dtype` and `input_gradient_dtype` takes part, and so does
LoRA with the same dL/dx: a frozen weight's product needs no more precision under LoRA than under Dual LoRA.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoHaConfig, LoraConfig, PeftConfig
from torch import Tensor, nn

from .. import DualLoraConfig
from ..kernels import explain_slow_bfloat16

DROPOUT = 0.1
LORA, LORA_16 = "LoRA", "LoRA, dL/dx in bf16"


@dataclass
class Contender:
    """A method: its config, whether its base takes dL/dx in bfloat16, and the LoRA that does all else the same."""

    config: PeftConfig
    rounds_base: bool = False
    peer: str = LORA

    @property
    def recomputes(self) -> bool:
        """Whether this is Dual LoRA as the kernels compute it."""
        return isinstance(self.config, DualLoraConfig) and self.config.kernel != "eager"


def list_contenders(rank: int, dropout: bool, bfloat16: bool) -> dict[str, Contender]:
    """Return the contenders, each of LoRA's parameter count at this rank.

    dropout: add those with dropout on the adapter's input. bfloat16: add those with gradients in bfloat16.
    """
    half, low = rank // 2, "bfloat16"
    dual = {"r": rank, "init_weights": False}
    found = {
        LORA: Contender(LoraConfig(r=rank)),
        "DoRA": Contender(LoraConfig(r=rank, use_dora=True)),
        "LoHa": Contender(LoHaConfig(r=half, alpha=half, init_weights=False)),
        "Dual LoRA, naive": Contender(DualLoraConfig(**dual, kernel="eager")),
        "Dual LoRA": Contender(DualLoraConfig(**dual)),
    }
    if bfloat16:
        both = DualLoraConfig(**dual, weight_gradient_dtype=low, input_gradient_dtype=low)
        found[LORA_16] = Contender(LoraConfig(r=rank), rounds_base=True, peer=LORA_16)
        found["Dual LoRA, G in bf16"] = Contender(DualLoraConfig(**dual, weight_gradient_dtype=low))
        found["Dual LoRA, G and dL/dx in bf16"] = Contender(both, peer=LORA_16)
    if dropout:
        peer = "LoRA, dropout"
        found[peer] = Contender(LoraConfig(r=rank, lora_dropout=DROPOUT), peer=peer)
        found["DoRA, dropout"] = Contender(LoraConfig(r=rank, use_dora=True, lora_dropout=DROPOUT), peer=peer)
        found["Dual LoRA, dropout"] = Contender(DualLoraConfig(**dual, lora_dropout=DROPOUT), peer=peer)
    return found


def has_fast_bfloat16(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether gradients in bfloat16 are another case than those in the layers' own dtype, and supported."""
    return dtype == torch.float32 and explain_slow_bfloat16(device.type) is None


class _LinearWithRoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, g: Tensor):
        (weight,) = ctx.saved_tensors
        return (g.bfloat16() @ weight.bfloat16()).to(g.dtype) if ctx.needs_input_grad[0] else None, None


class LinearWithRoundedGradient(nn.Linear):
    """A frozen linear layer that takes dL/dx in bfloat16, with float32 sums, as `input_gradient_dtype` does."""

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x in; result: ... x out."""
        y = _LinearWithRoundedGradient.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


def round_input_gradients(model: nn.Module) -> nn.Module:
    """Make every nn.Linear of a model one that takes dL/dx in bfloat16; return the model."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = LinearWithRoundedGradient
    return model


class Layer(nn.Module):
    """A square linear layer without bias, width x width, under a name that adapters can target ("layer")."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: tokens x width; result: tokens x width."""
        return self.layer(x)


@dataclass
class Case:
    """Something to adapt: its name, the base, the adapted modules, and a step of the adapted model.

    step: takes the adapted model and returns its forward pass, which returns its backward pass. dropout: whether
    contenders with dropout take part. inputs: tensors whose gradients a step accumulates.
    """

    name: str
    base: Callable[[], nn.Module]
    targets: list[str] | str
    step: Callable[[nn.Module], Callable[[], None]]
    dropout: bool
    dtype: torch.dtype
    inputs: tuple[Tensor, ...] = ()


def build_layer_case(width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Return the case of one square layer on random input, dL/dx included.

    width: in = out of the layer. tokens: rows of the input, tokens x width. dtype: of weight, input and gradient.
    """
    x = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    g = torch.randn(tokens, width, device=device, dtype=dtype)

    def step(model: nn.Module) -> Callable[[], None]:
        def forward_and_backward():
            y = model(x)
            return lambda: y.backward(g)

        return forward_and_backward

    name = f"layer {width} x {width}, {tokens} tokens, {str(dtype).removeprefix('torch.')}"
    return Case(name, lambda: Layer(width, dtype).to(device), ["layer"], step, True, dtype, (x,))


def build_model_case(path: str, batch: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """Return the case of a complete model on random tokens, all of its linear layers adapted.

    path: folder of a saved Hugging Face model; one that is not a causal language model is measured as a classifier.
    batch: rows and tokens. dtype: of the base weights.

    Raises:
        OSError, ValueError: transformers cannot read the folder's config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    known = AutoConfig.from_pretrained(path, trust_remote_code=False)
    causal = known.architectures and known.architectures[0].endswith(("CausalLM", "LMHeadModel"))
    cls = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    ids = torch.randint(10, known.vocab_size - 10, batch, device=device)
    labels = ids if causal else torch.zeros(batch[0], dtype=torch.long, device=device)

    def step(model: nn.Module) -> Callable[[], None]:
        def forward_and_backward():
            loss = model(input_ids=ids, labels=labels).loss
            return lambda: loss.backward()

        return forward_and_backward

    def base() -> nn.Module:
        return cls.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(device)

    name = f"{Path(path).name}, batch {batch[0]} x {batch[1]}, {str(dtype).removeprefix('torch.')}"
    return Case(name, base, "all-linear", step, False, dtype)
