"""Dual LoRA (arXiv 2512.03402) as a Hugging Face PEFT method: importing this package registers it with PEFT.

With DUAL_LORA_LAZY=1 in the environment neither torch nor peft is imported before the first public name is used.
"""

import importlib
import logging
import os

_HOMES = {
    "DualLoraConfig": "tuner.config",
    "DualLoraLayer": "tuner.layer",
    "DualLoraModel": "tuner.model",
    "DualLoraWarmupCallback": "tuner.warmup",
    "delta_weight": "functional",
    "init_std": "functional",
    "set_update_scale": "tuner.warmup",
    "sign_ste": "functional",
}
__all__ = sorted(_HOMES)


def _import_tuner() -> None:
    """Import what registers the method with PEFT, and hide one warning: PEFT imports bitsandbytes, which on some CPUs
    warns that an optional package for faster 4-bit products is missing, even if nothing is in 4 bits."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def drop_warning(record: logging.LogRecord) -> bool:
        return "gemm_4bit_forward from kernels-community" not in str(record.msg)

    logger.addFilter(drop_warning)
    try:
        importlib.import_module(f"{__name__}.tuner")
    finally:
        logger.removeFilter(drop_warning)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_tuner()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


if os.environ.get("DUAL_LORA_LAZY") != "1":
    _import_tuner()
