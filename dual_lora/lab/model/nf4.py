"""The frozen base model in 4 bits: NF4 with double quantization, as in QLoRA (arXiv 2305.14314, section 3), by
bitsandbytes.

Only linear weights are quantized. Embeddings, norms, biases and heads keep their type, so that runs with and without
`hardware.base` differ in nothing but 4-bit weights. PEFT's `prepare_model_for_kbit_training` would cast all of these to
float32 (4 GB more for a 70B model's embeddings, and activations twice as large) and recompute activations. RMS norms
compute in float32 anyway, and an adapter freezes the base by itself.
"""

import re
from math import ceil

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from dual_lora.lab.config.schema import Model, Settings

BLOCK, BLOCKS = 64, 256  # weights that share an 8-bit constant; constants that share a float32 one


def list_head_names(model: Model) -> set[str]:
    """Return the names of modules that stay as they are, with all below them."""
    return {"lm_head", *model.heads}


def get_quantization_options(settings: Settings) -> dict[str, BitsAndBytesConfig]:
    """Return the options of `from_pretrained` for a base in 4 bits; none for another."""
    if settings.hardware.base is None:
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.model.dtype),
        llm_int8_skip_modules=[rf"(?:.*\.)?{re.escape(name)}" for name in sorted(list_head_names(settings.model))],
    )
    return {"quantization_config": config}


def list_4bit_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and layer of every weight of a loaded model that is in 4 bits."""
    return [(name, layer) for name, layer in model.named_modules() if is_4bit(getattr(layer, "weight", None))]


def is_4bit(weight: object) -> bool:
    """Return whether a weight is held in 4 bits."""
    return getattr(weight, "quant_state", None) is not None


def keep_as_loaded(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights at the first evaluation, as it does on CPUs with AVX512-BF16. Repacking
    permanently rounds the quantization constants, and packed weights give no gradient."""
    for _, layer in list_4bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def compute_in_float32(model: nn.Module) -> nn.Module:
    """Return the model with everything computed in float32; the 4-bit weights stay as they are."""
    for _, layer in list_4bit_layers(model):
        layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
    return nn.Module.float(model)  # transformers' own refuses a model with anything in 4 bits


@torch.no_grad()
def copy_dequantized_weights(model: nn.Module, plain: nn.Module) -> None:
    """Copy the dequantized values of a model's 4-bit weights to an unquantized model, in float32."""
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in list_4bit_layers(compute_in_float32(model)):
        target, W = plain.get_submodule(name), dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        target.weight.copy_(W.T if isinstance(target, Conv1D) else W)


def list_quantizable_layers(model: nn.Module, known: Model) -> list[nn.Module]:
    """Return the layers of an unquantized model, with its method attached, that would be in 4 bits."""
    return [
        module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and not module.weight.requires_grad
        and not list_head_names(known) & set(name.split("."))
    ]


def count_nf4_bytes(entries: int) -> int:
    """Return the bytes of a weight in 4 bits with its constants: 4.127 bits an entry."""
    blocks = ceil(entries / BLOCK)
    return ceil(entries / 2) + blocks + 4 * ceil(blocks / BLOCKS)


def count_entries(weight: Tensor) -> int:
    """Return how many numbers a weight holds. A 4-bit weight holds two in each byte."""
    return weight.quant_state.shape.numel() if is_4bit(weight) else weight.numel()
