"""Incompatible settings: a task that the model cannot do, and settings that would have no effect.

A setting without effect would still be recorded and would rename the run, so a command line that sets one is refused.
When a record is read, ineffective settings are not refused.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dual_lora.lab.config.overrides import iterate_given_keys, parse_override
from dual_lora.lab.config.paths import find_choices, load_yaml
from dual_lora.lab.config.schema import (
    METHOD_SETTINGS,
    PLAIN_STARTS,
    TYPES_OF_OTHER_MODULES,
    Evaluate,
    Method,
    Settings,
    get_setting,
)
from dual_lora.lab.config.tasks import check_data_dir, load_task
from dual_lora.lab.errors import UserError, require
from dual_lora.papers_map import PAPERS_MAP
from tasks import Task

# Settings that only a generation task has: decoding, and which tokens the loss covers.
GENERATION_SETTINGS = {"max_new_tokens", "num_beams", "search", "length_penalty", "no_repeat_ngram", "stop"}
GENERATION_SETTINGS |= {"loss_on_prompt"}
# PEFT's adapters with a matrix named lora_B, which its LoRA+ optimizer looks for (peft/optimizers/loraplus.py).
LORA_B_TYPES = ("LORA", "ADALORA")
# PEFT's name for no module at all: only what an adapter has in addition to modules (a head, biases) may train.
NO_MODULES = "dummy-target-modules"
# Fields of PEFT's that have an effect where no module is adapted.
MODULE_FREE_FIELDS = {"peft_type", "task_type", "inference_mode", "target_modules", "target_parameters"}
MODULE_FREE_FIELDS |= {"modules_to_save", "bias", "trainable_token_indices", "layer_replication", "ensure_weight_tying"}
# Fields of a method on no module that trains a task's head at most.
HEAD_ONLY_FIELDS = {"peft_type", "target_modules", "task_type", "modules_to_save"}
# Fields of PEFT's that no adapter here reads, and why.
UNREAD_FIELDS = {
    "fan_in_fan_out": "PEFT sets it by the class of each layer",
    "use_qalora": "only layers quantized by GPTQ read it, which are not trained here",
    "qalora_group_size": "only layers quantized by GPTQ read it, which are not trained here",
    "megatron_config": "only layers of Megatron read it",
    "megatron_core": "only layers of Megatron read it",
    "use_effective_conv2d": "only convolutions read it, and layers here are linear",
}
# Fields of PEFT's that are only read if another one has a certain value: that field, the value, and what it is if a
# method's file does not say.
CONDITIONAL_FIELDS = {
    "loftq_config": ("init_lora_weights", "loftq", True),
    "corda_config": ("init_lora_weights", "corda", True),
    "eva_config": ("init_lora_weights", "eva", True),
    "lora_ga_config": ("init_lora_weights", "lora_ga", True),
    "eps": ("coft", True, False),
    "num_cayley_neumann_terms": ("use_cayley_neumann", True, True),
    "sparse": ("very_sparse", False, False),
}
# What an adapter is drawn with and ramped up by: without effect if `init_from` brings a trained one at full scale.
START_SETTINGS = {"ramp_share", "peft.init_weights", "peft.init_std", "peft.direction_init_std"}
START_SETTINGS |= {"peft.scale_warmup_steps", "peft.scale_warmup_shape"}
# Settings that only training reads, in addition to those of `train`. Those that set rows apart are not among them,
# because they decide which rows are held out.
TRAINING_SETTINGS = {"method.lr", "model.dropout", "task.epochs", "task.batch_size", "task.warmup_ratio"}
TRAINING_SETTINGS |= {"task.warmup_steps", "task.checkpoint", "task.label_smoothing", "task.head_dropout"}
TRAINING_SETTINGS |= {"task.loss_on_prompt"}
READ_WITHOUT_TRAINING = {"train.max_examples"}  # limits the rows that are encoded
# A sentence cut shorter than this is special tokens and at most one token of text.
MIN_SENTENCE_TOKENS = 4


def check_compatibility(settings: Settings) -> None:
    """Refuse a task the model cannot do, and a protocol that the task's form does not have.

    Raises:
        UserError: what does not go together, and what would.
    """
    task, form = settings.task, load_task(settings).form
    smooths = form == "regression" and task.label_smoothing
    require(not smooths, f"task.label_smoothing={task.label_smoothing}: {task.name} has no classes to smooth over")
    writes = form == "generation"
    able = writes or settings.hardware.sharding != "full"
    require(able, f"hardware.sharding=full: not for {task.name}, whose head trains; take hardware.sharding=replicas")
    require(not writes or task.max_new_tokens, f"task.max_new_tokens=0: {task.name} needs at least one token to write")
    packs = settings.train.packing
    require(writes or not packs, f"train.packing=true: {task.name} takes one text a row; only text generation packs")
    require(writes or not settings.model.chat, f"model.chat=true: {task.name} has no prompts; take model.chat=false")
    if settings.model.generates or not writes:
        return
    able = [name for name, path in find_choices("model").items() if load_yaml(path).get("generates")]
    raise UserError(
        f"task={settings.task.name}: {settings.model.name} writes no text; take another task, such as "
        f"task=classification, or a model that does: {', '.join(able)}"
    )


def check_mixed_rows(settings: Evaluate, task: Task) -> None:
    """Refuse to score training rows of a task that mix the sets it scores one by one. Records of runs that did can be
    read all the same; a report whose command asks for such runs cannot be written again.

    Raises:
        UserError: what was asked for, and what there is instead.
    """
    instead = {
        "holdout": f"{task.held_out_option} scores training rows set by set",
        "development_rows": "task.checkpoint=best_loss keeps the best weights by their loss",
    }
    for name, remedy in instead.items():
        asked, mixed = getattr(settings, name), f"the training rows of {task.name} are of several sets"
        told = f"eval.{name}={asked}: {mixed}, which it scores one by one; drop it ({remedy})"
        require(not (asked and task.held_out_option), told)


def check_unused(settings: Settings, given: Collection[str], composed: DictConfig) -> None:
    """Refuse settings of the command line that would have no effect on this run.

    given: full names of the settings that it sets. composed: the values without it, references unresolved. Setting null
    or the default value is allowed.

    Raises:
        UserError: which setting, why it has no effect, and what has.
    """
    if settings.data_dir:
        check_data_dir(settings)
    for key in sorted(given):
        reason = explain_unused_method(settings, key, composed) or explain_unused(settings, key, given)
        if not reason:
            continue
        value, default = get_setting(settings, key), OmegaConf.select(composed, key)
        require(value in (None, default), f"{key}={value}: {reason}")


def check_untrained(runs: list[Settings], jobs: list[list[str]]) -> None:
    """Refuse settings of training where nothing trains in any of a command's runs: they would rename the same untrained
    model. With runs that train, and in an experiment, a run may share their words. A plan is of a training step.

    jobs: the words of each run.

    Raises:
        UserError: with the setting and the method.
    """
    if not all(trains_nothing(settings.method) and not settings.plan for settings in runs):
        return
    for settings, words in zip(runs, jobs, strict=True):
        given = {key for o in map(parse_override, words) for key in iterate_given_keys(o.key_or_group, o.value())}
        idle = {key for key in given if key in TRAINING_SETTINGS or key.startswith("train.")} - READ_WITHOUT_TRAINING
        for key in sorted(idle):
            value = get_setting(settings, key)
            require(value is None, f"{key}={value}: nothing trains with method={settings.method.name}; drop it")


def adapts_no_module(method: Method) -> bool:
    """Return whether a method is an adapter on no module."""
    return (method.peft or {}).get("target_modules") == NO_MODULES


def explain_unused_method(settings: Settings, key: str, composed: DictConfig) -> str | None:
    """Return why a setting of the method has no effect on this run; None if it has one."""
    method, (group, _, name) = settings.method, key.partition(".")
    if group != "method":
        return None
    own = OmegaConf.to_container(composed.method.peft, resolve=False) if composed.method.peft else {}
    if name == "name":
        return "it names what the method's file sets, not another method; take method=NAME"
    if name in ("dropout", "peft.module_dropout") and (method.peft or {}).get("peft_type") == "OFT":
        return "PEFT's OFT takes a dropout and applies none; drop it"
    if name in METHOD_SETTINGS and method.peft is not None:
        used = any(f"${{{key}}}" in str(value) for value in own.values())
        return None if used else f"method {method.name} has no {name}; drop it"
    if named := re.fullmatch(r"\$\{(method\.\w+)\}", str(own.get(name.removeprefix("peft."), ""))):
        return f"method {method.name} takes it from {named[1]}; set that"
    if name == "lr_ratio" and (method.peft or {}).get("peft_type") not in LORA_B_TYPES:
        return f"only LoRA's B has a rate of its own, and method {method.name} has no such matrix; drop it"
    if name == "ramp_share" and own.get("scale_warmup_steps", 0) is not None:
        return f"method {method.name} has no ramp; drop it"
    if name == "ramp_share" and method.peft["scale_warmup_steps"] is not None:
        return "method.peft.scale_warmup_steps is used instead; drop one"
    if name == "lr" and settings.train.lr != method.lr:
        return f"train.lr={settings.train.lr} is used instead; drop one"
    starts = [fields.get("init_lora_weights") for fields in (own, method.peft or {})]
    plain = name == "peft.init_lora_weights" and all(start in PLAIN_STARTS for start in starts)
    if (name in START_SETTINGS or plain) and settings.init_from and method.peft is not None:
        return "init_from brings a trained adapter, which starts at full scale; drop it"
    return explain_unread_field(settings, name)


def check_model_paths(runs: Iterable[Settings]) -> None:
    """Refuse one folder for several models: their runs would be those of one model under several names.

    Raises:
        UserError: with the folder and two of the models.
    """
    names: dict[str, str] = {}
    for settings in runs:
        path, name = settings.model.path, settings.model.name
        other = names.setdefault(path, name) if path else name
        require(other == name, f"model.path={path}: one folder for model={other} and model={name}; choose one of them")


def trains_only_head(settings: Settings) -> bool:
    """Return whether only the task's head trains, at its own learning rate."""
    trains_head = (settings.method.peft or {}).get("modules_to_save") is None
    return trains_head_at_most(settings.method) and trains_head and settings.train.head_lr is not None


