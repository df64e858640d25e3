"""`eval.py run=... analyse=true`: ranks and entries of the changes a finished run made to its base weights. Needs no
data.

Every number is reported next to that of random factors of the same shape (its null, *_null), because a high rank by
itself says nothing about training. These files are written into the run's folder: analysis.json (everything),
analysis.csv (without histograms), and as PNG and PDF ranks, stable_ranks and, for Dual LoRA, histograms.
"""

import torch
from tabulate import tabulate

from dual_lora import analysis
from dual_lora.lab.config.schema import Settings
from dual_lora.lab.errors import require
from dual_lora.lab.present.analysis_tables import RANK_KINDS, UPDATE_ENTRIES, drop_histograms, format_with_null
from dual_lora.lab.present.histogram_figure import draw_histograms
from dual_lora.lab.present.rank_figure import RANK_TITLES, AnalysedRun, draw_ranks
from dual_lora.lab.record.record import ANALYSIS_FILE, Record
from dual_lora.lab.system.libraries import silence_libraries
from dual_lora.lab.weights.updates import (
    NULL_SEED,
    DualLoraUpdate,
    Update,
    check_changed,
    find_layer_number,
    find_role,
    load_updates,
    rebuild_initial_factors,
)
from dual_lora.tuner.factors import DualLoraFactors

ENTRIES = (*UPDATE_ENTRIES, "cosine", "sign_agreement")


def analyse_run(settings: Settings, record: Record, other: tuple[Settings, Record] | None = None) -> str:
    """Analyse a finished run, write the analysis into its folder, and return the text to print.

    other: a second run of the same model, whose updates are compared with this one's.

    Raises:
        UserError: a run cannot be loaded, its dW is not known, or the two changed no weight in common.
    """
    silence_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digests = {other[1].name: other[1].read_digest()} if other else {}
    mine = load_updates(settings, record)
    check_changed(mine, settings, record)
    theirs = {update.module: update for update in load_updates(*other)} if other else {}
    if other:
        shares_weights = any(update.module in theirs for update in mine)
        require(shares_weights, f"against={other[1].format_path()}: changed none of the weights that this run changed")
    initial_factors, initial_match = rebuild_initial_factors(settings, mine)
    rows = [describe_update(u, theirs.get(u.module), initial_factors.get(u.module), settings, device) for u in mine]
    content = {
        "run": record.name,
        "against": other[1].name if other else None,
        "digests": digests,
        "model": settings.model.name,
        "method": settings.method.name,
        "seed": settings.seed,
        "device": device,
        "null": mine[0].null,
        "null_seed": NULL_SEED,
        "labels": mine[0].labels,
        "rank_tolerance": "max(out, in) * eps of float32, relative to the largest singular value",
        "update_scale": min(
            (u.factors.update_scale.item() for u in mine if isinstance(u, DualLoraUpdate)), default=None
        ),
        "beginning": initial_match,
        "magnitude_edges": analysis.MAGNITUDE_EDGES,
        "direction_edges": analysis.DIRECTION_EDGES,
        "rows": rows,
    }
    record.write_sealed(ANALYSIS_FILE, content)
    record.write_file("analysis.csv", drop_histograms(rows).to_csv(index=False))
    draw_analysis(content, record)
    return format_analysis(content, record)


def draw_analysis(content: dict, record: Record) -> None:
    """Draw the figures of an analysis."""
    name = f"{content['model']}, {content['method']}"
    run = AnalysedRun.from_content(name, content)
    for kind in RANK_TITLES:
        draw_ranks([run], record.folder, kind)
    draw_histograms(content, record.folder)


