"""The rank of each part of dW by layer beside its null, a panel for each role: Figure 3 of arXiv 2512.03402."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dual_lora import paper

PUBLISHED, PUBLISHED_SHAPE = "dual_lora_fig3_rank_per_layer", [4096, 4096]
# Else the files would hold the time they were made at, and matplotlib's version.
METADATA = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


def draw(rows: pd.DataFrame, labels: dict[str, str], folder: Path, title: str, name: str = "ranks") -> None:
    """Write NAME.png and NAME.pdf: a line for each part of `labels`, its null dashed in the same colour; numerical
    ranks above, stable ranks, which tell more, below. The published points are drawn in where matrices have their
    shape, and nowhere else."""
    groups = list(rows.groupby(["role", "out", "in"], sort=False))
    figure = Figure(figsize=(1.2 + 3.6 * len(groups), 6.4), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharex=True)
    for column, (key, group) in enumerate(groups):
        group = group.sort_values("layer", kind="stable")
        numerical(axes[0, column], key, group, labels)
        lines(axes[1, column], group, labels, "stable_rank")
        axes[1, column].set(ylim=(0, None), xlabel="layer")
    axes[0, 0].set_ylabel("numerical rank")
    axes[1, 0].set_ylabel("stable rank")
    known = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(known.values(), known, loc="outside lower center", ncols=min(len(known), 7), fontsize="small")
    figure.suptitle(title)
    for kind, metadata in METADATA.items():
        figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata=metadata)


def published(part: str) -> dict[int, float]:
    """Return the published ranks of a part of dW by layer, those that could be read off the figure."""
    table = paper.load(PUBLISHED)
    known = {row.keys["layer"]: row.values[part] for row in table.rows if part in row.values}
    return {layer: value.number for layer, value in known.items() if isinstance(layer, int)}


def lines(axes: Axes, group: pd.DataFrame, labels: dict[str, str], kind: str) -> None:
    for number, (part, label) in enumerate(labels.items()):
        axes.plot(group["layer"], group[f"{part}_{kind}"], ".-", color=f"C{number}", label=label)
        axes.plot(group["layer"], group[f"{part}_{kind}_null"], "--", color=f"C{number}", label=f"{label}, random")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def numerical(axes: Axes, key: tuple[str, int, int], group: pd.DataFrame, labels: dict[str, str]) -> None:
    """Draw the numerical ranks of one role. key: its name, out and in."""
    role, *shape = key
    lines(axes, group, labels, "rank")
    for number, (part, label) in enumerate(labels.items()):
        points = published(part) if "magnitude" in labels and shape == PUBLISHED_SHAPE else {}
        if points:
            name = f"{label}, published, LLaMA2-7B (digitized)"
            axes.plot(points.keys(), points.values(), "x", color=f"C{number}", label=name)
    full = min(shape)
    axes.axhline(full, color="gray", linewidth=0.8, linestyle=":", label="full rank")
    lowest = min(min(line.get_ydata()) for line in axes.get_lines())
    room = max(full - lowest, full / 20) / 10
    axes.set(title=f"{role}, {shape[0]} x {shape[1]}", ylim=(lowest - room, full + room))
