"""Does the curvature at the start predict the best learning rate? A point for each row and task."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from dual_lora.lab.present.document import MISSING, Block, Image, Table, Text
from dual_lora.lab.present.drawing import save_figure, use_style
from dual_lora.lab.record.record import CURVATURE_FILE
from dual_lora.lab.report.comparison.floors import Floor
from dual_lora.lab.report.figures.layout import COLORS, GREY, MARKERS, STYLE, WIDTH
from dual_lora.lab.report.learning_rates import EDGE, is_at_edge
from dual_lora.lab.report.values import format_value
from dual_lora.lab.statistics.correlation import RankCorrelation, correlate_ranks
from dual_lora.lab.study.outcome import Outcome


@dataclass(frozen=True)
class Point:
    """One run: its row, its task, with its model where there are several, the largest eigenvalue at its start, the rate
    that was chosen for it and whether that is an edge of the grid."""

    label: str
    task: str
    eigenvalue: float
    rate: float
    at_edge: bool
    content: dict


def iterate_curvature_blocks(outcomes: list[Outcome], folder: Path, floors: list[Floor]) -> Iterator[Block]:
    """Yield the eigenvalues, their figure and their rank correlation with the chosen rates. floors: not used."""
    several = len({outcome.settings.model.name for outcome in outcomes}) > 1
    points = [read_point(outcome, several) for outcome in outcomes]
    one = points[0].content
    yield Text("Curvature and the best rate", heading=True)
    yield Text(
        f"The largest Hessian eigenvalue of what trains at the learning rate (the head aside), at the start, on "
        f"{one['rows']} training rows without dropout, to a relative tolerance of {one['tolerance']:g}. Updates with a "
        "ramp are at full scale, f = 1. The rate is the best of the grid, so it is known up to the grid's factor."
    )
    with use_style(STYLE):
        figure = draw_scatter(points)
        if figure:
            yield Image(save_figure(figure, folder, "curvature")[0], describe_scatter(points))
    yield Table(tabulate_points(points), "Largest eigenvalue at the start | the chosen rate (edge: of the grid).")
    found = list(iterate_correlations(points))
    if found:
        yield Table(
            pd.DataFrame(found),
            "Spearman's rank correlation of eigenvalue and chosen rate. If curvature sets the rate, it is near -1. The "
            "95 % interval (Bonett and Wright 2000), rough for so few points, and p (permutation test) take the points "
            "for independent. They are a few rows on a few tasks, so the interval is too narrow for a statement on "
            "other methods or tasks. Eigenvalues that differ by no more than the tolerance are tied.",
        )
    else:
        yield Text("No rank correlation: under five points, or all rates or eigenvalues are equal.")


def read_point(outcome: Outcome, several: bool) -> Point:
    """Return the point of an analysed run. several: whether there are runs of several models.

    Raises:
        UserError: its file is damaged.
    """
    content = outcome.record.read_sealed(CURVATURE_FILE, "eigenvalue", "rows", "tolerance")
    task = outcome.settings.task.name + (f" ({outcome.settings.model.name})" if several else "")
    return Point(outcome.label, task, content["eigenvalue"], outcome.rate, is_at_edge(outcome), content)


def tabulate_points(points: list[Point]) -> pd.DataFrame:
    """Return a row for each label, a column for each task."""
    lines: dict[str, dict[str, str]] = {}
    for point in points:
        text = f"{point.eigenvalue:.3g} | {format_value(point.rate)}{f' {EDGE}' if point.at_edge else ''}"
        line = lines.setdefault(point.label, {"method": point.label})
        line[point.task] = f"{line[point.task]}; {text}" if point.task in line else text
    return pd.DataFrame(lines.values()).fillna(MISSING)


def iterate_correlations(points: list[Point]) -> Iterator[dict[str, object]]:
    """Yield the correlation over all points, without each row in turn, and within each task."""
    labels, tasks = (list(dict.fromkeys(getattr(p, name) for p in points)) for name in ("label", "task"))
    groups = {"all": points}
    groups |= {f"without {label}": [p for p in points if p.label != label] for label in labels if len(labels) > 2}
    groups |= {f"{task} alone": [p for p in points if p.task == task] for task in tasks if len(tasks) > 1}
    for name, some in groups.items():
        found = correlate_ranks([p.eigenvalue for p in some], [p.rate for p in some], some[0].content["tolerance"])
        if found:
            yield {"points": name, "number": found.points} | format_correlation(found)


def format_correlation(found: RankCorrelation) -> dict[str, str]:
    """Return a correlation, its interval and its p as cells of a table."""
    interval = MISSING if found.low is None else f"{found.low:+.2f} to {found.high:+.2f}"
    return {"rank correlation": f"{found.rho:+.2f}", "95 % interval": interval, "p": f"{found.p:.3f}"}


def draw_scatter(points: list[Point]) -> Figure | None:
    """Return rates against eigenvalues on logarithmic axes, a colour for each row, a marker for each task; None where
    no eigenvalue is positive."""
    shown = [p for p in points if p.eigenvalue > 0]
    if not shown:
        return None
    labels, tasks = (list(dict.fromkeys(getattr(p, name) for p in points)) for name in ("label", "task"))
    figure = Figure(figsize=(WIDTH * 0.75, 3.0), layout="constrained")
    axes = figure.subplots()
    for p in shown:
        color, marker = COLORS[labels.index(p.label) % len(COLORS)], MARKERS[tasks.index(p.task) % len(MARKERS)]
        axes.plot(p.eigenvalue, p.rate, marker, color=color, markersize=6, fillstyle="none" if p.at_edge else "full")
    xs = np.array([min(p.eigenvalue for p in shown), max(p.eigenvalue for p in shown)])
    middle = np.exp(np.mean([np.log(p.eigenvalue * p.rate) for p in shown]))
    axes.plot(xs, middle / xs, "--", color=GREY, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="largest Hessian eigenvalue at the start", ylabel="best learning rate")
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    dots = [Line2D([], [], marker="o", linestyle="", color=COLORS[i % len(COLORS)]) for i in range(len(labels))]
    kinds = [Line2D([], [], marker=MARKERS[i % len(MARKERS)], linestyle="", color=GREY) for i in range(len(tasks))]
    figure.legend([*dots, *kinds], [*labels, *tasks], loc="outside right upper")
    return figure


def describe_scatter(points: list[Point]) -> str:
    """Return the caption."""
    lost = sum(p.eigenvalue <= 0 for p in points)
    hidden = f"; {lost} points without a positive eigenvalue are not shown" if lost else ""
    return (
        f"Chosen rate against curvature; hollow: at an edge of the grid; dashed: rate = constant / eigenvalue{hidden}"
    )
