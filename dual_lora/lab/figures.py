"""Figures of a report, as PNG and PDF; the same frame gives the same bytes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dual_lora import paper
from dual_lora.lab.experiments import Experiment
from dual_lora.lab.rank_figure import METADATA
from dual_lora.lab.results import heading

PANELS = 3  # side by side


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf and return them."""
    paths = [folder / f"{name}.{kind}" for kind in METADATA]
    for path, metadata in zip(paths, METADATA.values(), strict=True):
        figure.savefig(path, dpi=150, metadata=metadata)
    return paths


def grid(number: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure and its first `number` panels."""
    wide = min(number, PANELS)
    figure = Figure(figsize=(width * wide, height * -(-number // wide)), layout="constrained")
    panels = list(figure.subplots(-(-number // wide), wide, squeeze=False).flat)
    for spare in panels[number:]:
        spare.set_visible(False)
    return figure, panels[:number]


def draw(experiment: Experiment, values: pd.DataFrame) -> Figure | None:
    """Return the figure of an experiment: lines over a numeric setting, else a panel of points for each column; None
    while there is nothing to draw."""
    values = values.dropna(subset="value")
    if values.empty:
        return None
    numbers = pd.to_numeric(values["column"], errors="coerce")
    if isinstance(experiment.columns, str) and numbers.notna().any():
        return lines(experiment, values.assign(column=numbers))
    return points(experiment, values)


def lines(experiment: Experiment, values: pd.DataFrame) -> Figure:
    """Return a panel for each combination of the rows' settings, a line for each label; what has no value of the
    columns' setting is a horizontal line. Published points have a panel of their own: other models, another task."""
    groups = list(values.groupby(experiment.rows, sort=False)) if experiment.rows else [((), values)]
    known = published_points(experiment)
    figure, panels = grid(len(groups) + bool(known), 4.2, 3.4)
    labels = list(dict.fromkeys(values["label"]))
    for axes, (key, group) in zip(panels, groups, strict=False):
        for label, part in group.groupby("label", sort=False):
            line(axes, part, label, f"C{labels.index(label)}")
        axes.set(title=", ".join(map(str, key)) or experiment.title, ylabel="score")
    if known:
        published_panel(panels[-1], known)
    logarithmic = values["column"].max() > 20 * values["column"].min() > 0 and values["column"].max() > 1
    for axes in panels:
        axes.set(xlabel=heading(experiment.columns).replace("_", " "), xscale="log" if logarithmic else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def line(axes: Axes, part: pd.DataFrame, label: str, color: str) -> None:
    """Draw one label's means over seeds; bars are sample standard deviations."""
    flat = part[part["column"].isna()]["value"]
    if len(flat):
        axes.axhline(flat.mean(), color=color, linestyle="--", linewidth=1, label=label)
        if len(flat) > 1:
            axes.axhspan(flat.mean() - flat.std(), flat.mean() + flat.std(), color=color, alpha=0.08)
    scores = part.dropna(subset="column").groupby("column")["value"]
    mean, spread = scores.mean(), scores.std().fillna(0)
    if len(mean):
        axes.errorbar(mean.index, mean, yerr=spread, marker="o", markersize=4, capsize=3, color=color, label=label)


def published_points(experiment: Experiment) -> dict[str, pd.Series]:
    """Return the published points by label, for an experiment over a setting that a published table has as a key."""
    key, found = heading(experiment.columns), {}
    for table in map(paper.load, experiment.published):
        for row in table.rows if key in table.keys and "avg" in table.columns else ():
            value = row.values.get("avg")
            if value and value.number:
                extra = f" {row.keys['rank']}" if row.keys[key] is None else ""
                label = f"{row.keys['model']} {row.keys['method']}{extra} [{value.status}]"
                found.setdefault(label, []).append((row.keys[key], value.number))
    return {label: pd.Series(dict(pairs)) for label, pairs in found.items()}


def published_panel(axes: Axes, known: dict[str, pd.Series]) -> None:
    for number, (label, series) in enumerate(known.items()):
        if series.index[0] is None:
            axes.axhline(series.iloc[0], color=f"C{number}", linestyle="--", linewidth=1, label=label)
        else:
            axes.plot(series.index, series, "x-", color=f"C{number}", label=label)
    axes.set(title="published, other models and tasks", ylabel="average, %")


def points(experiment: Experiment, values: pd.DataFrame) -> Figure:
    """Return a panel for each column: every seed a dot, the mean a bar, a row for each row of the table."""
    heads = list(dict.fromkeys(values["column"]))
    names = [" ".join(map(str, key)) for key in values[[*experiment.rows, "label"]].itertuples(index=False)]
    values = values.assign(name=names)
    order = list(dict.fromkeys(values["name"]))[::-1]
    figure, panels = grid(len(heads), 3.2, 1.2 + 0.28 * len(order))
    for axes, head in zip(panels, heads, strict=True):
        part = values[values["column"] == head]
        places = [order.index(name) for name in part["name"]]
        axes.plot(part["value"], places, "o", markersize=4, alpha=0.6)
        mean = part.groupby("name", sort=False)["value"].mean()
        axes.plot(mean, [order.index(name) for name in mean.index], "|", color="black", markersize=12)
        axes.set(title=str(head), yticks=range(len(order)), ylim=(-0.6, len(order) - 0.4))
        axes.set_yticklabels(order if axes is panels[0] else [], fontsize="small")
        axes.grid(alpha=0.3)
    return figure
