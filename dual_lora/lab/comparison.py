"""What a report says of differences: paired tests of every row against the baselines, and means over tasks."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

import tasks
from dual_lora.lab import stats
from dual_lora.lab.document import Block, Table, Text
from dual_lora.lab.experiments import Experiment
from dual_lora.lab.grid import Done, setting
from dual_lora.lab.results import heading
from dual_lora.lab.stats import Difference
from tasks.base import Row

Key = tuple[object, ...]


@dataclass(frozen=True)
class Pair:
    """One row against a baseline on one task: where (the settings that head rows and columns), and what came out."""

    label: str
    baseline: str
    place: dict[str, object]
    task: str
    difference: Difference


def blocks(experiment: Experiment, done: list[Done], values: pd.DataFrame) -> Iterator[Block]:
    """Yield the comparisons as far as finished runs allow."""
    pairs = list(compared(experiment, done))
    if pairs:
        yield Text("Differences", heading=True)
        yield Text(
            "Paired on the stored predictions of the same examples and seeds. The interval resamples examples and, "
            "where there are several, seeds; Holm's correction is over all comparisons listed. Shown means: several "
            "seeds, an interval that leaves out 0, and a corrected p below 0.05."
        )
        adjusted = stats.holm([pair.difference.p for pair in pairs])
        yield Text(items=tuple(told(pair, p) for pair, p in zip(pairs, adjusted, strict=True)))
    yield from over_tasks(experiment, pairs)
    yield from means(experiment, done)


def place(experiment: Experiment, cell: Done) -> dict[str, object]:
    """Return the settings that say where a run stands, beside its row's label and its task."""
    keys = [key for key in experiment.rows if key != "task.name"]
    if isinstance(experiment.columns, str) and experiment.columns not in ("published", "task.name"):
        keys.append(experiment.columns)
    return {key: setting(cell.settings, key) for key in keys}


def compared(experiment: Experiment, done: list[Done]) -> Iterator[Pair]:
    """Yield every row that is no baseline against every baseline, on each task by its main score. A baseline that has
    no value of the columns' setting stands against all columns."""
    runs: dict[str, dict[Key, list[Done]]] = {}
    for cell in done:
        if cell.result:
            where = (cell.settings.task.name, *place(experiment, cell).values())
            runs.setdefault(cell.cell.label, {}).setdefault(where, []).append(cell)
    for label, groups in runs.items():
        for baseline in experiment.baselines if label not in experiment.baselines else ():
            for where, ours in groups.items():
                known = runs.get(baseline, {})
                theirs = known.get(where) or known.get((*where[:-1], None), [])
                if {c.settings.seed for c in ours} & {c.settings.seed for c in theirs}:
                    difference = paired(ours, theirs)
                    yield Pair(label, baseline, place(experiment, ours[0]), where[0], difference)


def paired(ours: list[Done], theirs: list[Done]) -> Difference:
    task = tasks.load(ours[0].settings.task.name, ours[0].settings.task.options)
    runs = [{cell.settings.seed: predictions(cell) for cell in cells} for cells in (ours, theirs)]
    try:
        return stats.compare(*runs, task, task.metric)
    except ValueError as error:
        return Difference(float("nan"), None, None, None, str(error), 0, 0)


def predictions(cell: Done) -> list[Row]:
    """Return a run's judged rows."""
    cell.record.check("predictions.jsonl")
    return [json.loads(line) for line in (cell.record.folder / "predictions.jsonl").read_text().splitlines()]


def told(pair: Pair, adjusted: float | None) -> str:
    metric = tasks.load(pair.task).metric
    where = [f"{pair.task} ({metric})", *(f"{heading(key)} {shown(value)}" for key, value in pair.place.items())]
    if np.isnan(pair.difference.mean):
        return f"{', '.join(where)}: {pair.label} - {pair.baseline}: cannot be compared ({pair.difference.test})"
    scale = 1 if metric in tasks.load(pair.task).plain else 100
    return f"{', '.join(where)}: {stats.sentence(pair.label, pair.baseline, pair.difference, scale, adjusted)}"


def shown(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def over_tasks(experiment: Experiment, pairs: list[Pair]) -> Iterator[Block]:
    """Yield Wilcoxon's test over tasks for every row and baseline that have several in the same place."""
    groups: dict[Key, dict[str, float]] = {}
    for pair in pairs:
        if not np.isnan(pair.difference.mean):
            key = (pair.label, pair.baseline, tuple(pair.place.items()))
            groups.setdefault(key, {})[pair.task] = pair.difference.mean
    several = {key: found for key, found in groups.items() if len(found) > 1}
    if several:
        yield Text("Over tasks", heading=True)
        yield Text(items=tuple(wilcoxon(*key, found) for key, found in several.items()))


def wilcoxon(label: str, baseline: str, where: tuple, found: dict[str, float]) -> str:
    result = stats.across_tasks(found)
    at = "".join(f", {heading(key)} {shown(value)}" for key, value in where)
    mean = 100 * float(np.mean(list(found.values())))
    return (
        f"{label} - {baseline}{at}: {mean:+.1f} on average, better on {result.wins} of {result.tasks} tasks; Wilcoxon "
        f"p = {result.p:.3f}{f' ({result.note})' if result.note else ''}"
    )


def means(experiment: Experiment, done: list[Done]) -> Iterator[Block]:
    """Yield the interquartile means over tasks and seeds, for rows that have several tasks, all of them finished."""
    lines = []
    groups: dict[Key, dict[str, dict[int, float]]] = {}
    for cell in done:
        key = (cell.cell.label, *place(experiment, cell).items())
        score = 100 * cell.result["metrics"][cell.result["metric"]] if cell.result else None
        groups.setdefault(key, {}).setdefault(cell.settings.task.name, {})[cell.settings.seed] = score
    for (label, *where), scores in groups.items():
        table = [list(by_seed.values()) for by_seed in scores.values()]
        if len(table) > 1 and all(score is not None for row in table for score in row):
            value, low, high = stats.iqm(np.array(table))
            interval = "one seed: none" if low is None else f"{low:.1f} to {high:.1f}"
            heads = {heading(key): shown(value) for key, value in where}
            lines.append({"method": label, **heads, "IQM": f"{value:.1f}", "95 % interval": interval})
    if lines:
        count = len({cell.settings.task.name for cell in done})
        yield Table(
            pd.DataFrame(lines),
            f"Interquartile mean of the main score over {count} tasks and all seeds, % (arXiv 2108.13264); the "
            "interval resamples seeds within each task.",
        )
