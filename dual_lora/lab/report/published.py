"""Published rows next to ours: of the same model, method and rank, and of the same value of the columns' setting.

Each published row appears once per part: below the first of our rows it matches, or the one with its learning rate.
Keys that distinguish it from other rows of its table follow its name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose

import pandas as pd

from dual_lora import paper
from dual_lora.lab.config.schema import get_setting
from dual_lora.lab.present import document
from dual_lora.lab.present.document import MISSING, Block, Text
from dual_lora.lab.report.values import Column, get_column_value, get_heading, list_columns
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, load_task_of
from dual_lora.paper import Row, Table

PRETRAINED = "pre-trained model"  # what published rows that start from no other task say of it
RowPlace = tuple[tuple, str]  # a row of ours: the values of the settings that head rows, and its label
Cells = dict[object, str]  # printed values by the heads of our columns


@dataclass
class Line:
    """A line of published values: rows of one table, which differ only in the columns' setting, and their cells."""

    table: Table
    rows: list[Row]
    cells: Cells

    def get_keys(self, runs: list[Outcome]) -> dict[str, object]:
        """Return the keys that all its rows have, and their learning rate where ours is another."""
        first = self.rows[0]
        shared = {key: value for key, value in first.keys.items() if all(row.keys[key] == value for row in self.rows)}
        return shared | ({} if has_same_rate(first, runs) else {"lr": first.values["lr"].text})


def find_published_lines(
    experiment: Experiment, outcomes: list[Outcome], ours: dict[RowPlace, list[Outcome]]
) -> dict[RowPlace, dict[str, Cells]]:
    """Return the published lines below each row of ours, by what names them."""
    columns, lines = list_columns(experiment, outcomes), {}
    for table in map(paper.load_table, experiment.published):
        for row in table.rows if {"model", "method"} <= set(table.keys) else ():
            for place, cells in find_places(experiment, row, ours, columns):
                add_line(experiment, lines.setdefault(place, []), Line(table, [row], cells))
    return {place: dict(name_lines(some, ours[place])) for place, some in lines.items()}


def find_places(
    experiment: Experiment, row: Row, ours: dict[RowPlace, list[Outcome]], columns: list[Column]
) -> Iterator[tuple[RowPlace, Cells]]:
    """Yield the row of ours that a published row appears below, once for each part of our table, with its cells."""
    fitting: dict[tuple, list[tuple[RowPlace, Cells]]] = {}
    for place, runs in ours.items():
        if cells := quote_row(experiment, row, [run for run in runs if is_comparable(experiment, row, run)], columns):
            fitting.setdefault(place[0], []).append((place, cells))
    for some in fitting.values():
        yield next((one for one in some if has_same_rate(row, ours[one[0]])), some[0])


def is_comparable(experiment: Experiment, row: Row, run: Outcome) -> bool:
    """Return whether a row is of a run's model, method and, where it has one, rank, and of its value of the columns'
    setting."""
    settings = run.settings
    own = {"model": settings.model.name, "method": settings.method.name, "rank": settings.method.rank}
    alike = all(row.keys.get(key) is None or paper.is_same_key(row.keys[key], value) for key, value in own.items())
    key = get_heading(experiment.columns) if has_setting_columns(experiment) else None
    return alike and (key not in row.keys or row.keys[key] == get_setting(settings, experiment.columns))


def has_setting_columns(experiment: Experiment) -> bool:
    """Return whether the columns are the values of a setting."""
    return isinstance(experiment.columns, str) and experiment.columns != "published"


def has_same_rate(row: Row, runs: list[Outcome]) -> bool:
    """Return whether one of our runs has a published row's learning rate, or none is known."""
    known = row.values.get("lr")
    return known is None or any(isclose(known.number, run.settings.train.lr) for run in runs)


def quote_row(experiment: Experiment, row: Row, runs: list[Outcome], columns: list[Column]) -> Cells:
    """Return the published values of a row by the heads of our columns. A value whose status is not that of its table
    has it behind it."""
    table, cells = paper.load_table(row.table), {}
    for column in columns:
        called = {get_published_name(experiment, column, run) for run in runs} - {None}
        for head, value in row.values.items():
            if table.ours.get(head) in called:
                cells[column.heading] = value.text + format_status(value.status, table)
    return cells


