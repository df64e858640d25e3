"""The runs of an experiment as one long frame: a value for each cell of its table, or the reason it has none."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import pandas as pd

from dual_lora import paper
from dual_lora.lab.config.compatibility import trains_only_head
from dual_lora.lab.config.schema import get_setting
from dual_lora.lab.record.provenance import has_changed_plugins, is_committed
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, is_current, load_task_of
from dual_lora.paper import Table
from tasks import Task

MEAN = "mean"
UNLEARNED, UNSETTLED = "not learned", "not known to be learned"  # why a model and task rank no methods
ModelTask = tuple[str, str]  # names of a model and a task
# What a run's result holds in addition to its scores: the value, NaN where it was not measured; how it is printed.
FIELDS: dict[str, tuple[Callable[[dict], float], str]] = {
    "seconds_per_step": (lambda result: result["train_seconds"] / (result["steps"] or 1), "{:.3f}"),
    "tokens_per_second": (lambda result: result["tokens_per_second"], "{:,.0f}"),
    "peak_memory_mib": (lambda result: (result.get("peak_memory_bytes") or nan) / 2**20, "{:,.0f}"),
    "trainable_parameters": (lambda result: result["trainable_parameters"], "{:,.0f}"),
}
DECIMALS = {100: 1, 1: 2}  # of a printed score, by `get_unit`
SCORE_FORMATS = {unit: f"{{:.{number}f}}" for unit, number in DECIMALS.items()}
DIGITS = (6, 12)  # significant ones of a printed setting: as a rule, and where it was given with more
MARKS = {
    "‡": "the code had changes that no commit holds, or is not known",
    "†": "done with an older version of the task, or one that was not recorded",
    "§": "done with another version of a plugin: its code has changed since",
    "!": "the run warns: see its result.json",
}


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading and what of a run's result is in it, or None where that is the main score
    of the runs whose setting has this value. `parts` are the headings whose mean it is, and `is_published` whether a
    published table has just this mean; `ours` is what tables of dual_lora/paper call it, where they have it."""

    heading: Any
    field: str | None = None
    task: str | None = None
    parts: tuple[str, ...] = ()
    is_published: bool = False
    ours: str | None = None

    def get_value(self, outcome: Outcome) -> float:
        """Return the value of a finished run in the unit that is printed; NaN where it was not measured.

        Raises:
            KeyError: the run's version recorded no such value.
        """
        if self.field in FIELDS:
            return FIELDS[self.field][0](outcome.result)
        return get_score(load_task_of(outcome), outcome.result, self.field)


def get_score(task: Task, result: dict, metric: str | None = None, of: str = "metrics") -> float:
    """Return a score of a result in the unit that is printed; NaN where it was not measured. metric: its name; None:
    the main one of the task as it is now. of: the scores of the weights that count, or `metrics_last_epoch`."""
    metric = metric or task.metric
    return result[of].get(metric, nan) * get_unit(task, metric)


def get_unit(task: Task, metric: str) -> int:
    """Return what a score is multiplied by to be printed: 100 for percent, 1 for a score that is not a fraction."""
    return 1 if metric in task.unscaled else 100


def list_columns(experiment: Experiment, outcomes: list[Outcome]) -> list[Column]:
    """Return the columns of an experiment's table, in order."""
    if experiment.columns == "published":
        return list_published_columns(
            paper.load_table(experiment.published[0]), {outcome.settings.task.name for outcome in outcomes}
        )
    if isinstance(experiment.columns, dict):
        return [Column(heading, field) for heading, field in experiment.columns.items()]
    headings = list(dict.fromkeys(get_column_value(outcome, experiment.columns) for outcome in outcomes))
    headings.sort(key=lambda heading: (not isinstance(heading, str), 0 if isinstance(heading, str) else heading))
    return [Column(heading) for heading in headings]


def get_heading(key: str) -> str:
    """Return how a setting is called at the head of a row or column: task.name is the task, train.lr the lr."""
    parts = key.split(".")
    return parts[0] if parts[-1] == "name" else parts[-1]


def get_column_value(outcome: Outcome, key: str) -> Any:
    """Return the value of the columns' setting that a run has, in words where it has none: LoRA has no magnitude
    ratio."""
    value = get_setting(outcome.settings, key)
    return f"no {get_heading(key).replace('_', ' ')}" if value is None else value


def list_published_columns(table: Table, asked: set[str]) -> list[Column]:
    """Return the columns of a published table that the tasks asked for have, and its averages as far as they go."""
    columns = []
    for heading, ours in table.ours.items():
        task, _, metric = ours.partition(":")
        if task in asked:
            columns.append(Column(heading, metric, task, ours=ours))
    headings = {column.heading for column in columns}
    for heading, parts in table.average.items():
        if heading not in headings and len(headings) > 1:
            complete = headings == set(parts)
            called = {"heading": heading, "ours": table.ours.get(heading)} if complete else {"heading": MEAN}
            columns.append(Column(parts=tuple(headings), is_published=complete, **called))
    return columns


