"""Tasks as data and scoring rules, readable and testable without torch.

`load("glue/sst2")` gives the `Task` that `tasks/glue.py` builds for its subset "sst2"; the name of a task is the name
of its file in tasks/ and of its settings in conf/task/.
"""

import importlib
from importlib.util import find_spec
from inspect import signature
from typing import Any

from tasks.base import Split, Task, TaskError

__all__ = ["Split", "Task", "TaskError", "load"]


def load(name: str, options: dict[str, Any] | None = None, data_dir: str | None = None) -> Task:
    """Return the task called `name` ("file" or "file/subset"); `options` are that task's own, from its settings.

    `data_dir` is for tasks whose labels or splits follow from the user's files; what only asks for a task's name or
    metric leaves it out.

    Raises:
        TaskError: the task has no such option, or not that value.
    """
    file, _, subset = name.partition("/")
    if not file.isidentifier() or not find_spec(f"tasks.{file}"):
        raise TaskError(f"task.name={name}: no such task; take task=NAME, one of those in conf/task/")
    build = getattr(importlib.import_module(f"tasks.{file}"), "task", None)
    if build is None:
        raise TaskError(
            f"task.name={name}: not a task but a module that tasks share; take task=NAME, one of those in conf/task/"
        )
    known = {key: parameter.default for key, parameter in list(signature(build).parameters.items())[1:]}
    for key, value in (options or {}).items():
        if key not in known:
            raise TaskError(f"task.options.{key}: {name} has no such option; it has {', '.join(known) or 'none'}")
        if type(value) is not type(known[key]):
            raise TaskError(f"task.options.{key}={value}: must be like {known[key]!r}, its default")
    found = build(subset, **(options or {}))
    found.data_dir = data_dir
    return found
