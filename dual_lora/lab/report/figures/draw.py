"""All figures of a report, drawn and written."""

from collections.abc import Collection, Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dual_lora.lab.present.document import Image
from dual_lora.lab.present.drawing import save_figure, use_style
from dual_lora.lab.report.comparison.comparisons import Comparison, Comparisons
from dual_lora.lab.report.comparison.floors import Floor, find_unranked
from dual_lora.lab.report.figures.forest import describe_forest, draw_forest
from dual_lora.lab.report.figures.layout import STYLE
from dual_lora.lab.report.figures.rates import collect_rates, draw_rates
from dual_lora.lab.report.figures.results import describe_spread, draw_results
from dual_lora.lab.report.figures.training import ZEROS, collect_costs, draw_costs, draw_curves
from dual_lora.lab.report.values import ModelTask
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome

Drawn = tuple[str, Figure | None, str]  # a figure's file name, the figure, its caption


def draw_figures(
    experiment: Experiment,
    outcomes: list[Outcome],
    values: pd.DataFrame,
    comparisons: Comparisons,
    floors: list[Floor],
    folder: Path,
) -> Iterator[Image]:
    """Write the figures that the records allow and yield them, the one of verdicts first."""
    with use_style(STYLE):
        for name, figure, caption in iterate_figures(experiment, outcomes, values, comparisons, floors):
            if figure:
                yield Image(save_figure(figure, folder, name)[0], caption)


def iterate_figures(
    experiment: Experiment,
    outcomes: list[Outcome],
    values: pd.DataFrame,
    comparisons: Comparisons,
    floors: list[Floor],
) -> Iterator[Drawn]:
    """Yield every figure with its caption."""
    unranked = find_unranked(floors)
    found = select_learned(comparisons, unranked)
    yield "forest", draw_forest(found), describe_forest(found, bool(comparisons.planned))
    if not experiment.analyse:
        caption = f"{experiment.title}; {describe_spread(experiment, values)}" if values["value"].notna().any() else ""
        yield "figure", draw_results(experiment, values, outcomes, floors), caption
    yield (
        "rates",
        draw_rates(collect_rates(experiment, outcomes)),
        "Score by learning rate, in points: the lighter, the better; ring: chosen; cross: training diverged",
    )
    yield (
        "curves",
        draw_curves(outcomes),
        "Training loss: mean over each row's runs, between the lowest and the highest",
    )
    yield "zeros", draw_curves(outcomes, ZEROS), "Exact zeros in the update: mean over each row's runs, and their range"
    which = "learned tasks" if unranked else "tasks"
    yield (
        "cost",
        None if experiment.analyse else draw_costs(collect_costs(experiment, outcomes, unranked)),
        f"Main score against what a run costs, means over {which} and seeds; a dot for each row and column",
    )


def select_learned(comparisons: Comparisons, unranked: Collection[ModelTask]) -> list[Comparison]:
    """Return the planned comparisons on tasks that their model learned; where none are planned, the exploratory ones by
    main score."""
    found = comparisons.planned or comparisons.exploratory
    return [comparison for comparison in found if (comparison.model, comparison.task) not in unranked]
