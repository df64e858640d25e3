"""The ramp of f: one optimizer step, one step of the ramp, in any training loop.

A global hook of torch's optimizers advances the adapters whose factors that optimizer trains. Nothing happens in
forward, so gradient accumulation and activation checkpointing do not affect the count. Each adapter's state is held in
two buffers of its factors (`step`, `update_scale`) and saved with them.
"""

import math
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from transformers import TrainerCallback

from .factors import ALL_FACTORS, DualLoraFactors
from .precision import warn_of_low_precision, warn_of_rounded_products

_FACTORS_BY_OPTIMIZER: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def list_factors(model: nn.Module) -> list[DualLoraFactors]:
    """Every adapter's factors in the model."""
    return [m for m in model.modules() if isinstance(m, DualLoraFactors)]


@torch.no_grad()
def set_update_scale(model: nn.Module, factor: float, ramp: bool = False) -> None:
    """Set f by hand, for every Dual LoRA adapter in the model.

    factor: the new f. ramp: False ends the ramp, so that later optimizer steps leave f as set; True continues the ramp
    from the step nearest to f.

    Raises:
        ValueError: the model has no Dual LoRA adapter, or factor is NaN, infinite or, with ramp=True, outside [0, 1].
    """
    if not math.isfinite(factor):
        raise ValueError(f"factor={factor}: expected a finite number")
    factors = list_factors(model)
    if not factors:
        raise ValueError("the model has no Dual LoRA adapter")
    if ramp and not 0 <= factor <= 1:
        raise ValueError(f"factor={factor}: a ramp can only continue from a value in [0, 1]")
    for f in factors:
        f.set_update_scale(factor, ramp)


def describe_unfinished_ramp(states: Iterable[tuple[Tensor | int, Tensor | float, int]]) -> str | None:
    """Return the end of a sentence about the least advanced unfinished ramp; None if all ramps have ended.

    states: (optimizer steps done, f, steps of the ramp) for each layer. An f set by hand ends the ramp.
    """
    open_ramps = [(float(f), int(step), steps) for step, f, steps in states if int(step) < steps and float(f) < 1]
    if not open_ramps:
        return None
    f, step, steps = min(open_ramps)
    return (
        f"at f = {f:.3g}, {step} of {steps} steps into its ramp, so it computes only that fraction of dW. Train "
        "longer, set scale_warmup_steps well below the number of optimizer steps, or end the ramp with "
        "dual_lora.set_update_scale(model, 1.0)."
    )


def find_first_trained(factors: DualLoraFactors, default: nn.Parameter | None = None) -> nn.Parameter | None:
    """The first of the factors that has requires_grad; `default` if none has."""
    return next((p for p in factors.parameters() if p.requires_grad), default)


def _find_trained(optimizer: Optimizer) -> list[weakref.ref]:
    """The factors whose first trained parameter this optimizer holds, so that exactly one optimizer advances each."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    known = _FACTORS_BY_OPTIMIZER.get(optimizer)
    if known is None or known[0] != held:
        ids = set(held)
        found = [f for f in ALL_FACTORS if id(find_first_trained(f, f.A)) in ids]
        warn_of_low_precision(found)
        warn_of_rounded_products(found)
        known = _FACTORS_BY_OPTIMIZER[optimizer] = held, [weakref.ref(f) for f in found]
    return known[1]


@torch.no_grad()
def _advance_ramps(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for ref in _find_trained(optimizer):
        factors = ref()
        if factors is not None and find_first_trained(factors) is not None:
            factors.advance_ramp()


register_optimizer_step_post_hook(_advance_ramps)


class DualLoraWarmupCallback(TrainerCallback):
    """Advances f once per optimizer step of a Hugging Face Trainer, unless the optimizer hook has done so.

    Only needed where the optimizer holds copies or flat partitions of the parameters (DeepSpeed); harmless elsewhere.
    """

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._before = [(f, int(f.step)) for f in list_factors(model) if find_first_trained(f) is not None]

    def on_step_end(self, args, state, control, **kwargs):
        for factors, step in self._before:
            if int(factors.step) == step:
                factors.advance_ramp()
