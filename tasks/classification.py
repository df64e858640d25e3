"""Classification or regression on tables of your own (which files: tasks/own_files.py).

    python train.py task=classification data_dir=DIR                                   columns text and label
    python train.py task=classification data_dir=DIR task.options.text=question task.options.text_pair=answer
    python train.py task=classification data_dir=DIR task.options.metric=pearson       labels are numbers

Labels are class names, in sorted order (numbers by value) or in that of `labels`. Every class must be both in training
and in the scored rows, unless `labels` lists them: a class that is in one of them only is as a rule a typing mistake.
Scores: accuracy, macro-F1 (the unweighted mean over classes), Matthews correlation and, of two classes, F1 of the
second one; of numbers Pearson and Spearman correlation and their mean. `metric` is the one a table shows first.
"""

import math
import re
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from tasks.base import Row, TaskError
from tasks.own_files import OwnFiles, Place, Placed, text_of

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.measures import Score

VERSION = 1
CORRELATIONS = ("pearson", "spearman", "pearson_spearman_mean")
METRICS = ("accuracy", "macro_f1", "matthews", "f1", *CORRELATIONS)
MANY = 20  # classes that need two rows each on average; else the column holds something else than classes


def task(
    subset: str,
    text: str = "text",
    text_pair: str = "",
    label: str = "label",
    metric: str = "accuracy",
    labels: list = [],  # noqa: B006 - never changed
    scored: str = "test",
    held_out: float = 0.1,
    split_seed: int = 0,
    quotes: bool = True,
    overlap: bool = False,
) -> "Classification":
    """Return the task; `text`, `text_pair` and `label` name columns, and own_files.py explains the last six options.

    Raises:
        TaskError: an option is wrong.
    """
    if subset:
        raise TaskError(f"classification/{subset}: no such task, only classification")
    if metric not in METRICS:
        raise TaskError(f"task.options.metric={metric}: must be one of {', '.join(METRICS)}")
    if odd := [name for name in labels if not isinstance(name, (str, int, float))]:
        raise TaskError(f"task.options.labels: {odd[0]!r} is no class name; write a list of names")
    names = [str(name).lower() if isinstance(name, bool) else str(name).strip() for name in labels]
    if len(set(names)) < len(names) or len(names) == 1 or "" in names:
        raise TaskError(f"task.options.labels={names}: must be two class names or more, all different")
    if names and metric in CORRELATIONS:
        raise TaskError(f"task.options.labels={names}: {metric} is of numbers, which have no classes; drop labels")
    columns = [name for name in (text, text_pair, label) if name]
    if not text or not label or len(set(columns)) < len(columns):
        raise TaskError("task.options: text, text_pair and label must be the names of different columns")
    files = {"scored": scored, "held_out": held_out, "split_seed": split_seed, "quotes": quotes, "overlap": overlap}
    return Classification((text, text_pair, label), metric, tuple(names), files)


