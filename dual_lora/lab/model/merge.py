"""Adapters merged into the base weights: whether a method can be merged, and doing it.

Not every PEFT method can be merged, and some only on some layers. Therefore a copy of one layer of each kind is merged
first and its outputs are compared, so that the model itself is never left half merged.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dual_lora.lab.errors import get_first_line, is_out_of_memory, require
from dual_lora.lab.model.load import is_sharded
from dual_lora.lab.model.nf4 import list_4bit_layers

# Largest relative error (norm over norm) of a merged layer's outputs; float32 rounding stays below 1e-5.
MERGE_TOLERANCE = 1e-3
# Standard deviation of the noise added to an adapter before the comparison: many adapters start as a no-op, where any
# merge looks right.
PROBE_NOISE = 0.01
PROBE_INPUTS = 4  # random inputs of a layer on which merged and unmerged outputs are compared


def merge_adapter(model: nn.Module) -> bool:
    """Merge the adapter where that loses nothing, so that evaluation runs at the base model's speed. Return whether it
    was merged.

    In 16 bits the base weights would round much of an update away, in 4 bits nearly all of it. A method that PEFT
    cannot merge is evaluated as it was trained.
    """
    plain = model.dtype == torch.float32 and not is_sharded(model) and not list_4bit_layers(model)
    able = isinstance(model, PeftModel) and plain and explain_unmergeable(model) is None
    if able:
        model.merge_adapter()
    return able


def explain_unmergeable(model: PeftModel) -> str | None:
    """Return why the adapter cannot be merged into the base weights; None if it can."""
    tuner = model.base_model
    if not isinstance(tuner, BaseTuner):
        return "it does not change weights"
    try:
        tuner._check_merge_allowed()
        shared = find_shared_layers(tuner)
        for layer in iterate_layer_kinds(tuner, shared):
            check_layer_merge(layer, layer in shared)
    except Exception as error:  # whatever PEFT raises, of any type
        if is_out_of_memory(error):
            raise
        return get_first_line(error).rstrip(".")
    return None


def find_shared_layers(model: nn.Module) -> set[BaseTunerLayer]:
    """Return the adapted layers whose base layer or its weights are also used elsewhere in the model: by a head that is
    tied to the embedding, by a repeated block, or under the base layer's second name."""
    holders = Counter()
    for module in model.modules():
        holders.update([*module._parameters.values(), *module._modules.values()])
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    bases = {layer: layer.get_base_layer() for layer in layers}
    return {layer for layer, base in bases.items() if any(holders[held] > 1 for held in (base, *base.parameters()))}


def iterate_layer_kinds(model: nn.Module, shared: set[BaseTunerLayer]) -> Iterator[BaseTunerLayer]:
    """Yield one adapted layer of each kind: class, base layer's class and shapes, whether its weights are shared."""
    seen = set()
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            kind = (type(layer), type(base), layer in shared, *((name, p.shape) for name, p in base.named_parameters()))
            if kind not in seen:
                yield layer
            seen.add(kind)


@torch.no_grad()
def check_layer_merge(layer: BaseTunerLayer, shared: bool) -> None:
    """Merge a copy of a layer, in float32 and with noise on its adapter, and compare what it computes.

    shared: whether another module uses the base weights, which must then stay as they are: no adapter acted there. A
    method may give the merged layer a weight of its own, as Dual LoRA does.

    Raises:
        UserError: the outputs differ, or shared weights were written to.
        Exception: what PEFT raises where it cannot merge.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probe = copy.deepcopy(layer).float().eval()
        for name, weight in probe.named_parameters():
            if "base_layer" not in name:
                weight.add_(PROBE_NOISE * torch.randn(weight.shape).to(weight))
        inputs = draw_inputs(probe.get_base_layer())
        before = None if inputs is None else probe(inputs)
        held = list(probe.get_base_layer().parameters())
        values = [weight.clone() for weight in held]
        probe.merge()
        kept = all(map(torch.equal, held, values))
        require(
            kept or not shared, "an adapted layer shares its weights with another module, which merging would change"
        )
        if before is not None:
            error = (probe(inputs) - before).norm() / before.norm()
            require(bool(error < MERGE_TOLERANCE), f"merged, a layer computes something else (by {error:.1e})")


def draw_inputs(base: nn.Module) -> Tensor | None:
    """Return a few random inputs of a layer; None for kinds that are merged without a comparison (convolutions)."""
    weight = base.weight
    if isinstance(base, nn.Embedding):
        return torch.randint(0, base.num_embeddings, (PROBE_INPUTS,), device=weight.device)
    if weight.ndim > 2:
        return None
    width = weight.shape[0] if isinstance(base, Conv1D) else weight.shape[-1]
    return torch.randn(PROBE_INPUTS, width).to(weight)


def merge_and_unload(model: PeftModel) -> PreTrainedModel:
    """Return the base model with the adapter merged and the trained heads in place, without a trace of PEFT."""
    place_trained_modules(model)
    return model.merge_and_unload()


def unload_adapter(model: nn.Module) -> nn.Module:
    """Return a trained model without PEFT's wrapper, with whatever else trained in place. The adapter is merged, if
    that is possible: some are no more than other values of a norm."""
    if not isinstance(model, PeftModel):
        return model
    merges = explain_unmergeable(model) is None
    place_trained_modules(model)
    with warnings.catch_warnings(action="ignore"):  # of a ramp that has not ended, or of updates rounded in 16 bits
        return model.merge_and_unload() if merges else model.unload()


def place_trained_modules(model: PeftModel) -> None:
    """Put trained heads and other modules that PEFT copied in place of the originals.

    Most methods' own unloading looks for a `weight` in every trained module and crashes on a head of several layers.
    """
    adapter = model.active_adapter
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], module.modules_to_save[adapter])
