"""The map of `dual_lora.functional`, faster and smaller: plain torch (`recompute`) and Triton (`triton`)."""

import functools
import importlib.util
import os
import warnings

import torch

from .recompute import TORCH, Ops, delta_weight, dual_linear

__all__ = ["Ops", "delta_weight", "dual_linear", "choose_ops"]


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


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(device: str) -> None:
    warnings.warn(f"kernel='triton': no Triton for {device} here, plain torch instead.", stacklevel=4)
