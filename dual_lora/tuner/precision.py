"""Warnings of what training in 16 bits does to the factors: rounding them, or their products, to fewer bits than
float32's flips signs of D C, and a loss scale changes what the straight-through gradient clips.

All of it runs between the steps, never in compiled code.
"""

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from ..functional import suspend_autocast

if TYPE_CHECKING:
    from .factors import DualLoraFactors

# A warning is attributed to the first caller outside these packages. contextlib is among them because the first
# forwards run inside a context manager.
LIBRARIES = ("torch", "peft", "transformers", "accelerate", "dual_lora", "contextlib")
EXACT = ("none", "ieee", "highest")  # torch's names for float32 products in float32
PROBE_SIZE = 256  # rows and columns of a product that tells what a device does; some do otherwise with small ones
# What `nn.Module._apply` was called with in the casts that a warning has named; it is one object for the entire model.
_NAMED_CASTS: weakref.WeakSet = weakref.WeakSet()


def warn_of_low_precision(factors: Iterable["DualLoraFactors"]) -> None:
    """Warn that 16-bit factors are trained, which is never this package's doing: a complete model was cast, or a
    trainer casts what it trains."""
    low = {f.A.dtype for f in factors if f.A.dtype.itemsize < 4}
    if low:
        warnings.warn(
            f"Dual LoRA trains factors in {', '.join(map(str, low))}: rounding flips signs of D C. Cast them back "
            "before training: p.data = p.data.float() for every parameter p that requires a gradient.",
            stacklevel=find_stacklevel(),
        )


def warn_of_loss_scale(factors: Iterable["DualLoraFactors"]) -> None:
    """Warn, within an optimizer's step, that a GradScaler takes it: the gradient that ste="clip" clips is then that of
    the scaled loss. Gradients do not tell, but the scaler is among the callers."""
    clipping = any(
        f.variants["direction"] == "sign" and f.variants["ste"] == "clip" and f.C.requires_grad for f in factors
    )
    scaler = find_caller(torch.amp.GradScaler) if clipping else None
    if scaler is not None and scaler.is_enabled() and scaler.get_scale() != 1:
        warnings.warn(
            f"Dual LoRA: the loss is scaled by {scaler.get_scale():g}, and ste='clip' clips its scaled gradient, so C "
            "and D get another gradient than without scaling, mostly a far smaller one. Take ste='identity', or "
            "bfloat16, which needs no scaling.",
            stacklevel=find_stacklevel(),
        )


def find_caller(cls: type):
    """Return the nearest object of this class whose method is running, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), cls):
            return found
        frame = frame.f_back
    return None


def warn_of_cast(before: torch.dtype, after: torch.Tensor, fn: Callable) -> None:
    """Warn, once per cast of a model, that its factors went from float32 (or float64) to 16 bits.

    before: the dtype of the factors. after: one of them, cast; on the meta device there is nothing to round. fn: what
    `nn.Module._apply` was called with.
    """
    if before.itemsize < 4 or after.dtype.itemsize >= 4 or after.is_meta or fn in _NAMED_CASTS:
        return
    _NAMED_CASTS.add(fn)
    warnings.warn(
        f"Dual LoRA: this cast rounds the factors to {after.dtype}, which flips signs of D C for good: casting back "
        "does not restore them, reloading the adapter does. For 16 bits, cast the base model before it gets its "
        "adapter, or use autocast (the Trainer's bf16, not bf16_full_eval).",
        stacklevel=find_stacklevel(),
    )


def warn_of_rounded_products(factors: Iterable["DualLoraFactors"]) -> None:
    """Warn, once per kind of device, where torch's setting makes it take D C of these factors in fewer bits.

    As long as the setting is torch's default, this only reads it. Otherwise each device takes one product to show
    whether it heeds the setting.
    """
    if torch.compiler.is_compiling():
        return
    setting = _read_setting()
    if all(name in EXACT for name in setting):
        return
    products = {(f.C.device, f.C.shape[-2]) for f in factors if f.follows_float32_setting}
    for device, rank in products:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if device.type != "meta" and not capturing and _rounds_product(device, rank, setting):
            _warn_of_device(device.type)


def _read_setting() -> tuple[str, ...]:
    """Return the precision in which torch is to take float32 products, by its several names. From torch 2.9 on,
    `torch.get_float32_matmul_precision` raises if devices have settings of their own."""
    if not hasattr(torch.backends, "fp32_precision"):
        return (torch.get_float32_matmul_precision(),)
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@functools.cache
def _rounds_product(device: torch.device, rank: int, setting: tuple[str, ...]) -> bool:
    """Return whether a device, under this setting, rounds the factors of an out x rank by rank x in product."""
    entry = 1 + 2.0**-20  # float32 holds it; TF32, bfloat16 and two bfloat16 do not
    D = torch.zeros(PROBE_SIZE, rank, dtype=torch.float32, device=device)
    C = torch.zeros(rank, PROBE_SIZE, dtype=torch.float32, device=device)
    D[:, 0], C[0] = entry, 1.0
    with torch.no_grad(), suspend_autocast(device.type):
        return bool((D @ C).ne(entry).any())


@functools.cache
def _warn_of_device(device_type: str) -> None:
    triton = ', or kernel="triton", whose products are always float32' if device_type == "cuda" else ""
    warnings.warn(
        f"Dual LoRA: torch is set to take float32 products on {device_type} in fewer bits (TF32 or bfloat16), which "
        "flips signs of D C: computed or merged elsewhere or with another setting, the adapter is another function. "
        f'Use torch.set_float32_matmul_precision("highest"){triton}. tf32=True and torch_compile=True of '
        "TrainingArguments change that setting.",
        stacklevel=find_stacklevel(),
    )


def find_stacklevel() -> int:
    """Return the `stacklevel`, for the caller's warning, of the nearest line that is in none of LIBRARIES."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