def trains_nothing(method: Method) -> bool:
    """Return whether a method leaves the model as it is."""
    return trains_head_at_most(method) and method.peft.get("modules_to_save") == []


def trains_head_at_most(method: Method) -> bool:
    """Return whether a method trains no other weights than those of a task's head."""
    return adapts_no_module(method) and method.peft.keys() <= HEAD_ONLY_FIELDS


def explain_unread_field(settings: Settings, name: str) -> str | None:
    """Return why an adapter of this run does not read a setting of the method, such as "peft.eps"; None if it does."""
    method, field = settings.method, name.removeprefix("peft.").partition(".")[0]
    peft = method.peft or {}
    adapter_only = name.startswith("peft.") and field not in MODULE_FREE_FIELDS or name == "lr_ratio"
    if adapter_only and adapts_no_module(method):
        return f"method {method.name} adapts no module; drop it"
    if not name.startswith("peft."):
        return explain_idle_ramp(peft) if name == "ramp_share" else None
    if field in UNREAD_FIELDS:
        return f"{UNREAD_FIELDS[field]}; drop it"
    switch, needed, default = CONDITIONAL_FIELDS.get(field, (field, None, None))
    if needed is not None and peft.get(switch, default) != needed:
        wanted = f"method.peft.{switch}={str(needed).lower()}"
        return f"only read with {wanted}; drop it, or take ++{wanted}"  # in the method's file or not
    if field in ("weight_gradient_dtype", "input_gradient_dtype") and settings.model.dtype != "float32":
        return f"with model.dtype={settings.model.dtype} gradients are in 16 bits anyway; drop it"
    return explain_unread_dual_lora(method, field)


