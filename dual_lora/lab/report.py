"""The report of an experiment, from run records alone. The same records give the same bytes.

runs/STUDY/report/
    table.md         the table, differences, published figures
    table.tex        its tables for LaTeX, with booktabs
    table.csv        every value of every run
    differences.csv  every comparison with a baseline
    report.html      all of it as one page that needs nothing else
    *.png, *.pdf     figures
"""

from collections.abc import Callable, Iterator
from itertools import count, product
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pandas as pd

import tasks
from dual_lora import paper
from dual_lora.lab import comparison, document, figures, ranks_report, rates
from dual_lora.lab.beside import beside, status
from dual_lora.lab.comparison import Pair
from dual_lora.lab.document import Block, Image, Table, Text
from dual_lora.lab.drawing import save
from dual_lora.lab.experiments import Experiment
from dual_lora.lab.grid import Done
from dual_lora.lab.mirror import open_mirror
from dual_lora.lab.results import FIELDS, MARKS, Column, columns, frame, heading, unit
from dual_lora.lab.runs import MADE_WITH
from dual_lora.lab.settings import UserError

MISSING = "–"
# Scores of which less is better.
LOWER = ("TER",)
# How many runs with other records the notes name.
MOST = 5
DIFFERENCES = "differences.csv"


def write(experiment: Experiment, done: list[Done], folder: Path) -> str:
    """Write the report below `folder` and return its table and sentences as Markdown.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    main, further = comparison.compared(experiment, done)
    blocks = list(body(experiment, done, folder, main, further))
    title = f"{experiment.title} ({experiment.name}, scale={experiment.scale})"
    text = document.markdown([Text(title, heading=True), *blocks])
    (folder / "table.md").write_text(text, "utf-8")
    (folder / "table.tex").write_text(document.latex(blocks, experiment.study), "utf-8")
    (folder / "report.html").write_text(document.html(blocks, title), "utf-8")
    frame(experiment, done).drop(columns="cell").to_csv(folder / "table.csv", index=False)
    comparison.listed([*main, *further]).to_csv(folder / DIFFERENCES, index=False)
    remove_others(folder, {block.path.stem for block in blocks if isinstance(block, Image)})
    return f"\n{text}\nreport: {folder}"


def remove_others(folder: Path, figures: set[str]) -> None:
    """Remove figures of an earlier report that this one does not have."""
    for path in folder.iterdir():
        if path.suffix in (".png", ".pdf") and path.stem not in figures:
            path.unlink()


def body(
    experiment: Experiment, done: list[Done], folder: Path, main: list[Pair], further: list[Pair]
) -> Iterator[Block]:
    """Yield what the report consists of, its figures written. main, further: the comparisons."""
    values = frame(experiment, done)
    reasons = numbered(values)
    if experiment.scale == "smoke":
        yield Text("Smoke: a few steps of bundled models show that the harness works; the numbers mean nothing.")
    if experiment.limit:
        yield Text(f"Limit: {experiment.limit}.")
    if experiment.analyse:
        yield from as_far_as(ranks_report.blocks(done, folder), "the analyses")
        yield Text("Runs", heading=True)
    yield main_table(experiment, done, values, reasons)
    yield Text(items=tuple(notes(experiment, done, values, reasons)))
    if experiment.tune:
        yield rates.table(experiment, done)
    if not experiment.analyse and (drawn := figures.draw(experiment, values, done)):
        yield Image(save(drawn, folder, "figure")[0], f"{experiment.title}; {figures.spread(experiment, values)}")
    yield from comparison.blocks(experiment, done, main, further)
    yield from published(experiment, done)
    yield from comparison.sentences(main, further)


def as_far_as(blocks: Iterator[Block], what: str) -> Iterator[Block]:
    """Yield blocks up to the first that cannot be told, and then why."""
    try:
        yield from blocks
    except UserError as error:
        yield Text(f"Of {what} no more can be told: {error}")


def troubles(experiment: Experiment, done: list[Done]) -> list[str]:
    """Return what the report needs and finished runs do not have."""
    found = []
    for cell in done:
        for check in needs(experiment) if cell.result else ():
            try:
                check(cell)
            except UserError as error:
                found.append(str(error))
    return list(dict.fromkeys(found))


def needs(experiment: Experiment) -> Iterator[Callable[[Done], object]]:
    """Yield what reads the files of a run that the report tells of."""
    yield lambda cell: cell.record.read("environment.json", *MADE_WITH)
    if experiment.baselines:
        yield comparison.predictions
    if experiment.analyse:
        yield lambda cell: cell.record.read(ranks_report.ANALYSIS, "rows", "labels")


def numbered(values: pd.DataFrame) -> dict[str, str]:
    """Return a letter for every reason why a value is missing: a to z, then aa, ab and so on."""
    reasons = dict.fromkeys(values.loc[values["value"].isna(), "reason"].dropna())
    return dict(zip(reasons, letters(), strict=False))


def letters() -> Iterator[str]:
    for size in count(1):
        yield from map("".join, product(ascii_lowercase, repeat=size))


def main_table(experiment: Experiment, done: list[Done], values: pd.DataFrame, reasons: dict[str, str]) -> Table:
    """Return the experiment's table: a row for each label, best values bold, published rows of the same model, method
    and rank below ours."""
    found, lines, best, aside = columns(experiment, done), [], [], []
    groups = list(values.groupby(experiment.rows, sort=False)) if experiment.rows else [((), values)]
    parts = {(name, label): part for name, group in groups for label, part in group.groupby("label", sort=False)}
    runs = {place: [done[i] for i in sorted(set(part["cell"]) - {-1})] for place, part in parts.items()}
    tops, quotes = {name: leaders(group, found, experiment) for name, group in groups}, beside(experiment, done, runs)
    for (name, label), part in parts.items():
        heads = dict(zip(map(heading, experiment.rows), map(str, name), strict=True))
        cells = {shown_head(c): shown(part[part["column"] == c.head], c, done, reasons) for c in found}
        lines.append({**heads, "method": label, **cells, **cost(runs[name, label], found)})
        best.append({key: (label, key) in tops[name] for key in lines[-1]})
        for table, cells in quotes.get((name, label), {}).items():
            aside.append(len(lines))
            cells = {shown_head(c): cells[c.head] for c in found if c.head in cells}
            lines.append({**heads, "method": f"{label} [{table}]", **cells})
            best.append({})
    cells = pd.DataFrame(lines).fillna("")
    bold = pd.DataFrame(best).reindex(columns=cells.columns).fillna(False).astype(bool)
    return Table(cells, caption(experiment, done), bold, frozenset(aside))


def caption(experiment: Experiment, done: list[Done]) -> str:
    """Return what the numbers are."""
    seeds = ", ".join(map(str, sorted({cell.settings.seed for cell in done})))
    kind = f"Main score ({metrics(done)}), %, by {experiment.columns}"
    if experiment.columns == "published":
        kind = "Scores as the published table has them"
    elif isinstance(experiment.columns, dict):
        kind = "Values of the runs"
    measured = isinstance(experiment.columns, dict) and FIELDS.keys() >= set(experiment.columns.values())
    best = "" if measured else "; best mean bold"
    return f"{kind}: mean ± sample standard deviation (number of runs); seeds {seeds}{best}."


def metrics(done: list[Done]) -> str:
    """Return which score is the main one, of which tasks where they differ."""
    names: dict[str, list[str]] = {}
    for task in dict.fromkeys(cell.settings.task.name for cell in done):
        names.setdefault(tasks.load(task).metric, []).append(task)
    return next(iter(names)) if len(names) == 1 else "; ".join(f"{m} of {', '.join(t)}" for m, t in names.items())


def shown_head(column: Column) -> str:
    return f"{column.head:g}" if isinstance(column.head, float) else str(column.head)


def shown(part: pd.DataFrame, column: Column, done: list[Done], reasons: dict[str, str]) -> str:
    """Return a cell: mean ± standard deviation (n) and marks, or a dash with its reason's letter; empty where no run
    was asked for."""
    if part.empty:
        return ""
    scores = part["value"].dropna()
    missing = set(part.loc[part["value"].isna(), "reason"].dropna())
    why = f" [{', '.join(letter for reason, letter in reasons.items() if reason in missing)}]" if missing else ""
    if scores.empty:
        return MISSING + why
    style = column.format(done[0].settings.task.name)
    spread = f" ± {style.format(scores.std(ddof=1))}" if len(scores) > 1 else ""
    marks = "".join(sorted(set("".join(part["marks"]))))
    return f"{style.format(scores.mean())}{spread} ({len(scores)}){marks}{why}"


def leaders(group: pd.DataFrame, found: list[Column], experiment: Experiment) -> set[tuple[str, str]]:
    """Return the (label, heading) of the best mean of every column of scores, or of the whole table where its columns
    are values of a setting other than the task; none where nothing stands beside it."""
    apart = experiment.columns == "task.name"
    means = group.groupby(["label", "column"], sort=False)["value"].mean().dropna()
    named = [column for column in found if column.field not in FIELDS]
    single = apart or isinstance(experiment.columns, dict)
    families = [[c] for c in named if single or c.task or c.parts] or [named]
    top = set()
    for family in families:
        part = means[means.index.get_level_values("column").isin([c.head for c in family])]
        if len(part) > 1 and not np.isclose(part.min(), part.max(), rtol=0, atol=1e-9):
            best = part.min() if family[0].field in LOWER else part.max()
            names = {c.head: shown_head(c) for c in family}
            top |= {(label, names[head]) for label, head in part.index[np.isclose(part, best, rtol=0, atol=1e-9)]}
    return top


def cost(runs: list[Done], found: list[Column]) -> dict[str, str]:
    """Return the trained weights and the seconds a step of a row's runs, unless these are the table's columns."""
    if any(column.field in FIELDS for column in found):
        return {}
    results = [cell.result for cell in runs if cell.result]
    trained = sorted({result["trainable_parameters"] for result in results})
    seconds = sorted(FIELDS["seconds_per_step"][0](result) for result in results)
    return {"trained": ranged(trained, "{:,.0f}"), "s/step": ranged(seconds, "{:.2f}")}


def ranged(numbers: list[float], style: str) -> str:
    """Return the smallest and the largest of sorted numbers, or the one that all print as."""
    ends = list(dict.fromkeys(style.format(numbers[i]) for i in ((0, -1) if numbers else ())))
    return " to ".join(ends) or MISSING


def notes(experiment: Experiment, done: list[Done], values: pd.DataFrame, reasons: dict[str, str]) -> Iterator[str]:
    """Yield what a reader must know of the table: reasons, marks, learning rates, data, machines and code."""
    for reason, letter in reasons.items():
        yield f"{MISSING} [{letter}]: {reason}"
    for mark in sorted(set("".join(values["marks"].dropna()))):
        yield f"{mark}: {MARKS[mark]}"
    yield from rates.told(experiment, done)
    yield from clipped(done)
    best = sorted({cell.settings.task.name for cell in done if cell.settings.task.checkpoint == "best"})
    if best:
        yield (
            f"checkpoint: of {', '.join(best)} the epoch that did best on the reported rows, as LoRA reports it; "
            "scores, intervals and p know nothing of that choice"
        )
    files = {
        f"{name} {facts['origin']}, {facts['rows']:,} rows"
        for cell in done
        for name, facts in (cell.result["data"].items() if cell.result else ())
    }
    if files:
        yield f"data: {'; '.join(sorted(files))}"
    yield from origins(done)
    yield from (f"not read: {trouble}" for trouble in troubles(experiment, done))


def clipped(done: list[Done]) -> Iterator[str]:
    """Yield how much of Sign's gradient was clipped, the largest share of a row's runs."""
    shares: dict[str, float] = {}
    for cell in done:
        if (share := (cell.result or {}).get("clipped_share")) is not None:
            shares[cell.cell.label] = max(share, shares.get(cell.cell.label, 0.0))
    if shares:
        told = ", ".join(f"{label} {share:.2g}" for label, share in shares.items())
        none = "; where it is 0, clip is identity" if 0 in shares.values() else ""
        yield f"share of Sign's gradient that was clipped, the largest at a logged step: {told}{none}"


def origins(done: list[Done]) -> Iterator[str]:
    """Yield on what machines and with what code the runs were done, and of which settings there are other records."""
    places = [cell.record.made_with() for cell in done if cell.result]
    known = [place for place in places if place]
    if known:
        machines = {f"{p.get('accelerator') or p.get('processor')}, {p['threads']} threads" for p in known}
        yield f"machines: {'; '.join(sorted(machines))}"
    if places:
        commits = {c or "unknown" for p in places for c in (p.get("commit"), *p.get("earlier_commits", []))}
        yield f"code: {', '.join(sorted(commit[:10] for commit in commits))}"
    for name, found in beginnings(done).items():
        if len(found) > 1:
            groups = "; ".join(", ".join(some[:MOST]) + (" and more" if len(some) > MOST else "") for some in found)
            yield f"runs of {name} that were done with different files and do not compare: {groups}"
    if told := [rivals(cell) for cell in done if cell.others]:
        more = f" and {len(told) - MOST} more" if len(told) > MOST else ""
        yield (
            "several finished records of the same settings (other data, weights, task version or code); shown is the "
            "newest of those with the task as it is now and committed code: " + "; ".join(told[:MOST]) + more
        )


def beginnings(done: list[Done]) -> dict[str, list[list[str]]]:
    """Return the names of finished runs by model, and by the files it was loaded from."""
    found: dict[str, dict[str, list[str]]] = {}
    for cell in done:
        if cell.result and (files := comparison.weights(cell)):
            found.setdefault(cell.settings.model.name, {}).setdefault(files, []).append(cell.record.name)
    return {name: list(groups.values()) for name, groups in found.items()}


def rivals(cell: Done) -> str:
    """Return a run that is shown and those that are not, with their main scores."""
    results = {record.name: record.result() for record in (cell.record, *cell.others)}
    scores = [f"{name} ({r['metrics'][r['metric']] * unit(r['task'], r['metric']):.1f})" for name, r in results.items()]
    return f"{scores[0]}, not {', '.join(scores[1:])}"


def published(experiment: Experiment, done: list[Done]) -> Iterator[Block]:
    """Yield the published tables an experiment is set beside, whatever our models are."""
    if experiment.published:
        yield Text("Set beside", heading=True)
    for table in map(paper.load, experiment.published):
        cells = published_cells(table)
        about = "; ".join(f"{key}: {value}" for key, value in table.protocol.items())
        title = f"{'Computed' if table.status == 'own' else 'Published'}: {table.title}"
        known = f"{table.status}; version: {table.version}; {table.source[0]}; {about}"
        yield Table(
            cells, f"{title}: {likeness(experiment, table, done)} ({known}).", aside=frozenset(range(len(cells)))
        )


def published_cells(table: paper.Table) -> pd.DataFrame:
    """Return a published table as it is printed, the status of a value where it is not its table's."""
    lines = []
    for row in table.rows:
        values = {head: value.text + status(value.status, table) for head, value in row.values.items()}
        lines.append({**{k: MISSING if v is None else v for k, v in row.keys.items()}, **values})
    return pd.DataFrame(lines).fillna(MISSING)


