"""The map of `dual_lora.functional`, faster and smaller: plain torch (`recompute`) and Triton (`triton`)."""

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor

from .recompute import TORCH, GradientTypes, Ops, delta_weight, dual_linear

__all__ = [
    "GradientTypes",
    "Ops",
    "choose_ops",
    "delta_weight",
    "dual_linear",
    "explain_slow_bfloat16",
    "takes_ieee_products",
]


def choose_ops(kernel: str, device: torch.device) -> Ops:
    """Return the implementation of a `DualLoraConfig.kernel` on a device; plain torch, with a warning, without Triton.

    Triton runs on CUDA devices, and anywhere under its interpreter (TRITON_INTERPRET=1).
    """
    if kernel != "triton":
        return TORCH
    if not (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") or not _has_triton():
        _warn_once(device.type)
        return TORCH
    from .triton import TRITON

    return TRITON


def takes_ieee_products(ops: Ops, A: Tensor, C: Tensor) -> bool:
    """Return whether an implementation takes B A and D C in IEEE float32, whatever torch is set to do (such as TF32).

    A: (leading dimensions x) r1 x in, C: (leading dimensions x) r2 x in.
    """
    if ops is TORCH:
        return False
    from .triton import fits_shared_memory

    return fits_shared_memory(A, C)


@functools.cache
def explain_slow_bfloat16(device_type: str) -> str | None:
    """Return why a device takes products of bfloat16 no faster than of float32, or None if it does. On the meta device
    nothing is computed."""
    if device_type == "meta":
        return None
    if device_type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return None if fast else "this GPU has no bfloat16 units (compute capability 8.0 or newer has)"
    if device_type == "cpu":
        units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = units and torch.backends.mkldnn.is_available()
        return None if fast else "this processor has neither avx512_bf16 nor AMX, or torch is built without oneDNN"
    return f"not known to be faster on {device_type}"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(device: str) -> None:
    warnings.warn(
        f"kernel='triton' is unavailable on {device}; using plain torch. Install triton and use CUDA, or set "
        "kernel='auto'.",
        stacklevel=4,
    )
