"""The rank of each part of dW by layer, of one run or several, next to that of random factors and published ones:
Figure 3 of arXiv 2512.03402. A row of panels for each part, a column for each role; numerical ranks as shares of the
full rank, so that weights of other shapes can share a panel."""

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dual_lora import paper
from dual_lora.lab.present.analysis_tables import drop_histograms
from dual_lora.lab.present.drawing import save_figure, use_style

RANK_TITLES = {"rank": "numerical rank / full rank", "stable_rank": "stable rank"}
# The published figure and our null of it, both of weights of 4096 x 4096, and what the second calls the parts of dW.
PUBLISHED_TABLE, NULL_TABLE, FULL_RANK = "dual_lora_fig3_rank_per_layer", "own_rank_null", 4096
PARTS = {"magnitude": "ReLU(BA)", "direction": "Sign(DC)", "overall": "ReLU(BA) * Sign(DC)"}
PLACE_COLUMNS = ("role", "out", "in")
WeightPlace = tuple[str, int, int]


@dataclass(frozen=True)
class AnalysedRun:
    """An analysed run: its name, its method, the labels of the parts of dW, and one row a weight."""

    name: str
    method: str
    labels: dict[str, str]
    rows: pd.DataFrame

    @classmethod
    def from_content(cls, name: str, content: dict) -> "AnalysedRun":
        """Return the run of an analysis file's content."""
        return cls(name, content["method"], content["labels"], drop_histograms(content["rows"]))

    def select_rows(self, place: WeightPlace) -> pd.DataFrame:
        """Return the rows of a role by layer. place: its name, out and in."""
        here = (self.rows[list(PLACE_COLUMNS)] == list(place)).all(axis=1)
        return self.rows[here].sort_values("layer", kind="stable")


@use_style()
def draw_ranks(runs: list[AnalysedRun], folder: Path, kind: str = "rank") -> Path:
    """Write ranks.png and ranks.pdf, or stable_ranks, and return the first."""
    parts = max((run.labels for run in runs), key=len)
    places = list(dict.fromkeys(place for run in runs for place in zip(*map(run.rows.get, PLACE_COLUMNS), strict=True)))
    figure = Figure(figsize=(1.2 + 2.6 * len(places), 1.2 + 2.1 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), len(places), squeeze=False, sharex=True, sharey="row")
    for row, (part, label) in zip(panels, parts.items(), strict=True):
        for axes, place in zip(row, places, strict=True):
            draw_own_ranks(axes, runs, part, kind, place)
            if kind == "rank" and any(set(PARTS) <= set(run.labels) for run in runs):
                draw_published_ranks(axes, part)
        row[0].set_ylim(0, 1.05 if kind == "rank" else None)
        row[0].set_ylabel(label)
    for place, top, bottom in zip(places, panels[0], panels[-1], strict=True):
        top.set_title("{}, {} x {}".format(*place))
        bottom.set_xlabel("layer")
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(len(lines), 4), fontsize="small")
    figure.suptitle(RANK_TITLES[kind])
    return save_figure(figure, folder, f"{kind}s")[0]


def draw_own_ranks(axes: Axes, runs: list[AnalysedRun], part: str, kind: str, place: WeightPlace) -> None:
    """Draw one line per run, and one per distinct null in its method's shade of gray."""
    nulls, grays = {}, dict(zip(dict.fromkeys(run.method for run in runs), ("black", "gray", "silver"), strict=False))
    for number, run in enumerate(runs):
        rows, scale = run.select_rows(place), min(place[1:]) if kind == "rank" else 1
        if part in run.labels and len(rows):
            axes.plot(rows["layer"], rows[f"{part}_{kind}"] / scale, ".-", color=f"C{number}", label=run.name)
            null = rows[f"{part}_{kind}_null"] / scale
            nulls.setdefault(tuple(null), (rows["layer"], null, run.method))
    for layers, null, method in nulls.values():
        color = grays.get(method, "silver")
        axes.plot(layers, null, "--", color=color, linewidth=1, label=f"random factors, {method}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def draw_published_ranks(axes: Axes, part: str) -> None:
    """Draw the published points of a part of dW, LoRA's next to those of the full dW, and our null of their shape."""
    name = f"LLaMA2-7B, {FULL_RANK} x {FULL_RANK}"
    columns = paper.load_table(PUBLISHED_TABLE).columns
    others = [series for series in columns if series not in PARTS] if part == "overall" else []
    for series, color in zip((part, *others), ("C6", "C8"), strict=False):
        layers, usual = read_published_ranks(series)
        label = f"published{'' if series == part else f', {columns[series]}'}: {name} (digitized)"
        axes.plot(layers.keys() or [0, 31], layers.values() or 2 * [usual[0]], "x", color=color, label=label)
        axes.axhspan(*usual, color=color, alpha=0.3, linewidth=0)
    for (r1, share), style in zip(read_null_ranks(part).items(), (":", "-."), strict=True):
        label = f"random factors, {FULL_RANK} x {FULL_RANK}, r1 = r2 = {r1} (own)"
        axes.axhline(share, color="C9", linestyle=style, linewidth=1, label=label)


def read_published_ranks(series: str) -> tuple[dict[int, float], tuple[float, float]]:
    """Return the published ranks as shares of the full rank: by layer, as far as they can be told apart, and between
    which the rest lies."""
    values = {
        row.keys["layer"]: row.values[series] for row in paper.load_table(PUBLISHED_TABLE).rows if series in row.values
    }
    usual = [int(number) / FULL_RANK for number in re.findall(r"\d+", values["middle"].text)]
    layers = {layer: value.number / FULL_RANK for layer, value in values.items() if isinstance(layer, int)}
    return layers, (usual[0], usual[-1])


def read_null_ranks(part: str) -> dict[int, float]:
    """Return the ranks of random factors at the published shape, as shares of the full rank, by r1 = r2."""
    rows = paper.load_table(NULL_TABLE).select_rows(part=PARTS[part])
    return {row.keys["r1"]: row.values["rank"].number / FULL_RANK for row in rows}