def describe_update(
    update: Update, other: Update | None, initial_factors: DualLoraFactors | None, settings: Settings, device: str
) -> dict[str, object]:
    """Return the row of one weight: where it is, and every number for dW, each followed by that of its null.

    other: the other run's update of this module. initial_factors: those this run began with. Numbers that need one of
    these are None if it is missing; so is the relative size of a null whose scale is arbitrary
    (`Update.size_is_meaningful`).
    """
    W0 = update.get_weight().to(device)
    theirs = None if other is None else other.get_full_change()[update.block].to(device)
    trained = update.measure_parts(device) | measure_update(update.get_change().to(device), W0, theirs)
    drawn, null = update.draw_null(device)
    null |= measure_update(drawn.to(device), W0 if update.size_is_meaningful else None, theirs)
    values = {key: value for name in trained for key, value in ((name, trained[name]), (f"{name}_null", null[name]))}
    return (
        locate_update(update, settings)
        | values
        | {"signs_flipped": initial_factors and update.measure_flipped_signs(initial_factors, device)}
    )


def locate_update(update: Update, settings: Settings) -> dict[str, object]:
    """Return which weight a row is about. `ranks` are the inner dimensions of its factors: r1+r2, or r."""
    out, fan_in = update.get_weight().shape
    role = find_role(update.module, settings) + update.name.removeprefix(update.module)
    layer = find_layer_number(update.module)
    return {"module": update.name, "layer": layer, "role": role, "out": out, "in": fan_in, "ranks": update.ranks}


def measure_update(dW: torch.Tensor, W0: torch.Tensor | None, theirs: torch.Tensor | None) -> dict[str, float | None]:
    """Return the numbers of one dW (out x in), and its similarity to another run's."""
    similarity = dict.fromkeys(("cosine", "sign_agreement")) if theirs is None else analysis.compare_updates(dW, theirs)
    return analysis.measure_overall(dW, W0) | similarity


def format_analysis(content: dict, record: Record) -> str:
    """Return tables of medians over the layers of each role, as trained | null, with notes below them."""
    frame = drop_histograms(content["rows"])
    entries = [name for name in ENTRIES if frame[name].notna().any()]
    ranks, rest = [], []
    for (role, out, fan_in), group in frame.groupby(["role", "out", "in"], sort=False):
        where = [role, f"{out} x {fan_in}"]
        parts = content["labels"].items()
        ranks += [
            [*where, label, *(format_with_null(group, f"{part}_{kind}") for kind in RANK_KINDS)]
            for part, label in parts
        ]
        rest.append([*where, *(format_with_null(group, name) for name in entries)])
    tables = [
        format_medians(ranks, "role", "weight", "of", *RANK_KINDS),
        format_medians(rest, "role", "weight", *entries),
    ]
    figures = ", ".join(sorted(path.name for path in record.folder.glob("*.png")))
    files = f"analysis.json, analysis.csv, {figures} (and as PDF)"
    return "\n\n".join([*tables, "\n".join(explain_analysis(content)), f"analysed: {record.format_path()}: {files}"])


def explain_analysis(content: dict) -> list[str]:
    """Return the notes that a reader of the numbers needs, one a line."""
    initial_match, scale = content["beginning"], content["update_scale"]
    found = [f"Medians over layers, trained | null. Null: {content['null']}."]
    if scale not in (None, 1.0):
        found.append(f"The ramp had reached f = {scale:g} when training ended; the null is at f = 1.")
    if initial_match["rebuilt"]:
        cosine, sure = initial_match["least_cosine"], initial_match["least_over_chance"]
        found.append(
            "Signs flipped: compared with the factors that the run's seed draws. Every trained factor's cosine with "
            f"its draw is at least {cosine:.2f}, {sure:.0f} standard deviations above chance."
        )
    elif scale is not None:
        found.append(f"Signs flipped: unknown, because {initial_match['why']}.")
    if content["against"]:
        found.append(f"Cosine and sign agreement: with the dW of {content['against']}.")
    return found


def format_medians(rows: list[list[str]], *heads: str) -> str:
    """Return rows as a table under these headings."""
    return tabulate(rows, headers=[head.replace("_", " ") for head in heads], disable_numparse=True)
