"""A run's identity: a hash of every fact that can change a digit of its result.

These facts are settings, task version, data and weights. The hash is part of the folder's name (`compute_identity`), so
the same command finds the same folder. Where files are, and what is logged where, do not count.
"""

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import tasks
from dual_lora.lab.config.paths import CONF, find_choices, load_yaml, resolve_path
from dual_lora.lab.config.schema import FILLED_FIELDS, MAX_NAME, Settings
from dual_lora.lab.config.tasks import load_task, translate_task_errors
from dual_lora.lab.inputs.adapter_files import find_adapter
from dual_lora.lab.inputs.model_files import identify_weights
from dual_lora.lab.record.init_from import find_init_weights

# Settings that cannot change the result, by group. method.lr is only the default of train.lr.
NOT_IDENTITY = {
    "model": {"path", "architecture"},
    "task": {"train_rows"},
    "method": {"lr"},
    "train": {"save_steps", "save_minutes", "log_steps", "log_zeros"},
    "eval": {"before"},
}
# Switches that count only when they are on, so that false, null and a record without them name the same run.
SWITCHES = {"model": ("chat",), "train": ("group_by_length", "gradient_checkpointing", "compile", "packing")}
EMPTY = (None, {}, [])


def select_identity_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that can change a digit of the result.

    Null and empty settings are left out, so a setting added later does not rename old runs. Of `method.peft` and
    `task.options`, whose defaults need not be empty, only those that say no more than leaving them out are
    (`drop_implied`).
    """
    values = asdict(settings)
    kept = {key: values[key] for key in ("model", "task", "method", "train", "eval", "seed", "deterministic")}
    where = settings.hardware
    kept["hardware"] = {"devices": where.devices, "sharding": where.sharding} if where.devices > 1 else {}
    kept["hardware"] |= {"base": where.base}
    kept["init_from"] = Path(settings.init_from).name if settings.init_from else None
    for group, keys in NOT_IDENTITY.items():
        kept[group] = {k: v for k, v in kept[group].items() if k not in keys}
    for group, keys in SWITCHES.items():
        kept[group] |= {key: kept[group][key] or None for key in keys}
    kept = drop_empty(kept)
    for group, field in (("method", "peft"), ("task", "options")):
        kept[group].pop(field, None)
        if said := drop_implied(group, values[group]["name"], field, values[group][field]):
            kept[group][field] = said
    return kept


def collect_identity_facts(settings: Settings) -> dict[str, Any]:
    """Return everything that can change a digit of the result: settings, task version, data, weights, and the code that
    the command line named.

    Raises:
        UserError: data or weights cannot be found or read.
    """
    task = load_task(settings)
    if settings.data_dir:
        resolve_path("data_dir", settings.data_dir)
    with translate_task_errors():
        data = task.source(settings.data_dir)
    found = {
        **select_identity_settings(settings),
        "weights": identify_weights(settings),
        "data": data,
        "task_version": task.version,
    }
    if tasks.plugins:
        found["plugins"] = {name: plugin.sha256 for name, plugin in tasks.plugins.items()}
    if settings.init_from:
        found["init_weights"] = tasks.base.file_sha256(find_init_weights(settings))
    if find_adapter(settings):
        del found["init_from"]  # the same adapter may lie elsewhere
    return found


def drop_empty(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values without those that are null or empty."""
    kept = {key: drop_empty(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value not in EMPTY}


def drop_implied(group: str, name: str, field: str, values: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a setting holds without empty values that say no more than leaving them out: null of a field that the
    harness fills in, and what the file of this name has for a field, which its name implies.

    group, name, field: the setting, such as `method`, `lora` and `peft`.
    """
    path = find_choices(group).get(name)
    implied = [*((key, None) for key in FILLED_FIELDS), *(list_empty_fields(path, field) if path else ())]
    return {key: value for key, value in (values or {}).items() if (key, value) not in implied}


@cache
def list_empty_fields(path: Path, field: str) -> list[tuple[str, Any]]:
    """Return what is empty in a setting of a bundled file, each key with its value: what is written so, and null of
    what is taken from another setting (`r1: ${method.r1}`), which counts itself. Of a user's own file only the latter:
    there `init_lora_weights: null`, whose default is not null, may come and go under one name."""
    held = OmegaConf.to_container(load_yaml(path)).get(field) or {}  # references stay unresolved
    taken = [(key, None) for key, value in held.items() if str(value).startswith("${")]
    written = [(key, value) for key, value in held.items() if value in EMPTY] if path.is_relative_to(CONF) else []
    return taken + written


def compute_identity(settings: Settings) -> str:
    """Return the name of the run's folder: MODEL_TASK_METHOD_sSEED_HASH, with ten hexadecimal digits of a hash of all
    facts.

    Raises:
        UserError: data or weights cannot be found or read.
    """
    text = json.dumps(collect_identity_facts(settings), sort_keys=True)
    named = (settings.model.name, settings.task.name, settings.method.name, f"s{settings.seed}")
    names = [name.replace("/", "-")[:MAX_NAME] for name in named]
    return "_".join([*names, hashlib.sha256(text.encode()).hexdigest()[:10]])


def serialize_identity_settings(settings: Settings) -> str:
    """Return the identity's settings as canonical text, without data and weights: the key under which a report finds
    the records of a cell."""
    return json.dumps(select_identity_settings(settings), sort_keys=True)
