"""Rows of a task: its own splits, and training rows held out for evaluation."""

import itertools
from dataclasses import replace

from dual_lora.lab.config.compatibility import check_mixed_rows
from dual_lora.lab.config.outside.hub import use_cache_if_unreachable
from dual_lora.lab.config.schema import Evaluate, Settings, is_hub_id
from dual_lora.lab.config.tasks import translate_task_errors
from dual_lora.lab.errors import require, translate_read_errors
from dual_lora.lab.system.distributed import print_warning
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
    if name == "train":
        return select_training_rows(read_training_split(task, settings)[0], settings)
    split, limit = read_split(task, name, settings), settings.eval.max_examples
    if limit is None:
        return split
    chosen = select_rows(split, limit)
    warn_of_one_label(name, chosen, split)
    return chosen


def warn_of_one_label(name: str, chosen: Split, split: Split) -> None:
    """Print a warning if rows chosen from a split, which may be sorted, have only one label and the split has more."""
    if "label" not in split.rows.column_names:
        return
    if len(set(chosen.rows["label"])) < 2 <= len(set(split.rows["label"])):
        said = f"the first {len(chosen.rows):,} of {len(split.rows):,} rows have one label only; scores mean little"
        print_warning(f"{name}: {said}; raise eval.max_examples, or mix the rows")


def select_training_rows(split: Split, settings: Settings) -> Split:
    """Return the rows of training's split that a run trains on.

    Raises:
        UserError: there are too few rows to set some apart.
    """
    if settings.eval.reserved_rows:
        split = split_training_rows(split, settings.eval)[0]
    limit = settings.train.max_examples
    if limit is None or limit >= len(split.rows):
        return split
    return select_rows(Split(split.rows.shuffle(seed=settings.seed), split.origin), limit)


def select_rows(split: Split, limit: int) -> Split:
    """Return the first rows of a split."""
    return Split(split.rows.select(range(min(limit, len(split.rows)))), split.origin)


def load_scored_splits(task: Task, settings: Settings) -> dict[str, Split]:
    """Return the rows a run is evaluated on, by split: the task's own, or training rows that are held out.

    Raises:
        UserError: as `load_split`, or the training rows are of several sets.
    """
    if not settings.eval.holdout:
        with translate_task_errors():
            names = task.eval_splits  # with the user's own files, the folder decides
        return {name: load_split(task, name, settings) for name in names}
    check_mixed_rows(settings.eval, task)
    train = read_training_split(task, settings)[0]
    return label_as_first_split(task, train, split_training_rows(train, settings.eval)[1], settings)


def load_development_split(task: Task, settings: Settings) -> dict[str, Split] | None:
    """Return the training rows that epochs are compared on, under the name of the task's first split; None if there
    are none.

    Raises:
        UserError: as `load_scored_splits`.
    """
    if not settings.eval.development_rows:
        return None
    check_mixed_rows(settings.eval, task)
    train = read_training_split(task, settings)[0]
    return label_as_first_split(task, train, split_training_rows(train, settings.eval)[2], settings)


def label_as_first_split(task: Task, train: Split, apart: Split, settings: Settings) -> dict[str, Split]:
    """Return rows that were set apart (at most `eval.max_examples`) from `train` under the name of the task's first
    split. A warning says how many of them the run trains on, too, because the file has them more than once."""
    with translate_task_errors():
        name = task.eval_splits[0]
    chosen = select_rows(apart, settings.eval.max_examples or len(apart.rows))
    copies = count_copies(chosen, select_training_rows(train, settings))
    if copies:
        warning = f"{copies:,} of {len(chosen.rows):,} rows set apart also occur among the training rows"
        print_warning(f"{chosen.origin}: {warning}")
    return {name: replace(chosen, in_training=copies)}


def count_copies(split: Split, train: Split) -> int:
    """Return how many rows of a split equal a row of training: have its prompt if they have one, since many texts may
    be right for it, else all of its columns but the id."""

    def list_contents(split: Split) -> list[str]:
        names = split.rows.column_names
        columns = ["prompt"] if "prompt" in names else [name for name in names if name != "id"]
        return [repr([row[name] for name in columns]) for row in split.rows.select_columns(columns).to_list()]

    known = set(list_contents(train))
    return sum(content in known for content in list_contents(split))


def read_training_split(task: Task, settings: Settings) -> tuple[Split, Split | None]:
    """Return the training rows and those set apart for the loss (`task.validation_rows`), if any are: the same for
    every run, and for the same file those that LLM-Adapters' and DoRA's scripts draw.

    Raises:
        UserError: as `read_split`, or there are not enough rows.
    """
    train, count = read_split(task, "train", settings), settings.task.validation_size
    if not count:
        return train, None
    known = len(train.rows)
    require(
        count < known,
        f"task.validation_rows={count}: {train.origin} has {known} rows; set fewer apart with task.validation_rows",
    )
    parts = train.rows.train_test_split(test_size=count, shuffle=True, seed=VALIDATION_SEED)
    return Split(parts["train"], train.origin), Split(parts["test"], f"{train.origin} (loss only)")


def split_training_rows(train: Split, settings: Evaluate) -> tuple[Split, Split, Split]:
    """Return the rows to train on, those set apart for evaluation and those to compare epochs on, in an order that is
    the same for every run.

    The first `holdout_skip` rows are in none: another run is evaluated on them.

    Raises:
        UserError: there are not enough rows.
    """
    rows, end = train.rows, settings.reserved_rows
    given = {name: getattr(settings, name) for name in ("holdout", "holdout_skip", "development_rows")}
    asked = " ".join(f"eval.{name}={count}" for name, count in given.items() if count)
    require(end < len(rows), f"{asked}: {train.origin} has {len(rows)} rows; set fewer apart")
    mixed, skipped = rows.shuffle(seed=HOLDOUT_SEED), settings.holdout_skip or 0
    cuts = (skipped, skipped + (settings.holdout or 0), end)
    rest = mixed.select(range(end, len(rows)))
    apart = [Split(mixed.select(range(*cut)), f"{train.origin} (set apart)") for cut in itertools.pairwise(cuts)]
    return Split(rest, train.origin), *apart


def read_split(task: Task, name: str, settings: Settings) -> Split:
    """Return a full split of the task.

    Raises:
        UserError: the data is missing, damaged or cannot be fetched.
    """
    if settings.data_dir is None:
        source = task.source()
        if "hub" in source or is_hub_id(source.get(name, "").partition("@")[0]):
            use_cache_if_unreachable(data=True)
    with (
        translate_read_errors(f"task={task.name}: cannot load its {name} split", "give data_dir=DIR"),
        translate_task_errors(),
    ):
        return task.split(name, settings.data_dir)
