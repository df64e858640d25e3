"""Warnings of what rounds the factors to fewer bits than float32's, which flips signs of D C."""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .factors import DualLoraFactors

LIBRARIES = ("torch", "peft", "transformers", "accelerate", "dual_lora")  # a warning names the line that called them
# What `nn.Module._apply` was called with in the casts that a warning has named; it is one object for the whole model.
_NAMED_CASTS: weakref.WeakSet = weakref.WeakSet()


def warn_of_low_precision(factors: Iterable["DualLoraFactors"]) -> None:
    """Warn that 16-bit factors are trained, which is never this package's doing: a model was cast as a whole, or a
    trainer casts what it trains."""
    low = {f.A.dtype for f in factors if f.A.dtype.itemsize < 4}
    if low:
        warnings.warn(
            f"Dual LoRA trains factors in {', '.join(map(str, low))}: rounding flips signs of D C. Cast them back "
            "before training: p.data = p.data.float() for every parameter p that requires a gradient.",
            stacklevel=_find_stacklevel(),
        )


def warn_of_cast(before: torch.dtype, after: torch.dtype, fn: Callable) -> None:
    """Warn, once per cast of a model, that its factors went from float32 (or float64) to 16 bits.

    before, after: the dtype of the factors. fn: what `nn.Module._apply` was called with.
    """
    if before.itemsize < 4 or after.itemsize >= 4 or fn in _NAMED_CASTS:
        return
    _NAMED_CASTS.add(fn)
    warnings.warn(
        f"Dual LoRA: this cast rounds the factors to {after}, which flips signs of D C for good: casting back does not "
        "restore them, reloading the adapter does. For 16 bits, cast the base model before it gets its adapter, or use "
        "autocast (the Trainer's bf16 or fp16, not bf16_full_eval or fp16_full_eval).",
        stacklevel=_find_stacklevel(),
    )


def _find_stacklevel() -> int:
    """Return the `stacklevel`, for the caller's warning, of the nearest line that is in none of LIBRARIES."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