def build_frame(
    experiment: Experiment,
    outcomes: list[Outcome],
    unranked: Mapping[ModelTask, str] | None = None,
) -> pd.DataFrame:
    """Return a row for each value: the settings that head rows, label, column, seed, value (NaN while missing), reason,
    marks, run, its learning rate, and the position of its run in `outcomes` (-1 for a mean).

    unranked: of `floors.find_unranked`. Means leave out models and tasks that were not learned, and lack those of which
        that is not known. A published average needs all its parts: a mean of fewer could not stand beside it.
    """
    columns = list_columns(experiment, outcomes)
    values = pd.DataFrame(
        [e | {"outcome": i} for i, outcome in enumerate(outcomes) for e in iterate_values(experiment, outcome, columns)]
    )
    places = [(outcome.settings.model.name, outcome.settings.task.name) for outcome in outcomes]
    status = values["outcome"].map(dict(enumerate(map((unranked or {}).get, places))))
    left_out, lacking = status == UNLEARNED, status == UNSETTLED
    known = values.assign(value=values["value"].mask(left_out | lacking))
    learned = known[~left_out]
    if experiment.mean in experiment.rows:
        return pd.concat([values, average_values(experiment, learned, experiment.mean)], ignore_index=True)
    for column in columns:
        if column.parts:
            parts = known if column.is_published else learned
            parts = parts[parts["column"].isin(column.parts)]
            extra = average_values(experiment, parts, "column").assign(column=column.heading)
            values = pd.concat([values, extra], ignore_index=True)
    return values


def iterate_values(experiment: Experiment, outcome: Outcome, columns: list[Column]) -> Iterator[dict[str, Any]]:
    """Yield the values one run gives."""
    headings = {key: get_row_value(outcome, key) for key in experiment.rows}
    common = {"label": outcome.label, "seed": outcome.settings.seed, "marks": get_marks(outcome)}
    common |= {"run": outcome.record.name if outcome.record else None, "lr": get_rate(outcome)}
    for column in columns:
        if not belongs_to_column(experiment, outcome, column):
            continue
        value, reason = None, outcome.reason
        if outcome.result:
            with suppress(KeyError):
                value = column.get_value(outcome)
            if value is None or isnan(value):
                value, reason = None, f"{column.field or load_task_of(outcome).metric} not measured"
        yield {**headings, **common, "column": column.heading, "value": value, "reason": reason}


def get_rate(outcome: Outcome) -> float | None:
    """Return the learning rate of an outcome: the head's where nothing else trains; None where nothing trains, or while
    it is not chosen."""
    if outcome.result and outcome.result.get("learning_rates") == {}:
        return None
    return outcome.settings.train.head_lr if trains_only_head(outcome.settings) else outcome.rate


def get_row_value(outcome: Outcome, key: str) -> Any:
    """Return the value of a row's setting that a run has; in words where it has none, because a row without a value
    would be left out of the table."""
    value = get_setting(outcome.settings, key)
    return "none" if value is None else value


def belongs_to_column(experiment: Experiment, outcome: Outcome, column: Column) -> bool:
    """Return whether a run has a value in a column."""
    if column.field is None and not column.parts:
        return get_column_value(outcome, experiment.columns) == column.heading
    return not column.parts and column.task in (None, outcome.settings.task.name)


def list_outcomes(part: pd.DataFrame, outcomes: list[Outcome]) -> list[Outcome]:
    """Return the runs that some values are of; none for means."""
    return [outcomes[i] for i in sorted(set(part["outcome"]) - {-1})]


def list_scores(
    experiment: Experiment, column: Column, columns: list[Column], outcomes: list[Outcome]
) -> list[tuple[Task, str]]:
    """Return the tasks and scores that runs have in a column, or in its parts if it is a mean."""
    parts = [part for part in columns if part.heading in (column.parts or [column.heading])]
    pairs = [(outcome, part) for outcome in outcomes for part in parts if belongs_to_column(experiment, outcome, part)]
    return [((task := load_task_of(outcome)), part.field or task.metric) for outcome, part in pairs]


def average_values(experiment: Experiment, values: pd.DataFrame, over: str) -> pd.DataFrame:
    """Return the mean over a column of the frame, called "mean" in it, where none of its values is missing; nothing
    where only one of its values has been learned."""
    within = [key for key in experiment.rows if key != over]
    count = values.groupby(within)[over].transform("nunique") if within else values[over].nunique()
    values = values.assign(parts=count)
    values = values[values["parts"] > 1]
    if values.empty:
        return values.drop(columns="parts")
    keys = [key for key in values if key not in (over, "value", "reason", "marks", "run", "lr", "outcome")]
    groups = values.groupby(keys, sort=False, dropna=False)
    found = groups["value"].agg(lambda column: column.mean(skipna=False)).reset_index()
    complete = groups[over].nunique().reset_index(drop=True) == found["parts"]
    found["value"] = found["value"].where(complete)
    found["reason"] = None
    found.loc[found["value"].isna(), "reason"] = "a part is missing or not learned"
    found["marks"] = groups["marks"].agg(lambda column: "".join(sorted(set("".join(column))))).reset_index(drop=True)
    return found.drop(columns="parts").assign(**{over: MEAN, "run": None, "lr": None, "outcome": -1})


def get_marks(outcome: Outcome) -> str:
    """Return the marks of `MARKS` that apply to a finished run."""
    if not outcome.result:
        return ""
    found = "" if is_committed(outcome.record.read_environment()) else "‡"
    found += "" if is_current(outcome.result, outcome.settings) else "†"
    found += "§" if has_changed_plugins(outcome.record.read_environment()) else ""
    return found + ("!" if outcome.result.get("warnings") else "")


def format_value(value: object) -> str:
    """Return a setting's value as it heads a row or column: a number with all digits it was given with, so that
    different ones read differently; one that was computed, such as 2/3, with six."""
    if isinstance(value, float):
        short, full = (f"{value:.{digits}g}" for digits in DIGITS)
        return full if float(short) != value == float(full) else short
    return "none" if value is None else str(value)


def get_place(experiment: Experiment, outcome: Outcome) -> dict[str, object]:
    """Return the settings that, in addition to label and task, say where in the table a run is."""
    return {key: get_setting(outcome.settings, key) for key in experiment.list_heading_settings() if key != "task.name"}