def explain_unread_dual_lora(method: Method, field: str) -> str | None:
    """Return why Dual LoRA does not read a field of its configuration; None if it does, and for other methods."""
    peft = method.peft or {}
    ramp = method.ramp_share if peft.get("scale_warmup_steps") is None else peft["scale_warmup_steps"]
    if field in ("scale_warmup_steps", "scale_warmup_shape") and (why := explain_idle_ramp(peft)):
        return why
    if field == "scale_warmup_shape" and ramp == 0:
        return "there is no ramp for it to shape; drop it, or give a ramp"
    signs = peft.get("direction") in (None, "sign")
    if field == "direction_init_std" and peft.get("freeze") == "direction" and signs:
        return "the size of C and D, which do not train, changes no sign; drop it"
    if field == "kernel" and peft["kernel"] not in ("auto", "eager") and (variant := find_variant(peft)):
        return f"method.peft.{variant}={peft[variant]} is computed by plain autograd; drop one"
    idle_sign = explain_idle_sign(method)
    return f"only the gradient of Sign uses it, and {idle_sign}; drop one" if field == "ste" and idle_sign else None


def explain_idle_ramp(peft: dict[str, Any]) -> str | None:
    """Return why an update of Dual LoRA is not ramped up; None if it is."""
    starts_full = peft.get("init_weights") is False
    return "method.peft.init_weights=false starts at full scale; drop one" if starts_full else None


