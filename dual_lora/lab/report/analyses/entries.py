"""The entries of both groups layer by layer, below what is said of the ranks."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dual_lora.lab.present.analysis_tables import format_median
from dual_lora.lab.present.document import MISSING, Block, Image, Table, Text
from dual_lora.lab.present.histogram_figure import draw_histograms
from dual_lora.lab.report.analyses.ranks import iterate_rank_blocks, read_analyses
from dual_lora.lab.report.comparison.floors import Floor
from dual_lora.lab.study.outcome import Outcome


def iterate_entry_blocks(outcomes: list[Outcome], folder: Path, floors: list[Floor]) -> Iterator[Block]:
    """Yield what `iterate_rank_blocks` does, and then entries and histograms by layer."""
    yield from iterate_rank_blocks(outcomes, folder, floors)
    found = read_analyses(outcomes)
    yield Text("Entries by layer", heading=True)
    yield Table(
        tabulate_layers(found),
        "By layer: median over its weights of the share of exact zeros in dW | dead rows, their sum | median share of "
        "signs that flipped since the start.",
    )
    for number, (name, content) in enumerate(found.items()):
        if path := draw_histograms(content, folder, f"layers_{number}", "layer"):
            yield Image(path, f"{name}: the entries of both groups by layer; dashed: random factors.")


def tabulate_layers(found: dict[str, dict]) -> pd.DataFrame:
    """Return a row for each layer, a column for each run."""
    lines: dict[int, dict[str, str]] = {}
    for name, content in found.items():
        for layer, group in pd.DataFrame(content["rows"]).groupby("layer", sort=True):
            parts = format_median(group["zeros"]), f"{group['dead_rows'].sum()}", format_median(group["signs_flipped"])
            lines.setdefault(layer, {"layer": str(layer)})[name] = " | ".join(parts)
    return pd.DataFrame([lines[layer] for layer in sorted(lines)]).fillna(MISSING)
