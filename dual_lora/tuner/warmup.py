"""The ramp of f: one optimizer step, one step of the ramp, in any training loop.

Global hooks of torch's optimizers advance the adapters whose factors that optimizer trains. Nothing happens in
forward, so gradient accumulation and activation checkpointing do not affect the count. Each adapter's state is held in
two buffers of its factors (`step`, `update_scale`) and saved with them.

Several optimizers may train parts of one layer, one after the other or one within the step of another (as in
ZeroRedundancyOptimizer); each round of them counts once (`_count_step`).
"""

import itertools
import math
import weakref

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback

from .factors import ALL_FACTORS, DualLoraFactors
from .layer import DualLoraLayer
from .precision import warn_of_loss_scale, warn_of_low_precision, warn_of_rounded_products

_FACTORS_BY_OPTIMIZER: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# A logical clock. Per optimizer: when its current step began and its last one ended. Per layer: when its factors were
# last counted, and whether by the leading optimizer (`_count_step`).
_CLOCK = itertools.count(1)
_BEGUN: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_ENDED: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_COUNTED: weakref.WeakKeyDictionary[DualLoraFactors, tuple[int, bool]] = weakref.WeakKeyDictionary()


def list_factors(model: nn.Module) -> list[DualLoraFactors]:
    """Return every adapter's factors in the model."""
    return [m for m in model.modules() if isinstance(m, DualLoraFactors)]


@torch.no_grad()
def set_update_scale(model: nn.Module, factor: float, ramp: bool = False) -> None:
    """Set f by hand, for every Dual LoRA adapter in the model.

    factor: the new f. ramp: False ends the ramp, so that later optimizer steps leave f as set; True continues the ramp
    from the step nearest to f.

    Raises:
        ValueError: the model has no Dual LoRA adapter, an adapter is merged, whose dW would keep the f of the merge, or
            factor is NaN, infinite or, with ramp=True, outside [0, 1].
    """
    if not math.isfinite(factor):
        raise ValueError(f"factor={factor}: expected a finite number")
    factors = list_factors(model)
    if not factors:
        raise ValueError("the model has no Dual LoRA adapter")
    if ramp and not 0 <= factor <= 1:
        raise ValueError(f"factor={factor}: a ramp can only continue from a value in [0, 1]")
    if any(module.merged for module in model.modules() if isinstance(module, DualLoraLayer)):
        raise ValueError("an adapter is merged, with the f of that time; call unmerge_adapter() before setting f")
    for f in factors:
        f.set_update_scale(factor, ramp)


def is_trained(factors: DualLoraFactors) -> bool:
    """Return whether any of the factors has requires_grad."""
    return any(p.requires_grad for p in factors.parameters())


def _find_trained_factors(optimizer: Optimizer) -> tuple[set[int], list[weakref.ref]]:
    """Return the ids of the optimizer's parameters, and the factors of which it holds at least one."""
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    known = _FACTORS_BY_OPTIMIZER.get(optimizer)
    if known is None or known[0] != held:
        ids = set(held)
        found = [f for f in ALL_FACTORS if any(id(p) in ids for p in f.parameters())]
        _warn_of_precision(found)
        known = _FACTORS_BY_OPTIMIZER[optimizer] = held, ids, [weakref.ref(f) for f in found]
    return known[1:]


def _warn_of_precision(factors: list[DualLoraFactors]) -> None:
    """Warn of each setting under which an optimizer trains these factors differently than in float32."""
    warn_of_low_precision(factors)
    warn_of_rounded_products(factors)
    warn_of_loss_scale(factors)


@torch.compiler.disable  # their counters would make a compiled step compile again every time, whatever it trains
def _note_begin(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Note when the step began; where it raises and never ends, the next one overwrites this."""
    _BEGUN[optimizer] = next(_CLOCK)


@torch.compiler.disable
@torch.no_grad()
def _advance_ramps(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    held, references = _find_trained_factors(optimizer)
    begun, ended = _BEGUN.get(optimizer, next(_CLOCK)), _ENDED.get(optimizer, 0)
    for factors in (reference() for reference in references):
        if factors is not None:
            _count_step(factors, held, begun, ended)
    _ENDED[optimizer] = next(_CLOCK)


def _count_step(factors: DualLoraFactors, held: set[int], begun: int, ended: int) -> None:
    """Advance the ramp, unless another optimizer has counted this round.

    The optimizer that holds the first trained factor leads: its steps count. An optimizer that holds only later factors
    counts a step if no other has counted one since its own previous step. The leader's next step then does not count. A
    step within which another was counted does not count either.

    held: ids of the optimizer's parameters. begun, ended: when its step began, and when its previous one ended.
    """
    trained = [id(p) for p in factors.parameters() if p.requires_grad]
    if held.isdisjoint(trained):
        return
    leads = trained[0] in held
    counted, by_leader = _COUNTED.get(factors, (0, True))
    counts = counted <= (begun if leads and by_leader else min(begun, ended))
    if counts:
        factors.advance_ramp()
    if counts or leads:
        _COUNTED[factors] = next(_CLOCK), leads


register_optimizer_step_pre_hook(_note_begin)
register_optimizer_step_post_hook(_advance_ramps)


class DualLoraWarmupCallback(TrainerCallback):
    """Advances f once per optimizer step of a Hugging Face Trainer, unless the optimizer hook has done so.

    Only needed where the optimizer holds copies or flat partitions of the parameters (DeepSpeed); harmless elsewhere.
    """

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._before = [(f, int(f.step)) for f in list_factors(model) if is_trained(f)]

    def on_step_end(self, args, state, control, **kwargs):
        for factors, step in self._before:
            if int(factors.step) == step:
                factors.advance_ramp()
