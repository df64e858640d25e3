"""What a row must beat to have learned anything: the most frequent class, and rows that train next to nothing.

On a task where no row beats every floor by three standard errors, differences between methods say nothing. Such a task
is marked "not learned" and is left out of means over tasks, once all of its runs are there and could be compared: until
then some row may still learn it. Nor is a task known to be learned before every run of its floors is. A floor with a
value of the columns' setting applies to rows with that value; a floor without one applies to all rows.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import isnan, nan

import numpy as np

from dual_lora.lab.errors import UserError
from dual_lora.lab.report.comparison.matches import Key, Predictions, group_by_place
from dual_lora.lab.report.values import (
    DECIMALS,
    UNLEARNED,
    UNSETTLED,
    ModelTask,
    format_value,
    get_heading,
    get_place,
    get_score,
    get_unit,
)
from dual_lora.lab.statistics.compare import compute_score, estimate_difference
from dual_lora.lab.statistics.pairing import UnscorableRows, translate_score_errors
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, load_task_of
from tasks import Task
from tasks.base import Row

MAJORITY = "majority class"
STANDARD_ERRORS = 3
CONSTANT = 1e-3  # of the targets' standard deviation: predictions that vary less are one value, as far as they matter
SCORE_TOLERANCE = 1e-9  # points: means of the same scores differ by the rounding of their sums
RowKey = tuple[str, Key]  # a row's label, and its task and place as in `group_by_place`


@dataclass(frozen=True)
class Floor:
    """One floor of one task, in points, and the row that beats it most, in standard errors.

    Attributes:
        best: the name of that row; None where none can be compared. Then the score may be NaN, too.
        above, error: by how much it is better than the floor, and the standard error of that over examples and seeds.
        beaten_by: the rows that beat it by three standard errors.
        lower_is_better: of the task's main score; `above` then is how far the row lies below.
        unit: of the task's main score, as `get_unit`.
        where: its task and place as in `group_by_place`; None: it applies to all rows.
        trouble: why its score, or some row's difference to it, cannot be computed.
        complete: whether every run of its task that the table asks for is finished, can be read and could be compared.
        measured: the same of the floor's own runs: with some row that should beat it, if there is any.
    """

    model_task: ModelTask
    name: str
    score: float
    best: str | None
    above: float
    error: float
    beaten_by: frozenset[RowKey]
    lower_is_better: bool = False
    unit: int = 100
    where: Key | None = None
    trouble: str = ""
    complete: bool = True
    measured: bool = True

    @property
    def decimals(self) -> int:
        """With how many decimals its score is printed."""
        return DECIMALS[self.unit]

    def applies_to(self, where: Key) -> bool:
        """Return whether rows of a task and place should beat it: it has the same values of the settings, or none."""
        return self.where is None or all(own in (None, value) for own, value in zip(self.where, where, strict=True))

    def is_beaten_by(self, label: str) -> bool:
        """Return whether some row of a label beats it by three standard errors."""
        return any(label == row[0] for row in self.beaten_by)


def find_floors(experiment: Experiment, outcomes: list[Outcome], predictions: Predictions) -> list[Floor]:
    """Return the floors of every model and task, as far as runs are finished."""
    groups = group_by_model_task(outcomes).items()
    return [floor for key, some in groups for floor in iterate_floors(experiment, key, some, predictions)]


def group_by_model_task(outcomes: list[Outcome]) -> dict[ModelTask, list[Outcome]]:
    """Return runs by model and task."""
    groups: dict[ModelTask, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(get_model_task(outcome), []).append(outcome)
    return groups


def get_model_task(outcome: Outcome) -> ModelTask:
    """Return the names of a run's model and task."""
    return outcome.settings.model.name, outcome.settings.task.name


def iterate_floors(
    experiment: Experiment, model_task: ModelTask, outcomes: list[Outcome], predictions: Predictions
) -> Iterator[Floor]:
    """Yield the floors of one model and task. outcomes: its runs, finished or not."""
    task, asked = load_task_of(outcomes[0]), group_by_row(experiment, outcomes)
    known = {row: runs for row, some in asked.items() if (runs := read_or_skip(predictions, some))}
    measured = {row for row in known if all(outcome.result for outcome in asked[row])}
    names = name_rows(asked, list(get_place(experiment, outcomes[0])))
    rows = {row: runs for row, runs in known.items() if row[0] not in experiment.floors}
    if not rows:
        return
    empty = Floor(model_task, "", nan, None, nan, nan, frozenset(), complete=measured == asked.keys())
    for row in (row for label in experiment.floors for row in asked if row[0] == label):
        floor = replace(empty, name=names[row], where=row[1], measured=row in measured)
        yield measure_floor(floor, partial(known.get, row, {}), rows, names, task)
    if task.form == "classification":
        every = {seed: run for runs in rows.values() for seed, run in runs.items()}
        yield measure_floor(replace(empty, name=MAJORITY), partial(predict_majority, task, every), rows, names, task)


