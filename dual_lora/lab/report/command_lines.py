"""The one command that makes the runs of a cell, from their settings: what differs from the choices' own values.

Files are where the reader has them: `model.path=DIR`, `data_dir=DIR` and `--config-dir DIR` stand for the folders that
the runs had, and a plugin's file is named without its folder.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings
from dual_lora.lab.config.outside.plugins import describe_plugins, get_plugin_word
from dual_lora.lab.config.overrides import parse_override
from dual_lora.lab.config.schema import GROUPS, Settings
from dual_lora.lab.errors import UserError
from dual_lora.lab.record.identity import NOT_IDENTITY, serialize_identity_settings

# Setting a value may change others that follow from it, so differences are looked for again, up to this many times.
MAX_ROUNDS = 4
# A text that Hydra reads as it is, unless it looks like a number, true or null.
PLAIN = re.compile(r"[\w./+-]+", re.ASCII)
# What a command leaves out: where files are, and what changes neither the result nor the log.
LEFT_OUT = {
    "wandb", "seed", "study", "data_dir", "init_from", "force", "plan", "hardware.accelerator",
    *(f"{group}.{key}" for group, keys in NOT_IDENTITY.items() for key in keys if not key.startswith("log_")),
}  # fmt: skip


def build_command(all_settings: list[Settings]) -> str:
    """Return the command that makes these runs, which differ only in their seeds; empty where no command line gives
    such settings."""
    first, seeds = all_settings[0], ",".join(dict.fromkeys(str(settings.seed) for settings in all_settings))
    words = build_words(replace(first, seed=0))
    if words is None:
        return ""
    more = [f"seed={seeds}", f"study={first.study}"]
    more += ["model.path=DIR"] * bool(first.model.path) + ["data_dir=DIR"] * bool(first.data_dir)
    more += [f"init_from=runs/{first.study}/{Path(first.init_from).name}"] if first.init_from else []
    outside = build_outside_words({group: getattr(first, group).name for group in GROUPS})
    return shlex.join(["python", "train.py", *["-m"] * ("," in seeds), *outside, *words, *more])


def build_sweep_command(experiment: str, scale: str) -> str:
    """Return the command that makes every run of an experiment, and its report."""
    outside = build_outside_words({"experiment": experiment, "scale": scale})
    return shlex.join(["python", "sweep.py", *outside, f"experiment={experiment}", f"scale={scale}"])


def build_outside_words(choices: dict[str, str]) -> list[str]:
    """Return the words that name the code and the settings files from outside of the repository that a command needs.
    choices: the names it chooses, by their groups."""
    plugins = [get_plugin_word(about) for about in describe_plugins().values()]
    places = [f"{group}/{name}.yaml" for group, name in choices.items()]
    own = any((folder / place).is_file() for folder in paths.own_folders for place in places)
    words = [f"plugins={format_override(plugins if plugins[1:] else plugins[0])}"] if plugins else []
    return [*words, *["--config-dir", "DIR"] * own]


def build_words(settings: Settings) -> list[str] | None:
    """Return the overrides that compose settings of this identity; None if none do."""
    without_files = replace(settings, init_from=None, data_dir=None, model=replace(settings.model, path=None))
    words = {group: getattr(settings, group).name for group in GROUPS}
    wanted = serialize_identity_settings(without_files)
    try:
        for _ in range(MAX_ROUNDS):
            found = [f"{key}={value}" for key, value in words.items() if (key, value) != ("hardware", "single")]
            made = compose_words((paths.CONF, *paths.own_folders), tuple(found))
            if serialize_identity_settings(made) == wanted:
                return found
            words |= dict(iterate_differences(asdict(made), asdict(without_files)))
    except UserError:  # a value that no command line gives
        pass
    return None


@cache
def compose_words(folders: tuple[Path, ...], words: tuple[str, ...]) -> Settings:
    """Return the settings that these overrides compose from the files in `folders`, which are those in use; the rows of
    a report share many."""
    return load_settings(list(words))


def iterate_differences(made: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield an override for every value that differs. Fields of the adapter are yielded only once nothing else differs,
    because most of them follow from other settings."""
    found = list(iterate_overrides(made, wanted, ""))
    yield from [pair for pair in found if "method.peft." not in pair[0]] or found


def iterate_overrides(made: dict[str, Any], wanted: dict[str, Any], before: str) -> Iterator[tuple[str, str]]:
    """Yield key and value of an override for every value that differs."""
    for key, value in wanted.items():
        name = f"{before}{key}"
        if name in LEFT_OUT or (key in made and made[key] == value):
            continue
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            yield from iterate_overrides(made[key], value, f"{name}.")
        else:
            yield f"{'' if key in made else '+'}{name}", format_override(value)


def format_override(value: object) -> str:
    """Return a value as Hydra reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(format_override, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{format_override(part)}" for key, part in value.items()) + "}"
    if isinstance(value, str) and not (PLAIN.fullmatch(value) and parse_override(f"key={value}").value() == value):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)
