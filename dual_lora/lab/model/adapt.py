"""Methods: an adapter configuration as PEFT stores it, put on a model; and the optimizer a method asks for.

No method is known here by name. A method that PEFT has needs its yaml in conf/method/ and nothing else.
"""

from math import ceil
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
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


def build_adapter_config(settings: Settings, form: str, rows: int | None = None) -> PeftConfig:
    """Return the PEFT configuration of an adapter method for a task of `form`.

    rows: how many examples training sees an epoch, which the length of a ramp may depend on; None where it does not
    matter.

    Raises:
        UserError: PEFT knows no such method, or refuses a field.
    """
    fields: dict[str, Any] = dict(settings.method.peft)
    kind = fields.pop("peft_type")
    fields |= resolve_ramp(settings, fields, rows)
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


def resolve_ramp(settings: Settings, fields: dict[str, Any], rows: int | None) -> dict[str, int]:
    """Return the length of an update's ramp in optimizer steps, where the method has one and its settings give none."""
    if "scale_warmup_steps" not in fields or fields["scale_warmup_steps"] is not None:
        return {}
    share = settings.method.ramp_share or 0
    return {"scale_warmup_steps": 0 if rows is None else ceil(share * settings.count_steps(rows))}


def attach_method(model: PreTrainedModel, settings: Settings, form: str, rows: int | None = None) -> torch.nn.Module:
    """Return the model with the method on it and exactly its weights trainable. rows: see `build_adapter_config`.

    Raises:
        UserError: the method refuses its settings or finds nothing to adapt.
    """
    if settings.method.peft is None:
        if settings.init_from:
            load_init_weights(model, settings)
        return model.requires_grad_(True)
    adapter = build_adapter_config(settings, form, rows)
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


@torch.no_grad()
def start_ramp(model: torch.nn.Module) -> None:
    """Take the first step of every ramp that has not begun, so that the first optimizer step already trains the
    factors: at f = 0 they have no gradient."""
    for factors in factors_of(model):
        if int(factors.step) == 0:
            factors.advance()


def find_unfinished_ramp(model: torch.nn.Module) -> list[str]:
    """Return a warning where training ended before an update was at its full scale; none otherwise."""
    reached = min((float(factors.update_scale) for factors in factors_of(model)), default=1.0)
    if reached >= 1:
        return []
    return [f"the update was ramped up to {reached:.2g} of its scale only; train longer or shorten method.ramp_share"]


def name_rate(name: str, settings: Settings) -> tuple[str, float]:
    """Return the group a trained weight belongs to, and that group's learning rate: heads train at `train.head_lr`, the
    B matrices of LoRA+ at `method.lr_ratio` times the rate of the rest (arXiv 2402.12354), everything else at
    `train.lr`."""
    rate, parts = settings.train.lr, set(name.split("."))
    if "modules_to_save" in parts or settings.model.heads & parts:
        return "head", settings.train.head_lr or rate
    if settings.method.lr_ratio is not None and "lora_B" in parts:
        return "B", rate * settings.method.lr_ratio
    return ("weights" if settings.method.peft is None else "adapter"), rate


def split_by_rate(optimizer: torch.optim.Optimizer, model: torch.nn.Module, settings: Settings) -> None:
    """Split the groups of a fresh optimizer by learning rate, where there is more than one."""
    if settings.train.head_lr is None and settings.method.lr_ratio is None:
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name, rate = name_rate(names[parameter], settings)
            found.setdefault((number, name), {**group, "params": [], "lr": rate})["params"].append(parameter)
    optimizer.param_groups[:] = sorted(found.values(), key=lambda group: group["lr"] != settings.train.lr)


def list_rates(model: torch.nn.Module, settings: Settings) -> dict[str, float]:
    """Return the learning rate of every group of trained weights, by its name."""
    return dict(name_rate(name, settings) for name, p in model.named_parameters() if p.requires_grad)


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
