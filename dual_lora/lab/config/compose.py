"""From the overrides of a command line to typed settings, with one clear line for every mistake."""

import copy
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, UnsupportedInterpolationType
from yaml import MarkedYAMLError

from dual_lora.lab.config import paths
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.config.tasks import load_task
from dual_lora.lab.errors import UserError, get_first_line, require, suggest_name

GROUPS = ("model", "task", "method", "hardware")
# What a command line may say to Hydra itself: how jobs are started. Where they write is the harness's to say.
HYDRA_KEYS = re.compile(r"hydra(/|\.)(launcher|sweeper)(\.(?!params)|$)")
# A record holds every setting, so none may come from the environment, where keys and passwords are.
OmegaConf.clear_resolver("oc.env")


def halve(value: float | None) -> float | None:
    """Return half of a setting, for methods with twice LoRA's weights at the same rank.

    Raises:
        ValueError: a whole number that is odd.
    """
    if isinstance(value, int) and value % 2:
        raise ValueError(f"{value} must be even, because the method takes half of it")
    return value if value is None else value // 2 if isinstance(value, int) else value / 2


OmegaConf.register_new_resolver("half", halve, replace=True)


def unfreeze_schema(cls: type) -> type:
    """Return a dataclass like `cls` that is not frozen: OmegaConf merges values into nothing frozen."""
    return make_dataclass(
        cls.__name__, [(f.name, unfreeze_schema(f.type) if is_dataclass(f.type) else f.type) for f in fields(cls)]
    )


def freeze_values(cls: type, values: dict) -> object:
    """Return the frozen dataclass `cls` from plain values of the right types."""
    return cls(
        **{
            f.name: freeze_values(f.type, values[f.name]) if is_dataclass(f.type) else values[f.name]
            for f in fields(cls)
        }
    )


SCHEMA = unfreeze_schema(Settings)
ConfigStore.instance().store(name="schema", node=SCHEMA)


def list_choices(group: str) -> list[str]:
    """Return the choices of a config group, e.g. "glue/rte" of "task"."""
    return sorted(
        p.relative_to(paths.CONF / group).with_suffix("").as_posix() for p in (paths.CONF / group).rglob("*.yaml")
    )


def iterate_keys(cls: type = Settings, prefix: str = "") -> Iterator[str]:
    """Yield every setting's full name, nested ones and their parents."""
    for field in fields(cls):
        yield prefix + field.name
        if is_dataclass(field.type):
            yield from iterate_keys(field.type, f"{prefix}{field.name}.")


def iterate_open_keys(cls: type = Settings, prefix: str = "") -> Iterator[str]:
    """Yield the settings that are dictionaries: below them any key may be given."""
    for field in fields(cls):
        if is_dataclass(field.type):
            yield from iterate_open_keys(field.type, f"{prefix}{field.name}.")
        elif any(getattr(t, "__origin__", t) is dict for t in (field.type, *get_args(field.type))):
            yield prefix + field.name


KNOWN_KEYS, OPEN_KEYS = [*iterate_keys(), *GROUPS], list(iterate_open_keys())


def check_override(override: Override) -> None:
    """Refuse an override of an unknown group, choice or key, naming the nearest known one."""
    key = override.key_or_group
    check_text(override.input_line, key)
    require(not override.is_delete(), f"~{key}: settings cannot be removed")
    require(key != "experiment", "experiment: experiments are run by sweep.py: python sweep.py experiment=NAME")
    if key in GROUPS:
        values = [override.value()] if not override.is_sweep_override() else list(override.sweep_string_iterator())
        for value in values:
            hint = suggest_name(str(value), list_choices(key))
            require(
                str(value) in list_choices(key),
                f"{key}={value}: no such {key}.{hint} Known: {', '.join(list_choices(key))}",
            )
    elif re.match(r"hydra(/|\.|$)", key):
        require(HYDRA_KEYS.match(key), f"{key}: of Hydra's own only hydra/launcher and hydra/sweeper may be set")
        require(not override.is_sweep_override(), f"{key}: one value for all runs")
    else:
        opened = any(key.startswith(parent + ".") for parent in OPEN_KEYS)
        require(
            opened or key in KNOWN_KEYS, f"{key}: no such setting.{'' if opened else suggest_name(key, KNOWN_KEYS)}"
        )
    added = override.is_add() and key in [*KNOWN_KEYS, "hydra/launcher"]
    require(not added, f"+{key}: is there already; write {key}=VALUE without the +")


def check_text(text: str, key: str) -> None:
    """Refuse what is no value: code to run, or text to be filled in from elsewhere than the settings."""
    require(
        redact_secrets(text) == text, f"{key}: holds a key or password of the environment, which a record would keep"
    )
    require(not re.search(r"(?<!\w)_target_(?!\w)", text), f"{key}: _target_ names code to run; settings are values")
    strange = re.sub(r"\$\{[\w.]+\}", "", text)
    require("${" not in strange, f"{key}: of ${{...}} only other settings, such as ${{method.lr}}")