class Classification(OwnFiles):
    """Single texts or pairs, with a class or a number each."""

    name, version = "classification", VERSION

    def __init__(self, columns: tuple[str, str, str], metric: str, listed: tuple[str, ...], files: dict) -> None:
        super().__init__(**files)
        (self.text, self.text_pair, self.label), self.metric, self.listed = columns, metric, listed
        self.form = "regression" if metric in CORRELATIONS else "classification"

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names in index order, as listed or as training has them; none while no folder is known."""
        if self.form == "regression" or self.data_dir is None:
            return ()
        return self.listed or tuple(in_order({row["label"] for _, row in self.rows()["train"]}))

    def needed(self, known: Row) -> tuple[str, ...]:
        return tuple(name for name in (self.text, self.text_pair, self.label) if name)

    def remedy(self) -> str:
        return "name yours with task.options.text, text_pair and label"

    def key(self, row: Row) -> Hashable:
        return row["text"], row["text_pair"]

    def stratum(self, row: Row) -> Hashable:
        return None if self.form == "regression" else row["label"]

    def parse(self, placed: Placed) -> Row:
        """Return a row of the form, without its id.

        Raises:
            TaskError: a column holds something else, or a class that `labels` does not list.
        """
        place, row = placed
        pair = text_of(place, row, self.text_pair) if self.text_pair else ""
        label = (number_of if self.form == "regression" else class_of)(place, row, self.label)
        if self.listed and self.form == "classification" and label not in self.listed:
            what = f"{place}, column {self.label!r}: {label!r} is none of task.options.labels"
            raise TaskError(f"{what}, {', '.join(self.listed)[:200]}; fix the row or list it")
        return {"text": text_of(place, row, self.text), "text_pair": pair, "label": label}

    def check(self, found: dict[str, list[Placed]]) -> None:
        """Refuse classes that do not fit the metric, or that cannot be learnt and measured.

        Raises:
            TaskError: with the classes and the remedy.
        """
        if self.form == "classification" and not self.listed:
            self.check_classes(found)
        classes = len(self.listed) or len({row["label"] for _, row in found["train"]})
        if self.metric == "f1" and classes != 2:
            raise TaskError(f"task.options.metric=f1: there are {classes} classes, not 2; take macro_f1")

    def check_classes(self, found: dict[str, list[Placed]]) -> None:
        """Refuse classes that are none, or that cannot be learnt and measured.

        Raises:
            TaskError: with the first row of such a class.
        """
        first = {split: {row["label"]: place for place, row in reversed(rows)} for split, rows in found.items()}
        train = first["train"]
        place, rows = found["train"][0][0], len(found["train"])
        column = f"column {self.label!r}"
        if len(train) > max(MANY, rows / 2):
            remedy = "name another column, or take task.options.metric=pearson for numbers"
            raise TaskError(f"{place.path}: {column} has {len(train)} classes in {rows} rows; {remedy}")
        alike: dict[str, str] = {}
        for label in in_order(train):
            if (other := alike.setdefault(label.casefold(), label)) != label:
                remedy = "write both alike, or list the classes with task.options.labels"
                raise TaskError(f"{train[label]}, {column}: {label!r} and {other!r} differ in capitals only; {remedy}")
        for split, seen in first.items():
            for other, known in first.items():
                if lost := next((label for label in seen if label not in known), None):
                    remedy = "add rows of it there, fix the row, or list the classes with task.options.labels"
                    raise TaskError(
                        f"{seen[lost]}, {column}: the class {lost!r} is in {split} but not in {other}; {remedy}"
                    )
        if len(train) < 2:
            raise TaskError(f"{place.path}: {column} has one class only, {next(iter(train))!r}; add rows of another")

    def dataset(self, rows: Any, source: object) -> "Dataset":
        """Return rows with their classes as indices."""
        rows = list(rows)
        if self.form == "classification":
            index = {label: i for i, label in enumerate(self.labels)}
            rows = [row | {"label": index[row["label"]]} for row in rows]
        return super().dataset(rows, source)

    def score(self, results: dict[str, list[Row]]) -> dict[str, float]:
        """Return accuracy, macro-F1, Matthews correlation and, of two classes, F1; or the correlations."""
        from tasks import metrics

        (rows,) = results.values()
        pairs = [row["answer"] for row in rows], [row["gold"] for row in rows]
        if self.form == "regression":
            return metrics.score_regression(*pairs)
        return metrics.score_classification(*pairs, self.count_classes(rows)) | {"macro_f1": metrics.macro_f1(*pairs)}

    def declare_scores(self, example: Row) -> "dict[str, Score]":
        from tasks import measures

        if self.form == "regression":
            return measures.declare_regression_scores()
        macro = measures.Score(measures.get_answer_and_gold, measures.macro_f1)
        return measures.declare_classification_scores(self.count_classes([])) | {"macro_f1": macro}

    def count_classes(self, rows: list[Row]) -> int:
        """Return how many classes there are. A report is made without the files: then F1 has two, and other scores
        have those that the rows name."""
        if self.metric == "f1" or self.labels:
            return 2 if self.metric == "f1" else len(self.labels)
        return 1 + max((row[key] for row in rows for key in ("answer", "gold")), default=-1)


def in_order(labels: Any) -> list[str]:
    """Return class names in sorted order, whole numbers by their value."""
    whole = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label) if whole else 0, label))


def class_of(place: Place, row: Row, column: str) -> str:
    """Return a class name, without the blanks around it; whole numbers and true or false are names, too.

    Raises:
        TaskError: it is empty or no name.
    """
    value = row[column]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and not math.isnan(value):
        remedy = "write a class name or a whole number, or take task.options.metric=pearson"
        raise TaskError(f"{place}, column {column!r}: {value} is not a class; {remedy}")
    return text_of(place, row | {column: None} if isinstance(value, float) else row, column).strip()


def number_of(place: Place, row: Row, column: str) -> float:
    """Return a finite number.

    Raises:
        TaskError: it is empty or something else.
    """
    value = row[column]
    try:
        number = float(text_of(place, row, column) if isinstance(value, str) or value is None else value)
    except (TypeError, ValueError) as error:
        if isinstance(error, TaskError):
            raise
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise TaskError(f"{place}, column {column!r}: {str(value)[:40]!r} is not a finite number; write one like 2.5")
    return number
