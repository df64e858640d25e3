"""Base models and tokenizers, from a folder, a GGUF file or the hub: no pickle, no code from the model's repository."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig

from dual_lora.lab.config.schema import Model, Settings
from dual_lora.lab.config.tasks import translate_task_errors
from dual_lora.lab.errors import require, translate_read_errors
from dual_lora.lab.inputs.gguf import (
    SAVED_MODEL_REMEDY,
    is_gguf_file,
    link_alone,
    load_gguf_tokenizer,
    read_gguf_header,
)
from dual_lora.lab.inputs.hub import use_cache_if_unreachable
from dual_lora.lab.inputs.model_files import find_model
from dual_lora.lab.model.encode import apply_chat_template
from dual_lora.lab.model.nf4 import copy_dequantised_weights, get_quantisation_options, keep_as_loaded, list_4bit_layers
from dual_lora.lab.system.distributed import count_processes, has_several_processes
from tasks import Task

NO_CODE = {"trust_remote_code": False}  # given outright: transformers would ask the terminal


def locate_model(settings: Settings) -> dict[str, str | bool | None]:
    """Return where `from_pretrained` finds the model: a folder, a GGUF file, or a hub id with its revision."""
    path, file = find_model(settings), find_gguf_file(settings)
    if file:
        return {"pretrained_model_name_or_path": link_alone(file).name, "gguf_file": file.name, **NO_CODE}
    if path:
        return {"pretrained_model_name_or_path": str(path), **NO_CODE}
    use_cache_if_unreachable(models=True)
    return {"pretrained_model_name_or_path": settings.model.hub, "revision": settings.model.revision, **NO_CODE}


def translate_model_errors(settings: Settings) -> AbstractContextManager[None]:
    """Turn a failure to find, fetch or read a model into one line."""
    where = find_model(settings) or locate_model(settings)["pretrained_model_name_or_path"]
    return translate_read_errors(
        f"model={settings.model.name}: cannot load {where}", "give model.path=DIR, a whole saved model"
    )


def load_model(settings: Settings, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model with the head the task's form needs, and its tokenizer. A GGUF file's weights are unpacked.

    Raises:
        UserError: the model is neither at `model.path` nor to be had from the hub.
    """
    settings.hardware.check_installed()
    tokenizer = load_tokenizer(settings)
    options = {"dtype": get_weight_dtype(settings), "use_safetensors": True, **get_head_options(task)}
    options |= get_quantisation_options(settings)
    file = find_gguf_file(settings)
    if file:
        options["quantization_config"] = GgufConfig(dequantize=True)
    with translate_model_errors(settings):
        options |= get_shard_options(settings, task)
        model, found = get_head_class(task).from_pretrained(
            **locate_model(settings), **options, output_loading_info=True
        )
    keep_as_loaded(model)
    cast_trained_to_float32(model, settings, task)
    fresh = settings.model.heads
    lacking = sorted(name for name in found["missing_keys"] if not fresh & set(name.split(".")))
    require(
        not lacking,
        f"model={settings.model.name}: its weights lack {len(lacking)} that its config.json asks for, first "
        f"{lacking[:1]}; they are another model's",
    )
    if file:
        model.name_or_path = model.config.name_or_path = ""  # PEFT would look for a config.json there, also on the hub
        check_all_weights_read(model, file)
    known, asked = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    require(
        asked < known, f"model={settings.model.name}: its tokenizer goes to {asked}, the model knows {known} tokens"
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def get_weight_dtype(settings: Settings) -> torch.dtype:
    """Return what the model's weights are held in: `model.dtype`, but float32 where all of them train. In 16 bits a
    usual step is less than the distance to the next number, and AdamW's means never decay; products are taken in
    `model.dtype` all the same (`autocast`)."""
    return torch.float32 if settings.method.peft is None else getattr(torch, settings.model.dtype)


def cast_trained_to_float32(model: PreTrainedModel, settings: Settings, task: Task) -> None:
    """Hold in float32, too, what an adapter method trains of the base model: heads, and what it is told to train."""
    heads = settings.model.heads if task.form != "generation" else set()
    names = heads | set((settings.method.peft or {}).get("modules_to_save") or ())
    for name, weight in model.named_parameters():
        if names & set(name.split(".")) and weight.dtype.itemsize < 4:
            weight.data = weight.data.float()


def autocast_products(model: torch.nn.Module, settings: Settings, task: Task) -> AbstractContextManager[None]:
    """Take products in `model.dtype` outside of training as the Trainer does in it, where weights of other types meet:
    those of a head, and all that were trained."""
    kind, mixed = getattr(torch, settings.model.dtype), task.form != "generation" or settings.method.peft is None
    return torch.autocast(model.device.type, kind, enabled=mixed and kind.itemsize < 4)


def explain_unshardable(settings: Settings, task: Task, kind: type) -> str | None:
    """Return why FSDP2 cannot share out a model of this class for this task and method; None if it can."""
    if task.form != "generation":
        return f"not for {task.name}, whose head trains"
    if not getattr(kind, "_fsdp_plan", None):
        return f"transformers cannot shard a {kind.config_class.model_type}"
    if settings.method.peft is None and settings.model.dtype == "float16":
        return "transformers shards full tuning in bfloat16 or float32"
    if (settings.method.peft or {}).get("use_dora"):
        return f"method={settings.method.name} starts from the base weights, which are sharded"
    return None


def get_shard_options(settings: Settings, task: Task) -> dict[str, DistributedConfig]:
    """Return how the processes of a run share out the weights as they read them: each its part of each (FSDP2), or,
    as replicas or alone, everything."""
    if settings.hardware.sharding != "full" or not has_several_processes():
        return {}
    config = AutoConfig.from_pretrained(**locate_model(settings))
    why = explain_unshardable(settings, task, get_head_class(task)._model_mapping[type(config)])
    require(why is None, f"hardware.sharding=full: {why}; take hardware=ddp")
    mixed = settings.model.dtype == "bfloat16" and settings.method.peft is None
    return {"distributed_config": DistributedConfig(fsdp_size=count_processes(), fsdp_mixed_precision=mixed)}


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether this process holds but a part of each weight."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


def find_gguf_file(settings: Settings) -> Path | None:
    """Return the GGUF file the model is read from, if it is."""
    path = find_model(settings)
    return path if path and is_gguf_file(path) else None


def check_all_weights_read(model: PreTrainedModel, file: Path) -> None:
    """Refuse a GGUF file with more weights than the model that transformers made of it has places for. Those of experts
    are not counted: transformers joins them."""
    held = sum("_exps" not in name for name in read_gguf_header(file).tensors)
    taken = len(list(model.parameters()))
    kind = type(model).__name__
    require(held <= taken, f"model.path={file}: holds {held} weights, {kind} takes {taken}; {SAVED_MODEL_REMEDY}")


def load_dequantised_model(settings: Settings, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return as `load`, but of a base in 4 bits a plain model with the values these stand for, in float32.

    Raises:
        UserError: as `load`.
    """
    model, tokenizer = load_model(settings, task)
    if settings.hardware.base is None:
        return model, tokenizer
    plain, _ = load_model(replace(settings, hardware=replace(settings.hardware, base=None)), task)
    copy_dequantised_weights(model, plain.float())
    return plain, tokenizer


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; one without a padding token pads with the end of text (masked everywhere)."""
    file = find_gguf_file(settings)
    with translate_model_errors(settings):
        tokenizer = load_gguf_tokenizer(file) if file else AutoTokenizer.from_pretrained(**locate_model(settings))
    bare = len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids))  # transformers makes one up
    require(not bare, f"model={settings.model.name}: no tokenizer beside the model; save it into the same folder")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.model.chat:
        where = f"model.chat=true: {settings.model.name}"
        require(bool(tokenizer.chat_template), f"{where}'s tokenizer has no chat template; take model.chat=false")
        with translate_read_errors(f"{where}'s chat template takes no single prompt", "take model.chat=false"):
            apply_chat_template(tokenizer, [{"role": "user", "content": "a prompt"}])
    return tokenizer


def move_to_device(model: torch.nn.Module) -> None:
    """Move a model to the accelerator, if there is one, as the Trainer does for training. What is in 4 bits or shared
    out was loaded there."""
    if torch.cuda.is_available() and not list_4bit_layers(model) and not is_sharded(model):
        model.to("cuda")


def get_head_class(task: Task) -> type:
    return AutoModelForCausalLM if task.form == "generation" else AutoModelForSequenceClassification


def get_head_options(task: Task) -> dict:
    if task.form == "classification":
        with translate_task_errors():
            labels = task.labels  # of a task on the user's own files, read from there
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    return {"num_labels": 1, "problem_type": "regression"} if task.form == "regression" else {}


def build_target_pattern(model: Model) -> str:
    """Return the regular expression of the module names that `model.adapt` chooses, for PEFT's `target_modules`."""
    ends = sorted({model.roles[role] for role in model.adapt})
    return rf"(?:.*\.)?(?:{'|'.join(ends)})"


def unwrap_adapter(model: torch.nn.Module) -> PreTrainedModel:
    """Return the model without PEFT's wrapper, its adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
