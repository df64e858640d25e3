"""Rows of a task: its own splits, and training rows that are set apart."""

from dual_lora.lab.config.schema import Settings
from dual_lora.lab.config.tasks import translate_task_errors
from dual_lora.lab.errors import require, translate_read_errors
from dual_lora.lab.inputs.hub import use_cache_if_unreachable
from tasks import Split, Task

# Which training rows `eval.holdout` sets apart.
HOLDOUT_SEED = 2512


def load_split(task: Task, name: str, settings: Settings) -> Split:
    """Return a split. Where a number of rows is set, training takes a sample drawn with the run's seed and evaluation
    the first rows, the same for every run.

    Raises:
        UserError: the data is missing, damaged, cannot be fetched, or too little to set rows of it apart.
    """
    split, train = read_split(task, name, settings), name == "train"
    if train and settings.eval.holdout:
        split = split_holdout(split, settings.eval.holdout)[0]
    limit = (settings.train if train else settings.eval).max_examples
    if limit is None or limit >= len(split.rows):
        return split
    rows = split.rows.shuffle(seed=settings.seed) if train else split.rows
    return Split(rows.select(range(limit)), split.origin)


def load_scored_splits(task: Task, settings: Settings) -> dict[str, Split]:
    """Return the rows a run is evaluated on, by split: the task's own, or training rows set apart.

    Raises:
        UserError: as `load_split`.
    """
    if not settings.eval.holdout:
        with translate_task_errors():
            names = task.eval_splits  # of the user's own files, known by what is there
        return {name: load_split(task, name, settings) for name in names}
    apart = split_holdout(read_split(task, "train", settings), settings.eval.holdout)[1]
    limit = min(len(apart.rows), settings.eval.max_examples or len(apart.rows))
    return {task.eval_splits[0]: Split(apart.rows.select(range(limit)), apart.origin)}


def split_holdout(train: Split, number: int) -> tuple[Split, Split]:
    """Return the training rows without `number` of them, and these, the same for every run."""
    rows = train.rows
    require(number < len(rows), f"eval.holdout={number}: {train.origin} has {len(rows)} rows; set fewer apart")
    mixed = rows.shuffle(seed=HOLDOUT_SEED)
    rest, apart = mixed.select(range(number, len(rows))), mixed.select(range(number))
    return Split(rest, train.origin), Split(apart, f"{train.origin} (set apart)")


def read_split(task: Task, name: str, settings: Settings) -> Split:
    """Return a whole split of the task.

    Raises:
        UserError: the data is missing, damaged or cannot be fetched.
    """
    if settings.data_dir is None and "hub" in task.source():
        use_cache_if_unreachable(data=True)
    with (
        translate_read_errors(f"task={task.name}: cannot load its {name} split", "give data_dir=DIR"),
        translate_task_errors(),
    ):
        return task.split(name, settings.data_dir)
