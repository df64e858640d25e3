"""The part of a report that tells what runs did to their weights: Figure 3 of arXiv 2512.03402 with its null."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd

from dual_lora.lab import analysing, histogram_figure, rank_figure
from dual_lora.lab.document import Block, Image, Table, Text
from dual_lora.lab.grid import Done
from dual_lora.lab.rank_figure import Analysed

ANALYSIS = "analysis.json"
RAMP = "dW as it was used, at factor {f:g} of its ramp, and so its relative size; its null is at factor 1"


def analyse(done: list[Done]) -> None:
    """Analyse every finished run that is not yet."""
    for cell in done:
        if cell.result and not (cell.record.folder / ANALYSIS).is_file():
            print(f"analysing {cell.record.name}", flush=True)
            alone = replace(cell.settings.hardware, devices=1, sharding="none")  # whatever trained it
            analysing.run(replace(cell.settings, hardware=alone), cell.record)


def blocks(done: list[Done], folder: Path) -> Iterator[Block]:
    """Yield the ranks of dW in short, the figures, and all medians, as far as runs are analysed."""
    found = contents(done)
    if not found:
        return
    runs = [analysed(name, content) for name, content in found.items()]
    yield Text("Ranks of the update", heading=True)
    yield Table(
        short(runs),
        "dW in short: median over layers of its numerical rank | its stable rank. Random: factors of the same shapes.",
    )
    for kind, name in rank_figure.KINDS.items():
        yield Image(rank_figure.draw(runs, folder, kind), f"{name.capitalize()} by layer; dashed: random factors.")
    yield Table(by_role(runs, entries), "Entries of dW: medians over layers, the run's | its null's.")
    ramps = {name: content.get("update_scale") for name, content in found.items()}
    if told := tuple(f"{name}: {RAMP.format(f=f)}" for name, f in ramps.items() if f not in (None, 1)):
        yield Text(items=told)
    yield Table(by_role(runs, ranks), "All ranks: medians over layers, the run's | its null's.")
    for number, (name, content) in enumerate(found.items()):
        if path := histogram_figure.draw(content, folder, f"histograms_{number}"):
            yield Image(path, f"{name}: the entries of both groups; dashed: random factors.")


def contents(done: list[Done]) -> dict[str, dict]:
    """Return the analyses of finished runs by label, and seed where there are several."""
    several, found = len({cell.settings.seed for cell in done}) > 1, {}
    for cell in done:
        if cell.result and (cell.record.folder / ANALYSIS).is_file():
            name = f"{cell.cell.label}, seed {cell.settings.seed}" if several else cell.cell.label
            found[name] = cell.record.read(ANALYSIS)
    return found


def analysed(name: str, content: dict) -> Analysed:
    return Analysed(name, content["method"], content["labels"], analysing.plain(content["rows"]))


def short(runs: list[Analysed]) -> pd.DataFrame:
    """Return the ranks of dW, a row for each role, a column for each run and each method's null."""
    lines = {}
    for run in runs:
        for (role, out, fan_in), group in run.rows.groupby(list(rank_figure.PLACE), sort=False):
            line = lines.setdefault((role, out, fan_in), {"role": role, "weight": f"{out} x {fan_in}"})
            for name, null in ((run.name, ""), (f"random, {run.method}", "_null")):
                line[name] = " | ".join(analysing.shown(group[f"overall_{kind}{null}"]) for kind in rank_figure.KINDS)
    return pd.DataFrame(lines.values()).fillna(analysing.MISSING)


def by_role(runs: list[Analysed], cells: Callable[[Analysed, pd.DataFrame], Iterator[dict[str, str]]]) -> pd.DataFrame:
    """Return a table of what `cells` tells of the weights of each role."""
    lines = []
    for run in runs:
        for (role, out, fan_in), group in run.rows.groupby(list(rank_figure.PLACE), sort=False):
            lines += [{"run": run.name, "role": role, "weight": f"{out} x {fan_in}", **c} for c in cells(run, group)]
    return pd.DataFrame(lines)


def ranks(run: Analysed, group: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Yield the ranks of each part of dW."""
    for part, label in run.labels.items():
        pairs = {kind.replace("_", " "): analysing.pair(group, f"{part}_{kind}") for kind in analysing.RANKS}
        yield {"of": label, **pairs}


def entries(_: Analysed, group: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Yield zeros, dead rows, size beside the weight's, and flipped signs of dW."""
    yield {name.replace("_", " "): analysing.pair(group, name) for name in analysing.OF_DW}
