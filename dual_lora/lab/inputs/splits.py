"""Rows of a task: its own splits, and training rows held out for evaluation."""

from dual_lora.lab.config.schema import Evaluate, Settings
from dual_lora.lab.config.tasks import translate_task_errors
from dual_lora.lab.errors import require, translate_read_errors
from dual_lora.lab.inputs.hub import use_cache_if_unreachable
from tasks import Split, Task

# Seed of the draw of the training rows that `eval.holdout` holds out.
HOLDOUT_SEED = 2512
# Seed of the draw of the rows whose loss may choose the checkpoint, that of LLM-Adapters' and DoRA's scripts.
VALIDATION_SEED = 42


def load_split(task: Task, name: str, settings: Settings) -> Split:
    """Return a split. If the number of rows is limited, training takes a sample drawn with the run's seed, and
    evaluation takes the first rows, the same for every run.

    Raises:
        UserError: the data is missing, damaged, cannot be fetched, or has too few rows to hold some out.
    """
    train = name == "train"
    split = read_training_split(task, settings)[0] if train else read_split(task, name, settings)
    if train and settings.eval.holdout:
        split = split_holdout(split, settings.eval)[0]
    limit = (settings.train if train else settings.eval).max_examples
    if limit is None or limit >= len(split.rows):
        return split
    rows = split.rows.shuffle(seed=settings.seed) if train else split.rows
    return Split(rows.select(range(limit)), split.origin)


def load_scored_splits(task: Task, settings: Settings) -> dict[str, Split]:
    """Return the rows a run is evaluated on, by split: the task's own, or training rows that are held out.

    Raises:
        UserError: as `load_split`.
    """
    if not settings.eval.holdout:
        with translate_task_errors():
            names = task.eval_splits  # of the user's own files, known by what is there
        return {name: load_split(task, name, settings) for name in names}
    apart = split_holdout(read_training_split(task, settings)[0], settings.eval)[1]
    limit = min(len(apart.rows), settings.eval.max_examples or len(apart.rows))
    return {task.eval_splits[0]: Split(apart.rows.select(range(limit)), apart.origin)}


def read_training_split(task: Task, settings: Settings) -> tuple[Split, Split | None]:
    """Return the training rows and those set apart for the loss (`task.validation_rows`), if any are: the same for
    every run, and for the same file those that LLM-Adapters' and DoRA's scripts draw.

    Raises:
        UserError: as `read_split`, or there are not enough rows.
    """
    train, count = read_split(task, "train", settings), settings.task.rows_apart
    if not count:
        return train, None
    known = len(train.rows)
    require(
        count < known,
        f"task.validation_rows={count}: {train.origin} has {known} rows; set fewer apart with task.validation_rows",
    )
    parts = train.rows.train_test_split(test_size=count, shuffle=True, seed=VALIDATION_SEED)
    return Split(parts["train"], train.origin), Split(parts["test"], f"{train.origin} (loss only)")


def split_holdout(train: Split, settings: Evaluate) -> tuple[Split, Split]:
    """Return the rows to train on and those set apart for evaluation, in an order that is the same for every run.

    The first `holdout_skip` rows are in neither: another run is evaluated on them.

    Raises:
        UserError: there are not enough rows.
    """
    rows, end = train.rows, settings.rows_apart
    asked = f"eval.holdout={settings.holdout}" + (
        f" eval.holdout_skip={settings.holdout_skip}" if settings.holdout_skip else ""
    )
    require(end < len(rows), f"{asked}: {train.origin} has {len(rows)} rows; set fewer apart")
    mixed = rows.shuffle(seed=HOLDOUT_SEED)
    rest, apart = mixed.select(range(end, len(rows))), mixed.select(range(settings.holdout_skip or 0, end))
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
