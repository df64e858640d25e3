"""The memory that a training step needs beyond weights: what autograd keeps from forward to backward."""

import gc
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Held:
    """A tensor as autograd holds it: it dies with the graph that holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure_kept_bytes(model: nn.Module, step: Callable) -> int:
    """Return the bytes that autograd holds between `step` and the backward pass that it returns, other than weights.

    This works on the meta device, too.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        kept = Held(tensor.detach())
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        backward = step()
        while gc.collect():  # a dropped graph may wait for it, and hold another
            pass
        storages = {kept.tensor.untyped_storage()._cdata: kept.tensor.untyped_storage().nbytes() for kept in held}
    found = sum(size for storage, size in storages.items() if storage not in parameters)
    backward()
    return found
