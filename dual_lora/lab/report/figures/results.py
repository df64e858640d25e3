"""The scores of an experiment: every seed a dot, with the mean and its t-interval."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from pandas.core.groupby import SeriesGroupBy

from dual_lora import paper
from dual_lora.lab.report.comparison.floors import Floor
from dual_lora.lab.report.figures.layout import (
    GREY,
    MIN_INTERVAL_SEEDS,
    PANELS,
    add_legend,
    compute_half_interval,
    create_panels,
    equalize_spans,
    find_floor,
    get_style,
    is_unlearned,
)
from dual_lora.lab.report.values import FIELDS, Column, get_heading, get_unit, list_columns, list_outcomes
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, load_task_of

MIN_AXIS_WIDTH = 10.0  # the least width of an axis of percent


def draw_results(
    experiment: Experiment, values: pd.DataFrame, outcomes: list[Outcome], floors: list[Floor]
) -> Figure | None:
    """Return the figure of an experiment: lines over a numeric setting, else a panel of points for each column; None
    while there is nothing to draw, or many columns hold one run each, which the table says better."""
    values = values.dropna(subset="value")
    if values.empty:
        return None
    numbers = pd.to_numeric(values["column"], errors="coerce")
    if isinstance(experiment.columns, str) and numbers.notna().any():
        return draw_lines(experiment, values.assign(column=numbers), outcomes, floors)
    if values["column"].nunique() > PANELS and values["seed"].nunique() == 1:
        return None
    return draw_points(experiment, values, outcomes, floors)


def describe_spread(experiment: Experiment, values: pd.DataFrame) -> str:
    """Return what the marks of the figure are."""
    known = values.dropna(subset="value")
    sizes = sorted(set(known.groupby([*experiment.rows, "label", "column"], dropna=False)["seed"].nunique()))
    if sizes[-1] == 1:
        return "one run each, so no spread is known"
    runs = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
    bars = "bars: 95 % t-interval over seeds" if sizes[-1] >= MIN_INTERVAL_SEEDS else "no interval with so few"
    return f"small dots: {runs} seeds each; large ones: their mean; {bars}"


def describe_axis(part: pd.DataFrame, outcomes: list[Outcome]) -> str:
    """Return the name and unit of the main score of some values, for an axis."""
    units = {get_unit(task, task.metric) for task in map(load_task_of, outcomes)}
    found = map(load_task_of, list_outcomes(part, outcomes))
    names = list(dict.fromkeys(task.metric if task.metric in task.unscaled else f"{task.metric}, %" for task in found))
    return names[0] if len(names) == 1 else f"mean of the main scores{', %' if 100 in units else ''}"


def draw_lines(experiment: Experiment, values: pd.DataFrame, outcomes: list[Outcome], floors: list[Floor]) -> Figure:
    """Return a panel for each combination of the rows' settings, a line for each label; what has no value of the
    columns' setting is a horizontal line. Published points have a panel of their own. Floors may lie far below: they
    are drawn where the other rows' range holds them, and in the title where it does not."""
    groups = list(values.groupby(experiment.rows, sort=False)) if experiment.rows else [((), values)]
    known, labels = find_published_points(experiment), list(dict.fromkeys(values["label"]))
    figure, panels = create_panels(len(groups) + bool(known), 2.3)
    for axes, (key, group) in zip(panels, groups, strict=False):
        tested = group[~group["label"].isin(experiment.floors)]
        draw_labels(axes, group if tested.empty else tested, labels)
        axes.set(title=", ".join(map(str, key)), ylabel=describe_axis(group, outcomes))
    drawn = [(axes, list_outcomes(group, outcomes)) for axes, (_, group) in zip(panels, groups, strict=False)]
    lost = [axes for axes, shown in drawn if is_unlearned(shown, floors)]
    equalize_spans([axes for axes, _ in drawn if axes not in lost])
    for axes in lost:
        equalize_spans([axes])
        axes.set_title(f"{axes.get_title()} (not learned)")
    for axes, shown in drawn:
        draw_floor(axes, find_floor(shown, floors))
    if known:
        draw_published_points(panels[-1], known, len(labels))
        panels[-1].set(title="published" if experiment.scale == "full" else "published: other model and tasks")
    for axes in panels:
        set_setting_axis(axes, experiment.columns, values["column"].dropna())
    add_legend(figure, panels)
    return figure


