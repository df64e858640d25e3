"""Tasks as data and scoring rules, readable and testable without torch.

`load("glue/sst2")` gives the `Task` that `tasks/glue.py` builds for its subset "sst2"; the name of a task is the name
of its file in tasks/ and of its settings in conf/task/.
"""

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks.base import Split, Task, TaskError

__all__ = ["Plugin", "Split", "Task", "TaskError", "load", "plugins"]


@dataclass(frozen=True)
class Plugin:
    """Code from outside that a command line named: the imported module, its file or folder, and the hash of these."""

    module: ModuleType
    path: Path
    sha256: str


# The code from outside, by its name: `load` finds a task of that name in it.
plugins: dict[str, Plugin] = {}
REQUIRED = ("name", "version", "form", "metric")  # attributes without a default


def find_module(file: str) -> ModuleType | None:
    """Return the module of tasks/ or the plugin that is called `file`."""
    if file in plugins:
        return plugins[file].module
    here = file.isidentifier() and find_spec(f"tasks.{file}")
    return importlib.import_module(f"tasks.{file}") if here else None


def load(name: str, options: dict[str, Any] | None = None, data_dir: str | None = None) -> Task:
    """Return the task called `name` ("file" or "file/subset"); `options` are that task's own, from its settings.

    `data_dir` is for tasks whose labels or splits follow from the user's files; what only asks for a task's name or
    metric leaves it out.

    Raises:
        TaskError: the task has no such option, or not that value.
    """
    file, _, subset = name.partition("/")
    module = find_module(file)
    if module is None:
        remedy = "take task=NAME, one of those in conf/task/, or give the file of your own task as plugins=FILE.py"
        raise TaskError(f"task.name={name}: no such task; {remedy}")
    build = getattr(module, "task", None)
    if build is None and file in plugins:
        raise TaskError(f"{plugins[file].path}: defines no function task(subset, **options); add it")
    if build is None:
        raise TaskError(
            f"task.name={name}: not a task but a module that tasks share; take task=NAME, one of those in conf/task/"
        )
    known = {key: parameter.default for key, parameter in list(signature(build).parameters.items())[1:]}
    known = {key: list(default) if isinstance(default, tuple) else default for key, default in known.items()}
    for key, value in (options or {}).items():
        if key not in known:
            raise TaskError(f"task.options.{key}: {name} has no such option; it has {', '.join(known) or 'none'}")
        if type(value) is not type(known[key]):
            raise TaskError(f"task.options.{key}={value}: must be like {known[key]!r}, its default")
    if file in plugins:
        found = build_own_task(plugins[file], subset, options or {})
    else:
        found = build(subset, **(options or {}))
    found.data_dir = data_dir
    return found


def build_own_task(plugin: Plugin, subset: str, options: dict[str, Any]) -> Task:
    """Return the task that a plugin's function `task` returns.

    Raises:
        TaskError: it fails, or returns something other than a complete task.
    """
    try:
        found = plugin.module.task(subset, **options)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"{plugin.path}: its function task(subset, **options) fails ({error!r}); fix it") from error
    if not isinstance(found, Task):
        raise TaskError(f"{plugin.path}: task() returns {str(found)[:80]!r}; return a subclass of tasks.base.Task")
    if missing := [name for name in REQUIRED if not hasattr(found, name)]:
        raise TaskError(f"{plugin.path}: its task has no {', '.join(missing)}; set it")
    return found
