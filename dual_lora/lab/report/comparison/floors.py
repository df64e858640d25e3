"""What a row must beat to have learned anything: the most frequent class, and rows that train next to nothing.

On a task where no row beats every floor by three standard errors, differences between methods say nothing. Such a task
is marked "not learned" and is left out of means over tasks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dual_lora.lab.errors import UserError
from dual_lora.lab.report.comparison.matches import Predictions, group_by_place
from dual_lora.lab.report.values import get_unit
from dual_lora.lab.statistics.compare import compute_score, estimate_difference
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, load_task_of
from tasks import Task
from tasks.base import Row

MAJORITY = "majority class"
STANDARD_ERRORS = 3
ModelTask = tuple[str, str]  # names of a model and a task


@dataclass(frozen=True)
class Floor:
    """One floor of one task, in points, and the row that beats it most, in standard errors.

    Attributes:
        best: the label of that row; None where none can be compared.
        above, error: by how much it is better than the floor, and the standard error of that over examples and seeds.
        beaten_by: the labels of rows that beat it by three standard errors.
        lower_is_better: of the task's main score; `above` then is how far the row lies below.
    """

    place: ModelTask
    name: str
    score: float
    best: str | None
    above: float
    error: float
    beaten_by: frozenset[str]
    lower_is_better: bool = False


def find_floors(experiment: Experiment, done: list[Outcome], predictions: Predictions) -> list[Floor]:
    """Return the floors of every model and task, as far as runs are finished."""
    places: dict[ModelTask, list[Outcome]] = {}
    for cell in done:
        if cell.result:
            places.setdefault(get_model_task(cell), []).append(cell)
    return [floor for place, cells in places.items() for floor in iterate_floors(experiment, place, cells, predictions)]


def get_model_task(cell: Outcome) -> ModelTask:
    """Return the names of a run's model and task."""
    return cell.settings.model.name, cell.settings.task.name


def iterate_floors(
    experiment: Experiment, place: ModelTask, cells: list[Outcome], predictions: Predictions
) -> Iterator[Floor]:
    """Yield the floors of one model and task. cells: its finished runs."""
    task, groups = load_task_of(cells[0]), group_by_place(experiment, cells)
    rows = {
        (label, *where): runs
        for label, some in groups.items()
        for where, cells in some.items()
        if label not in experiment.floors and (runs := read_or_skip(predictions, cells))
    }
    floors = [(label, next(iter(groups[label].values()))) for label in experiment.floors if label in groups]
    known = {label: runs for label, cells in floors if (runs := read_or_skip(predictions, cells))}
    if task.form == "classification" and rows:
        every = {seed: run for runs in rows.values() for seed, run in runs.items()}
        known[MAJORITY] = predict_majority(task, every)
    for name, floor in known.items():
        yield measure_floor(place, name, floor, rows, task)


def read_or_skip(predictions: Predictions, cells: list[Outcome]) -> dict[int, list[Row]]:
    """Return the rows of runs by seed; none where a file is damaged, which the report says elsewhere."""
    try:
        return predictions.read_runs(cells)
    except UserError:
        return {}


def predict_majority(task: Task, runs: dict[int, list[Row]]) -> dict[int, list[Row]]:
    """Return what each seed's run would have predicted with the one class that scores best. The classes are those of
    the rows: a task on the user's own files knows its classes only where these are."""
    first = next(iter(runs.values()))
    classes = sorted({row["gold"] for row in first})
    constant = [[row | {"answer": label} for row in first] for label in classes]
    find_best = np.argmin if task.is_lower_better() else np.argmax
    best = classes[int(find_best([compute_score(rows, task, task.metric) for rows in constant]))]
    return {seed: [row | {"answer": best} for row in rows] for seed, rows in runs.items()}


def measure_floor(
    place: ModelTask,
    name: str,
    floor: dict[int, list[Row]],
    rows: dict[tuple[object, ...], dict[int, list[Row]]],
    task: Task,
) -> Floor:
    """Return by how much rows beat a floor. floor, rows: predictions by seed."""
    unit, lower = get_unit(task, task.metric), task.is_lower_better()
    score = float(np.mean([compute_score(run, task, task.metric) for run in floor.values()])) * unit
    found = []
    for (label, *_), runs in rows.items():
        try:
            estimate = estimate_difference(runs, floor, task, task.metric)
        except ValueError:  # other examples, or no seed in common
            continue
        if estimate:
            found.append((label, estimate[0] * (-unit if lower else unit), estimate[1] * unit))
    if not found:
        return Floor(place, name, score, None, float("nan"), float("nan"), frozenset(), lower)
    beaten = frozenset(label for label, above, error in found if above > STANDARD_ERRORS * error)
    label, above, error = max(found, key=lambda row: row[1] / row[2] if row[2] else 0.0)
    return Floor(place, name, score, label, above, error, beaten, lower)


def find_hardest(floors: list[Floor]) -> Floor:
    """Return the floor of one task that is hardest to beat: the highest, or the lowest where lower is better."""
    return max(floors, key=lambda floor: -floor.score if floor.lower_is_better else floor.score)


def find_unlearned(floors: list[Floor]) -> set[ModelTask]:
    """Return the models and tasks of which no row beats every floor; a floor without a comparison does not count."""
    beaten: dict[ModelTask, list[frozenset[str]]] = {}
    for floor in floors:
        if floor.best is not None:
            beaten.setdefault(floor.place, []).append(floor.beaten_by)
    return {place for place, labels in beaten.items() if not frozenset.intersection(*labels)}


def describe_failed_runs(experiment: Experiment, done: list[Outcome], floors: list[Floor]) -> Iterator[str]:
    """Yield the rows of which some runs, but not the task as a whole, learned nothing: they score no better than the
    floor. A mean and its interval do not show that."""
    learned = {floor.place for floor in floors} - find_unlearned(floors)
    hardest = {place: find_hardest([floor for floor in floors if floor.place == place]) for place in learned}
    runs: dict[tuple[ModelTask, str], list[tuple[int, bool]]] = {}
    for cell in done:
        place, task = get_model_task(cell), load_task_of(cell)
        score = cell.result["metrics"].get(task.metric) if cell.result else None  # older versions had other scores
        if score is None or place not in learned or cell.cell.label in experiment.floors:
            continue
        sign = -1 if task.is_lower_better() else 1
        failed = sign * score * get_unit(task, task.metric) <= sign * hardest[place].score
        runs.setdefault((place, cell.cell.label), []).append((cell.settings.seed, failed))
    for (place, label), found in runs.items():
        seeds = [seed for seed, failed in found if failed]
        if seeds:
            yield (
                f"{label} on {place[1]}: {len(seeds)} of {len(found)} runs score no better than {hardest[place].name} "
                f"(seeds {', '.join(map(str, sorted(set(seeds))))})"
            )
