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
import unicodedata
from collections.abc import Hashable, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from tasks.base import LONGEST_QUOTE, Row, TaskError, parse_number, quote
from tasks.own_files import LEAVE_OUT, OwnFiles, Place, Placed, get_text

if TYPE_CHECKING:
    from datasets import Dataset

    from tasks.measures import Score

VERSION = 1
CORRELATIONS = ("pearson", "spearman", "pearson_spearman_mean")
METRICS = ("accuracy", "macro_f1", "matthews", "f1", *CORRELATIONS)
# What programs write where a table has no value. As a class name each must be listed on purpose.
GAP_WORDS = ("nan", "snan", "null", "n/a", "#n/a", "<na>")
LARGEST = 1e18  # of numbers: the square of one, which the loss holds, is far from float32's largest number, 3.4e38
MANY = 20  # classes that need two rows each on average; else the column holds something else than classes


def task(
    subset: str,
    text: str = "text",
    text_pair: str = "",
    label: str = "label",
    metric: str = "accuracy",
    labels: Sequence = (),
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
        raise TaskError(f"task.options.labels: {odd[0]!r} is not a class name; write a list of names")
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
        return self.listed or tuple(sort_labels({row["label"] for _, row in self.load_rows()["train"]}))

    def list_needed_columns(self, known: Row) -> tuple[str, ...]:
        return tuple(name for name in (self.text, self.text_pair, self.label) if name)

    def describe_remedy(self) -> str:
        return "name yours with task.options.text, text_pair and label"

    def get_example_key(self, row: Row) -> Hashable:
        return row["text"], row["text_pair"]

    def get_stratum(self, row: Row) -> Hashable:
        return None if self.form == "regression" else row["label"]

    def parse(self, placed: Placed) -> Row:
        """Return a row of the form, without its id.

        Raises:
            TaskError: a column holds something else, or a class that `labels` does not list.
        """
        place, row = placed
        pair = get_text(place, row, self.text_pair) if self.text_pair else ""
        label = (get_number if self.form == "regression" else get_class)(place, row, self.label)
        if not self.listed and str(label).casefold() in GAP_WORDS:
            remedy = "fill it in, remove the row, or list all classes with task.options.labels"
            raise TaskError(f"{place}, column {self.label!r}: {label!r} stands for a missing value; {remedy}")
        if self.listed and self.form == "classification" and label not in self.listed:
            what = f"{place}, column {self.label!r}: {quote(label)} is not one of task.options.labels"
            raise TaskError(f"{what}, {', '.join(self.listed)[:200]}; fix the row or list it")
        return {"text": get_text(place, row, self.text), "text_pair": pair, "label": label}

    def check_rows_together(self, found: dict[str, list[Placed]]) -> None:
        """Refuse classes that do not fit the metric, or that cannot be learnt and measured.

        Raises:
            TaskError: with the classes and the remedy.
        """
        if self.form == "classification" and not self.listed:
            self.check_classes(found)
        if self.form == "regression":
            self.check_numbers(found)
        classes = len(self.listed) or len({row["label"] for _, row in found["train"]})
        if self.metric == "f1" and classes != 2:
            raise TaskError(f"task.options.metric=f1: there are {classes} classes, not 2; take macro_f1")

    def check_spelling(self, first: dict[str, dict[str, Place]]) -> None:
        """Refuse two classes that are most likely one; `first` is where each occurs first, by split.

        Raises:
            TaskError: with a row of the second.
        """
        places: dict[str, Place] = {}
        for seen in first.values():
            places = seen | places
        alike: dict[Hashable, str] = {}
        for label in sort_labels(places):
            if (other := alike.setdefault(normalize_label(label), label)) != label:
                remedy = "write both alike, or list the classes with task.options.labels"
                what = f"{quote_ascii(label)} and {quote_ascii(other)} differ in spelling only"
                raise TaskError(f"{places[label]}, column {self.label!r}: {what}; {remedy}")

    def check_numbers(self, found: dict[str, list[Placed]]) -> None:
        """Refuse numbers that are all the same, which correlate with nothing.

        Raises:
            TaskError: with the file.
        """
        for rows in found.values():
            if len({row["label"] for _, row in rows}) == 1:
                place, row = rows[0]
                where = f"{place.path}: column {self.label!r}"
                what = f"the {len(rows)} rows from {place.unit} {place.number} have one number only, {row['label']:g}"
                raise TaskError(f"{where}: {what}; add rows of others")

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
        self.check_spelling(first)
        for split, seen in reversed(first.items()):
            for other, known in first.items():
                if lost := next((label for label in seen if label not in known), None):
                    remedy = "add rows of it there, fix the row, or list the classes with task.options.labels"
                    if split == "test":
                        remedy += f"; {LEAVE_OUT}"
                    what = f"the class {quote(lost)} is in {split} but not in {other}"
                    raise TaskError(f"{seen[lost]}, {column}: {what}; {remedy}")
        if len(train) < 2:
            only = quote(next(iter(train)))
            raise TaskError(f"{place.path}: {column} has one class only, {only}; add rows of another")

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


def sort_labels(labels: Any) -> list[str]:
    """Return class names in sorted order, whole numbers by their value."""
    numbers = all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numbers else 0, label))


def normalize_label(label: str) -> Hashable:
    """Return what is equal for class names that differ in spelling only: in capitals, blanks, invisible characters or
    the form of accents; a number's value."""
    plain = "".join(c for c in unicodedata.normalize("NFC", label).casefold() if unicodedata.category(c) != "Cf")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        number = Decimal("nan")
    return number if number.is_finite() else " ".join(plain.split())


def quote_ascii(label: str) -> str:
    """Return a class name as it is written, so that two that look alike do not."""
    return quote(label) if label.isascii() else ascii(label[:LONGEST_QUOTE])


def get_class(place: Place, row: Row, column: str) -> str:
    """Return a class name, without the blanks around it; whole numbers and true or false are names, too.

    Raises:
        TaskError: it is empty or no name.
    """
    value = row[column]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # a gap in the column makes pandas write whole numbers as 1.0
        return str(int(value))
    if isinstance(value, float) and not math.isnan(value):
        remedy = "write a class name or a whole number, or take task.options.metric=pearson"
        raise TaskError(f"{place}, column {column!r}: {value} is not a class; {remedy}")
    return get_text(place, row | {column: None} if isinstance(value, float) else row, column).strip()


def get_number(place: Place, row: Row, column: str) -> float:
    """Return a number that training can square in float32.

    Raises:
        TaskError: it is empty, too large or something else.
    """
    value, where = row[column], f"{place}, column {column!r}"
    text = get_text(place, row, column) if value is None or isinstance(value, str) else None
    try:
        number = float(value) if text is None else parse_number(text)
    except (TypeError, ValueError):
        number = math.nan
    except OverflowError:
        number = math.inf
    if isinstance(value, bool) or not math.isfinite(number):
        raise TaskError(f"{where}: {quote(str(value))} is not a finite number; write one like 2.5")
    if abs(number) > LARGEST:
        raise TaskError(
            f"{where}: {quote(str(value))} is beyond {LARGEST:g}, so the loss overflows; divide all by one number"
        )
    return number
