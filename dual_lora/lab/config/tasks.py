"""The task a run's settings name, and a task's own errors as the user's one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import tasks
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError


@contextmanager
def translate_task_errors() -> Iterator[None]:
    """Turn a task's error into the user's one line."""
    try:
        yield
    except tasks.TaskError as error:
        raise UserError(str(error)) from error


def load_task(settings: Settings) -> tasks.Task:
    """Return the task a run is about.

    Raises:
        UserError: its options are wrong.
    """
    with translate_task_errors():
        return tasks.load(settings.task.name, settings.task.options, settings.data_dir)