def group_by_row(experiment: Experiment, outcomes: list[Outcome]) -> dict[RowKey, list[Outcome]]:
    """Return the runs of one model and task by row."""
    groups = group_by_place(experiment, outcomes)
    return {(label, where): runs for label, some in groups.items() for where, runs in some.items()}


def name_rows(rows: Iterable[RowKey], heads: list[str]) -> dict[RowKey, str]:
    """Return the names of rows: their labels, with the values of the settings `heads` in which rows of one label
    differ."""
    places: dict[str, list[Key]] = {}
    for label, where in rows:
        places.setdefault(label, []).append(where[1:])  # without the task
    names = {}
    for label, where in rows:
        different = [len(set(values)) > 1 for values in zip(*places[label], strict=True)]
        said = [
            f"{get_heading(head).replace('_', ' ')} {format_value(value)}"
            for head, value, several in zip(heads, where[1:], different, strict=True)
            if several
        ]
        names[label, where] = ", ".join([label, *said])
    return names


def read_or_skip(predictions: Predictions, outcomes: list[Outcome]) -> dict[int, list[Row]]:
    """Return the rows of finished runs by seed; none where a file is damaged, which the report says elsewhere."""
    try:
        return predictions.read_runs([outcome for outcome in outcomes if outcome.result])
    except UserError:
        return {}


def predict_majority(task: Task, runs: dict[int, list[Row]]) -> dict[int, list[Row]]:
    """Return what each seed's run would have predicted with the one class that scores best. The classes are those of
    the rows: a task on the user's own files knows its classes only where these are.

    Raises:
        ValueError: as `compute_score`, or the rows say no class.
    """
    first = next(iter(runs.values()))
    with translate_score_errors(f"{task.name} cannot score these predictions"):
        classes = sorted({row["gold"] for row in first})
    constant = [[row | {"answer": label} for row in first] for label in classes]
    find_best = np.argmin if task.is_lower_better() else np.argmax
    best = classes[int(find_best([compute_score(rows, task, task.metric) for rows in constant]))]
    return {seed: [row | {"answer": best} for row in rows] for seed, rows in runs.items()}


def measure_floor(
    empty: Floor,
    predict: Callable[[], dict[int, list[Row]]],
    rows: dict[RowKey, dict[int, list[Row]]],
    names: dict[RowKey, str],
    task: Task,
) -> Floor:
    """Return by how much rows beat a floor. empty: which floor it is. predict: returns its predictions by seed, and
    nothing where its runs are missing. rows: the same of the rows."""
    unit, lower, lost = get_unit(task, task.metric), task.is_lower_better(), replace(empty, measured=False)
    try:
        floor = predict()
        scores = [compute_score(run, task, task.metric) * unit for run in floor.values()]
    except ValueError as error:
        return replace(lost, trouble=str(error))
    if not scores:
        return lost
    known, found, unpaired = replace(empty, score=float(np.mean(scores)), lower_is_better=lower, unit=unit), [], 0
    for row, runs in rows.items():
        if not empty.applies_to(row[1]):
            continue
        try:
            estimate = estimate_difference(runs, floor, task, task.metric)
        except UnscorableRows as error:
            known, unpaired = replace(known, trouble=f"{names[row]}: {error}"), unpaired + 1
            continue
        except ValueError:  # other examples, or no seed in common
            unpaired += 1
            continue
        if estimate:
            found.append((row, estimate[0] * (-unit if lower else unit), estimate[1] * unit))
    known = replace(known, complete=known.complete and not unpaired)
    if not found:
        return replace(known, measured=known.measured and not unpaired)
    beaten = frozenset(row for row, above, error in found if above > STANDARD_ERRORS * error)
    row, above, error = max(found, key=lambda one: one[1] / one[2] if one[2] else 0.0)
    return replace(known, best=names[row], above=above, error=error, beaten_by=beaten)


def describe_unscored_floors(floors: list[Floor]) -> list[str]:
    """Return why floors, or some row's difference to them, cannot be computed, a line each."""
    return [f"{f.name}, floor of {f.model_task[1]} ({f.model_task[0]}): {f.trouble}" for f in floors if f.trouble]


def find_hardest(floors: list[Floor]) -> Floor | None:
    """Return the floor of one task that is hardest to beat, the highest, or the lowest where lower is better; None if
    no floor has a score."""
    scored = [floor for floor in floors if not isnan(floor.score)]
    return max(scored, key=lambda floor: -floor.score if floor.lower_is_better else floor.score, default=None)


