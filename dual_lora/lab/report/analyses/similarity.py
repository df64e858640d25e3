"""How similar every row's updates are to those of a reference row, such as full tuning, and what they change of a
weight: the size of its rows or their direction."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dual_lora.lab.present.document import MISSING, Block, Image, Table, Text
from dual_lora.lab.present.drawing import save_figure, use_style
from dual_lora.lab.record.record import SIMILARITY_FILE
from dual_lora.lab.report.analyses.groups import format_mean, group_runs, name_model_task
from dual_lora.lab.report.comparison.floors import Floor, ModelTask, get_model_task
from dual_lora.lab.report.figures.layout import STYLE, add_legend, create_panels, get_style
from dual_lora.lab.study.outcome import Outcome

MEASURES = {"cosine": ("cosine", "+.3f", 1), "sign_agreement": ("equal signs, %", ".1f", 100)}
NULL = "null"
MIN_POINTS = 4  # of a correlation


@dataclass(frozen=True)
class ComparedRun:
    """One run's comparison with the runs of the reference row: a row a weight."""

    model_task: ModelTask
    label: str
    rows: list[dict]

    def compute_median(self, measure: str, reference: str, role: str | None = None) -> float:
        """Return the median over weights (of a role) of what was found with a reference; NaN where there is nothing."""
        rows = [row for row in self.rows if role in (None, row["role"])]
        values = [row[measure][reference] for row in rows if row[measure].get(reference) is not None]
        return float(np.median(values)) if values else np.nan


def iterate_similarity_blocks(outcomes: list[Outcome], folder: Path, floors: list[Floor]) -> Iterator[Block]:
    """Yield similarities, and the correlation of the two changes, as tables and as a figure. floors: not used."""
    contents = [outcome.record.read_sealed(SIMILARITY_FILE, "rows", "references") for outcome in outcomes]
    runs = [
        ComparedRun(get_model_task(outcome), outcome.label, content["rows"])
        for outcome, content in zip(outcomes, contents, strict=True)
    ]
    references = list(dict.fromkeys(name for content in contents for name in content["references"]))
    yield Text("Similarity to the reference's updates", heading=True)
    yield Text(
        "Cosine of dW with that of a run of the reference row, taken as one vector, and the share of equal signs among "
        "entries that are 0 in neither. The reference's own row says how similar two runs of it are that differ in "
        "the seed alone. Random: random factors of the same shapes, or a Gaussian matrix where the method has none."
    )
    for measure, (title, style, unit) in MEASURES.items():
        yield Table(
            tabulate_similarity(runs, measure, references, style, unit),
            f"{title.capitalize()}: median over weights, mean over seeds ± half the 95 % t-interval (three or more).",
        )
    yield Table(tabulate_roles(runs, references), "Cosine by role, with the first of these references that there is.")
    yield Table(
        tabulate_correlations(runs),
        "Pearson's correlation of magnitude change and direction change (DoRA, section 3.2) over the layers and seeds "
        "of a role, by number of points. The seeds of a layer are alike, so its sampling error is larger than the "
        "number suggests.",
    )
    with use_style(STYLE):
        path = save_figure(draw_changes(runs), folder, "changes")[0]
    yield Image(
        path, "Change of the size of a weight's rows against change of their direction: a dot a weight and seed"
    )


def tabulate_groups(runs: list[ComparedRun], fill: Callable[[list[ComparedRun]], dict[str, str]]) -> pd.DataFrame:
    """Return a row for each model, task and label."""
    lines = [
        name_model_task(model_task, runs) | {"method": label} | fill(some)
        for (model_task, label), some in group_runs(runs).items()
    ]
    return pd.DataFrame(lines).fillna(MISSING)


def format_known(values: list[float], style: str) -> str:
    """Return the mean over seeds of the values that are known, with half its interval."""
    return format_mean([value for value in values if not np.isnan(value)], style)


def list_roles(runs: list[ComparedRun]) -> list[str]:
    """Return the roles of the weights, in their order."""
    return list(dict.fromkeys(row["role"] for run in runs for row in run.rows))


def tabulate_similarity(
    runs: list[ComparedRun], measure: str, references: list[str], style: str, unit: int
) -> pd.DataFrame:
    """Return one measure with every reference and with random factors."""
    heads = {**{name: name for name in references}, NULL: "random"}
    return tabulate_groups(
        runs,
        lambda some: {
            head: format_known([unit * run.compute_median(measure, name) for run in some], style)
            for name, head in heads.items()
        },
    )


def tabulate_roles(runs: list[ComparedRun], references: list[str]) -> pd.DataFrame:
    """Return the cosine by role, with the first reference that a row has."""

    def fill(some: list[ComparedRun]) -> dict[str, str]:
        name = next((n for n in references if not np.isnan(some[0].compute_median("cosine", n))), references[-1])
        return {
            role: format_known([run.compute_median("cosine", name, role) for run in some], "+.3f") for role in roles
        }

    roles = list_roles(runs)
    return tabulate_groups(runs, fill)


def tabulate_correlations(runs: list[ComparedRun]) -> pd.DataFrame:
    """Return the correlation of the two changes by role."""
    roles = list_roles(runs)
    return tabulate_groups(runs, lambda some: {role: correlate_changes(some, role) for role in roles})


def correlate_changes(some: list[ComparedRun], role: str) -> str:
    """Return the correlation over the weights of a role in all runs; a dash for too few or equal points."""
    points = np.array(list_changes(some, role))
    if len(points) < MIN_POINTS or not points.std(axis=0).all():
        return MISSING
    return f"{np.corrcoef(points.T)[0, 1]:+.2f} ({len(points)})"


def list_changes(some: list[ComparedRun], role: str | None = None) -> list[tuple[float, float]]:
    """Return direction and magnitude change of every weight (of a role)."""
    rows = [row for run in some for row in run.rows if role in (None, row["role"])]
    return [(row["direction_change"], row["magnitude_change"]) for row in rows]


def draw_changes(runs: list[ComparedRun]) -> Figure:
    """Return a panel for each model, task and label, a colour for each role."""
    groups, roles = group_runs(runs), list_roles(runs)
    figure, panels = create_panels(len(groups), 1.9)
    for axes, ((model_task, label), some) in zip(panels, groups.items(), strict=True):
        for number, role in enumerate(roles):
            points = np.array(list_changes(some, role)).reshape(-1, 2)
            axes.plot(*points.T, linestyle="", markersize=3, alpha=0.7, label=role, **get_style(number))
        axes.set(title=f"{label}, {model_task[1]}", xlim=(0, None), ylim=(0, None))
        axes.locator_params(nbins=4)
        axes.ticklabel_format(style="sci", scilimits=(0, 0))
        axes.grid(alpha=0.3)
    panels[0].set(xlabel="direction change", ylabel="magnitude change")
    add_legend(figure, panels)
    return figure
