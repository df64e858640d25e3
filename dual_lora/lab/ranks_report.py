"""The part of a report that tells what runs did to their weights: Figure 3 of arXiv 2512.03402 with its null."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dual_lora.lab import analysing, rank_figure
from dual_lora.lab.document import Block, Image, Table, Text
from dual_lora.lab.grid import Done

ANALYSIS = "analysis.json"


def analyse(done: list[Done]) -> None:
    """Analyse every finished run that is not yet."""
    for cell in done:
        if cell.result and not (cell.record.folder / ANALYSIS).is_file():
            print(f"analysing {cell.record.name}", flush=True)
            analysing.run(cell.settings, cell.record)


def blocks(done: list[Done], folder: Path) -> Iterator[Block]:
    """Yield a table of medians over layers, value beside null, and a figure for each analysed run."""
    found = {f"{c.cell.label}, seed {c.settings.seed}": read(c) for c in done if c.result}
    found = {name: content for name, content in found.items() if content}
    if not found:
        return
    yield Text("Ranks of the update", heading=True)
    lines = [line for name, content in found.items() for line in medians(name, content)]
    yield Table(pd.DataFrame(lines), "Medians over layers, the run's | its null's (random factors of the same shapes).")
    for number, (name, content) in enumerate(found.items()):
        stem = f"ranks_{number}"
        rank_figure.draw(analysing.plain(content["rows"]), content["labels"], folder, name, stem)
        yield Image(folder / f"{stem}.png", f"{name}: numerical and stable ranks by layer; dashed: random factors.")


def read(cell: Done) -> dict | None:
    path = cell.record.folder / ANALYSIS
    return cell.record.read(ANALYSIS) if path.is_file() else None


def medians(name: str, content: dict) -> Iterator[dict[str, str]]:
    """Yield the ranks of each part of dW for each role."""
    frame = analysing.plain(content["rows"])
    for (role, out, fan_in), group in frame.groupby(["role", "out", "in"], sort=False):
        for part, label in content["labels"].items():
            ranks = {kind.replace("_", " "): analysing.pair(group, f"{part}_{kind}") for kind in analysing.RANKS}
            yield {"run": name, "role": role, "weight": f"{out} x {fan_in}", "of": label, **ranks}