def find_unranked(floors: list[Floor]) -> dict[ModelTask, str]:
    """Return the models and tasks that rank no methods, and why: UNLEARNED or UNSETTLED."""
    groups: dict[ModelTask, list[Floor]] = {}
    for floor in floors:
        groups.setdefault(floor.model_task, []).append(floor)
    found = {model_task: explain_unranked(some) for model_task, some in groups.items()}
    return {model_task: why for model_task, why in found.items() if why}


def explain_unranked(floors: list[Floor]) -> str:
    """Return why a model and task rank no methods; nothing where they do. floors: all of theirs; one that applies to no
    row need not be beaten.

    UNLEARNED: no row beats every floor that applies to it, though every run is there and could be compared. UNSETTLED:
    none does so far, or it is not known what some floor scores or which rows beat it.
    """
    compared = [floor for floor in floors if floor.best is not None]
    if compared and not find_best_rows(compared):
        return UNLEARNED if all(floor.complete for floor in compared) else UNSETTLED
    return "" if all(floor.measured for floor in floors) else UNSETTLED


def find_best_rows(floors: list[Floor]) -> set[RowKey]:
    """Return the rows that beat every floor of one model and task that applies to them."""
    rows = frozenset().union(*(floor.beaten_by for floor in floors))
    return {row for row in rows if all(row in floor.beaten_by for floor in floors if floor.applies_to(row[1]))}


def iterate_rows(
    experiment: Experiment, outcomes: list[Outcome]
) -> Iterator[tuple[str, ModelTask, RowKey, list[Outcome]]]:
    """Yield the rows of every model and task: how a sentence names them, what they are, and their runs."""
    groups = group_by_model_task(outcomes)
    several = len({model for model, _ in groups}) > 1
    for (model, task), some in groups.items():
        rows = group_by_row(experiment, some)
        names = name_rows(rows, list(get_place(experiment, some[0])))
        for row, runs in rows.items():
            yield f"{names[row]} on {f'{task} ({model})' if several else task}", (model, task), row, runs


def describe_failed_runs(experiment: Experiment, outcomes: list[Outcome], floors: list[Floor]) -> Iterator[str]:
    """Yield the rows of which some runs score no better than the floor, but for tasks that no row learned. A mean and
    its interval do not show that."""
    unranked = find_unranked(floors)
    for name, model_task, (label, where), runs in iterate_rows(experiment, outcomes):
        hardest = find_hardest([f for f in floors if f.model_task == model_task and f.applies_to(where)])
        if hardest is None or label in experiment.floors or unranked.get(model_task) == UNLEARNED:
            continue
        task = load_task_of(runs[0])
        sign, metric = -1 if task.is_lower_better() else 1, task.metric
        found = [
            (run.settings.seed, sign * (get_score(task, run.result, metric) - hardest.score) <= SCORE_TOLERANCE)
            for run in runs
            if run.result and metric in run.result["metrics"]  # older versions had other scores
        ]
        if any(failed for _, failed in found):
            yield f"{name}: {count_runs(found, f'score no better than {hardest.name}')}"


def describe_constant_runs(experiment: Experiment, outcomes: list[Outcome], predictions: Predictions) -> Iterator[str]:
    """Yield the rows of which some runs predict one value on a regression task. A correlation does not show that: it is
    the same however close together predictions lie."""
    what = f"predict one value, within {CONSTANT * 100:g} % of the targets' standard deviation"
    for name, _, _, runs in iterate_rows(experiment, outcomes):
        if load_task_of(runs[0]).form == "regression":
            read = [item for run in runs for item in read_or_skip(predictions, [run]).items()]
            found = [(seed, is_constant(rows)) for seed, rows in read]
            if any(constant for _, constant in found):
                yield f"{name}: {count_runs(found, what)}; a correlation does not show that"


def count_runs(found: list[tuple[int, bool]], what: str) -> str:
    """Return how many of some runs do `what`, and with which seeds. found: each run's seed and whether it does."""
    seeds = [seed for seed, does in found if does]
    return f"{len(seeds)} of {len(found)} runs {what} (seeds {', '.join(map(str, sorted(set(seeds))))})"


def is_constant(rows: list[Row]) -> bool:
    """Return whether predicted numbers are one value, as far as they matter; not where one is missing, NaN or infinite,
    or where there is only one."""
    try:
        answers, targets = (np.array([float(row[key]) for row in rows]) for key in ("answer", "gold"))
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
    return len(rows) > 1 and bool(np.isfinite(answers).all() and np.std(answers) <= CONSTANT * np.std(targets))
