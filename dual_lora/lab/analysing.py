"""`eval.py run=... analyse=true`: ranks and entries of what a finished run did to its base weights; needs no data.

Every number stands beside that of random factors in the same place (its null, *_null), because a high rank alone says
nothing about training. Written into the run's folder: analysis.json (all), analysis.csv (without histograms) and,
as PNG and PDF, ranks, stable_ranks and, of Dual LoRA, histograms.
"""

import pandas as pd
import torch
from tabulate import tabulate

from dual_lora import analysis
from dual_lora.lab import histogram_figure, rank_figure, updates
from dual_lora.lab.runs import Record
from dual_lora.lab.settings import Settings, require
from dual_lora.lab.training import quiet
from dual_lora.lab.updates import Dual, Update
from dual_lora.tuner.factors import DualLoraFactors

# What is missing in a printed table.
MISSING = "–"
RANKS = ("rank", "stable_rank", "effective_rank")
OF_DW = ("zeros", "dead_rows", "relative_size", "signs_flipped")
ENTRIES = (*OF_DW, "cosine", "sign_agreement")


def run(settings: Settings, record: Record, other: tuple[Settings, Record] | None = None) -> str:
    """Analyse a finished run, write its files, and return what to tell the user.

    other: a second run of the same model, to whose updates this one's are compared.

    Raises:
        UserError: a run cannot be loaded or taken apart, or the two have no weight in common.
    """
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mine = updates.of_run(settings, record)
    require(bool(mine), f"run={record.shown()}: no weight of a role that model={settings.model.name} names was changed")
    theirs = {update.module: update for update in updates.of_run(*other)} if other else {}
    if other:
        common = any(update.module in theirs for update in mine)
        require(common, f"against={other[1].shown()}: changed none of the weights that this run changed")
    first, beginning = updates.beginning(settings, mine)
    rows = [row(u, theirs.get(u.module), first.get(u.module), settings, device) for u in mine]
    content = {
        "run": record.name,
        "against": other[1].name if other else None,
        "model": settings.model.name,
        "method": settings.method.name,
        "seed": settings.seed,
        "device": device,
        "null": mine[0].null,
        "null_seed": updates.NULL_SEED,
        "labels": mine[0].labels,
        "rank_tolerance": "max(out, in) * eps of float32, relative to the largest singular value",
        "update_scale": min((u.factors.update_scale.item() for u in mine if isinstance(u, Dual)), default=None),
        "beginning": beginning,
        "magnitude_edges": analysis.MAGNITUDE_EDGES,
        "direction_edges": analysis.DIRECTION_EDGES,
        "rows": rows,
    }
    record.write("analysis.json", content)
    record.write("analysis.csv", plain(rows).to_csv(index=False))
    drawn(content, record)
    return told(content, record)


def drawn(content: dict, record: Record) -> None:
    """Draw the figures of an analysis."""
    name = f"{content['model']}, {content['method']}"
    run = rank_figure.Analysed(name, content["method"], content["labels"], plain(content["rows"]))
    for kind in rank_figure.KINDS:
        rank_figure.draw([run], record.folder, kind)
    histogram_figure.draw(content, record.folder)


def row(
    update: Update, other: Update | None, first: DualLoraFactors | None, settings: Settings, device: str
) -> dict[str, object]:
    """Return what is known of one weight: where it is, and every number of dW with that of the null behind it.

    other: the other run's update of this module; first: the factors this run began with. What cannot be told without
    them is None, and so is the size of a null whose size means nothing.
    """
    W0 = update.weight().to(device)
    theirs = None if other is None else other.whole()[update.block].to(device)
    trained = update.parts(device) | numbers(update.change().to(device), W0, theirs)
    drawn, null = update.drawn(device)
    null |= numbers(drawn.to(device), W0 if update.sized else None, theirs)
    values = {key: value for name in trained for key, value in ((name, trained[name]), (f"{name}_null", null[name]))}
    return place(update, settings) | values | {"signs_flipped": first and update.flipped(first, device)}


def place(update: Update, settings: Settings) -> dict[str, object]:
    """Return what a row is about; `ranks` are the inner dimensions of the factors, r1+r2 or r."""
    out, fan_in = update.weight().shape
    role = updates.role_of(update.module, settings) + update.name.removeprefix(update.module)
    layer = updates.layer_of(update.module)
    return {"module": update.name, "layer": layer, "role": role, "out": out, "in": fan_in, "ranks": update.ranks}


def numbers(dW: torch.Tensor, W0: torch.Tensor | None, theirs: torch.Tensor | None) -> dict[str, float | None]:
    """Return the numbers of one dW: out x in, and of its likeness to another run's."""
    likeness = dict.fromkeys(("cosine", "sign_agreement")) if theirs is None else analysis.agreement(dW, theirs)
    return analysis.overall(dW, W0) | likeness


def plain(rows: list[dict]) -> pd.DataFrame:
    """Return the rows without their histograms."""
    return pd.DataFrame([{k: v for k, v in row.items() if "histogram" not in k} for row in rows])


def told(content: dict, record: Record) -> str:
    """Return medians over the layers of each role, trained | null, and what to know about them."""
    frame = plain(content["rows"])
    entries = [name for name in ENTRIES if frame[name].notna().any()]
    ranks, rest = [], []
    for (role, out, fan_in), group in frame.groupby(["role", "out", "in"], sort=False):
        where = [role, f"{out} x {fan_in}"]
        parts = content["labels"].items()
        ranks += [[*where, label, *(pair(group, f"{part}_{kind}") for kind in RANKS)] for part, label in parts]
        rest.append([*where, *(pair(group, name) for name in entries)])
    tables = [table(ranks, "role", "weight", "of", *RANKS), table(rest, "role", "weight", *entries)]
    figures = ", ".join(sorted(path.name for path in record.folder.glob("*.png")))
    files = f"analysis.json, analysis.csv, {figures} (and as PDF)"
    return "\n\n".join([*tables, "\n".join(notes(content)), f"analysed: {record.shown()}: {files}"])


def notes(content: dict) -> list[str]:
    """Return what a reader must know about the numbers, a line each."""
    beginning, scale = content["beginning"], content["update_scale"]
    found = [f"Medians over layers, trained | null. Null: {content['null']}."]
    if scale not in (None, 1.0):
        found.append(f"The ramp had reached f = {scale:g} when training ended; the null is at f = 1.")
    if beginning["rebuilt"]:
        cosine, sure = beginning["least_cosine"], beginning["least_over_chance"]
        found.append(
            "Signs flipped: since the factors that the run's seed draws; a trained factor's cosine with its draw is at "
            f"least {cosine:.2f}, {sure:.0f} standard deviations above chance."
        )
    elif scale is not None:
        found.append(f"Signs flipped: not told, {beginning['why']}.")
    if content["against"]:
        found.append(f"Cosine and sign agreement: with the dW of {content['against']}.")
    return found


def table(rows: list[list[str]], *heads: str) -> str:
    return tabulate(rows, headers=[head.replace("_", " ") for head in heads], disable_numparse=True)


def pair(group: pd.DataFrame, name: str) -> str:
    """Return the medians of a column and of its null, as far as they are there."""
    return " | ".join(shown(group[n]) for n in (name, f"{name}_null") if n in group) or MISSING


def shown(column: pd.Series) -> str:
    values = pd.to_numeric(column).dropna()
    return MISSING if values.empty else f"{values.median():.4g}"