def find_variant(peft: dict[str, Any]) -> str | None:
    """Return the field that makes Dual LoRA another map than the paper's, which the kernels compute; None if there is
    no such field."""
    return next((field for field, value in PAPERS_MAP.items() if peft.get(field, value) != value), None)


def explain_idle_sign(method: Method) -> str | None:
    """Return why no gradient of Dual LoRA's Sign is computed; None if one is, and for other methods."""
    peft = method.peft or {}
    if peft.get("direction") not in (None, "sign"):
        return f"method.peft.direction={peft['direction']} has none"
    return "method.peft.freeze=direction computes none" if peft.get("freeze") == "direction" else None


def explain_unused(settings: Settings, key: str, given: Collection[str]) -> str | None:
    """Return why a setting has no effect on this run; None if it has one, and for those of `explain_unused_method`."""
    group, _, name = key.partition(".")
    if key in ("train.lr", "method.lr") and trains_only_head(settings):
        return f"only the head trains, at train.head_lr={settings.train.head_lr}; drop one"
    if key in ("hardware.accelerator", "task.train_rows") and not settings.plan:
        return "only a plan uses it; drop it, or add plan=true"
    idle = settings.task.checkpoint != "best" and not settings.train.early_stopping
    if key == "eval.development_rows" and idle:
        return "nothing compares epochs; set train.early_stopping or task.checkpoint=best, or drop it"
    if group == "model":
        return explain_unused_model(settings, name)
    if group == "task":
        return explain_unused_task(settings, name, given)
    return explain_unused_train(settings, name) if group == "train" else None


