"""Tasks as data and scoring rules, readable and testable without torch.

`load("glue/sst2")` gives the `Task` that `tasks/glue.py` builds for its subset "sst2"; the name of a task is the name
of its file in tasks/ and of its settings in conf/task/.
"""

import importlib
from inspect import signature
from typing import Any

from tasks.base import Split, Task, TaskError

__all__ = ["Split", "Task", "TaskError", "load"]


def load(name: str, options: dict[str, Any] | None = None) -> Task:
    """Return the task called `name` ("file" or "file/subset"); `options` are that task's own, from its settings.

    Raises:
        TaskError: the task has no such option, or not that value.
    """
    file, _, subset = name.partition("/")
    build, options = importlib.import_module(f"tasks.{file}").task, options or {}
    known = list(signature(build).parameters)[1:]
    for option in options:
        if option not in known:
            raise TaskError(f"task.options.{option}: {name} has no such option; it has {', '.join(known) or 'none'}")
    return build(subset, **options)
