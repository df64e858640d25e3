"""What is left of the scores when every weight update is cut to rank k."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dual_lora.lab.errors import require
from dual_lora.lab.present.document import MISSING, Block, Image, Table, Text
from dual_lora.lab.present.drawing import save_figure, use_style
from dual_lora.lab.record.record import TRUNCATION_FILE
from dual_lora.lab.report.analyses.groups import format_mean, group_runs, name_model_task
from dual_lora.lab.report.comparison.floors import Floor, ModelTask, find_hardest, get_model_task
from dual_lora.lab.report.figures.layout import (
    GREY,
    STYLE,
    add_legend,
    compute_half_interval,
    create_panels,
    get_style,
)
from dual_lora.lab.report.values import DECIMALS, get_unit
from dual_lora.lab.study.outcome import Outcome, load_task_of

FULL = "full"  # the column of the complete update
SAME = 0.1  # points by which a score may differ from the recorded one


@dataclass(frozen=True)
class Curve:
    """One run's scores in points by rank, NaN where the outputs had none; `kept`: the share of ||dW||^2, by rank.

    recorded: the run's own score; `metric`: which one it is; `decimals`: with how many it is printed.
    """

    model_task: ModelTask
    label: str
    scores: dict[int, float]
    kept: dict[int, float]
    recorded: float
    metric: str
    decimals: int = DECIMALS[100]

    @property
    def uncut(self) -> float:
        """The score with the complete update."""
        return self.scores[max(self.scores)]

    def get_score(self, rank: int) -> float:
        """Return the score at a rank, or at the next lower one where the update was not cut to it; beyond the update's
        own, nothing is cut."""
        return self.scores[self.find_cut(rank)]

    def get_kept(self, rank: int) -> float:
        """Return the share of the squared norm that is kept at a rank, as `get_score`."""
        return self.kept[self.find_cut(rank)]

    def find_cut(self, rank: int) -> int:
        """Return the largest rank up to this one that the update was cut to; rank 0 always is."""
        return max(known for known in self.scores if known <= rank)


def iterate_truncation_blocks(outcomes: list[Outcome], folder: Path, floors: list[Floor]) -> Iterator[Block]:
    """Yield the curve of every row and task as a figure and as tables."""
    curves = [read_curve(outcome) for outcome in outcomes]
    yield Text("Updates cut to a lower rank", heading=True)
    yield Text(
        "Every changed weight W0 + dW becomes W0 + dW_k, the closest of rank k by SVD; nothing is trained again. The "
        "head, and under full tuning embeddings, norms and biases, stay as trained."
    )
    with use_style(STYLE):
        figure = draw_curves_by_rank(curves, floors)
        yield Image(
            save_figure(figure, folder, "truncation")[0],
            "Score by the rank that is kept. Small dots: seeds; large ones: their mean; bars: 95 % t-interval (three "
            "seeds or more); the last dot of a row is its whole update; dotted: the floor",
        )
    yield Table(
        tabulate_losses(curves),
        "Score minus that of the whole update, in points: mean over seeds ± half the 95 % t-interval. "
        "full: the score itself, and in brackets the largest rank of an update.",
    )
    yield Table(
        tabulate_shares(curves, floors),
        "Share of the gain over the highest floor that is left, from means over seeds; a dash where the row was not "
        "found to beat every floor by three standard errors.",
    )
    yield Table(tabulate_kept(curves), "Share of ||dW||² that is left, a mean over weights and seeds.")
    same = sum(abs(curve.uncut - curve.recorded) <= SAME for curve in curves)
    yield Text(items=(f"uncut, {same} of {len(curves)} runs have their recorded score up to {SAME} points",))


def read_curve(outcome: Outcome) -> Curve:
    """Return the curve of an analysed run.

    Raises:
        UserError: its file is damaged, or of another score than the task's main one.
    """
    content = outcome.record.read_sealed(TRUNCATION_FILE, "ranks", "scores", "kept", "metric", "recorded")
    task, ranks, metric = load_task_of(outcome), content["ranks"], content["metric"]
    require(
        metric == task.metric,
        f"{outcome.record.folder / TRUNCATION_FILE}: its scores are {metric}, the task's main one is {task.metric} now"
        "; sweep.py without run=false does the run again",
    )
    unit = get_unit(task, metric)
    points = [np.nan if score is None else score * unit for score in content["scores"]]
    return Curve(
        get_model_task(outcome),
        outcome.label,
        dict(zip(ranks, points, strict=True)),
        dict(zip(ranks, content["kept"], strict=True)),
        content["recorded"] * unit,
        metric,
        DECIMALS[unit],
    )


def list_ranks(curves: list[Curve]) -> list[int]:
    """Return the ranks below every update's own that some curve was cut to, and 0."""
    return sorted({rank for curve in curves for rank in curve.scores if rank < max(curve.scores)})


