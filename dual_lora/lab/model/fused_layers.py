"""Fused layers as one linear layer per block of their outputs, and back.

GPT-2 computes queries, keys and values in one layer, `c_attn`. LoRA's experiments on it adapt the blocks of the queries
and the values only (arXiv 2106.09685, section 7.1 and table 11). Split, each block is an ordinary linear layer that any
PEFT method adapts. The outputs are the same, and fused again the weights are those of the plain model.
"""

import re

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import require


class SplitLayer(nn.Module):
    """A fused layer, in -> blocks * out, as one linear layer (in -> out) per block, called by its role."""

    def __init__(self, fused: Conv1D, roles: list[str]) -> None:
        super().__init__()
        blocks = zip(roles, fused.weight.T.chunk(len(roles)), fused.bias.chunk(len(roles)), strict=True)
        for role, weight, bias in blocks:
            layer = nn.Linear(*weight.T.shape, device="meta")
            layer.weight, layer.bias = (nn.Parameter(part.detach().contiguous()) for part in (weight, bias))
            self.add_module(role, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the fused layer does. x: ... x in; returns ... x (blocks * out)."""
        return torch.cat([layer(x) for layer in self.children()], -1)

    def fuse(self) -> Conv1D:
        """Return the blocks as the one layer they were."""
        layers = list(self.children())
        with torch.device("meta"):
            fused = Conv1D(sum(layer.out_features for layer in layers), layers[0].in_features)
        fused.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]).T.contiguous())
        fused.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]))
        return fused


def split_layers(model: nn.Module, settings: Settings) -> None:
    """Replace each layer that `model.split` names by its blocks, in place. Full tuning keeps the model as it is.

    Raises:
        UserError: the model has no such layer, or not one whose blocks are known to lie side by side.
    """
    if not settings.splits_layers:
        return
    chosen, where = settings.model, f"model.split={settings.model.split}"
    pattern = re.compile(rf"(?:.*\.)?(?:{chosen.roles[chosen.split[0]]})")
    fused = {name: layer for name, layer in model.named_modules() if pattern.fullmatch(name)}
    require(fused, f"{where}: {chosen.name} has no module {pattern.pattern}; name its roles' modules in model.roles")
    for name, layer in fused.items():
        splits_evenly = isinstance(layer, Conv1D) and layer.nf % len(chosen.split) == 0
        require(
            splits_evenly, f"{where}: {name} is not a fused layer of equal blocks, as GPT-2's is; take model.split=[]"
        )
        model.set_submodule(name, SplitLayer(layer, chosen.split))


def fuse_layers(model: nn.Module) -> nn.Module:
    """Return the model with its split layers fused again, as plain transformers has them."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SplitLayer):
            model.set_submodule(name, layer.fuse())
    return model
