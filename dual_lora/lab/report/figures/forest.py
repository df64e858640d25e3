"""Differences at a glance: a row for each comparison, its seeds, mean and interval, over the band of equivalence."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dual_lora.lab.report.comparison.comparisons import Comparison
from dual_lora.lab.report.figures.layout import COLORS, GREY, MIN_INTERVAL_SEEDS, WIDTH
from dual_lora.lab.report.values import format_value, get_heading
from dual_lora.lab.statistics.verdict import BETTER, EQUIVALENT, WORSE

ROW_HEIGHT = 0.19  # inches
MIN_REACH = 2.0  # points to each side that are shown at least
MAX_MEDIANS = 3.0  # at most this many times the median reach of rows is shown: failed runs must not shrink the rest
VERDICT_COLORS = {BETTER: COLORS[2], WORSE: COLORS[4], EQUIVALENT: COLORS[0]}


def draw_forest(found: list[Comparison]) -> Figure | None:
    """Return the forest plot of comparisons in points; None where no difference of several seeds is known."""
    rows = [c for c in found if c.seed_test]
    if all(c.difference.seeds < 2 for c in rows):
        return None
    groups: dict[str, list[Comparison]] = {}
    for c in rows:
        groups.setdefault(f"{c.task} ({c.score})", []).append(c)
    lines = len(rows) + len(groups)
    figure = Figure(figsize=(WIDTH, 0.75 + ROW_HEIGHT * lines), layout="constrained")
    axes, reach = figure.subplots(), find_reach(rows)
    axes.set_xlim(-reach, reach)
    labels, place = {}, lines
    for name, some in groups.items():
        place -= 1
        labels[place] = name
        for comparison in some:
            place -= 1
            labels[place] = name_comparison(comparison)
            draw_row(axes, comparison, place, reach)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(ylim=(-0.7, lines - 0.3), xlabel=describe_difference_axis(rows))
    axes.set_yticks(list(labels), list(labels.values()))
    for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        text.set_fontweight("bold" if labels[int(tick)] in groups else "normal")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    return figure


def find_reach(rows: list[Comparison]) -> float:
    """Return how many points to each side are shown: every band, and seeds and intervals as far as they do not dwarf
    those of the other rows."""
    furthest = [max(abs(value * c.unit) for value in c.difference.by_seed) for c in rows]
    seeds = min(max(furthest), MAX_MEDIANS * float(np.median(furthest)))
    ends = [max(abs(c.seed_test.low), abs(c.seed_test.high)) for c in rows if c.seed_test.low is not None]
    intervals = min(max(ends, default=0.0), 1.5 * seeds)
    return 1.1 * max(MIN_REACH, seeds, intervals, *(1.5 * (c.margin or 0) for c in rows))


def name_comparison(comparison: Comparison) -> str:
    """Return a comparison's name with its place in the table."""
    where = "".join(f", {get_heading(k).replace('_', ' ')} {format_value(v)}" for k, v in comparison.place.items())
    return f"{comparison.name}{where}"


def draw_row(axes: Axes, comparison: Comparison, place: float, reach: float) -> None:
    """Draw one comparison: its band, its seeds, its mean and interval; an arrow where one leaves the frame, and a
    number where the mean does."""
    test, color = comparison.seed_test, VERDICT_COLORS.get(comparison.verdict, GREY)
    seeds = [value * comparison.unit for value in comparison.difference.by_seed]
    drawn = [*seeds, test.mean]
    if comparison.margin:
        axes.barh(place, 2 * comparison.margin, left=-comparison.margin, height=1, color="#56B4E9", alpha=0.25)
    if test.low is not None and test.seeds >= MIN_INTERVAL_SEEDS:
        axes.plot([test.low, test.high], [place, place], color=color, linewidth=1.5, solid_capstyle="butt")
        drawn += [test.low, test.high]
    for side, marker in ((-1, "<"), (1, ">")):
        if max(side * value for value in drawn) > reach:
            axes.plot(side * 0.985 * reach, place, marker, color=color, markersize=4)
    if abs(test.mean) > reach:
        ends = {"x": 0.95 * reach, "ha": "right"} if test.mean > 0 else {"x": -0.95 * reach, "ha": "left"}
        text = f"{test.mean:+.{comparison.decimals}f}"
        axes.text(**ends, y=place, s=text, va="center", fontsize="small", backgroundcolor="white")
    axes.plot(seeds, [place] * len(seeds), "o", color=color, markersize=3, alpha=0.7, markeredgewidth=0)
    axes.plot(test.mean, place, "D", color=color, markersize=4)


def describe_difference_axis(rows: list[Comparison]) -> str:
    """Return what lies to the left and right."""
    lower = {c.lower_is_better for c in rows}
    sides = "" if len(lower) > 1 else "; left: better" if True in lower else "; right: better"
    return f"difference in points{sides}"


def describe_forest(found: list[Comparison], planned: bool) -> str:
    """Return the caption."""
    kind = "Planned" if planned else "Exploratory"
    few = any(c.difference.seeds < MIN_INTERVAL_SEEDS for c in found)
    return (
        f"{kind} differences on learned tasks. Diamond: mean; dots: seeds; line: 95 % t-interval over seeds"
        f"{' (none with two seeds)' if few else ''}; band: the margin of equivalence; green: better, orange: worse, "
        "blue: equivalent, grey: undecided; arrow: some of it lies beyond the frame"
    )
