"""Planned contrasts: within a row, the mean over some columns minus that over others."""

from collections.abc import Iterator

from dual_lora.lab.report.comparison.matches import Key, Match, group_by_place
from dual_lora.lab.report.values import format_value, get_heading, get_place
from dual_lora.lab.study.experiment import CONTRAST_SIDES, Experiment
from dual_lora.lab.study.outcome import Outcome


def iterate_contrasts(experiment: Experiment, outcomes: list[Outcome]) -> Iterator[Match]:
    """Yield the experiment's contrasts for every row and task that has a finished run in each of their columns. Floors
    rank nothing, and have none."""
    heading = get_heading(str(experiment.columns)).replace("_", " ")
    tested = [outcome for outcome in outcomes if outcome.result and outcome.label not in experiment.floors]
    for label, places in (group_by_place(experiment, tested) if experiment.contrasts else {}).items():
        groups: dict[Key, dict[object, list[Outcome]]] = {}
        for (*where, column), finished in places.items():
            groups.setdefault(tuple(where), {})[column] = finished
        for contrast in experiment.contrasts:
            for columns in groups.values():
                sides = [[columns.get(value, []) for value in contrast[side]] for side in CONTRAST_SIDES]
                if all(map(all, sides)):
                    names = [name_side(contrast[side]) for side in CONTRAST_SIDES]
                    place = get_place(experiment, sides[0][0][0])
                    place.pop(experiment.columns)
                    found = Match(f"{label}, {heading} {names[0]}", names[1], place, *sides, contrast=True)
                    if found.seeds:
                        yield found


def name_side(values: list[object]) -> str:
    """Return the columns of one side in words."""
    return ("mean of " if len(values) > 1 else "") + " and ".join(map(format_value, values))
