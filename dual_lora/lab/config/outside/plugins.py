"""Code from outside of this repository, which a command line names on purpose: plugins=FILE.py, DIR or MODULE.

It defines tasks. A command runs no other code except this repository's and its libraries'. A file of settings and a
record cannot name any. Its hash is part of the identity of every run of the command.
"""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import tasks
from dual_lora.lab.config.paths import check_plain_file, resolve_path
from dual_lora.lab.errors import UserError, describe_with_place, require

PREFIX = "dual_lora_plugin_"  # of the names of modules that are imported from a path
PLUGIN_REMEDY = "give a file FILE.py, the folder of a package, or the name of an installed module"


def import_plugin(word: str) -> None:
    """Import a plugin and register its tasks under the name of its file or folder.

    Raises:
        UserError: there is no such code, it cannot be imported, or a task here has its name.
    """
    place, name = locate_plugin(word)
    require(name.isidentifier(), f"plugins={word}: {name} is not a Python name; rename it")
    require(not find_spec(f"tasks.{name}"), f"plugins={word}: {name} is the name of a task here; rename it")
    known = tasks.plugins.get(name)
    require(known is None, f"plugins={word}: called {name} like {known and known.path}; rename one")
    with translate_import_errors(word):
        module = import_path(place, name) if place else import_module(word)
    path = Path(module.__file__)
    root = path if place else find_root_file(module)
    tasks.plugins[name] = tasks.Plugin(module, path.parent if path.name == "__init__.py" else path, hash_plugin(root))


def find_root_file(module: ModuleType) -> Path:
    """Return the __init__.py of the package that an installed module belongs to, since the module may import anything
    from it; the module's own file if it belongs to none."""
    root = sys.modules[module.__name__.partition(".")[0]]
    return Path(root.__file__ or module.__file__)


def locate_plugin(word: str) -> tuple[Path | None, str]:
    """Return the file or folder that a word names, None for an installed module, and the plugin's name.

    Raises:
        UserError: there is none.
    """
    path = resolve_path("plugins", word)
    if path.suffix == ".py" or path.is_dir() or "/" in word:
        is_package = not path.is_dir() or (path / "__init__.py").is_file()
        require(is_package, f"plugins={word}: no __init__.py there, so it is not a package; {PLUGIN_REMEDY}")
        require(path.exists(), f"plugins={word}: no such file; {PLUGIN_REMEDY}")
        check_plain_file(path)
        path = path.absolute()
        return path, path.name.removesuffix(".py")
    with translate_import_errors(word):
        found = all(part.isidentifier() for part in word.split(".")) and find_spec(word)
    require(bool(found and found.origin), f"plugins={word}: no such file, and no module of that name; {PLUGIN_REMEDY}")
    return None, word.rpartition(".")[2]


def import_path(place: Path, name: str) -> ModuleType:
    """Import a file, or a folder as a package."""
    inside = {"submodule_search_locations": [str(place)]} if place.is_dir() else {}
    file = place / "__init__.py" if place.is_dir() else place
    spec = spec_from_file_location(f"{PREFIX}{name}", file, **inside)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def translate_import_errors(word: str) -> Iterator[None]:
    """Turn whatever ends an import into one line.

    Raises:
        UserError: with the error and its line.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"plugins={word}: cannot be imported ({describe_with_place(error)}); fix it") from error


def hash_plugin(path: Path) -> str:
    """Return the SHA-256 of a file, or of all Python files of a package, whose __init__.py `path` is."""
    if path.name != "__init__.py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.parent.rglob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(path.parent).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def describe_plugins() -> dict[str, dict[str, str]]:
    """Return file name and hash of every plugin, by its name, for a record; of an installed module also its name."""
    return {name: describe_plugin(found) for name, found in sorted(tasks.plugins.items())}


def describe_plugin(plugin: tasks.Plugin) -> dict[str, str]:
    """Return the name of a plugin's file or folder, its hash, and the name of an installed module. Where the code lies
    says nothing about a run; older records name the whole path."""
    named = plugin.module.__name__
    installed = {} if named.startswith(PREFIX) else {"module": named}
    return {"path": plugin.path.name, "sha256": plugin.sha256, **installed}


def locate_plugins() -> dict[str, dict[str, str]]:
    """Return what `describe_plugins` does, but with whole paths, for the processes of a launch."""
    return {name: about | {"path": str(tasks.plugins[name].path)} for name, about in describe_plugins().items()}


def get_plugin_word(recorded: dict[str, str]) -> str:
    """Return what `plugins=` names a recorded plugin by. A module of a package cannot be imported from its file."""
    return recorded.get("module", recorded["path"])


def check_plugins(recorded: dict[str, Any], where: str) -> None:
    """Refuse to read a run without the code it was done with, or with other code.

    recorded: what `describe_plugins` returned then. where: how messages name the run.

    Raises:
        UserError: which plugin is missing, changed or not of the run.
    """
    missing = [get_plugin_word(about) for name, about in recorded.items() if name not in tasks.plugins]
    word = missing[0] if len(missing) == 1 else f"[{','.join(missing)}]"
    require(not missing, f"{where}: done with code of {', '.join(missing)}; to run that code again, add plugins={word}")
    for name, found in tasks.plugins.items():
        require(name in recorded, f"plugins={found.path}: {where} was done without it; drop it")
        is_unchanged = found.sha256 == recorded[name]["sha256"]
        require(
            is_unchanged, f"plugins={found.path}: changed since {where} was done; restore the file, or do the run again"
        )
