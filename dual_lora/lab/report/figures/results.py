"""Figures of a report; the same frame gives the same bytes."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from pandas.core.groupby import SeriesGroupBy

import tasks
from dual_lora import paper
from dual_lora.lab.report.values import FIELDS, Column, get_heading, list_columns
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome

PANELS = 3  # side by side
MIN_AXIS_WIDTH = 10.0  # the least width of an axis of percent


def create_panels(number: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure and its first `number` panels."""
    wide = min(number, PANELS)
    figure = Figure(figsize=(width * wide, height * -(-number // wide)), layout="constrained")
    panels = list(figure.subplots(-(-number // wide), wide, squeeze=False).flat)
    for spare in panels[number:]:
        spare.set_visible(False)
    return figure, panels[:number]


def draw_results(experiment: Experiment, values: pd.DataFrame, done: list[Outcome]) -> Figure | None:
    """Return the figure of an experiment: lines over a numeric setting, else a panel of points for each column; None
    while there is nothing to draw."""
    values = values.dropna(subset="value")
    if values.empty:
        return None
    numbers = pd.to_numeric(values["column"], errors="coerce")
    if isinstance(experiment.columns, str) and numbers.notna().any():
        return draw_lines(experiment, values.assign(column=numbers), done)
    return draw_points(experiment, values, done)


def describe_spread(experiment: Experiment, values: pd.DataFrame) -> str:
    """Return what the bars of a figure are."""
    known = values.dropna(subset="value")
    sizes = sorted(set(known.groupby([*experiment.rows, "label", "column"], dropna=False)["seed"].nunique()))
    if sizes[-1] == 1:
        return "one run each, so no spread is known"
    return f"bars: ± 1 sample standard deviation of {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} runs"


def describe_axis(part: pd.DataFrame, done: list[Outcome]) -> str:
    """Return the name and unit of the main score of some values, for an axis."""
    found = [tasks.load(done[i].settings.task.name) for i in sorted(set(part["cell"]) - {-1})]
    names = list(dict.fromkeys(task.metric if task.metric in task.plain else f"{task.metric}, %" for task in found))
    return names[0] if len(names) == 1 else "mean of the main scores, %"


def draw_lines(experiment: Experiment, values: pd.DataFrame, done: list[Outcome]) -> Figure:
    """Return a panel for each combination of the rows' settings, a line for each label; what has no value of the
    columns' setting is a horizontal line. Published points have a panel of their own."""
    groups = list(values.groupby(experiment.rows, sort=False)) if experiment.rows else [((), values)]
    known, labels = find_published_points(experiment), list(dict.fromkeys(values["label"]))
    figure, panels = create_panels(len(groups) + bool(known), 4.2, 3.4)
    for axes, (key, group) in zip(panels, groups, strict=False):
        draw_labels(axes, group, labels)
        axes.set(title=", ".join(map(str, key)), ylabel=describe_axis(group, done))
    if known:
        draw_published_points(panels[-1], known, len(labels))
        panels[-1].set(title="published" if experiment.scale == "full" else "published: other model and tasks")
    for axes in panels:
        set_setting_axis(axes, experiment.columns, values["column"].dropna())
    add_legend(figure, panels, describe_spread(experiment, values))
    return figure


def draw_labels(axes: Axes, group: pd.DataFrame, labels: list[str]) -> None:
    """Draw the labels of one panel."""
    level = list(dict.fromkeys(group.loc[group["column"].isna(), "label"]))
    others = [label for label in labels if label not in level]
    for label, part in group.groupby("label", sort=False):
        color = f"C{labels.index(label)}"
        if label in level:
            draw_level_line(axes, part["value"], label, color, level.index(label), len(level))
        else:
            aside = 3 * (others.index(label) - (len(others) - 1) / 2)
            draw_means(axes, part.groupby("column")["value"], label, color, aside)


def set_setting_axis(axes: Axes, setting: str, numbers: pd.Series) -> None:
    """Make the setting's axis: logarithmic where its values span more than a decade, ticks at whole numbers."""
    logarithmic = numbers.max() > 20 * numbers.min() > 0
    axes.set(xlabel=get_heading(setting).replace("_", " "), xscale="log" if logarithmic else "linear")
    if (numbers % 1 == 0).all():
        axes.set_xticks(sorted(set(numbers)), [f"{number:g}" for number in sorted(set(numbers))])
        axes.minorticks_off()
    axes.grid(alpha=0.3)


def add_legend(figure: Figure, panels: list[Axes], title: str) -> None:
    """Set one legend of all panels below them, in as many columns as the figure has room for."""
    known = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    place = {"loc": "outside lower center", "fontsize": "small", "handlelength": 4, "title_fontsize": "small"}
    for wide in range(len(known), 0, -1):
        drawn = figure.legend(known.values(), known, title=title, ncols=wide, **place)
        if wide == 1 or drawn.get_window_extent().width < figure.bbox.width:
            return
        drawn.remove()


def draw_level_line(axes: Axes, scores: pd.Series, label: str, color: str, turn: int, of: int) -> None:
    """Draw the mean of what has no value of the setting. The dashes fall into the gaps of the others', so that equal
    lines stay visible."""
    dashes = (4 * turn, (4, 4 * max(1, of - 1)))
    axes.axhline(scores.mean(), color=color, linestyle=dashes, linewidth=1.5, label=label)
    if len(scores) > 1:
        axes.axhspan(scores.mean() - scores.std(), scores.mean() + scores.std(), color=color, alpha=0.08)


def draw_means(axes: Axes, scores: SeriesGroupBy, label: str, color: str, aside: float) -> None:
    """Draw the means over seeds, `aside` points beside their place, so that equal ones stay visible."""
    mean, bars = scores.mean(), scores.std().fillna(0)
    place = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    axes.errorbar(
        mean.index, mean, yerr=bars, transform=place, marker="o", markersize=4, capsize=2, color=color, label=label
    )
    axes.update_datalim([*zip(mean.index, mean - bars, strict=True), *zip(mean.index, mean + bars, strict=True)])
    axes.autoscale_view()


def find_published_points(experiment: Experiment) -> dict[str, pd.Series]:
    """Return the published points by label, for an experiment over a setting that a published table has as a key."""
    key, found = get_heading(experiment.columns), {}
    for table in map(paper.load, experiment.published):
        for row in table.rows if key in table.keys and "avg" in table.columns else ():
            value = row.values.get("avg")
            if value and value.number:
                words = [str(k) for name, k in row.keys.items() if isinstance(k, str) and name != "params"]
                words += [str(row.keys["rank"])] if row.keys[key] is None else []
                label = f"{' '.join(words)} [{value.status}]"
                found.setdefault(label, []).append((row.keys[key], value.number))
    return {label: pd.Series(dict(pairs)) for label, pairs in found.items()}


def draw_published_points(axes: Axes, known: dict[str, pd.Series], first: int) -> None:
    """Draw published points, in colours from the number `first` on."""
    for number, (label, series) in enumerate(known.items(), first):
        if series.index[0] is None:
            axes.axhline(series.iloc[0], color=f"C{number}", linestyle="--", linewidth=1, label=label)
        else:
            axes.plot(series.index, series, "x-", color=f"C{number}", label=label)
    axes.set_ylabel("average, %")


def draw_points(experiment: Experiment, values: pd.DataFrame, done: list[Outcome]) -> Figure:
    """Return a panel for each column: every seed a dot, the mean and its spread a bar, a row for each row of the
    table."""
    names = [" ".join(map(str, key)) for key in values[[*experiment.rows, "label"]].itertuples(index=False)]
    values = values.assign(name=names)
    order = list(dict.fromkeys(values["name"]))[::-1]
    found = {column.head: column for column in list_columns(experiment, done)}
    heads = list(dict.fromkeys(values["column"]))
    figure, panels = create_panels(len(heads), 3.2, 1.4 + 0.28 * len(order))
    for axes, head in zip(panels, heads, strict=True):
        part = values[values["column"] == head]
        draw_column(axes, part, order)
        unit = describe_axis(part, done) if found[head].field is None else get_column_unit(found[head], done)
        if unit.endswith("%"):
            widen_axis(axes)
        axes.set(title=str(head), xlabel=unit, yticks=range(len(order)), ylim=(-0.6, len(order) - 0.4))
        axes.set_yticklabels(order if axes in panels[::PANELS] else [], fontsize="small")
        axes.grid(alpha=0.3)
    figure.supxlabel(describe_spread(experiment, values), fontsize="small")
    return figure


def draw_column(axes: Axes, part: pd.DataFrame, order: list[str]) -> None:
    """Draw the values of one column, a row for each name."""
    axes.plot(part["value"], [order.index(name) for name in part["name"]], "o", markersize=4, alpha=0.6)
    scores = part.groupby("name", sort=False)["value"]
    places = [order.index(name) for name in scores.mean().index]
    axes.errorbar(scores.mean(), places, xerr=scores.std().fillna(0), fmt="|", color="black", markersize=12, capsize=2)


def get_column_unit(column: Column, done: list[Outcome]) -> str:
    """Return the unit of a score that a column names; none of what is no score."""
    return "" if column.field in FIELDS or column.field in tasks.load(done[0].settings.task.name).plain else "%"


def widen_axis(axes: Axes) -> None:
    """Show at least `LEAST` points of a score, so that small differences do not look large."""
    low, high = axes.get_xlim()
    room = max(0, MIN_AXIS_WIDTH - (high - low)) / 2
    axes.set_xlim(low - room, high + room)
