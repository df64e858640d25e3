"""Published rows beside ours: of the same model, method and rank, and of the same value of the columns' setting.

A published row stands once in every part of a table: below the first row of ours it belongs to, or below the one with
its learning rate where that is known. What tells it from others of its table stands behind its name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose

import tasks
from dual_lora import paper
from dual_lora.lab.experiments import Experiment, setting
from dual_lora.lab.grid import Done
from dual_lora.lab.results import Column, columns, headed, heading
from dual_lora.paper import Row, Table

Place = tuple[tuple, str]  # a row of ours: the values of the settings that head rows, and its label
Cells = dict[object, str]  # printed values by the heads of our columns


@dataclass
class Line:
    """A line of published values: rows of one table, which differ in the columns' setting alone, and their cells."""

    table: Table
    rows: list[Row]
    cells: Cells

    def keys(self, runs: list[Done]) -> dict[str, object]:
        """Return the keys that all its rows have, and their learning rate where ours is another."""
        first = self.rows[0]
        shared = {key: value for key, value in first.keys.items() if all(row.keys[key] == value for row in self.rows)}
        return shared | ({} if same_rate(first, runs) else {"lr": first.values["lr"].text})


def beside(experiment: Experiment, done: list[Done], ours: dict[Place, list[Done]]) -> dict[Place, dict[str, Cells]]:
    """Return the published lines below each row of ours, by what names them."""
    found, lines = columns(experiment, done), {}
    for table in map(paper.load, experiment.published):
        for row in table.rows if {"model", "method"} <= set(table.keys) else ():
            for place, cells in places(experiment, row, ours, found):
                add(experiment, lines.setdefault(place, []), Line(table, [row], cells))
    return {place: dict(named(some, ours[place])) for place, some in lines.items()}


def places(experiment: Experiment, row: Row, ours: dict[Place, list[Done]], found: list[Column]) -> Iterator:
    """Yield where a published row stands, once for each part of our table, with its cells."""
    fitting: dict[tuple, list[tuple[Place, Cells]]] = {}
    for place, runs in ours.items():
        if cells := quoted(experiment, row, [run for run in runs if belongs(experiment, row, run)], found):
            fitting.setdefault(place[0], []).append((place, cells))
    for some in fitting.values():
        yield next((one for one in some if same_rate(row, ours[one[0]])), some[0])


def belongs(experiment: Experiment, row: Row, run: Done) -> bool:
    """Whether a row is of a run's model, method and, where it has one, rank, and its value of the columns' setting."""
    settings = run.settings
    own = {"model": settings.model.name, "method": settings.method.name, "rank": settings.method.rank}
    alike = all(row.keys.get(key) in (value, None) for key, value in own.items())
    key = heading(experiment.columns) if by_setting(experiment) else None
    return alike and (key not in row.keys or row.keys[key] == setting(settings, experiment.columns))


def by_setting(experiment: Experiment) -> bool:
    """Whether the columns are the values of a setting."""
    return isinstance(experiment.columns, str) and experiment.columns != "published"


def same_rate(row: Row, runs: list[Done]) -> bool:
    """Whether one of our runs has a published row's learning rate, or none is known."""
    known = row.values.get("lr")
    return known is None or any(isclose(known.number, run.settings.train.lr) for run in runs)


def quoted(experiment: Experiment, row: Row, runs: list[Done], found: list[Column]) -> Cells:
    """Return what a row prints by the heads of our columns, with the status of a value that has another than its
    table."""
    table, cells = paper.load(row.table), {}
    for column in found:
        called = {called_by(experiment, column, run) for run in runs} - {None}
        for head, value in row.values.items():
            if table.ours.get(head) in called:
                cells[column.head] = value.text + status(value.status, table)
    return cells


def called_by(experiment: Experiment, column: Column, run: Done) -> str | None:
    """Return what published tables call that which a run has in a column."""
    if not by_setting(experiment):
        return column.ours
    task = run.settings.task.name
    return f"{task}:{tasks.load(task).metric}" if headed(run, experiment.columns) == column.head else None


def status(value: str, table: Table) -> str:
    return "" if value == table.status else f" [{value}]"


def add(experiment: Experiment, lines: list[Line], new: Line) -> None:
    """Add a row's line; where columns are values of a setting, rows that fill different ones are one line."""
    for line in lines if by_setting(experiment) else ():
        if line.table is new.table and not line.cells.keys() & new.cells.keys():
            line.rows += new.rows
            line.cells |= new.cells
            return
    lines.append(new)


def named(lines: list[Line], runs: list[Done]) -> Iterator[tuple[str, Cells]]:
    """Yield the lines below a row of ours: table, status, what tells a line from others of its table, a learning rate
    that ours has not."""
    for line in lines:
        others = [other.keys(runs) for other in lines if other.table is line.table]
        telling = {k: v for k, v in line.keys(runs).items() if k == "lr" or any(o.get(k) != v for o in others)}
        known = [] if line.table.status == "published" else [line.table.status]
        yield (
            ", ".join([line.table.id, *known, *(f"{k} {v}".replace("_", " ") for k, v in telling.items())]),
            line.cells,
        )
