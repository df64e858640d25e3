"""The settings that a run's record holds, and settings looked up or replaced by their full names."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import SCHEMA, build_settings, describe_config_error
from dual_lora.lab.config.overrides import check_text
from dual_lora.lab.config.paths import load_yaml
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, require

# Settings that came later than the first records, which did what conf/ says for them where it has no other value here.
ADDED_SETTINGS = ("init_from", "plan", "model.architecture", "model.chat", "task.stop", "task.train_rows")
ADDED_SETTINGS += ("train.group_by_length", "train.loss_scale", "eval.holdout", "wandb.job_type", "wandb.tags", "hardware")
# Runs of that time kept no checkpoints by the clock, which is what conf/ has today.
OLD_VALUES = {"train": {"save_minutes": None}}


@cache
def load_old_defaults(conf: Path) -> DictConfig:
    """Return the values of settings that a record may lack because it is older than they are."""
    today = OmegaConf.merge(load_yaml(conf / "config.yaml"), {"hardware": load_yaml(conf / "hardware" / "single.yaml")})
    found = OmegaConf.create(OLD_VALUES)
    for key in ADDED_SETTINGS:
        OmegaConf.update(found, key, OmegaConf.select(today, key), force_add=True)
    return found


def load_recorded_settings(run: Path, key: str = "run") -> Settings:
    """Return the settings a run's record holds. key: what the command line calls that run.

    Raises:
        UserError: there is no record, or one that today's settings cannot hold.
    """
    path = run / "config.yaml"
    require(path.is_file(), f"{key}={run}: no config.yaml there; give the folder of a run, runs/STUDY/ID")
    try:
        stored = load_yaml(path)
        check_text(str(OmegaConf.to_container(stored)), "its values")
        return build_settings(OmegaConf.merge(OmegaConf.structured(SCHEMA), load_old_defaults(paths.CONF), stored))
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


def iterate_setting_names(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """Yield the full name of every setting."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from iterate_setting_names(value, f"{before}{key}.")
        else:
            yield f"{before}{key}"
