"""Dual LoRA (arXiv 2512.03402) as a Hugging Face PEFT method: importing this package registers it with PEFT.

With DUAL_LORA_LAZY=1 in the environment neither torch nor peft is imported before the first public name is used.
"""

import importlib
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


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(f"{__name__}.tuner")  # registers
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


if os.environ.get("DUAL_LORA_LAZY") != "1":
    importlib.import_module(f"{__name__}.tuner")
