"""Methods: an adapter configuration as PEFT stores it, put on a model; and the optimizer a method asks for.

No method is known here by name. A method that PEFT has needs its yaml in conf/method/ and nothing else.
"""

from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, get_first_line, require, suggest_name, translate_read_errors
from dual_lora.lab.model.load import build_target_pattern, is_sharded
from dual_lora.lab.model.nf4 import count_entries, list_4bit_layers
from dual_lora.lab.record.identity import find_init_weights
from dual_lora.tuner.warmup import factors_of

TASK_TYPES = {
    "classification": TaskType.SEQ_CLS,
    "regression": TaskType.SEQ_CLS,
    "generation": TaskType.CAUSAL_LM,
}


def build_adapter_config(settings: Settings, form: str) -> PeftConfig:
    """Return the PEFT configuration of an adapter method for a task of `form`.

    Raises:
        UserError: PEFT knows no such method, or refuses a field.
    """
    fields: dict[str, Any] = dict(settings.method.peft)
    kind = fields.pop("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        hint = suggest_name(kind, [k.value for k in PEFT_TYPE_TO_CONFIG_MAPPING])
        raise UserError(f"method.peft.peft_type={kind}: PEFT has no such method.{hint}")
    fields.setdefault("target_modules", build_target_pattern(settings.model))
    if settings.model.head and form != "generation":
        fields.setdefault("modules_to_save", list(settings.model.head))
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type=TASK_TYPES[form], **fields)
    except Exception as error:  # whatever PEFT raises over fields it is given
        raise UserError(f"method.peft ({settings.method.name}): {get_first_line(error)}") from error


def attach_method(model: PreTrainedModel, settings: Settings, form: str) -> torch.nn.Module:
    """Return the model with the method on it and exactly its weights trainable.

    Raises:
        UserError: the method refuses its settings or finds nothing to adapt.
    """
    if settings.method.peft is None:
        if settings.init_from:
            load_init_weights(model, settings)
        return model.requires_grad_(True)
    adapter = build_adapter_config(settings, form)
    try:
        adapted = get_peft_model(model, adapter)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        where = f"method={settings.method.name} on model={settings.model.name}"
        reads = "DTensor" in str(error)
        said = (
            "it starts from the base weights, which are sharded; take hardware=ddp" if reads else get_first_line(error)
        )
        raise UserError(f"{where}: {said}") from error
    if settings.init_from:
        load_init_weights(adapted, settings)
    for factors in factors_of(adapted) if is_sharded(model) else ():
        factors.keeps = False  # each device would hold an update as large as the whole weight
    return adapted


def load_init_weights(model: torch.nn.Module, settings: Settings) -> None:
    """Give the model the weights of the run `init_from` names, all but those of its head, which stay fresh.

    Raises:
        UserError: they do not fit.
    """
    file = find_init_weights(settings)
    with translate_read_errors(f"init_from={settings.init_from}: cannot read {file.name}", "take another run"):
        weights = load_file(file)
    heads = settings.model.heads
    own = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    shared = {name for name in getattr(model, "_tied_weights_keys", None) or () if name not in weights}
    own = {name: t for name, t in own.items() if name not in shared}  # a file has what is tied once
    chosen = {name: t if heads & set(name.split(".")) else weights.pop(name, None) for name, t in own.items()}
    left = [name for name in weights if not heads & set(name.split("."))]
    other = left + [name for name, t in chosen.items() if t is None or t.shape != own[name].shape]
    require(
        not other,
        f"init_from={settings.init_from}: does not fit at {other[:1]}; take the run's own model.adapt and method.rank",
    )
    if not isinstance(model, PeftModel):
        model.load_state_dict(chosen, strict=not shared)
        return
    set_peft_model_state_dict(model, chosen)
    for factors in factors_of(model):  # a ramp of another length must not start anew in its middle
        factors.set_update_scale(1.0, ramp=False)


def merge_adapter(model: torch.nn.Module) -> bool:
    """Merge the adapter where that loses nothing, so that evaluation runs at the base model's speed, and return whether
    it was done; in 16 bits the base weights would round much of an update away, in 4 bits nearly all."""
    plain = model.dtype == torch.float32 and not is_sharded(model) and not list_4bit_layers(model)
    able = isinstance(model, PeftModel) and plain
    if able:
        model.merge_adapter()
    return able


def build_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer | None:
    """Return the optimizer the method asks for, or None for the Trainer's own AdamW."""
    ratio = settings.method.lr_ratio
    if ratio is None:
        return None
    lr, decay = settings.train.lr, settings.train.weight_decay
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay
    )


def list_kernels(model: torch.nn.Module) -> list[str]:
    """Return how adapters that can be computed in several ways are computed here; empty for others."""
    return sorted({factors.kernel_used for factors in factors_of(model)})


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Return how many weights there are, how many train, and how many of those are the adapter's (without heads)."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    heads = sum(n for name, n in trained.items() if "modules_to_save" in name)
    return {
        # beside a head that trains PEFT keeps the original
        "parameters": sum(count_entries(p) for name, p in model.named_parameters() if ".original_module." not in name),
        "trainable_parameters": sum(trained.values()),
        "adapter_parameters": sum(trained.values()) - heads if hasattr(model, "peft_config") else 0,
    }
