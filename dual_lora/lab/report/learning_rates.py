"""What a report says of learning rates: what each row has, and how it came by it."""

from collections.abc import Iterator

import pandas as pd

from dual_lora.lab.config.compatibility import trains_only_head
from dual_lora.lab.present.document import MISSING, Table
from dual_lora.lab.report.values import format_value, get_heading, get_place, get_rate
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome

# Follows a rate that is the lowest or highest of its grid.
EDGE = "(edge)"


def describe_learning_rates(experiment: Experiment, outcomes: list[Outcome]) -> Iterator[str]:
    """Yield how each row came by its learning rate."""
    tune = experiment.tune
    for label in list_labels(experiment, outcomes):
        of_label = [outcome for outcome in outcomes if outcome.label == label]
        used = sorted({get_rate(outcome) for outcome in of_label} - {None})
        text = ", ".join(map(format_value, used)) or "not chosen yet"
        if tune and label in tune.grid:
            grid = ", ".join(format_value(float(rate)) for rate in tune.grid[label])
            grid += " times the rate of its protocol" if tune.relative else ""
            diverged = sorted({rate for outcome in of_label for rate in outcome.diverged})
            lost = f"; training diverged at {', '.join(map(format_value, diverged))}" if diverged else ""
            edge = (
                f"; {EDGE}: at an edge of the grid, where the best may lie beyond"
                if any(map(is_at_edge, of_label))
                else ""
            )
            yield (
                f"learning rate, {label}: {text}; chosen from {grid} by the main score on {tune.describe_rows()}, "
                f"{describe_seeds(of_label)}; ties go to the lowest rate{lost}{edge}"
            )
        elif not used and all(outcome.result for outcome in of_label):
            yield f"learning rate, {label}: none, nothing trains"
        else:
            head = ", of the head, which alone trains" if all(trains_only_head(c.settings) for c in of_label) else ""
            yield f"learning rate, {label}: {text}{head}; given, not tuned here"


def list_labels(experiment: Experiment, outcomes: list[Outcome]) -> list[str]:
    """Return the labels of outcomes in the experiment's order: a command may ask for some of its rows."""
    asked = {outcome.label for outcome in outcomes}
    return [label for label in experiment.cells if label in asked]


def describe_seeds(outcomes: list[Outcome]) -> str:
    """Return the seeds of the runs that chose rates, by task where tasks differ in them."""
    tasks: dict[tuple[int, ...], list[str]] = {}
    for outcome in outcomes:
        if seeds := tuple(sorted({trial.seed for trial in outcome.cell.tuning})):
            tasks.setdefault(seeds, []).append(outcome.settings.task.name)
    texts = {seeds: f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" for seeds in tasks}
    if len(texts) < 2:
        return "".join(texts.values())
    return ", ".join(f"{text} ({', '.join(dict.fromkeys(tasks[seeds]))})" for seeds, text in texts.items())


def describe_rate(outcome: Outcome) -> str:
    """Return an outcome's rate, with those whose trials scored the same and whether it is at an edge of its grid; a
    dash where it has none."""
    rate = get_rate(outcome)
    if rate is None:
        return MISSING
    tied = f" (tied with {', '.join(map(format_value, outcome.tied))})" if outcome.tied else ""
    return f"{format_value(rate)}{tied}{f' {EDGE}' if is_at_edge(outcome) else ''}"


def is_at_edge(outcome: Outcome) -> bool:
    """Return whether a rate was chosen that is the lowest or highest of its grid."""
    grid = [trial.train.lr for trial in outcome.cell.tuning]
    return bool(grid) and outcome.rate in (min(grid), max(grid))


def tabulate_learning_rates(experiment: Experiment, outcomes: list[Outcome]) -> Table:
    """Return the learning rates by model, task and what else heads rows and columns, a column for each label."""
    lines: dict[tuple[tuple[str, str], ...], dict[str, list[str]]] = {}
    for outcome in outcomes:
        where = {"model": outcome.settings.model.name, "task": outcome.settings.task.name}
        where |= {get_heading(key): format_value(value) for key, value in get_place(experiment, outcome).items()}
        lines.setdefault(tuple(where.items()), {}).setdefault(outcome.label, []).append(describe_rate(outcome))
    rows = [
        {**dict(where), **{label: ", ".join(dict.fromkeys(t)) for label, t in texts.items()}}
        for where, texts in lines.items()
    ]
    return Table(pd.DataFrame(rows).fillna(""), f"Learning rates; {EDGE}: at an edge of the grid it was chosen from.")
