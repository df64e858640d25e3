"""Histograms of the entries of ReLU(BA) and DC, trained and random: one line a role or a layer, in bins of half a
decade."""

import math
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dual_lora.lab.present.drawing import save_figure, use_style

PART_TITLES = {"magnitude": "{}, before its scale", "direction": "D C, before its sign"}


@use_style()
def draw_histograms(content: dict, folder: Path, name: str = "histograms", by: str = "role") -> Path | None:
    """Write NAME.png and NAME.pdf of an analysis, and return the PNG; None if the analysis holds no histograms.

    by: what a line sums over, "role" or "layer".
    """
    rows = pd.DataFrame(content["rows"])
    if "magnitude_histogram" not in rows:
        return None
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (part, words) in zip(figure.subplots(1, 2), PART_TITLES.items(), strict=True):
        for number, (line, group) in enumerate(rows.groupby(by, sort=False)):
            for column, style in ((f"{part}_histogram", "-"), (f"{part}_histogram_null", "--")):
                counts = pd.DataFrame(group[column].tolist()).sum()
                name_of_line = line if by == "role" else f"{by} {line}"
                label = f"{name_of_line}{', random' if style == '--' else ''}"
                axes.plot(100 * counts / counts.sum(), style, color=f"C{number}", drawstyle="steps-mid", label=label)
        set_bin_ticks(axes, content[f"{part}_edges"])
        axes.set(title=words.format(content["labels"][part]), ylabel="entries, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return save_figure(figure, folder, name)[0]


def set_bin_ticks(axes: Axes, edges: list[float]) -> None:
    """Mark 0 and every second decade. Bin i ends at edge i."""
    marked = [i for i, edge in enumerate(edges) if edge == 0 or round(2 * math.log10(abs(edge))) % 4 == 0]
    axes.set_xticks([i + 0.5 for i in marked], [f"{edges[i]:g}" for i in marked], rotation=90)
    axes.grid(alpha=0.3)