def tabulate_losses(curves: list[Curve]) -> pd.DataFrame:
    """Return what every cut costs, a row for each method and task."""
    lines = []
    for (model_task, label), some in group_runs(curves).items():
        line, style = name_model_task(model_task, curves) | {"method": label}, f".{some[0].decimals}f"
        for rank in list_ranks(curves):
            line[str(rank)] = format_mean([curve.get_score(rank) - curve.uncut for curve in some], f"+{style}")
        ranks = sorted({max(curve.scores) for curve in some})
        line[FULL] = f"{format_mean([curve.uncut for curve in some], style)} ({ranks[-1]})"
        lines.append(line)
    return pd.DataFrame(lines)


def tabulate_shares(curves: list[Curve], floors: list[Floor]) -> pd.DataFrame:
    """Return the share of the gain over the floor that every cut leaves."""
    lines = []
    for (model_task, label), some in group_runs(curves).items():
        floor = find_beaten_floor(model_task, label, floors)
        line = name_model_task(model_task, curves) | {"method": label}
        for rank in list_ranks(curves):
            line[str(rank)] = MISSING
            left = np.mean([curve.get_score(rank) for curve in some])
            if floor is not None and not np.isnan(left):
                line[str(rank)] = f"{(left - floor.score) / (np.mean([c.uncut for c in some]) - floor.score):.0%}"
        line["floor"] = MISSING if floor is None else f"{floor.score:.{floor.decimals}f} ({floor.name})"
        lines.append(line)
    return pd.DataFrame(lines)


def find_beaten_floor(model_task: ModelTask, label: str, floors: list[Floor]) -> Floor | None:
    """Return the hardest floor of a task if a row beats every floor of it; else None."""
    here = [floor for floor in floors if floor.model_task == model_task]
    if not here or not all(floor.is_beaten_by(label) for floor in here):
        return None
    return find_hardest(here)


def tabulate_kept(curves: list[Curve]) -> pd.DataFrame:
    """Return the share of the squared norm that every cut keeps."""
    lines = []
    for (model_task, label), some in group_runs(curves).items():
        kept = {str(rank): f"{np.mean([curve.get_kept(rank) for curve in some]):.2f}" for rank in list_ranks(curves)}
        lines.append(name_model_task(model_task, curves) | {"method": label} | kept)
    return pd.DataFrame(lines)


def draw_curves_by_rank(curves: list[Curve], floors: list[Floor]) -> Figure:
    """Return a panel for each model and task, a line for each row."""
    groups, labels = group_runs(curves), list(dict.fromkeys(curve.label for curve in curves))
    model_tasks = list(dict.fromkeys(curve.model_task for curve in curves))
    ticks = sorted({rank for curve in curves for rank in curve.scores})
    figure, panels = create_panels(len(model_tasks), 2.3)
    for axes, model_task in zip(panels, model_tasks, strict=True):
        for (own, label), some in groups.items():
            if own == model_task:
                draw_curve(axes, some, label, labels.index(label), ticks)
        for floor in floors:
            if floor.model_task == model_task and not np.isnan(floor.score):
                axes.axhline(floor.score, color=GREY, linestyle=":", linewidth=1)
        metrics = " or ".join(dict.fromkeys(curve.metric for curve in curves if curve.model_task == model_task))
        axes.set(
            title=", ".join(name_model_task(model_task, curves).values()),
            xlabel="rank kept",
            ylabel=f"{metrics}, points",
        )
        axes.set_xticks(range(len(ticks)), list(map(str, ticks)))
        axes.grid(alpha=0.3)
    add_legend(figure, panels)
    return figure


def draw_curve(axes: Axes, some: list[Curve], label: str, number: int, ticks: list[int]) -> None:
    """Draw one row's seeds and their mean, up to its complete update."""
    style, known = get_style(number), sorted({rank for curve in some for rank in curve.scores})
    xs = np.array([ticks.index(rank) for rank in known]) + 0.08 * (number - 1)
    seeds = np.array([[curve.get_score(rank) for rank in known] for curve in some])
    bars = [compute_half_interval(column[~np.isnan(column)]) for column in seeds.T]
    axes.errorbar(
        xs,
        seeds.mean(axis=0),
        yerr=bars if any(bars) else None,
        label=label,
        markersize=4,
        capsize=2,
        linewidth=1,
        **style,
    )
    for scores in seeds:
        axes.plot(xs, scores, ".", color=style["color"], markersize=3, alpha=0.5)
