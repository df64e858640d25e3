"""Scores by learning rate: a dot for each method and rate, its colour the score, the chosen one ringed."""

from math import inf, isfinite, nan

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dual_lora.lab.report.figures.layout import MAX_PANELS, create_panels
from dual_lora.lab.report.values import DECIMALS, format_value, get_place, get_score, get_unit
from dual_lora.lab.study.experiment import Experiment
from dual_lora.lab.study.outcome import Outcome, load_task_of, read_failure_or_empty

RATE_SETTING = "train.lr"


def collect_rates(experiment: Experiment, outcomes: list[Outcome]) -> pd.DataFrame:
    """Return a row for each place, label and rate: its mean score in points, with how many decimals it is printed,
    whether lower is better, and whether it was chosen.

    From the trials that chose rates, else from the runs of an experiment whose columns are rates. A rate with which
    training diverged has no score; one whose trials are not all finished has no row.
    """
    lines = []
    for outcome in outcomes:
        where = {key: value for key, value in get_place(experiment, outcome).items() if key != RATE_SETTING}
        names = dict.fromkeys([outcome.settings.task.name, *map(format_value, where.values())])
        task = load_task_of(outcome)
        line = {"place": ", ".join(names), "label": outcome.label, "lower": task.is_lower_better()}
        unit = get_unit(task, task.metric)
        line["decimals"] = DECIMALS[unit]
        lines += [line | {"rate": r, "score": score * unit, "chosen": r == outcome.rate} for r, score in outcome.trials]
        if experiment.columns == RATE_SETTING:
            diverged = read_failure_or_empty(outcome.record).get("diverged")
            score = get_score(task, outcome.result) if outcome.result else -inf if diverged else nan
            lines.append(line | {"rate": outcome.rate, "score": score, "chosen": False})
    columns = ["place", "label", "rate", "score", "lower", "decimals", "chosen"]
    frame = pd.DataFrame(lines, columns=columns).dropna(subset="score")
    groups = frame.groupby(["place", "label", "rate", "lower", "decimals"], sort=False)
    found = groups.agg(score=("score", "mean"), chosen=("chosen", "any")).reset_index()  # one -inf makes it -inf
    return found.assign(score=found["score"].where(found["score"].map(isfinite)))


def draw_rates(frame: pd.DataFrame) -> Figure | None:
    """Return a panel for each place of `collect_rates`, at most nine; None where no rate has a score."""
    places = list(dict.fromkeys(frame.dropna(subset="score")["place"]))[:MAX_PANELS]
    if not places:
        return None
    labels = list(dict.fromkeys(frame["label"]))
    figure, panels = create_panels(len(places), 0.8 + 0.3 * len(labels), columns=min(2, len(places)))
    for axes, place in zip(panels, places, strict=True):
        draw_rate_panel(axes, frame[frame["place"] == place], labels)
        axes.set_title(place)
    return figure


def draw_rate_panel(axes: Axes, part: pd.DataFrame, labels: list[str]) -> None:
    """Draw one place: the lighter a dot, the better its score; what diverged is a cross."""
    known, lost = part.dropna(subset="score"), part[part["score"].isna()]
    heights = known["label"].map(labels.index)
    merit = np.where(known["lower"], -known["score"], known["score"])
    norm = Normalize(merit.min() - 1e-9, merit.max() + 1e-9)
    edges = np.where(known["chosen"], "black", "none")
    axes.scatter(known["rate"], heights, c=merit, cmap="cividis", norm=norm, s=150, edgecolors=edges, linewidths=2)
    for row, height, light in zip(known.itertuples(), heights, norm(merit), strict=True):
        color = "black" if light > 0.5 else "white"
        text = f"{row.score:.{row.decimals}f}"
        axes.annotate(text, (row.rate, height), ha="center", va="center", fontsize=5, color=color)
    axes.plot(lost["rate"], lost["label"].map(labels.index), "x", color="#D55E00", markersize=6)
    axes.set(xscale="log", xlabel="learning rate", yticks=range(len(labels)), ylim=(len(labels) - 0.4, -0.6))
    axes.set_yticklabels(labels)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.12)