def parse_override(override: str) -> Override:
    try:
        require(override.isprintable(), f"{override!r}: holds characters that are no text")
        require(override.lstrip("+~")[:1] not in ("", "="), f"{override}: not of the form KEY=VALUE")
        return OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError) as error:  # of a number of 5000 digits, of lists without end
        mend = "quote a value of other characters, such as KEY=\"'~/data'\""
        raise UserError(f"{override[:300]}: not of the form KEY=VALUE; {mend}") from error


def parse_overrides(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every job that a command line (with sweeps) asks for, names checked."""
    parsed = [parse_override(override) for override in overrides]
    for override in parsed:
        check_override(override)
    return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def build_settings(config: DictConfig, overrides: list[str] = ()) -> Settings:
    """Return typed settings from a composed config.

    Raises:
        UserError: a value is missing, of the wrong type or impossible.
    """
    method = config.method
    if method.r1 is not None and method.r2 is not None:
        total = method.r1 + method.r2
        require(min(method.r1, method.r2) > 0, f"method.r1={method.r1} and method.r2={method.r2}: must be positive")
        named = any(o.startswith("method.rank=") for o in overrides)
        require(
            not named or method.rank == total, f"method.rank={method.rank}: method.r1 + method.r2 is {total}; drop one"
        )
        method.rank, method.magnitude_ratio = total, method.r1 / total
    try:
        config = OmegaConf.masked_copy(config, [f.name for f in fields(Settings)])
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(describe_config_error(error)) from error
    result = freeze_values(Settings, values)
    check_compatibility(result)
    return result


def check_compatibility(settings: Settings) -> None:
    """Refuse a task the model cannot do, and a protocol that the task's form does not have."""
    task, form = settings.task, load_task(settings).form
    smooths = form == "regression" and task.label_smoothing
    require(not smooths, f"task.label_smoothing={task.label_smoothing}: {task.name} has no classes to smooth over")
    writes = form == "generation"
    able = writes or settings.hardware.sharding != "full"
    require(able, f"hardware.sharding=full: not for {task.name}, whose head trains; take hardware.sharding=replicas")
    require(not writes or task.max_new_tokens, f"task.max_new_tokens=0: {task.name} needs at least one token to write")
    require(writes or not settings.model.chat, f"model.chat=true: {task.name} has no prompts; take model.chat=false")
    if settings.model.generates or not writes:
        return
    able = [m for m in list_choices("model") if OmegaConf.load(paths.CONF / "model" / f"{m}.yaml").get("generates")]
    raise UserError(
        f"task={settings.task.name}: {settings.model.name} writes no text; take a model that does: {', '.join(able)}"
    )


def describe_config_error(error: Exception) -> str:
    """Return an OmegaConf or Hydra error as one line with the setting's full name in front."""
    cause = error
    while isinstance(cause, HydraException) and cause.__cause__:
        cause = cause.__cause__
    text, key = get_first_line(cause), getattr(cause, "full_key", None)
    if isinstance(cause, MarkedYAMLError) and cause.problem_mark:
        return f"{cause.problem_mark.name}: line {cause.problem_mark.line + 1}: {cause.problem}; mend the file"
    if isinstance(cause, UnsupportedInterpolationType):
        return f"{key}: {text}; write the value itself"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and "." not in str(key):
        return f"{key}: no such setting"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return f"{key}: not among the {key.partition('.')[0]}'s; write +{key}=VALUE to add it"
    return f"{key}: {text}" if key else text


@cache
def compose_choices(conf: Path, choices: tuple[str, ...]) -> DictConfig:
    """Compose files of `conf`, once: that takes Hydra half a second, and a study's many runs choose few of them."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("config", overrides=list(choices))


def check_method_settings(config: DictConfig, overrides: list[Override]) -> None:
    """Refuse a setting of the method that its PEFT configuration does not take: it would change nothing but the run's
    name.

    Raises:
        UserError: with the setting.
    """
    method = OmegaConf.to_container(config.method, resolve=False)
    for key in ("rank", "alpha", "dropout"):
        given = any(o.key_or_group == f"method.{key}" for o in overrides) and method[key] is not None
        taken = method["peft"] is None or f"${{method.{key}}}" in str(method["peft"])  # `Method` refuses the former
        require(not given or taken, f"method.{key}: method {method['name']} has no {key}")


def load_settings(overrides: list[str]) -> Settings:
    """Compose and check one job's settings from its overrides."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        chosen = [o for o in parsed if o.key_or_group in GROUPS or o.is_hydra_override()]
        config = copy.deepcopy(compose_choices(paths.CONF, tuple(o.input_line for o in chosen)))
        ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in chosen], config)
        check_method_settings(config, parsed)
    except UserError:
        raise
    except Exception as error:  # Hydra and OmegaConf raise a dozen kinds over what they are told
        raise UserError(describe_config_error(error)) from error
    try:
        return build_settings(config, overrides)
    except OmegaConfBaseException as error:
        raise UserError(describe_config_error(error)) from error
