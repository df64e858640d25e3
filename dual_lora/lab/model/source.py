"""Where transformers reads a model from, and its configuration: the architecture of the weights and the task's head."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from dual_lora.lab.config.outside.models import read_config_json
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import translate_task_errors
from dual_lora.lab.errors import require
from dual_lora.lab.inputs.gguf import is_gguf_file
from dual_lora.lab.inputs.model_files import fetch_model, find_model, link_model, translate_model_errors
from tasks import Task

NO_CODE = {"trust_remote_code": False}  # explicit, because transformers would otherwise ask on the terminal
# Fields for the dropout before a head. A kind of model may have several; its task's head reads the first.
HEAD_DROPOUTS = (
    "classifier_dropout", "classifier_dropout_prob", "classifier_dropout_rate", "seq_classif_dropout",
    "summary_last_dropout", "summary_first_dropout",
)  # fmt: skip
# What tells models apart in their configurations. Vocabularies are padded, and positions extended.
SIZES = ("model_type", "hidden_size", "num_hidden_layers", "n_embd", "n_layer")
DROPOUT_WORDS = {"dropout", "pdrop", "layerdrop"}
HEAD_WORDS = {"classifier", "classif", "cls", "summary", "pooler", "qa"}  # in the names of a head's dropout


def locate_model(settings: Settings, weights: bool = False) -> dict[str, Any]:
    """Return where `from_pretrained` finds the model: the folder of `find_links`, and the name of a GGUF file, if it is
    one.

    Raises:
        UserError: see `find_links`.
    """
    file = find_gguf_file(settings)
    gguf = {"gguf_file": file.name} if file else {}
    return {"pretrained_model_name_or_path": str(find_links(settings, weights)), **gguf, **NO_CODE}


def find_links(settings: Settings, weights: bool = False) -> Path:
    """Return the folder of links to a model's files, wherever they come from. Weights of the hub are fetched and linked
    only if they are asked for: a tokenizer is refused without them.

    Raises:
        UserError: there is no model at `model.path` or on the hub, or what lies there cannot be honoured.
    """
    path = find_model(settings)
    return link_model(path) if path else link_model(fetch_model(settings, weights), weights)


def name_model(settings: Settings) -> str:
    """Return what a model is called outside of this process: its own folder or its hub id. A GGUF file has no name,
    because PEFT would look for a config.json under it, also on the hub."""
    if find_gguf_file(settings):
        return ""
    return str(find_model(settings) or settings.model.hub)


def find_gguf_file(settings: Settings) -> Path | None:
    """Return the GGUF file the model is read from, if it is."""
    path = find_model(settings)
    return path if path and is_gguf_file(path) else None


def get_config_fields(settings: Settings) -> dict[str, Any]:
    """Return the cleaned fields of the model's config.json; none of a GGUF file.

    Raises:
        UserError: the file cannot be found, read or honoured.
    """
    return {} if find_gguf_file(settings) else read_config_json(find_links(settings))


def load_config(settings: Settings, task: Task) -> PreTrainedConfig:
    """Return the model's configuration with the head that the task asks for.

    Raises:
        UserError: the configuration cannot be found, read or honoured.
    """
    with translate_model_errors(settings):
        config = copy.deepcopy(read_config(**locate_model(settings)))
        config.update(get_head_options(task))
        set_dropout(config, settings)
    return config


def describe_other_architecture(settings: Settings) -> list[str]:
    """Return a warning where the folder given as `model.path` holds a model of another kind or size than the one that
    the run names; none otherwise."""
    known = {key: value for key, value in settings.model.architecture.items() if key in SIZES}
    if not settings.model.path or not known:
        return []
    config = read_config(**locate_model(settings))
    fields = {key: getattr(config, key, None) for key in known}  # other kinds lack some
    other = [f"{key} {found}, not {known[key]}" for key, found in fields.items() if found not in (None, known[key])]
    return [f"model.path is no {settings.model.name}: {', '.join(other)}"] if other else []


def find_head_dropout_field(config: PreTrainedConfig) -> str | None:
    """Return the field of a configuration that holds the dropout before the head, if the kind of model reads one; None
    if there is no such field. Some kinds have it for another head than a task's."""
    named = {"deberta": "cls_dropout", "deberta-v2": "cls_dropout"}.get(config.model_type)  # read, but no field
    return named or next((name for name in HEAD_DROPOUTS if hasattr(config, name)), None)


def set_dropout(config: PreTrainedConfig, settings: Settings) -> None:
    """Set every dropout within the base model to `model.dropout`, and that before the head to `task.head_dropout`, if
    they are given. Otherwise the head keeps its own, where the configuration has a field for it.

    Raises:
        UserError: the base model has none.
    """
    chosen, field = settings.model.dropout, find_head_dropout_field(config)
    if chosen is not None:
        names = {prefix: [*filter(is_dropout, list_own_dropouts(part))] for prefix, part in iterate_text_parts(config)}
        require(any(names.values()), f"model.dropout={chosen}: {settings.model.name} has no dropout; drop it")
        if field and getattr(config, field, None) is None:  # then the head would take the base model's
            config.update({field: getattr(config, "hidden_dropout_prob", None)})
        for prefix, part in iterate_text_parts(config):
            part.update(dict.fromkeys(names[prefix], chosen))
    if settings.task.head_dropout is not None and field:  # `check_head_dropout` refuses what has no effect
        config.update({field: settings.task.head_dropout})


def iterate_text_parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Yield a configuration and the one of its text part, if it has several, each with a prefix for its fields."""
    yield "", config
    if config.get_text_config() is not config:
        yield "text_config.", config.get_text_config()


def list_dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """Return every dropout of a configuration: also the head's and that of entire layers."""
    parts = iterate_text_parts(config)
    return {prefix + name: value for prefix, part in parts for name, value in list_own_dropouts(part).items()}


def list_own_dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """Return the dropouts among a configuration's own fields."""
    values = config.to_dict().items()
    return {n: v for n, v in values if DROPOUT_WORDS & set(n.split("_")) and type(v) in (int, float)}


def is_dropout(name: str) -> bool:
    """Return whether a field of a configuration is a dropout within the base model: hidden_dropout_prob, resid_pdrop,
    but not classifier_dropout or encoder_layerdrop."""
    words = set(name.split("_"))
    return bool(words & DROPOUT_WORDS - {"layerdrop"}) and not words & HEAD_WORDS


@cache
def read_config(pretrained_model_name_or_path: str, **options: Any) -> PreTrainedConfig:
    """Return the configuration of a located model, read once: a GGUF file's takes seconds."""
    return AutoConfig.from_pretrained(pretrained_model_name_or_path, **(NO_CODE | options))


def get_head_options(task: Task) -> dict:
    """Return the fields of a configuration that a task decides: its labels, and by them the loss."""
    if task.form == "classification":
        with translate_task_errors():
            labels = task.labels  # of a task on the user's own files, read from there
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }
    return {"num_labels": 1, "problem_type": "regression"} if task.form == "regression" else {}