def draw_floor(axes: Axes, floor: Floor | None) -> None:
    """Draw the floor of a panel where its range holds it; else the title says it."""
    if floor is None:
        return
    low, high = axes.get_ylim()
    if low <= floor.score <= high:
        axes.axhline(floor.score, color=GREY, linestyle=":", linewidth=1, label="floor")
    else:
        axes.set_title(f"{axes.get_title()} (floor: {floor.score:.{floor.decimals}f})")


def draw_labels(axes: Axes, group: pd.DataFrame, labels: list[str]) -> None:
    """Draw the labels of one panel."""
    level = list(dict.fromkeys(group.loc[group["column"].isna(), "label"]))
    others = [label for label in labels if label not in level]
    for label, part in group.groupby("label", sort=False):
        style = get_style(labels.index(label))
        if label in level:
            draw_level_line(axes, part["value"], label, style["color"], level.index(label), len(level))
        else:
            aside = 4 * (others.index(label) - (len(others) - 1) / 2)
            draw_means(axes, part.groupby("column")["value"], label, style, aside)


def set_setting_axis(axes: Axes, setting: str, numbers: pd.Series) -> None:
    """Make the setting's axis: logarithmic where its largest value is more than 20 times the smallest, ticks at whole
    numbers."""
    logarithmic = numbers.max() > 20 * numbers.min() > 0
    axes.set(xlabel=get_heading(setting).replace("_", " "), xscale="log" if logarithmic else "linear")
    if (numbers % 1 == 0).all():
        axes.set_xticks(sorted(set(numbers)), [f"{number:g}" for number in sorted(set(numbers))])
        axes.minorticks_off()
    axes.grid(alpha=0.3)


def draw_level_line(axes: Axes, scores: pd.Series, label: str, color: str, turn: int, of: int) -> None:
    """Draw the mean of what has no value of the setting, its seeds at the left edge. The dashes fall into the gaps of
    the others', so that equal lines stay visible."""
    dashes = (4 * turn, (4, 4 * max(1, of - 1)))
    axes.axhline(scores.mean(), color=color, linestyle=dashes, linewidth=1.5, label=label)
    edge = [0.02 + 0.03 * turn] * len(scores)
    axes.plot(edge, scores, ".", color=color, markersize=4, alpha=0.7, transform=axes.get_yaxis_transform())
    half = compute_half_interval(scores)
    if half:
        axes.axhspan(scores.mean() - half, scores.mean() + half, color=color, alpha=0.08, linewidth=0)


def draw_means(axes: Axes, scores: SeriesGroupBy, label: str, style: dict[str, str], aside: float) -> None:
    """Draw the seeds and their means, `aside` points next to their place, so that equal ones stay visible."""
    mean, bars = scores.mean(), scores.agg(lambda seeds: compute_half_interval(list(seeds)))
    place = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    axes.errorbar(
        mean.index,
        mean,
        yerr=bars if bars.any() else None,
        transform=place,
        markersize=4,
        capsize=2,
        linewidth=1,
        label=label,
        **style,
    )
    seeds = scores.apply(list).explode().astype(float)
    axes.plot(seeds.index, seeds, ".", transform=place, color=style["color"], markersize=3, alpha=0.5)
    ends = [*zip(mean.index, mean - bars, strict=True), *zip(mean.index, mean + bars, strict=True)]
    axes.update_datalim([*ends, *zip(seeds.index, seeds, strict=True)])
    axes.autoscale_view()


