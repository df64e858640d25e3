"""From the overrides of a command line to typed settings, with one clear line for every mistake."""

import copy
import re
from collections.abc import Collection
from dataclasses import fields, is_dataclass, make_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
    ValidationError,
)
from yaml import MarkedYAMLError, YAMLError

from dual_lora.lab.config import paths
from dual_lora.lab.config.compatibility import check_compatibility, check_mixed_rows, check_unused
from dual_lora.lab.config.outside.models import describe_model, find_hub_id, is_model_place
from dual_lora.lab.config.overrides import iterate_given_keys, iterate_keys, parse_override
from dual_lora.lab.config.paths import find_choices, list_choices, load_yaml
from dual_lora.lab.config.schema import GROUPS, Settings, find_type, get_setting
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, get_first_line, require

__all__ = ["GROUPS", "build_settings", "describe_config_error", "iterate_keys", "list_choices", "load_settings"]
# A record holds every setting, so none may come from the environment, where keys and passwords are.
OmegaConf.clear_resolver("oc.env")


def halve(value: float | None) -> float | None:
    """Return half of a setting, for methods that have twice as many weights as LoRA at equal rank (`${half:...}`).

    Raises:
        ValueError: a whole number that is odd.
    """
    if isinstance(value, int) and value % 2:
        raise ValueError(f"{value} must be even, because the method takes half of it")
    return value if value is None else value // 2 if isinstance(value, int) else value / 2


OmegaConf.register_new_resolver("half", halve, replace=True)


def unfreeze_schema(cls: type) -> type:
    """Return a dataclass like `cls` that is not frozen, since OmegaConf cannot merge values into a frozen one."""
    return make_dataclass(
        cls.__name__, [(f.name, unfreeze_schema(f.type) if is_dataclass(f.type) else f.type) for f in fields(cls)]
    )


def freeze_values(cls: type, values: dict, prefix: str = "") -> object:
    """Return the frozen dataclass `cls` from plain values. OmegaConf checks neither the type of what another setting
    gives (`seed=${train.lr}`) nor what is in a list.

    Raises:
        UserError: a value is missing, of another type or impossible.
    """
    found: dict[str, Any] = {}
    for f in fields(cls):
        key = f"{prefix}{f.name}"
        require(f.name in values, f"{key}: missing; give it a value")
        value = values[f.name]
        if is_dataclass(f.type):
            require(isinstance(value, dict), f"{key}={str(value)[:80]}: a group of settings; set one of them")
            found[f.name] = freeze_values(f.type, value, f"{key}.")
        else:
            require(has_type(value, f.type), f"{key}={str(value)[:80]}: must be {name_type(f.type)}")
            found[f.name] = value
    return cls(**found)


