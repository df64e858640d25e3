"""The settings that a run's record holds, and settings looked up or replaced by their full names."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dual_lora.lab.config.compose import SCHEMA, build_settings, check_text, describe_config_error
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, require

# What runs from before a setting was added did.
DEFAULTS_OF_OLD_RECORDS = {
    "init_from": None,
    "plan": False,
    "model": {"architecture": {}, "chat": False},
    "task": {"stop": [], "train_rows": None},
    "method": {"ramp_share": None},
    "train": {
        "save_minutes": None,
        "group_by_length": None,
        "loss_scale": None,
        "head_lr": None,
        "adam_epsilon": None,
    },
    "eval": {"holdout": None},
    "wandb": {"job_type": "train", "tags": []},
    "hardware": {"name": "single", "accelerator": "a100-80gb", "devices": 1, "sharding": "none", "base": None},
}


def load_recorded_settings(run: Path, key: str = "run") -> Settings:
    """Return the settings a run's record holds. key: what the command line calls that run.

    Raises:
        UserError: there is no record, or one that today's settings cannot hold.
    """
    path = run / "config.yaml"
    require(path.is_file(), f"{key}={run}: no config.yaml there; give the folder of a run, runs/STUDY/ID")
    try:
        stored = OmegaConf.load(path)
        check_text(str(OmegaConf.to_container(stored)), "its values")
        return build_settings(OmegaConf.merge(OmegaConf.structured(SCHEMA), DEFAULTS_OF_OLD_RECORDS, stored))
    except (UserError, OmegaConfBaseException, OSError, YAMLError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a run's settings as this version knows them ({describe_config_error(error)})"
        ) from error


def replace_settings(settings: Settings, values: dict[str, str | int]) -> Settings:
    """Return the settings with other values, by their full names."""
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        part = replace(getattr(settings, group), **{name: value}) if group else value
        settings = replace(settings, **{group or name: part})
    return settings


def get_setting(settings: Settings, key: str) -> object:
    """Return the value of a setting by its full name, e.g. "train.lr"; None where a method does not have it."""
    value: object = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return value


def iterate_setting_names(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """Yield the full name of every setting."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from iterate_setting_names(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"
