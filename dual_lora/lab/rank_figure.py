"""The rank of each part of dW by layer beside its null, a panel for each role: Figure 3 of arXiv 2512.03402."""

from pathlib import Path

import pandas as pd
import yaml
from matplotlib.figure import Figure

from dual_lora import analysis

PUBLISHED = Path(analysis.__file__).parent / "figure_3.yaml"
# Else the files would hold the time they were made at, and matplotlib's version.
METADATA = {"png": {"Software": None}, "pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


def draw(rows: pd.DataFrame, labels: dict[str, str], folder: Path, title: str) -> None:
    """Write ranks.png and ranks.pdf: a line for each part of `labels`, its null dashed in the same colour. The
    published points are drawn in where matrices have their shape, and nowhere else."""
    groups = list(rows.groupby(["role", "out", "in"], sort=False))
    figure = Figure(figsize=(1.2 + 3.6 * len(groups), 3.8), layout="constrained")
    published = yaml.safe_load(PUBLISHED.read_text())
    for axes, (key, group) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        panel(axes, key, group.sort_values("layer", kind="stable"), labels, published)
    figure.axes[0].set_ylabel("numerical rank")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(len(lines), 7), fontsize="small")
    figure.suptitle(title)
    for kind, metadata in METADATA.items():
        figure.savefig(folder / f"ranks.{kind}", dpi=150, metadata=metadata)


def panel(axes, key: tuple[str, int, int], group: pd.DataFrame, labels: dict[str, str], published: dict) -> None:
    """Draw one role. key: its name, out and in."""
    role, *shape = key
    for number, (part, label) in enumerate(labels.items()):
        colour = f"C{number}"
        axes.plot(group["layer"], group[f"{part}_rank"], ".-", color=colour, label=label)
        axes.plot(group["layer"], group[f"{part}_rank_null"], "--", color=colour, label=f"{label}, random")
        points = published["parts"].get(part) if shape == published["shape"] else None
        if points:
            axes.plot(*zip(*points.items(), strict=True), "x", color=colour, label=f"{label}, {published['title']}")
    full = min(shape)
    axes.axhline(full, color="gray", linewidth=0.8, linestyle=":", label="full rank")
    lowest = min(min(line.get_ydata()) for line in axes.get_lines())
    room = max(full - lowest, full / 20) / 10
    axes.set(title=f"{role}, {shape[0]} x {shape[1]}", xlabel="layer", ylim=(lowest - room, full + room))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