def has_type(value: object, kind: Any) -> bool:
    """Return whether a value is of a type that a setting is declared with. Whole numbers are numbers, too."""
    parts = get_args(kind)
    if isinstance(kind, UnionType):
        return any(has_type(value, part) for part in parts)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(has_type(item, parts[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(has_type(item, parts[1]) for item in value.values())
    if kind is Any:
        return True
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def name_type(kind: Any) -> str:
    """Return a setting's type in words."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(kind, UnionType):
        return " or ".join(map(name_type, get_args(kind)))
    if get_origin(kind) is list:
        return "a list of " + {str: "texts"}.get(get_args(kind)[0], "values")
    return names.get(kind, "a mapping")


SCHEMA = unfreeze_schema(Settings)
ConfigStore.instance().store(name="schema", node=SCHEMA)  # for `train.py --cfg`, where Hydra itself composes


def build_settings(config: DictConfig, given: Collection[str] = ()) -> Settings:
    """Return typed settings from a composed config; `given` are the names of those that the command line sets.

    Raises:
        UserError: a value is missing, of the wrong type or impossible.
    """
    method = config.method
    if method.r1 is not None and method.r2 is not None:
        total = method.r1 + method.r2
        require(min(method.r1, method.r2) > 0, f"method.r1={method.r1} and method.r2={method.r2}: must be positive")
        for key, implied in (("rank", total), ("magnitude_ratio", method.r1 / total)):
            agrees = f"method.{key}" not in given or method[key] == implied
            require(agrees, f"method.{key}={method[key]}: method.r1 and method.r2 make it {implied:g}; drop one")
        method.rank, method.magnitude_ratio = total, method.r1 / total
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(describe_config_error(error)) from error
    result = freeze_values(Settings, values)
    check_compatibility(result)
    return result


def describe_config_error(error: Exception) -> str:
    """Return an OmegaConf or Hydra error as one line with the setting's full name in front."""
    cause = error
    while isinstance(cause, HydraException) and cause.__cause__:
        cause = cause.__cause__
    text, key = get_first_line(cause), getattr(cause, "full_key", None)
    if isinstance(cause, MarkedYAMLError) and cause.problem_mark:
        return f"{cause.problem_mark.name}: line {cause.problem_mark.line + 1}: {cause.problem}; fix the file"
    if isinstance(cause, MissingMandatoryValue):
        return f"{key}: ??? is a placeholder; give a value"
    if isinstance(cause, UnsupportedInterpolationType):
        return f"{key}: {text}; write the value itself"
    kind = find_type(str(key))
    if isinstance(cause, ValidationError | ConfigTypeError) and kind and "interpolation" not in text:
        value = re.match("Value '(.*)' (of type|is not)", text)
        given = f"{key}={value[1][:80]}" if value else key
        wanted = "a group of settings; set one of them" if is_dataclass(kind) else f"must be {name_type(kind)}"
        return f"{given}: {wanted}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and "." not in str(key):
        return f"{key}: no such setting"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return f"{key}: not among the {key.partition('.')[0]}'s; write +{key}=VALUE to add it"
    return f"{key}: {text}" if key else text


@cache
def load_base(conf: Path) -> tuple[DictConfig, dict[str, str]]:
    """Return the values of conf/config.yaml, typed by the schema, and the default choice of each group."""
    base = load_yaml(conf / "config.yaml")
    choices = {
        key: name for entry in base.pop("defaults") if isinstance(entry, DictConfig) for key, name in entry.items()
    }
    base.pop("hydra")
    return OmegaConf.merge(OmegaConf.structured(SCHEMA), base), {group: choices[group] for group in GROUPS}


@cache
def load_choice_file(path: Path) -> DictConfig:
    """Return the values of a choice's file, read once: an experiment combines a few choices in hundreds of ways."""
    return load_yaml(path)


@cache
def compose_choices(conf: Path, choices: tuple[str, ...]) -> DictConfig:
    """Return the values for one choice per group (in the order of GROUPS), as Hydra would compose them. Hydra itself
    takes half a second for each of a study's many combinations."""
    files = {group: load_choice(group, name) for group, name in zip(GROUPS, choices, strict=True)}
    composed = OmegaConf.merge(load_base(conf)[0], files)
    OmegaConf.set_struct(composed, True)  # an unknown key is an error
    return composed


def load_choice(group: str, name: str) -> DictConfig:
    """Return the values of a choice: those of its file, or what is found of a model that has none.

    Raises:
        UserError: there is no such choice or model, or the file has another name than its values say.
    """
    path = find_choices(group).get(name)
    if path is None and group == "model" and is_model_place(name):
        return OmegaConf.create(describe_model(name))
    require(path is not None, f"{group}={name}: no such {group}")
    values = load_choice_file(path)
    given = values.get("name")
    require(given == name, f"{path}: name: {given}; write name: {name}, as the file is called")
    return values


def choose_files(parsed: list[Override]) -> tuple[dict[str, str], list[Override]]:
    """Return the choice of each group that overrides name, and the other overrides. The revision of a model on the hub
    becomes part of its choice, because its settings depend on it."""
    chosen = {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in GROUPS}
    rest = [o for o in parsed if o.key_or_group not in GROUPS]
    name = chosen.get("model", "")
    hub = name not in list_choices("model") and find_hub_id(name)
    revisions = [o for o in rest if o.key_or_group == "model.revision" and o.value()] if hub else []
    if revisions:
        chosen["model"] = f"{hub['id']}@{revisions[-1].value()}"
    return chosen, [o for o in rest if o not in revisions]


def load_settings(words: list[str]) -> Settings:
    """Compose and check one run's settings from its overrides.

    Raises:
        UserError: a value is missing, of the wrong type, impossible, or would have no effect.
    """
    chosen, rest = choose_files([parse_override(word) for word in words])
    try:
        choices = load_base(paths.CONF)[1] | chosen
        composed = compose_choices(paths.CONF, tuple(choices[group] for group in GROUPS))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:  # of a file in conf/
        raise UserError(describe_config_error(error)) from error
    config = copy.deepcopy(composed)
    for override in rest:
        apply_override(override, config)
    given = {key for o in rest for key in iterate_given_keys(o.key_or_group, o.value())}
    try:
        settings = build_settings(config, given)
    except OmegaConfBaseException as error:
        raise UserError(describe_config_error(error)) from error
    check_mixed_rows(settings.eval, load_task(settings))
    check_unused(settings, given, composed)
    return settings


def apply_override(override: Override, config: DictConfig) -> None:
    """Set one value of a composed config.

    Raises:
        UserError: it is of the wrong type, or there is no such setting.
    """
    kind = find_type(override.key_or_group)
    if isinstance(override.value(), int | float) and kind not in (None, Any):  # bool is an int, too
        text = override.get_value_string().strip()
        override = replace(override, _value=text) if has_type(text, kind) else override  # study=1.10 is not study=1.1
    try:
        ConfigLoaderImpl._apply_overrides_to_config([override], config)
    except Exception as error:  # Hydra and OmegaConf raise a dozen kinds over what they are given
        message = describe_config_error(error)
        key = override.key_or_group
        raise UserError(message if message.startswith(key.partition(".")[0]) else f"{key}: {message}") from error


def check_length(settings: Settings, words: list[str]) -> None:
    """Refuse words of a command line that give epochs to a run that has a number of steps. Experiments may: their
    scales shorten runs whose cells give epochs.

    Raises:
        UserError: with the epochs.
    """
    given = {key for o in map(parse_override, words) for key in iterate_given_keys(o.key_or_group, o.value())}
    for key in sorted(given & {"task.epochs", "train.epochs"}):
        reason = f"train.max_steps={settings.train.max_steps} is used instead"
        require(settings.train.max_steps is None, f"{key}={get_setting(settings, key):g}: {reason}; drop one")
