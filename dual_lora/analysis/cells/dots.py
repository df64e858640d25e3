"""Dot figures: a panel for each case, a line for each method, a mean with its t-interval and the dots of its seeds."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Okabe and Ito's colours, which colour-blind readers can tell apart: ours stands out, all other methods are grey.
PLAIN, OURS = "#56606B", "#D55E00"
WIDTH = 3.5  # inches, a column of a paper
LINE = 0.145  # inches, the height of a method's line


@dataclass(frozen=True)
class Panel:
    """title, and for each method's label its mean, low, high and values (by seed)."""

    title: str
    values: Mapping[str, Mapping]


def draw_dots(panels: Sequence[Panel], labels: Sequence[str], unit: str, path: Path, across: int) -> None:
    """Write a PNG with `across` panels side by side, all over one axis from 0; labels that start with "Dual" stand out.

    The same values give the same bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    down = -(-len(panels) // across)
    height = down * (len(labels) * LINE + 0.28) + 0.45
    style = {"font.size": 7, "axes.linewidth": 0.5, "axes.titlesize": 7, "axes.labelsize": 7}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel, labels)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        top = max(1.0, *(v for panel in panels for line in panel.values.values() for v in line["values"]))
        grid[0, 0].set(xlim=(-0.04 * top, 1.04 * top), ylim=(len(labels) - 0.5, -0.5), xticks=(0, 0.5, 1))
        grid[0, 0].set_yticks(range(len(labels)), labels)
        figure.supxlabel(f"{unit}\nmean, 95 % t-interval over seeds; small dots: the seeds", fontsize=7)
        figure.savefig(path, dpi=200, metadata={"Software": None})


def _draw_panel(axes, panel: Panel, labels: Sequence[str]) -> None:
    wrapped = textwrap.fill(panel.title.replace(".", ". "), 18).replace(". ", ".")  # names of modules are long
    axes.set_title(wrapped, pad=2)
    axes.tick_params(length=2, width=0.5, pad=1.5)
    axes.grid(axis="x", linewidth=0.3, color="#DDDDDD")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for y, label in enumerate(labels):
        line = panel.values.get(label)
        if line is None:
            continue
        color = OURS if label.startswith("Dual") else PLAIN
        axes.plot(line["values"], [y + 0.22] * len(line["values"]), ".", color=color, markersize=1.8, alpha=0.6)
        if line["low"] is not None:
            axes.plot([line["low"], line["high"]], [y - 0.1] * 2, "-", color=color, linewidth=1.2)
        axes.plot(line["mean"], y - 0.1, "o", color=color, markersize=2.8)