def likeness(experiment: Experiment, table: paper.Table, done: list[Done]) -> str:
    """Return what a published table has to do with the runs above."""
    models = {row.keys["model"] for row in table.rows if row.keys.get("model")}
    shared = sorted(models & {cell.settings.model.name for cell in done})
    if not models:
        return "of no single model"
    more = ", and other models" if len(models) > len(shared) else ""
    same = f"{', '.join(shared)} as above{more}" if shared else "other models than above"
    return same + ("" if experiment.scale == "full" else ", other data and lengths of training")


def mirrored(experiment: Experiment, done: list[Done], folder: Path) -> None:
    """Send a written report to W&B, as a run of its own in the study's group: its tables, all values, every
    figure."""
    wandb = done[0].settings.wandb
    study = folder.parent.name
    mirror = open_mirror(
        wandb.mode,
        project=wandb.project,
        entity=wandb.entity,
        run_id=f"{study}-report",
        name=f"{study} report",
        group=study,
        job_type="report",
        tags=[experiment.name, experiment.scale],
        config={"experiment": experiment.name, "scale": experiment.scale},
        folder=folder.parent,
    )
    values = frame(experiment, done)
    tables = {"table": main_table(experiment, done, values, numbered(values)).cells}
    tables |= {f"published/{name}": published_cells(paper.load(name)) for name in experiment.published}
    tables = {name: cells.astype(str) for name, cells in tables.items()}  # W&B takes one type a column
    files = {"values": "table.csv", "differences": DIFFERENCES}
    tables |= {name: pd.read_csv(folder / file) for name, file in files.items() if (folder / file).stat().st_size > 1}
    mirror.show(tables, {path.stem: path for path in sorted(folder.glob("*.png"))})
    mirror.finish()
