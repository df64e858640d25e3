"""What runs did to their weights, as part of a report: Figure 3 of arXiv 2512.03402 next to its null."""

from collections.abc import Callable, Iterator
from itertools import compress
from pathlib import Path

import pandas as pd

from dual_lora.lab.present.analysis_tables import (
    RANK_KINDS,
    UPDATE_ENTRIES,
    format_median,
    format_with_null,
)
from dual_lora.lab.present.document import MISSING, Block, Image, Table, Text
from dual_lora.lab.present.histogram_figure import draw_histograms
from dual_lora.lab.present.rank_figure import PLACE_COLUMNS, RANK_TITLES, AnalysedRun, draw_ranks
from dual_lora.lab.record.record import ANALYSIS_FILE
from dual_lora.lab.report.comparison.floors import Floor
from dual_lora.lab.study.outcome import Outcome

RAMP = "dW as it was used, at factor {f:g} of its ramp, and so its relative size; its null is at factor 1"


def iterate_rank_blocks(outcomes: list[Outcome], folder: Path, floors: list[Floor]) -> Iterator[Block]:
    """Yield the ranks of dW of analysed runs in short, the figures, and all medians. floors: not used."""
    found = read_analyses(outcomes)
    runs = [AnalysedRun.from_content(name, content) for name, content in found.items()]
    yield Text("Ranks of the update", heading=True)
    yield Table(
        tabulate_update_ranks(runs),
        "dW in short: median over layers of its numerical rank | its stable rank. Random: factors of the same shapes.",
    )
    for kind, name in RANK_TITLES.items():
        yield Image(draw_ranks(runs, folder, kind), f"{name.capitalize()} by layer; dashed: random factors.")
    yield Table(tabulate_by_role(runs, iterate_entries), "Entries of dW: medians over layers, the run's | its null's.")
    ramps = {name: content.get("update_scale") for name, content in found.items()}
    if partial := tuple(f"{name}: {RAMP.format(f=f)}" for name, f in ramps.items() if f not in (None, 1)):
        yield Text(items=partial)
    yield Table(tabulate_by_role(runs, iterate_ranks), "All ranks: medians over layers, the run's | its null's.")
    for number, (name, content) in enumerate(found.items()):
        if path := draw_histograms(content, folder, f"histograms_{number}"):
            yield Image(path, f"{name}: the entries of both groups; dashed: random factors.")


def read_analyses(outcomes: list[Outcome]) -> dict[str, dict]:
    """Return the analyses of runs by label, and by model, task and seed where there are several; runs that differ in
    another setting have the name of their record, too."""
    places = [(c.settings.model.name, c.settings.task.name, f"seed {c.settings.seed}") for c in outcomes]
    several = [len(set(values)) > 1 for values in zip(*places, strict=True)]
    names = [", ".join([c.label, *compress(place, several)]) for c, place in zip(outcomes, places, strict=True)]
    found = {}
    for name, outcome in zip(names, outcomes, strict=True):
        unique = name if names.count(name) == 1 else f"{name}, {outcome.record.name}"
        found[unique] = outcome.record.read_sealed(ANALYSIS_FILE)
    return found


def tabulate_update_ranks(runs: list[AnalysedRun]) -> pd.DataFrame:
    """Return the ranks of dW, a row for each role, a column for each run and each method's null."""
    lines = {}
    for run in runs:
        for (role, out, fan_in), group in run.rows.groupby(list(PLACE_COLUMNS), sort=False):
            line = lines.setdefault((role, out, fan_in), {"role": role, "weight": f"{out} x {fan_in}"})
            for name, null in ((run.name, ""), (f"random, {run.method}", "_null")):
                line[name] = " | ".join(format_median(group[f"overall_{kind}{null}"]) for kind in RANK_TITLES)
    return pd.DataFrame(lines.values()).fillna(MISSING)


def tabulate_by_role(
    runs: list[AnalysedRun], cells: Callable[[AnalysedRun, pd.DataFrame], Iterator[dict[str, str]]]
) -> pd.DataFrame:
    """Return a table of what `cells` gives for the weights of each role."""
    lines = []
    for run in runs:
        for (role, out, fan_in), group in run.rows.groupby(list(PLACE_COLUMNS), sort=False):
            lines += [{"run": run.name, "role": role, "weight": f"{out} x {fan_in}", **c} for c in cells(run, group)]
    return pd.DataFrame(lines)


def iterate_ranks(run: AnalysedRun, group: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Yield the ranks of each part of dW."""
    for part, label in run.labels.items():
        pairs = {kind.replace("_", " "): format_with_null(group, f"{part}_{kind}") for kind in RANK_KINDS}
        yield {"of": label, **pairs}


def iterate_entries(_: AnalysedRun, group: pd.DataFrame) -> Iterator[dict[str, str]]:
    """Yield zeros, dead rows, size relative to the weight's, and flipped signs of dW."""
    yield {name.replace("_", " "): format_with_null(group, name) for name in UPDATE_ENTRIES}
