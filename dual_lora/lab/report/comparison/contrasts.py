"""Planned contrasts: within a row, the mean over some columns minus that over others, from the recorded scores."""

from collections.abc import Iterator
from dataclasses import dataclass

from dual_lora.lab.report.comparison.matches import Key, compute_mean, group_by_place
from dual_lora.lab.report.values import format_value, get_heading, get_place
from dual_lora.lab.study.experiment import CONTRAST_SIDES, Experiment
from dual_lora.lab.study.outcome import Outcome, load_task_of
from tasks import Task


@dataclass(frozen=True, eq=False)
class Contrast:
    """The runs of one row on one task that a contrast sets against each other, a list for each column.

    Attributes:
        label, baseline: what each side is, as it is printed.
        place: the settings that head rows.
    """

    label: str
    baseline: str
    place: dict[str, object]
    plus: list[list[Outcome]]
    minus: list[list[Outcome]]

    @property
    def first(self) -> Outcome:
        """One of the runs; all are of one model and task."""
        return self.plus[0][0]

    @property
    def task(self) -> Task:
        """The one task of all these runs."""
        return load_task_of(self.first)

    @property
    def seeds(self) -> list[int]:
        """The seeds with which every column has a run, sorted."""
        return sorted(set.intersection(*({c.settings.seed for c in cells} for cells in (*self.plus, *self.minus))))

    def subtract_recorded(self, metric: str) -> tuple[float, ...]:
        """Return, for each seed, the mean score of one side minus that of the other."""
        sides = ([average_scores(side, seed, metric) for seed in self.seeds] for side in (self.plus, self.minus))
        return tuple(one - other for one, other in zip(*sides, strict=True))


def average_scores(columns: list[list[Outcome]], seed: int, metric: str) -> float:
    """Return the mean over columns of the recorded score of the run with this seed."""
    return compute_mean(
        tuple(c.result["metrics"][metric] for cells in columns for c in cells if c.settings.seed == seed)
    )


def name_side(values: list[object]) -> str:
    """Return the columns of one side in words."""
    return ("mean of " if len(values) > 1 else "") + " and ".join(map(format_value, values))


def iterate_contrasts(experiment: Experiment, done: list[Outcome]) -> Iterator[Contrast]:
    """Yield the experiment's contrasts for every row and task that has a finished run in each of their columns."""
    heading = get_heading(str(experiment.columns)).replace("_", " ")
    for label, places in (group_by_place(experiment, done) if experiment.contrasts else {}).items():
        groups: dict[Key, dict[object, list[Outcome]]] = {}
        for (*where, column), cells in places.items():
            groups.setdefault(tuple(where), {})[column] = cells
        for contrast in experiment.contrasts:
            for columns in groups.values():
                sides = [[columns.get(value, []) for value in contrast[side]] for side in CONTRAST_SIDES]
                if all(map(all, sides)):
                    names = [name_side(contrast[side]) for side in CONTRAST_SIDES]
                    place = get_place(experiment, sides[0][0][0])
                    place.pop(experiment.columns)
                    found = Contrast(f"{label}, {heading} {names[0]}", names[1], place, *sides)
                    if found.seeds:
                        yield found
