"""The settings of a run's record as text and back, replacing settings by full name, and finding how runs differ."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import SCHEMA, build_settings, describe_config_error
from dual_lora.lab.config.overrides import check_text
from dual_lora.lab.config.paths import format_yaml, load_yaml, parse_yaml
from dual_lora.lab.config.schema import Settings, get_setting, iterate_leaves
from dual_lora.lab.errors import UserError, require

# Settings added after the first records. A record without one behaved as conf/ says, unless OLD_VALUES differs.
ADDED_SETTINGS = (
    "init_from",
    "plan",
    "model.architecture",
    "model.chat",
    "task.stop",
    "task.train_rows",
    "train.group_by_length",
    "train.loss_scale",
    "eval.holdout",
    "eval.holdout_skip",
    "wandb.job_type",
    "wandb.tags",
    "hardware",
    "method.ramp_share",
    "train.head_lr",
    "train.adam_epsilon",
    "task.warmup_steps",
    "task.head_dropout",
    "task.validation_rows",
    "task.validation_steps",
    "model.split",
    "model.dropout",
    "task.search",
    "train.log_zeros",
    "train.gradient_checkpointing",
    "train.compile",
    "train.packing",
    "train.early_stopping",
    "eval.development_rows",
    "tensorboard",
)
# Those runs had no timed checkpoints, which conf/ now turns on.
OLD_VALUES = {"train": {"save_minutes": None}}

MIRRORS = ("wandb.", "tensorboard")  # where the log is copied to
NAMES = ("model.name", "task.name", "method.name")
DERIVED = {"method.lr", "task.epochs", "task.batch_size"}  # train.* has the values that a run takes
# What is raised where a file holds no settings.
READ_ERRORS = (UserError, OmegaConfBaseException, OSError, YAMLError, TypeError, ValueError)


@cache
def load_old_defaults(conf: Path) -> DictConfig:
    """Return the schema with values of settings that a record may lack because it is older than they are."""
    today = OmegaConf.merge(load_yaml(conf / "config.yaml"), {"hardware": load_yaml(conf / "hardware" / "single.yaml")})
    found = OmegaConf.create(OLD_VALUES)
    for key in ADDED_SETTINGS:
        OmegaConf.update(found, key, OmegaConf.select(today, key), force_add=True)
    return OmegaConf.merge(OmegaConf.structured(SCHEMA), found)


def load_recorded_settings(run: Path, key: str = "run") -> Settings:
    """Return the settings a run's record holds. key: what the command line calls that run.

    Raises:
        UserError: there is no record, or one that today's settings cannot hold.
    """
    path = run / "config.yaml"
    require(path.is_file(), f"{key}={run}: no config.yaml there; give the folder of a run, runs/STUDY/ID")
    try:
        return parse_recorded_settings(path, path.read_text(encoding="utf-8"), paths.CONF)
    except READ_ERRORS as error:
        raise UserError(
            f"{path}: not settings that this version can read ({describe_config_error(error)}); restore the file"
        ) from error


def format_settings(settings: Settings) -> str:
    """Return the text of a record's config.yaml.

    Raises:
        UserError: it would be read as other settings, or not at all: a text `${seed}` means the seed there.
    """
    text = format_yaml(asdict(settings))
    try:
        found = dict(iterate_leaves(parse_recorded_settings(Path("config.yaml"), text, paths.CONF)))
    except READ_ERRORS as error:
        raise UserError(f"a record cannot hold these settings ({describe_config_error(error)}); change them") from error
    for key, value in iterate_leaves(settings):
        other = found.get(key)
        require(other == value, f"{key}={str(value)[:80]}: a record would give it back as {other}; give another value")
    return text


@lru_cache(maxsize=4096)  # a report asks for a record's settings several times
def parse_recorded_settings(path: Path, text: str, conf: Path) -> Settings:
    """Return the settings that the text of a record's config.yaml holds."""
    stored = parse_yaml(path, text)
    check_text(str(OmegaConf.to_container(stored)), "its values")
    return build_settings(OmegaConf.merge(load_old_defaults(conf), stored))


def replace_settings(settings: Settings, values: dict[str, str | int | None]) -> Settings:
    """Return the settings with other values, by their full names."""
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        part = replace(getattr(settings, group), **{name: value}) if group else value
        settings = replace(settings, **{group or name: part})
    return settings


def iterate_setting_names(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """Yield the full name of every setting."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from iterate_setting_names(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"


def find_differences(all_settings: list[Settings]) -> list[dict[str, Any]]:
    """Return, for each run, the settings (full name: value) that distinguish it from the other runs.

    Among runs with the same model, task and method these are as few settings as possible, in the order of the schema.
    Derived settings (`method.peft`, and those that train.* is set from) come last, so that one is named only if nothing
    else differs.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, settings in enumerate(all_settings):
        alike.setdefault(tuple(str(get_setting(settings, key)) for key in NAMES), []).append(number)
    found: list[dict[str, Any]] = [{} for _ in all_settings]
    for numbers in alike.values():
        for number, values in zip(numbers, find_distinct_values([all_settings[n] for n in numbers]), strict=True):
            found[number] = values
    varied = [key for key in NAMES if len({get_setting(settings, key) for settings in all_settings}) > 1]
    return [
        {key: get_setting(settings, key) for key in varied} | values
        for settings, values in zip(all_settings, found, strict=True)
    ]


def is_derived(key: str) -> bool:
    """Return whether a setting usually has its value from another one."""
    return key in DERIVED or key.startswith("method.peft.")


def find_distinct_values(all_settings: list[Settings]) -> list[dict[str, Any]]:
    """Return the values that distinguish runs of one model, task and method. A setting is used if it separates runs
    that the earlier ones do not."""
    leaves = [
        {key: value for key, value in iterate_leaves(settings) if not key.startswith(MIRRORS)}
        for settings in all_settings
    ]
    keys = sorted(dict.fromkeys(key for values in leaves for key in values), key=is_derived)
    chosen: list[str] = []
    parts = {()}
    for key in keys if len(all_settings) > 1 else ():
        finer = {tuple(str(values.get(k)) for k in (*chosen, key)) for values in leaves}
        if len(finer) > len(parts):
            chosen, parts = [*chosen, key], finer
    return [{key: values.get(key) for key in chosen} for values in leaves]
