"""Tasks as data and scoring rules, readable and testable without torch.

`load("glue/sst2")` gives the `Task` that `tasks/glue.py` builds for its subset "sst2"; the name of a task is the name
of its file in tasks/ and of its settings in conf/task/.
"""

import importlib

from tasks.base import Split, Task, TaskError

__all__ = ["Split", "Task", "TaskError", "load"]


def load(name: str) -> Task:
    """Return the task called `name` ("file" or "file/subset")."""
    file, _, subset = name.partition("/")
    return importlib.import_module(f"tasks.{file}").task(subset)
