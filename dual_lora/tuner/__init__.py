"""Dual LoRA as a PEFT tuner; importing this package registers it."""

from .config import DualLoraConfig
from .layer import DualLoraLayer
from .model import DualLoraModel
from .register import register_method
from .warmup import set_update_scale

__all__ = ["DualLoraConfig", "DualLoraLayer", "DualLoraModel", "set_update_scale"]

register_method(DualLoraConfig, DualLoraModel)