def get_published_name(experiment: Experiment, column: Column, run: Outcome) -> str | None:
    """Return what published tables call that which a run has in a column."""
    if not has_setting_columns(experiment):
        return column.ours
    task = load_task_of(run)
    return f"{task.name}:{task.metric}" if get_column_value(run, experiment.columns) == column.heading else None


def format_status(value: str, table: Table) -> str:
    """Return the mark of a value whose status is not its table's; empty otherwise."""
    return "" if value == table.status else f" [{value}]"


def add_line(experiment: Experiment, lines: list[Line], new: Line) -> None:
    """Add a row's line; where columns are values of a setting, rows that fill different ones are one line."""
    for line in lines if has_setting_columns(experiment) else ():
        if line.table is new.table and not line.cells.keys() & new.cells.keys():
            line.rows += new.rows
            line.cells |= new.cells
            return
    lines.append(new)


def name_lines(lines: list[Line], runs: list[Outcome]) -> Iterator[tuple[str, Cells]]:
    """Yield the lines below a row of ours, each named by table, status and the keys that distinguish it from others of
    its table, with its learning rate where ours is another."""
    for line in lines:
        others = [other.get_keys(runs) for other in lines if other.table is line.table]
        distinguishing = {
            k: v for k, v in line.get_keys(runs).items() if k == "lr" or any(o.get(k) != v for o in others)
        }
        known = [] if line.table.status == "published" else [line.table.status]
        known += describe_other_start(line, runs)
        yield (
            ", ".join([line.table.id, *known, *(f"{k} {v}".replace("_", " ") for k, v in distinguishing.items())]),
            line.cells,
        )


def describe_other_start(line: Line, runs: list[Outcome]) -> list[str]:
    """Return what a published row's started tasks start from, if ours start from something else."""
    names = {line.table.ours[column].partition(":")[0] for column in line.table.started if column in line.table.ours}
    ours = {bool(run.cell.sources or run.settings.init_from) for run in runs if run.settings.task.name in names}
    theirs = line.rows[0].start
    return [f"start: {theirs}"] if ours and theirs and ours != {theirs != PRETRAINED} else []


def iterate_published_blocks(experiment: Experiment, outcomes: list[Outcome]) -> Iterator[Block]:
    """Yield the published tables that an experiment names, whatever our models are."""
    if experiment.published:
        yield Text("Set beside", heading=True)
    for table in map(paper.load_table, experiment.published):
        cells = tabulate_published(table)
        about = "; ".join(f"{key}: {value}" for key, value in table.protocol.items())
        title = f"{'Computed' if table.status == 'own' else 'Published'}: {table.title}"
        known = f"{table.status}; version: {table.version}; {table.source[0]}; {about}"
        yield document.Table(
            cells,
            f"{title}: {describe_likeness(experiment, table, outcomes)} ({known}).",
            aside=frozenset(range(len(cells))),
        )


def tabulate_published(table: paper.Table) -> pd.DataFrame:
    """Return a published table as it is printed, the status of a value where it is not its table's."""
    lines = []
    for row in table.rows:
        values = {head: value.text + format_status(value.status, table) for head, value in row.values.items()}
        lines.append({**{k: MISSING if v is None else v for k, v in row.keys.items()}, **values})
    return pd.DataFrame(lines).fillna(MISSING)


def describe_likeness(experiment: Experiment, table: paper.Table, outcomes: list[Outcome]) -> str:
    """Return what a published table has to do with the runs above."""
    models = {row.keys["model"] for row in table.rows if row.keys.get("model")}
    shared = sorted(models & {outcome.settings.model.name for outcome in outcomes})
    if not models:
        return "of no single model"
    more = ", and other models" if len(models) > len(shared) else ""
    same = f"{', '.join(shared)} as above{more}" if shared else "other models than above"
    return same + ("" if experiment.scale == "full" else ", other data and lengths of training")