def explain_unused_model(settings: Settings, name: str) -> str | None:
    """Return why a setting of the model, such as "adapt", has no effect on this run; None if it has one."""
    model, method = settings.model, settings.method
    if name in ("hub", "revision") and (model.path or model.bundled):
        return f"{model.name} is read from {'model.path' if model.path else 'this repository'}; drop it"
    if name.startswith("architecture") and not settings.plan:
        return "only a plan uses it, a run takes what the model's own folder says; drop it, or add plan=true"
    if name == "head" and load_task(settings).form == "generation":
        return f"{settings.task.name} trains no head; drop it"
    if name.startswith(("adapt", "roles", "split")) and method.peft is None:
        return f"method {method.name} trains every weight; drop it"
    role = name.removeprefix("roles.") if name.startswith("roles.") else None
    chooses_modules = name == "adapt" or role is not None and role not in model.split
    if chooses_modules and (method.peft or {}).get("peft_type") in TYPES_OF_OTHER_MODULES:
        named = "++method.peft.target_modules=[NAME]"
        return f"{method.peft['peft_type']} adapts other modules; drop it, or name them as {named}"
    if chooses_modules and (method.peft or {}).get("target_modules"):
        return "method.peft.target_modules is used instead; drop one"
    if chooses_modules and role not in (None, *model.adapt):
        return f"model.adapt does not name the role {role}; drop it, or add it there"
    return None


def explain_unused_task(settings: Settings, name: str, given: Collection[str]) -> str | None:
    """Return why a setting of the task, such as "num_beams", has no effect on this run; None if it has one."""
    task, loaded = settings.task, load_task(settings)
    writes = loaded.form == "generation"
    if name == "name":
        return "it names what the task's file sets, not another task; take task=NAME"
    if name in GENERATION_SETTINGS and not writes:
        return f"{task.name} writes no text; drop it"
    if name in ("length_penalty", "search") and task.num_beams == 1:
        return "only beam search uses it; set task.num_beams above 1, or drop it"
    if name == "max_length" and not writes and task.max_length < MIN_SENTENCE_TOKENS:
        return f"leaves next to nothing of a sentence; take {MIN_SENTENCE_TOKENS} tokens or more"
    if name in ("warmup_ratio", "warmup_steps") and settings.train.schedule == "constant":
        return "train.schedule=constant has no warm-up; take train.schedule=constant_with_warmup"
    if name == "warmup_ratio" and task.warmup_steps is not None:
        return f"task.warmup_steps={task.warmup_steps} is used instead; drop one"
    if name == "validation_steps" and not task.validation_size:
        return "no rows are set apart; give task.validation_rows or task.checkpoint=best_loss"
    if name in ("epochs", "batch_size") and f"train.{name}" in given:
        return f"train.{name} is used instead; drop one"
    if name == "head_dropout" and writes:
        return f"{task.name} trains no head; drop it"
    if name == "options.separator" and settings.model.chat and "messages" in loaded.row_types:
        return "with model.chat=true the chat template stands between prompt and response; drop one"
    if settings.eval.holdout and name.removeprefix("options.") in loaded.scoring_options:
        return f"eval.holdout={settings.eval.holdout} scores training rows instead; drop one"
    if name.startswith("options.") and settings.data_dir:
        return loaded.explain_unused_option(name.removeprefix("options."))
    return None


def explain_unused_train(settings: Settings, name: str) -> str | None:
    """Return why a setting of training, such as "loss_scale", has no effect on this run; None if it has one."""
    method, peft = settings.method, settings.method.peft or {}
    if name == "head_lr" and load_task(settings).form == "generation":
        return f"{settings.task.name} trains no head; drop it"
    if name == "packing" and settings.train.batch_size == 1:
        return "a batch of one text has no other to share a row with; drop it, or take a larger train.batch_size"
    if name == "log_zeros" and "magnitude_ratio" not in peft and peft.get("peft_type") not in LORA_B_TYPES:
        return f"only an update that is a product of factors is looked at, and method {method.name} has none; drop it"
    if name == "log_zeros" and (start := peft.get("init_lora_weights")) not in PLAIN_STARTS:
        return f"method.peft.init_lora_weights={start} changes the base weights, so B A is not the update; drop one"
    if name == "loss_scale" and "magnitude_ratio" not in peft:
        return f"nothing in method {method.name} clips gradients on the way, so a scale changes nothing; drop it"
    if name == "loss_scale" and (idle_sign := explain_idle_sign(method)):
        return f"only the gradient of Sign is clipped, and {idle_sign}; drop one"
    return None
