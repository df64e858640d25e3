"""Loading the task that a run's settings name, and turning a task's errors into one line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import tasks
from dual_lora.lab.config.paths import resolve_path
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import UserError, require

# What identifies the data and its task, of all data that this process has checked.
checked_files: set[tuple[str, str, str]] = set()
MAX_FOLDERS = 50  # below a folder that holds no data, looked through for it


@contextmanager
def translate_task_errors() -> Iterator[None]:
    """Turn a task's error into the user's one line.

    Raises:
        UserError: instead of the task's own error.
    """
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


def check_data_dir(settings: Settings) -> None:
    """Refuse a data_dir that the task does not read, that holds none of its files, or tables without its columns.
    Where the files are one or two levels above or below, name that folder.

    Raises:
        UserError: with the folder that was most likely meant.
    """
    task, data_dir = load_task(settings), settings.data_dir
    folder = resolve_path("data_dir", data_dir)
    try:
        found = task.source(data_dir)
    except tasks.TaskError as error:
        meant = None if "give data_dir=" in str(error) else find_data_near(task, folder)
        raise UserError(f"{error}{f'; give data_dir={meant}' if meant else ''}") from error
    own = f"data_dir={data_dir}: {task.name} reads no files, it makes its own data; drop it"
    with suppress(tasks.TaskError):  # of a task that has no data but what a folder holds
        require(found != tasks.load(task.name, settings.task.options).source(), own)
    files = (task.name, str(settings.task.options), str(found))
    if files not in checked_files:  # once, however many runs read them
        with translate_task_errors():
            task.check_files()
        checked_files.add(files)


def find_data_near(task: tasks.Task, folder: Path) -> Path | None:
    """Return the folder that the task's files are in, up to two levels above or below the given one."""
    if not folder.is_dir():
        return None
    below = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_dir()]
    for near in (*folder.absolute().parents[:2], *below[:MAX_FOLDERS]):
        with suppress(tasks.TaskError):
            if task.source(str(near)):
                return near
    return None