def find_published_points(experiment: Experiment) -> dict[str, pd.Series]:
    """Return the published points by label, for an experiment over a setting that a published table has as a key."""
    key, found = get_heading(experiment.columns), {}
    for table in map(paper.load_table, experiment.published):
        for row in table.rows if key in table.keys and "avg" in table.columns else ():
            value = row.values.get("avg")
            if value and value.number:
                words = [str(k) for name, k in row.keys.items() if isinstance(k, str) and name != "params"]
                words += [str(row.keys["rank"])] if row.keys[key] is None else []
                label = f"{' '.join(words)} [{value.status}]"
                found.setdefault(label, []).append((row.keys[key], value.number))
    return {label: pd.Series(dict(pairs)) for label, pairs in found.items()}


def draw_published_points(axes: Axes, known: dict[str, pd.Series], first: int) -> None:
    """Draw published points, in the styles from the number `first` on."""
    for number, (label, series) in enumerate(known.items(), first):
        color = get_style(number)["color"]
        if series.index[0] is None:
            axes.axhline(series.iloc[0], color=color, linestyle="--", linewidth=1, label=label)
        else:
            axes.plot(series.index, series, "x-", color=color, markersize=3, linewidth=1, label=label)
    axes.set_ylabel("average, %")


def draw_points(experiment: Experiment, values: pd.DataFrame, outcomes: list[Outcome], floors: list[Floor]) -> Figure:
    """Return a panel for each column: every seed a dot, the mean and its interval a bar, a row for each row of the
    table."""
    names = [" ".join(map(str, key)) for key in values[[*experiment.rows, "label"]].itertuples(index=False)]
    values = values.assign(name=names)
    order = list(dict.fromkeys(values["name"]))[::-1]
    found = {column.heading: column for column in list_columns(experiment, outcomes)}
    heads = list(dict.fromkeys(values["column"]))
    figure, panels = create_panels(len(heads), 0.7 + 0.2 * len(order))
    for axes, head in zip(panels, heads, strict=True):
        part = values[values["column"] == head]
        draw_column(axes, part, order)
        shown = list_outcomes(part, outcomes)
        unit = describe_axis(part, outcomes) if found[head].field is None else get_column_unit(found[head], shown)
        if unit.endswith("%"):
            widen_axis(axes)
            floor = find_floor(shown, floors) if found[head].field is None else None
            if floor is not None and axes.get_xlim()[0] <= floor.score <= axes.get_xlim()[1]:
                axes.axvline(floor.score, color=GREY, linestyle=":", linewidth=1)
        axes.set(title=str(head), xlabel=unit, yticks=range(len(order)), ylim=(-0.6, len(order) - 0.4))
        axes.set_yticklabels(order if axes.get_subplotspec().is_first_col() else [])
        axes.grid(alpha=0.3)
    return figure


def draw_column(axes: Axes, part: pd.DataFrame, order: list[str]) -> None:
    """Draw the values of one column, a row for each name."""
    style = get_style(0)
    places = [order.index(name) for name in part["name"]]
    axes.plot(part["value"], places, "o", color=style["color"], markersize=3, alpha=0.5)
    scores = part.groupby("name", sort=False)["value"]
    mean, bars = scores.mean(), scores.agg(lambda seeds: compute_half_interval(list(seeds)))
    rows = [order.index(name) for name in mean.index]
    axes.errorbar(mean, rows, xerr=bars if bars.any() else None, fmt="|", color="black", markersize=9, capsize=2)


def get_column_unit(column: Column, outcomes: list[Outcome]) -> str:
    """Return the unit of the score that a column names and some runs have; empty if it names no score."""
    return (
        ""
        if column.field in FIELDS or any(column.field in load_task_of(outcome).unscaled for outcome in outcomes)
        else "%"
    )


def widen_axis(axes: Axes) -> None:
    """Show at least `MIN_AXIS_WIDTH` points of a score, so that small differences do not look large."""
    low, high = axes.get_xlim()
    room = max(0, MIN_AXIS_WIDTH - (high - low)) / 2
    axes.set_xlim(low - room, high + room)
