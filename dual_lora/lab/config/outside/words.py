"""The words of a command line that name what lies outside of this repository: --config-dir DIR and plugins=FILE."""

import tasks
from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import compose_choices
from dual_lora.lab.config.outside.models import found_models
from dual_lora.lab.config.outside.plugins import import_plugin
from dual_lora.lab.config.overrides import parse_override
from dual_lora.lab.config.paths import find_choices, resolve_path
from dual_lora.lab.errors import require, suggest_name

FOLDER_FLAGS = ("--config-dir", "-cd")  # Hydra's names for it
FOLDERS = ("model", "task", "method", "hardware", "experiment", "family")
CODE_KEY = "plugins"


def take_outside_words(argv: list[str], takes_folder: bool = True) -> list[str]:
    """Use what a command line names from outside, and return its other words.

    takes_folder: whether the command composes settings, so that a folder of them can matter.

    Raises:
        UserError: a folder or a piece of code is not what it should be.
    """
    found_models.clear()
    paths.own_folders.clear()
    tasks.plugins.clear()
    compose_choices.cache_clear()
    rest = iter(argv)
    others: list[str] = []
    for word in rest:
        flag, given, value = word.partition("=")
        if flag in FOLDER_FLAGS:
            require(takes_folder, f"{flag}: a record holds every setting of its run; drop it")
            use_config_folder(flag, value if given else next(rest, ""))
        elif flag == CODE_KEY:
            for place in list_plugins(word):
                import_plugin(place)
        else:
            others.append(word)
    return others


def list_plugins(word: str) -> list[str]:
    """Return what plugins=FILE or plugins=[FILE,FILE] names.

    Raises:
        UserError: it is of another form.
    """
    override = parse_override(word)
    form = f"{word[:300]}: not of the form plugins=FILE.py or plugins=[FILE.py,FILE.py]"
    require(not override.is_sweep_override(), form)
    value = override.value()
    places = value if isinstance(value, list) else [value]
    require(bool(places) and all(place and isinstance(place, str) for place in places), form)
    return places


def use_config_folder(flag: str, value: str) -> None:
    """Have the settings files in a folder found in addition to those in conf/.

    Raises:
        UserError: there is no such folder, or a file in it lies in the wrong place or has a name that is taken.
    """
    require(bool(value), f"{flag}: needs a folder; write {flag} DIR")
    require(not paths.own_folders, f"{flag}: given twice; drop one")
    folder = resolve_path(flag, value)
    require(folder.is_dir(), f"{flag} {value}: no such folder")
    form = f"settings are in {flag} DIR as DIR/GROUP/NAME.yaml, GROUP one of {', '.join(FOLDERS)}"
    files = sorted(path for ending in ("*.yaml", "*.yml") for path in folder.rglob(ending))
    require(bool(files), f"{flag} {value}: no settings in it; {form}")
    for file in files:
        group, *names = file.relative_to(folder).parts
        require(bool(names) and group in FOLDERS, f"{file}: not read; {form}.{suggest_name(group, FOLDERS)}")
        require(file.suffix == ".yaml", f"{file}: not read; name it {file.stem}.yaml")
        name = "/".join(names).removesuffix(".yaml")
        require(name not in find_choices(group), f"{file}: conf/{group} has a {name}, too; rename it")
    paths.own_folders.append(folder.absolute())
