"""Makes Dual LoRA known to PEFT, which has a function for that but wants the name in its PeftType enum first."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "DUAL_LORA"


def add_peft_type(name: str) -> PeftType:
    """Return the member `name` of PEFT's PeftType enum, added if it is not there."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return PeftType[name]


def register_method(config_cls: type, model_cls: type) -> None:
    """Register the method under DUAL_LORA / dual_lora_. Repeating it does nothing.

    PEFT has no entry points: before this has run, loading an adapter of ours ends in KeyError: 'DUAL_LORA'.

    Raises:
        RuntimeError: another package holds the name.
    """
    holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(NAME)
    if holder is None:
        add_peft_type(NAME)
        register_peft_method(name="dual_lora", config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    elif holder is not config_cls:
        raise RuntimeError(f"PEFT already knows a method {NAME}: {holder.__module__}.{holder.__qualname__}")
